"""What every common text architecture obeys when it loses blocks; other kinds are in `test_every_architecture`."""

import copy
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

from avss.collect import collect
from avss.cut import cut
from avss.errors import InvalidPlanError, UnsupportedArchitectureError, VerificationError
from avss.models.families import LEADING_COUNTS, PER_LAYER_LISTS
from avss.models.forward import generate, run_body, run_outputs
from avss.models.load import Loaded, adopt, load_model, save_model
from avss.models.rewrite import config_changes
from avss.models.stack import bypassed, find_stack, hooked
from avss.models.verify import verify
from avss.record import Plan
from avss.statistics import Moments
from tests.support.architectures import ARCHITECTURES, FULL, MIXED_5, SLIDING, build, gpt2, stored, token_batch
from tests.support.oracles import (
    auto_class_name,
    hook_count,
    is_causal,
    largest_difference,
    run,
    state_copy,
    without_blocks,
)

TOLERANCE = 1e-5

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)

PLACES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "first": lambda count: (0,),
    "middle": lambda count: (count // 2,),
    "last": lambda count: (count - 1,),
    "scattered": lambda count: (1, count - 2) if count > 4 else (0, 2),
}


def explicit(loaded: Loaded, *removed: int) -> Plan:
    return Plan(num_blocks=len(loaded.stack), removed=removed, method="explicit", rule="by hand")


def scattered(loaded: Loaded) -> Plan:
    return explicit(loaded, *PLACES["scattered"](len(loaded.stack)))


