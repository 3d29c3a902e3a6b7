"""Scores every block by every criterion from what one pass collected."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from avss.criteria import AbstractCriterion, Evidence, Scored
from avss.errors import DegenerateStatisticError
from avss.record import BlockScores, Stability
from avss.statistics.agreement import depth_correlation
from avss.statistics.base import FloatArray
from avss.statistics.collected import Collected
from avss.statistics.resampling import jackknife, stability_of

DEPTH_CORRELATION = 0.5
"""Spearman correlation with depth from which a score whose lowest blocks are the first is said to rank by depth."""

FEW_COUNTS = 100
"""Near-zero activations of a block below which the published sparsity is noise: its relative error exceeds 10 %."""


def score_blocks(
    collected: Collected, criteria: tuple[AbstractCriterion, ...], *, first_token: bool = True, seed: int = 0
) -> tuple[BlockScores, ...]:
    """One `BlockScores` per criterion, in order.

    Args:
        collected: The rows of every statistic that the criteria need.
        criteria: What to score by.
        first_token: Whether the first token of each sequence counts in `values`. The scores without it are kept
            beside them either way.
        seed: For criteria that draw lots.

    Raises:
        NumericalError: A criterion is undefined for this evidence.
    """
    return tuple(_score_one(collected, criterion, first_token=first_token, seed=seed) for criterion in criteria)


def _score_one(collected: Collected, criterion: AbstractCriterion, *, first_token: bool, seed: int) -> BlockScores:
    scored = _apply(collected, criterion, first_token=first_token, seed=seed)
    without = None
    # Published averages, gradients and weights have no part without the first token; baselines read no token at all.
    if criterion.needs and all(statistic.has_first_token for statistic in criterion.needs):
        without = _apply(collected, criterion, first_token=False, seed=seed).values
    return BlockScores(
        criterion=criterion.name,
        title=criterion.title,
        values=_floats(scored.values),
        without_first_token=None if without is None else _floats(without),
        windows=None if scored.windows is None else tuple(_floats(row) for row in scored.windows),
        factors={name: _floats(values) for name, values in scored.factors.items()},
        paper=criterion.paper,
        reference_url=criterion.reference_url,
        note=criterion.note,
    )


def with_certainty(
    collected: Collected,
    criterion: AbstractCriterion,
    scores: BlockScores,
    *,
    count: int,
    protected: Sequence[int] = (),
    first_token: bool = True,
    seed: int = 0,
) -> tuple[BlockScores, Stability | None]:
    """The scores with their intervals, and whether the text suffices to choose by them.

    Args:
        collected: What the scores rest on.
        criterion: Who gave them.
        scores: What `score_blocks` returned for it.
        count: Blocks that would go.
        protected: Blocks that may not.
        first_token: As for `score_blocks`.
        seed: Of the resampling, and for criteria that draw lots.

    Returns:
        The scores unchanged and None where the criterion reads no text, where there are fewer than three sequences or
        two free blocks, or where parts of the text are too small for the criterion to be defined.
    """
    rows = {collected.rows[need][0].num_sequences for need in criterion.needs}
    # With a single block free to go there is no choice to be sure of.
    if len(rows) != 1 or scores.num_blocks - len(protected) < 2:
        return scores, None
    (num,) = rows

    def score_of(positions: NDArray[np.intp]) -> FloatArray:
        return _apply(collected, criterion, first_token=first_token, seed=seed, resample=positions).values

    try:
        knife = jackknife(score_of, num)
        if knife is None:
            return scores, None
        stability = stability_of(criterion.name, knife, score_of, count=count, protected=protected, seed=seed)
    except DegenerateStatisticError:
        return scores, None
    lower, upper = knife.interval()
    # Gradients come a row a batch: their spread is known, but not in sequences.
    in_sequences = all(need.row_is == "sequence" for need in criterion.needs)
    known = scores.model_copy(update={"lower": _floats(lower), "upper": _floats(upper)})
    return known, stability if in_sequences else None


def _apply(
    collected: Collected,
    criterion: AbstractCriterion,
    *,
    first_token: bool,
    seed: int,
    resample: NDArray[np.intp] | None = None,
) -> Scored:
    summaries = {
        need: collected.summarise(need, first_token=first_token, resample=resample) for need in criterion.needs
    }
    scored = criterion.score(Evidence(num_blocks=collected.num_blocks, summaries=summaries, seed=seed))
    bad = np.flatnonzero(~np.isfinite(scored.values))
    if bad.size:
        raise DegenerateStatisticError(
            f"`{criterion.name}` is {scored.values[bad[0]]} for block {bad[0]}: activations there are nan or infinite. "
            "Check the weights, or compute in another dtype (`--dtype float32`)."
        )
    return scored


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def score_warnings(
    scores: tuple[BlockScores, ...],
    collected: Collected,
    *,
    count: int,
    protected: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> tuple[str, ...]:
    """What a reader should know before acting on these scores, one sentence each.

    Args:
        scores: The scores.
        collected: What they rest on.
        count: Number of blocks that would be removed (for the sets that are compared).
        protected: Criterion -> blocks that stay in these sets.
    """
    warnings = []
    for one in scores:
        if one.criterion in ("first", "last", "random"):
            continue
        depth = depth_correlation(one.values)
        lowest = sorted(one.ranking()[:count])
        if lowest == list(range(count)) and depth >= DEPTH_CORRELATION:
            warnings.append(
                f"`{one.criterion}` ranks these blocks by depth (Spearman {depth:+.2f} with the index): its lowest "
                f"{count} are the first {count}. Removing the first blocks usually destroys a model; measure before "
                "you cut."
            )
        if one.without_first_token is not None:
            without = one.model_copy(update={"values": one.without_first_token})
            stay = set(protected.get(one.criterion, ()))
            with_it, other = (
                sorted([block for block in some.ranking() if block not in stay][:count]) for some in (one, without)
            )
            if other != with_it:
                warnings.append(
                    f"`{one.criterion}` chooses other blocks when the first token of each sequence is left out: "
                    f"{other} instead of {with_it}."
                )
    return (*warnings, *_few_counts(scores, collected))


def _few_counts(scores: tuple[BlockScores, ...], collected: Collected) -> tuple[str, ...]:
    if not any(one.criterion == "avss-reference" for one in scores):
        return ()
    statistic = next(spec for spec in collected.rows if spec.counts_padding)
    below = collected.summarise(statistic)["below"]
    few = [block for block in range(collected.num_blocks) if below[block] < FEW_COUNTS]
    if not few:
        return ()
    return (
        f"`avss-reference` rests on fewer than {FEW_COUNTS} activations below 1e-5 in {len(few)} of "
        f"{collected.num_blocks} blocks (fewest: {below.min():.0f}); its order is noise there. More data helps.",
    )
