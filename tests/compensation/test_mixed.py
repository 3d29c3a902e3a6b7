"""Text of windows and of short ones: where the short ones come from, and that a repair reads both."""

import dataclasses

import pytest
import torch

from avss.compensation import compensate
from avss.compensation.least_squares import refit
from avss.compensation.rounds import _aim, _shares, targets
from avss.compensation.streams import Mixed, num_tokens, split
from avss.compensation.workpiece import Workpiece
from avss.cut import cut
from avss.data import short
from avss.data.batches import interleave
from avss.data.short import can_divide, shortened
from avss.models.load import adopt
from avss.models.projections import find_projections
from tests.compensation.conftest import random_text, without
from tests.support.architectures import stored

SHORT = 8
LEAD = 2


@pytest.fixture(autouse=True)
def _eight_tokens(monkeypatch):
    monkeypatch.setattr(short, "SHORT", SHORT)


def windows(count: int, *, others: int = 0, length: int = 26, source: int = 0):
    """Windows whose every token says where it stands: no two are alike, but for the first two of each."""

    def one(number: int) -> torch.Tensor:
        body = torch.arange(length - LEAD) + 1_000 * (number + 1) + 1_000_000 * source
        return torch.cat([torch.tensor([1, 2]), body])

    text = random_text(count, length, ragged=False).with_sequences([one(number) for number in range(count)])
    return dataclasses.replace(text, others=tuple(one(number) for number in range(count, count + others)))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("others", [0, 5, 64])
