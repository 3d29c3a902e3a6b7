r"""The true cost of leaving blocks out: how far the model's answers move, and how much worse it predicts.

Every score of every criterion is a guess at this number. It is measured by running the model without the blocks, on the
same sequences as the whole model, so that differences are paired; what is shared between two runs is computed once
(`avss.models.shared_prefix`).

What "far" means depends on the head:

- `causal`, `masked`, `seq2seq`: KL divergence of the predicted words from the whole model's, nats a token, mean over
  the real tokens of a sequence;
- `classifier`, `image-classifier`: KL divergence of the predicted labels, nats a sequence or image, summed over labels
  that are there or not; of a head that predicts numbers, the squared difference;
- `encoder`, and a tower that reads images: one minus the cosine between the embedding and the whole model's, 0 to 2.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avss.data.batches import Batches, Inputs
from avss.errors import NoObservationsError, UnsupportedArchitectureError
from avss.models import predictions
from avss.models.load import Loaded
from avss.models.pooling import find_pooling
from avss.models.shared_prefix import SharedPrefix, in_sharing_order
from avss.record import DamageMeasure, DamageTable, DataFacts, ModelFacts, SetDamage

FloatArray = NDArray[np.float64]
OnStep = Callable[[int, int], None]
"""Called with (models run so far, models in all)."""

_Row = tuple[FloatArray, FloatArray | None]
"""Distance and loss of each sequence of one batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Damage:
    """What leaving out one set of blocks costs, sequence by sequence.

    Attributes:
        removed: The blocks, ascending.
        distance: How far the answers are from the whole model's, `[S]`; see the top of this file.
        loss: Mean next-token loss of each sequence in nats, `[S]`; None where the head has no such loss.
        dense_loss: The whole model's, `[S]`.
    """

    removed: tuple[int, ...]
    distance: FloatArray
    loss: FloatArray | None
    dense_loss: FloatArray | None

    @property
    def mean(self) -> float:
        """Mean distance over the sequences."""
        return float(self.distance.mean())

    @property
    def stderr(self) -> float | None:
        """Its standard error over the sequences; None for a single one."""
        return mean_and_error(self.distance)[1]


def mean_and_error(values: FloatArray) -> tuple[float, float | None]:
    """Mean, and its standard error over independent values; None for a single value."""
    num = len(values)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(num)) if num > 1 else None


class Judge:
    """Measures what sets of blocks cost one model on one text, or on images.

    Args:
        loaded: The model; left as it was. Of one whose stack belongs to a tower that reads images, the tower is
            measured.
        batches: The text, or the images. Holding one batch's hidden states at all blocks is what this costs in memory,
            and one float32 number for each token and word.
        share: False runs every model from its first block: the slow way, for checks.
        holds_all: Whether to hold that for all batches, so that the whole model runs only once on each; see
            `bytes_to_hold`.

    Attributes:
        num_blocks_run: Blocks computed so far, in units of one block on one batch.
        num_blocks_naive: Blocks that running each model from its first block would have taken.
    """

    def __init__(self, loaded: Loaded, batches: Batches, *, share: bool = True, holds_all: bool = False) -> None:
        if not len(batches):
            raise NoObservationsError("There is no sequence to measure damage on. Give some data.")
        self._loaded = loaded.tower()
        self._loaded.check_float64()
        self._batches = tuple(batches)
        self._share = share
        self.holds_all = holds_all
        self._held: dict[int, _Whole] = {}
        self.num_blocks_run = 0
        self.num_blocks_naive = 0

    @property
    def measure(self) -> DamageMeasure:
        """What the distances are."""
        return predictions.measure_of(self._loaded)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def judge(
        self,
        sets: Sequence[Iterable[int]],
        *,
        batches: Sequence[int] | None = None,
        on_step: OnStep = lambda done, total: None,
    ) -> list[Damage]:
        """What each set costs, in the given order.

        Args:
            sets: Blocks to leave out; sets with a common beginning share its computation, in whatever order they come.
            batches: Which batches to use, all by default: a race looks at a few first.
            on_step: For progress.

        Raises:
            UnsupportedArchitectureError: The blocks cannot be left out one by one.
        """
        num_blocks = len(self._loaded.stack)
        order = in_sharing_order([one for one in sets if frozenset(one)], num_blocks)
        chosen = range(len(self._batches)) if batches is None else batches
        rows: dict[frozenset[int], list[_Row]] = {one: [] for one in (frozenset[int](), *order)}
        done, total = 0, (1 + len(order)) * len(chosen)
        on_step(done, total)
        for index in chosen:
            known = index in self._held
            whole = self._held[index] if known else self._run_whole(index)
            before = whole.shared.num_blocks_run if known else 0
            rows[frozenset()].append(whole.row)
            done += 1
            on_step(done, total)
            for one in order:
                logits = whole.shared.without(one)
                rows[one].append(whole.answers.row(logits))
                done += 1
                on_step(done, total)
            self.num_blocks_run += whole.shared.num_blocks_run - before
            self.num_blocks_naive += sum(num_blocks - len(one) for one in order) + (0 if known else num_blocks)
            if self.holds_all:
                whole.shared.rewind()
                self._held[index] = whole
        dense = rows[frozenset()]
        return [_damage(frozenset(one), rows[frozenset(one)], dense) for one in sets]

    def _run_whole(self, index: int) -> "_Whole":
        inputs, keep = self._batches[index]
        shared = SharedPrefix(self._loaded, inputs, keep, share=self._share)
        answers = _Answers(self._loaded, shared.dense, inputs, keep)
        row = answers.row(shared.dense)
        return _Whole(shared, answers, row)


