"""Healing tiny models: what is made small, what is left alone, what is kept, when it stops, and how it goes on."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers
from tools.sweep.shrink import small_model

import avss.healing as room
import avss.healing.loop as loop_room
import avss.healing.pair as pair_room
from avss.compensation.answers import LEAST
from avss.config import Budget, HealConfig
from avss.cut import cut
from avss.data.sources import Texts
from avss.errors import ConfigError, DataError, InvalidPlanError, NumericalError, UnsupportedArchitectureError
from avss.forms import HEALING_SHARE
from avss.healing import heal, weights
from avss.healing.objectives import find_objective
from avss.healing.pace import Pace, learning_rate_factor
from avss.healing.pair import Pair
from avss.healing.state import Checkpoint
from avss.healing.text import HealingText, prepare_text
from avss.healing.weights import choose_weights
from avss.models.load import adopt, in_dtype
from avss.models.shell import with_narrow_maps
from avss.models.writing import NUM_WRITTEN
from avss.record import HealingStep, Plan
from tests.support.architectures import ARCHITECTURES
from tests.support.oracles import hook_count, largest_difference, run, state_copy
from tests.support.tokenizers import WORDS, word_tokenizer

HEADS = ["llama", "llama-tied", "gpt2", "gemma2", "bert", "bert-masked", "distilbert-classifier", "bert-tokens"]
HEADS += ["t5", "bert-reward", "bert-labels"]


def parts(patient, config: HealConfig, text: Texts, *, choice="all", labels=None, num_shared=None):
    """Pair, objective, what is trained, and the text, of a copy of the smaller model."""
    model = dataclasses.replace(patient.smaller, model=copy.deepcopy(patient.smaller.model))
    trained = choose_weights(patient.dense, model, patient.plan, choice, rank=4)
    shared = trained.num_shared if num_shared is None else num_shared
    pair = Pair(
        patient.dense,
        model,
        patient.plan,
        num_shared=shared,
        needs_states=config.hidden_weight > 0,
        recompute=config.recompute,
        precision=None,
    )
    objective = find_objective(pair, model, config, has_labels=labels is not None)
    return pair, objective, trained, prepare_text(model, text, config, labels=labels)


def gradients(pair, objective, trained, batches) -> dict[str, torch.Tensor]:
    """The gradient of the mean objective over batches that make up one."""
    count = sum(objective.count(batch) for batch in batches)
    for value in trained.parameters.values():
        value.grad = None
    for batch in batches:
        loss = objective.loss(pair.run(batch), batch, 1 / count)
        torch.autograd.backward([loss.tensor], [loss.gradient])
    return {name: value.grad.clone() for name, value in trained.parameters.items() if value.grad is not None}


# --- what is made small ---


def test_the_objective_of_a_language_model_is_the_mean_kl_over_all_places(patient, text, small):
    one = patient("gemma2")
    pair, objective, _, prepared = parts(one, small(), text)
    batch = prepared.batch(prepared.drawn(0, 4))
    with torch.no_grad():
        found = objective.loss(pair.run(batch), batch, 1 / objective.count(batch)).value
    p = torch.log_softmax(run(one.dense.model, batch.inputs).double(), -1)
    q = torch.log_softmax(run(one.smaller.model, batch.inputs).double(), -1)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_share_on_the_text_is_its_negative_log_likelihood(patient, text, small, share):
    """A place without a word of the text's own, a window's last one and all in prompts, is the dense model's alone."""
    one = patient()
    settings = small(label_weight=share, seq_len=24, forms=("the cat {text} a dog {sees|runs}",))
    pair, objective, _, prepared = parts(one, settings, text)
    seen = set()
    for start in range(0, 40, 4):
        batch = prepared.batch(prepared.drawn(start, 4))
        with torch.no_grad():
            loss = objective.loss(pair.run(batch), batch, 1.0)
        p, q = (
            torch.log_softmax(run(model.model, batch.inputs, batch.keep).double(), -1)
            for model in (one.dense, one.smaller)
        )
        divergence = (p.exp() * (p - q)).sum(-1)
        own = batch.words >= 0
        likelihood = q.gather(-1, batch.words.clamp(min=0)[..., None])[..., 0][own].sum()
        expected = (1 - share) * divergence[own].sum() + divergence[batch.keep & ~own].sum() - share * likelihood
        assert loss.value == pytest.approx(float(expected), rel=1e-5)
        assert loss.text_nats == pytest.approx(-float(likelihood), rel=1e-5)
        assert loss.num_words == int(own.sum())
        seen |= {bool(row.any()) for row in own}
    assert seen == {False, True}


def test_a_masked_model_is_asked_at_masked_places_only(patient, text, small):
    one = patient("bert-masked")
    pair, objective, _, prepared = parts(one, small(), text)
    batch = prepared.batch(prepared.drawn(0, 6))
    assert bool((batch.inputs[batch.asked] == one.dense.tokenizer.mask_token_id).all())
    assert not bool((batch.asked & ~batch.keep).any())
    with torch.no_grad():
        found = objective.loss(pair.run(batch), batch, 1 / objective.count(batch)).value
    p = torch.log_softmax(run(one.dense.model, batch.inputs, batch.keep).double(), -1)
    q = torch.log_softmax(run(one.smaller.model, batch.inputs, batch.keep).double(), -1)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1)[batch.asked].mean()), rel=1e-5)


