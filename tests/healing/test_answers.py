"""The last solve: what it reads, what it solves, what it leaves alone, and when it is undone."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from avss.healing import answers, heal
from avss.healing.answers import GAMMA, RIDGES, fit_answers
from avss.healing.objectives import find_objective
from avss.healing.pair import Pair
from avss.healing.text import prepare_text
from avss.models.projections import find_projections, matrix_of
from tests.support.oracles import run

FORM = "the cat {text} a dog {sees|likes}"
NAMES = ["llama", "llama-tied", "gpt2", "gemma2"]


@pytest.fixture
def ready(patient, text, small):
    """Everything that the solve takes, for a smaller model with memory of its own."""

    def make(name="llama", count=160):
        one = patient(name)
        model = dataclasses.replace(one.smaller, model=copy.deepcopy(one.smaller.model))
        for parameter in model.model.parameters():
            parameter.requires_grad_(False)
        config = small(forms=(FORM,), seq_len=24)
        pair = Pair(one.dense, model, one.plan, num_shared=0, needs_states=False, recompute=False, precision=None)
        draw = np.random.default_rng(0)
        words = list(one.dense.tokenizer.get_vocab())[-20:]
        rows = {FORM: [(" ".join(draw.choice(words, size=5)),) for _ in range(count)]}
        prepared = prepare_text(model, text, config).with_rows(rows)
        objective = find_objective(pair, model, config, has_labels=False)
        return one, model, (pair, one.dense, model, objective, prepared, prepared.asked())

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


@pytest.mark.parametrize("name", NAMES)
def test_choices_come_nearer_on_prompts_held_out_and_only_the_last_map_changes(ready, name):
    one, model, given = ready(name)
    prompts = given[-1]
    held_out = prompts[::4]
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    raw = divergence(one.dense, model, held_out)
    found = fit_answers(*given)
    assert found is not None
    assert found.num_prompts == len(prompts)
    assert found.before == pytest.approx(raw, rel=1e-3)
    facts = find_projections(model)
    assert facts is not None
    last = f"{model.stack.path}.{len(model.stack) - 1}.{facts.last}.weight"
    changed = {key for key, value in model.model.state_dict().items() if not torch.equal(value, before[key])}
    if found.kept:
        assert changed == {last}
        assert found.after < found.before
        assert divergence(one.dense, model, held_out) == pytest.approx(found.after, rel=1e-3)
        assert found.text_after <= 1.01 * found.text_before
    else:
        assert changed == set()
        assert found.after >= found.before or found.text_after > 1.01 * found.text_before


def test_some_tiny_models_are_truly_helped(ready, monkeypatch):
    """On random weights the text may suffer, which is another question than whether choices come nearer."""
    monkeypatch.setattr(answers, "_HARM", float("inf"))
    helped = []
    for name in NAMES:
        found = fit_answers(*ready(name)[-1])
        assert found is not None
        helped.append(found.after / found.before)
    assert min(helped) < 0.7
    assert sum(value < 1 for value in helped) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_from_what_the_map_writes_is_its_derivative(ready, name):
    """By differences: each coordinate of what the map writes at the last place is pushed a little."""
    _, model, (pair, dense, _, _, _, prompts) = ready(name)
    module = answers._last_map(model)
    assert module is not None
    some = prompts[:3]
    read = answers._Reader(pair, dense, model, module).read(some)
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
    found = answers._solution(answers._Read(*tensors), torch.tensor(text))
    assert np.allclose(found.numpy(), expected, atol=1e-8)


def test_nothing_is_fitted_to_the_prompts_that_judge():
    draw = np.random.default_rng(1)
    read = answers._Read(*(torch.tensor(draw.normal(size=size)) for size in ((80, 6), (80, 3), (80, 3), (3, 5))))
    text = torch.tensor(draw.normal(size=(300, 6)))
    found = answers._solution(read, text)
    other = read.dense.clone()
    other[::4] += 100.0
    assert torch.equal(answers._solution(dataclasses.replace(read, dense=other), text)[0], found[0])
    other[1::4] += 100.0
    assert not torch.equal(answers._solution(dataclasses.replace(read, dense=other), text)[0], found[0])


def test_what_harms_the_text_is_undone(ready, monkeypatch):
    _, model, given = ready()
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    monkeypatch.setattr(answers, "_HARM", -1.0)
    found = fit_answers(*given)
    assert found is not None
    assert not found.kept
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


def test_few_prompts_and_unknown_maps_are_left_alone(ready, monkeypatch):
    assert fit_answers(*ready(count=answers.LEAST - 1)[-1]) is None
    given = ready()[-1]
    monkeypatch.setattr(answers, "find_projections", lambda _: None)
    assert fit_answers(*given) is None


def test_healing_ends_with_it_and_the_record_tells(patient, text, small):
    one = patient()
    settings = small(budget="1k", forms=(FORM,), seq_len=24, written=120)
    healed, healing, _ = heal(one.dense, one.smaller, one.plan, text, settings)
    found = healing.answers
    assert found is not None
    assert found.num_prompts >= answers.LEAST
    assert all(parameter.requires_grad for parameter in healed.model.parameters())
    without, other, _ = heal(one.dense, one.smaller, one.plan, text, settings.model_copy(update={"written": 0}))
    assert other.answers is None
    assert not torch.equal(run(healed.model, torch.arange(5, 15)[None]), run(without.model, torch.arange(5, 15)[None]))
