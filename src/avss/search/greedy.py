"""Greedy search: one block more in each step, the one whose loss costs the least now; windows compete; then exchanges.

The greedy idea is SLEB's (Song et al., 2024, https://arxiv.org/abs/2402.09025). What differs: only the likeliest blocks
are tried at first, and more as long as the choice is not settled; they race (`avss.search.race`) instead of all being
measured on all of the text; runs of neighbours compete at each size, since one block alone says little about them; and
at the end single blocks are put back and others taken in their place, as in floating selection (Pudil et al., 1994).
"""

import math

from avss.search.base import BestSoFar, Curve, Order, Rules, free_windows
from avss.search.ledger import BudgetSpent, Ledger, Removed
from avss.search.race import race


def search_greedily(ledger: Ledger, rules: Rules, on_best: BestSoFar) -> Curve:
    """See the top of this file."""
    curve = Curve(ledger, on_best)
    order = list(rules.free)
    try:
        learned = Order(ledger, rules)
        order = learned()
        beam: list[Removed] = [frozenset()]
        for size in range(1, rules.count + 1):
            allowance = _fair_share(ledger, rules.count - size + 1 + rules.rounds)
            beam = step(ledger, rules, learned, beam, curve, allowance)
            order = learned()
            if size > 1 and curve.challenge(likely_windows(rules, learned, size), "window", rules.error, allowance):
                beam = [curve.best[size], *beam][: rules.beam]
        for _ in range(rules.rounds):
            if not exchange(ledger, rules, learned, curve, _fair_share(ledger, 1)):
                break
    except BudgetSpent:
        curve.is_complete = False
    return curve.finish(rules, order)


def step(
    ledger: Ledger, rules: Rules, order: Order, beam: list[Removed], curve: Curve, allowance: float = math.inf
) -> list[Removed]:
    """The best sets with one block more, the best first.

    Tried at first are the neighbours of what is gone and the `rules.width` likeliest others. As long as the winner
    comes from the later half of those tried, as many again are tried.

    Args:
        ledger: Measures.
        rules: What may go.
        order: Which blocks are the likeliest; learns from what is tried.
        beam: The sets to build on, all of one size.
        curve: Takes the winner.
        allowance: Blocks that may be spent on the step, however often it is widened.

    Raises:
        BudgetSpent: The budget ended in it; what was found until then is in the curve.
    """
    limit = ledger.num_blocks_run + allowance
    tried: dict[Removed, int] = {}
    winners: list[Removed] = []
    width = rules.width
    while True:
        new: list[Removed] = []
        for base in beam:
            for block in _likeliest(base, order, rules, width):
                one = base | {block}
                if one not in tried:
                    tried[one] = len(tried)
                    new.append(one)
        if not new or (winners and ledger.num_blocks_run >= limit):
            break
        left = max(0, limit - ledger.num_blocks_run)
        try:
            winners = race(ledger, [*winners, *new], num_winners=rules.beam, error=rules.error, allowance=left)
        except BudgetSpent:
            if winners:
                curve.put(winners[0], "greedy")
            raise
        for base in beam:
            order.learn(ledger, base, [block for block in rules.free if base | {block} in tried and block not in base])
        if tried[winners[0]] < len(tried) / 2:
            break
        width += rules.width
    curve.put(winners[0], "greedy")
    return winners


def _likeliest(base: Removed, order: Order, rules: Rules, width: int) -> list[int]:
    """Free blocks to try: the neighbours of what is gone, however unlikely alone, and the likeliest others."""
    left = [block for block in order() if block not in base]
    beside = [block for block in left if block - 1 in base or block + 1 in base]
    return [*beside, *[block for block in left if block not in beside][:width]]


def likely_windows(rules: Rules, order: Order, size: int) -> list[Removed]:
    """The runs of neighbours of a size that look cheapest: the lowest sums over their blocks."""
    starts = sorted(free_windows(rules, size), key=lambda start: (order.of_window(start, size), start))
    return [frozenset(range(start, start + size)) for start in starts[: rules.num_windows]]


def exchange(ledger: Ledger, rules: Rules, order: Order, curve: Curve, allowance: float) -> bool:
    """Puts single blocks of the largest set back and takes others in their place; True if that paid.

    The sets without one block are sets of the size before, and challenge its best.
    """
    whole = curve.best[rules.count]
    if len(whole) < 2:
        return False
    smaller = [whole - {block} for block in sorted(whole)]
    best = race(ledger, smaller, num_winners=2, error=rules.error, allowance=allowance / 3)
    curve.challenge(best[:1], "put back", rules.error, allowance / 3)
    candidates = []
    for base in best:
        (gone,) = whole - base
        left = [block for block in _likeliest(base, order, rules, rules.width) if block != gone]
        candidates += [base | {block} for block in left]
    return curve.challenge(candidates, "exchange", rules.error, allowance / 3)


def _fair_share(ledger: Ledger, num_steps: int) -> float:
    """Blocks that one of the steps to come may spend, if all are to get as much."""
    return ledger.num_blocks_left / max(1, num_steps)