def test_an_encoder_is_compared_by_states_and_embeddings(patient, text, small):
    one = patient("bert")
    pair, objective, _, prepared = parts(one, small(), text)
    batch = prepared.batch(prepared.drawn(0, 5))
    with torch.no_grad():
        found = objective.loss(pair.run(batch), batch, 1 / 5).value
    expected = 0.0
    dense, ours = (run(model.model, batch.inputs, batch.keep).double().numpy() for model in (one.dense, one.smaller))
    for row in range(5):
        length = int(batch.keep[row].sum())
        d, s = dense[row, :length], ours[row, :length]
        expected += np.mean(((s - d) ** 2).sum(-1) / (d**2).sum(-1)) / 5
        d, s = d.mean(0), s.mean(0)
        expected += (1 - d @ s / np.sqrt((d @ d) * (s @ s))) / 5
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_classifier_learns_from_answers_and_labels(patient, text, small):
    one = patient("distilbert-classifier")
    rows = Texts(texts=text.paragraphs(), source="rows")
    labels = [index % 3 for index in range(len(rows.texts))]
    pair, objective, _, prepared = parts(one, small(label_weight=0.25), rows, labels=labels)
    batch = prepared.batch(prepared.drawn(0, 6))
    assert batch.labels is not None
    with torch.no_grad():
        found = objective.loss(pair.run(batch), batch, 1.0).value
    p = torch.log_softmax(run(one.dense.model, batch.inputs, batch.keep).double(), -1)
    q = torch.log_softmax(run(one.smaller.model, batch.inputs, batch.keep).double(), -1)
    kl = float((p.exp() * (p - q)).sum())
    nll = -float(q[torch.arange(6), batch.labels].sum())
    assert found == pytest.approx(0.75 * kl + 0.25 * nll, rel=1e-5)
    by_text = dict(zip(rows.texts, labels, strict=True))
    for sequence, label in zip(prepared.train, prepared.train_labels, strict=True):
        assert by_text[one.dense.tokenizer.decode(sequence, skip_special_tokens=True)] == label


def test_hidden_states_are_compared_after_the_same_original_block(patient, text, small):
    one = patient("llama", removed=(1, 3))
    pair, _, _, prepared = parts(one, small(hidden_weight=1.0), text)
    batch = prepared.batch(prepared.drawn(0, 3))
    sides = pair.run(batch)
    outputs: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, _a, output, index=index: outputs.__setitem__(index, output))
        for index, block in enumerate(one.dense.stack.blocks)
    ]
    run(one.dense.model, batch.inputs)
    for handle in handles:
        handle.remove()
    assert len(sides.states) == len(one.plan.kept)
    for block, (ours, theirs) in zip(one.plan.kept, sides.states, strict=True):
        assert torch.allclose(theirs, outputs[block], rtol=1e-4, atol=1e-5)
        assert ours.requires_grad
    assert torch.equal(sides.states[0][0], sides.states[0][1])  # nothing was removed before it
    assert not torch.equal(sides.states[-1][0], sides.states[-1][1])


