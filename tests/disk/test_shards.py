"""Checkpoints as bytes: what is read from their files, what a copy holds, and what is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avss.errors import ModelLoadError
from avss.models.shards import (
    check_copy,
    compare_bytes,
    copy_companions,
    fill,
    find_stack_path,
    fingerprint,
    lay_out,
    read_checkpoint,
    read_shard,
    stack_paths,
)
from avss.record import Plan

PLAN = Plan(num_blocks=4, removed=(1, 2), method="explicit", rule="by hand")


def state(num_blocks: int = 4) -> dict[str, torch.Tensor]:
    """Weights of several dtypes and shapes: a scalar, an empty one, and a list beside the stack."""
    generator = torch.Generator().manual_seed(0)
    weights = {"embed.weight": torch.randn(7, 4, generator=generator), "scale": torch.tensor(2.5)}
    for block in range(num_blocks):
        weights[f"h.{block}.w"] = torch.randn(3, 5, generator=generator).bfloat16()
        weights[f"h.{block}.experts.0.w"] = torch.randn(3, generator=generator).half()
        weights[f"h.{block}.experts.1.w"] = torch.randint(0, 9, (2, 2), generator=generator, dtype=torch.int8)
        weights[f"vision.h.{block}.w"] = torch.randn(2, generator=generator)
    return weights | {"none": torch.empty(0, 3), "norm.weight": torch.randn(4, generator=generator).double()}


def shard(folder: Path, weights: dict[str, torch.Tensor], num_files: int, *, with_index: bool = True) -> Path:
    """Writes weights into several files, blocks of all of them mixed."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{number + 1:05d}-of-{num_files:05d}.safetensors" for number in range(num_files)]
    places = {key: names[number % num_files] for number, key in enumerate(weights)}
    for name in names:
        part = {key: tensor for key, tensor in weights.items() if places[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    if with_index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def single(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rename(name: str) -> str | None:
    return PLAN.rename(name, "h")


def copy(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """What a copy without the plan's blocks holds, read by the safetensors library."""
    target.mkdir()
    checkpoint = read_checkpoint(source)
    written = lay_out(checkpoint, rename, target)
    fill(checkpoint, rename, written)
    assert check_copy(checkpoint, rename, read_checkpoint(target)) == []
    assert compare_bytes(checkpoint, rename, read_checkpoint(target)) == []
    found = {}
    for path in sorted(target.glob("*.safetensors")):
        found |= load_file(path)
    return found


def expected(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The slow way: block 3 becomes block 1, and blocks 1 and 2 are gone."""
    kept = {}
    for name, tensor in weights.items():
        if name.startswith(("h.1.", "h.2.")):
            continue
        kept["h.1." + name[4:] if name.startswith("h.3.") else name] = tensor
    return kept


@pytest.mark.parametrize("layout", ["single", "sharded", "without index", "more files than blocks"])
def test_a_copy_holds_the_kept_tensors_bit_for_bit(tmp_path, layout):
    weights = state()
    files = {"single": 1, "sharded": 3, "without index": 2, "more files than blocks": len(weights)}[layout]
    source = tmp_path / "source"
    if files == 1:
        single(source, weights)
    else:
        shard(source, weights, files, with_index=layout != "without index")
    found = copy(source, tmp_path / "target")
    wanted = expected(weights)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_a_new_index_names_every_tensor_and_no_file_is_empty(tmp_path):
    weights = state()
    found = copy(shard(tmp_path / "source", weights, len(weights)), tmp_path / "target")
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    files = {path.name for path in (tmp_path / "target").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) == len(found)  # the files of removed blocks are gone, and the others are counted anew
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "target" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 (not a mapping)
            assert opened.metadata() == {"format": "pt"}


def test_a_file_that_stays_alone_needs_no_index(tmp_path):
    copy(single(tmp_path / "source", state()), tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["model.safetensors"]


def test_bytes_begin_at_a_multiple_of_eight(tmp_path):
    copy(single(tmp_path / "source", state()), tmp_path / "target")
    with (tmp_path / "target" / "model.safetensors").open("rb") as file:
        assert struct.unpack("<Q", file.read(8))[0] % 8 == 0


def test_copying_without_help_of_the_kernel_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("avss.models.shards._BUFFER", 7)  # many pieces, none aligned
    weights = state()
    monkeypatch.delattr("os.copy_file_range", raising=False)
    found = copy(shard(tmp_path / "source", weights, 2), tmp_path / "target")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected(weights).items())


def test_progress_counts_the_bytes(tmp_path):
    checkpoint = read_checkpoint(single(tmp_path / "source", state()))
    (tmp_path / "target").mkdir()
    seen: list[tuple[int, int]] = []
    written = lay_out(checkpoint, rename, tmp_path / "target")
    fill(checkpoint, rename, written, on_bytes=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (written.num_bytes, written.num_bytes)
    assert seen == sorted(seen)


def test_facts_of_a_checkpoint(tmp_path):
    weights = state()
    checkpoint = read_checkpoint(single(tmp_path / "source", weights))
    assert checkpoint.num_values == sum(tensor.numel() for tensor in weights.values())
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert checkpoint.dtype == "float32"


def test_fingerprint_tells_weights_and_configs_apart(tmp_path):
    weights = state()
    one = fingerprint(read_checkpoint(single(tmp_path / "one", weights)), b"config")
    assert one == fingerprint(read_checkpoint(single(tmp_path / "same", weights)), b"config")
    assert one != fingerprint(read_checkpoint(single(tmp_path / "same", weights)), b"other")
    weights["h.3.w"] = weights["h.3.w"] + 1
    assert one != fingerprint(read_checkpoint(single(tmp_path / "other", weights)), b"config")


# --- a wrong copy is noticed ---


def _damage(target: Path, at: int) -> None:
    with (target / "model.safetensors").open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 255]))


def test_a_changed_byte_is_noticed(tmp_path):
    source = read_checkpoint(single(tmp_path / "source", {"h.0.w": torch.randn(100, 100), **state()}))
    (tmp_path / "target").mkdir()
    written = lay_out(source, rename, tmp_path / "target")
    fill(source, rename, written)
    tensor = next(tensor for tensor in written.shards[0].tensors if tensor.name == "norm.weight")
    _damage(tmp_path / "target", tensor.start)
    assert check_copy(source, rename, written) == ["the bytes of `norm.weight` are not those of `norm.weight`"]
    _damage(tmp_path / "target", tensor.start)
    assert check_copy(source, rename, written) == []


def test_a_byte_in_the_middle_is_noticed(tmp_path):
    source = read_checkpoint(single(tmp_path / "source", {**state(), "h.3.w": torch.randn(300, 300)}))
    (tmp_path / "target").mkdir()
    written = lay_out(source, rename, tmp_path / "target")
    fill(source, rename, written)
    tensor = written.tensors["h.1.w"]
    _damage(tmp_path / "target", tensor.start + tensor.num_bytes // 2)
    for found in (check_copy(source, rename, written), compare_bytes(source, rename, written)):
        assert found == ["the bytes of `h.1.w` are not those of `h.3.w`"]


def test_files_without_their_bytes_are_noticed(tmp_path):
    source = read_checkpoint(single(tmp_path / "source", state()))
    (tmp_path / "target").mkdir()
    written = lay_out(source, rename, tmp_path / "target")
    assert len(check_copy(source, rename, written)) > 3


def test_another_plan_is_noticed(tmp_path):
    source = read_checkpoint(single(tmp_path / "source", state()))
    (tmp_path / "target").mkdir()
    written = lay_out(source, rename, tmp_path / "target")
    fill(source, rename, written)
    other = PLAN.model_copy(update={"removed": (0, 2)})
    problems = check_copy(source, lambda name: other.rename(name, "h"), written)
    assert any("h.0.w" in problem for problem in problems)
    more = PLAN.model_copy(update={"removed": (1,)})
    assert any("missing" in problem for problem in check_copy(source, lambda name: more.rename(name, "h"), written))


# --- the stack among the names ---


@pytest.mark.parametrize(
    ("names", "module_path", "found"),
    [
        (["encoder.layer.{}.w"], "bert.encoder.layer", "encoder.layer"),
        (["bert.encoder.layer.{}.w"], "encoder.layer", "bert.encoder.layer"),
        (["model.layers.{}.w", "vision.layers.{}.w"], "model.layers", "model.layers"),
        (
            ["language_model.model.layers.{}.w", "vision_tower.encoder.layers.{}.w"],
            "language_model.model.layers",
            "language_model.model.layers",
        ),
        (
            ["vision_tower.blocks.{}.w", "language_model.layers.{}.w"],
            "model.language_model.layers",
            "language_model.layers",
        ),
        (["h.{}.w", "h.{}.experts.0.w", "h.{}.experts.1.w"], None, "h"),
    ],
)
def test_the_stack_is_found_under_its_name_on_disk(names, module_path, found):
    keys = [name.format(block) for name in names for block in range(3)]
    assert find_stack_path([*keys, "norm.weight"], 3, module_path) == found


@pytest.mark.parametrize(
    ("names", "module_path"),
    [
        (["a.layers.{}.w", "b.layers.{}.w"], None),
        (["a.layers.{}.w", "b.layers.{}.w"], "model.layers"),
        (["a.h.{}.w", "b.g.{}.w"], "model.layers"),
    ],
)
def test_two_lists_that_could_be_the_stack_are_refused(names, module_path):
    keys = [name.format(block) for name in names for block in range(3)]
    with pytest.raises(ModelLoadError, match="cannot be told"):
        find_stack_path(keys, 3, module_path)


def test_a_stack_with_a_gap_is_refused():
    with pytest.raises(ModelLoadError, match="0 lists of 3 blocks"):
        find_stack_path(["h.0.w", "h.2.w"], 3, "h")


def test_a_list_may_go_on_after_the_last_block():
    assert stack_paths(["h.0.w", "h.1.w", "h.2.w"], 2) == ["h"]


# --- what is refused ---


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ModelLoadError, match=match):
        read_checkpoint(folder)


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path, r"pytorch_model\.bin.*Only safetensors")


def test_a_missing_shard_is_refused_by_its_name(tmp_path):
    source = shard(tmp_path / "source", state(), 3)
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, r"names `model-00002-of-00003\.safetensors`, which is not there")
    (source / "model.safetensors.index.json").unlink()
    refused(source, "2 of 3 shards")


def test_an_index_that_names_another_place_is_refused(tmp_path):
    source = shard(tmp_path / "source", state(), 2)
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["scale"] = next(
        name for name in index["weight_map"].values() if name != index["weight_map"]["scale"]
    )
    file.write_text(json.dumps(index))
    refused(source, "`scale` lies in")
    for broken in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": "../elsewhere.safetensors"}}'):
        file.write_text(broken)
        refused(source, "index|not there")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    source = shard(tmp_path / "source", state(), 2, with_index=False)
    extra = load_file(source / "model-00001-of-00002.safetensors")
    other = load_file(source / "model-00002-of-00002.safetensors")
    save_file(extra | other, source / "model-00002-of-00002.safetensors")
    refused(source, "which one is the model's")


@pytest.mark.parametrize("length", [0, 4, 8, 50, -1])
def test_a_truncated_file_is_refused(tmp_path, length):
    source = single(tmp_path / "source", state())
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(source, "cut off in its header|not whole")


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        '{"a": 3}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    ],
)
def test_a_wrong_header_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(ModelLoadError, match="header"):
        read_shard(file)


# --- companions ---


def test_companions_travel_and_leftovers_stay(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    travel = ["tokenizer.json", "generation_config.json", "chat_template.jinja", "vocab.txt", "spiece.model", "LICENSE"]
    stay = ["config.json", "record.json", "README.md", "model.safetensors.index.json", "pytorch_model.bin", "notes.pdf"]
    stay += ["all_results.json", "trainer_state.json"]
    for name in (*travel, *stay):
        (source / name).write_text(name)
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}]))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "1_Pooling" / "model.safetensors").write_text("weights")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("{}")
    copy_companions(source, target)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {*travel, "modules.json", "1_Pooling/config.json", "1_Pooling/model.safetensors"}
    assert (target / "vocab.txt").read_text() == "vocab.txt"


def test_what_is_there_already_is_kept(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("old")
    (tmp_path / "target" / "tokenizer.json").write_text("new")
    copy_companions(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "new"
