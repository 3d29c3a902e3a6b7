"""What a language model is asked about a sequence of tokens: which token stands at which place.

Shape letters: B batch, T token, V vocabulary, M places asked about.
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


def log_likelihood(logits_TV: Tensor, probe: Probe) -> np.ndarray:
    """The natural logarithm of the probability of each target, `[M]`, in nats; softmax in float32."""
    return _to_numpy(predictions.log_likelihood(logits_TV, probe.positions, probe.targets))


def divergence(dense_TV: Tensor, logits_TV: Tensor, probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """How far two models' predictions are apart at each place.

    Returns:
        KL divergence of `logits_TV` from `dense_TV` in nats, `[M]`, see `avss.models.predictions`, and whether both
        hold the same token for the most probable one, 1 or 0, `[M]`.
    """
    divergences = predictions.divergence(dense_TV, logits_TV, probe.positions)
    dense, other = (logits.argmax(-1).cpu()[probe.positions] for logits in (dense_TV, logits_TV))
    return _to_numpy(divergences), _to_numpy(dense == other)


def _to_numpy(row: Tensor) -> np.ndarray:
    return row.cpu().numpy().astype(np.float64)
