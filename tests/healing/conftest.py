"""A tiny dense model, its cut, and a text of the tiny vocabulary."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from avss.config import HealConfig
from avss.cut import cut
from avss.data.sources import Texts
from avss.models.load import Loaded, adopt
from avss.record import Plan
from tests.support.architectures import ARCHITECTURES, OTHER_HEADS
from tests.support.tokenizers import WORDS, word_tokenizer


@dataclasses.dataclass(frozen=True)
class Patient:
    """A dense model, the plan, and the smaller one."""

    dense: Loaded
    smaller: Loaded
    plan: Plan


@pytest.fixture(scope="session")
def patient() -> Callable[..., Patient]:
    """Makes a patient of an architecture; by default without block 2, the third."""

    def make(name: str = "llama", removed: tuple[int, ...] = (2,)) -> Patient:
        reads_cls = name.split("-")[0] in ("bert", "distilbert", "roberta", "electra", "t5", "bart")
        dense = adopt((ARCHITECTURES | OTHER_HEADS)[name](), word_tokenizer(adds="cls" if reads_cls else "bos"))
        plan = Plan(num_blocks=len(dense.stack), removed=removed, method="explicit", rule="by hand")
        return Patient(dense, cut(dense, plan), plan)

    return make


@pytest.fixture(scope="session")
def text() -> Texts:
    """Sixty sentences, a paragraph each."""
    draw = np.random.default_rng(0)
    sentences = [" ".join(draw.choice(WORDS, size=draw.integers(6, 14))) for _ in range(60)]
    return Texts(texts=("\n\n".join(sentences),), source="text.txt", is_prose=True)


@pytest.fixture(scope="session")
def small() -> Callable[..., HealConfig]:
    """Settings for a run of about six steps, in float32, on the text as it is."""

    def make(**settings: Any) -> HealConfig:
        common = {"budget": "400 tokens", "seq_len": 16, "batch_size": 4, "precision": "float32", "validations": 2}
        return HealConfig(**(common | {"augment": 0.0} | settings))

    return make
