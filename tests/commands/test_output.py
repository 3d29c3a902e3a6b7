"""Folders appear whole or not at all, whenever the process dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avss.errors import OutputExistsError
from avss.output import _process, check_free, fresh_folder


def test_the_folder_appears_only_at_the_end(tmp_path: Path):
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "record.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "record.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail_halfway(out: Path) -> None:
    with fresh_folder(out, force=True) as folder:
        (folder / "record.json").write_text("new")
        raise RuntimeError


def test_an_error_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(RuntimeError):
        fail_halfway(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_replacing_keeps_the_old(tmp_path: Path):
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "record.json").write_text("old")
    with pytest.raises(RuntimeError):
        fail_halfway(tmp_path / "out")
    assert (tmp_path / "out" / "record.json").read_text() == "old"


def test_files_get_the_modes_of_the_umask(tmp_path: Path):
    old = os.umask(0o022)
    try:
        with fresh_folder(tmp_path / "out") as folder:
            (folder / "private").touch(mode=0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o644


def fill_while_somebody_else_does(out: Path) -> None:
    with fresh_folder(out) as folder:
        (folder / "record.json").write_text("mine")
        out.mkdir()
        (out / "notes.txt").write_text("yours")


def test_what_came_meanwhile_is_left_alone_and_the_result_lies_beside_it(tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError, match=r"in the meantime.*out-2`"):
        fill_while_somebody_else_does(out)
    assert (out / "notes.txt").read_text() == "yours"
    assert (tmp_path / "out-2" / "record.json").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]


def test_places_that_cannot_be_renamed_are_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for place in (Path(), Path("../") / tmp_path.name):
        with pytest.raises(OutputExistsError, match=r"is the working directory.*result"):
            check_free(place, force=False)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="a link to something that is not there"):
        check_free(tmp_path / "gone", force=False)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(OutputExistsError, match="is a mounted file system"):
        check_free(tmp_path / "disk", force=False)


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path):
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "record.json").write_text("{}")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "large" / "record.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out"]


@pytest.mark.parametrize("source", ["out/text.csv", "other.txt,out/text.csv", "out/text.csv#body", "out"])
def test_whatever_way_it_is_named_what_is_read_is_never_replaced(tmp_path: Path, monkeypatch, source: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("record.json", "text.csv"):
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(OutputExistsError, match="which is read here"):
        check_free(Path("out"), force=True, sources=[None, "x" * 5000, source])
    check_free(Path("out"), force=True, sources=["other.txt", "x" * 5000])


def test_an_unwritable_parent_is_refused_early(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="cannot be written"), fresh_folder(tmp_path / "file" / "out"):
        pass


KILLED = """
import sys, time
from pathlib import Path
from avss.output import _process, check_free, fresh_folder
out = Path(sys.argv[1])
with fresh_folder(out, force=True) as folder:
    (folder / "record.json").write_text("new")
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("before", [None, "old"])
def test_a_killed_process_leaves_the_old_or_nothing_and_the_next_one_sweeps(tmp_path: Path, before: str | None):
    out = tmp_path / "out"
    if before:
        with fresh_folder(out) as folder:
            (folder / "record.json").write_text(before)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "half"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert out.exists() == bool(before)
    if before:
        assert (out / "record.json").read_text() == before
    with fresh_folder(out, force=True) as folder:
        (folder / "record.json").write_text("later")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_killed_between_the_renames_is_undone(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".out.partial-{_process(dead.pid)}-abc-old"
    left.mkdir()
    (left / "record.json").write_text("old")
    with pytest.raises(OutputExistsError), fresh_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "record.json").read_text() == "old"


def test_a_living_process_keeps_its_folder(tmp_path: Path):
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        theirs = tmp_path / f".out.partial-{_process(alive.pid)}-abc"
        theirs.mkdir()
        with fresh_folder(tmp_path / "out") as folder:
            (folder / "record.json").write_text("x")
        assert theirs.exists()
    finally:
        alive.kill()
        alive.wait()


def test_a_process_of_another_machine_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: f"not-{here}")
        theirs = tmp_path / f".out.partial-{_process(dead.pid)}-abc"
        theirs.mkdir()
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "record.json").write_text("x")
    assert theirs.exists()


def test_pruning_killed_at_random_moments_never_leaves_half_a_model(llama_folder: Path, tmp_path: Path):
    code = "import sys; sys.argv[0]='avss'; from avss.cli.main import main; main()"
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, "prune", str(llama_folder), "--blocks", "1", "--out", str(out), "--quiet"]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    whole = time.perf_counter() - start
    names = {path.name for path in out.iterdir()}
    for share in (0.6, 0.8, 0.9, 0.97):
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        process = subprocess.Popen(command)
        time.sleep(whole * share)
        process.kill()
        process.wait()
        if out.exists():
            assert {path.name for path in out.iterdir()} == names


@pytest.mark.parametrize("read", ["out", "out/model", "out/data.txt"])
def test_what_is_read_is_never_replaced(tmp_path: Path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    Path("out/model").mkdir(parents=True)
    Path("out/record.json").write_text("{}")
    Path("out/data.txt").write_text("text")
    with pytest.raises(OutputExistsError, match="read here"):
        check_free(tmp_path / "out", force=True, sources=(None, "builtin", read))
    check_free(tmp_path / "out", force=True, sources=("builtin", "elsewhere"))


@pytest.mark.parametrize("verb", ["score", "evaluate", "damage", "compare", "stability", "prune", "run", "heal"])
def test_no_verb_replaces_the_model_it_reads(verb, avss_command, llama_folder, tmp_path):
    model = tmp_path / "run" / "model"
    assert avss_command("prune", llama_folder, "--blocks", "1", "--out", model, "--quiet").code == 0
    (tmp_path / "run" / "record.json").write_text("{}")
    before = {path: path.read_bytes() for path in model.iterdir()}
    size = ("--count", 1) if verb == "prune" else ()
    answer = avss_command(verb, model, *size, "--out", tmp_path / "run", "--force", "--quiet")
    assert answer.code == 2
    assert "read here" in answer.err
    assert {path: path.read_bytes() for path in model.iterdir()} == before
