"""Agreement of two orders, against plain counting."""

import itertools

import numpy as np
import pytest

from avss.statistics.agreement import agreement_with, depth_correlation, kendall, overlap, spearman


def plain_spearman(one, other):
    """The correlation of ranks, ties at their mean rank."""
    ranks = [
        [sum(y < x for y in side) + (sum(y == x for y in side) - 1) / 2 for x in side]
        for side in (list(one), list(other))
    ]
    return np.corrcoef(*ranks)[0, 1]


def plain_kendall(one, other):
    """Pairs in the same order minus pairs in the other; no ties."""
    pairs = list(itertools.combinations(range(len(one)), 2))
    return sum(np.sign((one[a] - one[b]) * (other[a] - other[b])) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_the_textbooks(seed):
    random = np.random.default_rng(seed)
    one, other = random.normal(size=9), random.normal(size=9)
    assert spearman(one, other) == pytest.approx(plain_spearman(one, other), abs=1e-12)
    assert kendall(one, other) == pytest.approx(plain_kendall(one, other), abs=1e-12)
    tied = np.round(one)
    assert spearman(tied, other) == pytest.approx(plain_spearman(tied, other), abs=1e-12)


def test_a_constant_agrees_with_nothing():
    assert spearman([1, 1, 1], [1, 2, 3]) == kendall([1, 1, 1], [1, 2, 3]) == 0


def test_depth_is_the_correlation_with_the_index():
    assert depth_correlation([0.1, 0.5, 0.7]) == 1
    assert depth_correlation([0.7, 0.5, 0.1]) == -1


def test_agreement_with_damage_has_an_error_that_shrinks_with_the_text():
    random = np.random.default_rng(0)
    centres = np.linspace(0, 1, 8)
    few = centres[:, None] + random.normal(size=(8, 6))
    many = centres[:, None] + random.normal(size=(8, 600))
    found, error = agreement_with(centres, few)
    assert found == pytest.approx(plain_spearman(centres, few.mean(1)), abs=1e-12)
    assert error > agreement_with(centres, many)[1]
    assert agreement_with(centres, many)[0] > 0.9
    assert agreement_with(centres, few[:, :2])[1] is None


def test_overlap_counts_the_cheapest():
    damage = [0.5, 0.1, 0.1, 0.9, 0.2]
    assert overlap((1, 2), damage) == 2
    assert overlap((1, 4), damage) == 1
    assert overlap((3,), damage) == 0
    assert overlap((2,), [float("nan"), 0.5, 0.1]) == 1
    assert overlap((0,), [float("nan"), 0.5, 0.1]) == 0
