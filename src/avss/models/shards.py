"""Safetensors files as bytes: what is in them, and a copy without some tensors.

No torch: a model of any size passes through a few megabytes of memory.

A safetensors file is eight bytes with the length of its header, the header (JSON: name -> dtype, shape, and where the
bytes lie), and the bytes. A cut changes names and drops tensors; the bytes of the others are copied as they lie.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from avss.errors import ModelLoadError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_BITS |= {"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "C64": 64}
_BITS |= {"U64": 64, "I64": 64, "F64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of one value, by the format's name of its dtype."""

_BUFFER = 8 * 1024 * 1024
_SAMPLE = 4096
_MAX_HEADER = 100_000_000  # the format's own limit

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "*.bpe", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = re.compile(
    r"config\.json|.*\.index\.json|record\.json|README\.md|training_args\..*|trainer_state\.json|.*_results\.json|optimizer.*|adapter_.*"
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies.

    Attributes:
        name: Its key in the file.
        dtype: By the format's name, e.g. `BF16`.
        shape: Its axes.
        start: Offset of its first byte from the start of the file.
        num_bytes: How many.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: The file.
        tensors: In the order of their bytes.
        metadata: The strings that the writer left in the header.
    """

    path: Path
    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The weights of a model folder.

    Attributes:
        folder: Where it is.
        shards: Its files.
    """

    folder: Path
    shards: tuple[Shard, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for shard in self.shards for tensor in shard.tensors)

    @property
    def num_values(self) -> int:
        """Values in all tensors: the parameters as stored (tied ones once), and any stored buffer."""
        return sum(math.prod(tensor.shape) for shard in self.shards for tensor in shard.tensors)

    @property
    def dtype(self) -> str:
        """The dtype that holds the most bytes, by torch's name, e.g. `bfloat16`."""
        held: dict[str, int] = {}
        for tensor in self.tensors.values():
            held[tensor.dtype] = held.get(tensor.dtype, 0) + tensor.num_bytes
        name = max(held, key=lambda dtype: held[dtype], default="F32")
        return {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}.get(name, name.lower())


def bits_of(dtype: str) -> int:
    """Bits of one value, by the format's name of its dtype; of one that is not known, as many as of a float32."""
    return _BITS.get(dtype, 32)


# --- reading ---


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a model folder's weights.

    The files are those that transformers reads: `model.safetensors`, or those that the index names. Shards without an
    index are taken too, if they are all there.

    Raises:
        ModelLoadError: There are none, one is missing, damaged or truncated, or index and files disagree.
    """
    names, index = _weight_files(folder)
    shards = tuple(read_shard(folder / name) for name in names)
    places: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in places:
                raise ModelLoadError(
                    f"`{tensor.name}` lies in `{places[tensor.name]}` and in `{shard.path.name}` of `{folder}`: which "
                    "one is the model's cannot be told. Remove the file that does not belong there."
                )
            places[tensor.name] = shard.path.name
    wrong = [name for name, file in index.items() if places.get(name) != file]
    if wrong:
        raise ModelLoadError(
            f"The index of `{folder}` says that `{wrong[0]}` lies in `{index[wrong[0]]}`, and it does not "
            f"({len(wrong)} such entries). Is the download whole?"
        )
    return Checkpoint(folder=folder, shards=shards)


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the files, and the index (empty where there is none)."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], {}
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = list(dict.fromkeys(index.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"`{folder / INDEX}` is not an index of weights. Download it again.") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise ModelLoadError(
                    f"`{folder / INDEX}` names `{name}`, which is not there. The download is not whole: fetch that "
                    "file."
                )
        return names, index
    matches = [
        match for path in sorted(folder.glob("model-*-of-*.safetensors")) if (match := _SHARD.fullmatch(path.name))
    ]
    if not matches:
        others = sorted(
            path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".safetensors")
        )
        found = f"; found {', '.join(others[:4])}" if others else ""
        raise ModelLoadError(
            f"`{folder}` holds no `{WEIGHTS}` and no `{INDEX}`{found}. Only safetensors checkpoints are cut on disk; "
            "convert it with `AutoModel.from_pretrained(...).save_pretrained(...)`."
        )
    numbers = {int(match[1]) for match in matches}
    total = int(matches[0][2])
    if numbers != set(range(1, total + 1)) or any(int(match[2]) != total for match in matches):
        raise ModelLoadError(
            f"`{folder}` holds {len(matches)} of {total} shards and no index that says which belong together. Fetch "
            "the missing ones."
        )
    return [match[0] for match in matches], {}


def read_shard(path: Path) -> Shard:
    """Reads the header of one safetensors file, and checks it against the file's size.

    Raises:
        ModelLoadError: It is not one, or not whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise ModelLoadError(f"`{path}` is not a safetensors file, or was cut off in its header. Fetch it again.")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        tensors = [_parse(name, entry, offset=8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"The header of `{path}` is not one of safetensors. Fetch the file again.") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    end = 8 + length
    for tensor in tensors:
        bits = _BITS.get(tensor.dtype)
        fits = bits is None or tensor.num_bytes * 8 == math.prod(tensor.shape) * bits
        if tensor.start != end or tensor.num_bytes < 0 or not fits:
            raise ModelLoadError(f"The header of `{path}` is wrong about `{tensor.name}`. Fetch the file again.")
        end += tensor.num_bytes
    if end != size:
        raise ModelLoadError(
            f"`{path}` has {size:,} bytes, and by its header it should have {end:,}: it is not whole. Fetch it again."
        )
    return Shard(path=path, tensors=tuple(tensors), metadata=metadata)


def _parse(name: str, entry: dict[str, Any], *, offset: int) -> Tensor:
    start, stop = entry["data_offsets"]
    shape = tuple(int(axis) for axis in entry["shape"])
    return Tensor(name=name, dtype=entry["dtype"], shape=shape, start=offset + start, num_bytes=stop - start)


# --- where the blocks are ---

_LATER_NAMES = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)


def later_name(name: str, prefix: str = "") -> str:
    """One name for a weight, whether an old checkpoint stores it or transformers saved it anew.

    Args:
        name: As it is stored.
        prefix: `base_model_prefix` of the model's class: a body saved alone stores its weights without it.

    Example:
        >>> later_name("h.0.ln_1.weight", "transformer") == later_name("transformer.h.0.ln_1.weight", "transformer")
        True
        >>> later_name("bert.encoder.layer.0.output.LayerNorm.gamma", "bert")
        'encoder.layer.0.output.LayerNorm.weight'
    """
    for old, new in _LATER_NAMES:
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name.removeprefix(f"{prefix}.") if prefix else name


def stack_paths(names: list[str], num_blocks: int) -> list[str]:
    """Paths of the outermost lists among the names that hold an entry for each of `num_blocks` blocks.

    Example:
        >>> stack_paths(["h.0.w", "h.0.e.0.x", "h.0.e.1.x", "h.1.w", "v.0.w"], 2)
        ['h']
    """
    found: dict[str, set[int]] = {}
    for name in names:
        # From the outside in; the first list that a name passes through is its stack.
        match = re.match(r"(.+?)\.(\d+)\.", name)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    return sorted(path for path, numbers in found.items() if set(range(num_blocks)) <= numbers)


def find_stack_path(names: list[str], num_blocks: int, module_path: str | None = None) -> str:
    """The path that the block stack has in the files, which may differ from its path in the model by its prefix.

    Args:
        names: The keys of the files.
        num_blocks: Length of the stack.
        module_path: Its path in the model, where that is known.

    Raises:
        ModelLoadError: None or several lists of names fit.
    """
    paths = stack_paths(names, num_blocks)
    if module_path in paths:
        return str(module_path)
    fitting = paths
    if module_path is not None and len(paths) > 1:
        # `bert.encoder.layer` and `encoder.layer`; `language_model.model.layers` and `model.language_model.layers`.
        shared = {path: _shared_tail(path, module_path) for path in paths}
        fitting = [path for path in paths if shared[path] == max(shared.values()) > 0]
    if len(fitting) != 1:
        raise ModelLoadError(
            f"The weights hold {len(fitting)} lists of {num_blocks} blocks"
            f"{': ' + ', '.join(f'`{path}`' for path in fitting) if fitting else ''}, and the one to cut "
            f"{'' if module_path is None else f'(`{module_path}` in the model) '}cannot be told. Cut this model in "
            "memory (without `--on-disk`)."
        )
    return fitting[0]


def _shared_tail(path: str, other: str) -> int:
    count = 0
    for one, two in zip(reversed(path.split(".")), reversed(other.split(".")), strict=False):
        if one != two:
            break
        count += 1
    return count


# --- writing ---


def lay_out(source: Checkpoint, rename: Callable[[str], str | None], folder: Path) -> Checkpoint:
    """Writes the files of a smaller checkpoint in full length but without their bytes: headers, and an index.

    Names and shapes can be checked on them before anything large is copied; `fill` copies the bytes.

    Args:
        source: The checkpoint to copy from.
        rename: New name of a tensor, or None if it goes.
        folder: Where to; it exists.
    """
    plans = [
        (shard, kept)
        for shard in source.shards
        if (kept := [(tensor, name) for tensor in shard.tensors if (name := rename(tensor.name)) is not None])
    ]
    weight_map: dict[str, str] = {}
    for number, (shard, kept) in enumerate(plans, start=1):
        name = WEIGHTS if len(plans) == 1 else f"model-{number:05d}-of-{len(plans):05d}.safetensors"
        header = _header(kept, shard.metadata)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor.num_bytes for tensor, _ in kept))
        weight_map |= dict.fromkeys((new for _, new in kept), name)
    if len(plans) > 1:
        _write_index(weight_map, sum(tensor.num_bytes for _, kept in plans for tensor, _ in kept), folder)
    return read_checkpoint(folder)


