"""Cuts a GGUF file as it lies: drops `blk.i.*`, renumbers the others, and rewrites the metadata that count blocks.

No tensor is decoded or quantised again: the kept ones have the bytes they had. What llama.cpp derives from a block's
number or from the number of blocks, rather than from the file, is listed in `FAMILIES`; a cut that such a rule would
read differently is refused, and so is an architecture whose rules are not known.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from avss.errors import ModelLoadError, UnsupportedArchitectureError
from avss.record import FieldChange, Plan

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_PIECE = 16 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """What llama.cpp knows about an architecture without reading it from the file.

    Attributes:
        period: Every `period`-th block is of another kind (full instead of sliding attention, no rotary positions),
            counted from the front; 0 where all are alike. A per-block list in the file takes its place.
        only_with_window: Whether the period counts only where the file sets a sliding window.
        telling_counts: Numbers of blocks from which llama.cpp concludes more than a name.
        reads_more_from: Number of blocks from which on llama.cpp reads tensors that it does not read below; 0 for none.
    """

    period: int = 0
    only_with_window: bool = False
    telling_counts: tuple[int, ...] = ()
    reads_more_from: int = 0


_PLAIN = GgufFamily()
FAMILIES: dict[str, GgufFamily] = {
    "arcee": _PLAIN,
    "bert": _PLAIN,
    "bloom": _PLAIN,
    # The norms of queries and keys (Command R+) are read from 64 blocks on only.
    "command-r": GgufFamily(reads_more_from=64),
    "cohere2": GgufFamily(period=4),
    "exaone": _PLAIN,
    "falcon": _PLAIN,
    "gemma": _PLAIN,
    # The largest Gemma is told by its number of blocks, and scales attention in another way.
    "gemma2": GgufFamily(period=2, telling_counts=(46,)),
    "gemma3": GgufFamily(period=6, only_with_window=True, telling_counts=(62,)),
    "gpt-oss": GgufFamily(period=2),
    "gpt2": _PLAIN,
    "gptneox": _PLAIN,
    "granite": _PLAIN,
    "internlm2": _PLAIN,
    "llama": _PLAIN,
    "mistral3": _PLAIN,
    "nemotron": _PLAIN,
    "olmo": _PLAIN,
    "olmo2": GgufFamily(period=4, only_with_window=True),
    "olmoe": _PLAIN,
    "phi2": _PLAIN,
    "phi3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2moe": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3moe": _PLAIN,
    "seed_oss": _PLAIN,
    "smollm3": GgufFamily(period=4),
    "stablelm": _PLAIN,
    "starcoder": _PLAIN,
    "starcoder2": _PLAIN,
}
"""`general.architecture` -> what a cut must know."""

_PER_BLOCK = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.sliding_window_pattern",
        "expert_feed_forward_length",
        "expert_used_count",
        "feed_forward_length",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
    }
)
"""Metadata that hold one entry per block where they are arrays."""

_LEADING = "leading_dense_block_count"
_TRAILING = "nextn_predict_layers"
_COUNTS = re.compile(r".*(block|layer|_every_|interval|_step)(?!.*norm).*")
_READ_HERE = frozenset({"block_count", _LEADING, _TRAILING, "attention.sliding_window_pattern"})


class GgufFile:
    """A GGUF file, read as far as a cut needs.

    Attributes:
        path: The file.
        reader: The library's view of it; tensors are mapped, not read.
        architecture: `general.architecture`.
        num_blocks: Its block count.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Raises:
            ModelLoadError: It is no GGUF file, not whole, one part of several, or its blocks are not all there.
        """
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ModelLoadError(
                f"Cannot read `{path}` as a GGUF file: {error}. Is it whole? Fetch it again."
            ) from error
        parts = self.value("split.count")
        if isinstance(parts, int) and parts > 1:
            raise ModelLoadError(
                f"`{path}` is one of {parts} parts. Join them first: `llama-gguf-split --merge FIRST_PART JOINED.gguf`."
            )
        self.architecture = str(self.value("general.architecture"))
        count = self.value(f"{self.architecture}.block_count")
        if not isinstance(count, int) or count < 1:
            raise ModelLoadError(f"`{path}` does not say how many blocks it has (`{self.architecture}.block_count`).")
        self.num_blocks = count
        found = {int(match[1]) for tensor in self.reader.tensors if (match := _BLOCK.fullmatch(tensor.name))}
        if found != set(range(count)):
            lacking = sorted(set(range(count)) - found)
            raise ModelLoadError(
                f"`{path}` counts {count} blocks and holds tensors of {len(found)}"
                f"{f'; block {lacking[0]} has none' if lacking else ''}. Is the file whole?"
            )

    def value(self, key: str) -> Any:
        """A metadata value; None where there is none."""
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def own(self) -> dict[str, Any]:
        """The metadata of the architecture, without its name in front."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): field.contents()
            for key, field in self.reader.fields.items()
            if key.startswith(prefix)
        }

    @property
    def num_values(self) -> int:
        """Values in all tensors."""
        return sum(int(tensor.n_elements) for tensor in self.reader.tensors)

    def block_sizes(self) -> tuple[list[int], list[int]]:
        """The values in the tensors of each block, and their bytes."""
        values, sizes = [0] * self.num_blocks, [0] * self.num_blocks
        for tensor in self.reader.tensors:
            found = _BLOCK.fullmatch(tensor.name)
            if found and int(found[1]) < self.num_blocks:
                values[int(found[1])] += int(tensor.n_elements)
                sizes[int(found[1])] += int(tensor.n_bytes)
        return values, sizes

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(int(tensor.n_bytes) for tensor in self.reader.tensors)

    @property
    def main_type(self) -> str:
        """The tensor type that holds the most bytes, e.g. `Q4_K`."""
        held: dict[str, int] = {}
        for tensor in self.reader.tensors:
            held[tensor.tensor_type.name] = held.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
        return max(held, key=lambda name: held[name])


