"""Retention against the bootstrap and closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avss.config import TaskConfig
from avss.errors import ConfigError
from avss.evaluation import TASKS, TaskResult, retention
from avss.evaluation.base import data_source, draw, measure, short_source, standard_error, task_name
from avss.record import Measurement

TASK = TaskConfig(kind="choice", name="quiz")


def accuracies(correct, chance=0.25, predictions=None):
    correct = np.asarray(correct, dtype=float)
    return TaskResult(
        measurements=(measure(TASK, "accuracy", correct, higher_is_better=True, chance=chance),),
        samples={"accuracy": correct},
        predictions={} if predictions is None else {"accuracy": np.asarray(predictions)},
    )


def losses(values):
    values = np.asarray(values, dtype=float)
    loss = measure(TASK, "loss", values, higher_is_better=False, unit="nats")
    perplexity = loss.model_copy(update={"metric": "perplexity", "value": math.exp(loss.value), "unit": ""})
    return TaskResult(measurements=(perplexity, loss), samples={"loss": values})


def paired_answers(num=400, seed=0):
    """Answers of two models that mostly agree."""
    random = np.random.default_rng(seed)
    dense = random.random(num) < 0.7
    changed = random.random(num) < 0.15
    return dense.astype(float), np.where(changed, random.random(num) < 0.3, dense).astype(float)


def bootstrap(statistic, *arrays, times=4000):
    random = np.random.default_rng(1)
    num = len(arrays[0])
    return np.std([statistic(*(a[rows] for a in arrays)) for rows in random.integers(num, size=(times, num))])


def test_ratio_and_error_match_the_bootstrap():
    x, y = paired_answers()
    entry = retention(accuracies(x), accuracies(y))[0]
    assert entry.ratio == y.mean() / x.mean() == entry.kept
    assert entry.ratio_stderr == pytest.approx(bootstrap(lambda a, b: b.mean() / a.mean(), x, y), rel=0.05)
    apart = entry.ratio * math.hypot(x.std() / x.mean(), y.std() / y.mean()) / math.sqrt(len(x))
    assert entry.ratio_stderr < 0.7 * apart  # pairing is what makes it this small


def test_chance_correction_matches_closed_form_and_bootstrap():
    x, y = paired_answers()
    entry = retention(accuracies(x, chance=0.25), accuracies(y, chance=0.25))[0]
    assert entry.chance_corrected == pytest.approx((y.mean() - 0.25) / (x.mean() - 0.25), rel=1e-12)
    expected = bootstrap(lambda a, b: (b.mean() - 0.25) / (a.mean() - 0.25), x, y)
    assert entry.chance_corrected_stderr == pytest.approx(expected, rel=0.05)


def test_perplexity_ratio_matches_the_bootstrap():
    random = np.random.default_rng(3)
    x = random.normal(3, 0.5, size=300)
    y = x + random.normal(0.4, 0.1, size=300)
    perplexity, loss = retention(losses(x), losses(y))
    assert perplexity.ratio == pytest.approx(math.exp(y.mean() - x.mean()))
    assert perplexity.ratio == pytest.approx(perplexity.value / perplexity.dense)
    expected = bootstrap(lambda a, b: math.exp(b.mean() - a.mean()), x, y)
    assert perplexity.ratio_stderr == pytest.approx(expected, rel=0.05)
    assert loss.ratio == pytest.approx(y.mean() / x.mean())
    assert loss.ratio_stderr == pytest.approx(bootstrap(lambda a, b: b.mean() / a.mean(), x, y), rel=0.05)
    assert loss.kept == perplexity.kept == pytest.approx(x.mean() / y.mean())
    assert loss.chance_corrected is loss.flips is perplexity.flips is None


def test_no_chance_correction_where_the_dense_model_only_guesses():
    x = np.array([1.0] * 30 + [0.0] * 70)  # 0.30 with a standard error of 0.046
    entry = retention(accuracies(x, chance=0.25), accuracies(x, chance=0.25))[0]
    assert entry.chance_corrected is entry.chance_corrected_stderr is None
    assert retention(accuracies(x, chance=0.20), accuracies(x, chance=0.20))[0].chance_corrected == 1


def test_flips_count_changed_answers_even_if_both_are_wrong():
    entry = retention(
        accuracies([1, 0, 0, 1], predictions=[0, 1, 2, 3]), accuracies([1, 0, 0, 0], predictions=[0, 2, 2, 1])
    )
    assert entry[0].flips == 0.5
    assert retention(accuracies([1, 0]), accuracies([1, 0]))[0].flips is None


def test_speed_has_no_items_and_separate_errors():
    def timed(value, stderr):
        facts = {"task": "speed", "metric": "latency_ms", "num_samples": 5, "higher_is_better": False, "unit": "ms"}
        return TaskResult((Measurement(value=value, stderr=stderr, **facts),))

    entry = retention(timed(10.0, 0.3), timed(8.0, 0.4))[0]
    assert entry.ratio == 0.8
    assert entry.ratio_stderr == pytest.approx(0.8 * math.sqrt(0.03**2 + 0.05**2))
    assert entry.kept is None
    assert retention(timed(10.0, None), timed(8.0, 0.4))[0].ratio_stderr is None


def test_corners():
    nothing_right = retention(accuracies([0, 0, 0]), accuracies([1, 0, 0]))[0]
    assert math.isnan(nothing_right.ratio)
    assert nothing_right.ratio_stderr is None
    single = retention(accuracies([1]), accuracies([0]))[0]
    assert (single.ratio, single.ratio_stderr, single.chance_corrected) == (0, None, None)
    with pytest.raises(ValueError, match="rests on 2 items for one model and 3 for the other"):
        retention(accuracies([1, 0]), accuracies([1, 0, 1]))
    ruined = retention(losses([3.0, 3.0]), losses([math.nan, 4.0]))
    assert all(math.isnan(entry.ratio) for entry in ruined)


def test_comparisons_with_the_dense_model_are_left_out():
    x = np.array([1.0, 0.5])
    cosine = TaskResult((measure(TASK, "cosine", x, higher_is_better=True),), {"cosine": x})
    assert retention(cosine, cosine) == ()


# --- what the tasks share ---


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_error_of_an_accuracy_is_the_binomial_one(answers):
    p, num = sum(answers) / len(answers), len(answers)
    expected = math.sqrt(p * (1 - p) / (num - 1))
    assert standard_error(np.array(answers, dtype=float)) == pytest.approx(expected, abs=1e-12)


def test_one_item_has_no_standard_error():
    assert standard_error(np.array([1.0])) is None


@given(st.integers(1, 200), st.one_of(st.none(), st.integers(1, 250)), st.integers(0, 5))
def test_a_draw_is_seeded_in_order_and_without_repeats(num, limit, seed):
    chosen = draw(num, limit, seed)
    assert chosen == sorted(set(chosen)) == draw(num, limit, seed)
    assert len(chosen) == min(num, limit or num)
    assert set(chosen) <= set(range(num))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kind": "choice"}, "choice"),
        ({"kind": "choice", "data": "builtin:choice"}, "choice"),
        ({"kind": "perplexity", "data": "builtin:calibration"}, "perplexity:calibration"),
        ({"kind": "choice", "data": "somewhere/piqa.jsonl"}, "choice:piqa"),
        ({"kind": "classification", "data": "sst2/validation.csv#sentence"}, "classification:validation"),
        ({"kind": "perplexity", "data": "Salesforce/wikitext:wikitext-2-raw-v1@test#text"}, "perplexity:wikitext"),
        ({"kind": "speed"}, "speed"),
        ({"kind": "choice", "name": "my quiz"}, "my quiz"),
    ],
)
def test_tasks_are_named_by_kind_and_data(settings, name):
    assert task_name(TaskConfig(**settings)) == name


def test_a_path_is_recorded_by_its_last_part(tmp_path):
    path = tmp_path / "my.notes.txt"
    path.write_text("x")
    task = TaskConfig(kind="perplexity", data=str(path))
    assert (short_source(task), task_name(task)) == ("my.notes.txt", "perplexity:my.notes")
    assert data_source(task) == str(path)


def test_each_kind_has_a_runner():
    for kind in TASKS:
        assert TaskConfig.parse(kind).kind == kind
    with pytest.raises(ConfigError):
        TaskConfig.parse("generation")


def test_a_metric_that_was_not_measured_is_named():
    with pytest.raises(KeyError, match=r"`loss` was not measured. Measured: accuracy"):
        accuracies([1, 0])["loss"]
