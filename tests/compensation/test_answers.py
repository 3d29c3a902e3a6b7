"""The last solve: what it reads, what it solves, what it leaves alone, and when it is undone."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from avss.compensation import ChoiceYardstick, Workpiece, answers, compensate, evenly, settle_answers
from avss.compensation.answers import GAMMA, RIDGES
from avss.compensation.divergence import Yardstick
from avss.cut import cut
from avss.data.augment import Augmentation
from avss.models.load import Loaded, adopt
from avss.models.projections import find_projections, matrix_of
from tests.compensation.conftest import random_text, without
from tests.support.architectures import ARCHITECTURES
from tests.support.oracles import run
from tests.support.tokenizers import WORDS, word_tokenizer

FORM = "the cat {text} a dog {sees|likes}"
NAMES = ["llama", "llama-tied", "gpt2", "gemma2"]
TEXT = random_text(16, 24, ragged=False)


@pytest.fixture
def ready():
    """A cut to work on, prompts, and what measures running text."""

    def make(name="llama", count=160, share=0.0):
        dense = adopt(ARCHITECTURES[name](), word_tokenizer())
        plan = without(len(dense.stack), 2)
        smaller = cut(dense, plan)
        work = Workpiece.begin(dense, smaller, plan, find_projections(smaller))
        draw = np.random.default_rng(0)
        rows = {FORM: [(" ".join(draw.choice(WORDS, size=5)),) for _ in range(count)]}
        prompts = Augmentation(dense.tokenizer, share, "packed", [FORM], rows=rows).asked((0,))
        return (
            work,
            prompts,
            TEXT.sequences[:12],
            Yardstick(dense, dataclasses.replace(TEXT, sequences=TEXT.sequences[12:]), 0),
        )

    return make


def choices(loaded, prompts):
    """Log-probabilities of the answers alone, one prompt at a time through the whole model."""
    found = []
    for one in prompts:
        logits = run(loaded.model, one.token_ids[None])[0, -1].double()[list(one.words)]
        found.append(logits.log_softmax(-1))
    return torch.stack(found)


def divergence(dense, model, prompts):
    p, q = choices(dense, prompts), choices(model, prompts)
    return float((p.exp() * (p - q)).sum(-1).mean())


def weights_of(loaded):
    return {key: value.clone() for key, value in loaded.model.state_dict().items()}


def changed(loaded, before):
    return {key for key, value in loaded.model.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize("name", NAMES)
def test_choices_come_nearer_on_prompts_held_out_and_only_the_last_map_changes(ready, name):
    work, prompts, text, measure = ready(name)
    held_out = [one for one in prompts if one.row % 4 == 0]
    before, original = weights_of(work.smaller), weights_of(work.original)
    raw = divergence(work.original, work.smaller, held_out)
    found = settle_answers(work, prompts, text, measure)
    assert found is not None
    assert found.num_prompts == len(prompts)
    assert found.before == pytest.approx(raw, rel=1e-3)
    facts = find_projections(work.smaller)
    assert facts is not None
    last = f"{work.smaller.stack.path}.{len(work.smaller.stack) - 1}.{facts.last}.weight"
    assert changed(work.original, original) == set()
    if found.kept:
        assert changed(work.smaller, before) == {last} == set(work.changed)
        assert found.after < found.before
        assert divergence(work.original, work.smaller, held_out) == pytest.approx(found.after, rel=1e-3)
        assert measure(work.smaller) == pytest.approx(found.text_after)
        assert found.text_after <= 1.01 * found.text_before
    else:
        assert changed(work.smaller, before) == set() == set(work.changed)
        assert found.after >= found.before or found.text_after > 1.01 * found.text_before


def test_some_tiny_models_are_truly_helped(ready, monkeypatch):
    """On random weights the text may suffer, which is another question than whether choices come nearer."""
    monkeypatch.setattr(answers, "_HARM", float("inf"))
    helped = []
    for name in NAMES:
        found = settle_answers(*ready(name))
        assert found is not None
        helped.append(found.after / found.before)
    assert min(helped) < 0.7
    assert sum(value < 1 for value in helped) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_from_what_the_map_writes_is_its_derivative(ready, name):
    """By differences: each coordinate of what the map writes at the last place is pushed a little."""
    work, prompts, _, _ = ready(name)
    model, block = work.smaller, work.plan.kept[-1]
    module = work.linear(block, work.facts.last)
    some = prompts[:3]
    read = answers._Reader(work, block, work.facts.last, contextlib.nullcontext).read(some)
    logits = torch.stack([run(model.model, one.token_ids[None])[0, -1].double()[list(one.words)] for one in some])
    assert torch.allclose(read.logits, logits - logits.mean(-1, keepdim=True), atol=1e-5)
    model.model.double()
    width, step = matrix_of(module).shape[0], 1e-3  # norms compute in float32
    expected = torch.zeros(2, width, dtype=torch.float64)
    for place in range(0, width, max(1, width // 6)):
        for one in some:
            ends = []
            for sign in (1, -1):

                def pushed(_, __, output, place=place, sign=sign):
                    moved = output.clone()
                    moved.view(-1, width)[-1, place] += sign * step
                    return moved

                handle = module.register_forward_hook(pushed)
                ends.append(run(model.model, one.token_ids[None])[0, -1].double()[list(one.words)])
                handle.remove()
            slope = (ends[0] - ends[1]) / (2 * step)
            expected[:, place] += (slope - slope.mean()) / len(some)
        assert torch.allclose(read.derivative[:, place], expected[:, place], atol=1e-3)


@pytest.mark.parametrize("can_pad", [True, False])
def test_prompts_side_by_side_are_read_as_each_alone(ready, can_pad, monkeypatch):
    work, prompts, _, _ = ready()
    assert work.smaller.pad_id is not None
    if not can_pad:
        monkeypatch.setattr(Loaded, "pad_id", None)
    some = sorted(prompts, key=lambda one: len(one.token_ids))[:: len(prompts) // 6]
    read = answers._Reader(work, work.plan.kept[-1], work.facts.last, contextlib.nullcontext).read(some)
    for place, one in enumerate(some):
        for loaded, found in ((work.smaller, read.logits), (work.original, read.dense)):
            alone = run(loaded.model, one.token_ids[None])[0, -1].double()[list(one.words)]
            assert torch.allclose(found[place], alone - alone.mean(), atol=1e-5)


def read_of(tensors, rows):
    inputs, logits, dense, derivative = tensors
    return answers._Read(inputs, logits, dense, derivative, rows)


def test_the_solution_is_that_of_stacked_least_squares():
    """All terms as rows of one system, solved by numpy, the ridge by trying each."""
    draw = np.random.default_rng(0)
    inputs, text = draw.normal(size=(80, 6)), draw.normal(size=(300, 6))
    inputs[:, 2] *= 30  # features of many sizes
    logits = draw.normal(size=(80, 3))
    dense = inputs @ draw.normal(size=(6, 3)) * 0.1 + 0.3 * draw.normal(size=(80, 3))
    derivative = draw.normal(size=(3, 5))
    logits, dense, derivative = (one - one.mean(axis, keepdims=True)
                                 for one, axis in ((logits, 1), (dense, 1), (derivative, 0)))  # fmt: skip
    scale = np.sqrt((inputs**2).mean(0) + (text**2).mean(0))

    def slow(rows, ridge):
        system = np.concatenate([inputs[rows] / scale / np.sqrt(rows.sum()), np.sqrt(GAMMA / 300) * text / scale,
                                 np.sqrt(ridge) * np.eye(6)])  # fmt: skip
        aims = np.concatenate([(dense - logits)[rows] / np.sqrt(rows.sum()), np.zeros((306, 3))])
        return np.linalg.lstsq(system, aims, rcond=None)[0]

    judges, held = np.arange(80) % 4 == 0, np.arange(80) % 4 == 1
    errors = [
        (((dense - logits)[held] - inputs[held] / scale @ slow(~held & ~judges, ridge)) ** 2).mean() for ridge in RIDGES
    ]
    best = RIDGES[int(np.argmin(errors))]
    expected = np.linalg.pinv(derivative) @ (slow(~judges, best) / scale[:, None]).T
    tensors = (torch.tensor(one) for one in (inputs, logits, dense, derivative))
    found = answers._solution(read_of(tensors, torch.arange(80)), torch.tensor(text))
    assert np.allclose(found.numpy(), expected, atol=1e-8)


def test_nothing_is_fitted_to_the_prompts_that_judge():
    draw = np.random.default_rng(1)
    drawn = (torch.tensor(draw.normal(size=size)) for size in ((80, 6), (80, 3), (80, 3), (3, 5)))
    read = read_of(drawn, torch.arange(80) // 2)
    text = torch.tensor(draw.normal(size=(300, 6)))
    found = answers._solution(read, text)
    other = read.dense.clone()
    other[::8] += 100.0
    other[1::8] += 100.0
    assert torch.equal(answers._solution(dataclasses.replace(read, dense=other), text)[0], found[0])
    other[2::8] += 100.0
    assert not torch.equal(answers._solution(dataclasses.replace(read, dense=other), text)[0], found[0])


def test_two_writings_of_a_row_are_on_one_side(ready):
    _, prompts, _, _ = ready(share=0.5)
    rows = [one.row for one in prompts]
    assert len(rows) > len(set(rows)) == 160
    assert rows == sorted(rows)
    plain = ready()[1]
    assert [one.row for one in plain] == list(range(160))
    by_row = {one.row: [other.token_ids.tolist() for other in prompts if other.row == one.row] for one in plain}
    assert all(one.token_ids.tolist() in by_row[one.row] for one in plain)


def test_what_harms_the_text_is_undone(ready, monkeypatch):
    work, *given = ready()
    before = weights_of(work.smaller)
    monkeypatch.setattr(answers, "_HARM", -1.0)
    found = settle_answers(work, *given)
    assert found is not None
    assert not found.kept
    assert changed(work.smaller, before) == set() == set(work.changed)


def test_what_is_lost_is_what_no_scale_and_shift_explains(ready):
    """By least squares in numpy: one slope for all answers, an offset for each."""
    work, prompts, _, _ = ready()
    dense, smaller = work.original, work.smaller
    found = ChoiceYardstick(dense, prompts)(smaller)
    sides = []
    for loaded in (dense, smaller):
        logits = np.array([run(loaded.model, one.token_ids[None])[0, -1].double()[list(one.words)].numpy()
                           for one in prompts])  # fmt: skip
        sides.append(logits - logits.mean(1, keepdims=True))
    aims, given = (side[:, 0] for side in sides)  # of two answers, one is the other's negative
    system = np.stack([given, np.ones_like(given)], 1)
    slope, offset = np.linalg.lstsq(system, aims, rcond=None)[0]
    left = ((aims - slope * given - offset) ** 2).mean() / aims.var()
    assert found == pytest.approx(left if slope > 0 else 1.0, rel=1e-4)
    assert 0 < found <= 1
    assert ChoiceYardstick(dense, prompts)(dense) == pytest.approx(0.0, abs=1e-9)


def test_a_choice_that_is_turned_round_is_lost_and_a_shifted_one_is_not():
    draw = np.random.default_rng(0)
    aims = answers._spread(answers._centred(torch.tensor(draw.normal(size=(50, 3)))))
    for scale, shift, share in ((0.3, 5.0, 0.0), (-2.0, 0.0, 1.0), (0.0, 1.0, 1.0)):
        given = answers._spread(answers._centred(scale * aims + shift * torch.tensor([1.0, 2.0, -3.0])))
        assert 1 - max(0.0, answers._correlation(aims, given)) ** 2 == pytest.approx(share, abs=1e-5)


def test_kinds_of_prompts_count_alike_and_small_ones_not_at_all(ready):
    work, prompts, _, _ = ready()
    turned = [dataclasses.replace(one, words=(one.words[1], one.words[0] + 1)) for one in prompts[:40]]
    yardsticks = [ChoiceYardstick(work.original, some) for some in (prompts, turned, [*prompts, *turned])]
    one, two, both = (yardstick(work.smaller) for yardstick in yardsticks)
    assert both == pytest.approx((one + two) / 2)
    few = ChoiceYardstick(work.original, prompts[: answers.LEAST - 1])
    assert not few
    assert ChoiceYardstick(work.original, [*prompts, *turned[:5]])(work.smaller) == pytest.approx(one)


def test_few_prompts_and_unknown_maps_are_left_alone(ready):
    assert settle_answers(*ready(count=answers.LEAST - 1)) is None
    assert settle_answers(*ready(count=answers.LEAST - 1, share=0.5)) is None  # writings of a row are no more rows
    work, *given = ready()
    for facts in (None, dataclasses.replace(work.facts, mlp=None)):  # unknown, and a mixture of experts
        work.facts = facts
        assert settle_answers(work, *given) is None


def test_as_many_prompts_of_each_kind_are_taken(ready):
    prompts = ready()[1]
    other = [dataclasses.replace(one, words=(one.words[1], one.words[0])) for one in prompts[:90]]
    taken = evenly([*prompts, *other, *prompts[:3]], 100)
    assert [one.words for one in taken] == [prompts[0].words] * 50 + [other[0].words] * 50
    assert evenly([], 100) == []


def test_a_repair_ends_with_it_and_tells(ready, monkeypatch):
    monkeypatch.setattr(answers, "_HARM", float("inf"))
    work, prompts, _, _ = ready()
    seen = []
    repaired, story = compensate(
        work.original, cut(work.original, work.plan), work.plan, TEXT, prompts=prompts, rounds=1,
        on_step=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    found = story.answers
    assert found is not None
    held_out = [one for one in prompts if one.row % 4 == 0]
    assert found.kept
    assert story.applied
    assert found.after < found.before
    assert divergence(work.original, repaired, held_out) == pytest.approx(found.after, rel=1e-3)
    assert seen[-1] == (3, 3)
    # Time that is over leaves it out.
    monkeypatch.setattr(Yardstick, "__call__", lambda self, smaller: next(values))
    values = iter([1.0, *(1 / n for n in range(2, 60))])
    asked = []

    def may_go_on():
        asked.append(len(asked))
        return False

    _, cut_short = compensate(work.original, cut(work.original, work.plan), work.plan, TEXT, prompts=prompts,
                              method="auto", may_go_on=may_go_on)  # fmt: skip
    assert cut_short.answers is None
    assert len(asked) >= 2
    monkeypatch.undo()
    _, other = compensate(work.original, cut(work.original, work.plan), work.plan, TEXT, rounds=1)
    assert other.answers is None
    _, plain = compensate(
        work.original, cut(work.original, work.plan), work.plan, TEXT, prompts=prompts, method="refit"
    )
    assert plain.answers is None
