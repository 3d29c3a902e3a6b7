"""`avss prune --compensate`: what is saved is repaired, proven in two halves, and told in record, card and page."""

import pytest
import torch
import transformers

import avss
from avss.record import RunRecord
from avss.reporting.page import render_page

SMALL = ("--samples", 24, "--seq-len", 16)


@pytest.mark.parametrize("model", ["llama_folder", "encoder_folder", "classifier_folder"])
def test_repaired_checkpoint_is_verified_and_stock(avss_command, model, text_file, tmp_path, request):
    folder, out = request.getfixturevalue(model), tmp_path / "smaller"
    answer = avss_command(
        "prune", folder, "--blocks", 2, "--compensate", "auto", "--data", text_file, "--out", out, *SMALL
    )
    assert answer.code == 0, answer.err
    assert "Repair" in answer.out
    record = RunRecord.read(out)
    story, proof = record.cuts[0].compensation, record.cuts[0].verification
    assert story is not None
    assert proof is not None
    assert story.applied, story.note
    assert story.after < story.before
    assert proof.passed
    assert proof.of_raw_cut
    assert "raw cut" in answer.out
    assert record.data is not None
    card, page = (out / "README.md").read_text(), render_page(record)
    for text in (card, page):
        assert "Repaired without training" in text
        assert "before the weights were changed" in text
    _, info = getattr(transformers, record.cuts[0].model.architecture).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


def test_none_is_the_default_and_changes_no_weight(avss_command, llama_folder, text_file, tmp_path):
    for name, extra in (("plain", ()), ("none", ("--compensate", "none", "--data", text_file))):
        answer = avss_command("prune", llama_folder, "--blocks", 2, "--out", tmp_path / name, *extra)
        assert answer.code == 0, answer.err
        cut = RunRecord.read(tmp_path / name).cuts[0]
        assert cut.compensation is None
        assert not cut.verification.of_raw_cut
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "none"))
    assert one == two


def test_repair_in_memory_leaves_the_given_model_as_it_was(llama_folder, text_file):
    dense = avss.load(str(llama_folder), device="cpu")
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    small = avss.prune(dense, blocks=[2], compensate="refit", data=str(text_file), samples=24, seq_len=16)
    assert small.record.cuts[0].compensation.applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.model.state_dict().items())
    assert small.record.settings["compensate"] == "refit"


def test_a_changed_weight_after_the_repair_fails_the_proof(llama_folder, text_file, tmp_path, monkeypatch):
    """The repaired model is compared with memory: a save that lost the repair would be noticed."""
    from avss.composer import pruning

    real = pruning.save_model
    dense = avss.load(str(llama_folder), device="cpu")
    raw = pruning.cut(dense, avss.Plan(num_blocks=len(dense.stack), removed=(2,), method="explicit", rule="by hand"))
    monkeypatch.setattr(pruning, "save_model", lambda smaller, folder: real(raw, folder))
    with pytest.raises(avss.AvssError, match="differ from the model in memory"):
        avss.prune(
            dense, blocks=[2], compensate="refit", data=str(text_file), samples=24, seq_len=16, out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
