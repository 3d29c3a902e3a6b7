"""One pass over the data with a hook on every block: model + batches -> statistics."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from avss.errors import NoObservationsError
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
    previous: Hidden | None = None

    def observe(index: int, before: Tensor, after: Tensor) -> None:
        nonlocal previous
        # The state between two blocks is one tensor; its numbers are computed once.
        hidden_in = previous if previous is not None and previous.source is before else Hidden(before)
        previous = Hidden(after)
        observation = Observation(hidden_in, previous, current_keep.to(before.device))
        for statistic in wanted:
            seen[-1][statistic, index] = statistic.observe(observation)

    num_batches = 0
    with hooked(stack, observe):
        for token_ids, keep in batches:
            current_keep, previous, num_batches = keep, None, num_batches + 1
            seen.append({})
            if wanted:
                run_body(loaded, token_ids, keep)
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


def _to_rows(columns: dict[str, Tensor]) -> Rows:
    return Rows(columns={name: np.asarray(column.cpu().numpy(), dtype=np.float64) for name, column in columns.items()})
