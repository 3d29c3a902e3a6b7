"""Each method finds what there is to find, with exhaustive search as the oracle."""

import itertools
import math

import numpy as np
import pytest

from avss.errors import InvalidPlanError
from avss.search import METHODS, Budget, Ledger, Rules, find_curve
from tests.support.costs import KnownCosts

methods = pytest.mark.parametrize("method", METHODS)
NUM = 9


def search(method, costs, **settings):
    rules = Rules(**{"count": 3, "free": tuple(range(len(costs.alone))), **settings})
    known = Ledger(costs, num_blocks=len(costs.alone), num_batches=costs.num_batches)
    return find_curve(method, known, rules), known


def tangled(seed, strength=0.1, **settings) -> KnownCosts:
    """Random costs with random interactions of every pair."""
    draw = np.random.default_rng(seed)
    pairs = itertools.combinations(range(NUM), 2)
    together = {pair: float(draw.normal(0, strength)) for pair in pairs}
    return KnownCosts(draw.uniform(0.2, 1.0, NUM), together, num_batches=4, **settings)


@pytest.mark.parametrize("method", ["greedy", "evolution"])
@pytest.mark.parametrize("seed", range(5))
def test_costs_that_add_up_are_solved_exactly_at_every_size(method, seed):
    draw = np.random.default_rng(seed)
    costs = KnownCosts(draw.permutation(NUM) + 1.0, num_batches=4)
    curve, _ = search(method, costs, count=4, generations=60)
    assert curve.is_complete
    for size in (1, 2, 3, 4):
        assert curve.best[size] == costs.best(size)


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_the_best_runs_of_neighbours(seed):
    costs = tangled(seed)
    curve, _ = search("window", costs)
    for size in (1, 2, 3):
        runs = [frozenset(range(start, start + size)) for start in range(NUM - size + 1)]
        assert curve.best[size] == min(runs, key=costs.truth)


def test_interactions_are_mostly_solved_and_never_worse_than_a_plain_greedy_search():
    solved, worse = 0, 0
    for seed in range(12):
        costs = tangled(seed, strength=0.2)
        curve, _ = search("greedy", costs, count=4, width=NUM)
        plain: frozenset[int] = frozenset()
        for _ in range(4):
            plain = min((plain | {block} for block in range(NUM) if block not in plain), key=costs.truth)
        solved += curve.best[4] == costs.best(4)
        worse += costs.truth(curve.best[4]) > costs.truth(plain) + 1e-9
    assert solved >= 9
    assert worse == 0


def test_a_window_that_no_greedy_path_leads_to_is_found():
    """Each of three neighbours is dear alone, and dearer in pairs; together they cost next to nothing."""
    alone = [0.5, 0.5, 0.9, 0.9, 0.9, 0.5, 0.5]
    costs = KnownCosts(alone, {(2, 3): -0.8, (3, 4): -0.8, (2, 4): -1.0}, num_batches=2)
    assert costs.best(3) == {2, 3, 4}
    curve, _ = search("greedy", costs, width=7, rounds=0, num_windows=7)
    assert curve.best[3] == {2, 3, 4}
    assert curve.how[3] == "window"
    without, _ = search("greedy", costs, width=7, rounds=0, num_windows=0, beam=1)
    assert costs.truth(without.best[3]) > costs.truth(curve.best[3])


def test_an_exchange_mends_a_greedy_choice():
    """Block 0 is cheapest first, and in the way of what comes third."""
    alone = [0.1, 0.2, 0.3, 0.3, 5.0, 5.0, 5.0]
    costs = KnownCosts(alone, {(0, 2): 1.0, (0, 3): 1.0}, num_batches=2)
    greedy, _ = search("greedy", costs, width=7, rounds=0, num_windows=0)
    curve, _ = search("greedy", costs, width=7, rounds=2, num_windows=0)
    assert 0 in greedy.best[3]
    assert curve.best[3] == costs.best(3) == {1, 2, 3}
    assert curve.how[3] == "exchange"


def test_a_beam_keeps_a_second_way_open():
    alone = [0.1, 0.2, 0.21, 0.22, 0.9, 0.9, 0.9]
    costs = KnownCosts(alone, {(0, 1): 1.0, (0, 2): 1.0, (0, 3): 1.0}, num_batches=2)
    curve, _ = search("greedy", costs, width=7, beam=3, rounds=0, num_windows=0)
    assert curve.best[3] == costs.best(3)


def test_a_step_widens_until_the_winner_is_not_among_the_last_tried():
    """The prior says the opposite of the truth."""
    costs = KnownCosts([float(10 - block) for block in range(10)], num_batches=2)
    prior = tuple(-value for value in costs.alone)
    curve, _ = search("greedy", costs, prior=prior, width=2, count=2)
    assert curve.best[2] == costs.best(2) == {8, 9}


