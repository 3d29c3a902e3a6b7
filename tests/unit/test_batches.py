"""Texts -> token ids: exact windows, a draw that can be repeated, and padding that is told apart."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avss.data.batches import content_hash, leading_ids, make_batches, need_tokenizer, pad, pad_id_of, windows
from avss.data.sources import Texts
from avss.errors import ConfigError, DataError
from tests.support.tokenizers import VOCABULARY, WORDS, word_tokenizer

PLAIN, WITH_BOS, WITH_CLS = word_tokenizer(), word_tokenizer(adds="bos"), word_tokenizer(adds="cls")
BOS = VOCABULARY["[BOS]"]


def running_text(num_words: int) -> str:
    """Words in an order that repeats late, so that windows differ."""
    nouns = [word for word in WORDS if word.isalpha()]
    return " ".join(nouns[(place * place + place // 7) % len(nouns)] for place in range(num_words))


def prose(num_words: int) -> Texts:
    return Texts(texts=(running_text(num_words),), source="notes.txt", is_prose=True)


def batches_of(texts: Texts, tokenizer=PLAIN, **changes):
    settings = {"layout": "packed", "samples": 8, "seq_len": 10, "batch_size": 3, "seed": 0}
    return make_batches(texts, tokenizer, **(settings | changes))


# --- windows ---


@given(num_words=st.integers(1, 120), seq_len=st.integers(2, 40))
def test_windows_cut_the_text_without_overlap_or_gap(num_words, seq_len):
    text = running_text(num_words)
    ids = PLAIN(text)["input_ids"]
    if num_words < seq_len:
        with pytest.raises(DataError, match=f"has {num_words} tokens and does not fill one window of {seq_len}"):
            windows(PLAIN, text, seq_len)
        return
    found = windows(PLAIN, text, seq_len)
    assert all(len(window) == seq_len for window in found)
    joined = torch.cat(found).tolist()
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < seq_len


def test_windows_begin_with_bos_where_the_tokenizer_adds_one():
    text = running_text(100)
    found = windows(WITH_BOS, text, 10)
    assert all(len(window) == 10 and window[0] == BOS for window in found)
    joined = torch.cat([window[1:] for window in found]).tolist()
    assert joined == PLAIN(text)["input_ids"][: len(joined)]
    assert BOS not in joined


def test_no_bos_where_the_tokenizer_adds_none():
    assert leading_ids(PLAIN) == []
    assert leading_ids(WITH_BOS) == [BOS]
    assert leading_ids(WITH_CLS) == []
    assert BOS not in torch.cat(windows(PLAIN, running_text(100), 10))


def test_a_window_needs_room_for_text():
    with pytest.raises(ConfigError, match="leaves no room"):
        windows(WITH_BOS, running_text(50), 1)


# --- packed ---


def test_packed_batches_are_full():
    batches = batches_of(prose(200))
    pairs = list(batches)
    assert len(batches) == len(pairs) == 3
    assert [tuple(ids.shape) for ids, _ in pairs] == [(3, 10), (3, 10), (2, 10)]
    assert all(keep.all() and keep.dtype == torch.bool and ids.dtype == torch.long for ids, keep in pairs)
    assert (batches.facts.num_sequences, batches.facts.seq_len, batches.facts.num_tokens) == (8, 10, 80)
    assert (batches.facts.layout, batches.facts.source, batches.facts.column) == ("packed", "notes.txt", None)


def test_fewer_windows_than_asked_for_are_all_taken():
    assert len(batches_of(prose(45), samples=100).sequences) == 4


def test_a_short_text_gives_one_window_of_the_length_it_has():
    batches = batches_of(prose(7), seq_len=50)
    assert [len(sequence) for sequence in batches.sequences] == [7]
    assert batches.facts.seq_len == 7


def test_a_short_text_keeps_its_bos():
    (only,) = batches_of(prose(7), WITH_BOS, seq_len=50).sequences
    assert len(only) == 8
    assert only[0] == BOS


@pytest.mark.parametrize("words", [0, 1])
def test_a_text_of_less_than_two_tokens_is_refused(words):
    with pytest.raises(DataError, match=f"has {words} tokens"):
        batches_of(prose(words))


def test_several_texts_are_joined_by_a_blank_line():
    texts = Texts(texts=(running_text(30), running_text(30)), source="a.csv", column="text")
    assert len(batches_of(texts, samples=99).sequences) == 6
    assert batches_of(texts).facts.column == "text"


def test_seq_len_is_lowered_to_what_the_model_takes():
    assert batches_of(prose(200), seq_len=50, max_len=16).facts.seq_len == 16
    assert batches_of(prose(200), seq_len=16, max_len=50).facts.seq_len == 16


# --- the draw ---


def test_the_same_seed_draws_the_same_sequences():
    one, other = batches_of(prose(400)), batches_of(prose(400))
    assert all(torch.equal(a, b) for a, b in zip(one.sequences, other.sequences, strict=True))
    assert one.facts == other.facts


def test_another_seed_draws_others_from_the_same_windows():
    text = prose(400)
    pool = {tuple(window.tolist()) for window in windows(PLAIN, text.texts[0], 10)}
    draws = [[tuple(s.tolist()) for s in batches_of(text, seed=seed).sequences] for seed in range(4)]
    assert len({tuple(draw) for draw in draws}) == 4
    for draw in draws:
        assert set(draw) <= pool


def test_no_sequence_is_drawn_twice():
    texts = Texts(texts=tuple(running_text(n) for n in range(2, 30)), source="a.csv", column="text")
    drawn = batches_of(texts, layout="padded", samples=28, seq_len=99).sequences
    assert sorted(len(sequence) for sequence in drawn) == list(range(2, 30))


def test_more_samples_extend_the_draw():
    few, many = batches_of(prose(400), samples=4), batches_of(prose(400), samples=9)
    assert all(torch.equal(a, b) for a, b in zip(few.sequences, many.sequences[:4], strict=True))


def test_the_hash_follows_the_content_and_not_the_batches():
    base = batches_of(prose(400)).facts.content_hash
    assert batches_of(prose(400), batch_size=1).facts.content_hash == base
    assert batches_of(dataclasses.replace(prose(400), source="other.txt")).facts.content_hash == base
    for other in (
        batches_of(prose(401 + 50)),
        batches_of(prose(400), seed=1),
        batches_of(prose(400), samples=7),
        batches_of(prose(400), seq_len=11),
        batches_of(prose(400), WITH_BOS),
    ):
        assert other.facts.content_hash != base


def test_the_hash_knows_where_a_sequence_ends():
    one, two, three = torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([1, 2])
    assert content_hash([one, two]) != content_hash([three, torch.tensor([3])])
    assert content_hash([one, two]) != content_hash([two, one])
    assert len(content_hash([one])) == 16


# --- padded ---


def test_padded_rows_are_texts_with_their_special_tokens():
    texts = Texts(texts=("the cat", "a dog sees the old bird"), source="a.csv", column="text")
    batches = batches_of(texts, WITH_CLS, layout="padded")
    ((ids, keep),) = batches
    rows = {tuple(row[mask].tolist()) for row, mask in zip(ids, keep, strict=True)}
    assert rows == {tuple(WITH_CLS(text)["input_ids"]) for text in texts.texts}
    assert batches.pad_id == VOCABULARY["[PAD]"]
    assert (ids[~keep] == VOCABULARY["[PAD]"]).all()
    assert batches.facts.num_tokens == int(keep.sum())


def test_padded_rows_are_cut_to_seq_len():
    texts = Texts(texts=(running_text(50), "the cat"), source="a.csv", column="text")
    batches = batches_of(texts, WITH_CLS, layout="padded", seq_len=12)
    assert max(len(sequence) for sequence in batches.sequences) == 12
    assert any(sequence[-1] == VOCABULARY["[SEP]"] and len(sequence) == 12 for sequence in batches.sequences)


def test_padded_prose_is_one_row_a_paragraph():
    texts = Texts(texts=("the cat sees .\n\na dog .",), source="a.txt", is_prose=True)
    assert len(batches_of(texts, layout="padded").sequences) == 2


def test_texts_without_two_tokens_give_no_row_and_no_crash():
    texts = Texts(texts=("cat", "dog"), source="a.csv", column="text")
    with pytest.raises(DataError):
        batches_of(texts, layout="padded")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_padding_is_on_the_right_and_told_apart(lengths):
    sequences = [torch.arange(1, length + 1) for length in lengths]
    ids, keep = pad(sequences, 77)
    assert ids.shape == keep.shape == (len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        assert ids[row].tolist() == [*range(1, length + 1), *[77] * (max(lengths) - length)]
        assert keep[row].tolist() == [True] * length + [False] * (max(lengths) - length)


def test_a_tokenizer_without_padding_pads_with_its_end():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    assert pad_id_of(tokenizer) == VOCABULARY["[EOS]"]
    tokenizer.eos_token = None
    assert pad_id_of(tokenizer) == 0


# --- errors ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "`--samples 0` must be at least 1"),
        ({"batch_size": 0}, "`--batch-size 0` must be at least 1"),
        ({"seq_len": 1}, "`--seq-len 1` must be at least 2"),
    ],
)
def test_wrong_counts_are_config_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        batches_of(prose(100), **changes)


@pytest.mark.parametrize(("num_tokens", "count"), [(None, 8), (1, 1), (29, 2), (30, 3), (79, 7), (80, 8), (500, 8)])
def test_the_first_sequences_hold_so_many_tokens_at_most(num_tokens, count):
    batches = batches_of(prose(100))
    first = batches.first(num_tokens)
    assert len(first.sequences) == first.facts.num_sequences == count
    assert all(torch.equal(*pair) for pair in zip(first.sequences, batches.sequences, strict=False))
    assert first.facts.num_tokens == 10 * count
    assert first.facts.content_hash == content_hash(first.sequences)


def test_a_missing_tokenizer_is_a_data_error():
    assert need_tokenizer(PLAIN, "tiny") is PLAIN
    with pytest.raises(DataError, match="`tiny` has no tokenizer"):
        need_tokenizer(None, "tiny")


def test_without_a_token_to_fill_them_up_batches_hold_one_sequence():
    batches = batches_of(prose(200))
    alone = batches.padded_with(None)
    assert (alone.batch_size, alone.facts.batch_size, len(alone)) == (1, 1, 8)
    assert alone.in_batches_of(5).batch_size == 1
    assert all(torch.equal(ids[0], one) for (ids, _), one in zip(alone, alone.sequences, strict=True))
    assert batches.padded_with(7).batch_size == batches.batch_size


@pytest.mark.parametrize("least", [1, 2, 3])
def test_a_text_is_tokenised_once_however_short(least):
    calls = []

    class Counting:
        bos_token_id = None

        def __call__(self, text, **settings):
            calls.append(text)
            return PLAIN(text, **settings)

    found = windows(Counting(), running_text(20), 50, least=least)
    assert [len(window) for window in found] == [20 // least] * (20 // (20 // least))
    assert [text for text in calls if text != "a"] == [running_text(20)]