@functools.cache
def scattered_cut(name: str) -> Loaded:
    """The tiny model of that name without its scattered blocks. Do not change it."""
    loaded = adopt(stored(name))
    return cut(loaded, scattered(loaded))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> folder into which its scattered cut is saved, once. Do not change it."""
    root = tmp_path_factory.mktemp("cuts")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            # Saving writes into the config of the model it is given.
            save_model(copy.deepcopy(scattered_cut(name)), root / name)
        return root / name

    return folder


@every_architecture
def test_every_block_of_a_tiny_model_matters(name):
    """Without this, the other laws could hold for want of anything to get wrong."""
    model, (token_ids, keep) = stored(name), token_batch()
    path = find_stack(model).path
    whole = run(model, token_ids, keep)
    without = [run(without_blocks(model, path, [block]), token_ids, keep) for block in range(len(find_stack(model)))]
    for one, other in itertools.combinations([whole, *without], 2):
        assert largest_difference(one, other) > 100 * TOLERANCE


# --- looking ---------------------------------------------------------------------------------------------------------


@every_architecture
def test_block_count_agrees_with_config(name):
    model = stored(name)
    stack = find_stack(model)
    assert len(stack) == model.config.num_hidden_layers
    assert model.config.to_dict()[stack.count_field] == len(stack)
    assert model.get_submodule(stack.path) is stack.blocks


@every_architecture
def test_hooks_see_each_block_once_in_order(name):
    loaded, (token_ids, keep) = adopt(stored(name)), token_batch()
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    with hooked(loaded.stack, lambda index, before, after: seen.append((index, before, after))):
        run_body(loaded, token_ids, keep)
    assert [index for index, _, _ in seen] == list(range(len(loaded.stack)))
    assert all(before.shape == after.shape == (*token_ids.shape, 32) for _, before, after in seen)
    # What leaves one block enters the next, untouched.
    assert all(torch.equal(one[2], other[1]) for one, other in itertools.pairwise(seen))


@every_architecture
def test_looking_changes_no_output(name):
    loaded, (token_ids, keep) = adopt(stored(name)), token_batch()
    before = run_outputs(loaded, token_ids, keep)
    with hooked(loaded.stack, lambda index, before, after: None):
        during = run_outputs(loaded, token_ids, keep)
    collect(loaded, [(token_ids, keep)], [Moments("update")])
    assert torch.equal(before, during)
    assert torch.equal(before, run_outputs(loaded, token_ids, keep))


@every_architecture
def test_no_hook_stays_behind(name):
    loaded, (token_ids, keep) = adopt(copy.deepcopy(stored(name))), token_batch()
    run_outputs(loaded, token_ids, keep)
    count = hook_count(loaded.model)
    collect(loaded, [(token_ids, keep)], [Moments()])
    with bypassed(loaded.stack, (1,)):
        assert hook_count(loaded.model) > count  # or there would be nothing to leave behind
        run_outputs(loaded, token_ids, keep)
    assert hook_count(loaded.model) == count


@every_architecture
def test_no_hook_stays_behind_when_the_forward_raises(name):
    loaded, (token_ids, keep) = adopt(copy.deepcopy(stored(name))), token_batch()
    run_outputs(loaded, token_ids, keep)
    count = hook_count(loaded.model)

    def fail(*_: Any, **__: Any) -> None:
        raise ArithmeticError("the block broke")

    loaded.stack.blocks[1].forward = fail
    with pytest.raises(ArithmeticError, match="the block broke"):
        collect(loaded, [(token_ids, keep)], [Moments()])
    assert hook_count(loaded.model) == count


# --- cutting ---------------------------------------------------------------------------------------------------------


@every_architecture
def test_empty_plan_gives_the_same_bits(name):
    loaded, (token_ids, keep) = adopt(stored(name)), token_batch()
    same = cut(loaded, explicit(loaded))
    assert torch.equal(run(same.model, token_ids, keep), run(loaded.model, token_ids, keep))
    assert config_changes(loaded.model.config, same.model.config) == ()


@pytest.mark.parametrize("place", PLACES)
@every_architecture
def test_cut_equals_bypass(name, place):
    loaded = adopt(stored(name))
    plan = explicit(loaded, *PLACES[place](len(loaded.stack)))
    smaller = scattered_cut(name) if place == "scattered" else cut(loaded, plan)
    assert len(smaller.stack) == len(plan.kept) == smaller.model.config.num_hidden_layers
    token_ids, keep = token_batch(padded=place in ("first", "scattered"))
    oracle = run(without_blocks(loaded.model, loaded.stack.path, plan.removed), token_ids, keep)
    assert largest_difference(run(smaller.model, token_ids, keep), oracle) <= TOLERANCE
    with bypassed(loaded.stack, plan.removed):
        assert largest_difference(run_outputs(loaded, token_ids, keep), oracle) <= TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_cut_of_mixed_attention_equals_bypass(size):
    loaded, (token_ids, keep) = adopt(stored("gemma2")), token_batch(padded=False)
    for removed in itertools.combinations(range(len(loaded.stack)), size):
        oracle = run(without_blocks(loaded.model, loaded.stack.path, removed), token_ids, keep)
        smaller = cut(loaded, explicit(loaded, *removed))
        assert largest_difference(run(smaller.model, token_ids, keep), oracle) <= TOLERANCE, removed


def test_a_naive_cut_of_mixed_attention_is_another_model():
    """The law above can fail: with the right weights under the first entries of `layer_types`, it does."""
    loaded, (token_ids, keep) = adopt(stored("gemma2")), token_batch(padded=False)
    plan = explicit(loaded, 0, 2)
    config = copy.deepcopy(loaded.model.config)
    config.num_hidden_layers = len(plan.kept)
    config.layer_types = config.layer_types[: len(plan.kept)]
    naive = type(loaded.model)(config)
    naive.load_state_dict(cut(loaded, plan).model.state_dict())
    oracle = run(without_blocks(loaded.model, loaded.stack.path, plan.removed), token_ids, keep)
    assert largest_difference(run(naive.eval(), token_ids, keep), oracle) > 100 * TOLERANCE


@every_architecture
def test_a_cut_leaves_the_original_as_it_was(name):
    model, (token_ids, keep) = copy.deepcopy(stored(name)), token_batch()
    loaded = adopt(model)
    weights, config, output = state_copy(model), copy.deepcopy(model.config.to_dict()), run(model, token_ids, keep)
    smaller = cut(loaded, scattered(loaded))
    run(smaller.model, token_ids, keep)
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[key], after[key]) for key in weights)
    assert model.config.to_dict() == config
    assert torch.equal(run(model, token_ids, keep), output)
    assert len(find_stack(model)) == len(loaded.stack)


@every_architecture
def test_a_cut_copies_no_block(name):
    loaded = adopt(stored(name))
    owned = {tensor.data_ptr() for tensor in loaded.model.state_dict().values()}
    assert {parameter.data_ptr() for parameter in scattered_cut(name).stack.blocks.parameters()} <= owned


@every_architecture
def test_tied_weights_stay_tied(name):
    loaded = adopt(stored(name))

    def ties(model: PreTrainedModel) -> set[tuple[str, ...]]:
        groups: dict[int, list[str]] = {}
        for key, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(key)
        return {tuple(keys) for keys in groups.values() if len(keys) > 1}

    assert ties(scattered_cut(name).model) == ties(loaded.model)


def test_some_tiny_models_are_tied_and_some_are_not():
    """The law above can fail."""
    tied = {name for name in ARCHITECTURES if stored(name).config.tie_word_embeddings}
    assert {"gpt2", "gemma2", "llama-tied", "bert-masked"} <= tied
    assert not {"llama", "qwen2"} & tied


@pytest.mark.parametrize("name", ["distilbert", "gemma2", "gpt2", "qwen2-sliding", "llama-tied"])
def test_cut_of_a_cut_is_one_cut(name):
    loaded, (token_ids, keep) = adopt(stored(name)), token_batch()
    once = cut(loaded, explicit(loaded, 0, 2))
    first = cut(loaded, explicit(loaded, 0))
    twice = cut(first, explicit(first, 1))  # block 2 of the original is block 1 now
    assert twice.model.config.to_dict() == once.model.config.to_dict()
    assert torch.equal(run(twice.model, token_ids, keep), run(once.model, token_ids, keep))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if is_causal(stored(name))])
def test_cached_generation_equals_uncached_after_a_cut(name):
    loaded, (token_ids, _) = adopt(stored(name)), token_batch(padded=False)
    for model in (cut(loaded, explicit(loaded, 0)).model, scattered_cut(name).model):
        cached = generate(model, token_ids[:1], num_tokens=8)
        assert torch.equal(cached, generate(model, token_ids[:1], num_tokens=8, use_cache=False))
        # An independent oracle: transformers' own greedy search.
        greedy = model.generate(
            token_ids[:1],
            attention_mask=torch.ones_like(token_ids[:1]),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(greedy[0, token_ids.shape[1] :], cached)


# --- saving ----------------------------------------------------------------------------------------------------------


@every_architecture
def test_saved_cut_loads_as_a_stock_model_with_the_same_outputs(name, folder_of):
    loaded, smaller, batch = adopt(stored(name)), scattered_cut(name), token_batch()
    auto = getattr(transformers, auto_class_name(loaded.model))
    fresh, info = auto.from_pretrained(folder_of(name), output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}
    assert type(fresh) is type(loaded.model)
    assert fresh.config.num_hidden_layers == len(scattered(loaded).kept)
    assert torch.equal(run(fresh.eval(), *batch), run(smaller.model, *batch))


@every_architecture
def test_verification_of_a_saved_cut_passes(name, folder_of):
    loaded = adopt(stored(name))
    proof = verify(str(folder_of(name)), scattered_cut(name), loaded, scattered(loaded), token_batch())
    assert proof.passed
    assert proof.reload_strict
    assert proof.max_diff_memory == 0
    assert proof.max_diff_bypass <= TOLERANCE
    assert proof.cached_generation is (True if is_causal(loaded.model) else None)


@every_architecture
def test_saved_cut_loads_through_avss_with_its_head(name, folder_of):
    loaded, smaller = adopt(stored(name)), scattered_cut(name)
    again = load_model(folder_of(name), device="cpu")
    assert (type(again.model), again.head) == (type(loaded.model), loaded.head)
    assert again.facts().num_blocks == smaller.facts().num_blocks
    assert again.facts().num_parameters == smaller.facts().num_parameters


def test_generation_settings_survive(tmp_path):
    model = ARCHITECTURES["llama"]()
    model.generation_config.repetition_penalty = 1.25
    loaded = adopt(model)
    save_model(cut(loaded, scattered(loaded)), tmp_path / "out")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert fresh.generation_config.repetition_penalty == 1.25


# --- config ----------------------------------------------------------------------------------------------------------

PER_LAYER_CASES = [
    ("gemma2", (0, 3), {"layer_types": [FULL, SLIDING, FULL]}),
    ("gemma3", (0, 3), {"layer_types": [FULL, SLIDING, FULL]}),
    ("gemma3", (1, 4), {"layer_types": [SLIDING, SLIDING, SLIDING]}),
    ("qwen2-sliding", (1, 4), {"layer_types": [FULL, FULL, SLIDING, SLIDING], "max_window_layers": 2}),
    ("qwen2-sliding", (3, 5), {"layer_types": [FULL, FULL, FULL, FULL], "max_window_layers": 3}),
    ("qwen2-sliding", (0, 1, 2), {"layer_types": [SLIDING, FULL, SLIDING], "max_window_layers": 0}),
    ("qwen3-sliding", (0, 4), {"layer_types": [FULL, SLIDING, SLIDING], "max_window_layers": 1}),
]


@pytest.mark.parametrize(("name", "removed", "expected"), PER_LAYER_CASES)
def test_per_layer_config_keeps_the_entries_of_the_kept_blocks(name, removed, expected, tmp_path):
    loaded = adopt(stored(name))
    smaller = cut(loaded, explicit(loaded, *removed))
    save_model(smaller, tmp_path / "out")
    on_disk = json.loads((tmp_path / "out" / "config.json").read_text())
    for field, value in expected.items():
        assert getattr(smaller.model.config, field) == value
        assert on_disk[field] == value


def test_mixed_lists_have_no_symmetry_that_could_hide_a_mistake():
    assert MIXED_5[::-1] != MIXED_5
    assert MIXED_5[:3] != MIXED_5[2:]


@every_architecture
def test_a_cut_changes_only_the_fields_that_count_blocks(name):
    loaded = adopt(stored(name))
    changes = config_changes(loaded.model.config, scattered_cut(name).model.config)
    allowed = {loaded.stack.count_field, *PER_LAYER_LISTS, *LEADING_COUNTS}
    assert loaded.stack.count_field in {change.field for change in changes}
    assert {change.field for change in changes} <= allowed


# --- refusing --------------------------------------------------------------------------------------------------------


def test_model_without_a_stack_is_refused():
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    model = build("LlamaForCausalLM", config)
    model.config.num_hidden_layers = 3  # a checkpoint whose config does not fit its weights
    with pytest.raises(UnsupportedArchitectureError, match=r"3 layers by its config.*\(2 x Llama.*no config says"):
        find_stack(model)


def test_gpt2_with_attention_scaled_by_index_is_refused():
    loaded = adopt(gpt2("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)())
    with pytest.raises(UnsupportedArchitectureError, match="scale_attn_by_inverse_layer_idx"):
        cut(loaded, explicit(loaded, 1))


def test_quantised_model_is_refused():
    model = ARCHITECTURES["llama"]()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    loaded = adopt(model)
    with pytest.raises(UnsupportedArchitectureError, match=r"quantised.*full-precision"):
        cut(loaded, explicit(loaded, 1))


@pytest.mark.parametrize("value", [[1, 2, 3, 4, 5], (1, 2, 3, 4, 5)])
def test_unknown_list_of_the_length_of_the_stack_is_refused(value):
    model = ARCHITECTURES["llama"]()
    model.config.gains = value
    loaded = adopt(model)
    with pytest.raises(UnsupportedArchitectureError, match=r"`gains` speaks of blocks.*one entry per block"):
        cut(loaded, explicit(loaded, 1))


def test_list_of_another_length_is_left_alone():
    model = ARCHITECTURES["llama"]()
    model.config.something = [1, 2, 3]
    loaded = adopt(model)
    assert cut(loaded, explicit(loaded, 1)).model.config.something == [1, 2, 3]


@pytest.mark.parametrize("removed", [(5,), (-1,), (0, 7)])
def test_block_out_of_range_is_refused(removed):
    with pytest.raises(InvalidPlanError, match="There is no block"):
        explicit(adopt(stored("llama")), *removed)


def test_removing_every_block_is_refused():
    with pytest.raises(InvalidPlanError, match="removes all 5 blocks"):
        explicit(adopt(stored("llama")), 0, 1, 2, 3, 4)


def test_plan_for_another_number_of_blocks_is_refused():
    plan = Plan(num_blocks=30, removed=(3,), method="explicit", rule="by hand")
    with pytest.raises(InvalidPlanError, match=r"made for 30 blocks; this model has 5"):
        cut(adopt(stored("llama")), plan)


# --- verification can fail -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Loaded, Loaded, Plan]:
    """A verified cut on disk: folder, smaller model, original, plan."""
    loaded = adopt(stored("gemma2"))
    plan = scattered(loaded)
    smaller = cut(loaded, plan)
    save_model(smaller, tmp_path / "out")
    return tmp_path / "out", smaller, loaded, plan


def _rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def _rewrite_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _check(saved: tuple[Path, Loaded, Loaded, Plan]) -> None:
    folder, smaller, loaded, plan = saved
    verify(str(folder), smaller, loaded, plan, token_batch())


def test_verification_passes_on_the_untouched_folder(saved):
    _check(saved)


def test_verification_fails_on_a_changed_tensor(saved):
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3] *= 1.5

    _rewrite_weights(saved[0], change)
    with pytest.raises(VerificationError, match="differ from the model in memory"):
        _check(saved)


def test_verification_fails_on_swapped_blocks(saved):
    def change(weights: dict[str, torch.Tensor]) -> None:
        for key in [key for key in weights if key.startswith("model.layers.0.")]:
            other = key.replace("layers.0.", "layers.1.")
            weights[key], weights[other] = weights[other], weights[key]

    _rewrite_weights(saved[0], change)
    with pytest.raises(VerificationError, match="differ from the original with the blocks bypassed"):
        _check(saved)


def test_verification_fails_on_a_missing_key(saved):
    _rewrite_weights(saved[0], lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(VerificationError, match=r"missing keys.*up_proj"):
        _check(saved)


def test_verification_fails_on_a_left_over_key(saved):
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)

    _rewrite_weights(saved[0], change)
    with pytest.raises(VerificationError, match=r"unexpected keys.*layers\.7"):
        _check(saved)


def test_verification_fails_on_a_tensor_of_another_shape(saved):
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)

    _rewrite_weights(saved[0], change)
    with pytest.raises(VerificationError):
        _check(saved)


def test_verification_fails_on_a_truncated_file(saved):
    file = saved[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(VerificationError):
        _check(saved)


def test_verification_fails_on_a_stale_config_list(saved):
    smaller = saved[1]
    _rewrite_config(saved[0], layer_types=smaller.model.config.layer_types[::-1])
    with pytest.raises(VerificationError, match="differ from the model in memory"):
        _check(saved)


def test_verification_fails_on_a_truncated_stack(saved):
    config: PretrainedConfig = saved[1].model.config
    _rewrite_config(saved[0], num_hidden_layers=2, layer_types=config.layer_types[:2])
    with pytest.raises(VerificationError, match="unexpected keys"):
        _check(saved)


def test_verification_fails_for_another_plan(saved):
    folder, smaller, loaded, plan = saved
    other = explicit(loaded, 0, 2)
    assert len(other.removed) == len(plan.removed)
    with pytest.raises(VerificationError, match="original with the blocks bypassed"):
        verify(str(folder), smaller, loaded, other, token_batch())


def test_verification_fails_on_nan(saved):
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][0] = torch.nan

    _rewrite_weights(saved[0], change)
    with pytest.raises(VerificationError):
        _check(saved)
