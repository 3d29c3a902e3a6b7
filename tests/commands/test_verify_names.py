"""`avss verify` where a checkpoint's names, files or classes are not those that transformers writes today."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    EsmConfig,
    EsmForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

import avss
from avss.record import CheckReport
from tests.support.architectures import ARCHITECTURES, OTHER_HEADS, randomise

pytestmark = pytest.mark.usefixtures("one_process")
BYTES = "The weights it kept are those of the original, byte for byte"


def body_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As GPT-2 and Bloom lie on the hub: the body's names, `h.0...`, no head, and masks that are buffers today."""
    found = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    return found | {f"h.{block}.attn.bias": torch.ones(1, 1, 8, 8) for block in range(5)}


def old_norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As BERT lies on the hub: the norm's weight and bias under the names that TensorFlow gave them."""
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    state = {name: tensor.clone() for name, tensor in change(load_file(folder / "model.safetensors")).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def failed(report: CheckReport) -> list[str]:
    return [f"{check.what}: {check.found}" for check in report.checks if not check.passed]


@pytest.mark.parametrize(("name", "names"), [("gpt2", body_alone), ("bert-masked", old_norms), ("bert", old_norms)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_older_names_are_the_same_weights(tmp_path, name, names, on_disk):
    source, out = saved(ARCHITECTURES[name](), tmp_path / "dense"), tmp_path / "out"
    rewritten(source, names)
    avss.prune(source, blocks=[1, 3], out=out, on_disk=on_disk)
    report = avss.verify(out, against=source)
    assert failed(report) == []
    assert [check.what for check in report.checks].count(BYTES) == 1
    # And without the record they tell which blocks are gone.
    (out / "record.json").unlink()
    plan = avss.verify(out, against=source).plan
    assert plan is not None
    assert plan.removed == (1, 3)
    # The check can fail: one value of one norm.
    norms = [key for key in load_file(out / "model.safetensors") if re.search(r"\.1\..*(norm|ln_1)", key.lower())]
    key = norms[0]
    rewritten(out, lambda state: state | {key: state[key] + 1e-3})
    with_plan = avss.prune(source, blocks=[1, 3], out=tmp_path / "again", on_disk=on_disk)
    (out / "record.json").write_text(with_plan.record.to_json())
    assert any(line.startswith(BYTES) for line in failed(avss.verify(out, against=source)))


def test_a_tensor_with_a_slice_for_each_block_is_no_fault(tmp_path):
    config = EsmConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, pad_token_id=1, mask_token_id=2, position_embedding_type="rotary",
    )  # fmt: skip
    source, out = saved(randomise(EsmForMaskedLM(config)), tmp_path / "dense"), tmp_path / "out"
    avss.prune(source, blocks=[1], out=out)
    report = avss.verify(out, against=source)
    assert failed(report) == []
    assert any("contact_head" in note for note in report.notes)


@pytest.mark.parametrize("blocks", [[0], [1]])
def test_what_moves_to_the_new_first_block_is_compared(tmp_path, blocks):
    source, out = saved(OTHER_HEADS["t5"](), tmp_path / "dense"), tmp_path / "out"
    avss.prune(source, blocks=blocks, out=out, stack="encoder")
    report = avss.verify(out, against=source)
    assert failed(report) == []
    assert report.notes == ()
    key = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rewritten(out, lambda state: state | {key: state[key] + 1e-3})
    assert any(line.startswith(BYTES) and key in line for line in failed(avss.verify(out, against=source)))


def test_a_block_may_lie_in_several_files(tmp_path):
    model = ARCHITECTURES["llama"]()
    whole, parts, out = tmp_path / "whole", tmp_path / "parts", tmp_path / "out"
    model.save_pretrained(whole)
    model.save_pretrained(parts, max_shard_size="9KB")
    assert len(list(parts.glob("*.safetensors"))) > 6
    avss.prune(whole, blocks=[0, 2], out=out)
    (out / "record.json").unlink()
    report = avss.verify(out, against=parts)
    assert (report.plan and report.plan.removed, failed(report)) == ((0, 2), [])


SMALL = {"vocab_size": 48, "d_model": 16}


@pytest.mark.parametrize(
    ("build", "stack"),
    [
        (
            lambda: BartModel(
                BartConfig(
                    **SMALL, encoder_layers=4, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2,
                    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
                )
            ),
            "encoder",
        ),
        (lambda: T5EncoderModel(T5Config(**SMALL, d_kv=8, d_ff=24, num_heads=2, num_layers=4)), "auto"),
    ],
)  # fmt: skip
def test_a_class_for_which_no_auto_class_stands_is_loaded_as_itself(tmp_path, build, stack):
    model = randomise(build())
    source, out = saved(model, tmp_path / "dense"), tmp_path / "out"
    avss.prune(source, blocks=[1], out=out, stack=stack)
    report = avss.verify(out, against=source)
    assert failed(report) == []
    assert any(check.found == f"as {type(model).__name__}" for check in report.checks)


def shards_without_index(folder: Path) -> Path:
    ARCHITECTURES["llama"]().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors.index.json").unlink()
    return folder


def test_shards_that_came_without_an_index_are_cut_and_proven(tmp_path):
    source, out = shards_without_index(tmp_path / "dense"), tmp_path / "out"
    before = sorted(path.name for path in source.iterdir())
    result = avss.prune(source, blocks=[1, 3], out=out, on_disk=True)
    proof = result.record.cuts[0].verification
    assert proof is not None
    assert proof.outputs_compared
    assert proof.max_diff_memory == 0
    report = avss.verify(out, against=source)
    assert (failed(report), len(report.checks)) == ([], 6)
    assert sorted(path.name for path in source.iterdir()) == before


def test_settings_of_generation_in_an_old_config_travel(tmp_path):
    source = saved(ARCHITECTURES["gpt2"](), tmp_path / "dense")
    (source / "generation_config.json").unlink(missing_ok=True)
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_length": 77, "do_sample": True, "top_k": 9}))
    found = []
    for on_disk in (True, False):
        out = tmp_path / f"out-{on_disk}"
        avss.prune(source, blocks=[1], out=out, on_disk=on_disk)
        settings = AutoModelForCausalLM.from_pretrained(out).generation_config
        found.append({name: getattr(settings, name) for name in ("max_length", "do_sample", "top_k")})
    assert found[0] == found[1]
    assert found[0]["top_k"] == 9
