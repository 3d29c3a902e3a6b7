"""Window search: of every size the run of neighbours that costs the least to lose.

The candidates are those of Gromov et al. (2024, https://arxiv.org/abs/2403.17887), who compare hidden states by their
angle; here all runs race on measured cost.
"""

from avss.errors import InvalidPlanError
from avss.search.base import BestSoFar, Curve, Rules, free_windows
from avss.search.ledger import BudgetSpent, Ledger


def search_windows(ledger: Ledger, rules: Rules, on_best: BestSoFar) -> Curve:
    """See the top of this file. The largest size comes first: it is the one that was asked for.

    Raises:
        InvalidPlanError: No run of that size is free of protected blocks.
    """
    curve = Curve(ledger, on_best)
    if not free_windows(rules, rules.count):
        raise InvalidPlanError(
            f"No {rules.count} neighbouring blocks are free of protected ones. Remove fewer, protect fewer, or search "
            "without that condition (`--select greedy`)."
        )
    try:
        for size in range(rules.count, 0, -1):
            windows = [frozenset(range(start, start + size)) for start in free_windows(rules, size)]
            curve.challenge(windows, "window", rules.error, ledger.num_blocks_left / size)
    except BudgetSpent:
        curve.is_complete = False
        largest = curve.best.get(min(curve.best, default=0)) or frozenset(
            range(start := free_windows(rules, rules.count)[0], start + rules.count)
        )
        for size in range(min(len(largest), rules.count), 0, -1):
            # Never measured: a part of the next larger run, or of the first there is.
            if size not in curve.best:
                curve.best[size], curve.how[size] = frozenset(sorted(largest)[:size]), "prior"
    return curve.finish(rules, rules.free)
