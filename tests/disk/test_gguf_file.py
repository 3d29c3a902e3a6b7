"""Cutting GGUF files as they lie: tensors bit-equal, metadata right, and what llama.cpp would misread is refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from avss.errors import ModelLoadError, UnsupportedArchitectureError
from avss.models.gguf_file import FAMILIES, GgufFile, check_cut, metadata_changes, write_cut
from avss.record import Plan
from tests.support.gguf_files import write_gguf


def plan(num_blocks: int, *removed: int) -> Plan:
    return Plan(num_blocks=num_blocks, removed=removed, method="explicit", rule="by hand")


def cut_file(source: Path, target: Path, *removed: int) -> tuple[gguf.GGUFReader, gguf.GGUFReader]:
    """Original and result as the gguf library reads them."""
    file = GgufFile(source)
    one = plan(file.num_blocks, *removed)
    write_cut(file, one, target)
    assert check_cut(file, one, GgufFile(target)) == []
    return gguf.GGUFReader(source), gguf.GGUFReader(target)


@pytest.mark.parametrize("quantised", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_kept_tensors_keep_their_bytes_types_and_shapes(tmp_path, quantised):
    source = write_gguf(tmp_path / "a.gguf", quantised=quantised)
    before, after = cut_file(source, tmp_path / "b.gguf", 1, 3)
    old = {tensor.name: tensor for tensor in before.tensors}
    new = {tensor.name: tensor for tensor in after.tensors}
    origin = {0: 0, 1: 2, 2: 4}
    names = {
        name
        if not name.startswith("blk.")
        else "blk.{}.{}".format(origin[int(name.split(".")[1])], name.split(".", 2)[2])
        for name in new
    }
    assert names == {name for name in old if not name.startswith(("blk.1.", "blk.3."))}
    for name, tensor in new.items():
        index = name.split(".")[1]
        twin = old[name.replace(f"blk.{index}.", f"blk.{origin[int(index)]}.") if name.startswith("blk.") else name]
        assert tensor.tensor_type == twin.tensor_type
        assert tensor.shape.tolist() == twin.shape.tolist()
        assert np.asarray(tensor.data).tobytes() == np.asarray(twin.data).tobytes()


def test_only_the_block_count_changes_in_the_metadata(tmp_path):
    before, after = cut_file(write_gguf(tmp_path / "a.gguf"), tmp_path / "b.gguf", 2)
    changed = {
        name: (field.contents(), after.fields[name].contents())
        for name, field in before.fields.items()
        if field.contents() != after.fields[name].contents()
    }
    assert changed.keys() == {"llama.block_count", "GGUF.tensor_count"}
    assert changed["llama.block_count"] == (5, 4)
    assert before.fields.keys() == after.fields.keys()
    assert all(field.types == after.fields[name].types for name, field in before.fields.items())


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_tensors_stay_aligned(tmp_path, alignment):
    source = write_gguf(tmp_path / "a.gguf", alignment=alignment)
    _, after = cut_file(source, tmp_path / "b.gguf", 0, 4)
    assert after.alignment == (alignment or 32)
    assert all(tensor.data_offset % after.alignment == 0 for tensor in after.tensors)


def test_per_block_arrays_and_leading_counts_follow_the_blocks(tmp_path):
    metadata = {
        "attention.head_count_kv": [2, 1, 4, 3, 2],
        "feed_forward_length": [10, 20, 30, 40, 50],
        "attention.sliding_window_pattern": [True, False, True, True, False],
        "leading_dense_block_count": 3,
    }
    source = write_gguf(tmp_path / "a.gguf", metadata=metadata)
    _, after = cut_file(source, tmp_path / "b.gguf", 1, 3)
    values = {name.removeprefix("llama."): field.contents() for name, field in after.fields.items()}
    assert values["attention.head_count_kv"] == [2, 4, 2]
    assert values["feed_forward_length"] == [10, 30, 50]
    assert values["attention.sliding_window_pattern"] == [True, True, False]
    assert values["leading_dense_block_count"] == 2
    assert after.fields["llama.attention.sliding_window_pattern"].types[-1] == gguf.GGUFValueType.BOOL


def test_an_array_that_nobody_explains_is_refused_by_name(tmp_path):
    file = GgufFile(write_gguf(tmp_path / "a.gguf", metadata={"mystery": [1.0, 2.0, 3.0, 4.0, 5.0]}))
    with pytest.raises(UnsupportedArchitectureError, match=r"`llama\.mystery` has one entry per block"):
        metadata_changes(file, plan(5, 1))
    other = GgufFile(write_gguf(tmp_path / "b.gguf", metadata={"mystery": [1.0, 2.0]}))
    assert len(metadata_changes(other, plan(5, 1))) == 1


def test_lists_of_the_tokenizer_and_of_languages_are_none_per_block(tmp_path):
    file = GgufFile(write_gguf(tmp_path / "a.gguf", general={"general.languages": ["a", "b", "c", "d", "e"]}))
    assert [change.field for change in metadata_changes(file, plan(5, 1))] == ["llama.block_count"]


@pytest.mark.parametrize("name", ["n_deepstack_layers", "attention.shared_kv_layers", "full_attention_interval"])
def test_a_counter_that_nobody_explains_is_refused_by_name(tmp_path, name):
    file = GgufFile(write_gguf(tmp_path / "a.gguf", metadata={name: 2}))
    with pytest.raises(UnsupportedArchitectureError, match=rf"`llama\.{name}` seems to count blocks"):
        metadata_changes(file, plan(5, 1))
    zero = GgufFile(write_gguf(tmp_path / "b.gguf", metadata={name: 0}))
    assert metadata_changes(zero, plan(5, 1))


def test_blocks_that_predict_further_tokens_cannot_go(tmp_path):
    file = GgufFile(write_gguf(tmp_path / "a.gguf", metadata={"nextn_predict_layers": 1}))
    with pytest.raises(UnsupportedArchitectureError, match="Block 4 predicts further tokens"):
        metadata_changes(file, plan(5, 4))
    assert metadata_changes(file, plan(5, 3))


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    file = GgufFile(write_gguf(tmp_path / "a.gguf", architecture="baichuan"))
    with pytest.raises(UnsupportedArchitectureError, match=r"`baichuan` has not been proven.*llama"):
        metadata_changes(file, plan(5, 1))


# --- what llama.cpp concludes from a block's number ---


@pytest.mark.parametrize(
    ("architecture", "metadata", "removed", "refused"),
    [
        ("gemma2", {}, (0,), True),
        ("gemma2", {}, (0, 1), False),
        ("gemma2", {}, (1, 2), False),
        ("gemma2", {}, (1, 4), True),
        ("gemma2", {}, (11,), False),  # nothing comes after it
        ("gemma2", {"attention.sliding_window_pattern": [True, False, False] * 4}, (0,), False),
        ("gemma3", {}, (0,), False),  # without a window all blocks are alike
        ("gemma3", {"attention.sliding_window": 8}, (0,), True),
        ("gemma3", {"attention.sliding_window": 8}, (0, 1, 2, 3, 4, 5), False),
        ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}, (0, 1), False),
        ("smollm3", {}, (2,), True),
        ("smollm3", {}, (0, 1, 2, 3), False),
        ("gpt-oss", {}, (5,), True),
        ("cohere2", {}, (4, 5, 6, 7), False),
        ("llama", {}, (0, 5, 7), False),
    ],
)
def test_blocks_whose_kind_follows_from_their_number(tmp_path, architecture, metadata, removed, refused):
    source = write_gguf(
        tmp_path / "a.gguf", architecture=architecture, num_blocks=12, metadata=metadata, quantised="F32"
    )
    file, one = GgufFile(source), plan(12, *removed)
    if refused:
        with pytest.raises(UnsupportedArchitectureError, match="of the wrong kind"):
            metadata_changes(file, one)
        return
    assert metadata_changes(file, one)
    pattern = metadata.get("attention.sliding_window_pattern")
    period = pattern if isinstance(pattern, int) else FAMILIES[architecture].period
    if period and not isinstance(pattern, list) and not (FAMILIES[architecture].only_with_window and not metadata):
        kinds = [block % period == period - 1 for block in range(12)]
        assert [kinds[block] for block in one.kept] == kinds[: len(one.kept)]


def test_a_number_of_blocks_that_tells_more_is_refused(tmp_path):
    source = write_gguf(tmp_path / "a.gguf", architecture="gemma2", num_blocks=48, quantised="F32")
    with pytest.raises(UnsupportedArchitectureError, match="46 blocks for a model whose attention is scaled"):
        metadata_changes(GgufFile(source), plan(48, 0, 1))
    assert metadata_changes(GgufFile(source), plan(48, 0, 1, 2, 3))


def test_tensors_that_are_read_from_a_number_of_blocks_on(tmp_path):
    source = write_gguf(tmp_path / "a.gguf", architecture="command-r", num_blocks=66, quantised="F32")
    assert metadata_changes(GgufFile(source), plan(66, 0, 1))
    with pytest.raises(UnsupportedArchitectureError, match="64 blocks or more, so 63 of 66"):
        metadata_changes(GgufFile(source), plan(66, 0, 1, 2))
    small = write_gguf(tmp_path / "b.gguf", architecture="command-r", num_blocks=40, quantised="F32")
    assert metadata_changes(GgufFile(small), plan(40, 0, 1, 2))


# --- files that are not what they should be ---


def test_files_that_cannot_be_cut(tmp_path):
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"GGUF" + bytes(range(256)))
    with pytest.raises(ModelLoadError, match="Cannot read"):
        GgufFile(noise)
    whole = write_gguf(tmp_path / "whole.gguf")
    for length in (20, 500, 5000, -40):
        part = tmp_path / "part.gguf"
        part.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(ModelLoadError, match=r"part\.gguf"):
            GgufFile(part)
    with pytest.raises(ModelLoadError, match="block 2 has none"):
        GgufFile(write_gguf(tmp_path / "gap.gguf", without_block=2))
    with pytest.raises(ModelLoadError, match="one of 3 parts"):
        GgufFile(write_gguf(tmp_path / "split.gguf", general={"split.count": 3}))


def test_a_wrong_result_is_noticed(tmp_path):
    source, target = write_gguf(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    file, one = GgufFile(source), plan(5, 1)
    write_cut(file, one, target)
    assert any("bytes" in problem for problem in check_cut(file, plan(5, 2), GgufFile(target)))
    assert any("block_count" in problem for problem in check_cut(file, plan(5, 1, 2), GgufFile(target)))
    place = int(GgufFile(target).reader.tensors[4].data_offset)
    with target.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))
    assert len(check_cut(file, one, GgufFile(target))) == 1
