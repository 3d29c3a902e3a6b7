"""The cut on disk is the cut in memory, bit for bit, for every architecture that may be cut."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tools.sweep.shrink import small_model

from avss.composer.disk import prune_on_disk
from avss.config import PlanConfig
from avss.cut import cut, remap
from avss.errors import UnsupportedArchitectureError, VerificationError
from avss.models.load import adopt, load_model
from avss.models.outline import EmptyModel
from avss.models.proof import _moved_with_the_block
from avss.models.shards import find_stack_path, lay_out, read_checkpoint
from avss.models.stack import find_stack
from avss.record import Plan
from tests.support.architectures import ARCHITECTURES, gpt2, stored
from tests.support.on_disk import NOTHING_RUN, both_ways, same, weights
from tests.support.tokenizers import word_tokenizer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_on_disk_and_in_memory_give_the_same_bits_and_the_same_config(name, tmp_path):
    stored(name).save_pretrained(tmp_path / "model")
    same(*both_ways(tmp_path / "model", tmp_path, (0, 2)))


def test_a_block_that_cannot_go_is_not_chosen(tmp_path):
    small_model(transformers.ModernBertForMaskedLM, "modernbert").save_pretrained(tmp_path / "model")
    settings = PlanConfig(criterion="first", count=2, protect="none")
    record = prune_on_disk(str(tmp_path / "model"), settings, out=tmp_path / "out", max_memory=NOTHING_RUN)
    assert record.cuts[0].plan.removed == (1, 2)  # block 0 has no norm before its attention


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2", "bert-masked"])
@pytest.mark.parametrize("with_index", [True, False])
def test_sharded_bfloat16_checkpoints_too(name, with_index, tmp_path):
    ARCHITECTURES[name]().bfloat16().save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    on_disk = tmp_path / "disk"
    if not with_index:
        # transformers cannot load these; the cut on disk gives them an index.
        whole = tmp_path / "whole"
        prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1,3"), out=whole, max_memory=NOTHING_RUN)
        (tmp_path / "model" / "model.safetensors.index.json").unlink()
        prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1,3"), out=on_disk, max_memory=NOTHING_RUN)
        same(on_disk, whole)
        return
    one, other = both_ways(tmp_path / "model", tmp_path, (1, 3))
    same(one, other)
    assert {tensor.dtype for tensor in weights(one).values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_name_changes_on_disk_as_it_does_in_memory(name):
    state = stored(name).state_dict()
    path = find_stack(stored(name)).path
    plan = Plan(num_blocks=stored(name).config.num_hidden_layers, removed=(0, 2), method="explicit", rule="by hand")
    renamed = {new: key for key in state if (new := plan.rename(key, path)) is not None}
    remapped = remap(state, path, plan)
    assert renamed.keys() == remapped.keys()
    assert all(state[key] is remapped[new] for new, key in renamed.items())


def test_a_body_that_is_stored_without_the_prefix_of_its_head(tmp_path):
    """The keys of a bare encoder, loaded as the masked model that its config names."""
    ARCHITECTURES["bert"]().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    on_disk = tmp_path / "disk"
    record = prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1"), out=on_disk, max_memory=NOTHING_RUN)
    assert record.cuts[0].model.stack == "bert.encoder.layer"
    assert {name for name in weights(on_disk) if ".layer.2." in name}
    assert not {name for name in weights(on_disk) if name.startswith("bert.") or ".layer.3." in name}


def test_keys_that_the_class_does_not_know_travel_along(tmp_path):
    ARCHITECTURES["bert"]().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    extra = {"cls.predictions.bias": torch.ones(3), "embeddings.position_ids": torch.arange(4)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1"), out=tmp_path / "disk", max_memory=NOTHING_RUN)
    assert extra.keys() <= weights(tmp_path / "disk").keys()


def test_blocks_after_the_last_are_left_out_and_named(tmp_path):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    state |= {key.replace("layers.4.", "layers.5."): tensor for key, tensor in state.items() if "layers.4." in key}
    save_file({key: tensor.clone() for key, tensor in state.items()}, file, metadata={"format": "pt"})
    out = tmp_path / "disk"
    record = prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1"), out=out, max_memory=NOTHING_RUN)
    assert "9 weights stored after the last block" in record.warnings[0]
    facts = load_model(tmp_path / "model").facts()  # of what transformers loads
    assert record.model.num_parameters == facts.num_parameters
    assert record.model.num_block_parameters == facts.num_block_parameters
    assert {name.split(".")[2] for name in weights(out) if "layers" in name} == {"0", "1", "2", "3"}


def test_the_record_has_the_numbers_of_the_files(tmp_path):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "model")
    word_tokenizer(adds="bos").save_pretrained(tmp_path / "model")
    out = tmp_path / "disk"
    record = prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1,3"), out=out, max_memory=NOTHING_RUN)
    original, smaller = load_model(tmp_path / "model").facts(), load_model(out).facts()
    for told, facts in ((record.model, original), (record.cuts[0].model, smaller)):
        for field in ("architecture", "model_type", "head", "stack", "num_blocks", "hidden_size", "dtype"):
            assert getattr(told, field) == getattr(facts, field)
        assert told.num_parameters == facts.num_parameters
        assert told.num_block_parameters == facts.num_block_parameters
        assert told.checkpoint_bytes == facts.checkpoint_bytes
    proof = record.cuts[0].verification
    assert proof is not None
    assert proof.passed
    assert (proof.bytes_equal, proof.outputs_compared) == (True, False)
    assert [change.field for change in record.cuts[0].changes] == ["num_hidden_layers"]


def test_a_model_that_fits_is_run_too(tmp_path):
    ARCHITECTURES["gemma2"]().save_pretrained(tmp_path / "model")
    record = prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1,3"), out=tmp_path / "disk")
    proof = record.cuts[0].verification
    assert proof is not None
    assert proof.outputs_compared
    assert proof.cached_generation
    assert proof.max_diff_memory == 0


# --- the checks before and after copying can fail ---


def _problems(tmp_path: Path, change) -> dict[str, list[str]]:
    ARCHITECTURES["gemma2"]().save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    model = EmptyModel(str(tmp_path / "model"))
    plan = Plan(num_blocks=5, removed=(1, 3), method="explicit", rule="by hand")
    model.write_config(plan, tmp_path / "out")
    lay_out(
        read_checkpoint(tmp_path / "model"), lambda name: change(plan.rename(name, "model.layers")), tmp_path / "out"
    )
    return model.problems(tmp_path / "out")


def test_files_without_bytes_load_as_far_as_names_and_shapes_go(tmp_path):
    assert _problems(tmp_path, lambda name: name) == {}


def test_a_missing_and_a_left_over_key_are_noticed_before_copying(tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    found = _problems(tmp_path, lambda name: "stray.weight" if name == key else name)
    assert found == {"missing_keys": [key], "unexpected_keys": ["stray.weight"]}


def test_another_shape_is_noticed_before_copying(tmp_path):
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    found = _problems(tmp_path, lambda name: {up: down, down: up}.get(name, name))
    assert found == {"mismatched_keys": sorted([up, down])}


def test_nothing_is_copied_where_the_result_would_not_load(tmp_path, monkeypatch):
    ARCHITECTURES["bert"]().save_pretrained(tmp_path / "model")  # of a known type the files are asked, not the class
    monkeypatch.setattr("avss.composer.disk.fill", lambda *_, **__: pytest.fail("it was copied"))
    monkeypatch.setattr("avss.composer.disk.find_stack_path", lambda *_: "model.nowhere")
    with pytest.raises(UnsupportedArchitectureError, match=r"would not load.*layer\.3"):
        prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1"), out=tmp_path / "out", max_memory=NOTHING_RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_copy_gone_wrong_is_withdrawn(tmp_path, monkeypatch):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("avss.composer.disk.fill", lambda *_, **__: None)
    with pytest.raises(VerificationError, match="withdrawn"):
        prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1"), out=tmp_path / "out", max_memory=NOTHING_RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_obstacle_is_refused_on_disk_as_in_memory(tmp_path):
    model = gpt2("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)()
    model.save_pretrained(tmp_path / "model")
    loaded = adopt(model)
    plan = Plan(num_blocks=5, removed=(1,), method="explicit", rule="by hand")
    with pytest.raises(UnsupportedArchitectureError) as in_memory:
        cut(loaded, plan)
    with pytest.raises(UnsupportedArchitectureError) as on_disk:
        prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1"), out=tmp_path / "out")
    assert str(on_disk.value) == str(in_memory.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_quantised_checkpoint_is_refused(tmp_path):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantised))
    with pytest.raises(UnsupportedArchitectureError, match="quantised format"):
        prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="1"), out=tmp_path / "out")


def test_the_path_on_disk_is_unique_for_every_architecture():
    for name in ARCHITECTURES:
        model = stored(name)
        assert find_stack_path(list(model.state_dict()), len(find_stack(model))) == find_stack(model).path


def test_heads_that_time_whispers_words_follow_their_blocks_either_way(tmp_path):
    sizes = {"encoder_layers": 3, "decoder_layers": 3}
    model = small_model(transformers.WhisperForConditionalGeneration, "whisper", **sizes)
    model.generation_config.alignment_heads = [[0, 1], [1, 0], [2, 1]]
    model.generation_config._from_model_config = False  # as in Whisper's own files
    model.save_pretrained(tmp_path / "model")
    on_disk, in_memory = both_ways(tmp_path / "model", tmp_path, (1,))
    same(on_disk, in_memory)
    files = [json.loads((folder / "generation_config.json").read_text()) for folder in (on_disk, in_memory)]
    assert files[0] == files[1]
    assert files[0]["alignment_heads"] == [[0, 1], [1, 1]]


@pytest.mark.parametrize(("class_name", "model_type"), [("BeamForCausalLM", "beam"), ("ZayaForCausalLM", "zaya")])
def test_what_only_outputs_would_show_is_refused_where_nothing_is_run(class_name, model_type, tmp_path):
    if not hasattr(transformers, class_name):
        pytest.skip("this transformers is older than the type")
    small_model(getattr(transformers, class_name), model_type).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedArchitectureError, match="from the end only"):
        prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="2"), out=tmp_path / "out", max_memory=NOTHING_RUN)
    assert not (tmp_path / "out").exists()
    prune_on_disk(str(tmp_path / "model"), PlanConfig(blocks="4"), out=tmp_path / "out", max_memory=NOTHING_RUN)


def test_a_number_that_a_block_computes_with_is_no_place_in_a_cache():
    """Beam scales by 2 (i + 1); LongCat's 2 i and 2 i + 1 are places in its cache."""
    assert _moved_with_the_block("layer_idx", 4, 2, (2, 1))
    assert _moved_with_the_block("layer_idx", 5, 3, (2, 1))
    assert not _moved_with_the_block("attn_residual_add_idx", 6, 4, (2, 1))
