"""How far two ways of ordering the same blocks agree."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from avss.statistics.base import FloatArray

_DRAWS = 200


def spearman(one: Sequence[float] | FloatArray, other: Sequence[float] | FloatArray) -> float:
    """Spearman's rank correlation, -1 to 1, ties at their mean rank; 0 where either side is constant."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    correlation, _ = stats.spearmanr(one, other)
    return _clean(correlation)


def kendall(one: Sequence[float] | FloatArray, other: Sequence[float] | FloatArray) -> float:
    """Kendall's tau-b, -1 to 1; 0 where either side is constant."""
    tau, _ = stats.kendalltau(one, other)
    return 0.0 if tau != tau else _clean(tau)


def _clean(correlation: Any) -> float:
    """Twelve digits: equal orders agree by exactly one, and scipy has no types here."""
    return round(float(correlation), 12)


def depth_correlation(scores: Sequence[float]) -> float:
    """Spearman correlation of scores with the block's index, -1 to 1; near either end, they only rank by depth."""
    return spearman(scores, range(len(scores)))


def agreement_with(scores: Sequence[float], damage: FloatArray, *, seed: int = 0) -> tuple[float, float | None]:
    """Spearman correlation of scores with measured damage, and its standard error.

    Args:
        scores: One a block, `[L]`.
        damage: What leaving out each block cost on each sequence, `[L, S]`.
        seed: Of the resampling of sequences.

    Returns:
        The correlation with the mean damage; and the standard deviation of it over resampled sequences, None for fewer
        than three sequences.
    """
    found = spearman(scores, damage.mean(1))
    num = damage.shape[1]
    if num < 3:
        return found, None
    random = np.random.default_rng(seed)
    drawn = [spearman(scores, damage[:, random.integers(num, size=num)].mean(1)) for _ in range(_DRAWS)]
    return found, float(np.std(drawn, ddof=1))


def overlap(chosen: Sequence[int], damage: Sequence[float] | FloatArray) -> int:
    """How many of the chosen blocks are among as many blocks of least damage; ties go by index, nan is the most.

    Example:
        >>> overlap((0, 2), [0.1, 0.2, 0.3])
        1
    """
    order = sorted(range(len(damage)), key=lambda block: (math.isnan(damage[block]), damage[block], block))
    cheapest = order[: len(chosen)]
    return len(set(chosen) & set(cheapest))
