"""Models whose blocks stay on disk: every architecture gives the numbers that it gives in memory, to the bit."""

import copy
import gc
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, AlbertModel

from avss.ablation import Judge, leave_one_out
from avss.collect import collect
from avss.composer.inputs import probe_batch
from avss.criteria import CRITERIA
from avss.errors import ConfigError, ModelLoadError, UnsupportedArchitectureError
from avss.models.forward import run_outputs
from avss.models.load import Loaded, adopt, load_model, save_model
from avss.models.stack import find_stacks
from tests.laws.test_ablation_laws import batches
from tests.laws.test_every_architecture import NAMED
from tests.support.architectures import ARCHITECTURES, stored, token_batch

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)

FORWARD = tuple(
    dict.fromkeys(
        need for one in CRITERIA.values() for need in one.needs if need.probe in ("block", "stack", "weights")
    )
)


KEPT_WIDE = ("deepseek-v3", "gemma4", "llava", "mamba", "t5", "xlnet")
"""Awkward in half precision: weights and buffers that stay wide, several towers, weights that a class creates."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> folder into which its tiny model is saved, once. Do not change it."""
    root = tmp_path_factory.mktemp("whole")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            model = copy.deepcopy(stored(name)) if name in ARCHITECTURES else NAMED[name][0]()
            save_model(adopt(model), root / name)
        return root / name

    return folder


def held(loaded: Loaded) -> int:
    """How many blocks have weights in memory, of all stacks."""
    return sum(
        any(one.device.type != "meta" for one in block.parameters())
        for stack in find_stacks(loaded.model)[0]
        for block in stack.blocks
    )


@every_architecture
def test_scores_are_those_in_memory(name, folder_of):
    whole, resting = load_model(folder_of(name), device="cpu"), load_model(folder_of(name), device="disk")
    data = [token_batch(seed=seed) for seed in range(2)]
    one, other = (collect(loaded, data, FORWARD) for loaded in (whole, resting))
    for statistic in FORWARD:
        for rows, others in zip(one.rows[statistic], other.rows[statistic], strict=True):
            assert rows.columns.keys() == others.columns.keys()
            for column in rows.columns:
                assert np.array_equal(rows.columns[column], others.columns[column], equal_nan=True), statistic
    assert resting.facts() == whole.facts()
    assert held(resting) == 0


@every_architecture
def test_damage_is_that_in_memory(name, folder_of):
    whole, resting = load_model(folder_of(name), device="cpu"), load_model(folder_of(name), device="disk")
    num = len(whole.stack)
    one, other = (leave_one_out(Judge(loaded, batches(*token_batch(), 3)), num) for loaded in (whole, resting))
    assert [damage.mean for damage in one] == [damage.mean for damage in other]
    assert held(resting) == 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in NAMED),
        *((name, dtype) for name in KEPT_WIDE for dtype in ("bfloat16", "float16")),
    ],
)
def test_outputs_are_those_in_memory(name, dtype, folder_of):
    """In half precision, what a class keeps in float32 (T5's `wo`, what routes to experts) is kept so too."""
    whole, resting = (load_model(folder_of(name), device=where, dtype=dtype) for where in ("cpu", "disk:cpu"))
    batch = probe_batch(whole)
    args = batch if whole.reads_text else (batch,)
    one, other = (run_outputs(loaded.tower(), *args) for loaded in (whole, resting))
    assert torch.equal(one, other)
    assert resting.facts() == whole.facts()
    assert held(resting) == 0
    assert resting.files is not None
    for path, weight in whole.model.state_dict().items():
        resting_weight = resting.model.state_dict()[path]
        found = resting.files.weight(path) if resting_weight.device.type == "meta" else resting_weight
        assert found.dtype == weight.dtype, path
        assert torch.equal(found, weight), path


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "mamba"])
def test_one_block_is_in_memory_at_a_time(name, folder_of):
    resting = load_model(folder_of(name), device="disk")
    most = []
    for stack in find_stacks(resting.model)[0]:
        for block in stack.blocks:
            for part in block.modules():
                part.register_forward_hook(lambda *_: most.append(held(resting)))
    run_outputs(resting, *token_batch(padded=False))
    assert set(most) == {0, 1}  # 0: the block itself has returned


def test_no_weight_stays_when_a_block_raises(folder_of):
    resting = load_model(folder_of("llama"), device="disk")

    def fail(*_: object) -> None:
        raise RuntimeError("stopped")

    handle = resting.stack.blocks[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        run_outputs(resting, *token_batch())
    assert held(resting) == 0
    handle.remove()
    expected = run_outputs(load_model(folder_of("llama"), device="cpu"), *token_batch())
    assert torch.equal(run_outputs(resting, *token_batch()), expected)


def test_half_precision_files_are_computed_in_float32(tmp_path):
    save_model(adopt(copy.deepcopy(stored("llama")).bfloat16()), tmp_path / "half")
    whole, resting = load_model(tmp_path / "half", device="cpu"), load_model(tmp_path / "half", device="disk")
    assert (resting.stored_dtype, resting.model.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(run_outputs(whole, *token_batch()), run_outputs(resting, *token_batch()))
    assert resting.facts() == whole.facts()


def test_experts_written_anew_go_with_the_model(folder_of, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    resting = load_model(folder_of("mixtral"), device="disk", scratch=scratch)
    assert any(scratch.iterdir())  # stored one by one, computed as one weight
    gc.disable()
    try:
        del resting
        assert not scratch.exists()  # at once, not when the garbage is collected
    finally:
        gc.enable()


def test_nothing_of_accelerate_is_left_on_the_model(folder_of):
    resting = load_model(folder_of("llama"), device="disk")
    assert not any(hasattr(module, "_hf_hook") for module in resting.model.modules())
    wrapped = [module for module in resting.model.modules() if "forward" in module.__dict__]
    assert wrapped == list(resting.stack.blocks)
    parameters = [inspect.signature(each.stack.blocks[0].forward) for each in (resting, adopt(stored("llama")))]
    assert parameters[0] == parameters[1]


def test_a_model_without_a_stack_is_refused_before_it_is_read(tmp_path, monkeypatch):
    config = AlbertConfig(vocab_size=99, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    save_model(adopt(AlbertModel(config)), tmp_path)
    monkeypatch.setattr(AlbertModel, "from_pretrained", None)
    with pytest.raises(UnsupportedArchitectureError, match="no stack of blocks"):
        load_model(tmp_path, device="disk")


def test_a_weight_that_is_in_no_file_is_refused(folder_of, tmp_path, monkeypatch):
    """One that its class may set by itself: there is nothing to read when the block runs."""
    shutil.copytree(folder_of("llama"), tmp_path / "gap")
    file = tmp_path / "gap" / "model.safetensors"
    state = load_file(file)
    save_file(
        {name: one for name, one in state.items() if "layers.2.input_layernorm" not in name}, file, {"format": "pt"}
    )
    monkeypatch.setattr("avss.models.load._refuse_missing", lambda *_: None)
    with pytest.raises(ModelLoadError, match=r"layers\.2\.input_layernorm\.weight` is in no file"):
        load_model(tmp_path / "gap", device="disk")


@pytest.mark.parametrize("criterion", ["taylor", "gradient-l1", "gradient-l2"])
def test_gradients_are_refused(criterion, folder_of):
    resting = load_model(folder_of("llama"), device="disk")
    with pytest.raises(ConfigError, match=r"A score by gradients needs the whole model in memory.*--device cpu"):
        collect(resting, [token_batch()], CRITERIA[criterion].needs)
