"""Budgets of time and tokens, as people write them."""

import pytest

from avss.config import Budget, HealConfig, build
from avss.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds", "tokens"),
    [
        ("30m", 1800, None),
        ("30 min", 1800, None),
        ("1.5h", 5400, None),
        ("1h30m", 5400, None),
        ("1 hour 30 minutes", 5400, None),
        ("90s", 90, None),
        ("2M", None, 2_000_000),
        ("2.5M tokens", None, 2_500_000),
        ("500k", None, 500_000),
        ("500K tokens", None, 500_000),
        ("1B", None, 10**9),
        ("250_000 tokens", None, 250_000),
        ("1 token", None, 1),
        ("30m, 2M", 1800, 2_000_000),
        ("2M,30m", 1800, 2_000_000),
    ],
)
def test_what_is_understood(text, seconds, tokens):
    assert Budget.parse(text) == Budget(seconds=seconds, tokens=tokens)


@pytest.mark.parametrize(
    "text", ["", "30", "m", "-5m", "2m tokens", "2G", "ten minutes", "30m,", "1h 2M", "1m1h", "nan"]
)
def test_what_is_refused(text):
    with pytest.raises(ConfigError, match="neither a time nor a number of tokens"):
        Budget.parse(text)


def test_minutes_of_tokens_are_asked_back():
    with pytest.raises(ConfigError, match="`m` is minutes; millions are `M`"):
        Budget.parse("2m tokens")


@pytest.mark.parametrize("text", ["30m,1h", "2M,500k"])
def test_the_same_twice(text):
    with pytest.raises(ConfigError, match="has two"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0m", "0 tokens", "0k"])
def test_nothing_is_no_budget(text):
    with pytest.raises(ConfigError, match="greater than"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("30m", "30 minutes"),
        ("90s", "1 minute 30 seconds"),
        ("1h", "1 hour"),
        ("2M", "2,000,000 tokens"),
        ("30m,500k", "30 minutes or 500,000 tokens"),
    ],
)
def test_in_words(text, words):
    assert str(Budget.parse(text)) == words


def test_settings_take_words_and_give_back_what_they_took():
    config = build(HealConfig, {"budget": "30m,2M"})
    assert config.budget == Budget(seconds=1800, tokens=2_000_000)
    assert HealConfig.model_validate(config.model_dump(mode="json")) == config


def test_an_empty_budget_is_refused():
    with pytest.raises(ConfigError, match="a time or a number of tokens"):
        build(HealConfig, {"budget": {}})


def test_a_wrong_budget_in_settings_is_one_clear_sentence():
    with pytest.raises(ConfigError, match="`fast` is neither a time"):
        build(HealConfig, {"budget": "fast"})
