"""Repair of a cut: exact where an exact answer exists, held to slow oracles where none does, and never harmful."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tools.sweep.shrink import small_model
from torch import nn
from transformers import PreTrainedModel

from avss.compensation import METHODS, compensate, rounds_for
from avss.compensation.divergence import Yardstick, divergence
from avss.compensation.equations import choose_ridge
from avss.compensation.least_squares import refit, residual_error
from avss.compensation.magnitude import magnitude_ratio, scale
from avss.compensation.rounds import RIDGE, _aim, targets
from avss.compensation.streams import ordinary, read_block, split
from avss.compensation.sweep import sweep
from avss.compensation.workpiece import Workpiece
from avss.cut import cut
from avss.data.batches import Batches
from avss.errors import ConfigError, DataError
from avss.models import projections
from avss.models.forward import run_outputs
from avss.models.load import Loaded, adopt
from avss.models.projections import (
    PROJECTIONS,
    bias_of,
    by_token,
    find_by_trial,
    find_first_by_trial,
    find_normed_by_trial,
    find_projections,
    matrix_of,
    set_linear,
)
from avss.models.walk import Walk
from tests.compensation.conftest import random_images, random_text, read_by, without
from tests.support.architectures import ARCHITECTURES, stored, token_batch
from tests.support.images import VISION

KNOWN = [name for name in ARCHITECTURES if stored(name).config.model_type in PROJECTIONS]
FACTS = {name: PROJECTIONS[stored(name).config.model_type] for name in KNOWN}
SUMMED = [name for name in KNOWN if not FACTS[name].obstacle]
PRE_NORM = [name for name in SUMMED if not FACTS[name].closing_norm]
NORMED = [name for name in KNOWN if FACTS[name].obstacle]
SEEING = [name for name, family in VISION.items() if not family.tower]
SOME = ["llama-tied", "gpt2", "granite", "bert-classifier", "distilbert", "gemma2", "opt", *SEEING]
"""One of each kind: tied, Conv1D with biases, a gain, post-norm with a head, post-norm without, normed outputs, and
without facts, its MLP's rows flattened; and all that read images."""