def test_short_windows_are_as_many_tokens_of_other_places(share, others):
    text = windows(8, others=others)
    parts = shortened(text, share, LEAD)
    num_short = {0.0: 0, 0.01: 1, 0.25: 2, 0.5: 4, 1.0: 8}[share]
    assert [len(part.sequences[0]) for part in parts] == [26] * (num_short < 8) + [SHORT] * (num_short > 0)
    # Four bodies of six tokens in a window of two and twenty-four.
    assert sum(len(one) - LEAD for part in parts for one in part.sequences) == 8 * 24
    known = {tuple(one.tolist()) for one in text.sequences}
    for part in parts[:-1] if num_short else parts:
        assert part.batch_size == text.batch_size
        assert all(tuple(one.tolist()) in known for one in part.sequences)
    if not num_short:
        return
    brief = parts[-1]
    assert brief.batch_size == 4 * text.batch_size
    assert brief.facts.num_tokens == SHORT * 4 * num_short
    pool = {tuple(one[place : place + 6].tolist()) for one in (*text.sequences[8 - num_short :], *text.others)
            for place in range(LEAD, 26, 6)}  # fmt: skip
    found = [tuple(one[LEAD:].tolist()) for one in brief.sequences]
    assert len(set(found)) == len(found)
    assert set(found) <= pool
    assert all(one[:LEAD].tolist() == [1, 2] for one in brief.sequences)
    windows_read = {one[0] // 1_000 for one in found}
    assert len(windows_read) >= min(num_short + others, 3 * num_short) // 2
    # In an order of its own, the same every time.
    again = shortened(text, share, LEAD)[-1]
    assert all(torch.equal(one, two) for one, two in zip(brief.sequences, again.sequences, strict=True))
    assert found != sorted(found)


def test_no_short_window_is_of_what_chooses_or_judges():
    text = windows(24, others=16)
    first, *rest = split(text)
    held = {int(token) for part in rest for one in part.sequences for token in one[LEAD:]}
    for part in shortened(first, 0.5, LEAD):
        assert held.isdisjoint(int(token) for one in part.sequences for token in one[LEAD:])


def test_several_texts_are_all_read_in_short_windows():
    text = interleave([windows(6, others=20), windows(6, others=20, source=1)])
    brief = shortened(text, 0.5, LEAD)[-1]
    assert {int(one[-1]) // 1_000_000 for one in brief.sequences} == {0, 1}


def test_what_can_be_divided():
    assert can_divide(16, 0, 0)
    assert not can_divide(15, 0, 0)
    assert not can_divide(16, SHORT // 2, 0)  # the lead would be half of it
    assert not can_divide(512, 0, None)  # nothing fills up a batch


def test_mixed_text_is_all_its_parts():
    one, two = random_text(6, 16, ragged=False), random_text(4, 12, ragged=False, batch_size=2)
    mixed = Mixed((one, two))
    assert num_tokens(mixed) == 6 * 16 + 4 * 12
    assert len(mixed) == len(list(mixed)) == 2 + 2
    assert [len(sequence) for sequence in mixed.sequences] == mixed.lengths() == [16] * 6 + [12] * 4


def work_on() -> Workpiece:
    loaded = adopt(stored("llama"))
    plan = without(len(loaded.stack), 2)
    smaller = cut(loaded, plan)
    return Workpiece.begin(loaded, smaller, plan, find_projections(smaller))


def weights(work: Workpiece) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in work.smaller.model.named_parameters()}


def test_what_is_solved_for_is_the_same_in_one_text_or_two():
    whole = random_text(16, ragged=False)
    parts = Mixed((whole.with_sequences(whole.sequences[:4]), whole.with_sequences(whole.sequences[4:])))
    solved = []
    for fit in (whole, parts):
        work = work_on()
        refit(work, (2, 3), fit, random_text(4))
        solved.append(weights(work))
    for name, value in solved[0].items():
        torch.testing.assert_close(solved[1][name], value, rtol=1e-5, atol=1e-6)


def test_a_round_reads_of_each_kind_as_much():
    one, two = random_text(12, 16, ragged=False), random_text(24, 8, ragged=False, batch_size=8)
    shares = [share.parts for share in _shares(Mixed((one, two)), 3) if isinstance(share, Mixed)]
    assert [[len(part.sequences) for part in parts] for parts in shares] == [[4, 8]] * 3
    for place, part in enumerate((one, two)):
        dealt = [sequence for parts in shares for sequence in parts[place].sequences]
        assert all(torch.equal(a, b) for a, b in zip(dealt, part.sequences, strict=True))


def test_the_direction_of_a_round_is_that_of_all_its_text():
    whole = random_text(8, ragged=False, batch_size=4)
    parts = Mixed((whole.with_sequences(whole.sequences[:4]), whole.with_sequences(whole.sequences[4:])))
    work = work_on()
    aims = [_aim(work, targets(work), text) for text in (whole, parts)]
    assert aims[0].divergence == pytest.approx(aims[1].divergence, rel=1e-6)
    for key, direction in aims[0].directions.items():
        torch.testing.assert_close(aims[1].directions[key].matrix, direction.matrix)


def test_a_repair_is_fitted_to_what_it_is_given_and_judged_on_the_rest_of_the_text():
    work = work_on()
    loaded, smaller, plan = work.original, work.smaller, work.plan
    text = random_text(24, ragged=False)
    first, *_ = split(text)
    fitted = shortened(dataclasses.replace(first, others=random_text(40, 16, ragged=False).sequences[24:]), 0.5, 0)
    repaired, story = compensate(loaded, smaller, plan, text, fitted=fitted)
    plain, usual = compensate(loaded, smaller, plan, text)
    assert story.fit_tokens == usual.fit_tokens == 18 * 16
    assert (story.before, story.judge_tokens) == (usual.before, usual.judge_tokens)
    assert story.after < story.before
    changed = dict(repaired.model.named_parameters())
    assert any(not torch.equal(changed[name], value) for name, value in plain.model.named_parameters())
    # A first part given as it is gives what it gives by itself.
    again, same = compensate(loaded, smaller, plan, text, fitted=(first,))
    assert same == usual
    for name, value in plain.model.named_parameters():
        assert torch.equal(dict(again.model.named_parameters())[name], value)