def metadata_changes(file: GgufFile, plan: Plan) -> tuple[FieldChange, ...]:
    """The metadata that a cut changes.

    Raises:
        UnsupportedArchitectureError: The architecture is not known, or this cut cannot be expressed in the file.
    """
    family = FAMILIES.get(file.architecture)
    if family is None:
        raise UnsupportedArchitectureError(
            f"Cutting a GGUF file of the architecture `{file.architecture}` has not been proven: llama.cpp may derive "
            f"from a block's number what the file cannot say. Known: {', '.join(sorted(FAMILIES))}. Cut the Hugging "
            "Face checkpoint instead and convert the result."
        )
    own, num_blocks = file.own(), file.num_blocks
    _refuse_unknown(file, own)
    _refuse_telling_counts(file, family, plan)
    _refuse_broken_period(file, family, own, plan)
    trailing = own.get(_TRAILING) or 0
    late = [block for block in plan.removed if block >= num_blocks - trailing]
    if late:
        raise UnsupportedArchitectureError(
            f"Block {late[0]} predicts further tokens (`{_TRAILING}` = {trailing}); it is not one of the stack. Name "
            f"blocks below {num_blocks - trailing}."
        )
    changes: dict[str, Any] = {"block_count": len(plan.kept)}
    for name, value in own.items():
        if name in _PER_BLOCK and isinstance(value, list):
            changes[name] = [value[block] for block in plan.kept]
    if own.get(_LEADING):
        changes[_LEADING] = own[_LEADING] - sum(block < own[_LEADING] for block in plan.removed)
    return tuple(
        FieldChange(field=f"{file.architecture}.{name}", before=own[name], after=value)
        for name, value in sorted(changes.items())
        if own[name] != value
    )


def _refuse_unknown(file: GgufFile, own: dict[str, Any]) -> None:
    lists = [
        key
        for key, field in file.reader.fields.items()
        if not key.startswith(("tokenizer.", "general."))
        and field.types[:1] == [gguf.GGUFValueType.ARRAY]
        and len(field.data) == file.num_blocks
        and key.removeprefix(f"{file.architecture}.") not in _PER_BLOCK
    ]
    counts = [
        f"{file.architecture}.{name}"
        for name, value in own.items()
        if _COUNTS.fullmatch(name) and name not in _READ_HERE and isinstance(value, int) and value > 1
    ]
    if lists or counts:
        what = "has one entry per block" if lists else "seems to count blocks"
        raise UnsupportedArchitectureError(
            f"The metadata field `{(lists or counts)[0]}` {what}, and how a cut must change it is not known for "
            f"`{file.architecture}`. Refused rather than guessed. Cut the Hugging Face checkpoint and convert the "
            "result."
        )


def _refuse_telling_counts(file: GgufFile, family: GgufFamily, plan: Plan) -> None:
    for count in (plan.num_blocks, len(plan.kept)):
        if count in family.telling_counts and plan.removed:
            raise UnsupportedArchitectureError(
                f"llama.cpp takes a `{file.architecture}` file of {count} blocks for a model whose attention is scaled "
                "in another way, so this cut would change what the blocks compute. "
                + ("It cannot be cut as a GGUF file." if count == plan.num_blocks else "Remove one block more or less.")
            )
    if len(plan.kept) < family.reads_more_from <= plan.num_blocks:
        raise UnsupportedArchitectureError(
            f"llama.cpp reads some tensors of a `{file.architecture}` file only where it has {family.reads_more_from} "
            f"blocks or more, so {len(plan.kept)} of {plan.num_blocks} would compute something else. Keep at least "
            f"{family.reads_more_from}, or cut the Hugging Face checkpoint."
        )