def test_labels_asked_one_by_one_are_compared_one_by_one(patient, text, small):
    one = patient("bert-labels")
    pair, objective, _, prepared = parts(one, small(), text)
    batch = prepared.batch(prepared.drawn(0, 6))
    with torch.no_grad():
        found = objective.loss(pair.run(batch), batch, 1.0).value
    p, q = (torch.sigmoid(run(model.model, batch.inputs, batch.keep).double()) for model in (one.dense, one.smaller))
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert found == pytest.approx(float(kl.sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_learns_the_words_of_its_decoder(patient, text, small, name):
    one = patient(name)
    pair, objective, _, prepared = parts(one, small(), text)
    batch = prepared.batch(prepared.drawn(0, 6))
    with torch.no_grad():
        found = objective.loss(pair.run(batch), batch, 1.0).value
    expected = 0.0
    for row, keep in zip(batch.inputs, batch.keep, strict=True):
        ids = row[keep][None]
        p, q = (run(model.model, ids).double().softmax(-1) for model in (one.dense, one.smaller))
        expected += float((p * (p / q).log()).sum(-1).mean())
    assert found == pytest.approx(expected, rel=1e-4)
    assert "next-token predictions" in objective.title


@pytest.mark.parametrize("name", HEADS)
def test_padding_and_parts_of_a_batch_do_not_matter(patient, text, small, name):
    one = patient(name)
    pair, objective, trained, prepared = parts(one, small(), text)
    drawn = sorted(prepared.drawn(0, 6), key=lambda draw: len(prepared.train[draw.index]))
    whole = gradients(pair, objective, trained, [prepared.batch(drawn)])
    single = gradients(pair, objective, trained, [prepared.batch([item]) for item in drawn])
    assert whole.keys() == single.keys()
    for key, gradient in whole.items():
        torch.testing.assert_close(single[key], gradient, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_sharing_the_first_blocks_changes_nothing(patient, text, small, name, monkeypatch):
    monkeypatch.setattr(weights, "LEAD", 1)
    one = patient(name)
    config = small()
    found = []
    for num_shared in (None, 0):
        pair, objective, trained, prepared = parts(one, config, text, choice="after", num_shared=num_shared)
        assert trained.num_shared == 1
        batch = prepared.batch(prepared.drawn(0, 4))
        found.append(gradients(pair, objective, trained, [batch]))
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("lead", "shared"), [(1, 2), (2, 1), (3, 0), (weights.LEAD, 0)])
def test_blocks_before_the_first_cut_are_trained_too(patient, monkeypatch, lead, shared):
    monkeypatch.setattr(weights, "LEAD", lead)
    one = patient("llama", removed=(3,))
    model = dataclasses.replace(one.smaller, model=copy.deepcopy(one.smaller.model))
    trained = choose_weights(one.dense, model, one.plan, "after", rank=4)
    assert trained.num_shared == shared
    assert any(f"layers.{shared}." in name for name in trained.parameters)
    assert not any(f"layers.{place}." in name for name in trained.parameters for place in range(shared))


def test_blocks_that_are_not_the_dense_models_are_not_shared(patient, monkeypatch):
    monkeypatch.setattr(weights, "LEAD", 1)
    one = patient("llama", removed=(3,))
    model = dataclasses.replace(one.smaller, model=copy.deepcopy(one.smaller.model))
    assert choose_weights(one.dense, model, one.plan, "after", rank=4).num_shared == 2
    with torch.no_grad():
        model.stack.blocks[1].mlp.down_proj.weight[0, 0] += 1.0
    assert choose_weights(one.dense, model, one.plan, "after", rank=4).num_shared == 1
    with torch.no_grad():
        model.model.get_input_embeddings().weight[0, 0] += 1.0
    assert choose_weights(one.dense, model, one.plan, "after", rank=4).num_shared == 0


@pytest.mark.parametrize(("length", "batch_size", "held_out"), [(32, 32, 256), (8, 32, 400)])
def test_steps_and_held_out_text_hold_about_as_many_tokens_whatever_the_length(patient, length, batch_size, held_out):
    sentence = " ".join(["the cat sat on the mat"] * 200)
    text = Texts(source="test", texts=(sentence,) * 2000)
    prepared = prepare_text(patient("bert").smaller, text, HealConfig(seq_len=length))
    assert {len(one) for one in prepared.train} == {length}
    assert (prepared.facts.batch_size, len(prepared.held_out)) == (batch_size, held_out)
    asked = prepare_text(patient("bert").smaller, text, HealConfig(seq_len=length, batch_size=3, held_out=5))
    assert (asked.facts.batch_size, len(asked.held_out)) == (3, 5)


@pytest.mark.parametrize("name", ["gpt2-padless", "llama-padless"])
def test_a_classifier_without_padding_is_healed_sequence_by_sequence(patient, text, small, name):
    one = patient(name)
    _, healing, _ = heal(one.dense, one.smaller, one.plan, text, small())
    assert healing.settings["micro_batch_size"] == 1
    assert healing.settings["batch_size"] == 4
    assert healing.after.loss < healing.before.loss


@pytest.mark.parametrize(
    ("name", "rate"), [("llama", 3e-4), ("bert-masked", 3e-4), ("t5", 3e-4), ("bert-classifier", 3e-5)]
)
def test_task_heads_learn_at_a_lower_rate(patient, text, small, name, rate):
    one = patient(name)
    healed, healing, _ = heal(one.dense, one.smaller, one.plan, text, small(learning_rate=None))
    assert healing.settings["learning_rate"] == rate
    assert healing.kept
    # What was repaired or healed before is moved less; of task heads that was not measured.
    _, again, _ = heal(one.dense, healed, one.plan, text, small(learning_rate=None))
    assert again.settings["learning_rate"] == (rate / 2 if rate == 3e-4 else rate)


# --- what it does ---


@pytest.mark.parametrize(("name", "weights"), [*((name, "auto") for name in HEADS), ("llama-tied", "all")])
def test_healing_brings_the_answers_nearer_and_leaves_both_models_alone(patient, text, small, name, weights):
    one = patient(name)
    before = state_copy(one.dense.model), state_copy(one.smaller.model)
    wants = [value.requires_grad for value in one.dense.model.parameters()]
    healed, healing, _ = heal(one.dense, one.smaller, one.plan, text, small(weights=weights))
    assert healing.after.loss < healing.before.loss
    assert healing.best_step > 0
    for model, state in zip((one.dense.model, one.smaller.model), before, strict=True):
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert hook_count(model) == 0
        assert not model.training
    assert [value.requires_grad for value in one.dense.model.parameters()] == wants
    assert not healed.model.training
    stored = {value.data_ptr() for value in one.dense.model.parameters()}
    assert stored.isdisjoint(value.data_ptr() for value in healed.model.parameters())
    assert type(healed.model) is type(one.smaller.model)


def test_the_held_out_loss_is_that_of_the_model_that_comes_back(patient, text, small):
    one = patient()
    config = small()
    healed, healing, _ = heal(one.dense, one.smaller, one.plan, text, config)
    prepared = prepare_text(one.smaller, text, config)
    rows = []
    for sequence in prepared.held_out:
        p, q = (torch.log_softmax(run(model.model, sequence[None]).double(), -1) for model in (one.dense, healed))
        rows.append((p.exp() * (p - q)).sum(-1)[0])
        assert len(sequence) == 16
    assert healing.after.loss == pytest.approx(float(torch.cat(rows).mean()), rel=1e-4)
    assert healing.num_tokens == healing.num_steps * 4 * 16


def test_embeddings_and_head_stay_unless_all_is_trained(patient, text, small, monkeypatch):
    monkeypatch.setattr(weights, "LEAD", 1)
    one = patient("llama")
    for choice, moves in (("blocks", False), ("after", False), ("all", True)):
        healed, _, _ = heal(one.dense, one.smaller, one.plan, text, small(weights=choice))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            same = torch.equal(healed.model.state_dict()[name], one.dense.model.state_dict()[name])
            assert same is not moves, (choice, name)
    first = "model.layers.0.mlp.up_proj.weight"
    after, _, _ = heal(one.dense, one.smaller, one.plan, text, small(weights="after"))
    assert torch.equal(after.model.state_dict()[first], one.dense.model.state_dict()[first])


def test_tied_weights_stay_tied(patient, text, small):
    one = patient("llama-tied")
    healed, _, _ = heal(one.dense, one.smaller, one.plan, text, small(weights="all"))
    assert healed.model.lm_head.weight is healed.model.model.embed_tokens.weight


def test_weights_come_back_rounded_as_they_will_be_stored(patient, text, small):
    one = patient()
    stored = dataclasses.replace(one.smaller, stored_dtype=torch.bfloat16)
    healed, _, _ = heal(one.dense, stored, one.plan, text, small())
    assert healed.model.dtype == torch.float32
    assert all(torch.equal(value, value.bfloat16().float()) for value in healed.model.parameters())


def test_a_model_in_half_precision_is_trained_in_float32(patient, text, small):
    one = patient()
    half = dataclasses.replace(
        one.smaller, model=in_dtype(one.smaller.model, torch.bfloat16), stored_dtype=torch.bfloat16
    )
    dense = dataclasses.replace(one.dense, model=in_dtype(one.dense.model, torch.bfloat16))
    healed, healing, _ = heal(dense, half, one.plan, text, small(precision="bfloat16"))
    assert healed.model.dtype == torch.bfloat16
    assert healing.after.loss < healing.before.loss


@pytest.mark.parametrize(("class_name", "model_type"), [("GemmaForCausalLM", "gemma"), ("OPTForCausalLM", "opt")])
def test_half_precision_with_blocks_in_common_is_trained_without_autocast(class_name, model_type, text, small):
    """The dense model's states come in its own dtype, and not every norm widens what it reads."""
    model = small_model(getattr(transformers, class_name), model_type, num_hidden_layers=9).to(torch.bfloat16)
    dense = adopt(model, word_tokenizer(adds="bos"))
    plan = Plan(num_blocks=9, removed=(7,), method="explicit", rule="by hand")
    healed, healing, _ = heal(dense, cut(dense, plan), plan, text, small(precision="float32", budget="200 tokens"))
    assert healing.settings["num_shared_blocks"] > 0
    assert healing.settings["precision"] == "float32"
    assert healed.model.dtype == torch.bfloat16


def test_what_is_trained_goes_by_where_data_pass_not_by_the_order_of_registration():
    """Gemma 3n registers the embeddings that feed every block after its blocks, OPT its last norm before them."""
    one = adopt(small_model(transformers.Gemma3nForCausalLM, "gemma3n_text"))
    before, _, after = weights._in_order(one)
    assert any("embed_tokens_per_layer" in name for name in before)
    assert not any("per_layer" in name for name in after)
    two = adopt(small_model(transformers.OPTForCausalLM, "opt"))
    before, blocks, after = weights._in_order(two)
    assert {name.rsplit(".", 2)[1] for name in after} == {"final_layer_norm"}
    assert {id(value) for part in (before, *blocks, after) for value in part.values()} == {
        id(value) for value in two.model.parameters()
    }
    assert hook_count(two.model) == 0


def test_heads_hold_no_second_copy_of_frozen_blocks(patient, monkeypatch):
    one = patient()
    twins = []

    def remember(module, dtype, is_frozen):
        twins.append(with_narrow_maps(module, dtype, is_frozen))
        return twins[-1]

    monkeypatch.setattr(pair_room, "with_narrow_maps", remember)
    model = dataclasses.replace(one.smaller, model=copy.deepcopy(one.smaller.model))
    for value in model.model.parameters():
        value.requires_grad_(False)
    pair = Pair(one.dense, model, one.plan, num_shared=0, needs_states=False, recompute=False, precision=torch.bfloat16)
    twins.clear()
    pair.heads()
    own = dict(model.model.named_parameters())
    inside = [name for name in own if name.startswith(f"{model.stack.path}.")]
    (twin,) = twins
    theirs = dict(twin.named_parameters())
    assert inside
    assert all(theirs[name] is own[name] for name in inside)
    assert theirs["lm_head.weight"].dtype == torch.bfloat16


def test_the_only_step_of_a_small_budget_learns(patient, text, small):
    one = patient()
    _, healing, _ = heal(one.dense, one.smaller, one.plan, text, small(budget="10 tokens"))
    assert healing.num_steps == 1
    pace = Pace(HealConfig(budget="100 tokens").budget)
    assert pace.middle_of_step(1000) == 0.5
    assert pace.middle_of_step(40) == 0.2


def test_rows_of_nothing_but_special_tokens_are_no_text_for_a_masked_model(patient, small):
    one = patient("bert-masked")
    rows = Texts(texts=("zzz", *(" ".join(WORDS[start : start + 6]) for start in range(20)), "qqq"), source="text.txt")
    tokenizer = one.smaller.tokenizer
    special = set(tokenizer.all_special_ids)
    assert special.issuperset(tokenizer("zzz")["input_ids"])
    found = prepare_text(one.smaller, rows, small(held_out=4))
    assert len(found.train) + len(found.held_out) == 20
    assert not any(special.issuperset(row.tolist()) for row in (*found.train, *found.held_out))


@pytest.mark.parametrize(
    "settings", [{"micro_batch_size": 1}, {"recompute": True}], ids=["micro-batches", "recomputed blocks"]
)
def test_what_saves_memory_does_not_change_the_result(patient, text, small, settings):
    one = patient()
    plain, _, _ = heal(one.dense, one.smaller, one.plan, text, small())
    saving, _, _ = heal(one.dense, one.smaller, one.plan, text, small(**settings))
    token_ids = torch.arange(5, 17)[None]
    assert largest_difference(run(plain.model, token_ids), run(saving.model, token_ids)) < 1e-3


def test_a_plan_without_cuts_or_with_the_first_block_is_healed_too(patient, text, small):
    for removed in ((), (0,), (0, 1)):
        one = patient("llama", removed=removed)
        _, healing, _ = heal(one.dense, one.smaller, one.plan, text, small())
        assert healing.after.loss <= healing.before.loss
        assert healing.settings["num_shared_blocks"] == 0


# --- what is kept, and when it stops ---


def test_the_best_weights_are_kept_when_the_held_out_text_gets_worse(patient, text, small, monkeypatch):
    one = patient()
    losses = iter([3.0, 2.0, 5.0, 6.0, 7.0])
    states = []
    point = loop_room.Loop._point

    def scripted(self, loss):
        found = point(self, loss)
        if getattr(self, "measuring", False):
            states.append({name: value.detach().clone() for name, value in self._trained.parameters.items()})
            return found.model_copy(update={"loss": next(losses)})
        return found

    validate = loop_room.Loop._validate

    def measuring(self):
        self.measuring = True
        validate(self)
        self.measuring = False

    monkeypatch.setattr(loop_room.Loop, "_point", scripted)
    monkeypatch.setattr(loop_room.Loop, "_validate", measuring)
    config = small(budget="2000 tokens", validations=10, patience=3)
    healed, healing, _ = heal(one.dense, one.smaller, one.plan, text, config)
    assert [found.loss for found in healing.validation] == [3.0, 2.0, 5.0, 6.0, 7.0]
    assert healing.stopped == "no improvement"
    assert healing.best_step == healing.validation[1].step
    assert healing.num_steps > healing.best_step
    assert all(torch.equal(healed.model.state_dict()[name], value) for name, value in states[1].items())
    assert not all(torch.equal(healed.model.state_dict()[name], value) for name, value in states[-1].items())


def test_training_that_only_does_harm_gives_the_weights_back(patient, text, small):
    one = patient()
    healed, healing, _ = heal(one.dense, one.smaller, one.plan, text, small(learning_rate=3.0, clip=1e6))
    assert healing.best_step == 0
    assert healing.after == healing.before
    same = one.smaller.model.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in healed.model.state_dict().items())


@pytest.fixture
def clock(monkeypatch):
    """A clock that only models move: two seconds a step, one for each held-out batch."""
    now = [100.0]

    def takes(seconds: float, work):
        def timed(*args, **kwargs):
            now[0] += seconds
            return work(*args, **kwargs)

        return timed

    monkeypatch.setattr(Pair, "run", takes(2.0, Pair.run))
    monkeypatch.setattr(Pair, "run_beside", takes(1.0, Pair.run_beside))
    return lambda: now[0]


@pytest.mark.parametrize("seconds", [15, 40, 60])
def test_a_time_budget_is_kept_and_used(patient, text, small, seconds, clock):
    one = patient()
    config = small(budget=f"{seconds}s", held_out=8, validations=3)
    _, healing, _ = heal(one.dense, one.smaller, one.plan, text, config, clock=clock)
    assert healing.seconds <= seconds
    assert healing.seconds >= seconds - 2 * 2.0
    assert healing.validation[-1].step == healing.num_steps
    assert healing.stopped == "budget"


def test_of_two_budgets_the_first_to_end_counts(patient, text, small, clock):
    one = patient()
    _, by_tokens, _ = heal(one.dense, one.smaller, one.plan, text, small(budget="1h,200 tokens"))
    assert by_tokens.num_tokens == 256  # the step that reaches the budget is done
    _, by_time, _ = heal(one.dense, one.smaller, one.plan, text, small(budget="30s,1M"), clock=clock)
    assert by_time.seconds <= 30
    assert by_time.num_tokens < 10**6


def test_the_pace_sets_the_last_validation_aside():
    pace = Pace(HealConfig(budget="100s").budget, seconds=45.0, reserve=10.0, step_seconds=5.0)
    assert pace.used == pytest.approx(0.5)
    assert pace.has_room()
    pace.seconds = 85.0
    assert pace.has_room()
    pace.seconds = 85.1
    assert not pace.has_room()


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    factors = [learning_rate_factor(used, 0.2) for used in np.linspace(0, 1, 101)]
    assert factors[0] == 0
    assert factors[10] == pytest.approx(0.5)
    assert factors[20] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.5 * (1 + np.cos(np.pi * 0.5)))
    assert factors[100] == pytest.approx(0.0)
    assert factors[21:] == sorted(factors[21:], reverse=True)
    assert learning_rate_factor(0.0, 0.0) == 1.0


