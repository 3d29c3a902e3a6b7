"""A plan removes exactly what its rule says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avss.config import PlanConfig
from avss.errors import ConfigError, InvalidPlanError
from avss.plan import count_of_fraction, make_plan, parse_blocks, protected_blocks
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


def test_one_target_is_needed():
    with pytest.raises(ConfigError, match="exactly one"):
        make_plan(toy([1, 2, 3]), PlanConfig(count=1, fraction=0.5))


def test_scores_that_are_not_numbers_rank_nowhere():
    with pytest.raises(InvalidPlanError, match="ranks nowhere"):
        make_plan(toy([1, float("nan"), 3]), PlanConfig(count=1))
