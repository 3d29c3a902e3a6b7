"""`avss heal`: from a pruned folder to a healed one, on the command line and in Python."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from avss.composer.healing import healing_warnings
from avss.errors import UnsupportedArchitectureError
from avss.models.load import adopt
from avss.record import Healing, HealingStep, RunRecord
from tests.support.architectures import ARCHITECTURES, randomise, stored
from tests.support.tokenizers import word_tokenizer

SMALL = ("--budget", "300 tokens", "--seq-len", 16, "--batch-size", 2, "--validations", 2, "--precision", "float32")


@pytest.fixture
def pruned(avss_command, llama_folder, tmp_path) -> Path:
    """A tiny Llama without its third block."""
    folder = tmp_path / "smaller"
    assert avss_command("prune", llama_folder, "--blocks", "2", "--out", folder, "--quiet").code == 0
    return folder


def test_a_healed_folder_is_a_stock_checkpoint_with_its_story(avss_command, pruned, llama_folder, text_file, tmp_path):
    out = tmp_path / "healed"
    answer = avss_command("heal", pruned, "--teacher", llama_folder, "--data", text_file, "--out", out, *SMALL)
    assert answer.code == 0, answer.err
    for part in ("Healed", "held-out text", "Verified", "perplexity"):
        assert part in answer.out
    assert "300 tokens" in answer.err
    record, before = RunRecord.read(out), RunRecord.read(pruned)
    cut = record.cuts[0]
    assert cut.plan == before.cuts[0].plan
    assert record.model == before.model
    assert cut.healing is not None
    assert cut.healing.after.loss < cut.healing.before.loss
    assert cut.verification is not None
    assert cut.verification.passed
    assert cut.verification.of_raw_cut
    assert cut.model.fingerprint != before.cuts[0].model.fingerprint
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert len(model.model.layers) == 4
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "healed by training" in card
    assert "No weight was trained" not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healed", "smaller"]
    again = avss_command("evaluate", out, "--baseline", llama_folder, "--task", f"perplexity={text_file}", "--json")
    found = RunRecord.model_validate(json.loads(again.out)).cuts[0]
    assert found.plan == cut.plan
    assert found.healing == cut.healing
    assert avss_command("report", out, "--out", tmp_path / "report", "--quiet").code == 0
    assert "Healing" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_the_teacher_is_the_one_in_the_record(avss_command, llama_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dense").symlink_to(llama_folder)
    assert avss_command("prune", "dense", "--blocks", "2", "--out", "smaller", "--quiet").code == 0
    arguments = ("--data", text_file, "--out", "healed", "--quiet", *SMALL)
    assert avss_command("heal", "smaller", *arguments).code == 0
    Path("dense").unlink()
    answer = avss_command("heal", "smaller", *arguments, "--force")
    assert answer.code == 2
    assert "--teacher" in answer.err


def test_another_model_of_the_recorded_name_is_no_teacher(avss_command, llama_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama_folder, "gpt2")  # a fine-tune of somebody's, say
    assert avss_command("prune", "gpt2", "--blocks", "2", "--out", "smaller", "--quiet").code == 0
    arguments = ("heal", "smaller", "--data", text_file, "--quiet", *SMALL)
    Path("moved").mkdir()
    Path("smaller").rename("moved/smaller")  # the fingerprint does not depend on where a model lies
    shutil.copytree("gpt2", "moved/gpt2")
    monkeypatch.chdir("moved")
    answer = avss_command(*arguments, "--out", "healed")
    assert answer.code == 0, answer.err

    shutil.rmtree("gpt2")
    randomise(ARCHITECTURES["llama"](), seed=1).save_pretrained("gpt2")
    answer = avss_command(*arguments, "--out", "again")
    assert answer.code == 2
    assert "is not the `gpt2` that was cut" in answer.err
    assert "--teacher" in answer.err

    shutil.rmtree("gpt2")
    asked = []
    monkeypatch.setattr("avss.models.load._read_config", lambda location, **_: asked.append(location.name))
    smaller = dataclasses.replace(adopt(ARCHITECTURES["llama"]()), source="smaller"), RunRecord.read(Path("smaller"))
    monkeypatch.setattr("avss.composer.healing._smaller", lambda *_: smaller)
    answer = avss_command(*arguments, "--out", "again")
    assert answer.code == 2
    assert "neither beside" in answer.err
    assert asked == []  # a name without an owner is not looked up on the hub


def test_a_killed_command_goes_on(avss_command, pruned, llama_folder, text_file, tmp_path, monkeypatch):
    import avss.healing.loop as room
    from avss.healing.state import Checkpoint

    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (0.0,))
    out = tmp_path / "healed"
    arguments = ("heal", pruned, "--teacher", llama_folder, "--data", text_file, "--out", out, "--quiet", *SMALL)
    step, calls = room.Loop._step, []

    def dies(self):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        step(self)

    monkeypatch.setattr(room.Loop, "_step", dies)
    answer = avss_command(*arguments)
    assert answer.code == 1
    assert "Out of memory" in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".healed.healing", "smaller"]
    assert avss_command(*arguments).code == 0
    healing = RunRecord.read(out).cuts[0].healing
    assert healing is not None
    assert len(calls) - 3 == healing.num_steps - 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healed", "smaller"]


def test_a_classifier_learns_its_labels(avss_command, classifier_folder, review_file, tmp_path):
    pruned, out = tmp_path / "smaller", tmp_path / "healed"
    assert avss_command("prune", classifier_folder, "--blocks", "1", "--out", pruned, "--quiet").code == 0
    arguments = ("heal", pruned, "--teacher", classifier_folder, "--data", review_file, "--quiet", *SMALL)
    answer = avss_command(*arguments, "--labels", "label", "--out", out)
    assert answer.code == 0, answer.err
    healing = RunRecord.read(out).cuts[0].healing
    assert healing is not None
    assert "share of 0.5 on the labels" in healing.objective
    answer = avss_command(*arguments, "--labels", "stars", "--out", tmp_path / "x")
    assert (answer.code, "stars" in answer.err) == (2, True)


def test_the_api_heals_what_prune_returned(llama_folder, text_file):
    import avss

    small = avss.prune(str(llama_folder), blocks=[2])
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    healed = avss.heal(
        small, teacher=str(llama_folder), data=str(text_file), budget="300 tokens", seq_len=16, validations=1
    )
    assert healed.record.cuts[0].healing is not None
    assert healed.plan == small.plan
    assert all(torch.equal(before[name], value) for name, value in small.model.state_dict().items())
    assert not all(torch.equal(before[name], value) for name, value in healed.model.state_dict().items())


def test_what_prune_returned_knows_the_model_it_was_cut_from(llama_folder, text_file):
    import avss

    small = avss.prune(str(llama_folder), blocks=[2])
    healed = avss.heal(small, data=str(text_file), budget="200 tokens", seq_len=16, validations=1)
    assert healed.record.cuts[0].healing is not None


def test_a_run_is_not_thrown_away_for_its_healed_model(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "run"
    arguments = ("--blocks", "2", "--data", text_file, "--samples", 4, "--seq-len", 16, "--out", out)
    done = avss_command("run", llama_folder, *arguments, "--task", f"perplexity={text_file}", "--limit", 2)
    assert done.code == 0, done.err
    healing = ("--teacher", llama_folder, "--data", text_file, "--budget", "200 tokens", "--seq-len", 16)
    answer = avss_command("heal", out, *healing, "--out", out, "--force")
    assert (answer.code, "which is read here" in answer.err) == (2, True)
    assert (out / "report.html").is_file()
    answer = avss_command("heal", out, *healing, "--out", out / "model", "--force")
    assert answer.code == 0, answer.err


def test_what_prune_returned_is_healed_as_its_folder_would_be(llama_folder, text_file, tmp_path):
    """In the dtype it is stored in, whatever it computes in, and with the files that belong to it."""
    import avss

    dense = transformers.AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    transformers.AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path / "dense")
    small = avss.prune(str(tmp_path / "dense"), blocks=[2], out=tmp_path / "smaller")
    settings = {"teacher": str(tmp_path / "dense"), "data": str(text_file), "budget": "200 tokens", "seq_len": 16}
    avss.heal(small, out=tmp_path / "healed", **settings)
    avss.heal(tmp_path / "smaller", out=tmp_path / "from-folder", **settings)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("healed", "from-folder")]
    assert {value.dtype for value in stored[0].values()} == {torch.bfloat16}
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[1][name], value) for name, value in stored[0].items())


def test_a_second_healing_that_helped_takes_back_that_the_first_did_not(llama_folder, text_file, tmp_path):
    import avss

    small = avss.prune(str(llama_folder), blocks=[2], out=tmp_path / "smaller")
    settings = {"teacher": str(llama_folder), "data": str(text_file), "seq_len": 16, "out": tmp_path / "healed"}
    first = avss.heal(small, budget="0.001s", **settings)
    assert "did not suffice for one step" in " ".join(first.record.warnings)
    second = avss.heal(tmp_path / "healed", budget="300 tokens", force=True, **settings)
    assert second.record.cuts[0].healing.kept
    assert "did not suffice" not in " ".join(second.record.warnings)


def test_a_quantised_teacher_is_refused_before_the_time_is_spent(llama_folder, text_file):
    import avss

    small = avss.prune(str(llama_folder), blocks=[2])
    teacher = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    teacher.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedArchitectureError, match="quantised"):
        avss.heal(small, teacher=teacher, data=str(text_file), budget="1h", seq_len=16)


@pytest.mark.parametrize("steps", [0, 3])
def test_healing_that_brought_nothing_says_why(steps):
    point = HealingStep(step=0, num_tokens=0, seconds=1.5, loss=2.0)
    healing = Healing.model_construct(num_steps=steps, seconds=1.5, best_step=0, validation=(point,), losses=())
    (said,) = healing_warnings(healing)
    assert ("did not suffice for one step" in said) == (steps == 0)
    assert ("no better" in said) == (steps > 0)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--budget", "fast"), ("`fast`", "30m", "2M")),
        (("--budget", "2m tokens"), ("`m` is minutes",)),
        (("--budget", "0m"), ("greater than 0",)),
        (("--weights", "some"), ("weights", "some", "lora")),
        (("--learning-rate", 0), ("learning-rate", "0")),
        (("--batch-size", 0), ("batch-size",)),
        (("--label-weight", 2), ("label-weight", "2")),
        (("--precision", "int4"), ("precision", "int4", "bfloat16")),
        (("--data", "missing.txt"), ("missing.txt",)),
        (("--labels", "label"), ("classifiers", "causal")),
        (("--teacher", "nowhere.gguf"), ("nowhere.gguf",)),
        (("--rank", 32), ("`--rank 32`", "`--weights lora`")),
    ],
)
def test_heal_refuses(avss_command, pruned, llama_folder, tmp_path, arguments, parts):
    named = ("--teacher", llama_folder) if "--teacher" not in arguments else ()
    answer = avss_command("heal", pruned, *named, "--out", tmp_path / "out", "--quiet", *arguments)
    assert answer.code == 2, answer.err
    assert "Traceback" not in answer.err
    for part in parts:
        assert part in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]


def test_heal_refuses_models_without_a_story_and_teachers_of_another(
    avss_command, pruned, llama_folder, encoder_folder, tmp_path
):
    answer = avss_command("heal", llama_folder, "--out", tmp_path / "out", "--quiet")
    assert (answer.code, "no record" in answer.err) == (2, True)
    answer = avss_command("heal", pruned, "--teacher", pruned, "--out", tmp_path / "out", "--quiet")
    assert (answer.code, "5 blocks" in answer.err) == (2, True)
    answer = avss_command("heal", pruned, "--teacher", encoder_folder, "--out", tmp_path / "out", "--quiet")
    assert answer.code == 2
    assert "Traceback" not in answer.err


def test_a_failed_verification_publishes_nothing(avss_command, pruned, llama_folder, text_file, tmp_path, monkeypatch):
    import avss.models.verify as room

    outputs, calls = room.run_outputs, []

    def disturbed(loaded, token_ids, keep=None):
        calls.append(1)
        return outputs(loaded, token_ids, keep) + (1.0 if len(calls) == 3 else 0.0)  # the reloaded model's

    monkeypatch.setattr(room, "run_outputs", disturbed)
    out = tmp_path / "healed"
    answer = avss_command(
        "heal", pruned, "--teacher", llama_folder, "--data", text_file, "--out", out, "--quiet", *SMALL
    )
    assert answer.code == 1
    assert "withdrawn" in answer.err
    assert not out.exists()


def test_a_run_says_that_healing_did_no_good(llama_folder, text_file, tmp_path):
    import avss
    from avss.config import RunConfig

    config = {
        "model": {"source": str(llama_folder)},
        "data": {"source": str(text_file), "samples": 4, "seq_len": 16},
        "plan": {"blocks": "2"},
        "criteria": ["first"],
        "tasks": [{"kind": "perplexity", "data": str(text_file), "limit": 4}],
        "heal": {
            "source": str(text_file),
            "budget": "300 tokens",
            "seq_len": 16,
            "learning_rate": 1.0,
            "validations": 1,
        },
        "out": str(tmp_path / "out"),
    }
    record = avss.run(RunConfig.model_validate(config))
    assert record.cuts[0].healing.best_step == 0
    assert any("Healing made the held-out text no better" in warning for warning in record.warnings)


@pytest.mark.parametrize("name", ["bert-reward", "bert-labels"])
def test_labels_are_for_classifiers_that_choose_one(avss_command, name, review_file, tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "smaller"
    stored(name).save_pretrained(dense)
    word_tokenizer(adds="cls").save_pretrained(dense)
    assert avss_command("prune", dense, "--blocks", "1", "--out", out, "--quiet").code == 0
    labels = ("--data", review_file, "--labels", "label")
    answer = avss_command("heal", out, "--teacher", dense, *labels, "--out", tmp_path / "x")
    assert answer.code == 2
    assert "one right label of two or more" in answer.err