# --- going on ---


class Killed(Exception):
    """What a test throws in place of a signal."""


@pytest.mark.parametrize("weights", ["auto", "lora"])
def test_a_killed_run_goes_on_and_gives_the_same_bits(patient, text, small, tmp_path, weights, monkeypatch):
    if weights == "lora":
        pytest.importorskip("peft")
    one, config = patient("bert-masked"), small(budget="500 tokens", weights=weights, augment=0.5)
    whole, expected, _ = heal(one.dense, one.smaller, one.plan, text, config)
    monkeypatch.setattr(Checkpoint, "seconds_between", 0.0, raising=False)
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (0.0,))
    reports = []

    def dies(done: int, total: int | None, note: str) -> None:
        reports.append((done, total, note))
        if len(reports) == 5:
            raise Killed

    with pytest.raises(Killed):
        heal(one.dense, one.smaller, one.plan, text, config, checkpoint_folder=tmp_path, report=dies)
    (file,) = tmp_path.iterdir()
    steps = torch.load(file, weights_only=True)["steps"]
    assert 0 < steps < expected.num_steps
    healed, healing, checkpoint = heal(
        one.dense, one.smaller, one.plan, text, config, checkpoint_folder=tmp_path, report=lambda *_: None
    )
    state = healed.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.model.state_dict().items())
    assert [(point.step, point.loss) for point in healing.validation] == [
        (point.step, point.loss) for point in expected.validation
    ]
    assert [point.loss for point in healing.losses] == [point.loss for point in expected.losses]
    assert checkpoint is not None
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_after_a_validation_does_not_repeat_or_miss_it(patient, text, small, tmp_path, monkeypatch):
    one, config = patient(), small(budget="500 tokens")
    whole, expected, _ = heal(one.dense, one.smaller, one.plan, text, config)
    due = expected.validation[1].step
    assert 0 < due < expected.num_steps
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (0.0,))
    step = loop_room.Loop._step

    def dies(self):
        if self._steps == due:
            raise Killed
        step(self)

    monkeypatch.setattr(loop_room.Loop, "_step", dies)
    with pytest.raises(Killed):
        heal(one.dense, one.smaller, one.plan, text, config, checkpoint_folder=tmp_path)
    monkeypatch.setattr(loop_room.Loop, "_step", step)
    (file,) = tmp_path.iterdir()
    assert torch.load(file, weights_only=True)["steps"] == due
    healed, healing, _ = heal(one.dense, one.smaller, one.plan, text, config, checkpoint_folder=tmp_path)
    assert [(point.step, point.loss) for point in healing.validation] == [
        (point.step, point.loss) for point in expected.validation
    ]
    assert healing.best_step == expected.best_step
    state = healed.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.model.state_dict().items())


