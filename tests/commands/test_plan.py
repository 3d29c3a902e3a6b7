"""A plan removes exactly what its rule says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avss.config import PlanConfig, SearchConfig
from avss.errors import ConfigError, InvalidPlanError
from avss.plan import (
    check_one_target,
    check_search,
    count_of_fraction,
    lowest_by_mass,
    make_plan,
    parse_blocks,
    protected_blocks,
    published_by_mass,
)
from avss.record import BlockScores

scores_lists = st.lists(st.integers(-5, 5).map(float), min_size=3, max_size=24)


def toy(values) -> BlockScores:
    return BlockScores(criterion="toy", title="Toy", values=tuple(values))


@given(scores_lists, st.data())
def test_exactly_the_lowest_go_and_ties_go_by_index(values, data):
    count = data.draw(st.integers(1, len(values) - 1))
    plan = make_plan(toy(values), PlanConfig(count=count), protects_ends=False)
    slow = sorted(sorted(range(len(values)), key=lambda block: (values[block], block))[:count])
    assert list(plan.removed) == slow


@given(scores_lists, st.data())
def test_protected_blocks_never_go(values, data):
    protected = data.draw(st.sets(st.integers(0, len(values) - 1), max_size=len(values) - 1))
    count = data.draw(st.integers(1, len(values) - max(1, len(protected))))
    config = PlanConfig(count=count, protect=",".join(map(str, protected)) or "none")
    plan = make_plan(toy(values), config)
    assert not protected & set(plan.removed)
    worst_removed = max(values[block] for block in plan.removed)
    assert all(values[block] >= worst_removed for block in plan.kept if block not in protected)


@given(scores_lists, st.data())
def test_a_contiguous_plan_is_the_cheapest_run(values, data):
    count = data.draw(st.integers(1, len(values) - 1))
    plan = make_plan(toy(values), PlanConfig(count=count, contiguous=True), protects_ends=False)
    assert plan.removed == tuple(range(plan.removed[0], plan.removed[0] + count))
    sums = [sum(values[start : start + count]) for start in range(len(values) - count + 1)]
    assert sum(values[block] for block in plan.removed) == min(sums)


@pytest.mark.parametrize(
    ("fraction", "blocks", "count"),
    [(0.25, 30, 8), (0.25, 6, 2), (0.25, 10, 3), (0.25, 32, 8), (0.5, 5, 3), (0.1, 12, 1)],
)
def test_a_fraction_is_rounded_half_up(fraction, blocks, count):
    assert count_of_fraction(fraction, blocks) == count


@pytest.mark.parametrize("fraction", [0, 1, -1, 2, float("nan"), float("inf")])
def test_a_fraction_outside_is_refused(fraction):
    with pytest.raises(InvalidPlanError, match="between 0 and 1"):
        count_of_fraction(fraction, 30)


def test_auto_protects_the_ends_only_where_the_criterion_does():
    assert protected_blocks("auto", 6, protects_ends=True) == (0, 5)
    assert protected_blocks("auto", 6, protects_ends=False) == ()
    assert protected_blocks("0,-1", 6, protects_ends=False) == (0, 5)
    assert "protected: 0, 3" in make_plan(toy([0, 1, 2, 3]), PlanConfig(count=1)).rule


def test_blocks_are_parsed_with_both_ends():
    assert parse_blocks("3,12-15,-1", 30) == (3, 12, 13, 14, 15, 29)
    with pytest.raises(InvalidPlanError, match="`30`"):
        parse_blocks("30", 30)


@pytest.mark.parametrize(("fraction", "blocks", "count"), [(0.29, 50, 15), (0.7, 45, 32), (0.35, 90, 32), (0.25, 6, 2)])
def test_halves_are_rounded_up_whatever_the_last_bit_says(fraction, blocks, count):
    assert count_of_fraction(fraction, blocks) == count


def test_a_range_has_both_ends_counted_from_the_front():
    with pytest.raises(InvalidPlanError, match="begins before the first block"):
        parse_blocks("-3-5", 30)
    assert parse_blocks("-3,5", 30) == (5, 27)


@pytest.mark.parametrize(
    ("settings", "flag"), [({"protect": "3,7"}, "--protect 3,7"), ({"contiguous": True}, "--contiguous")]
)
def test_named_blocks_leave_nothing_to_protect(settings, flag):
    with pytest.raises(ConfigError, match=f"`{flag}` is for a choice of blocks"):
        check_one_target(PlanConfig(blocks="3,7", **settings))
    check_one_target(PlanConfig(blocks="3,7", protect="none"))


@pytest.mark.parametrize(
    ("select", "setting", "aim"),
    [
        ("window", {"beam": 4}, {}),
        ("window", {"width": 9}, {}),
        ("window", {"screen": "avss"}, {}),
        ("evolution", {"width": 9}, {}),
        ("greedy", {"finalists": 2}, {"max_params": 1000}),
        ("scores", {"width": 9}, {}),
    ],
)
def test_a_setting_that_the_search_does_not_read_is_refused(select, setting, aim):
    plan = PlanConfig(select=select, **(aim or {"count": 2}))
    (name,) = setting
    with pytest.raises(ConfigError, match=f"`--{name} .* is for "):
        check_search(SearchConfig(**setting), plan, repairs=True)
    check_search(SearchConfig(), plan, repairs=True)


def test_one_target_is_needed():
    with pytest.raises(ConfigError, match="exactly one"):
        make_plan(toy([1, 2, 3]), PlanConfig(count=1, fraction=0.5))


def test_scores_that_are_not_numbers_rank_nowhere():
    with pytest.raises(InvalidPlanError, match="ranks nowhere"):
        make_plan(toy([1, float("nan"), 3]), PlanConfig(count=1))


# --- by mass ---

positive_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)


@given(positive_lists, st.floats(0.01, 0.99))
def test_mass_is_cumulated_along_the_sorted_scores(values, share):
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(np.array(values)[order]) / np.sum(values)
    found = lowest_by_mass(values, share)
    sure = {int(block) for block, sum_ in zip(order, reached, strict=True) if sum_ < share - 1e-9}
    assert sure <= set(found) <= {int(b) for b, sum_ in zip(order, reached, strict=True) if sum_ <= share + 1e-9}


@given(positive_lists, st.floats(0.01, 0.99))
def test_the_published_mass_is_a_run_of_first_blocks(values, share):
    found = published_by_mass(values, share)
    assert found == tuple(range(len(found)))
    assert sum(values[: len(found)]) <= share * sum(values) * (1 + 1e-9)
    assert len(found) == len(values) or sum(values[: len(found) + 1]) >= share * sum(values) * (1 - 1e-9)


def test_a_plan_by_mass_takes_what_fits_and_counts_the_protected_in_the_sum():
    plan = make_plan(toy([1, 2, 3, 4, 10]), PlanConfig(fraction=0.31, rule="mass"), protects_ends=False)
    assert plan.removed == (0, 1, 2)
    assert "at most 0.31 of the sum of toy" in plan.rule
    guarded = make_plan(toy([1, 2, 3, 4, 10]), PlanConfig(fraction=0.31, rule="mass", protect="0"))
    assert guarded.removed == (1, 2)
    assert guarded.protected == (0,)


@pytest.mark.parametrize(
    ("settings", "values", "error", "match"),
    [
        ({"count": 1}, [1, 2, 3], ConfigError, "as `--fraction`"),
        ({"fraction": 0.5, "contiguous": True}, [1, 2, 3], ConfigError, "without `--contiguous`"),
        ({"fraction": 0.1}, [1, 2, 3], InvalidPlanError, "holds 0.167 of it"),
        ({"fraction": 0.5}, [1, -2, 3], InvalidPlanError, "block 1 has -2"),
        ({"fraction": 0.5}, [0, 0, 0], InvalidPlanError, "all are 0"),
        ({"fraction": 0.5}, [1, float("nan"), 3], InvalidPlanError, "block 1 has nan"),
    ],
)
def test_mass_that_cannot_be_shared_is_refused(settings, values, error, match):
    with pytest.raises(error, match=match):
        make_plan(toy(values), PlanConfig(rule="mass", **settings), protects_ends=False)


# --- by measured runs ---


def test_a_contiguous_plan_follows_the_measured_runs_where_there_are_any():
    windows = ((0.1, 0.2, 0.3, 0.4), (0.9, 0.1, 0.8), (0.9, 0.5), (1.0,))
    scores = toy([0.1, 0.2, 0.3, 0.4]).model_copy(update={"windows": windows})
    plan = make_plan(scores, PlanConfig(count=2, contiguous=True), protects_ends=False)
    assert plan.removed == (1, 2)  # the sum of scores would take 0 and 1
    assert "smallest distance across it by toy" in plan.rule
    assert make_plan(scores, PlanConfig(count=2), protects_ends=False).removed == (0, 1)
    broken = scores.model_copy(update={"windows": (windows[0], (0.9, float("nan"), 0.8), *windows[2:])})
    with pytest.raises(InvalidPlanError, match="from 1 on"):
        make_plan(broken, PlanConfig(count=2, contiguous=True), protects_ends=False)
