"""One pass over the data with a hook on every block: model + batches -> statistics."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from avss.errors import NoObservationsError, UnsupportedArchitectureError
from avss.models.families import Family, facts_of
from avss.models.forward import run_body
from avss.models.load import Loaded
from avss.models.stack import hooked
from avss.statistics.base import AbstractStatistic, Rows
from avss.statistics.collected import Collected
from avss.statistics.observation import Hidden, Observation


def collect(
    loaded: Loaded,
    batches: Iterable[tuple[Tensor, Tensor]],
    statistics: Iterable[AbstractStatistic],
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Collected:
    """Observes every statistic at every block in one forward pass over the batches.

    Only the model's body runs; the head is not needed. Nothing of the activations is kept but the statistics' rows.

    Args:
        loaded: The model; left as it was, whatever happens.
        batches: Pairs of token ids `[B, T]` and keep `[B, T]` (True for real tokens).
        statistics: What to observe; each once, however often it is named.
        on_batch: Called after each batch, for progress.

    Raises:
        NoObservationsError: There was no batch.
        UnsupportedArchitectureError: The blocks are not residual blocks.
    """
    wanted = tuple(dict.fromkeys(statistics))
    stack = loaded.stack
    seen: list[dict[tuple[AbstractStatistic, int], dict[str, Tensor]]] = []
    current_keep = torch.empty(0)
    ran: set[int] = set()
    previous: Hidden | None = None

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
        observation = Observation(hidden_in, previous, _fitting(current_keep, after, family).to(before.device))
        for statistic in wanted:
            seen[-1][statistic, index] = statistic.observe(observation)

    num_batches = 0
    with hooked(stack, observe):
        for token_ids, keep in batches:
            current_keep, previous, num_batches = keep, None, num_batches + 1
            ran.clear()
            seen.append({})
            if wanted:
                run_body(loaded, token_ids, keep)
                if len(ran) != len(stack):
                    raise UnsupportedArchitectureError(
                        f"{len(stack) - len(ran)} of {len(stack)} blocks of `{stack.path}` do not run on text, so text "
                        "cannot score them. Choose a stack that reads text (`avss inspect` lists them)."
                    )
            on_batch()
    if not num_batches:
        raise NoObservationsError("There was no batch to observe. Give some text.")
    return Collected(
        num_blocks=len(stack),
        rows={
            statistic: tuple(
                Rows.merge([_to_rows(batch[statistic, index]) for batch in seen]) for index in range(len(stack))
            )
            for statistic in wanted
        },
    )


def _fitting(keep: Tensor, hidden: Tensor, family: Family) -> Tensor:
    """The mask of a hidden state's tokens. Some models lengthen a batch: what they add is no token."""
    (rows, length), (num_sequences, num_tokens) = keep.shape, hidden.shape[:2]
    if num_sequences != rows or num_tokens < length or (num_tokens > length and not family.lengthens):
        raise UnsupportedArchitectureError(
            f"A block's hidden state is {tuple(hidden.shape)} for a batch of {rows} sequences of {length} tokens: "
            "which of its "
            "rows are tokens is not known, so it cannot be scored on text."
        )
    return torch.nn.functional.pad(keep, (0, num_tokens - length)) if num_tokens > length else keep


def _to_rows(columns: dict[str, Tensor]) -> Rows:
    return Rows(columns={name: np.asarray(column.cpu().numpy(), dtype=np.float64) for name, column in columns.items()})