def test_another_run_does_not_meet_the_checkpoint(patient, text, small, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (0.0,))
    one = patient()
    paths = set()
    other_text = Texts(texts=(text.texts[0][::-1] + " cat dog",), source="other", is_prose=True)
    other = patient("llama", removed=(3,))
    for who, what, config in (
        (one, text, small()),
        (one, text, small(seed=1)),
        (one, text, small(learning_rate=1e-4)),
        (one, text, small(augment=0.5)),
        (one, other_text, small()),
        (other, text, small()),
    ):
        _, _, checkpoint = heal(who.dense, who.smaller, who.plan, what, config, checkpoint_folder=tmp_path)
        paths.add(checkpoint.path)
    assert len(paths) == 6
    assert set(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("content", [b"", b"noise" * 100, b"PK\x03\x04 truncated"])
def test_a_damaged_checkpoint_is_no_checkpoint(tmp_path, content):
    file = tmp_path / "state.pt"
    file.write_bytes(content)
    assert Checkpoint(file).read() is None
    Checkpoint(file).write({"steps": 3})
    assert Checkpoint(file).read() == {"format": 1, "steps": 3}
    assert list(tmp_path.iterdir()) == [file]


def test_the_order_of_the_text_depends_on_seed_and_place_alone(patient, text, small):
    one = patient()
    prepared = prepare_text(one.smaller, text, small())
    size = len(prepared.train)
    whole = prepared.drawn(0, 3 * size)
    assert [item for start in range(0, 3 * size, 7) for item in prepared.drawn(start, 7)][: 3 * size] == whole
    for epoch in range(3):
        seen = [draw.index for draw in whole if draw.epoch == epoch]
        assert sorted(seen) == list(range(size))
    assert [draw.index for draw in whole[:size]] != [draw.index for draw in whole[size : 2 * size]]
    assert prepare_text(one.smaller, text, small(seed=1)).drawn(0, size) != whole[:size]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_no_sequence_is_trained_on_and_held_out(patient, text, small, name):
    one = patient(name)
    prepared = prepare_text(one.smaller, text, small(held_out=5))
    train, held_out = ({tuple(sequence.tolist()) for sequence in part} for part in (prepared.train, prepared.held_out))
    assert len(held_out) == 5
    assert not train & held_out
    assert prepared.facts.num_tokens == sum(len(sequence) for sequence in prepared.train)


# --- another writing ---


@pytest.mark.parametrize("name", ["llama", "bert-masked"])
def test_rewritten_sequences_are_words_of_the_text_and_no_longer(patient, text, small, name):
    one = patient(name)
    plain, other = (prepare_text(one.smaller, text, small(augment=share)) for share in (0.0, 1.0))
    assert [sequence.tolist() for sequence in plain.held_out] == [sequence.tolist() for sequence in other.held_out]
    assert [sequence.tolist() for sequence in plain.train] == [sequence.tolist() for sequence in other.train]
    special = set(one.smaller.tokenizer.all_special_ids)
    changed = 0
    for epoch in range(4):
        for index, sequence in enumerate(other.train):
            found = other.augmentation(sequence, (0, 1 + epoch, index))
            assert 1 < len(found) <= len(sequence)
            assert found[0] == sequence[0]  # [CLS] or BOS stays
            assert torch.equal(found, other.augmentation(sequence, (0, 1 + epoch, index)))
            rest = iter(sequence.tolist())  # in lower case, with words and full stops missing, the order is the text's
            assert all(word in rest for word in found.tolist() if word not in special)
            changed += not torch.equal(found, sequence)
    assert changed > len(other.train) / 2


def test_the_share_that_is_rewritten_is_the_one_asked_for(patient, text, small):
    one = patient()
    counts = []
    for share in (0.25, 0.5, 1.0):
        prepared = prepare_text(one.smaller, text, small(augment=share))
        found = [
            not torch.equal(prepared.augmentation(sequence, (0, epoch, index)), sequence)
            for epoch in range(20)
            for index, sequence in enumerate(prepared.train)
        ]
        counts.append(np.mean(found))
    assert counts[0] / counts[2] == pytest.approx(0.25, abs=0.05)
    assert counts[1] / counts[2] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("name", "share"), [("llama", 0.5), ("bert-masked", None), ("bert", None), ("distilbert-classifier", None)]
)
def test_models_that_continue_text_read_other_writings_by_default(patient, text, small, name, share):
    prepared = prepare_text(patient(name).smaller, text, small(augment=None))
    assert (None if prepared.augmentation is None else prepared.augmentation.share) == share