@dataclasses.dataclass(frozen=True, eq=False)
class _Whole:
    """The whole model on one batch: its states, its answers, and its own row."""

    shared: SharedPrefix
    answers: "_Answers"
    row: _Row


def bytes_to_hold(loaded: Loaded, batches: Batches) -> int:
    """Memory that a `Judge` which holds all batches needs, roughly: hidden states twice, and the answers twice."""
    loaded = loaded.tower()
    width, words = loaded.hidden_size, loaded.vocabulary
    is_by_word = loaded.head in ("causal", "masked", "seq2seq")
    return batches.facts.num_tokens * 4 * (2 * (len(loaded.stack) + 1) * width + (2 * words if is_by_word else 0))


def leave_one_out(judge: Judge, num_blocks: int, *, on_step: OnStep = lambda done, total: None) -> list[Damage]:
    """What each block costs alone, in block order."""
    return judge.judge([(block,) for block in range(num_blocks)], on_step=on_step)


class _Answers:
    """The whole model's answers on one batch, to compare with."""

    def __init__(self, loaded: Loaded, dense: Tensor, inputs: Inputs, keep: Tensor) -> None:
        self._answers: predictions.Answers = predictions.answers_of(loaded)
        self._keep = keep
        if self._answers == "states":
            if dense.shape[:2] != keep.shape and not isinstance(inputs, Tensor):
                raise UnsupportedArchitectureError(
                    f"`{type(loaded.model).__name__}` answers an image with {tuple(dense.shape[1:])}, neither logits "
                    "of classes nor a state of each place, so how far its answers move is not defined. Choose by "
                    "scores, or load it by `--head encoder`."
                )
            self._pooling = find_pooling(loaded)
            self._embedding = self._embed(dense)
            return
        if self._answers != "choice":
            self._dense = dense
            return
        self._by_token = dense.dim() == 3
        places = keep.flatten().nonzero()[:, 0] if self._by_token else torch.arange(len(dense))
        self._sequence = places // keep.shape[1] if self._by_token else places
        targets = None
        if loaded.head == "causal" and self._by_token and isinstance(inputs, Tensor):
            # A token is predicted by the place before it, if both are real.
            following = torch.full_like(inputs, -1)
            following[:, :-1] = inputs[:, 1:].where(keep[:, 1:] & keep[:, :-1], -1)
            targets = following.flatten()[places]
        self._targets = targets if targets is not None and bool((targets >= 0).any()) else None
        self._reference = predictions.Reference(dense.flatten(0, -2), places, self._targets)

    def row(self, answers: Tensor) -> _Row:
        """Distance and loss of each sequence."""
        if self._answers == "states":
            near = torch.cosine_similarity(self._embed(answers), self._embedding, dim=-1)
            return (1 - near).cpu().numpy(), None
        if self._answers != "choice":
            return predictions.distance(self._answers, self._dense, answers).double().cpu().numpy(), None
        divergences, likelihoods = self._reference.compare(answers.flatten(0, -2))
        distance = self._by_sequence(divergences, self._sequence)
        if likelihoods is None or self._targets is None:
            return distance, None
        asked = self._targets >= 0
        return distance, self._by_sequence(-likelihoods.cpu()[asked], self._sequence[asked])

    def _embed(self, hidden: Tensor) -> Tensor:
        # Float64: one minus a cosine near one keeps few digits of float32.
        return self._pooling(hidden.double(), self._keep.to(hidden.device))

    def _by_sequence(self, values_N: Tensor, owner_N: Tensor) -> FloatArray:
        """Mean of the values that belong to each sequence, `[B]`; nan for a sequence with none."""
        sums = torch.zeros(len(self._keep), dtype=torch.float64)
        sums.index_add_(0, owner_N, values_N.double().cpu())
        return (sums / torch.bincount(owner_N, minlength=len(sums))).numpy()


def _damage(removed: frozenset[int], rows: list[_Row], dense: list[_Row]) -> Damage:
    return Damage(
        removed=tuple(sorted(removed)),
        distance=np.concatenate([distance for distance, _ in rows]),
        loss=_joined([loss for _, loss in rows]),
        dense_loss=_joined([loss for _, loss in dense]),
    )


def _joined(parts: Sequence[FloatArray | None]) -> FloatArray | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if len(present) == len(parts) else None


def summarise(damage: Damage) -> SetDamage:
    """A damage as the record tells it: means with standard errors, the change of the loss from paired differences."""
    change, error, perplexity = None, None, None
    if damage.loss is not None and damage.dense_loss is not None:
        change, error = mean_and_error(damage.loss - damage.dense_loss)
        # A ruined model's loss can be too large for its exponential.
        perplexity = math.exp(min(float(damage.loss.mean()), 700.0))
    return SetDamage(
        removed=damage.removed,
        distance=damage.mean,
        stderr=damage.stderr,
        loss_change=change,
        loss_change_stderr=error,
        perplexity=perplexity,
    )


def table_of(judge: Judge, damages: Sequence[Damage], *, model: ModelFacts, data: DataFacts) -> DamageTable:
    """The damage of each block alone as a value for the record.

    Args:
        judge: What measured them.
        damages: What `leave_one_out` returned.
        model: What was measured.
        data: The text it was measured on.
    """
    dense = damages[0].dense_loss
    return DamageTable(
        measure=judge.measure,
        blocks=tuple(summarise(one) for one in damages),
        dense_loss=None if dense is None else float(dense.mean()),
        num_blocks_run=judge.num_blocks_run,
        num_blocks_naive=judge.num_blocks_naive,
        model=model,
        data=data,
    )
