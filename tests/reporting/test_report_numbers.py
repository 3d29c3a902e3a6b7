"""Digits: what a reader may rely on, and no more."""

import math
import random

import pytest

from avss.reporting import numbers


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (36.0712, 0.8134, "36.07 ± 0.81"),
        (71418.3, 1204.0, "71,418 ± 1,204"),
        (0.7325, 0.0117, "0.733 ± 0.012"),
        (1.0, 0.0996, "1.00 ± 0.10"),
        (1.2e-7, 3.1e-9, "(1.200 ± 0.031)e-07"),
        (0.5, None, "0.5000"),
        (0.5, math.nan, "0.5000"),
        (0.0, 0.0, "0 ± 0"),
        (math.nan, 0.1, "n/a"),
        (None, None, "n/a"),
        (math.inf, 0.1, "infinite"),
    ],
)
def test_value_and_error_end_at_the_same_digit(value, stderr, text):
    assert numbers.with_error(value, stderr) == text


@pytest.mark.parametrize("seed", range(20))
def test_text_reads_back_to_within_half_of_its_last_digit(seed):
    draw = random.Random(seed)
    value, stderr = draw.uniform(-1, 1) * 10 ** draw.uniform(-2, 6), 10 ** draw.uniform(-3, 3)
    head, tail = numbers.with_error(value, stderr).replace(",", "").split(" ± ")
    # The second digit of the error is worth at most a tenth of it; an integer is exact to a half.
    allowed = max(0.051 * stderr, 0.5) if stderr > 9 else 0.051 * stderr
    assert float(head) == pytest.approx(value, abs=allowed)
    assert float(tail) == pytest.approx(stderr, abs=allowed)


def test_a_ratio_of_thousands_reads_well():
    assert numbers.times(1980.4) == "1,980x"
    assert numbers.times(2.8031) == "2.80x"
    assert numbers.times(math.nan) == "n/a"


def test_sizes_never_show_four_digits_before_the_unit():
    assert numbers.size(999_499) == "999 kB"
    assert numbers.size(999_600) == "1 MB"
    assert numbers.size(None) == "n/a"
    assert numbers.count(999_600_000) == "1 B"


def test_durations_carry_over():
    assert numbers.duration(59.96) == "60 s"
    assert numbers.duration(3599.9) == "1 h 0 min"