def test_a_batch_of_rewritten_sequences_asks_about_what_is_read(patient, text, small):
    prepared = prepare_text(patient().smaller, text, small(augment=1.0))
    batch = prepared.batch(prepared.drawn(0, 8))
    assert batch.num_tokens < 8 * 16  # some are shorter now, and padded
    expected = torch.where(batch.keep[:, 1:], batch.inputs[:, 1:], -100)
    assert torch.equal(batch.words[:, :-1], expected)


# --- prompts ---


def test_a_batch_with_prompts_has_no_words_of_its_own_there(patient, text, small):
    """The answers in prompts are drawn: a share of the loss on the text's own tokens must not count them."""
    one = patient()
    form = "the cat {text} a dog {sees|runs}"
    prepared = prepare_text(one.smaller, text, small(augment=0.0, forms=(form,), seq_len=24))
    plain = prepare_text(one.smaller, text, small(augment=0.0, seq_len=24))
    seen = set()
    for start in range(0, 80, 8):
        batch, other = prepared.batch(prepared.drawn(start, 8)), plain.batch(plain.drawn(start, 8))
        assert torch.equal(batch.asked, batch.keep)
        for row in range(8):
            real = batch.inputs[row][batch.keep[row]]
            is_prompt = not torch.equal(real, other.inputs[row][other.keep[row]])
            assert bool((batch.words[row] == -100).all()) == is_prompt
            seen.add(is_prompt)
    assert seen == {False, True}
    held_out = prepared.held_out_batch(range(len(prepared.held_out)))
    assert torch.equal(held_out.words, plain.held_out_batch(range(len(plain.held_out))).words)


