"""How good predictions are, and how far apart two models' are: softmax over the last axis, in float32, in nats.

A vocabulary times a batch of tokens is large, so a few million logits are read at a time.

Shape letters: R rows of logits, V words or labels, N places read.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_VALUES_AT_ONCE = 2**22
"""Logits turned into float32 probabilities at a time: 16 MB, however large the vocabulary."""


def log_likelihood(logits_RV: Tensor, places_N: Tensor, targets_N: Tensor) -> Tensor:
    """The natural logarithm of the probability of each target, `[N]`.

    Args:
        logits_RV: All logits.
        places_N: Rows to read.
        targets_N: What truly stands at each of them.
    """
    places, targets = places_N.to(logits_RV.device), targets_N.to(logits_RV.device)
    rows = [
        torch.log_softmax(logits_RV[places[piece]].float(), dim=-1).gather(-1, targets[piece, None])[:, 0]
        for piece in _pieces(logits_RV, places)
    ]
    return torch.cat(rows)


class Reference:
    r"""The dense model's predictions at some places, kept to compare many models with: two float32 numbers a word.

    Args:
        dense_RV: All logits.
        places_N: Rows to read.
    """

    def __init__(self, dense_RV: Tensor, places_N: Tensor) -> None:
        self._places = places_N.to(dense_RV.device)
        self._log_p = _log_softmax(dense_RV[self._places])
        self._p = self._log_p.exp()

    def divergence(self, logits_RV: Tensor) -> Tensor:
        r"""KL divergence $\sum_v p_v (\ln p_v - \ln q_v)$ of `logits_RV` at each place, `[N]`.

        Zero, to the bit, for equal logits. A word that the dense model rules out (`-inf`) adds nothing, whatever the
        other makes of it.
        """
        places = self._places.to(logits_RV.device)
        rows = []
        for piece in _pieces(logits_RV, places):
            log_q = _log_softmax(logits_RV[places[piece]]).to(self._p.device)
            rows.append(torch.linalg.vecdot(self._p[piece], self._log_p[piece] - log_q))
        return torch.cat(rows)


def divergence(dense_RV: Tensor, logits_RV: Tensor, places_N: Tensor) -> Tensor:
    """`Reference.divergence` for a single comparison, a few places at a time."""
    pieces = [places_N[piece] for piece in _pieces(dense_RV, places_N)]
    return torch.cat([Reference(dense_RV, places).divergence(logits_RV) for places in pieces])


def _log_softmax(logits: Tensor) -> Tensor:
    # Finite everywhere: a probability of zero times a logarithm of -inf would be nan instead of nothing.
    return torch.log_softmax(logits.float(), dim=-1).clamp_(min=torch.finfo(torch.float32).min)


def _pieces(logits_RV: Tensor, places_N: Tensor) -> Iterator[slice]:
    size = max(1, _VALUES_AT_ONCE // logits_RV.shape[-1])
    for start in range(0, max(1, len(places_N)), size):
        yield slice(start, start + size)
