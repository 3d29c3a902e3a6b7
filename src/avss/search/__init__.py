"""Search: sets of blocks chosen by the measured cost of leaving them out. No torch, no model: the measuring is given.

One file per method, each with one function that takes a `Ledger` and `Rules` and returns a `Curve`: the best set found
of every size from 1 to the number asked for.
"""

from collections.abc import Callable, Mapping

from avss.search.base import BestSoFar, Curve, Rules
from avss.search.evolution import evolve
from avss.search.greedy import search_greedily
from avss.search.ledger import Budget, Ledger, Measure
from avss.search.window import search_windows

__all__ = ["METHODS", "BestSoFar", "Budget", "Curve", "Ledger", "Measure", "Rules", "find_curve"]

METHODS: Mapping[str, Callable[[Ledger, Rules, BestSoFar], Curve]] = {
    "evolution": evolve,
    "greedy": search_greedily,
    "window": search_windows,
}
"""Name -> method."""


def find_curve(
    method: str, ledger: Ledger, rules: Rules, *, on_best: BestSoFar = lambda size, removed, cost: None
) -> Curve:
    """The best set found of every size from 1 to `rules.count`.

    Args:
        method: One of `METHODS`.
        ledger: What measures, remembers and keeps the budget. When the budget ends, the search ends with what it has.
        rules: What may go, and how hard to look.
        on_best: Called with (size, set, cost) whenever a size has a new best set.
    """
    return METHODS[method](ledger, rules, on_best)