def test_healing_on_prompts_is_in_the_record(patient, text, small):
    one = patient()
    form = "the cat {text} a dog {sees|runs}"
    _, healing, _ = heal(one.dense, one.smaller, one.plan, text, small(budget="2k", forms=(form,), label_weight=0.3))
    assert healing.settings["forms"] == [form]
    assert healing.settings["form_share"] == HEALING_SHARE
    prepared = prepare_text(one.smaller, text, small(budget="2k", forms=(form,), label_weight=0.3))
    assert prepared.augmentation is not None
    assert prepared.augmentation.form_share == HEALING_SHARE
    assert all(np.isfinite(point.loss) for point in healing.losses)
    assert healing.settings["written"] == NUM_WRITTEN


@pytest.mark.parametrize(("forms", "written"), [((), None), (("a cat {text} {sees|runs}",), 0)])
def test_nothing_is_written_without_forms_or_where_none_is_wanted(patient, text, small, forms, written):
    one = patient()
    _, healing, _ = heal(one.dense, one.smaller, one.plan, text, small(budget="1k", forms=forms, written=written))
    assert healing.settings["written"] == 0
    assert healing.answers is None


def test_the_dense_model_writes_what_stands_in_the_prompts(patient, text, small, tmp_path, monkeypatch):
    one, calls = patient(), []
    form = "the cat {text} a dog {sees|runs}"

    def writes(loaded, wanted, **how):
        calls.append((wanted, how["seed"]))
        return {form: (("bird bird bird bird",),)}

    monkeypatch.setattr(room, "write_rows", writes)
    seen = []
    batch_of = HealingText.batch
    monkeypatch.setattr(HealingText, "batch", lambda self, drawn: seen.append(batch_of(self, drawn)) or seen[-1])
    settings = small(budget="4k", forms=(form, "a cat {text}"), written=5, seed=3, augment=0.0, seq_len=24)
    heal(one.dense, one.smaller, one.plan, text, settings, checkpoint_folder=tmp_path)
    assert calls == [({form: 5, "a cat {text}": 5}, 3)]
    read = " ".join(one.smaller.tokenizer.decode(row) for batch in seen for row in batch.inputs)
    assert "the cat bird bird bird bird a dog" in read
    # A run that goes on reads what was written.
    heal(one.dense, one.smaller, one.plan, text, settings, checkpoint_folder=tmp_path)
    assert len(calls) == 1


def test_what_is_written_already_is_not_written_again(patient, text, small, monkeypatch):
    one = patient()
    form = "the cat {text} a dog {sees|runs}"
    monkeypatch.setattr(room, "write_rows", None)
    settings = small(budget="1k", forms=(form,), seq_len=24)
    draw = np.random.default_rng(0)
    rows = {form: tuple((" ".join(draw.choice(WORDS, size=5)),) for _ in range(60))}
    _, healing, _ = heal(one.dense, one.smaller, one.plan, text, settings, rows=rows)
    assert healing.answers is not None
    assert healing.answers.num_prompts == 60


def test_healing_ends_with_a_solve_for_the_answers(patient, text, small):
    one = patient()
    settings = small(budget="1k", forms=("the cat {text} a dog {sees|likes}",), seq_len=24, written=120)
    healed, healing, _ = heal(one.dense, one.smaller, one.plan, text, settings)
    found = healing.answers
    assert found is not None
    assert found.num_prompts >= LEAST
    assert all(parameter.requires_grad for parameter in healed.model.parameters())
    without, other, _ = heal(one.dense, one.smaller, one.plan, text, settings.model_copy(update={"written": 0}))
    assert other.answers is None
    assert not torch.equal(run(healed.model, torch.arange(5, 15)[None]), run(without.model, torch.arange(5, 15)[None]))


def test_sentences_for_prompts_without_answers_are_written_too_and_none_is_kept_out(patient, text, small, monkeypatch):
    """Nothing is asked there, so nothing judges, and no share of the time is set aside for a solve."""
    one, now = patient(), [0.0]
    form = "the cat {text}"
    rows = {form: tuple((f"{word} {word} {word} {word}",) for word in WORDS[:4])}
    monkeypatch.setattr(room, "write_rows", lambda loaded, wanted, **how: {form: rows[form] for form in wanted})
    seen = []
    batch_of = HealingText.batch
    monkeypatch.setattr(HealingText, "batch", lambda self, drawn: seen.append(batch_of(self, drawn)) or seen[-1])

    def clock():
        now[0] += 1
        return now[0]

    settings = small(
        budget=Budget(seconds=400), forms=(form,), augment=0.0, seq_len=24, patience=1000, learning_rate=1e-9
    )
    _, healing, _ = heal(one.dense, one.smaller, one.plan, text, settings, clock=clock)
    assert healing.answers is None
    assert healing.settings["written"] == NUM_WRITTEN
    assert healing.seconds > 0.96 * 400
    read = " ".join(one.smaller.tokenizer.decode(row) for batch in seen for row in batch.inputs)
    for (sentence,) in rows[form]:
        assert f"the cat {sentence}" in read


