"""Tiny models with a tokenizer, their cuts, and data for them."""

import json

import numpy as np
import pytest
import torch

from avss.cut import cut
from avss.models.load import adopt
from avss.record import Plan
from tests.support.architectures import stored
from tests.support.tokenizers import WORDS, word_tokenizer

ADDS = {"causal": "bos", "masked": "cls", "encoder": "cls", "classifier": "cls"}
NAMES = {"causal": "llama", "masked": "bert-masked", "encoder": "bert", "classifier": "distilbert-classifier"}


def load(head):
    return adopt(stored(NAMES[head]), word_tokenizer(adds=ADDS[head]))


def sentence(random, length):
    return " ".join(random.choice([word for word in WORDS if word.isalpha()], size=length))


@pytest.fixture(scope="session")
def shorter():
    """Cuts the named blocks out of a model; without any, a second model of the same weights."""

    def shorten(loaded, *removed):
        return cut(loaded, Plan(num_blocks=len(loaded.stack), removed=removed, method="explicit", rule="by hand"))

    return shorten


@pytest.fixture(scope="session")
def causal():
    return load("causal")


@pytest.fixture(scope="session")
def masked():
    return load("masked")


@pytest.fixture(scope="session")
def encoder():
    return load("encoder")


@pytest.fixture(scope="session")
def classifier():
    return load("classifier")


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    """A text file of 30 paragraphs of unequal length, 370 words or so."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n\n".join(sentence(random, random.integers(5, 20)) for _ in range(30)))
    return str(path)


@pytest.fixture(scope="session")
def quiz(tmp_path_factory):
    """A file of 16 questions with two to four choices of unequal length."""
    random = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("quiz") / "quiz.jsonl"
    with path.open("w") as file:
        for _ in range(16):
            choices = [sentence(random, random.integers(1, 5)) for _ in range(random.integers(2, 5))]
            answer = int(random.integers(len(choices)))
            row = {"question": sentence(random, random.integers(2, 12)), "choices": choices, "answer": answer}
            file.write(json.dumps(row) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A table of 30 texts of three labels."""
    random = np.random.default_rng(2)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    lines = [f"{sentence(random, random.integers(3, 14))},{random.integers(3)}" for _ in range(30)]
    path.write_text("\n".join(["text,label", *lines, ""]))
    return str(path)


@pytest.fixture
def no_forward(monkeypatch):
    """Makes any forward pass fail: bad input must be found before."""

    def fail(self, *args, **kwargs):
        raise AssertionError(f"{type(self).__name__} was run")

    monkeypatch.setattr(torch.nn.Module, "__call__", fail)
