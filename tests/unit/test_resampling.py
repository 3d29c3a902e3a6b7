"""Intervals and stability: against plain loops, on texts whose truth is known."""

import numpy as np
import pytest
import torch
from scipy import stats

from avss.criteria import CRITERIA
from avss.record import Stability
from avss.scoring import score_blocks, with_certainty
from avss.statistics.agreement import kendall
from avss.statistics.base import Rows
from avss.statistics.collected import Collected
from avss.statistics.resampling import (
    Jackknife,
    jackknife,
    lowest,
    sequences_needed,
    stability_of,
)
from tests.support.observations import Batch, observe

READING = ("variance", "avss-paper", "avss", "block-influence", "update-norm")


def population(num_sequences, *, length=8, width=32, spread=0.25, seed=0):
    """Sequences that differ from each other in scale, as texts do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_sequences, length, width)
    scale = torch.exp(spread * torch.randn((num_sequences, 1, 1), generator=generator))
    before = torch.randn(shape, generator=generator) * scale
    after = before + 0.5 * torch.randn(shape, generator=generator) * scale
    return Batch(before, after, torch.ones(shape[:2], dtype=torch.bool))


def collected(criterion, *blocks):
    rows = {need: tuple(observe(need, [block]) for block in blocks) for need in criterion.needs}
    return Collected(num_blocks=len(blocks), rows=rows)


def some(seen, positions):
    rows = {need: tuple(one.resample(positions) for one in per_block) for need, per_block in seen.rows.items()}
    return Collected(num_blocks=seen.num_blocks, rows=rows)


@pytest.mark.parametrize("name", READING)
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    criterion = CRITERIA[name]
    seen = collected(criterion, population(20_000))
    truth = score_blocks(seen, (criterion,))[0].values[0]
    random, held, rounds = np.random.default_rng(1), 0, 500
    for _ in range(rounds):
        drawn = some(seen, random.choice(20_000, size=32, replace=False))
        knife = jackknife(
            lambda chosen, drawn=drawn: np.array(score_blocks(some(drawn, chosen), (criterion,))[0].values), 32
        )
        lower, upper = knife.interval()
        held += bool(lower[0] <= truth <= upper[0])
    assert 0.93 <= held / rounds <= 0.97


def test_the_jackknife_is_the_textbooks():
    random = np.random.default_rng(0)
    values = random.gamma(2.0, size=(20, 3))
    knife = jackknife(lambda chosen: values[chosen].mean(0), 20)
    assert knife.score == pytest.approx(values.mean(0), rel=1e-12)
    # On the logarithm, by the definition; its standard error is that of the mean over the mean, to first order.
    without = np.array([np.log(np.delete(values, row, axis=0).mean(0)) for row in range(20)])
    expected = np.sqrt(19 / 20 * ((without - without.mean(0)) ** 2).sum(0))
    assert knife.stderr == pytest.approx(expected, rel=1e-12)
    assert knife.stderr == pytest.approx(values.std(0, ddof=1) / np.sqrt(20) / values.mean(0), rel=0.05)
    lower, upper = knife.interval(0.9)
    reach = stats.t.ppf(0.95, 19) * expected
    assert lower == pytest.approx(np.exp(np.log(values.mean(0)) - reach), rel=1e-12)
    assert upper == pytest.approx(np.exp(np.log(values.mean(0)) + reach), rel=1e-12)


def test_scores_that_may_be_negative_have_plain_intervals():
    values = np.random.default_rng(0).normal(size=(12, 2))
    knife = jackknife(lambda chosen: values[chosen].mean(0), 12)
    assert not knife.on_log_scale
    # The jackknife of a mean is the standard error of the mean, exactly.
    assert knife.stderr == pytest.approx(values.std(0, ddof=1) / np.sqrt(12), rel=1e-9)
    assert knife.interval()[0] == pytest.approx(values.mean(0) - stats.t.ppf(0.975, 11) * knife.stderr, rel=1e-9)


def test_many_sequences_are_left_out_in_groups():
    values = np.random.default_rng(0).gamma(2.0, size=(1000, 2))
    calls = []
    knife = jackknife(lambda chosen: calls.append(len(chosen)) or values[chosen].mean(0), 1000, max_groups=50)
    assert len(calls) == 51
    assert set(calls) == {980, 1000}
    assert knife.stderr == pytest.approx(values.std(0, ddof=1) / np.sqrt(1000) / values.mean(0), rel=0.25)


def test_draws_scatter_as_the_interval_says_and_together():
    random = np.random.default_rng(0)
    common = random.gamma(9.0, size=(40, 1))
    values = np.hstack([common, 1.01 * common, random.gamma(9.0, size=(40, 1))])
    knife = jackknife(lambda chosen: values[chosen].mean(0), 40)
    drawn = knife.draws(4000, seed=0)
    assert drawn.std(0) == pytest.approx(knife.stderr, rel=0.05)
    # Blocks that move together stay in order, however wide their intervals.
    assert (drawn[:, 1] > drawn[:, 0]).all()
    assert knife.gap(0, 1) > 1e3
    assert abs(knife.gap(0, 2)) < 3


@pytest.mark.parametrize("num", [0, 1, 2])
def test_too_few_sequences_say_nothing(num):
    assert jackknife(lambda chosen: np.ones(2), num) is None


def test_lowest_leaves_the_protected_alone_and_ties_go_by_index():
    values = np.array([0.0, 1.0, 1.0, 1.0, 0.5])
    assert lowest(values, 2, [1, 2, 3, 4]) == (1, 4)
    assert lowest(values, 1, [2, 3]) == (2,)


def test_kendall_of_a_constant_is_zero():
    assert kendall(np.ones(4), np.arange(4.0)) == 0
    assert kendall(np.arange(4.0), np.arange(4.0)[::-1]) == -1


# --- stability ---


def noisy(centres, num_sequences, noise, seed=0):
    """Scores as means of noisy rows around known centres."""
    rows = np.array(centres) + noise * np.random.default_rng(seed).normal(size=(num_sequences, len(centres)))
    return lambda chosen: rows[chosen].mean(0)


def stability(score_of, num, **settings) -> Stability:
    return stability_of("toy", jackknife(score_of, num), score_of, **settings)


def test_a_clear_choice_is_settled():
    found = stability(noisy([1, 2, 3, 4, 5], 16, 0.1), 16, count=2)
    assert found.chosen == (0, 1)
    assert found.settled
    assert found.agreement == pytest.approx(1)
    assert found.inclusion == pytest.approx((1, 1, 0, 0, 0))
    assert found.half_overlap == 1
    assert found.half_kendall == pytest.approx(1)
    assert found.closest == (1, 2)
    assert "settled" in found.describe()


def test_a_choice_between_near_equals_says_how_much_text_would_tell():
    score_of = noisy([1, 2, 2.06, 4], 16, 0.3)
    found = stability(score_of, 16, count=2)
    assert not found.settled
    assert set(found.closest) == {1, 2}
    assert found.agreement < 0.95
    assert found.num_sequences_needed > 16
    assert f"about {found.num_sequences_needed:,} sequences would tell" in found.describe()
    # As much text as it asks for separates the pair, give or take the luck of the draw.
    more = stability(
        noisy([1, 2, 2.06, 4], 4 * found.num_sequences_needed, 0.3), 4 * found.num_sequences_needed, count=2
    )
    assert more.closest_gap > found.closest_gap


def test_a_tie_is_called_one():
    rows = np.random.default_rng(3).normal(size=(10, 3))
    # The last block differs from the first by noise alone, of a mean of exactly zero.
    noise = np.array([1.0, -1.0] * 5)
    tied = np.column_stack([rows[:, 0], rows[:, 1] + 5, rows[:, 2] + 9, rows[:, 0] + noise])
    found = stability(lambda chosen: tied[chosen].mean(0), 10, count=1)
    assert found.num_sequences_needed is None
    assert not found.settled
    assert "tied" in found.describe()


def test_protected_blocks_are_no_part_of_the_question():
    found = stability(noisy([1, 2, 3, 4, 5], 16, 0.1), 16, count=2, protected=(0, 4))
    assert found.chosen == (1, 2)
    assert found.inclusion[0] == found.inclusion[4] == 0


def test_more_sequences_are_needed_for_smaller_gaps():
    assert sequences_needed(2.0, 50) == 50
    assert sequences_needed(1.0, 50) == 200
    assert sequences_needed(0.0, 50) is None
    assert sequences_needed(np.inf, 50) == 1


# --- on scores ---


@pytest.mark.parametrize("name", READING)
def test_scores_get_their_intervals_from_the_same_pass(name):
    criterion = CRITERIA[name]
    seen = collected(criterion, *(population(12, seed=seed, spread=0.1) for seed in range(4)))
    (scores,) = score_blocks(seen, (criterion,))
    sure, found = with_certainty(seen, criterion, scores, count=1)
    assert sure.values == scores.values
    assert all(low < value < high for low, value, high in zip(sure.lower, sure.values, sure.upper, strict=True))
    assert found.criterion == name
    assert found.chosen == tuple(sorted(scores.ranking()[:1]))


def test_criteria_that_read_no_text_have_no_interval():
    seen = Collected(num_blocks=3, rows={})
    (scores,) = score_blocks(seen, (CRITERIA["random"],))
    assert with_certainty(seen, CRITERIA["random"], scores, count=1) == (scores, None)


def test_parts_too_small_for_a_criterion_give_no_interval():
    criterion = CRITERIA["avss-reference"]
    (need,) = criterion.needs
    rows = {"weight": np.ones(4), "variance": np.ones(4), "below": np.array([1.0, 0, 0, 0]), "count": np.full(4, 10.0)}
    seen = Collected(num_blocks=1, rows={need: (Rows(rows),)})
    (scores,) = score_blocks(seen, (criterion,))
    assert with_certainty(seen, criterion, scores, count=1) == (scores, None)


def test_a_jackknife_of_equal_scores_is_certain():
    knife = Jackknife(score=np.ones(2), without=np.ones((5, 2)), num_sequences=5)
    assert list(knife.stderr) == [0, 0]
    assert knife.gap(0, 1) == 0
