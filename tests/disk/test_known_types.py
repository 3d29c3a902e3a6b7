"""Types that are told by their files alone: the answers are those of the class, and what is not plain is left to it."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tools.sweep.shrink import small_model
from transformers import AutoConfig

from avss.models.apart import empty_model
from avss.models.families import FAMILIES
from avss.models.known import KNOWN_TYPES, KnownModel, find_known
from avss.models.outline import EmptyModel
from avss.record import Plan
from tests.support.architectures import ARCHITECTURES
from tests.support.on_disk import both_ways, same


def save_small(model_type: str, folder: Path) -> int:
    """Saves a small model of a type; returns the number of its blocks."""
    model = small_model(getattr(transformers, KNOWN_TYPES[model_type].architecture), model_type)
    model.save_pretrained(folder)
    return int(model.config.num_hidden_layers)


def known(folder: Path) -> KnownModel:
    model = find_known(folder)
    assert model is not None
    return model


def loaded_config(folder: Path) -> dict[str, Any]:
    return AutoConfig.from_pretrained(folder).to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("model_type", KNOWN_TYPES)
def test_the_answers_are_those_of_the_class(model_type, tmp_path):
    count = save_small(model_type, tmp_path / "model")
    by_files, by_class = known(tmp_path / "model"), EmptyModel(str(tmp_path / "model"))
    assert dataclasses.replace(by_files.outline(), class_asked=True) == by_class.outline()
    for removed in {(0,), (count - 1,), tuple(range(1, count)), (0, count - 1)[: count - 1]}:
        plan = Plan(num_blocks=count, removed=removed, method="explicit", rule="by hand")
        one, two = tmp_path / f"files{removed}", tmp_path / f"class{removed}"
        one.mkdir()
        two.mkdir()
        assert by_files.write_config(plan, one) == by_class.write_config(plan, two)
        assert loaded_config(one) == loaded_config(two)


@pytest.mark.parametrize("model_type", [name for name in KNOWN_TYPES if name not in ARCHITECTURES])
def test_the_cut_is_the_one_in_memory(model_type, tmp_path):
    """For the others a law over all architectures of the tests says so."""
    count = save_small(model_type, tmp_path / "model")
    known(tmp_path / "model")
    same(*both_ways(tmp_path / "model", tmp_path, (0,) if count < 4 else (0, 2)))


@pytest.mark.parametrize("model_type", [name for name in KNOWN_TYPES if KNOWN_TYPES[name].lists])
def test_lists_are_cut_where_they_are_and_missed_where_blocks_would_change_their_kind(model_type, tmp_path):
    save_small(model_type, tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    name = KNOWN_TYPES[model_type].lists[0]
    less = {key: value for key, value in raw.items() if key != name}
    file.write_text(json.dumps(less | {"use_sliding_window": True}))
    assert find_known(tmp_path) is None
    file.write_text(json.dumps(raw | {name: [*raw[name], raw[name][0]]}))
    assert find_known(tmp_path) is None
    if KNOWN_TYPES[model_type].alike_unless:
        # Qwen2 as it lies on the hub: no list, no windows.
        file.write_text(json.dumps(less | {"use_sliding_window": False}))
        plan = Plan(num_blocks=raw["num_hidden_layers"], removed=(1,), method="explicit", rule="by hand")
        one, two = tmp_path / "files", tmp_path / "class"
        one.mkdir()
        two.mkdir()
        known(tmp_path).write_config(plan, one)
        EmptyModel(str(tmp_path)).write_config(plan, two)
        assert loaded_config(one) == loaded_config(two)


UNPLAIN: dict[str, Mapping[str, Any]] = {
    "quantised weights": {"quantization_config": {"bits": 4}},
    "code of its own": {"auto_map": {"AutoModel": "modeling.Model"}},
    "another class": {"architectures": ["LlamaForSequenceClassification"]},
    "several classes": {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
    "another type": {"model_type": "llama_of_mine"},
    "an unknown list": {"widths_of_each": [1, 2, 3, 4, 5]},
    "an unknown list of indices": {"special_layers": [1, 3]},
    "a second count": {"n_layer": 5},
    "another count": {"num_hidden_layers": 4},
    "a single block": {"num_hidden_layers": 1},
    "no count": {"num_hidden_layers": None},
    "a boolean for a count": {"num_hidden_layers": True},
    "no width": {"hidden_size": None},
}


@pytest.mark.parametrize("what", UNPLAIN)
def test_a_config_that_is_not_plain_is_left_to_the_class(what, tmp_path):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path)
    known(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | UNPLAIN[what]))
    assert find_known(tmp_path) is None


def _without(state: dict[str, torch.Tensor]) -> None:
    del state["model.layers.2.mlp.up_proj.weight"]


def _narrow(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.2.mlp.up_proj.weight"] = state["model.layers.2.mlp.up_proj.weight"].bfloat16()


def _short(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.2.mlp.up_proj.weight"] = state["model.layers.2.mlp.up_proj.weight"][1:].clone()


def _more(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.2.extra"] = torch.ones(2)


def _beside(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.scale"] = torch.ones(2)


def _headless(state: dict[str, torch.Tensor]) -> None:
    for key in [key for key in state if key.startswith("model.layers.4.")]:
        del state[key]


@pytest.mark.parametrize("change", [_without, _narrow, _short, _more, _beside, _headless])
def test_a_block_unlike_the_others_is_left_to_the_class(change: Callable[[dict[str, torch.Tensor]], None], tmp_path):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path)
    known(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file({key: tensor.clone() for key, tensor in state.items()}, file, metadata={"format": "pt"})
    assert find_known(tmp_path) is None


def test_what_the_facts_forbid_is_left_to_the_class(tmp_path):
    save_small("gpt2", tmp_path)
    known(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scale_attn_by_inverse_layer_idx": True}))
    assert find_known(tmp_path) is None


def test_a_type_with_facts_that_change_a_config_is_not_taken_for_plain(tmp_path, monkeypatch):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path)
    for name in ("t5", "modernbert", "qwen3_moe"):
        monkeypatch.setitem(FAMILIES, "llama", FAMILIES[name])
        assert find_known(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_none_is_left_to_the_class(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert find_known(tmp_path) is None


def test_another_head_is_asked_of_the_class(tmp_path):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path)
    for head, asked in (("auto", False), ("causal", False), ("classifier", True)):
        with empty_model(str(tmp_path), head=head) as ask:
            assert ask("outline")["class_asked"] == asked


def test_a_cut_of_a_known_type_imports_no_torch_and_starts_no_process(tmp_path):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "model")
    code = (
        "import subprocess, sys\n"
        "subprocess.Popen = None\n"
        "from pathlib import Path\n"
        "from avss.composer.disk import prune_on_disk\n"
        "from avss.config import PlanConfig\n"
        "record = prune_on_disk(sys.argv[1], PlanConfig(blocks='1,3'), out=Path(sys.argv[2]), max_memory=1)\n"
        "print(record.cuts[0].verification.reload_strict, {'torch', 'transformers', 'scipy'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "None set()", done.stderr
