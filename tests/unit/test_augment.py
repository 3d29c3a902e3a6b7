"""Texts in another writing: each change against its plain description, and how often each is made."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from avss.data import augment
from avss.data.augment import rewrite
from avss.data.batches import make_batches
from avss.data.sources import Texts
from tests.support.tokenizers import word_tokenizer

TEXT = "The cat, it said, was 3.5 years old.\n\nA dog (Rex) heard; it ran away!\nNobody knows why"

APART = {
    "every": "The cat , it said , was 3 . 5 years old . \n\nA dog ( Rex ) heard ; it ran away ! \nNobody knows why",
    "penn": "The cat , it said , was 3.5 years old . \n\nA dog ( Rex ) heard ; it ran away ! \nNobody knows why",
    "moses": "The cat , it said , was 3 @.@ 5 years old . \n\nA dog ( Rex ) heard ; it ran away ! \nNobody knows why",
}

WRITTEN = [
    "It's John's; they'll say they don't, can’t and shouldn't've.",
    "On 3.5.2020 1,234,567 well-known half-baked X-rays cost $5 (e.g. in the U.S., p. 3).",
    "  an indented line, then\n\tanother: a-b - c -- d…\n'Tis rock 'n' roll, \"the dogs' own\"!?",
    "日本語。テスト、「引用」です。 Über-Größe: 50%, a_b@example.org/x?y=z#1",
    "",
    "...",
]


class Draws:
    """Gives the four numbers asked for, and then keeps every second word."""

    def __init__(self, case=1.0, marks=1.0, lines=1.0, words=1.0):
        self._numbers = np.array([case, marks, lines, words])

    def random(self, count):
        numbers, self._numbers = self._numbers, None
        return np.arange(count) % 2.0 if numbers is None else numbers


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ({}, TEXT),
        ({"case": 0.0}, TEXT.lower()),
        ({"case": augment.LOWER}, TEXT.upper()),
        ({"case": augment.LOWER + augment.UPPER}, TEXT),
        ({"marks": 0.0}, APART["every"]),
        ({"marks": augment.APART * 0.34}, APART["penn"]),
        ({"marks": augment.APART * 0.99}, APART["moses"]),
        ({"marks": augment.APART}, "".join(char for char in TEXT if char not in ",.();!")),
        ({"lines": 0.0}, " ".join(TEXT.split("\n\n")).replace("\n", " ")),
        ({"words": 0.0}, " ".join(TEXT.split(" ")[1::2])),
        ({"case": 0.0, "lines": 0.0}, TEXT.lower().replace("\n\n", " ").replace("\n", " ")),
    ],
)
def test_each_change_does_what_it_says(draws, expected):
    assert rewrite(TEXT, Draws(**draws)) == expected


@pytest.mark.parametrize("style", augment.STYLES)
@pytest.mark.parametrize("text", WRITTEN)
def test_setting_punctuation_apart_moves_blanks_only(text, style):
    """At signs aside, nothing is added and nothing lost, words stay apart, and no two blanks follow each other."""
    found = augment.apart(text, style)
    bare = found.replace("@", "") if style == "moses" else found
    assert "".join(bare.split()) == "".join(text.replace("@", "" if style == "moses" else "@").split())
    assert not re.search(r"\S  ", found)
    lines = zip(found.split("\n"), text.split("\n"), strict=True)
    assert all(len(line.split()) >= len(before.split()) for line, before in lines)


@pytest.mark.parametrize(
    ("style", "text", "tokens"),
    [
        # As NLTK's NLTKWordTokenizer and sacremoses' MosesTokenizer (aggressive_dash_splits) write these texts.
        ("penn", "It's John's; they'll say they don't.", "It 's John 's ; they 'll say they do n't ."),
        ("penn", "1,234,567 well-known X-rays cost $5 (e.g. in the U.S., 3.5%).",
         "1,234,567 well-known X-rays cost $ 5 ( e.g. in the U.S. , 3.5 % ) ."),
        ("moses", "It's John's; they'll say they don't.", "It 's John 's ; they 'll say they don 't ."),
        ("moses", "On May 3, half-baked X-rays cost $5 (e.g. in the U.S., 50%).",
         "On May 3 , half @-@ baked X @-@ rays cost $ 5 ( e.g. in the U.S. , 50 % ) ."),
        # As WikiText writes numbers (sacremoses leaves them whole).
        ("moses", "1,234 men and 3.5 m", "1 @,@ 234 men and 3 @.@ 5 m"),
    ],
)  # fmt: skip
def test_punctuation_is_set_apart_as_tokenised_corpora_have_it(style, text, tokens):
    assert augment.apart(text, style).split() == tokens.split()


def test_the_shares_are_those_named():
    texts = [rewrite(TEXT, np.random.default_rng(seed)) for seed in range(4000)]
    shares = {
        augment.LOWER: np.mean([text == text.lower() for text in texts]),
        augment.UPPER: np.mean([text == text.upper() for text in texts]),
        augment.APART: np.mean([bool(re.search(r" [,;(] ", text)) for text in texts]),
        augment.WITHOUT: np.mean([not set(text) & set(",.();!") for text in texts]),
        augment.JOINED: np.mean(["\n" not in text for text in texts]),
    }
    for expected, found in shares.items():
        assert found == pytest.approx(expected, abs=0.035)
    full = [text.split() for text in texts if len(re.sub(r"\W", "", text)) == len(re.sub(r"\W", "", TEXT))]
    assert len(full) / len(texts) == pytest.approx(1 - augment.GAPPED, abs=0.06)
    assert np.mean([text == TEXT for text in texts]) == pytest.approx(1 / 7, abs=0.02)


def test_equal_draws_give_equal_texts():
    assert [rewrite(TEXT, np.random.default_rng(7)) for _ in range(3)] == [rewrite(TEXT, np.random.default_rng(7))] * 3


@pytest.mark.parametrize("text", ["", " ", "\n", "…", "日本語。テスト", "a"])
def test_any_text_can_be_rewritten(text):
    for seed in range(50):
        assert isinstance(rewrite(text, np.random.default_rng(seed)), str)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_text_that_would_lose_its_words_stays(layout):
    tokenizer = word_tokenizer(adds="cls")
    ids = torch.tensor(tokenizer(". . ?", add_special_tokens=layout == "padded")["input_ids"])
    rewriting = augment.augmentation(tokenizer, "masked", 1.0, layout)
    assert rewriting is not None
    special = set(tokenizer.all_special_ids)
    for seed in range(60):
        assert set(rewriting(ids, (seed,)).tolist()) - special


@pytest.mark.parametrize("head", ["causal", "masked", "seq2seq", "encoder", "classifier"])
def test_only_models_that_continue_text_are_read_to_by_default(head):
    found = augment.augmentation(word_tokenizer(), head, None, "padded")
    assert (found is not None) == (head == "causal")
    assert augment.augmentation(word_tokenizer(), head, None, "padded", labelled=True) is None
    asked = augment.augmentation(word_tokenizer(), head, 0.25, "padded", labelled=True)
    assert asked is not None
    assert asked.share == 0.25


# --- batches ---


def batches_of(share):
    tokenizer = word_tokenizer(adds="bos")
    texts = Texts(texts=("the cat sees a dog . " * 60,), source="notes.txt", is_prose=True)
    settings = {"layout": "packed", "samples": 20, "seq_len": 12, "batch_size": 3, "seed": 0}
    batches = make_batches(texts, tokenizer, **settings)
    return dataclasses.replace(batches, augmentation=augment.augmentation(tokenizer, "causal", share, "packed"))


def test_batches_are_rewritten_once_and_the_facts_follow():
    batches = batches_of(1.0)
    found = batches.rewritten()
    assert len(found.sequences) == len(batches.sequences)
    assert found.rewritten() is found
    pairs = list(zip(batches.sequences, found.sequences, strict=True))
    assert any(len(new) < len(old) for old, new in pairs)
    assert all(len(new) <= len(old) and new[0] == old[0] for old, new in pairs)
    assert found.facts.num_tokens == sum(len(new) for _, new in pairs) < batches.facts.num_tokens
    assert found.facts.content_hash != batches.facts.content_hash
    again = batches.rewritten()
    assert all(torch.equal(one, two) for one, two in zip(again.sequences, found.sequences, strict=True))


@pytest.mark.parametrize("share", [0.0, 0])
def test_a_share_of_zero_leaves_batches_as_they_are(share):
    batches = batches_of(share)
    assert batches.rewritten() is batches


def test_parts_of_batches_can_still_be_rewritten():
    first, rest = batches_of(1.0).split(8)
    assert first.augmentation is not None
    assert rest.first(96).rewritten().facts.num_tokens < rest.first(96).facts.num_tokens