def test_a_good_prior_saves_measurements():
    costs = KnownCosts(np.random.default_rng(1).permutation(20) + 1.0, num_batches=4)
    curve, screened = search("greedy", costs, prior=tuple(costs.alone), width=2, num_windows=0, rounds=0)
    everything, full = search("greedy", costs, width=20, num_windows=0, rounds=0)
    assert curve.best == everything.best
    assert screened.num_blocks_run < full.num_blocks_run / 2


@methods
def test_protected_blocks_stay(method):
    costs = KnownCosts([0.0, *[1.0] * (NUM - 2), 0.0], num_batches=2)
    curve, _ = search(method, costs, free=tuple(range(1, NUM - 1)))
    assert not {0, NUM - 1} & frozenset.union(*curve.best.values())


@pytest.mark.parametrize("passes", [math.inf, 0.01])
def test_windows_that_do_not_exist_are_refused_and_not_made_up(passes):
    costs = KnownCosts([1.0] * NUM, num_batches=2)
    free = tuple(block for block in range(NUM) if block % 3)
    known = Ledger(costs, num_blocks=NUM, num_batches=2, budget=Budget(passes=passes))
    with pytest.raises(InvalidPlanError, match="No 3 neighbouring blocks are free of protected ones"):
        find_curve("window", known, Rules(count=3, free=free))


@methods
def test_the_same_search_twice_is_the_same(method):
    one, other = (search(method, tangled(3, noise=0.1, spread=0.3))[0] for _ in range(2))
    assert (one.best, one.how) == (other.best, other.how)


@methods
def test_every_best_set_is_measured_on_all_of_the_text(method):
    curve, known = search(method, tangled(2, noise=0.1, spread=0.3))
    assert all(len(known.batches_of(one)) == 4 for one in curve.best.values())


@methods
def test_progress_tells_the_best_so_far(method):
    seen = []
    costs = tangled(4)
    rules = Rules(count=3, free=tuple(range(NUM)))
    known = Ledger(costs, num_blocks=NUM, num_batches=4)
    curve = find_curve(method, known, rules, on_best=lambda size, removed, cost: seen.append((size, removed, cost)))
    last = {size: (removed, cost) for size, removed, cost in seen}
    assert {size: removed for size, (removed, _) in last.items()} == curve.best
    assert all(cost == pytest.approx(costs.truth(removed)) for removed, cost in last.values())


@methods
def test_all_but_one_block_can_go(method):
    costs = tangled(5)
    curve, _ = search(method, costs, count=NUM - 1)
    assert set(curve.best) == set(range(1, NUM))


def test_noise_costs_little_and_screening_costs_nothing():
    """Thirty blocks with noise: a fifth of the effort of trying all, and no worse on average."""
    excess, passes = [], []
    for seed in range(6):
        draw = np.random.default_rng(seed)
        alone = np.sort(draw.gamma(1.0, 0.3, 30)) + 0.05
        alone = draw.permutation(alone)
        pairs = {
            (a, b): 0.2 * min(alone[a], alone[b]) * abs(draw.normal()) for a, b in itertools.combinations(range(30), 2)
        }
        costs = KnownCosts(alone, pairs, num_batches=8, spread=0.3, noise=0.05, seed=seed)
        rules = Rules(count=8, free=tuple(range(1, 29)))
        known = Ledger(costs, num_blocks=30, num_batches=8)
        found = find_curve("greedy", known, rules).best[8]
        plain: frozenset[int] = frozenset()
        for _ in range(8):
            plain = min((plain | {block} for block in rules.free if block not in plain), key=costs.truth)
        excess.append(costs.truth(found) - costs.truth(plain))
        passes.append(known.passes)
    assert np.mean(excess) < 0.05
    assert np.mean(passes) < 168 / 4


def test_a_tight_budget_still_compares_sets_of_the_size_that_was_asked_for():
    """Each step has a share of what is left, however often it widens: nothing is left to the prior at the end."""
    made_up = 0
    for seed in range(6):
        draw = np.random.default_rng(seed)
        alone = draw.permutation(np.sort(draw.gamma(1.0, 0.3, 30)) + 0.05)
        pairs = {
            (a, b): 0.2 * min(alone[a], alone[b]) * abs(draw.normal()) for a, b in itertools.combinations(range(30), 2)
        }
        costs = KnownCosts(alone, pairs, num_batches=8, spread=0.3, noise=0.05, seed=seed)
        known = Ledger(costs, num_blocks=30, num_batches=8, budget=Budget(passes=25))
        curve = find_curve("greedy", known, Rules(count=8, free=tuple(range(1, 29))))
        made_up += curve.how[8].startswith("prior")
        assert known.passes <= 25
    assert made_up == 0