def tiny(class_name: str, model_type: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    return lambda: small_model(getattr(transformers, class_name), model_type, **settings)


UNLISTED: dict[str, tuple[Callable[[], PreTrainedModel], str | None]] = {
    "bloom": (tiny("BloomForCausalLM", "bloom", n_layer=5), "mlp.dense_4h_to_h"),
    "falcon": (tiny("FalconForCausalLM", "falcon"), "mlp.dense_4h_to_h"),
    "minicpm3": (tiny("MiniCPM3ForCausalLM", "minicpm3", scale_depth=0.4), "mlp.down_proj"),
    "mpt": (tiny("MptForCausalLM", "mpt"), "ffn.down_proj"),
    "opt": (tiny("OPTForCausalLM", "opt"), "fc2"),
    "opt-post-norm": (tiny("OPTForCausalLM", "opt", do_layer_norm_before=False), None),
    "phi": (tiny("PhiForCausalLM", "phi"), "mlp.fc2"),
    "xlnet": (tiny("XLNetLMHeadModel", "xlnet"), None),
}
"""Name -> builder of a model of a type without facts, and the map that ends its blocks, as its source code has it; None
where the sum is normalised."""


def scaled(builder: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """Draws the vectors by which blocks scale what they write by channel; one channel of each is all but closed."""

    def build() -> PreTrainedModel:
        model, generator = builder(), torch.Generator().manual_seed(4)
        with torch.no_grad():
            for path, value in model.named_parameters():
                if "layer_scale" in path or "lambda_" in path:
                    value.copy_(0.2 + 1.8 * torch.rand(value.shape, generator=generator))
                    value[3] = 1e-6
        return model

    return build


SCALED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "dinov2-scaled": (scaled(VISION["dinov2"].build), "layer_scale2.lambda1"),
    "beit-scaled": (scaled(tiny("BeitForImageClassification", "beit", layer_scale_init_value=0.1)), "lambda_2"),
}
"""Name -> builder of a model whose blocks scale what they write by channel, and the last of these vectors."""


def built(name: str) -> PreTrainedModel:
    if name in SCALED:
        return SCALED[name][0]()
    if name in VISION:
        return VISION[name].build()
    return UNLISTED[name][0]() if name in UNLISTED else ARCHITECTURES[name]()


def begin(name: str, *removed: int) -> Workpiece:
    loaded = adopt(built(name))
    plan = without(len(loaded.stack), *removed)
    smaller = cut(loaded, plan)
    return Workpiece.begin(loaded, smaller, plan, find_projections(smaller))


@torch.no_grad()
def mean_divergence(dense: Loaded, smaller: Loaded, batches: Batches) -> float:
    """What a yardstick measures, by running both models on everything."""
    found = [divergence(dense, smaller, inputs, keep) for inputs, keep in batches]
    return sum(float(total) for total, _ in found) / sum(count for _, count in found)


def zero(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


# --- where blocks write ---


def test_every_type_with_facts_is_proven_here():
    assert {stored(name).config.model_type for name in KNOWN} == set(PROJECTIONS)
    assert all(find_projections(adopt(stored(name))) is FACTS[name] for name in KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_a_trial_finds_what_the_facts_say(name):
    """Two ways to the same answer; where outputs are normalised or the block is post-norm, the trial finds nothing."""
    loaded = adopt(stored(name))
    found = find_by_trial(loaded)
    if name not in PRE_NORM:
        assert found is None
        return
    assert found is not None
    assert (found.attention, found.mlp) == (FACTS[name].attention, FACTS[name].mlp)
    assert found.gain(loaded.model.config) == pytest.approx(FACTS[name].gain(loaded.model.config), rel=1e-4)


def test_unknown_type_is_repaired_by_what_a_trial_shows_and_none_without_a_map():
    loaded = adopt(ARCHITECTURES["granite"]())
    loaded.model.config.model_type = "unheard"
    facts = find_projections(loaded)
    assert facts is not None
    assert (facts.attention, facts.mlp) == ("self_attn.o_proj", "mlp.down_proj")
    assert facts.measured_gain == pytest.approx(0.7, rel=1e-4)
    block = loaded.stack.blocks[1]
    block.mlp.down_proj = nn.Sequential(block.mlp.down_proj)  # no longer where the other blocks have theirs
    facts = find_projections(loaded)
    assert facts is not None
    assert (facts.attention, facts.mlp) == ("self_attn.o_proj", None)
    assert facts.measured_gain == pytest.approx(0.7, rel=1e-4)
    block.self_attn.o_proj = nn.Sequential(block.self_attn.o_proj)
    assert find_projections(loaded) is None


@pytest.mark.parametrize("name", [*UNLISTED, *KNOWN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_trial_finds_the_same_in_every_dtype(name, dtype):
    """Half precision rounds the sum a thousand times more coarsely than the limit for float32 allows."""
    expected = UNLISTED[name][1] if name in UNLISTED else FACTS[name].mlp if name in PRE_NORM else None
    found = find_by_trial(adopt(built(name).to(dtype)))
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.mlp == expected
    gain = {"granite": 0.7, "minicpm3": 0.4 / 5**0.5}.get(name)
    assert found.measured_gain == (1.0 if gain is None else pytest.approx(gain, rel=2e-3))


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("bloom", "self_attention.dense"),
        ("falcon", "self_attention.dense"),
        ("minicpm3", "self_attn.o_proj"),
        ("mpt", "attn.out_proj"),
        ("opt", "self_attn.out_proj"),
        ("phi", "self_attn.dense"),
        ("vit", "attention.o_proj"),
        ("siglip", "self_attn.out_proj"),
    ],
)
def test_a_trial_finds_both_maps_of_types_without_facts(name, attention):
    """One after the other or beside each other (Falcon, Phi), as their source code has it."""
    found = find_by_trial(adopt(built(name)))
    assert found is not None
    assert found.attention == attention


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_trial_finds_what_the_attention_writes(name, dtype):
    """Where it is added as it is, post-norm blocks included; where a norm comes first, nothing is found."""
    loaded = adopt(built(name).to(dtype))
    found = find_first_by_trial(loaded)
    if name in NORMED:
        assert found is None
        return
    assert found is not None
    assert (found.attention, found.mlp) == (FACTS[name].attention, None)
    assert found.gain(loaded.model.config) == pytest.approx(FACTS[name].gain(loaded.model.config), rel=2e-3)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_trial_finds_what_is_normalised_before_it_is_added(name, dtype):
    """Both maps of the blocks that do so, and nothing in any other, post-norm blocks included."""
    found = find_normed_by_trial(adopt(built(name).to(dtype)))
    assert found == (FACTS[name] if name in NORMED else None)


@pytest.mark.parametrize(
    ("class_name", "model_type", "last"),
    [
        ("Exaone4ForCausalLM", "exaone4", "mlp.down_proj"),
        ("Gemma4ForCausalLM", "gemma4_text", "per_layer_projection"),
        ("Glm4ForCausalLM", "glm4", "mlp.down_proj"),
        ("Olmo3ForCausalLM", "olmo3", "mlp.down_proj"),
        ("Olmo2ForCausalLM", "olmo2", "mlp.down_proj"),
    ],
)
def test_types_without_facts_that_normalise_what_they_write_are_steered(class_name, model_type, last, monkeypatch):
    monkeypatch.setattr(projections, "PROJECTIONS", {})
    loaded = adopt(tiny(class_name, model_type)())
    plan = without(len(loaded.stack), len(loaded.stack) // 2)
    smaller = cut(loaded, plan)
    facts = find_projections(smaller)
    assert facts is not None
    assert facts.writers == ("self_attn.o_proj", last)
    repaired, story = compensate(loaded, smaller, plan, random_text(), method="steer", rounds=1)
    assert story.before >= story.after
    assert story.applied == (repaired is not smaller)


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("DeepseekV3ForCausalLM", "deepseek_v3"),
        ("GptOssForCausalLM", "gpt_oss"),
        ("Llama4ForCausalLM", "llama4_text"),
        ("MixtralForCausalLM", "mixtral"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
    ],
)
def test_mixtures_of_experts_are_steered_by_what_their_attention_writes(class_name, model_type):
    loaded = adopt(tiny(class_name, model_type)())
    plan = without(len(loaded.stack), len(loaded.stack) // 2)
    smaller = cut(loaded, plan)
    facts = find_projections(smaller)
    assert facts is not None
    assert (facts.attention, facts.mlp) == ("self_attn.o_proj", None)
    work = Workpiece.begin(loaded, smaller, plan, facts)
    assert targets(work) == [(block, "self_attn.o_proj") for block in plan.kept if block >= plan.removed[0] - 1]
    repaired, story = compensate(loaded, smaller, plan, random_text(), method="refit")
    assert repaired is smaller
    assert "experts" in story.note
    assert "`steer` can" in story.note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "bend",
    [
        lambda out: 10 * torch.tanh(out / 10),
        lambda out: out * (1 + 0.1 * torch.sigmoid(out)),
        lambda out: torch.nn.functional.layer_norm(out, out.shape[-1:]),
        lambda out: out * torch.linspace(0.9, 1.1, out.shape[-1]).to(out),  # each channel by a gain of its own
        lambda out: out * torch.linspace(0.9, 1.1, out.shape[1]).to(out)[:, None],  # each token
        lambda out: out.roll(1, dims=1),  # written to the next token
    ],
    ids=["softcap", "gate", "norm", "channels", "tokens", "shift"],
)
def test_what_bends_on_its_way_to_the_sum_is_no_summand_in_any_dtype(bend, dtype):
    loaded = adopt(ARCHITECTURES["llama"]().to(dtype))
    for block in loaded.stack.blocks:
        block.mlp.register_forward_hook(lambda _, __, output: bend(output))
        block.self_attn.register_forward_hook(lambda _, __, output: (bend(output[0]), *output[1:]))
    found = find_by_trial(loaded)
    assert found is None or found.mlp != "mlp.down_proj"
    assert find_first_by_trial(loaded) is None


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("which", ["attention", "mlp"])
def test_summed_projections_are_plain_summands(name, which):
    """A change of the weight moves what the block returns by gain times change times input, and by nothing else."""
    loaded = adopt(ARCHITECTURES[name]())
    facts = find_projections(loaded)
    path = getattr(facts, which)
    if which == "attention" and facts.closing_norm:
        pytest.skip("normalised before it is summed")
    block = loaded.stack.blocks[1]
    if which == "attention":
        zero(block.get_submodule(facts.mlp))  # it reads what the attention wrote
    token_ids, keep = token_batch()
    before = read_block(loaded, 1, facts, (path,), token_ids, keep)
    module = block.get_submodule(path)
    change = 0.1 * torch.randn(matrix_of(module).shape, generator=torch.Generator().manual_seed(3))
    set_linear(module, matrix_of(module) + change, None, stored_dtype=torch.float32)
    after = read_block(loaded, 1, facts, (), token_ids, keep)
    expected = before.state + facts.gain(loaded.model.config) * before.features[0] @ change.T
    torch.testing.assert_close(after.state[keep], expected[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NORMED)
def test_families_said_to_normalise_their_outputs_do(name):
    loaded = adopt(ARCHITECTURES[name]())
    facts = find_projections(loaded)
    token_ids, keep = token_batch()
    before = read_block(loaded, 1, facts, (), token_ids, keep).state
    module = loaded.stack.blocks[1].get_submodule(facts.mlp)
    set_linear(module, 3 * matrix_of(module), None, stored_dtype=torch.float32)
    torch.testing.assert_close(read_block(loaded, 1, facts, (), token_ids, keep).state, before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_rows_of_all_tokens_are_read_as_tokens_of_sequences():
    """OPT lays the tokens of a batch out in one row after another before its MLP."""
    loaded = adopt(built("opt"))
    facts = find_projections(loaded)
    token_ids, keep = token_batch()
    written = read_block(loaded, 2, facts, (facts.mlp,), token_ids, keep)
    block = loaded.stack.blocks[2]
    middle: list[torch.Tensor] = []
    handle = block.final_layer_norm.register_forward_pre_hook(lambda _, args: middle.append(args[0]))
    loaded.model(input_ids=token_ids, attention_mask=keep.long())
    handle.remove()
    summed = middle[0].reshape(*token_ids.shape, -1) + written.features[0] @ block.fc2.weight.T + block.fc2.bias
    torch.testing.assert_close(written.state, summed)
    assert by_token(torch.ones(7, 4), token_ids.shape).shape == (7, 4)  # not one row a token: left as it is


def test_reading_a_block_stops_there_and_leaves_no_hook():
    loaded = adopt(ARCHITECTURES["llama"]())
    ran = []
    for index, block in enumerate(loaded.stack.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    facts = find_projections(loaded)
    read_block(loaded, 2, facts, facts.writers, *token_batch())
    assert ran == [0, 1, 2]
    assert not loaded.stack.blocks[2].mlp.down_proj._forward_pre_hooks
    assert len(loaded.stack.blocks[2]._forward_hooks) == 1


# --- exact answers ---


def replicate(loaded: Loaded, block: int) -> None:
    """Makes block `block + 1` read what block `block` reads, and add a map of its own of the same MLP activations.

    Block `block`'s own MLP writes nothing, and the next block's attention neither: both MLPs then see the same, and
    removing the second is made up for exactly by moving its projection into the first.
    """
    facts = find_projections(loaded)
    first, second = loaded.stack.blocks[block], loaded.stack.blocks[block + 1]
    own = copy.deepcopy(second.get_submodule(facts.mlp).state_dict())
    closing = copy.deepcopy(second.get_submodule(facts.closing_norm).state_dict()) if facts.closing_norm else None
    second.load_state_dict(first.state_dict())
    second.get_submodule(facts.mlp).load_state_dict(own)
    zero(first.get_submodule(facts.mlp))
    zero(second.get_submodule(facts.attention))
    if closing is not None:
        # A norm of normalised states is the identity where it has no weight of its own.
        for one in (first, second):
            for module in one.modules():
                if isinstance(module, nn.LayerNorm):
                    nn.init.ones_(module.weight)
                    nn.init.zeros_(module.bias)
                    module.eps = 1e-12
        second.get_submodule(facts.closing_norm).load_state_dict(closing)


@pytest.mark.parametrize("name", [*SUMMED, "opt"])
def test_linear_function_of_the_previous_mlp_is_recovered(name, monkeypatch):
    least = functools.partial(choose_ridge, ridges=(1e-10,))
    monkeypatch.setattr("avss.compensation.least_squares.choose_ridge", least)
    loaded = adopt(built(name))
    replicate(loaded, 1)
    plan = without(len(loaded.stack), 2)
    smaller = cut(loaded, plan)
    work = Workpiece.begin(loaded, smaller, plan, find_projections(smaller))
    text = random_text(24, 24)
    before = mean_divergence(loaded, smaller, text)
    refit(work, (2, 3), text, text)
    facts = work.facts
    expected = loaded.stack.blocks[2].get_submodule(facts.mlp)
    found = work.linear(1, facts.mlp)
    torch.testing.assert_close(matrix_of(found), matrix_of(expected), rtol=0, atol=1e-3)
    after = mean_divergence(loaded, work.smaller, text)
    assert after < 1e-6 + 1e-5 * before
    assert before > 1e-4


def observe(model, index, facts, keep_pair, batch, keep) -> None:
    """The MLP projection's input and the block's sum, by a whole forward pass with plain hooks."""
    block, found = model.stack.blocks[index], []
    handles = [block.get_submodule(facts.mlp).register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    if facts.closing_norm:
        norm = block.get_submodule(facts.closing_norm)
        handles.append(norm.register_forward_pre_hook(lambda _, args: found.append(args[0])))
    else:
        handles.append(block.register_forward_hook(lambda _, __, output: found.append(output)))
    run_outputs(model, batch, keep)
    for handle in handles:
        handle.remove()
    keep_pair(tuple(found))


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "bert", "opt", "vit", "siglip", *SCALED])
def test_refit_is_the_ridge_solution_over_collected_matrices(name, monkeypatch):
    """The MLP's projection alone, one ridge: against numpy over every token's input and residual in one matrix.

    What is solved for is what the block writes: the weight is that over the block's gain, and channels that are all but
    closed keep theirs.
    """
    monkeypatch.setattr("avss.compensation.least_squares.choose_ridge", functools.partial(choose_ridge, ridges=(0.01,)))
    work = begin(name, 2)
    facts = work.facts
    text = read_by(work.original)
    inputs, missing, anchors = [], [], []
    if facts.closing_norm:
        work.copy_norm(1, facts.closing_norm, work.original.stack.blocks[2].get_submodule(facts.closing_norm))
    gain = facts.gain_of(work.original.stack.blocks[1], work.original.owner).expand(32).numpy()
    for batch, keep in text:
        seen: dict[str, torch.Tensor] = {}
        for model, index, key in ((work.original, 2, "aim"), (work.smaller, 1, "now")):
            observe(model, index, facts, functools.partial(seen.__setitem__, key), batch, keep)
        usual = keep.clone()
        usual[:, 0] = False
        for rows, store in ((usual, (inputs, missing)), (keep & ~usual, (anchors, anchors))):
            store[0].append(seen["now"][0].reshape(*keep.shape, -1)[rows].double())
            store[1].append((seen["aim"][1] - seen["now"][1])[rows].double())
    features, residuals = torch.cat(inputs).numpy(), torch.cat(missing).numpy()
    width = features.shape[1]
    extra = [torch.cat(anchors[0::2]).numpy(), torch.cat(anchors[1::2]).numpy()]
    has_bias = bias_of(work.linear(1, facts.mlp)) is not None
    shrink = np.sqrt(0.01 * np.mean(np.sum(features**2, 0))) * np.eye(features.shape[1])
    rows, aims = np.vstack([features, extra[0], shrink]), np.vstack([residuals, extra[1], np.zeros((width, 32))])
    if has_bias:
        ones = np.concatenate([np.ones(len(features) + len(extra[0])), np.zeros(len(shrink))])[:, None]
        rows = np.hstack([rows, ones])
    solution = np.linalg.lstsq(rows, aims, rcond=None)[0]
    before = matrix_of(work.linear(1, facts.mlp)).double()
    refit(work, (2, 3), text, text)
    change = (matrix_of(work.linear(1, facts.mlp)).double() - before).numpy().T
    expected = np.where(gain > 1e-3, solution[:width] / np.maximum(gain, 1e-3), 0)
    np.testing.assert_allclose(change, expected, atol=2e-5 / min(1.0, np.min(gain[gain > 1e-3])))


def test_scale_is_refused_where_a_trial_does_not_show_all_that_writes():
    """T5's decoder writes three times a block."""
    loaded = adopt(built("opt"))
    plan = without(len(loaded.stack), 2)
    smaller = cut(loaded, plan)
    repaired, story = compensate(loaded, smaller, plan, random_text(), method="scale")
    assert repaired is smaller
    assert story.note


def test_scale_is_the_ratio_of_mean_magnitudes():
    work = begin("llama", 2, 3)
    text = random_text(ragged=False)
    before, after = [], []
    for token_ids, _ in text:
        with torch.no_grad():
            states = work.original.model(input_ids=token_ids, output_hidden_states=True).hidden_states
        before.append(states[2][:, 1:])
        after.append(states[4][:, 1:])
    ratio = torch.cat(after).double().abs().mean((0, 1)) / torch.cat(before).double().abs().mean((0, 1))
    assert magnitude_ratio(work, (2, 4), text) == pytest.approx(float(ratio.mean()), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in PRE_NORM if "tied" in name or name in ("llama", "gpt2", "olmo")])
def test_scale_after_the_cut_is_the_published_scale_before_it(name):
    """Dividing what comes after by alpha equals multiplying embeddings and what comes before, the head aside."""
    work = begin(name, 2)
    facts = work.facts
    published = copy.deepcopy(work.smaller.model)
    factor = scale(work, (2, 3), random_text())
    with torch.no_grad():
        head = copy.deepcopy(published.get_output_embeddings())
        published.set_output_embeddings(head)
        for module in published.base_model.children():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(factor)
        stack = published.get_submodule(work.smaller.stack.path)
        for block in stack[:2]:
            for path in (facts.attention, facts.mlp):
                for parameter in block.get_submodule(path).parameters():
                    parameter.mul_(factor)
        published.lm_head = head
    token_ids, keep = token_batch(padded=False)
    expected = run_outputs(dataclasses.replace(work.smaller, model=published), token_ids, keep)
    found = run_outputs(work.smaller, token_ids, keep)
    assert factor != pytest.approx(1, abs=0.02)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


# --- the sweep ---


@pytest.mark.parametrize("name", PRE_NORM)
def test_a_walk_computes_what_the_model_computes(name):
    loaded = adopt(stored(name))
    token_ids, keep = token_batch()
    facts = find_projections(loaded)
    walk = Walk.begin(loaded, 1, token_ids, keep)
    for place in range(1, len(loaded.stack)):
        walk.hidden = walk.through(loaded, place)
        expected = read_block(loaded, place, facts, (), token_ids, keep).state
        torch.testing.assert_close(walk.hidden[keep], expected[keep])


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "granite", "qwen2-sliding", "opt"])
def test_a_sweep_recovers_what_is_exact_and_nears_the_dense_stream_at_every_depth(name, monkeypatch):
    monkeypatch.setattr("avss.compensation.sweep.choose_ridge", functools.partial(choose_ridge, ridges=(1e-10,)))
    text = random_text(24, 24)
    loaded = adopt(built(name))
    replicate(loaded, 1)
    plan = without(len(loaded.stack), 2)
    work = Workpiece.begin(loaded, cut(loaded, plan), plan, find_projections(loaded))
    assert sweep(work, text, text) >= 1
    assert mean_divergence(loaded, work.smaller, text) < 1e-6
    # Nothing exact here, so every block has its share: the error is less than without the sweep, at each depth.
    work = begin(name, 2)
    raw = begin(name, 2)
    blocks = [block for block in work.plan.kept if block >= 1]
    assert sweep(work, text, text) == len(blocks)
    for block in blocks:
        run = (block + 1, 3 if block == 1 else block + 1)
        assert residual_error(work, run, text) < residual_error(raw, run, text)


# --- rounds ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_direction_is_the_preconditioned_gradient(name):
    work = begin(name, 2)
    text = random_text(4, batch_size=4)
    keys = targets(work)
    aim = _aim(work, keys, text)
    found, slope = aim.directions, 0.0
    ((token_ids, keep),) = list(text)
    for block, path in keys:
        module = work.linear(block, path)
        inputs, outputs = [], []

        def record(_, args, output, inputs=inputs, outputs=outputs):
            output.requires_grad_(True)
            output.retain_grad()
            inputs.append(args[0].detach())
            outputs.append(output)

        handle = module.register_forward_hook(record)
        total, count = divergence(
            work.original, work.smaller, token_ids, keep, places=torch.arange(0, token_ids.shape[1], 2)
        )
        total.backward()
        handle.remove()
        rows, gradients = (tensor.reshape(*keep.shape, -1)[keep].double() for tensor in (inputs[0], outputs[0].grad))
        moment = rows.T @ rows / len(rows)
        moment += RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        state = read_block(work.smaller, work.place(block), work.facts, (), token_ids, keep).state
        size = float(state[ordinary(state, keep)].square().mean())
        expected = -size * torch.linalg.inv(moment) @ rows.T @ gradients / count
        torch.testing.assert_close(found[block, path].matrix, expected.T, rtol=1e-3, atol=1e-5)
        slope += float((expected * (rows.T @ gradients / count)).sum())
        if bias_of(module) is not None:
            torch.testing.assert_close(found[block, path].bias, -size * gradients.sum(0) / count, rtol=1e-3, atol=1e-6)
            slope -= size * float((gradients.sum(0) / count).square().sum())
    assert aim.slope == pytest.approx(slope, rel=1e-3)
    # The slope is what the divergence does at first.
    small = 1e-3 * aim.first_step
    for (block, path), direction in found.items():
        work.add(block, path, small * direction.matrix, None if direction.bias is None else small * direction.bias)
    with torch.no_grad():
        total, count = divergence(
            work.original, work.smaller, token_ids, keep, places=torch.arange(0, token_ids.shape[1], 2)
        )
    assert float(total) / count - aim.divergence == pytest.approx(small * aim.slope, rel=0.05)


def test_rounds_change_nothing_before_the_first_cut():
    work = begin("llama", 3)
    assert targets(work) == [(b, p) for b in (2, 4) for p in ("self_attn.o_proj", "mlp.down_proj")]
    work = begin("llama", 0)
    assert {block for block, _ in targets(work)} == {1, 2, 3, 4}


@pytest.mark.parametrize(("num_tokens", "rounds"), [(100, 6), (6 * 6144, 6), (12 * 6144, 12), (10**7, 24)])
def test_more_text_gives_more_rounds(num_tokens, rounds):
    text = random_text(1)
    longer = dataclasses.replace(text, sequences=(torch.zeros(num_tokens, dtype=torch.long),))
    assert rounds_for(longer) == rounds


# --- laws of every method ---


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_helps_or_leaves_the_cut_as_it_was(name, method):
    loaded = adopt(built(name))
    plan = without(len(loaded.stack), 2)
    smaller = cut(loaded, plan)
    before = [(key, tensor.clone()) for key, tensor in loaded.model.state_dict().items()]
    text = read_by(loaded)
    repaired, story = compensate(loaded, smaller, plan, text, method=method, rounds=2)
    for key, tensor in before:
        torch.testing.assert_close(loaded.model.state_dict()[key], tensor, rtol=0, atol=0)
    if not story.applied:
        assert repaired is smaller
        assert story.note
        return
    judge = split(text)[2]
    assert story.unit == ("places" if name in SEEING else "tokens")
    assert story.judge_tokens == sum(int(keep.sum()) for _, keep in judge)
    assert story.after < story.before
    assert mean_divergence(loaded, repaired, judge) == pytest.approx(story.after, rel=1e-5)
    assert mean_divergence(loaded, smaller, judge) == pytest.approx(story.before, rel=1e-5)
    old, new = smaller.model.state_dict(), repaired.model.state_dict()
    assert old.keys() == new.keys()
    assert {key for key in new if new[key].data_ptr() != old[key].data_ptr()} == set(story.weights)
    assert not any(parameter.requires_grad for parameter in repaired.model.parameters())


def test_methods_do_repair_somewhere():
    """The law above must not hold by every method giving up everywhere."""
    applied = set()
    for name in ("gpt2", "granite", "opt", *SEEING):
        loaded = adopt(built(name))
        plan = without(len(loaded.stack), 2)
        smaller = cut(loaded, plan)
        for method in METHODS:
            if compensate(loaded, smaller, plan, read_by(loaded), method=method, rounds=2)[1].applied:
                applied.add((name, method))
    assert {method for name, method in applied if name in ("gpt2", "granite")} == set(METHODS) - {"none"}
    for name in ("opt", *SEEING):
        solved = () if name == "dinov2" else ("refit", "linear")
        assert {(name, method) for method in ("auto", "steer", *solved)} <= applied


def test_cut_that_needs_no_repair_gets_none():
    loaded = adopt(ARCHITECTURES["llama"]())
    facts = find_projections(loaded)
    for path in (facts.attention, facts.mlp):
        zero(loaded.stack.blocks[2].get_submodule(path))
    plan = without(len(loaded.stack), 2)
    smaller = cut(loaded, plan)
    repaired, story = compensate(loaded, smaller, plan, random_text(), method="auto", rounds=1)
    assert repaired is smaller
    assert not story.applied
    assert not any(one.applied for one in story.cuts)
    assert story.before == story.after


def test_padding_and_batch_size_do_not_matter():
    weights = []
    for batch_size in (1, 16):
        work = begin("gpt2", 2)
        text = random_text(batch_size=batch_size)
        refit(work, (2, 3), text, text)
        weights.append(matrix_of(work.linear(1, work.facts.mlp)))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_same_text_gives_the_same_repair():
    loaded = adopt(stored("llama"))
    plan = without(len(loaded.stack), 1, 3)
    stories = [compensate(loaded, cut(loaded, plan), plan, random_text(), rounds=2)[1] for _ in range(2)]
    assert stories[0] == stories[1]
    assert [(one.start, one.stop) for one in stories[0].cuts] == [(1, 2), (3, 4)]


def test_new_weights_are_what_will_be_stored():
    loaded = dataclasses.replace(adopt(ARCHITECTURES["gpt2"]()), stored_dtype=torch.bfloat16)
    plan = without(len(loaded.stack), 2)
    repaired, story = compensate(loaded, cut(loaded, plan), plan, random_text(), method="refit")
    state = repaired.model.state_dict()
    assert story.weights
    for name in story.weights:
        assert torch.equal(state[name], state[name].bfloat16().float())


def test_cut_at_the_first_block_is_skipped_with_a_sentence():
    loaded = adopt(stored("llama"))
    plan = without(len(loaded.stack), 0)
    repaired, story = compensate(loaded, cut(loaded, plan), plan, random_text(), method="refit")
    assert not story.applied
    assert "no block before the cut" in story.cuts[0].note
    assert repaired.stack.block_class == loaded.stack.block_class


def test_a_type_whose_blocks_have_no_map_in_common_is_left_alone_with_a_sentence():
    loaded = adopt(tiny("JambaForCausalLM", "jamba")())
    plan = without(len(loaded.stack), 0)
    smaller = cut(loaded, plan)
    repaired, story = compensate(loaded, smaller, plan, random_text())
    assert repaired is smaller
    assert "`jamba`" in story.note
    assert "llama" in story.note


def test_unknown_method_is_refused_with_a_near_name():
    loaded = adopt(stored("llama"))
    plan = without(len(loaded.stack), 2)
    with pytest.raises(ConfigError, match="refit"):
        compensate(loaded, cut(loaded, plan), plan, random_text(), method="refti")


# --- what is measured ---


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("gone", [(2,), (1, 3)])
def test_a_yardstick_measures_what_running_both_models_does(name, gone):
    loaded = adopt(stored(name))
    smaller = cut(loaded, without(len(loaded.stack), *gone))
    text = random_text(5)
    measure = Yardstick(loaded, text, num_shared=gone[0] - 1)
    for _ in range(2):  # the second time from memory
        assert measure(smaller) == pytest.approx(mean_divergence(loaded, smaller, text), rel=1e-5)
        assert measure(smaller) > 1e-6


def test_divergence_is_the_mean_kl_of_kept_places():
    loaded, other = adopt(stored("llama")), adopt(stored("mistral"))
    text = random_text(5)
    expected, places = 0.0, 0
    for token_ids, keep in text:
        p, q = (run_outputs(model, token_ids, keep).double().softmax(-1) for model in (loaded, other))
        expected += float((p * (p / q).log()).sum(-1)[keep].sum())
        places += int(keep.sum())
    assert mean_divergence(loaded, other, text) == pytest.approx(expected / places, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "bert-classifier", "bert-masked", "llama", "gemma2", "granite"])
def test_divergence_from_itself_is_zero_and_places_choose(name):
    loaded = adopt(stored(name))
    token_ids, keep = token_batch()
    assert mean_divergence(loaded, loaded, random_text(4)) == pytest.approx(0, abs=1e-6)
    other = cut(loaded, without(len(loaded.stack), 1))
    whole, count = divergence(loaded, other, token_ids, keep)
    parts = [
        divergence(loaded, other, token_ids, keep, places=torch.arange(first, token_ids.shape[1], 2))
        for first in (0, 1)
    ]
    if name != "bert-classifier":  # one answer a text, whatever the places
        assert sum(part[1] for part in parts) == count
        assert float(sum(part[0] for part in parts)) == pytest.approx(float(whole), rel=1e-4)


def test_ordinary_tokens_are_real_not_first_and_not_massive():
    hidden = torch.ones(2, 5, 4)
    hidden[0, 2] *= 50
    keep = torch.tensor([[True] * 5, [True, True, True, False, False]])
    expected = [[False, True, False, True, True], [False, True, True, False, False]]
    assert ordinary(hidden, keep).tolist() == expected
    lone = torch.tensor([[True, False]])
    assert ordinary(torch.ones(1, 2, 4), lone).tolist() == [[True, False]]


def test_text_is_dealt_out_in_three_without_overlap():
    text = random_text(16)
    fit, choose, judge = split(text)
    assert [len(part.sequences) for part in (fit, choose, judge)] == [12, 2, 2]
    dealt = [*fit.sequences, *choose.sequences, *judge.sequences]
    assert all(one is other for one, other in zip(dealt, text.sequences, strict=True))


@pytest.mark.parametrize("num_sequences", [1, 2, 3])
def test_little_text_is_cut_shorter_so_that_the_judge_has_not_been_seen(num_sequences):
    text = random_text(num_sequences, ragged=False)
    parts = split(text)
    dealt = torch.cat([sequence for part in parts for sequence in part.sequences])
    assert torch.equal(dealt, torch.cat(text.sequences))  # every token once
    assert all(part.sequences and min(map(len, part.sequences)) > 1 for part in parts)


def test_too_little_text_to_judge_by_is_refused():
    with pytest.raises(DataError, match="`drawn` gives 5 tokens, too few"):
        split(random_text(1, 5))


@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_sides_of_an_encoder_decoder_read_the_text(name, num_shared):
    loaded = adopt(stored(name))
    smaller, text = cut(loaded, without(len(loaded.stack), 2)), random_text(5)
    found = Yardstick(loaded, text, num_shared)(smaller)
    assert found == pytest.approx(by_hand(name, loaded, smaller, text), rel=1e-4)


@pytest.mark.parametrize("name", ["bert-reward", "bert-labels", "t5", "gpt2-padless"])
def test_other_heads_are_repaired_by_what_they_answer(name):
    loaded = adopt(stored(name))
    plan = without(len(loaded.stack), 2)
    smaller, text = cut(loaded, plan), random_text(24).padded_with(loaded.pad_id)
    repaired, story = compensate(loaded, smaller, plan, text, method="auto", rounds=2)
    assert story.applied, story.note
    assert story.measure == ("squared" if name == "bert-reward" else "kl")
    # Outputs in float32 move a distance that small by some 1e-7, whatever its size.
    for told, one in ((story.before, smaller), (story.after, repaired)):
        assert told == pytest.approx(by_hand(name, loaded, one, split(text)[2]), rel=1e-4, abs=2e-7)
    assert story.after < story.before


@torch.no_grad()
def by_hand(name: str, dense: Loaded, smaller: Loaded, text: Batches) -> float:
    """The mean distance of a place, a sequence at a time and with transformers alone."""
    rows = []
    for ids in text.sequences:
        more = {"decoder_input_ids": ids[None]} if name in ("t5", "bart") else {}
        truth, found = (one.model(input_ids=ids[None], **more).logits[0].double() for one in (dense, smaller))
        if name == "bert-reward":
            rows.append((truth - found) ** 2)
            continue
        if name == "bert-labels":
            truth, found = (torch.stack([logits, 0 * logits], -1) for logits in (truth, found))
        p, q = truth.softmax(-1), found.softmax(-1)
        distances = (p * (p / q).log()).sum(-1)
        rows.append(distances.sum()[None] if name == "bert-labels" else distances.reshape(-1))
    return float(torch.cat(rows).mean())


# --- images ---


@pytest.mark.parametrize("name", SEEING)
def test_an_image_is_judged_by_what_the_model_answers(name):
    """Labels by KL an image, bare encoders by the cosine of every place; against transformers, an image at a time."""
    loaded = adopt(built(name))
    smaller = cut(loaded, without(len(loaded.stack), 2))
    images = random_images(loaded, 5)
    rows = []
    for pixels in images.sequences:
        with torch.no_grad():
            truth, found = (one.model(pixel_values=pixels[None]) for one in (loaded, smaller))
        if "logits" in truth:
            p, q = truth.logits.double().softmax(-1), found.logits.double().softmax(-1)
            rows.append((p * (p / q).log()).sum(-1))
        else:
            states = (one.last_hidden_state[0].double() for one in (truth, found))
            rows.append(1 - torch.cosine_similarity(*states, dim=-1))
    for num_shared in (0, 1):
        measured = Yardstick(loaded, images, num_shared)(smaller)
        assert measured == pytest.approx(float(torch.cat(rows).mean()), rel=1e-4, abs=2e-7)


def test_a_repair_needs_three_images():
    loaded = adopt(built("vit"))
    with pytest.raises(DataError, match="gives 2"):
        split(random_images(loaded, 2))
    fit, choose, judge = split(random_images(loaded, 3))
    assert [len(part.sequences) for part in (fit, choose, judge)] == [1, 1, 1]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trial_finds_the_weight_that_scales_each_channel(name, dtype):
    loaded, last = adopt(built(name).to(dtype)), SCALED[name][1]
    before = {path: value.clone() for path, value in loaded.model.state_dict().items()}
    facts = find_projections(loaded)
    assert facts is not None
    assert (facts.channel_gain, facts.obstacle) == (last, None)
    assert (facts.attention, facts.mlp) == ("attention.o_proj", "mlp.fc2")
    after = loaded.model.state_dict()
    assert all(torch.equal(before[path], after[path]) for path in before)
    for block in loaded.stack.blocks:
        assert torch.equal(facts.gain_of(block, loaded.owner), block.get_parameter(last).double())


@pytest.mark.parametrize("name", SCALED)
def test_channels_scaled_apart_are_solved_for(name):
    loaded = adopt(built(name))
    plan = without(len(loaded.stack), 2)
    smaller = cut(loaded, plan)
    repaired, story = compensate(loaded, smaller, plan, random_images(loaded), method="auto", rounds=3)
    assert story.applied, story.note
    assert all(one.applied for one in story.cuts)
    assert mean_divergence(loaded, repaired, split(random_images(loaded))[2]) < story.before
