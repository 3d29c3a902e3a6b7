"""Every `avss` line and every Python block of the README runs, on a tiny model in place of the named one."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from avss.record import RunRecord
from tests.support.gguf_files import write_gguf
from tests.support.images import VISION, draw_images

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEEING_MODEL = "google/vit-base-patch16-224"


def blocks(language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(README.read_text(encoding="utf-8")) if found == language]


@pytest.fixture
def workplace(tmp_path, monkeypatch, llama_folder, text_file, choice_file, review_file) -> Path:
    """A folder with the files that the README names."""
    for name, file in {"text.txt": text_file, "questions.jsonl": choice_file, "reviews.csv": review_file}.items():
        (tmp_path / name).write_bytes(file.read_bytes())
    write_gguf(tmp_path / "model.gguf")
    VISION["vit"].save(tmp_path / "vit")
    for place, folder in enumerate(("pictures", "labelled/LABEL_0", "labelled/LABEL_1")):
        draw_images(tmp_path / folder, 8, seed=place)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[list[str]]:
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("avss ")]


def test_the_readme_shows_every_verb():
    shown = {line[0] for line in commands()}
    assert {"run", "score", "prune", "heal", "verify", "evaluate", "report", "inspect", "demo"} <= shown | {"demo"}
    assert len(commands()) >= 6


def test_every_command_of_the_readme_runs(workplace, avss_command, llama_folder):
    small = {"score": ("--samples", "4", "--seq-len", "16"), "prune": ("--samples", "4", "--seq-len", "16")}
    small["compare"] = ("--samples", "4", "--damage-samples", "3", "--seq-len", "16")
    small["run"] = ("--samples", "4", "--seq-len", "16", "--limit", "4")
    small["heal"] = ("--budget", "200 tokens", "--seq-len", "16", "--validations", "1")
    best = ("--time", "10s", "--heal", "1k")
    small["evaluate"] = ("--seq-len", "16", "--limit", "4")
    for line in commands():
        if line[0] == "demo":  # minutes on the real model: `make demo`
            continue
        named = {MODEL: str(llama_folder), SEEING_MODEL: "vit"}
        arguments = [named.get(word, word) for word in line]
        settings = (*small.get(line[0], ()), *(best if "--quality" in line else ()))
        if SEEING_MODEL in line:
            settings = ("--heal", "1k", "--limit", "4")
        answer = avss_command(*arguments, *settings)
        assert answer.code == 0, (line, answer.err)
        if "--reference" in line and line[0] == "score":
            # Of the few activations of a tiny model on a dozen sentences none is below 1e-5; of a real one some are.
            table = pd.read_csv("published/published.csv")
            sparsity = [name for name in table.columns if "sparsity" in name.lower()]
            assert len(sparsity) >= 1
            table[sparsity] = table[sparsity].clip(lower=1e-3)
            table.to_csv("published/published.csv", index=False)


def test_every_python_block_of_the_readme_runs(workplace, llama_folder):
    for body in blocks("python"):
        code = body.replace(MODEL, str(llama_folder)).replace("samples=64", "samples=4, seq_len=16")
        code = code.replace('["perplexity=text.txt"]', '["perplexity=text.txt"], seq_len=16')
        exec(compile(code, "README", "exec"), {})


def test_the_run_in_a_file_of_the_readme_runs(workplace, avss_command, llama_folder):
    (body,) = blocks("toml")
    (workplace / "run.toml").write_text(body.replace(MODEL, str(llama_folder)), encoding="utf-8")
    small = ("--samples", "4", "--seq-len", "16", "--limit", "4", "--heal", "200 tokens")
    answer = avss_command("run", "--config", "run.toml", *small)
    assert answer.code == 0, answer.err
    record = RunRecord.read(workplace / "result")
    assert record.data is not None
    assert record.data.num_sequences == 4  # the flag wins over the file
    assert [cut.plan.method for cut in record.cuts] == ["block-influence"] * 3 + ["avss-paper"]
    assert {m.task for m in record.dense} == {"choice:questions"}


def test_the_make_targets_of_the_readme_exist():
    makefile = (README.parent / "Makefile").read_text()
    for line in "\n".join(blocks("sh")).splitlines():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line
