"""Prompts that a model fills itself: what it is shown, what is taken of what it writes, and what stays as it was."""

import dataclasses
import itertools

import pytest
import torch

from avss.errors import ConfigError
from avss.forms import DOTS, Form, is_fit
from avss.models import writing
from avss.models.writing import can_write, write_rows

FORMS = ("the cat {text} a dog {sees|runs}", "a cat {text} the dog {text}")


@pytest.fixture
def loaded(patient):
    return patient().dense


def test_a_model_fills_every_form_with_fit_sentences(loaded):
    rows = write_rows(loaded, dict.fromkeys(FORMS, 70), seed=0)
    assert set(rows) == set(FORMS)
    for form, found in rows.items():
        assert 0 < len(found) <= 70
        assert len(set(found)) == len(found)
        for row in found:
            assert len(row) == Form.parse(form).num_sentences
            assert is_fit(row[0])
            assert all(is_fit(sentence, least=1) and "\n" not in sentence for sentence in row)


def test_what_is_written_is_a_function_of_the_seed_and_draws_nothing_from_others(loaded):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = write_rows(loaded, dict.fromkeys(FORMS, 5), seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert first == write_rows(loaded, dict.fromkeys(FORMS, 5), seed=1)
    assert first != write_rows(loaded, dict.fromkeys(FORMS, 5), seed=2)


def test_the_form_is_shown_and_continued_sentence_by_sentence(loaded, monkeypatch):
    shown = []

    def lines(_, texts):
        shown.append(list(texts))
        return [f"sentence number {len(shown)} of it" for _ in texts]

    monkeypatch.setattr(writing, "_lines", lines)
    rows = write_rows(loaded, dict.fromkeys(FORMS, 2), seed=0)
    assert rows == {
        FORMS[0]: (("sentence number 1 of it",),),
        FORMS[1]: (("sentence number 2 of it", "sentence number 3 of it"),),
    }
    assert set(shown[0]) <= {f"the cat {DOTS} a dog {word}\n\nthe cat" for word in ("sees", "runs")}
    assert shown[1] == [f"a cat {DOTS} the dog {DOTS}\n\na cat"] * 2
    assert shown[2] == [f"a cat {DOTS} the dog {DOTS}\n\na cat sentence number 2 of it the dog"] * 2


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (("a fit sentence", "yes"), True),
        (("too short", "a fit sentence"), False),
        (("a fit sentence", ""), False),
        (("a fit sentence", "42"), False),
        (("a fit sentence", DOTS), False),
        (("a fit sentence", "word " * 46), False),
    ],
)
def test_a_second_sentence_may_be_one_word_and_a_first_one_may_not(loaded, monkeypatch, written, kept):
    turns = itertools.cycle(written)
    monkeypatch.setattr(writing, "_lines", lambda _, texts: [next(turns)] * len(texts))
    assert bool(write_rows(loaded, {FORMS[1]: 1}, seed=0)) == kept


def test_few_prompts_are_tried_as_often_as_many(loaded, monkeypatch):
    turns = iter(["a fit sentence", "no", "another fit sentence", "no"])
    monkeypatch.setattr(writing, "_lines", lambda _, texts: [next(turns) for _ in texts])
    assert write_rows(loaded, {FORMS[0]: 2}, seed=0) == {FORMS[0]: (("a fit sentence",), ("another fit sentence",))}


def test_writing_ends_when_time_is_over_or_nothing_fit_comes(loaded, monkeypatch):
    calls = []
    monkeypatch.setattr(writing, "_lines", lambda _, texts: calls.append(texts) or ["a fit sentence"] * len(texts))
    assert set(write_rows(loaded, dict.fromkeys(FORMS, 1000), seed=0, may_go_on=lambda: False)) == set(FORMS)
    assert len(calls) == 3  # a batch of each form
    monkeypatch.setattr(writing, "_lines", lambda _, texts: calls.append(texts) or [DOTS] * len(texts))
    assert write_rows(loaded, dict.fromkeys(FORMS[:1], 64), seed=0) == {}
    assert len(calls) == 3 + 4


def test_the_tokenizer_is_left_as_it_was(loaded):
    loaded.tokenizer.pad_token = None
    side = loaded.tokenizer.padding_side
    write_rows(loaded, dict.fromkeys(FORMS[1:], 2), seed=0)
    assert loaded.tokenizer.padding_side == side
    assert loaded.tokenizer.pad_token is None


def test_who_can_write(loaded, patient):
    assert can_write(loaded)
    assert not can_write(patient("bert-masked").dense)
    assert not can_write(dataclasses.replace(loaded, tokenizer=None))


def test_what_is_no_form_is_refused(loaded):
    with pytest.raises(ConfigError):
        write_rows(loaded, dict.fromkeys(["no room"], 2), seed=0)