def _write_index(weight_map: dict[str, str], num_bytes: int, folder: Path) -> None:
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def indexed(checkpoint: Checkpoint) -> Iterator[Path]:
    """The folder of a checkpoint as transformers reads it.

    Shards that came without an index are read here by their names; transformers cannot, and is given a folder of links
    with an index for as long as it takes.
    """
    folder = checkpoint.folder
    if len(checkpoint.shards) == 1 or (folder / INDEX).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        for path in folder.iterdir():
            (Path(place) / path.name).symlink_to(path.resolve())
        weight_map = {tensor.name: shard.path.name for shard in checkpoint.shards for tensor in shard.tensors}
        _write_index(weight_map, checkpoint.num_bytes, Path(place))
        yield Path(place)


def fill(
    source: Checkpoint,
    rename: Callable[[str], str | None],
    target: Checkpoint,
    *,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Copies the bytes into the files that `lay_out` wrote.

    Args:
        source: The checkpoint to copy from.
        rename: As for `lay_out`.
        target: What `lay_out` returned.
        on_bytes: Called with (bytes written, bytes in all).
    """
    places = {tensor.name: (shard.path, tensor.start) for shard in target.shards for tensor in shard.tensors}
    done, total = 0, target.num_bytes
    for shard in source.shards:
        kept = [(tensor, name) for tensor in shard.tensors if (name := rename(tensor.name)) is not None]
        if not kept:
            continue
        path, start = places[kept[0][1]]
        with shard.path.open("rb", buffering=0) as reading, path.open("r+b", buffering=0) as writing:
            # Kept tensors follow each other in the new file as they do in the old one.
            writing.seek(start)
            for run_start, num_bytes in _runs([tensor for tensor, _ in kept]):
                for copied in _copy_bytes(reading.fileno(), writing.fileno(), run_start, num_bytes):
                    done += copied
                    on_bytes(done, total)


def _header(kept: list[tuple[Tensor, str]], metadata: dict[str, str]) -> bytes:
    """Length and header, padded with spaces so that the bytes begin at a multiple of eight."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for tensor, name in kept:
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _runs(tensors: list[Tensor]) -> Iterator[tuple[int, int]]:
    """(start, length) of what lies together, so that a run of kept blocks is one long copy."""
    start = length = 0
    for tensor in tensors:
        if length and tensor.start == start + length:
            length += tensor.num_bytes
            continue
        if length:
            yield start, length
        start, length = tensor.start, tensor.num_bytes
    if length:
        yield start, length


def _copy_bytes(source: int, target: int, start: int, length: int) -> Iterator[int]:
    """Copies between files, and yields how many bytes each step copied. In the kernel where it can do that."""
    in_kernel = hasattr(os, "copy_file_range")
    while length:
        copied = 0
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, min(length, 16 * _BUFFER), offset_src=start)
            except OSError:  # across file systems, or one that does not support it
                in_kernel = False
        if not copied:
            in_kernel = False
            block = os.pread(source, min(length, _BUFFER), start)
            if not block:
                raise ModelLoadError("A weights file became shorter while it was read. Is something writing to it?")
            copied = os.write(target, block)
        start, length = start + copied, length - copied
        yield copied


