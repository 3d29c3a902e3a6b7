"""Races: the clearly worse stop early, and the true best is dropped no more often than the bound says."""

import math

import numpy as np
import pytest
from scipy import stats

from avss.search import Budget, Ledger
from avss.search.ledger import BudgetSpent
from avss.search.race import is_clearly_worse, race, rounds, survivors
from tests.support.costs import KnownCosts


def ledger(costs: KnownCosts, **settings) -> Ledger:
    return Ledger(costs, num_blocks=len(costs.alone), num_batches=costs.num_batches, **settings)


def singles(num: int) -> list[frozenset[int]]:
    return [frozenset({block}) for block in range(num)]


@pytest.mark.parametrize("num", [1, 2, 3, 7, 16, 33])
def test_rounds_take_every_batch_once_and_double(num):
    found = rounds(num)
    assert [batch for one in found for batch in one] == list(range(num))
    assert all(len(later) <= sum(map(len, found[:place])) for place, later in enumerate(found) if place > 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_test_is_scipys_one_sided_paired_t_test(seed):
    draw = np.random.default_rng(seed)
    one, other = draw.normal(0.4, 1, size=(2, 6 + seed))
    p = stats.ttest_rel(one, other, alternative="greater").pvalue
    for level in (0.001, 0.05, 0.3):
        assert is_clearly_worse(one - other, level) == (p < level)


def test_two_sequences_drop_nobody():
    assert not is_clearly_worse([5.0, 5.0], 0.5)
    assert is_clearly_worse([5.0, 5.0, 5.0], 0.001)


def test_the_true_best_is_dropped_no_more_often_than_the_bound():
    """Six runners of which five are as good as the best one: nothing is harder, every drop of the best is an error."""
    error, wrong, trials = 0.2, 0, 400
    for seed in range(trials):
        draw = np.random.default_rng(seed)
        costs = draw.normal(size=(6, 32))
        alive = list(range(6))
        level = error / (5 * 3)
        for num in (4, 8, 16):
            alive = [alive[place] for place in survivors(costs[alive][:, :num], level=level)]
        wrong += 0 not in alive
    # Four standard errors above the bound would be no chance.
    assert wrong / trials <= error + 4 * math.sqrt(error * (1 - error) / trials)
    assert wrong > 0, "so cautious that nothing was tested"


def test_without_the_correction_the_bound_would_break():
    """The twin of the test above: a plain test at the same level drops the best more often than the bound."""
    wrong, trials = 0, 400
    for seed in range(trials):
        costs = np.random.default_rng(seed).normal(size=(6, 32))
        alive = list(range(6))
        for num in (4, 8, 16):
            alive = [alive[place] for place in survivors(costs[alive][:, :num], level=0.2)]
        wrong += 0 not in alive
    assert wrong / trials > 0.3


def test_the_clearly_worse_are_not_measured_to_the_end():
    costs = KnownCosts([0.1, 0.2, 5.0, 6.0, 7.0], spread=3.0, noise=0.01)
    known = ledger(costs)
    assert race(known, singles(5), error=0.1) == [frozenset({0})]
    assert len(known.batches_of(frozenset({4}))) == 1
    # Sequences are ten times as different as sets: unpaired, nothing would be clear.
    assert known.num_blocks_run < 5 * costs.num_batches * 4 / 2


def test_all_winners_are_found_in_order():
    costs = KnownCosts([0.5, 0.1, 0.4, 0.9, 0.2], noise=0.02, spread=1.0)
    assert race(ledger(costs), singles(5), num_winners=3) == [frozenset({1}), frozenset({4}), frozenset({2})]


def test_a_ruined_model_loses_and_breaks_nothing():
    costs = KnownCosts([math.nan, 0.3, math.inf])
    with np.errstate(invalid="ignore"):
        assert race(ledger(costs), singles(3))[0] == frozenset({1})


def test_an_allowance_ends_a_race_after_a_round():
    costs = KnownCosts([0.1, 0.1, 0.1], noise=1.0)
    known = ledger(costs)
    race(known, singles(3), allowance=1)
    assert {len(known.batches_of(one)) for one in singles(3)} == {1}


def test_a_budget_ends_a_race_with_what_is_known():
    costs = KnownCosts([0.3, 0.1, 0.2], noise=0.001, num_batches=8)
    assert race(ledger(costs, budget=Budget(passes=0.5)), singles(3))[0] == frozenset({1})
    with pytest.raises(BudgetSpent):
        race(ledger(costs, budget=Budget(passes=0.01)), singles(3))
