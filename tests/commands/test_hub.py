"""The real hub code without a network: a hub cache on disk, read by a process that is told to stay offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gguf_files import write_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = "import sys; sys.argv[0] = 'avss'; from avss.cli.main import main; main()"


def cached(root: Path, kind: str, owner: str, name: str, files: dict[str, bytes]) -> None:
    """Lays out a repository as `huggingface_hub` caches it; the oldest models have no owner."""
    repository = root / "--".join(filter(None, (kind, owner, name)))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file, content in files.items():
        path = repository / "snapshots" / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def offline(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_CACHE": str(root), "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_hub_id_and_a_revision_load_from_the_cache(tmp_path: Path, llama_folder: Path):
    cached(tmp_path, "models", "acme", "tiny", {path.name: path.read_bytes() for path in llama_folder.iterdir()})
    for extra in ((), ("--revision", "main"), ("--revision", COMMIT)):
        done = offline(tmp_path, "inspect", "acme/tiny", "--json", "--quiet", *extra)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"]["source"] == "acme/tiny"


def test_a_gguf_file_of_the_hub_is_not_mistaken_for_one_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {blocks: write_gguf(tmp_path / f"{blocks}.gguf", num_blocks=blocks).read_bytes() for blocks in (3, 5)}
    cached(tmp_path, "models", "acme", "tiny", {"model.gguf": files[5]})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("model.gguf").write_bytes(files[3])
    for source, num_blocks in (("acme/tiny/model.gguf", 5), ("model.gguf", 3), (str(tmp_path / "5.gguf"), 5)):
        done = offline(tmp_path, "inspect", source, "--json", "--quiet")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"]["num_blocks"] == num_blocks
    done = offline(tmp_path, "inspect", "acme/tiny/other.gguf", "--quiet")
    assert done.returncode == 2
    assert "Cannot get `other.gguf` of `acme/tiny`" in done.stderr


def test_a_hub_id_can_be_pruned_and_its_card_names_it(tmp_path: Path, llama_folder: Path):
    cached(tmp_path, "models", "acme", "tiny", {path.name: path.read_bytes() for path in llama_folder.iterdir()})
    done = offline(tmp_path, "prune", "acme/tiny", "--blocks", "1", "--out", str(tmp_path / "out"), "--quiet")
    assert done.returncode == 0, done.stderr
    assert 'base_model: "acme/tiny"' in (tmp_path / "out" / "README.md").read_text()


def test_a_hub_id_without_an_owner_is_cut_on_disk_and_verified(tmp_path: Path, llama_folder: Path):
    cached(tmp_path, "models", "", "tiny", {path.name: path.read_bytes() for path in llama_folder.iterdir()})
    out = str(tmp_path / "out")
    done = offline(tmp_path, "prune", "tiny", "--blocks", "1", "--max-memory", "100MB", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "it is cut on disk" in done.stderr
    for against in ((), ("--against", "tiny")):
        done = offline(tmp_path, "verify", out, "--json", "--quiet", *against)
        assert done.returncode == 0, done.stderr + done.stdout
        assert len(json.loads(done.stdout)["checks"]) == 6


def test_the_modules_of_a_hub_model_come_along_in_memory(tmp_path: Path, encoder_folder: Path):
    """A sentence-transformers model: pooling by the first token, then a dense layer with weights of its own."""
    modules = [{"idx": idx, "name": str(idx), "path": path} for idx, path in enumerate(("", "1_Pooling", "2_Dense"))]
    files = {path.name: path.read_bytes() for path in encoder_folder.iterdir() if path.is_file()}
    files |= {
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": b'{"word_embedding_dimension": 16, "pooling_mode_cls_token": true}',
        "2_Dense/config.json": b'{"in_features": 16}',
        "2_Dense/model.safetensors": b"weights",
    }
    cached(tmp_path, "models", "acme", "sentences", files)
    out = tmp_path / "out"
    done = offline(tmp_path, "prune", "acme/sentences", "--blocks", "1", "--out", str(out), "--quiet")
    assert done.returncode == 0, done.stderr
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert (out / name).read_bytes() == files[name]


def test_a_hub_id_that_is_not_cached_is_one_sentence(tmp_path: Path):
    done = offline(tmp_path, "inspect", "acme/absent", "--quiet")
    assert done.returncode == 2
    assert done.stderr.startswith("avss: Cannot read the config of `acme/absent`")
    assert done.stderr.count("\n") == 1


def test_a_hub_data_set_that_cannot_be_had_is_one_sentence(tmp_path: Path, llama_folder: Path):
    done = offline(tmp_path, "score", str(llama_folder), "--data", "acme/corpus:small@test#text", "--quiet")
    assert done.returncode == 2
    assert "The data set `acme/corpus` cannot be read" in done.stderr
    assert done.stderr.count("\n") == 1
