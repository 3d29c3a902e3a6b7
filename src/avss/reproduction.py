"""The measurements of the published AVSS script, to the digit: one forward and one backward pass a batch."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from avss.data.published import PublishedBatches
from avss.errors import DegenerateStatisticError, UnsupportedArchitectureError
from avss.models.gradients import watched_gradients
from avss.models.load import Loaded
from avss.models.stack import hooked
from avss.models.sublayers import WeightChoice, weight_matrices
from avss.record import PublishedMetrics
from avss.statistics.base import AbstractStatistic, Rows
from avss.statistics.observation import GradientNumbers, Hidden, Observation, WeightNumbers
from avss.statistics.published import PublishedAverages, PublishedGradients

_AVERAGES, _GRADIENTS = PublishedAverages(), PublishedGradients()


def reproduce_metrics(
    loaded: Loaded, batches: PublishedBatches, *, weights: WeightChoice, on_batch: Callable[[], None] = lambda: None
) -> PublishedMetrics:
    """The five averages of the published script for every block.

    The model's own loss is taken with labels where it classifies; any other model predicts its own input ids, padding
    included, as the published scripts for language models do. The attention mask is passed, as the SST-2 script does.

    Args:
        loaded: The model; left as it was, whatever happens.
        batches: The texts.
        weights: Whose gradients and weights are measured: the SST-2 script takes the feed-forward matrices.
        on_batch: Called after each batch, for progress.

    Raises:
        UnsupportedArchitectureError: The model has no loss, or its blocks no such weights.
        DegenerateStatisticError: An average is not a number.
    """
    if loaded.head == "encoder":
        raise UnsupportedArchitectureError(
            f"`{loaded.source}` is used as a bare encoder and has no loss to differentiate. Use `--head classifier` "
            "with labelled texts, or `--head masked`."
        )
    matrices = [weight_matrices(block, weights) for block in loaded.stack.blocks]
    rows: dict[tuple[AbstractStatistic, int], list[Rows]] = {}
    gradients: list[list[Tensor]] = []
    mask = torch.empty(0)

    def observe(index: int, _: Tensor, after: Tensor) -> None:
        with torch.no_grad():
            hidden = Hidden(after.detach())
            seen = _AVERAGES.observe(Observation(hidden, hidden, mask.to(after.device).bool()))
        rows.setdefault((_AVERAGES, index), []).append(_to_rows(seen))

    def reduce(index: int, _: str, weight: Tensor, gradient: Tensor) -> None:
        gradients[index].append(GradientNumbers.of_one(weight, gradient))

    with hooked(loaded.stack, observe), watched_gradients(loaded, matrices, reduce), _padding_known(loaded, batches):
        for token_ids, mask, labels in batches:
            gradients[:] = [[] for _ in matrices]
            loss = _loss(loaded, token_ids, mask, labels)
            loss.backward()
            for index, kept in enumerate(gradients):
                seen = _GRADIENTS.observe(GradientNumbers.of(kept, loss.detach()))
                rows.setdefault((_GRADIENTS, index), []).append(_to_rows(seen))
            on_batch()
    return _averages(loaded, rows, matrices, weights)


def _loss(loaded: Loaded, token_ids: Tensor, mask: Tensor, labels: Tensor | None) -> Tensor:
    inputs = token_ids.to(loaded.device)
    targets = inputs if labels is None else labels.to(loaded.device)
    return loaded.model(input_ids=inputs, attention_mask=mask.to(loaded.device), labels=targets).loss


@contextlib.contextmanager
def _padding_known(loaded: Loaded, batches: PublishedBatches) -> Iterator[None]:
    """Tells a classifier the padding token, by which a decoder finds the end of a text, while the context is open."""
    config, before = loaded.model.config, getattr(loaded.model.config, "pad_token_id", None)
    padding = batches.token_ids[batches.mask == 0]
    if loaded.head == "classifier" and before is None and len(padding):
        config.pad_token_id = int(padding[0])
    try:
        yield
    finally:
        if hasattr(config, "pad_token_id"):
            config.pad_token_id = before


def _averages(
    loaded: Loaded,
    rows: dict[tuple[AbstractStatistic, int], list[Rows]],
    matrices: list[dict[str, torch.nn.Parameter]],
    weights: WeightChoice,
) -> PublishedMetrics:
    blocks = range(len(loaded.stack))
    activations = [_AVERAGES.summarise(Rows.merge(rows[_AVERAGES, index]), first_token=True) for index in blocks]
    norms = [_GRADIENTS.summarise(Rows.merge(rows[_GRADIENTS, index]), first_token=True) for index in blocks]
    columns = {
        "variance": tuple(one["variance"] for one in activations),
        "l1_norm": tuple(one["l1"] for one in norms),
        "l2_norm": tuple(one["l2"] for one in norms),
        "frobenius_norm": tuple(float(WeightNumbers.of(one.values()).l2.sum()) for one in matrices),
        "sparsity": tuple(one["sparsity"] for one in activations),
    }
    for name, values in columns.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise DegenerateStatisticError(
                f"The average {name} of block {bad[0]} is {values[bad[0]]}: activations, gradients or weights are nan "
                "or infinite there. Check the weights, or compute in another dtype (`--dtype float32`)."
            )
    return PublishedMetrics.model_validate({**columns, "weights": weights, "matrices": tuple(matrices[0])})


def _to_rows(columns: dict[str, Tensor]) -> Rows:
    return Rows(columns={name: np.asarray(column.cpu().numpy(), dtype=np.float64) for name, column in columns.items()})