def test_writing_is_part_of_the_budget(patient, text, small, monkeypatch):
    """A tenth of the time at most, and what it took is gone when training begins."""
    one, now, asked = patient(), [0.0], []
    form = "the cat {text} a dog {sees|runs}"

    def writes(loaded, forms, *, may_go_on, **how):
        while may_go_on():
            asked.append(now[0])
            now[0] += 30
        return {}

    monkeypatch.setattr(room, "write_rows", writes)

    def clock():
        now[0] += 1
        return now[0]

    settings = small(budget=Budget(seconds=1000), forms=(form,), seq_len=24)
    _, healing, _ = heal(one.dense, one.smaller, one.plan, text, settings, clock=clock)
    assert 60 <= asked[-1] <= 110
    assert healing.validation[0].seconds >= asked[-1]
    assert healing.seconds <= 1000


def test_prompts_to_write_are_refused_without_any(patient, text, small):
    one = patient()
    with pytest.raises(ConfigError, match=r"the forms of prompts.*none were named.*--form"):
        heal(one.dense, one.smaller, one.plan, text, small(written=5))


# --- adapters ---


def test_merged_adapters_answer_as_the_model_with_adapters(patient, text, small, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(weights, "LEAD", 1)
    one, seen = patient("gpt2"), {}
    token_ids = torch.arange(5, 17)[None]
    merge = room.merge

    def watched(trained):
        seen["adapters"] = run(trained.adapters.get_base_model(), token_ids)
        seen["names"] = list(trained.parameters)
        merge(trained)

    monkeypatch.setattr(room, "merge", watched)
    healed, healing, _ = heal(one.dense, one.smaller, one.plan, text, small(weights="lora", rank=4))
    assert healing.after.loss < healing.before.loss
    assert largest_difference(run(healed.model, token_ids), seen["adapters"]) < 1e-4
    assert largest_difference(run(healed.model, token_ids), run(one.smaller.model, token_ids)) > 1e-3
    assert healed.model.state_dict().keys() == one.smaller.model.state_dict().keys()
    assert all("lora" in name for name in seen["names"])
    assert not any(".h.0." in name for name in seen["names"])


def test_adapters_without_peft_say_what_to_install(patient, text, small, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    one = patient()
    with pytest.raises(ConfigError, match=r"pip install peft"):
        heal(one.dense, one.smaller, one.plan, text, small(weights="lora"))


# --- bad input ---


def test_too_little_text(patient, small):
    one = patient("bert")
    with pytest.raises(DataError, match="one to train on and one held out"):
        heal(one.dense, one.smaller, one.plan, Texts(texts=("the cat sees",), source="x"), small())


def test_no_tokenizer(patient, text, small):
    one = patient()
    with pytest.raises(DataError, match="no tokenizer"):
        heal(one.dense, dataclasses.replace(one.smaller, tokenizer=None), one.plan, text, small())


def test_models_and_plan_must_belong_together(patient, text, small):
    one, other = patient(), patient("qwen3")
    wrong = Plan(num_blocks=9, removed=(1,), method="explicit", rule="by hand")
    with pytest.raises(InvalidPlanError, match="keeps 8 of 9 blocks"):
        heal(one.dense, one.smaller, wrong, text, small())
    encoder = adopt(ARCHITECTURES["qwen3-body"](), word_tokenizer())
    with pytest.raises(UnsupportedArchitectureError, match="a `causal` head, the smaller one 99, 32 and `encoder`"):
        heal(other.dense, cut(encoder, other.plan), other.plan, text, small())


@pytest.mark.parametrize("which", ["dense", "smaller"])
def test_weights_that_are_no_numbers(patient, text, small, which):
    one = patient()
    model = copy.deepcopy(getattr(one, which).model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    broken = dataclasses.replace(one, **{which: dataclasses.replace(getattr(one, which), model=model)})
    with pytest.raises(NumericalError, match="before the first step"):
        heal(broken.dense, broken.smaller, broken.plan, text, small())


def test_a_loss_that_explodes_is_reported(patient, text, small):
    one = patient()
    with pytest.raises(NumericalError, match="--learning-rate"):
        heal(one.dense, one.smaller, one.plan, text, small(learning_rate=1e30, clip=1e30, validations=1))


def test_steps_are_thinned_to_a_curve():
    points = [HealingStep(step=index, num_tokens=index, seconds=index, loss=float(index)) for index in range(1000)]
    thin = loop_room._thinned(points)
    assert len(thin) == 100
    assert thin[0].loss == pytest.approx(4.5)
    assert thin[-1].step == 999


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("bert", {"temperature": 2.0}, "`--temperature 2` .* `encoder` predicts none"),
        ("bert", {"label_weight": 0.5}, "`--label-weight 0.5` .* healed without"),
        ("bert-classifier", {"label_weight": 0.0}, "`--label-weight 0` .* `--labels COLUMN`"),
        ("bert", {"short": 0.5}, "`--short 0.5` .* rows, as the head `encoder` reads"),
        ("llama", {"short": 1.0}, "`--short 1` .* 128 tokens or more .* windows of 16"),
        ("llama", {"rank": 4}, "`--rank 4` .* `--weights lora`"),
        ("llama", {"rank": 4, "weights": "blocks"}, "`--weights blocks` trains none"),
    ],
)
def test_settings_that_nothing_reads_are_refused(patient, text, small, name, settings, named):
    one = patient(name)
    with pytest.raises(ConfigError, match=named):
        heal(one.dense, one.smaller, one.plan, text, small(**settings))
