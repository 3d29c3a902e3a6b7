r"""Races: sets measured on a growing part of the text, the clearly worse stop early.

All runners see the same sequences, so two of them are compared by their differences sequence by sequence, which vary
far less than the costs do. After each round, a runner is dropped if some other one beats it: with the mean
$\bar d > 0$ and standard deviation $s_d$ of the $n$ differences,

$$\bar d > t_{n-1, \alpha'} \, s_d / \sqrt{n}, \qquad \alpha' = \frac{\alpha}{(R - 1) K}$$

for $R$ runners and $K$ rounds in which one may be dropped. A single test drops a runner that is truly no worse than
another with probability $\alpha'$ at most (one-sided paired t test; exact for normal differences); the truly best one
has $R - 1$ rivals and $K$ rounds, so it is dropped with probability $\alpha$ at most (union bound). With several
winners wanted, a runner is dropped only if as many others beat it.

The idea is that of Hoeffding races (Maron and Moore, 1994) and of F-Race (Birattari et al., 2002); theirs bound the
costs' range or rank them.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from avss.search.ledger import BudgetSpent, Ledger, Removed

FIRST_TEST = 3
"""Fewest sequences on which a runner is dropped: two differences may agree by chance in more than the mean."""


def race(
    ledger: Ledger,
    sets: Iterable[Removed],
    *,
    num_winners: int = 1,
    error: float = 0.1,
    allowance: float = math.inf,
) -> list[Removed]:
    """Runs the race.

    Args:
        ledger: Measures.
        sets: The runners.
        num_winners: How many to find.
        error: Bound on the probability that one of the true winners is dropped, for each of them.
        allowance: Blocks that may be spent; once they are, the order so far decides. At least one batch is run.

    Returns:
        The winners, the best first, by their means over the same sequences.

    Raises:
        BudgetSpent: Not even the first batch fitted into the budget.
    """
    runners = list(dict.fromkeys(sets))
    if len(runners) <= num_winners:
        ledger.ask(runners, [0])
        return sorted(runners, key=lambda one: (ledger.mean(one), sorted(one)))
    schedule = rounds(ledger.num_batches)
    level = error / ((len(runners) - 1) * max(1, len(schedule) - 1))
    limit = ledger.num_blocks_run + allowance
    seen: list[int] = []
    for batches in schedule:
        if seen and ledger.num_blocks_run >= limit:
            break
        try:
            for batch in batches:  # one at a time: what the budget allows of a round is not lost
                ledger.ask(runners, [batch])
                seen.append(batch)
        except BudgetSpent:
            if not seen:
                raise
            break
        if len(runners) > num_winners and len(seen) < ledger.num_batches:
            costs = ledger.costs(runners, seen)
            runners = [runners[place] for place in survivors(costs, level=level, num_winners=num_winners)]
        if len(runners) <= num_winners:
            break
    means = _finite(ledger.costs(runners, seen)).mean(axis=1)
    order = sorted(range(len(runners)), key=lambda place: (means[place], sorted(runners[place])))
    return [runners[place] for place in order[:num_winners]]


def rounds(num_batches: int) -> list[list[int]]:
    """Which batches each round adds: 1, 1, 2, 4, ...; a test after each doubling keeps their number small.

    Example:
        >>> rounds(7)
        [[0], [1], [2, 3], [4, 5, 6]]
    """
    found, start, size = [], 0, 1
    while start < num_batches:
        found.append(list(range(start, min(start + size, num_batches))))
        start += size
        size = max(1, start)
    return found


def survivors(costs: NDArray[np.float64], *, level: float, num_winners: int = 1) -> list[int]:
    r"""Which runners are not beaten by as many others as there are to be winners.

    Args:
        costs: On the same sequences, `[runners, S]`.
        level: Error of a single comparison, $\alpha'$ above.
        num_winners: As for `race`.
    """
    values = _finite(costs)
    means = values.mean(axis=1)
    threshold = critical_value(level, values.shape[1])
    kept = []
    for place in range(len(values)):
        # Only a better mean can beat it.
        rivals = np.flatnonzero(means < means[place])
        beaten_by = int(_clearly_above_zero(values[place] - values[rivals], threshold).sum())
        if beaten_by < num_winners:
            kept.append(place)
    return kept


def critical_value(level: float, num: int) -> float:
    """What the mean of `num` differences must exceed, in units of its standard error; inf for too few of them."""
    return float(stats.t.isf(level, num - 1)) if num >= FIRST_TEST else math.inf


def is_clearly_worse(differences: Sequence[float] | NDArray[np.float64], level: float) -> bool:
    """The one-sided paired t test: whether the mean of the differences is above zero."""
    values = np.asarray(differences, dtype=np.float64)[None]
    return bool(_clearly_above_zero(values, critical_value(level, values.shape[1]))[0])


def _clearly_above_zero(differences_RS: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    num = differences_RS.shape[1]
    if math.isinf(threshold):
        return np.zeros(len(differences_RS), dtype=bool)
    errors = differences_RS.std(axis=1, ddof=1) / math.sqrt(num)
    return differences_RS.mean(axis=1) > threshold * errors


def _finite(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Costs with what is no number made the worst there is; a ruined model overflows."""
    known = costs[np.isfinite(costs)]
    worst = 1e6 * max(1.0, float(np.abs(known).max())) if known.size else 1.0
    return np.where(np.isfinite(costs), costs, worst)
