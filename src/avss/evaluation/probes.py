"""What a language model is asked about a sequence of tokens: which token stands at which place.

Shape letters: B batch, T token, V vocabulary, M places asked about.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from avss.data.batches import pad

_VALUES_AT_ONCE = 2**22
"""Logits turned into float32 probabilities at a time: 16 MB, however large the vocabulary."""


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
    rows = [
        torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None])[:, 0]
        for logits, targets in _chunks(logits_TV, probe)
    ]
    return _to_numpy(rows)


def divergence(dense_TV: Tensor, logits_TV: Tensor, probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    r"""How far two models' predictions are apart at each place.

    Returns:
        KL divergence $\sum_v p_v (\ln p_v - \ln q_v)$ of `logits_TV` from `dense_TV` in nats, `[M]`, and whether both
        hold the same token for the most probable one, 1 or 0, `[M]`.
    """
    divergences, agreements = [], []
    for (dense, _), (logits, _) in zip(_chunks(dense_TV, probe), _chunks(logits_TV, probe), strict=True):
        log_p, log_q = torch.log_softmax(dense, dim=-1), torch.log_softmax(logits.to(dense.device), dim=-1)
        # A token that the dense model rules out (-inf) adds nothing, whatever the other makes of it.
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        divergences.append(terms.sum(-1))
        agreements.append((dense.argmax(-1) == logits.argmax(-1).to(dense.device)).float())
    return _to_numpy(divergences), _to_numpy(agreements)


def _chunks(logits_TV: Tensor, probe: Probe) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _VALUES_AT_ONCE // logits_TV.shape[-1])
    positions, targets = probe.positions.to(logits_TV.device), probe.targets.to(logits_TV.device)
    for start in range(0, len(positions), size):
        yield logits_TV[positions[start : start + size]].float(), targets[start : start + size]


def _to_numpy(rows: list[Tensor]) -> np.ndarray:
    return torch.cat(rows).cpu().numpy().astype(np.float64)
