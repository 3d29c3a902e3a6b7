r"""How sure is a score? Leave out sequences, score again, and see what moves: no second pass over the text.

With $\theta$ the score from all sequences and $\theta_{(g)}$ the score without group $g$ of $G$ groups of sequences,

$$\widehat{\text{se}}^2 = \frac{G-1}{G} \sum_g (\theta_{(g)} - \bar\theta)^2$$

and the interval is $\theta \pm t_{G-1}\, \widehat{\text{se}}$, on the logarithm of the score where every score is
positive: variances and ratios are skewed, and their logarithm nearly is not. Sequences are the independent unit, tokens
of one sequence are not. Intervals are too short where a few sequences carry the score: 90 % instead of 95 % where what
a sequence adds varies by a factor of e from one to the next.

References:
    Tukey (1958), Bias and confidence in not quite large samples; Efron and Tibshirani (1993), chapter 11.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from avss.record import Stability
from avss.statistics.agreement import kendall
from avss.statistics.base import FloatArray

ScoreOf = Callable[[NDArray[np.intp]], FloatArray]
"""Positions of sequences -> one score a block from these alone."""

MAX_GROUPS = 64
"""Scores computed anew for an interval; more sequences than this are left out in groups."""

SEPARATED = 2.0
"""Standard errors between the last block that goes and the first that stays, from which a choice is settled."""

_TIE = 100  # times the text that was given: beyond it, two blocks are as good as equal
_DRAWS = 400
_SPLITS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Jackknife:
    """Scores without each group of sequences.

    Attributes:
        score: From all sequences, `[L]`.
        without: Without each group, `[G, L]`.
        num_sequences: Sequences they rest on.
    """

    score: FloatArray
    without: FloatArray
    num_sequences: int

    @functools.cached_property
    def on_log_scale(self) -> bool:
        """Whether every score is positive, so that logarithms are used."""
        return bool((self.score > 0).all() and (self.without > 0).all())

    def _scale(self, values: FloatArray) -> FloatArray:
        return np.log(values) if self.on_log_scale else values

    @functools.cached_property
    def influence(self) -> FloatArray:
        """What each group adds to the score, `[G, L]`, on the scale of the interval; columns have mean zero."""
        scaled = self._scale(self.without)
        return (len(scaled) - 1) * (scaled.mean(0) - scaled)

    def error_of(self, contrast: FloatArray) -> float:
        """Standard error of a weighted sum of the blocks' scores, on the scale of the interval."""
        return _standard_error(self.influence @ contrast)

    @functools.cached_property
    def stderr(self) -> FloatArray:
        """Standard error of each block's score, `[L]`, on the scale of the interval."""
        return np.array([_standard_error(column) for column in self.influence.T])

    def interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Lower and upper end for each block, `[L]`."""
        reach = stats.t.ppf((1 + level) / 2, len(self.without) - 1) * self.stderr
        centre = self._scale(self.score)
        ends = centre - reach, centre + reach
        return (np.exp(ends[0]), np.exp(ends[1])) if self.on_log_scale else ends

    def draws(self, num: int, *, seed: int) -> FloatArray:
        """What scores other texts of the same size would give, `[num, L]`, all blocks together.

        A bootstrap over groups, to first order in their influence; on the scale of the interval, so good for ranking.
        """
        groups = len(self.influence)
        weights = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=num)
        return self._scale(self.score) + (weights - 1) @ self.influence / groups

    def gap(self, low: int, high: int) -> float:
        """How many standard errors block `high` scores above block `low`; infinite where the difference is certain."""
        centre = self._scale(self.score)
        contrast = np.zeros(len(centre))
        contrast[high], contrast[low] = 1, -1
        error = self.error_of(contrast)
        difference = float(centre[high] - centre[low])
        return difference / error if error > 0 else np.inf if difference > 0 else 0.0


def _standard_error(influence: FloatArray) -> float:
    groups = len(influence)
    return float(np.sqrt((influence**2).sum() / (groups * (groups - 1)))) if groups > 1 else 0.0


def jackknife(score_of: ScoreOf, num_sequences: int, *, max_groups: int = MAX_GROUPS) -> Jackknife | None:
    """Scores all sequences, and all but each group.

    Args:
        score_of: Scores the blocks from some of the sequences.
        num_sequences: How many there are.
        max_groups: Groups at most; with fewer sequences, each is a group of its own.

    Returns:
        None for fewer than three sequences: nothing can be said about the text's part in the score.
    """
    if num_sequences < 3:
        return None
    everything = np.arange(num_sequences)
    groups = min(num_sequences, max_groups)
    member = everything % groups
    without = np.stack([score_of(everything[member != group]) for group in range(groups)])
    return Jackknife(score=score_of(everything), without=without, num_sequences=num_sequences)


def lowest(values: FloatArray, count: int, free: Sequence[int]) -> tuple[int, ...]:
    """The `count` blocks with the lowest scores among those free to go, ascending; ties go by index."""
    return tuple(sorted(sorted(free, key=lambda block: (values[block], block))[:count]))


def stability_of(
    criterion: str,
    knife: Jackknife,
    score_of: ScoreOf,
    *,
    count: int,
    protected: Sequence[int] = (),
    seed: int = 0,
) -> Stability:
    """Whether the text suffices to say which `count` blocks score lowest.

    Args:
        criterion: Whose scores they are.
        knife: From `jackknife`.
        score_of: As given to it; also scores halves of the text, which share no sequence.
        count: Blocks that would go.
        protected: Blocks that may not.
        seed: Of the draws and splits.
    """
    num_blocks = len(knife.score)
    free = [block for block in range(num_blocks) if block not in protected]
    count = min(count, len(free) - 1)
    chosen = lowest(knife.score, count, free)
    drawn = [lowest(values, count, free) for values in knife.draws(_DRAWS, seed=seed)]
    inclusion = np.zeros(num_blocks)
    for one in drawn:
        inclusion[list(one)] += 1
    inclusion /= len(drawn)
    stays = [block for block in free if block not in chosen]
    gaps = {(low, high): knife.gap(low, high) for low in chosen for high in stays}
    closest = min(gaps, key=lambda pair: gaps[pair])
    taus, shared = _halves(score_of, knife.num_sequences, count, free, seed)
    return Stability(
        criterion=criterion,
        count=count,
        chosen=chosen,
        inclusion=tuple(float(share) for share in inclusion),
        agreement=float(inclusion[list(chosen)].mean()),
        half_kendall=taus,
        half_overlap=shared,
        closest=closest,
        closest_gap=float(gaps[closest]),
        num_sequences=knife.num_sequences,
        num_sequences_needed=sequences_needed(gaps[closest], knife.num_sequences),
    )


def sequences_needed(gap: float, num_sequences: int) -> int | None:
    """Sequences from which the closest pair would be `SEPARATED`: errors shrink with the root of the text.

    None where that would be more than a hundred times the text: a tie, which no reasonable text settles.

    Example:
        >>> sequences_needed(1.0, 64), sequences_needed(4.0, 64), sequences_needed(0.01, 64)
        (256, 16, None)
    """
    if gap <= 0 or (SEPARATED / gap) ** 2 > _TIE:
        return None
    return max(1, int(np.ceil(num_sequences * (SEPARATED / gap) ** 2)))


def _halves(
    score_of: ScoreOf, num_sequences: int, count: int, free: Sequence[int], seed: int
) -> tuple[float | None, float | None]:
    """Kendall's tau of all blocks, and the share of the lowest `count` in common, between halves; mean over splits."""
    if num_sequences < 4:
        return None, None
    random = np.random.default_rng(seed)
    taus, shared = [], []
    for _ in range(_SPLITS):
        order = random.permutation(num_sequences)
        first, second = (score_of(np.sort(part)) for part in np.array_split(order, 2))
        taus.append(kendall(first, second))
        common = set(lowest(first, count, free)) & set(lowest(second, count, free))
        shared.append(len(common) / count)
    return float(np.mean(taus)), float(np.mean(shared))
