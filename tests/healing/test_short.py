"""Steps of short windows: what they read, how many there are, and that nothing else of healing notices."""

import dataclasses
import itertools

import pytest
import torch

import avss.data.short as short_room
from avss.data.sources import Texts
from avss.errors import ConfigError
from avss.healing import heal
from avss.healing.text import prepare_text
from tests.support.oracles import largest_difference, run

SHORT = 8


@pytest.fixture(autouse=True)
def _eight_tokens(monkeypatch):
    monkeypatch.setattr(short_room, "SHORT", SHORT)


def is_short(drawn) -> bool:
    kinds = {draw.piece is not None for draw in drawn}
    assert len(kinds) == 1
    return kinds.pop()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.7, 1.0])
def test_the_share_of_short_steps_is_the_one_asked_for_at_any_length(patient, text, small, share):
    prepared = prepare_text(patient().smaller, text, small(seq_len=32, short=share))
    kinds = [is_short(prepared.step(number)) for number in range(40)]
    for count in range(1, 41):
        assert abs(sum(kinds[:count]) - share * count) < 1
    # The other steps read what they would have read without.
    plain = prepare_text(patient().smaller, text, small(seq_len=32, short=0.0))
    long = [prepared.step(number) for number in range(40) if not kinds[number]]
    assert long == [plain.step(number) for number in range(len(long))]


def test_the_pieces_of_an_epoch_are_the_whole_text_in_another_order(patient, text, small):
    prepared = prepare_text(patient().smaller, text, small(seq_len=29, short=1.0, augment=0.0))
    assert prepared.num_leading == 1
    bos = int(prepared.train[0][0])
    drawn = list(itertools.chain.from_iterable(prepared.step(number) for number in range(40)))
    pieces = 28 // (SHORT - 1)
    assert pieces == 4
    size = pieces * len(prepared.train)
    for epoch in (0, 1):
        part = drawn[epoch * size : (epoch + 1) * size]
        assert {draw.epoch for draw in part} == {epoch}
        assert sorted((draw.index, draw.piece) for draw in part) == [
            (index, piece) for index in range(len(prepared.train)) for piece in range(pieces)
        ]
    assert drawn[:size] != [dataclasses.replace(draw, epoch=0) for draw in drawn[size : 2 * size]]
    batch = prepared.batch(drawn[:size])
    assert batch.inputs.shape == (size, SHORT)
    assert set(batch.inputs[:, 0].tolist()) == {bos}
    rows = {(draw.index, draw.piece): row for draw, row in zip(drawn[:size], batch.inputs.tolist(), strict=True)}
    for index, sequence in enumerate(prepared.train):
        joined = [token for piece in range(pieces) for token in rows[index, piece][1:]]
        assert [bos, *joined] == sequence.tolist()


def test_a_short_step_has_as_many_tokens_from_more_places(patient, text, small):
    prepared = prepare_text(patient().smaller, text, small(seq_len=32, short=0.5, batch_size=2))
    long, short = (prepared.batch(prepared.step(number)) for number in (0, 1))
    assert long.inputs.shape == (2, 32)
    assert short.inputs.shape == (8, SHORT)
    assert short.num_tokens == long.num_tokens
    assert len({draw.index for draw in prepared.step(1)}) > 2


def test_short_windows_are_rewritten_and_made_prompts_too(patient, text, small):
    one = patient()
    form = "the cat {text} a dog {sees|runs}"
    prepared = prepare_text(one.smaller, text, small(seq_len=32, short=1.0, augment=1.0, forms=(form,)))
    plain = prepare_text(one.smaller, text, small(seq_len=32, short=1.0))
    kinds = set()
    for number in range(12):
        drawn = prepared.step(number)
        assert drawn == plain.step(number)
        batch, other = prepared.batch(drawn), plain.batch(drawn)
        assert batch.inputs.shape[1] <= SHORT
        for row in range(len(drawn)):
            real = batch.inputs[row][batch.keep[row]].tolist()
            same = real == other.inputs[row][other.keep[row]].tolist()
            is_prompt = bool((batch.words[row] == -100).all())
            kinds.add("prompt" if is_prompt else "same" if same else "rewritten")
        again = prepared.batch(drawn)
        assert torch.equal(again.inputs, batch.inputs)
    assert {"prompt", "rewritten"} <= kinds


@pytest.mark.parametrize(
    ("name", "seq_len", "share"),
    [("llama", 32, 0.5), ("gpt2", 16, 0.5), ("llama", 15, 0.0), ("bert-masked", 32, 0.0), ("bert", 32, 0.0)],
)
def test_only_models_that_continue_long_enough_text_read_short_windows(patient, text, small, name, seq_len, share):
    one = patient(name)
    assert prepare_text(one.smaller, text, small(seq_len=seq_len)).short == share
    _, healing, _ = heal(one.dense, one.smaller, one.plan, text, small(seq_len=seq_len))
    assert healing.settings["short"] == share


def test_rows_with_labels_are_not_cut_to_pieces(patient, text, small):
    rows = Texts(texts=tuple(text.paragraphs()), source="rows.csv")
    labels = [0, 1] * (len(rows.texts) // 2)
    one = patient("distilbert-classifier").smaller
    assert prepare_text(one, rows, small(), labels=labels).short == 0
    with pytest.raises(ConfigError, match="rows, as the head `classifier` reads"):
        prepare_text(one, rows, small(short=1.0), labels=labels)


def test_parts_of_a_short_step_give_the_result_of_the_whole(patient, text, small):
    """`micro_batch_size` counts sequences: in short windows, as many tokens."""
    one = patient()
    settings = {"seq_len": 32, "short": 0.5, "batch_size": 4, "budget": "1k", "augment": 0.5}
    plain, story, _ = heal(one.dense, one.smaller, one.plan, text, small(**settings))
    parts, other, _ = heal(one.dense, one.smaller, one.plan, text, small(**settings, micro_batch_size=1))
    assert story.num_tokens == other.num_tokens
    token_ids = torch.arange(5, 17)[None]
    assert largest_difference(run(plain.model, token_ids), run(parts.model, token_ids)) < 1e-3
    assert largest_difference(run(plain.model, token_ids), run(one.smaller.model, token_ids)) > 1e-3
