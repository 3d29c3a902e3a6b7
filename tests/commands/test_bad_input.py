"""Bad input gets one clear sentence and exit code 2: no traceback, and nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avss.record import RunRecord

SMALL = ("--samples", 4, "--seq-len", 16)


def refused(answer, *parts: str) -> None:
    """One sentence on the error stream that holds the parts."""
    assert answer.code == 2, (answer.code, answer.err)
    assert "Traceback" not in answer.err
    message = answer.err[answer.err.index("avss: ") :]
    assert message.count("\n") == 1, message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--fraction", 0), ("fraction", "0")),
        (("--fraction", 1), ("fraction", "1")),
        (("--fraction", 2), ("fraction", "2")),
        (("--fraction", -0.5), ("fraction", "-0.5")),
        (("--fraction", "nan"), ("fraction", "nan")),
        (("--fraction", 0.01), ("rounds to none", "--count 1")),
        (("--fraction", 0.99), ("cannot be removed",)),
        (("--count", 0), ("count", "0")),
        (("--count", 4), ("cannot be removed",)),
        (("--count", 99), ("cannot be removed",)),
        (("--blocks", "99"), ("`99`", "0 to")),
        (("--blocks", "-9"), ("`-9`",)),
        (("--blocks", "3-1"), ("backwards",)),
        (("--blocks", "one"), ("`one`",)),
        (("--blocks", ","), ("empty",)),
        (("--blocks", "0-4"), ("removes all",)),
        (("--count", 1, "--fraction", 0.5), ("exactly one",)),
        ((), ("exactly one",)),
        (("--count", 1, "--criterion", "avs"), ("`avs`", "Did you mean")),
        (("--count", 1, "--protect", "77"), ("`77`",)),
        (("--count", 2, "--contiguous", "--protect", "1,3"), ("neighbouring",)),
        (("--count", 1, "--compensate", "refti"), ("`refti`", "Did you mean", "refit")),
        (("--count", 1, "--compensate", "refit", "--on-disk"), ("`--compensate refit`", "--in-memory")),
        (("--count", 1, "--data", "missing.txt"), ("missing.txt",)),
        (("--count", 1, "--data", "builtin:nothing"), ("nothing", "Allowed")),
        (("--count", 1, "--samples", 0), ("samples",)),
        (("--count", 1, "--seq-len", 1), ("seq-len",)),
        (("--count", 1, "--batch-size", 0), ("batch-size",)),
        (("--count", 1, "--dtype", "int8"), ("int8", "float32")),
        (("--count", 1, "--device", "tpu"), ("tpu", "cpu")),
        (("--count", 1, "--head", "tail"), ("tail", "causal")),
    ],
)
def test_prune_refuses(avss_command, llama_folder, tmp_path, arguments, parts):
    out = tmp_path / "out"
    refused(avss_command("prune", llama_folder, "--out", out, "--quiet", *arguments), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "missing.gguf", " "])
def test_a_model_that_is_not_there(avss_command, name):
    refused(avss_command("inspect", name), "There is no file or folder")


def test_a_hub_model_without_a_network(avss_command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(avss_command("inspect", "nobody/has-this-model"), "nobody/has-this-model")


def test_files_that_are_not_what_they_say(avss_command, llama_folder, tmp_path):
    noise = bytes(range(256)) * 20
    gguf, folder = tmp_path / "model.gguf", tmp_path / "folder"
    gguf.write_bytes(noise)
    folder.mkdir()
    refused(avss_command("inspect", gguf), "not a GGUF file")
    gguf.write_bytes(b"GGUF" + noise)
    refused(avss_command("inspect", gguf), "Cannot read")
    refused(avss_command("inspect", folder), "not a model")
    (folder / "config.json").write_text("{ not json")
    refused(avss_command("inspect", folder), "config")
    (folder / "config.json").write_text((llama_folder / "config.json").read_text())
    refused(avss_command("inspect", folder), "weights")
    for name in ("a.csv", "a.jsonl", "a.json", "a.parquet", "a.txt", "a.xyz"):
        (tmp_path / name).write_bytes(noise)
        refused(avss_command("score", llama_folder, "--data", tmp_path / name, "--quiet", *SMALL), name)


def test_a_truncated_checkpoint(avss_command, llama_folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llama_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    refused(avss_command("inspect", broken), "weights")


@pytest.mark.parametrize(("content", "part"), [("", "empty"), ("  \n\n ", "empty"), ("cat", "tokens")])
def test_empty_and_tiny_texts(avss_command, llama_folder, tmp_path, content, part):
    (tmp_path / "text.txt").write_text(content)
    answer = avss_command("evaluate", llama_folder, "--task", "perplexity", "--data", tmp_path / "text.txt", "--quiet")
    refused(answer, part)


def test_columns_and_rows_of_tables(avss_command, llama_folder, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("left,right\na b,c d\n")
    refused(avss_command("score", llama_folder, "--data", table, "--quiet", *SMALL), "left, right")
    refused(
        avss_command("score", llama_folder, "--data", f"{table}#middle", "--quiet", *SMALL), "middle", "left, right"
    )
    rows = tmp_path / "rows.jsonl"
    good = {"question": "the cat", "choices": ["sees", "hears"], "answer": 0}
    for bad, part in [
        ({**good, "answer": 7}, "7"),
        ({**good, "answer": "many"}, "many"),
        ({**good, "choices": "sees"}, "choices"),
        ({**good, "choices": ["sees"]}, "choices"),
        ({"question": "the cat"}, "choices"),
    ]:
        rows.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        refused(avss_command("evaluate", llama_folder, "--task", "choice", "--data", rows, "--quiet"), part)
    rows.write_text("")
    refused(avss_command("evaluate", llama_folder, "--task", "choice", "--data", rows, "--quiet"), "rows")


def test_tasks_that_do_not_fit(avss_command, encoder_folder, classifier_folder, llama_folder, masked_folder, text_file):
    refused(
        avss_command("evaluate", encoder_folder, "--task", "perplexity", "--data", text_file, "--quiet"), "similarity"
    )
    refused(avss_command("evaluate", classifier_folder, "--task", "choice", "--quiet"), "classification")
    refused(avss_command("evaluate", llama_folder, "--task", "juggling", "--quiet"), "juggling")
    refused(avss_command("evaluate", llama_folder, "--data", text_file, "--quiet"), "--task")
    answer = avss_command("evaluate", llama_folder, "--baseline", masked_folder, "--task", "perplexity", "--quiet")
    refused(answer)


def test_existing_output_is_kept(avss_command, llama_folder, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    arguments = ("prune", llama_folder, "--blocks", "1", "--out", out, "--quiet")
    refused(avss_command(*arguments), "not empty", "--force")
    refused(avss_command(*arguments, "--force"), "not written by avss")
    assert (out / "thesis.txt").read_text() == "years of work"
    refused(avss_command("prune", llama_folder, "--blocks", "1", "--out", out / "thesis.txt", "--quiet"), "is a file")


def test_force_replaces_what_avss_wrote(avss_command, llama_folder, tmp_path):
    out = tmp_path / "out"
    assert avss_command("prune", llama_folder, "--blocks", "1", "--out", out, "--quiet").code == 0
    refused(avss_command("prune", llama_folder, "--blocks", "2", "--out", out, "--quiet"), "--force")
    assert RunRecord.read(out).cuts[0].plan.removed == (1,)
    assert avss_command("prune", llama_folder, "--blocks", "2", "--out", out, "--quiet", "--force").code == 0
    assert RunRecord.read(out).cuts[0].plan.removed == (2,)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_records_that_are_none(avss_command, tmp_path):
    refused(avss_command("report", tmp_path), "no record")
    (tmp_path / "record.json").write_text("[]")
    refused(avss_command("report", tmp_path), "schema version")
    (tmp_path / "record.json").write_text('{"schema_version": 1}')
    refused(avss_command("report", tmp_path), "not a run record")


def test_config_files(avss_command, tmp_path):
    file = tmp_path / "run.toml"
    refused(avss_command("run", "--config", file, "--out", tmp_path / "x"), "no config file")
    file.write_text("this is = = not toml")
    refused(avss_command("run", "--config", file, "--out", tmp_path / "x"), "not TOML")
    file.write_text('[model]\nsource = "x"\n[plan]\nfractoin = 0.2\n')
    refused(avss_command("run", "--config", file, "--out", tmp_path / "x"), "fractoin", "fraction")
    refused(avss_command("run", "--out", tmp_path / "x"), "No model")
    refused(avss_command("run", "some/model"), "--out")


def test_an_architecture_that_cannot_be_cut_is_refused_before_scoring(avss_command, tmp_path):
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    config = DiffLlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2
    )
    DiffLlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    arguments = ("prune", tmp_path / "model", "--count", 1, "--out", tmp_path / "x", "--quiet")
    refused(avss_command(*arguments), "diffllama", "cannot be cut", "index")
    answer = avss_command("inspect", tmp_path / "model")
    assert answer.code == 0
    assert "not cut" in answer.out


@pytest.mark.parametrize("on_disk", ["--on-disk", "--in-memory"])
def test_a_config_that_its_class_cannot_be_built_from(avss_command, llama_folder, tmp_path, on_disk):
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": -3}))
    arguments = ("prune", folder, "--blocks", 1, "--out", tmp_path / "x", "--quiet", on_disk)
    refused(avss_command(*arguments), str(folder), "LlamaForCausalLM")
    assert not (tmp_path / "x").exists()


def test_a_criterion_that_does_not_exist_for_this_model_says_so(avss_command, llama_folder, text_file):
    # A handful of tokens has no activation below 1e-5: the published script would print inf.
    arguments = ("--data", text_file, "--criteria", "avss-reference", "--samples", 1, "--seq-len", 4, "--quiet")
    refused(avss_command("score", llama_folder, *arguments), "avss-reference", "undefined", "Use more text")


def test_weights_with_nan_are_reported_not_ranked(avss_command, llama_folder, text_file, tmp_path):
    broken = tmp_path / "nan"
    broken.mkdir()
    for file in llama_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"] = torch.full_like(
        state["model.layers.1.mlp.down_proj.weight"], float("nan")
    )
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--count", 1, "--data", text_file, "--out", tmp_path / "x", "--quiet", *SMALL)
    refused(avss_command("prune", broken, *arguments))
    assert not (tmp_path / "x").exists()


def test_a_failed_verification_publishes_nothing(avss_command, llama_folder, tmp_path, monkeypatch):
    import avss.models.verify as room

    save = room.run_outputs
    calls = []

    def disturbed(loaded, token_ids, keep=None):
        calls.append(1)
        return save(loaded, token_ids, keep) + (1.0 if len(calls) == 3 else 0.0)  # the reloaded model's outputs

    monkeypatch.setattr(room, "run_outputs", disturbed)
    answer = avss_command("prune", llama_folder, "--blocks", "1", "--out", tmp_path / "x", "--quiet")
    assert answer.code == 1
    assert "withdrawn" in answer.err
    assert "Traceback" not in answer.err
    assert list(Path(tmp_path).iterdir()) == []