def check_copy(source: Checkpoint, rename: Callable[[str], str | None], written: Checkpoint) -> list[str]:
    """What is wrong with a copy: a name, dtype or shape, or any byte. Empty if nothing is. Reads both in full."""
    wanted = _wanted(source, rename)
    problems = [f"`{name}` is missing" for name in wanted.keys() - written.tensors.keys()]
    problems += [f"`{name}` is left over" for name in written.tensors.keys() - wanted.keys()]
    return sorted(problems) + compare_bytes(source, rename, written)


def compare_bytes(source: Checkpoint, rename: Callable[[str], str | None], written: Checkpoint) -> list[str]:
    """The tensors of both whose bytes, dtype or shape differ, as sentences. Reads both in full."""
    wanted = _wanted(source, rename)
    old_file = {tensor.name: shard.path for shard in source.shards for tensor in shard.tensors}
    problems = []
    with contextlib.ExitStack() as stack:
        opened = {
            shard.path: stack.enter_context(shard.path.open("rb", buffering=0)).fileno()
            for shard in (*source.shards, *written.shards)
        }
        for shard in written.shards:
            for new in shard.tensors:
                old = wanted.get(new.name)
                if old is None:
                    continue
                one, two = opened[old_file[old.name]], opened[shard.path]
                if (old.dtype, old.shape) != (new.dtype, new.shape):
                    problems.append(f"`{new.name}` has another dtype or shape than `{old.name}`")
                elif any(
                    os.pread(one, size, old.start + place) != os.pread(two, size, new.start + place)
                    for place, size in _pieces(new.num_bytes)
                ):
                    problems.append(f"the bytes of `{new.name}` are not those of `{old.name}`")
    return sorted(problems)


