"""What healing makes small: the distance between what both models answer, by the kind of answer.

Shape letters: B batch, T token, D hidden, M places asked about, V vocabulary, C classes.
"""

import abc
import dataclasses
from typing import final

import torch
from torch import Tensor

from avss.config import HealConfig
from avss.errors import UnsupportedArchitectureError
from avss.healing.divergence import chunk_size, divergence
from avss.healing.pair import Pair, Sides
from avss.healing.text import Batch
from avss.models.load import Loaded
from avss.models.pooling import find_pooling
from avss.models.predictions import distance, label_answers, yes_or_no


@dataclasses.dataclass(frozen=True)
class Loss:
    """The objective on one batch, ready for the backward pass.

    Attributes:
        value: Its sum over the batch.
        tensor: What the gradient flows back from.
        gradient: Of the objective with respect to `tensor`; None where `tensor` is the objective.
        text_nats: Sum of the negative log-likelihoods of the text's own tokens; None where there are none.
        num_words: Tokens in that sum.
    """

    value: float
    tensor: Tensor
    gradient: Tensor | None = None
    text_nats: float | None = None
    num_words: int = 0


class AbstractObjective(abc.ABC):
    """A sum over a batch, such that sums over the parts of a batch add up to the sum over the whole.

    Attributes:
        title: In words, for the record.
    """

    title: str

    @abc.abstractmethod
    def count(self, batch: Batch) -> int:
        """How many terms the sum over a batch has; known before a model runs."""

    @abc.abstractmethod
    def loss(self, sides: Sides, batch: Batch, scale: float) -> Loss:
        """The sum times `scale`, over what both models made of the batch.

        Under `torch.no_grad` nothing is kept for a backward pass.
        """


