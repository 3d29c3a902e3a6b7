"""Folders that appear whole or not at all.

Everything is written to a hidden neighbour and renamed into place at the end, so a process killed at any moment leaves
either the old folder or the new one, never half of one. Leftovers of killed processes are swept by the next run.
"""

import contextlib
import itertools
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from avss.errors import OutputExistsError

_MARK = ".partial-"


def check_free(path: Path, *, force: bool, sources: Iterable[object] = ()) -> None:
    """Refuses early, before any work is done, what `fresh_folder` would refuse at the end.

    Args:
        path: The output.
        force: Whether a folder of that name, written by avss, may be replaced.
        sources: What is read. Names of files and folders among it are never replaced.

    Raises:
        OutputExistsError: The path exists and may not be replaced, or cannot be written.
    """
    for source in itertools.chain.from_iterable(map(_files_of, sources if path.exists() else ())):
        read = Path(source).resolve()
        if path.resolve() in (read, *read.parents):
            raise OutputExistsError(f"`{path}` is or holds `{source}`, which is read here. Choose another `--out`.")
    if path.is_symlink() and not path.exists():
        raise OutputExistsError(f"`{path}` is a link to something that is not there. Choose another `--out`.")
    real = path.resolve()  # a link to a folder stays one: what it leads to is replaced
    if path.exists() and (os.path.ismount(real) or real == Path.cwd()):
        what = "the working directory" if real == Path.cwd() else "a mounted file system"
        raise OutputExistsError(
            f"`{path}` is {what}, which cannot be put in place as a whole. Name a folder in it, e.g. "
            f"`--out {path / 'result'}`."
        )
    if real.parent.is_dir():
        _sweep(real)
    if path.is_file():
        raise OutputExistsError(f"`{path}` is a file; the output is a folder. Choose another `--out`.")
    if path.exists() and not force and any(path.iterdir()):
        raise OutputExistsError(
            f"`{path}` exists and is not empty. Choose another `--out`, or add `--force` to replace it."
        )
    if path.is_dir() and force and not _is_ours(path):
        raise OutputExistsError(
            f"`{path}` was not written by avss, so `--force` does not replace it. Remove it yourself, or choose "
            "another `--out`."
        )
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise OutputExistsError(f"`{parent}` cannot be written to. Choose another `--out`.")


def _files_of(source: object) -> Iterator[str]:
    """The files and folders that a source names: itself, or its parts between commas, without `#column`."""
    if not isinstance(source, str | Path):
        return
    for name in dict.fromkeys((str(source), *(part.strip().partition("#")[0] for part in str(source).split(",")))):
        with contextlib.suppress(OSError, ValueError):  # a text, or too long for a name
            if name and Path(name).exists():
                yield name


def _is_ours(path: Path) -> bool:
    """Whether a folder may be deleted: empty, or with the record (or the table) that every output of avss holds."""
    return not any(path.iterdir()) or any((path / name).is_file() for name in ("record.json", "avss.json"))


@contextlib.contextmanager
def fresh_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends without an error, and vanishes otherwise.

    Args:
        path: The final name.
        force: Whether a folder of that name, written by avss, may be replaced.

    Raises:
        OutputExistsError: See `check_free`; or it came into being meanwhile, and the message names the folder beside it
            that holds the result.
    """
    check_free(path, force=force)
    named, path = path, path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}{_process()}-", dir=path.parent))
    try:
        yield partial
        _open_up(partial)
        try:
            check_free(path, force=force)
        except OutputExistsError as error:  # it came while the work was done, which shall not be lost
            kept = next(other for number in itertools.count(2) if not (other := Path(f"{path}-{number}")).exists())
            partial.rename(kept)
            raise OutputExistsError(
                f"`{named}` was filled by something else in the meantime. The result is whole, in `{kept}`."
            ) from error
        _swap(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache_folder() -> Path:
    """Where avss keeps what can be made again: `$AVSS_CACHE`, `$XDG_CACHE_HOME/avss` or `~/.cache/avss`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("AVSS_CACHE") or Path(home) / "avss")


def scratch_folder(name: str) -> Path:
    """A new folder in the cache for large files that only this process needs. Those of killed processes are swept.

    Not the system's temporary folder, which is memory on many machines, unless the cache cannot be written to.
    """
    path = cache_folder() / name
    prefix = f".{path.name}{_MARK}{_process()}-"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    except OSError:  # a home that cannot be written to, as in some containers
        return Path(tempfile.mkdtemp(prefix=prefix))


def _open_up(folder: Path) -> None:
    """Gives files and folders the modes that the user's umask asks for: some writers make private ones."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _swap(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = partial.with_name(f"{partial.name}-old")
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _process(pid: int | None = None) -> str:
    """This process, or one of this machine, as a part of a file's name: several machines may share a file system."""
    machine = zlib.crc32(socket.gethostname().encode())
    return f"{machine:08x}.{os.getpid() if pid is None else pid}"


def _sweep(path: Path) -> None:
    """Removes what killed processes left beside `path`; a living process keeps its own, one of another machine too."""
    for leftover in path.parent.glob(f".{path.name}{_MARK}*"):
        owner = leftover.name.removeprefix(f".{path.name}{_MARK}").split("-")[0]
        pid = owner.partition(".")[2]
        if not pid.isdigit() or owner != _process(int(pid)) or psutil.pid_exists(int(pid)):
            continue
        if leftover.name.endswith("-old") and not path.exists():
            # Killed between the two renames of a replacement: the old output is still the truth.
            leftover.rename(path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