def _wanted(source: Checkpoint, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    return {new: tensor for tensor in source.tensors.values() if (new := rename(tensor.name)) is not None}


def _pieces(num_bytes: int) -> Iterator[tuple[int, int]]:
    for place in range(0, num_bytes, _BUFFER):
        yield place, min(_BUFFER, num_bytes - place)


def _ends(num_bytes: int) -> list[tuple[int, int]]:
    size = min(_SAMPLE, num_bytes)
    return [(0, size), (num_bytes - size, size)]


def fingerprint(checkpoint: Checkpoint, config: bytes) -> str:
    """`file-` and 16 hex digits of a SHA-256 over the config, the headers and both ends of every tensor."""
    digest = hashlib.sha256(config)
    for shard in checkpoint.shards:
        with shard.path.open("rb", buffering=0) as file:
            for tensor in shard.tensors:
                digest.update(f"{tensor.name}{tensor.dtype}{tensor.shape}".encode())
                for place, size in _ends(tensor.num_bytes):
                    digest.update(os.pread(file.fileno(), size, tensor.start + place))
    return f"file-{digest.hexdigest()[:16]}"


def copy_companions(source: Path, folder: Path) -> None:
    """Copies what belongs to a model beside its weights and its config: tokenizer, templates, processors, modules.

    Files of the top folder by their kind, and the modules of a sentence-transformers folder. What exists already is
    left alone; weights in other formats, and what a trainer or an earlier run left, are not copied.
    """
    files = [path for pattern in _COPIED for path in source.glob(pattern)]
    for module in module_names(source):
        files += list((source / module).rglob("*"))
    for path in sorted(files):
        target = folder / path.relative_to(source)
        if not path.is_file() or target.exists() or (path.parent == source and _NOT_COPIED.fullmatch(path.name)):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def module_names(source: Path) -> list[str]:
    """The folders of a sentence-transformers model beside the transformer itself: pooling, dense layers."""
    if not (source / "modules.json").is_file():
        return []
    try:
        names = [str(module.get("path") or "") for module in json.loads((source / "modules.json").read_text("utf-8"))]
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"`{source / 'modules.json'}` is not a list of sentence-transformers modules. Fetch it again, or remove it."
        ) from error
    # By its name, not by where it leads: in the hub's cache every file is a link to elsewhere.
    return [name for name in map(os.path.normpath, names) if name != "." and not name.startswith(("..", os.sep))]
