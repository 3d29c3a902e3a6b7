"""Passes over the data with a hook on every block: model + batches -> statistics.

One forward pass serves every statistic of activations, one more serves every statistic of gradients, and statistics of
weights need no pass at all.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from avss.data.batches import Inputs
from avss.errors import NoObservationsError, UnsupportedArchitectureError
from avss.models.families import Family, facts_of
from avss.models.forward import run_body
from avss.models.gradients import watched_gradients
from avss.models.load import Loaded
from avss.models.loss import own_loss
from avss.models.stack import hooked
from avss.models.sublayers import SubLayerStates, weight_matrices
from avss.statistics.angles import WindowAngles
from avss.statistics.base import AbstractStatistic, Rows
from avss.statistics.collected import Collected
from avss.statistics.observation import GradientNumbers, Hidden, Observation, Passage, WeightNumbers

Seen = dict[tuple[AbstractStatistic, int], dict[str, Tensor]]
"""Columns of one batch, by statistic and block."""

Batches = Iterable[tuple[Inputs, Tensor]]


def num_passes(statistics: Iterable[AbstractStatistic]) -> int:
    """Passes over the data that these statistics take, 1 or 2; the data are counted even where no model has to run."""
    probes = {statistic.probe for statistic in statistics}
    return max(1, bool(probes & {"block", "stack"}) + ("backward" in probes))


def collect(
    loaded: Loaded,
    batches: Batches,
    statistics: Iterable[AbstractStatistic],
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Collected:
    """Observes every statistic at every block.

    The forward pass runs the model's body only; the head is not needed. The backward pass runs the whole model for its
    own loss (`avss.models.loss`). Nothing of activations and gradients is kept but the statistics' rows. Where the
    stack belongs to a tower that reads images, the tower is all that runs.

    Args:
        loaded: The model; left as it was, whatever happens.
        batches: Pairs of token ids `[B, T]`, or the keyword arguments of the tower (images), and keep `[B, T]` (True
            for real tokens).
        statistics: What to observe; each once, however often it is named.
        on_batch: Called after each batch of each pass, for progress.

    Raises:
        ConfigError: The model is on a device that does not compute in float64.
        NoObservationsError: There was no batch, or none had a target to predict.
        UnsupportedArchitectureError: The blocks are not residual blocks, or lack the parts a statistic looks at.
    """
    loaded = loaded.tower()
    loaded.check_float64()
    wanted = tuple(dict.fromkeys(statistics))
    forward = tuple(one for one in wanted if one.probe in ("block", "stack"))
    backward = tuple(one for one in wanted if one.probe == "backward")
    if backward:
        loaded.check_in_memory("A score by gradients")
    batches = list(batches) if forward and backward else batches
    seen: list[Seen] = []
    if forward or not backward:
        seen += _forward(loaded, batches, forward, on_batch)
    if backward:
        seen += _backward(loaded, batches, backward, on_batch)
    weights = tuple(one for one in wanted if one.probe == "weights")
    if weights:
        seen.append(_weights(loaded, weights))
    return Collected(
        num_blocks=len(loaded.stack),
        rows={
            statistic: tuple(
                Rows.merge([_to_rows(batch[statistic, index]) for batch in seen if (statistic, index) in batch])
                for index in range(len(loaded.stack))
            )
            for statistic in wanted
        },
    )


def _forward(
    loaded: Loaded, batches: Batches, statistics: tuple[AbstractStatistic, ...], on_batch: Callable[[], None]
) -> Iterator[Seen]:
    by_block = tuple(one for one in statistics if one.probe == "block")
    by_stack = tuple(one for one in statistics if isinstance(one, WindowAngles))
    seen: Seen = {}
    passages: dict[str, Passage] = {}
    current_keep = torch.empty(0)
    ran: set[int] = set()
    previous: Hidden | None = None
    stack = loaded.stack
    family = facts_of(stack.owner(loaded.model.config).model_type)

    def observe(index: int, before: Tensor, after: Tensor) -> None:
        nonlocal previous
        if index in ran:
            raise UnsupportedArchitectureError(
                f"Block {index} runs several times in one pass (its weights are shared), so it has no single score."
            )
        ran.add(index)
        if family.time_major:
            before, after = before.transpose(0, 1), after.transpose(0, 1)
        # The state between two blocks is one tensor; its numbers are computed once.
        hidden_in = previous if previous is not None and previous.source is before else Hidden(before)
        previous = Hidden(after)
        fitting = _fitting(current_keep, after, family)
        if by_block:
            sublayers = inside.take(index, before) if inside is not None else None
            observation = Observation(hidden_in, previous, fitting.to(before.device), sublayers)
            for statistic in by_block:
                seen[statistic, index] = statistic.observe(observation)
        for passage in passages.values():
            passage.record(index, before, after, fitting)

    num_batches = 0
    with contextlib.ExitStack() as hooks:
        looks_inside = any(statistic.looks_inside for statistic in by_block)
        inside = hooks.enter_context(SubLayerStates.watched(loaded)) if looks_inside else None
        hooks.enter_context(hooked(stack, observe))
        for inputs, keep in batches:
            current_keep, previous, num_batches = keep, None, num_batches + 1
            seen = {}
            ran.clear()
            passages = {one.token: Passage(len(stack), one.token) for one in by_stack}
            if statistics:
                run_body(loaded, inputs, keep)
                if len(ran) != len(stack):
                    raise UnsupportedArchitectureError(
                        f"{len(stack) - len(ran)} of {len(stack)} blocks of `{stack.path}` do not run on these data, "
                        "which so cannot score them. Choose another stack (`avss inspect` lists them)."
                    )
            for statistic in by_stack:
                for index in range(len(stack)):
                    seen[statistic, index] = statistic.observe(passages[statistic.token].windows_from(index))
            yield seen
            on_batch()
    if not num_batches:
        raise NoObservationsError("There was no batch to observe. Give some data.")


def _backward(
    loaded: Loaded, batches: Batches, statistics: tuple[AbstractStatistic, ...], on_batch: Callable[[], None]
) -> Iterator[Seen]:
    matrices = [weight_matrices(block) for block in loaded.stack.blocks]
    kept: list[list[Tensor]] = []

    def reduce(index: int, _: str, weight: Tensor, gradient: Tensor) -> None:
        kept[index].append(GradientNumbers.of_one(weight, gradient))

    num_targets = 0
    with watched_gradients(loaded, matrices, reduce):
        for inputs, keep in batches:
            kept[:] = [[] for _ in matrices]
            loss, targets = own_loss(loaded, inputs, keep)
            if int(targets):
                num_targets += int(targets)
                loss.backward()
                numbers = [GradientNumbers.of(one, targets) for one in kept]
                yield {(one, index): one.observe(numbers[index]) for one in statistics for index in range(len(numbers))}
            on_batch()
    if not num_targets:
        raise NoObservationsError(
            "No batch had anything to predict, so there is no loss and no gradient. Give longer texts or a larger "
            "`--seq-len`."
        )


def _weights(loaded: Loaded, statistics: tuple[AbstractStatistic, ...]) -> Seen:
    numbers = []
    for block in loaded.stack.blocks:
        with loaded.files.at_hand(block) if loaded.files is not None else contextlib.nullcontext():
            numbers.append(WeightNumbers.of(weight_matrices(block).values()))
    return {(one, index): one.observe(numbers[index]) for one in statistics for index in range(len(numbers))}


def _fitting(keep: Tensor, hidden: Tensor, family: Family) -> Tensor:
    """The mask of a hidden state's tokens. Some models lengthen a batch: what they add is no token."""
    (rows, length), (num_sequences, num_tokens) = keep.shape, hidden.shape[:2]
    if num_sequences != rows or num_tokens < length or (num_tokens > length and not family.lengthens):
        raise UnsupportedArchitectureError(
            f"A block's hidden state is {tuple(hidden.shape)} for a batch of {rows} sequences of {length} tokens: "
            "which of its rows are tokens is not known, so it cannot be scored."
        )
    return torch.nn.functional.pad(keep, (0, num_tokens - length)) if num_tokens > length else keep


def _to_rows(columns: dict[str, Tensor]) -> Rows:
    return Rows(columns={name: np.asarray(column.cpu().numpy(), dtype=np.float64) for name, column in columns.items()})