def _refuse_broken_period(file: GgufFile, family: GgufFamily, own: dict[str, Any], plan: Plan) -> None:
    """Where the kind of a block follows from its number, each kept block must have the kind it had."""
    pattern = own.get("attention.sliding_window_pattern")
    period = pattern if isinstance(pattern, int) else family.period
    if isinstance(pattern, list) or period < 2 or (family.only_with_window and not own.get("attention.sliding_window")):
        return
    for new, old in enumerate(plan.kept):
        if (new % period == period - 1) != (old % period == period - 1):
            raise UnsupportedArchitectureError(
                f"In a `{file.architecture}` file one of every {period} blocks is of another kind, by its number "
                f"alone, and block {old} would become block {new}, of the wrong kind. Remove {period} neighbours at a "
                "time, or cut the Hugging Face checkpoint."
            )


def new_name(tensor: str, plan: Plan) -> str | None:
    """Name of a tensor in the smaller file; None if it goes.

    Example:
        >>> plan = Plan(num_blocks=3, removed=(1,), method="explicit", rule="by hand")
        >>> [new_name(name, plan) for name in ("blk.1.attn_q.weight", "blk.2.attn_q.weight", "output.weight")]
        [None, 'blk.1.attn_q.weight', 'output.weight']
    """
    return plan.rename(tensor, "blk")


def write_cut(
    file: GgufFile, plan: Plan, target: Path, *, on_bytes: Callable[[int, int], None] = lambda done, total: None
) -> tuple[FieldChange, ...]:
    """Writes the smaller file.

    Args:
        file: The original.
        plan: The blocks that go.
        target: File to write.
        on_bytes: Called with (bytes written, bytes in all).

    Returns:
        The metadata that changed.

    Raises:
        UnsupportedArchitectureError: See `metadata_changes`.
    """
    changes = metadata_changes(file, plan)
    changed = {change.field: change.after for change in changes}
    writer = gguf.GGUFWriter(target, arch=file.architecture, endianess=file.reader.endianess)
    writer.data_alignment = int(file.reader.alignment)
    for key, field in file.reader.fields.items():
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        # The writer adds the architecture itself, and cannot write an empty array; llama.cpp reads none as absent.
        if key.startswith("GGUF.") or key == "general.architecture" or (is_array and not field.data):
            continue
        value = changed[key] if key in changed else field.contents()
        writer.add_key_value(key, value, field.types[0], sub_type=field.types[-1] if is_array else None)
    kept = [(tensor, name) for tensor in file.reader.tensors if (name := new_name(tensor.name, plan)) is not None]
    for tensor, name in kept:
        writer.add_tensor_info(name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(int(tensor.n_bytes) for tensor, _ in kept)
    for tensor, _ in kept:
        writer.write_tensor_data(tensor.data, tensor_endianess=file.reader.endianess)
        done += int(tensor.n_bytes)
        on_bytes(done, total)
    writer.close()
    return changes


def check_cut(file: GgufFile, plan: Plan, written: GgufFile) -> list[str]:
    """What is wrong with a written file: metadata, a tensor's type, shape or bytes. Empty if nothing is."""
    changed = {change.field: change.after for change in metadata_changes(file, plan)}
    problems = []
    for key, field in file.reader.fields.items():
        if key.startswith("GGUF.") or (field.types[0] == gguf.GGUFValueType.ARRAY and not field.data):
            continue
        found = written.reader.get_field(key)
        if found is None or found.types != field.types or found.contents() != changed.get(key, field.contents()):
            problems.append(f"the metadata `{key}` is not what it should be")
    problems += [f"the metadata `{key}` is new" for key in written.reader.fields.keys() - file.reader.fields.keys()]
    tensors = {tensor.name: tensor for tensor in written.reader.tensors}
    wanted = {name: tensor for tensor in file.reader.tensors if (name := new_name(tensor.name, plan)) is not None}
    problems += [f"the tensor `{name}` is missing" for name in wanted.keys() - tensors.keys()]
    problems += [f"the tensor `{name}` is left over" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        old, new = wanted[name], tensors[name]
        if old.tensor_type != new.tensor_type or list(old.shape) != list(new.shape):
            problems.append(f"the tensor `{name}` has another type or shape than `{old.name}`")
        elif new.data_offset % int(written.reader.alignment):
            problems.append(f"the tensor `{name}` is not aligned")
        elif not _same_bytes(old.data, new.data):
            problems.append(f"the bytes of `{name}` are not those of `{old.name}`")
    return sorted(problems)


def _same_bytes(one: Any, other: Any) -> bool:
    left, right = np.asarray(one).reshape(-1).view(np.uint8), np.asarray(other).reshape(-1).view(np.uint8)
    if left.shape != right.shape:
        return False
    return all(bool((left[at : at + _PIECE] == right[at : at + _PIECE]).all()) for at in range(0, left.size, _PIECE))
