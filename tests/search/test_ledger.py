"""The ledger counts what is spent, keeps to the budget, and makes a killed search the same as one that was not."""

import dataclasses
import json
import math

import numpy as np
import pytest

from avss.errors import ConfigError
from avss.search import METHODS, Budget, Ledger, Rules, find_curve
from avss.search.ledger import BudgetSpent, blocks_run
from tests.support.costs import KnownCosts

methods = pytest.mark.parametrize("method", METHODS)
RULES = Rules(count=3, free=tuple(range(9)), width=3)


def world(seed: int = 0, **settings) -> KnownCosts:
    draw = np.random.default_rng(seed)
    together = {(a, b): float(draw.normal(0, 0.1)) for a in range(9) for b in range(a + 1, 9)}
    return KnownCosts(draw.uniform(0.1, 1.0, 9), together, num_batches=4, spread=0.5, noise=0.05, **settings)


def ledger(costs, **settings) -> Ledger:
    return Ledger(costs, num_blocks=9, num_batches=4, **settings)


def told(curve, known):
    return [(size, sorted(curve.best[size]), curve.how[size], known.mean(curve.best[size])) for size in curve.best]


def slow_blocks(sets, num_blocks):
    """Every kept block of every set, but for those whose whole prefix another set before it has computed."""
    computed = {tuple(False for _ in range(place)) for place in range(num_blocks + 1)}  # the whole model
    total = 0
    for one in sorted(sets, key=lambda one: [block in one for block in range(num_blocks)]):
        choices = tuple(block in one for block in range(num_blocks))
        for place in range(num_blocks):
            if choices[: place + 1] not in computed:
                total += not choices[place]
                computed.add(choices[: place + 1])
    return total


@pytest.mark.parametrize("seed", range(10))
def test_the_cost_is_that_of_the_tree_of_prefixes(seed):
    draw = np.random.default_rng(seed)
    sets = {frozenset(draw.choice(8, size=draw.integers(1, 5), replace=False).tolist()) for _ in range(6)}
    assert blocks_run(sets, 8) == slow_blocks(sets, 8)


def test_nothing_is_measured_twice():
    costs = world()
    known = ledger(costs)
    one, other = frozenset({1}), frozenset({2, 5})
    known.ask([one, other, one], [0, 1])
    known.ask([one], [0, 1, 2])
    assert [(len(sets), batch) for sets, batch in costs.calls] == [(2, 0), (2, 1), (1, 2)]
    assert known.known(one).shape == (12, 2)
    assert known.mean(one) == pytest.approx(known.known(one)[:, 0].mean())
    assert known.mean(frozenset({7})) == math.inf
    assert known.num_sets == 2


def test_the_whole_model_is_counted_once_a_batch_or_each_time():
    sets = [frozenset({8})]  # costs no block itself
    once, each = ledger(world()), ledger(world(), dense_each_time=True)
    for known in (once, each):
        known.ask(sets, [0])
        known.ask([frozenset({7, 8})], [0])
    assert (once.num_blocks_run, each.num_blocks_run) == (9, 18)
    apart = ledger(world(), shares_prefixes=False)
    apart.ask([frozenset({7, 8}), frozenset({8})], [0])
    assert apart.num_blocks_run == 9 + 7 + 8


@methods
@pytest.mark.parametrize("passes", [0.1, 1, 2.5, 5])
def test_a_budget_in_passes_is_kept_and_every_size_has_a_set(method, passes):
    costs = world()
    known = ledger(costs, budget=Budget(passes=passes))
    curve = find_curve(method, known, dataclasses.replace(RULES, fallback=lambda: range(9)))
    assert known.passes <= passes
    assert {size: len(one) for size, one in curve.best.items()} == {1: 1, 2: 2, 3: 3}
    assert all(one <= set(RULES.free) for one in curve.best.values())
    for size, one in curve.best.items():
        assert bool(known.batches_of(one)) == (curve.how[size] != "prior")
    if passes < 1:
        assert not curve.is_complete


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["greedy", "evolution"])
@pytest.mark.parametrize("budget", [Budget(passes=0.5), Budget(seconds=8.0)])
def test_a_budget_below_measuring_each_block_alone_goes_by_the_fallback_or_is_refused(method, budget, monkeypatch):
    """Never by the blocks' numbers, and never unsaid."""
    clock = [0.0]
    monkeypatch.setattr("avss.search.ledger.time.perf_counter", lambda: clock[0])

    def slow(sets, batches):
        clock[0] += 1.0 * sum(9 - len(one) for one in sets)
        return costs(sets, batches)

    costs = world()
    with pytest.raises(ConfigError, match=r"measure each of 9 blocks alone.*takes 1(.25)? passes.*--screen"):
        find_curve(method, ledger(slow, budget=budget), RULES)
    asked = []

    def fallback():
        asked.append(True)
        return [5.0, 9.0, 1.0, 8.0, 7.0, 0.0, 9.0, 9.0, 2.0]

    known = ledger(slow, budget=budget)
    curve = find_curve(method, known, dataclasses.replace(RULES, fallback=fallback))
    assert asked == [True]
    assert curve.best[3] == {5, 2, 8}
    assert not curve.is_complete
    assert known.passes <= budget.passes
    # With enough, nobody asks for it.
    find_curve(method, ledger(costs), dataclasses.replace(RULES, fallback=fallback))
    assert asked == [True]


