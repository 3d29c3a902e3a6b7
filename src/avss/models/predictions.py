"""How good predictions are, and how far apart two models' are, in float32.

A vocabulary times a batch of tokens is large, so a few million logits are read at a time.

Shape letters: R rows of logits, V words or labels, N places read.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from avss.models.load import Loaded
from avss.record import DamageMeasure

Answers = Literal["choice", "labels", "numbers", "states"]
"""What a model answers with: a choice of one word or label, a yes or no to each label, numbers (of a regression or a
reward), or hidden states."""

_MEASURES: dict[Answers, DamageMeasure] = {"choice": "kl", "labels": "kl", "numbers": "squared", "states": "cosine"}


def answers_of(loaded: Loaded) -> Answers:
    """What a model answers with."""
    if loaded.head in ("encoder", "other"):
        return "states"
    return label_answers(loaded.model.config) if loaded.head in ("classifier", "image-classifier") else "choice"


def label_answers(config: PretrainedConfig) -> Answers:
    """What a head for labels answers with, as its loss would have it."""
    if config.problem_type == "multi_label_classification":
        return "labels"
    return "numbers" if config.problem_type == "regression" or config.num_labels == 1 else "choice"


def measure_of(loaded: Loaded) -> DamageMeasure:
    """How the answers of two models are compared."""
    return _MEASURES[answers_of(loaded)]


def yes_or_no(logits_RV: Tensor) -> Tensor:
    """The logits of labels that are asked for one by one, each as a choice between yes and no, `[R, V, 2]`."""
    return torch.stack([logits_RV, torch.zeros_like(logits_RV)], dim=-1)


def distance(answers: Answers, dense_RV: Tensor, logits_RV: Tensor) -> Tensor:
    r"""How far each row of answers is from the dense model's, `[R]`: zero, to the bit, for equal ones.

    - `choice`: KL divergence $\sum_v p_v (\ln p_v - \ln q_v)$ of the softmax, in nats.
    - `labels`: the same, summed over labels that are there with the probability of a sigmoid each.
    - `numbers`: the squared difference, summed over the outputs.
    - `states`: one minus the cosine.

    Gradients flow to both.
    """
    dense, logits = dense_RV.float(), logits_RV.float()
    if answers == "states":
        return 1 - functional.cosine_similarity(dense, logits, dim=-1)
    if answers == "numbers":
        return (logits - dense).square().sum(-1)
    if answers == "labels":
        dense, logits = yes_or_no(dense), yes_or_no(logits)
    log_p, log_q = dense.log_softmax(-1), logits.log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).flatten(1).sum(1)


_VALUES_AT_ONCE = 2**20
"""Logits turned into float32 probabilities at a time on a CPU: 4 MB, which its cache holds."""
_VALUES_AT_ONCE_ELSEWHERE = 2**26
"""The same on other devices: 256 MB. Small pieces would leave a GPU idle between them."""


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
    r"""The dense model's predictions at some places, kept to compare many models with: one float32 number a word.

    Args:
        dense_RV: All logits.
        places_N: Rows to read.
        targets_N: What truly stands at each of them, -1 where nobody asks; None if nobody asks anywhere.
    """

    def __init__(self, dense_RV: Tensor, places_N: Tensor, targets_N: Tensor | None = None) -> None:
        places = places_N.to(dense_RV.device)
        # All rows in order are read as they lie, others are gathered piece by piece.
        self._places = None if len(places) == len(dense_RV) and bool((places.diff() == 1).all()) else places
        self._targets = None if targets_N is None else targets_N.to(dense_RV.device)
        self._p = torch.empty((len(places), dense_RV.shape[-1]), device=dense_RV.device)
        entropies = []
        for piece in _pieces(dense_RV, places):
            log_p = torch.log_softmax(self._rows(dense_RV, piece), dim=-1)
            self._p[piece] = log_p.exp()
            entropies.append(torch.linalg.vecdot(self._p[piece], _finite(log_p)))
        self._p_log_p = torch.cat(entropies)

    def compare(self, logits_RV: Tensor) -> tuple[Tensor, Tensor | None]:
        r"""Another model's predictions at the same places, in one reading of its logits.

        Returns:
            KL divergence $\sum_v p_v (\ln p_v - \ln q_v)$ of each, `[N]`: zero, to the bit, for equal logits; a word
            that the dense model rules out (`-inf`) adds nothing, whatever the other makes of it. And the natural
            logarithm of the probability of each target, `[N]`, 0 where nobody asks; None if nobody asks anywhere.
        """
        logits = logits_RV.to(self._p.device)
        crosses, likelihoods = [], []
        for piece in _pieces(logits, self._p):
            log_q = torch.log_softmax(self._rows(logits, piece), dim=-1)
            if self._targets is not None:
                targets = self._targets[piece]
                found = log_q.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
                likelihoods.append(found.masked_fill(targets < 0, 0.0))
            cross = torch.linalg.vecdot(self._p[piece], log_q)
            if bool(cross.isnan().any()):  # zero times -inf: a word that both, or the dense model alone, rule out
                cross = torch.linalg.vecdot(self._p[piece], _finite(log_q))
            crosses.append(cross)
        divergences = self._p_log_p - torch.cat(crosses)
        return divergences, torch.cat(likelihoods) if likelihoods else None

    def _rows(self, logits_RV: Tensor, piece: slice) -> Tensor:
        return (logits_RV[piece] if self._places is None else logits_RV[self._places[piece]]).float()


def divergence(dense_RV: Tensor, logits_RV: Tensor, places_N: Tensor) -> Tensor:
    """The divergence of `Reference.compare` for a single comparison, a few places at a time."""
    logits_RV = logits_RV.to(dense_RV.device)
    pieces = [places_N[piece] for piece in _pieces(dense_RV, places_N)]
    return torch.cat([Reference(dense_RV, places).compare(logits_RV)[0] for places in pieces])


def _finite(log_probabilities: Tensor) -> Tensor:
    return log_probabilities.clamp(min=torch.finfo(torch.float32).min)


def _pieces(logits_RV: Tensor, places_N: Tensor) -> Iterator[slice]:
    values = _VALUES_AT_ONCE if logits_RV.device.type == "cpu" else _VALUES_AT_ONCE_ELSEWHERE
    size = max(1, values // logits_RV.shape[-1])
    for start in range(0, max(1, len(places_N)), size):
        yield slice(start, start + size)
