"""What a language model is asked about a sequence of tokens: which token stands at which place.

Shape letters: B batch, T token, V vocabulary, M places a probe asks about, N places asked about in a batch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from avss.data.batches import pad
from avss.models import predictions


@dataclasses.dataclass(frozen=True)
class Probe:
    """One sequence to feed, and the places at which its logits are read.

    Attributes:
        token_ids: What the model reads, `[T]`.
        positions: Where the logits are read, `[M]`.
        targets: The token that truly stands there, `[M]`.
    """

    token_ids: Tensor
    positions: Tensor
    targets: Tensor


def next_tokens(token_ids: Tensor, start: int = 1) -> Probe:
    """Asks a causal model for each token from `start` on, given those before it. The last one need not be read."""
    return Probe(
        token_ids=token_ids[:-1], positions=torch.arange(start - 1, len(token_ids) - 1), targets=token_ids[start:]
    )


def hidden_tokens(token_ids: Tensor, places: Tensor, mask_id: int) -> Probe:
    """Asks a masked model for the tokens at `places` `[M]`, all of them replaced by the mask at once."""
    seen = token_ids.clone()
    seen[places] = mask_id
    return Probe(token_ids=seen, positions=places, targets=token_ids[places])


def in_batches(sequences: Sequence[Tensor], batch_size: int, pad_id: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of sequences of similar length, the longest first so that a lack of memory shows at once.

    Yields:
        Which sequences they are, token ids `[B, T]` and keep `[B, T]`, padded on the right.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, *pad([sequences[index] for index in chosen], pad_id)


def num_batches(num_sequences: int, batch_size: int) -> int:
    """How many batches `in_batches` makes."""
    return -(-num_sequences // batch_size)


def ask(rows: Sequence[Sequence[Probe]], keep: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Where a batch is asked anything, and where each probe's answers are found among those for the batch.

    Args:
        rows: The probes of each sequence of the batch; those of one sequence may ask about the same places.
        keep: `[B, T]`.

    Returns:
        `[B, T]`, True where logits are wanted, and for each probe, in the order of `rows`, indices `[M]` into the
        logits `[N, V]` that `avss.models.asked` gives.
    """
    asked = torch.zeros_like(keep)
    for row, probes in enumerate(rows):
        for probe in probes:
            asked[row, probe.positions] = True
    index = asked.flatten().cumsum(0).reshape(asked.shape) - 1
    return asked, [[index[row, probe.positions] for probe in probes] for row, probes in enumerate(rows)]


def log_likelihood(logits_NV: Tensor, places_M: Tensor, targets_M: Tensor) -> np.ndarray:
    """The natural logarithm of the probability of each target, `[M]`, in nats; softmax in float32."""
    return _to_numpy(predictions.log_likelihood(logits_NV, places_M, targets_M))


def divergence(dense_NV: Tensor, logits_NV: Tensor, places_M: Tensor) -> np.ndarray:
    """KL divergence of `logits_NV` from `dense_NV` at each place, `[M]`, in nats, see `avss.models.predictions`."""
    return _to_numpy(predictions.divergence(dense_NV, logits_NV, places_M))


def _to_numpy(row: Tensor) -> np.ndarray:
    return row.cpu().numpy().astype(np.float64)
