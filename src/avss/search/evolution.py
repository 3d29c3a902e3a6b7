"""Evolution: sets of the wanted size, changed one block at a time, the best survive; then blocks are put back.

After EvoPress (Sieberling et al., 2024, https://arxiv.org/abs/2410.14649): offspring swap a removed block for a kept
one, and are selected in stages on a growing part of the text. What differs: the stages are races with a bounded error,
the first generation holds runs of neighbours and the likeliest blocks beside chance, and a block's place in the order
raises its chance to be drawn. The smaller sizes follow from the best set by putting back the block that helps most.
"""

import numpy as np

from avss.search.base import BestSoFar, Curve, Order, Rules
from avss.search.greedy import likely_windows
from avss.search.ledger import BudgetSpent, Ledger, Removed
from avss.search.race import race

_PATIENCE = 6
"""Generations without a better set after which the search ends."""


def evolve(ledger: Ledger, rules: Rules, on_best: BestSoFar) -> Curve:
    """See the top of this file."""
    curve = Curve(ledger, on_best)
    draw = np.random.default_rng(rules.seed)
    order = list(rules.free)
    try:
        learned = Order(ledger, rules)
        order = learned()
        parents = race(
            ledger, first_generation(rules, learned, draw), num_winners=2, error=rules.error,
            allowance=ledger.num_blocks_left / 6,
        )  # fmt: skip
        curve.put(parents[0], "evolution")
        idle = 0
        for _ in range(rules.generations):
            # A third of the budget is for the smaller sizes.
            if idle == _PATIENCE or ledger.share_spent > 2 / 3:
                break
            children = _children(parents, rules, order, draw)
            if not children:
                break
            parents = race(
                ledger, [*parents, *children], num_winners=2, error=rules.error,
                allowance=ledger.num_blocks_left / (_PATIENCE + 1),
            )  # fmt: skip
            idle = 0 if curve.challenge(parents, "evolution", rules.error) else idle + 1
        for size in range(rules.count - 1, 0, -1):
            whole = curve.best[size + 1]
            smaller = [whole - {block} for block in sorted(whole)]
            curve.challenge(smaller, "put back", rules.error, ledger.num_blocks_left / size)
            if size > 1:
                curve.challenge(likely_windows(rules, learned, size), "window", rules.error)
    except BudgetSpent:
        curve.is_complete = False
    return curve.finish(rules, order)


def first_generation(rules: Rules, order: Order, draw: np.random.Generator) -> list[Removed]:
    """The likeliest blocks, runs of neighbours, and sets drawn with the likelier blocks preferred."""
    found = dict.fromkeys([frozenset(order()[: rules.count]), *likely_windows(rules, order, rules.count)])
    chances = _chances(len(rules.free))
    for _ in range(10 * rules.population):
        if len(found) >= rules.population:
            break
        found[frozenset(int(b) for b in draw.choice(order(), size=rules.count, replace=False, p=chances))] = None
    return list(found)


def _children(parents: list[Removed], rules: Rules, order: list[int], draw: np.random.Generator) -> list[Removed]:
    """Parents with one or two removed blocks swapped for kept ones."""
    found: dict[Removed, None] = {}
    for _ in range(10 * rules.population):
        if len(found) >= rules.population:
            break
        parent = parents[int(draw.integers(len(parents)))]
        kept = [block for block in order if block not in parent]
        num = min(1 + int(draw.random() < 0.25), len(kept), len(parent))
        if num == 0:
            break
        gone = draw.choice(sorted(parent), size=num, replace=False)
        taken = draw.choice(kept, size=num, replace=False, p=_chances(len(kept)))
        child = frozenset(int(block) for block in (parent - set(gone.tolist())) | set(taken.tolist()))
        if child not in parents:
            found[child] = None
    return list(found)


def _chances(num: int) -> np.ndarray:
    """Of `num` blocks in order: falling, the last is drawn a tenth as often as the first."""
    weights = np.linspace(1.0, 0.1, num)
    return weights / weights.sum()