@final
class WordObjective(AbstractObjective):
    """KL divergence of the predicted words from the dense model's, over the whole vocabulary.

    The heads run on a bounded number of places at a time, and the gradient with respect to their input is made chunk by
    chunk, so that memory does not grow with the vocabulary times the batch. With `label_weight` a share of the loss is
    the negative log-likelihood of the text's own tokens instead.
    """

    def __init__(self, pair: Pair, model: Loaded, config: HealConfig) -> None:
        where = "masked" if model.head == "masked" else "next"
        self.title = f"KL divergence of the {where}-token predictions from the dense model's, nats"
        if config.label_weight:
            self.title += f", with a share of {config.label_weight:g} on the text's own tokens"
        self._heads, self._autocast = pair.heads(), pair.autocast
        self._temperature, self._label_weight = config.temperature, config.label_weight
        self._rows = chunk_size(model.model.config.get_text_config().vocab_size, model.device)

    def count(self, batch: Batch) -> int:
        return int(batch.asked.sum())

    def loss(self, sides: Sides, batch: Batch, scale: float) -> Loss:
        asked = batch.asked.to(sides.output.device)
        hidden_MD, dense_MD = sides.output[asked], sides.dense[asked]
        words_M = batch.words.to(asked.device)[asked]
        leaf = hidden_MD.detach()
        gradient = torch.zeros_like(leaf)
        total, nats = 0.0, 0.0
        for start in range(0, len(leaf), self._rows):
            rows = slice(start, start + self._rows)
            piece = leaf[rows].requires_grad_(torch.is_grad_enabled())
            value, text = self._piece(piece, dense_MD[rows], words_M[rows], scale)
            if torch.is_grad_enabled():
                value.backward()
                assert piece.grad is not None
                gradient[rows] = piece.grad
            total += float(value.detach())
            nats += float(text.detach())
        return Loss(total, hidden_MD, gradient, text_nats=nats, num_words=int((words_M >= 0).sum()))

    def _piece(self, piece_MD: Tensor, dense_MD: Tensor, words_M: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ours, theirs = self._heads
        with self._autocast():
            with torch.no_grad():
                dense_MV = theirs(dense_MD[None])[0]
            logits_MV = ours(piece_MD[None])[0]
        known = self._label_weight > 0 or not torch.is_grad_enabled()
        text = (
            torch.nn.functional.cross_entropy(logits_MV.float(), words_M, reduction="sum", ignore_index=-100)
            if known
            else torch.zeros(())
        )
        value = torch.zeros((), device=piece_MD.device)
        if self._label_weight < 1 or bool((words_M < 0).any()):
            # A place without a word of the text's own is the dense model's alone.
            weights_M = torch.where(words_M < 0, 1.0, 1 - self._label_weight)
            value = (weights_M * divergence(logits_MV, dense_MV, self._temperature)).sum()
        if self._label_weight > 0:
            value = value + self._label_weight * text
        return value * scale, text


@final
class AnswerObjective(AbstractObjective):
    """KL divergence of a task head's label probabilities from the dense model's; with labels, a share on these.

    A head that says yes or no to each label is compared label by label, one that predicts numbers by the squared
    difference. An encoder-decoder is compared by the words that its decoder predicts, at every token of the text.
    """

    def __init__(self, model: Loaded, config: HealConfig, *, has_labels: bool) -> None:
        self._temperature = config.temperature
        self._label_weight = config.label_weight if has_labels else 0.0
        self._answers = "choice" if model.head == "seq2seq" else label_answers(model.model.config)
        what = "next-token predictions" if model.head == "seq2seq" else "label probabilities"
        self.title = (
            "squared difference from the dense model's output"
            if self._answers == "numbers"
            else f"KL divergence of the {what} from the dense model's, nats"
        )
        if self._label_weight:
            self.title += f", with a share of {self._label_weight:g} on the labels"

    def count(self, batch: Batch) -> int:
        return len(batch.keep)

    def loss(self, sides: Sides, batch: Batch, scale: float) -> Loss:
        logits, dense = sides.output.float(), sides.dense.float()
        if logits.dim() == 3:  # an answer at every token: the mean over a sequence's real ones
            keep = batch.keep.to(logits.device)
            rows = self._distance(logits[keep], dense[keep])
            weights = (1 / keep.sum(1, keepdim=True)).expand(keep.shape)[keep]
            return _whole((rows * weights).sum() * scale)
        value = (1 - self._label_weight) * self._distance(logits, dense).sum()
        if self._label_weight and batch.labels is not None:
            labels = batch.labels.to(logits.device)
            value = value + self._label_weight * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return _whole(value * scale)

    def _distance(self, logits: Tensor, dense: Tensor) -> Tensor:
        if self._answers == "numbers":
            return distance("numbers", dense, logits)
        if self._answers == "labels":
            ours, theirs = (yes_or_no(side).flatten(0, -2) for side in (logits, dense))
            return divergence(ours, theirs, self._temperature).view(logits.shape).sum(-1)
        return divergence(logits, dense, self._temperature)


@final
class StateObjective(AbstractObjective):
    r"""How far an encoder's last hidden states and the embedding made of them are from the dense model's.

    For each sequence, the mean over its real tokens of $|s - d|^2 / |d|^2$, plus one minus the cosine between both
    models' embeddings: texts are compared by the latter.
    """

    title = "relative squared distance of the last hidden states, plus one minus the cosine of the embeddings"

    def __init__(self, model: Loaded) -> None:
        self._pooling = find_pooling(model)

    def count(self, batch: Batch) -> int:
        return len(batch.keep)

    def loss(self, sides: Sides, batch: Batch, scale: float) -> Loss:
        keep_BT = batch.keep.to(sides.output.device)
        if sides.output.shape[:2] != keep_BT.shape:
            raise UnsupportedArchitectureError(
                f"The model answers {tuple(keep_BT.shape)} places with {tuple(sides.output.shape)}, not a state of "
                "each, so it cannot be healed towards the dense model's states."
            )
        share_BT = keep_BT / keep_BT.sum(1, keepdim=True)
        output_BTD, dense_BTD = (
            torch.where(keep_BT[..., None], side.float(), 0.0) for side in (sides.output, sides.dense)
        )
        distance = (relative_distance(output_BTD, dense_BTD) * share_BT).sum()
        ours, theirs = (self._pooling(side, keep_BT) for side in (output_BTD, dense_BTD))
        return _whole((distance + (1 - torch.nn.functional.cosine_similarity(ours, theirs)).sum()) * scale)


def relative_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared distance over the squared length of `theirs`, along the last axis; 0 where both are zero."""
    length = theirs.square().sum(-1)
    return (ours - theirs).square().sum(-1) / length.clamp(min=torch.finfo(length.dtype).tiny)


def states_loss(sides: Sides, batch: Batch) -> Tensor:
    """The mean relative squared distance of the states after the compared blocks, summed over the real tokens."""
    keep = batch.keep.to(sides.output.device)
    distances = [relative_distance(ours.float()[keep], theirs.float()[keep]).sum() for ours, theirs in sides.states]
    return torch.stack(distances).mean()


def _whole(value: Tensor) -> Loss:
    return Loss(float(value.detach()), value)


def find_objective(pair: Pair, model: Loaded, config: HealConfig, *, has_labels: bool) -> AbstractObjective:
    """What a model with this head is healed towards."""
    if model.head in ("causal", "masked") and not has_labels:
        return WordObjective(pair, model, config)
    if model.head == "encoder":
        return StateObjective(model)
    return AnswerObjective(model, config, has_labels=has_labels)
