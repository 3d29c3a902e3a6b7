"""A tiny model folder with a tokenizer, small data files, and the command line called in this process."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from avss.cli.main import main
from tests.support.architectures import ARCHITECTURES
from tests.support.tokenizers import WORDS, word_tokenizer


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def avss_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Calls `avss ARGUMENTS` and returns exit code and both streams."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["avss", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        streams = capfd.readouterr()
        return Answer(code, streams.out, streams.err)

    return call


def _save(name: str, folder: Path, adds: str) -> Path:
    ARCHITECTURES[name]().save_pretrained(folder)
    word_tokenizer(adds=adds).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    return _save("llama", tmp_path_factory.mktemp("models") / "tiny-llama", "bos")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bare BERT with a tokenizer."""
    return _save("bert", tmp_path_factory.mktemp("models") / "tiny-bert", "cls")


@pytest.fixture(scope="session")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DistilBERT for masked language modelling."""
    return _save("distilbert-masked", tmp_path_factory.mktemp("models") / "tiny-distilbert", "cls")


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DistilBERT classifier."""
    return _save("distilbert-classifier", tmp_path_factory.mktemp("models") / "tiny-classifier", "cls")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred sentences of the tiny vocabulary, a paragraph each."""
    draw = np.random.default_rng(0)
    sentences = [" ".join(draw.choice(WORDS, size=draw.integers(6, 14))) for _ in range(200)]
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join(sentences), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def choice_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions with two choices."""
    draw = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [
        {
            "question": " ".join(draw.choice(WORDS, size=6)),
            "choices": [" ".join(draw.choice(WORDS, size=3)) for _ in range(2)],
            "answer": int(draw.integers(2)),
        }
        for _ in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def review_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen labelled sentences."""
    draw = np.random.default_rng(2)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    lines = [f"{' '.join(draw.choice(WORDS[9:], size=5))},{number % 2}" for number in range(16)]
    path.write_text("\n".join(["sentence,label", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the stranger's script in this process: starting one takes seconds. One test does without."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        answers = io.StringIO()
        monkeypatch.setattr(sys, "argv", ["-c", command[-1]])
        try:
            with contextlib.redirect_stdout(answers):
                exec(command[-2].replace('== "avss"', '== "nobody"'), {})
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, answers.getvalue(), "")

    monkeypatch.setattr("avss.models.fresh.subprocess.run", run)