def test_sets_that_share_nothing_are_kept_one_by_one(tmp_path):
    """A search by a task that is killed loses one measurement, not all those of a step."""
    costs, path = world(), tmp_path / "ledger.jsonl"

    def mortal(sets, batches):
        if {3} in sets:
            raise Killed
        return costs(sets, batches)

    sets = [frozenset({block}) for block in range(5)]
    with pytest.raises(Killed):
        ledger(mortal, shares_prefixes=False, path=path).ask(sets, [0])
    seen = []

    def counted(sets, batches):
        seen.extend(sets)
        return costs(sets, batches)

    ledger(counted, shares_prefixes=False, path=path).ask(sets, [0])
    assert seen == [{3}, {4}]


@methods
def test_a_budget_in_seconds_is_kept(method, monkeypatch):
    costs, clock, seen = world(), [0.0], set()
    monkeypatch.setattr("avss.search.ledger.time.perf_counter", lambda: clock[0])

    def slow(sets, batches):
        clock[0] += blocks_run(sets, 9) + 9 * len(set(batches) - seen)
        seen.update(batches)
        return costs(sets, batches)

    known = ledger(slow, budget=Budget(seconds=60.0))
    curve = find_curve(method, known, RULES)
    assert 0 < known.seconds <= 60
    assert set(curve.best) == {1, 2, 3}


@methods
@pytest.mark.parametrize("budget", [Budget(), Budget(passes=4)])
@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_search_goes_on_and_ends_the_same(method, budget, after, tmp_path):
    whole = world()
    unbroken = ledger(whole, budget=budget)
    expected = told(find_curve(method, unbroken, RULES), unbroken)

    first = world()

    def dies(sets, batches):
        if len(first.calls) == after:
            raise Killed
        return first(sets, batches)

    path = tmp_path / "folder" / "search.jsonl"
    with pytest.raises(Killed):
        find_curve(method, ledger(dies, budget=budget, path=path, key="k"), RULES)
    with path.open("a") as file:
        file.write('{"sets": [[1, 2')  # and the process was killed while it wrote
    second = world()
    known = ledger(second, budget=budget, path=path, key="k")
    assert told(find_curve(method, known, RULES), known) == expected
    assert known.num_blocks_run == unbroken.num_blocks_run
    assert len(first.calls) + len(second.calls) == len(whole.calls)
    # And once more, from the file alone.
    third = world()
    known = ledger(third, budget=budget, path=path, key="k")
    assert told(find_curve(method, known, RULES), known) == expected
    assert third.calls == []


def test_a_file_of_another_search_is_started_anew(tmp_path):
    path = tmp_path / "search.jsonl"
    find_curve("greedy", ledger(world(), path=path, key="one"), RULES)
    costs = world()
    find_curve("greedy", ledger(costs, path=path, key="other"), RULES)
    assert costs.calls
    header = json.loads(path.read_text().splitlines()[0])
    assert header["key"] == "other"


def test_a_file_that_is_no_search_is_started_anew(tmp_path):
    path = tmp_path / "search.jsonl"
    path.write_text("[1, 2]\nnot json at all\n")
    known = ledger(world(), path=path, key="k")
    known.ask([frozenset({1})], [0])
    assert len(path.read_text().splitlines()) == 2


def test_a_larger_budget_goes_on_where_a_smaller_one_ended(tmp_path):
    path = tmp_path / "search.jsonl"
    small, large = world(), world()
    find_curve("greedy", ledger(small, budget=Budget(passes=2), path=path, key="k"), RULES)
    known = ledger(large, path=path, key="k")
    assert find_curve("greedy", known, RULES).is_complete
    assert (large.calls[0] if large.calls else None) != small.calls[0]


def test_the_budget_says_no_before_it_is_exceeded():
    known = ledger(world(), budget=Budget(passes=0.3))
    with pytest.raises(BudgetSpent):
        known.ask([frozenset({0})], [0, 1])
    assert known.num_blocks_run == 0
    assert known.num_blocks_left == pytest.approx(0.3 * 9 * 4)
