"""`avss.verify`: is a saved model whole, does a stranger's process run it, is it the original without its blocks?"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from avss.composer.disk import OVERHEAD_BYTES, is_hub_id, memory_at_rest
from avss.composer.gguf_pruning import find_gguf
from avss.composer.inputs import checkpoint_folder, probe_batch
from avss.composer.proof import tolerance_of
from avss.composer.records import places_of
from avss.config import parse_bytes
from avss.errors import InvalidPlanError, ModelLoadError, UnsupportedArchitectureError
from avss.models.blockwise import device_map
from avss.models.families import facts_of
from avss.models.fresh import FreshRunError, run_afresh
from avss.models.gguf_file import GgufFile, check_cut
from avss.models.load import Loaded, load_empty, load_model
from avss.models.shards import Checkpoint, compare_bytes, find_stack_path, indexed, later_name, read_checkpoint
from avss.models.stack import AUTO, bypassed, find_stacks
from avss.models.verify import Batch, at_tokens, keep_of, largest_difference, outputs_at_tokens
from avss.output import scratch_folder
from avss.progress import Stages, silent
from avss.record import Check, CheckReport, Plan, RunRecord

_FILES = "The files are whole"
_LOADS = "A process that never imports avss loads it: no key is missing, unexpected or of another shape"
_FINITE = "Its outputs are finite"
_CACHE = "It generates the same text with and without its cache"
_BYTES = "The weights it kept are those of the original, byte for byte"
_BYPASS = "Its outputs are those of the original with the removed blocks bypassed"


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A saved model, found and read as far as its headers.

    Attributes:
        name: As the user named it.
        folder: Where it is.
        gguf: The file, for a model that is one.
        checkpoint: The weights, for a folder of safetensors.
    """

    name: str
    folder: Path
    gguf: GgufFile | None = None
    checkpoint: Checkpoint | None = None

    @property
    def num_values(self) -> int:
        return self.gguf.num_values if self.gguf else self.checkpoint.num_values if self.checkpoint else 0

    @property
    def source(self) -> str:
        return str(self.gguf.path if self.gguf else self.folder)


def verify(
    model: str | Path,
    *,
    against: str | Path | None = None,
    head: str = "auto",
    trust_remote_code: bool = False,
    max_memory: str | int | None = None,
    stages: Stages = silent,
) -> CheckReport:
    """Checks a saved model, and compares it with the model it was cut from.

    Args:
        model: A folder with a checkpoint, or a GGUF file (or the folder that holds one).
        against: The original: folder, GGUF file or hub id. By default the one that the folder's record names, where it
            is beside it, in the working directory or in the hub's cache.
        head: What to use it as; `auto` takes the class named in the config.
        trust_remote_code: Whether code that comes with the model may run.
        max_memory: Memory that may be used, e.g. `"16GB"`; by default what is free. A model that does not fit is run
            from disk, and one whose embeddings and largest block do not fit is not run.
        stages: Where progress goes.

    Raises:
        ConfigError: `max_memory` or `head` is not allowed.
        ModelLoadError: There is no model there, or no original.
        InvalidPlanError: Which blocks are gone is not recorded and cannot be told from the weights.
    """
    allowed = parse_bytes(max_memory) if isinstance(max_memory, str) else max_memory
    allowed = allowed or psutil.virtual_memory().available
    folder = _folder(model)
    record = _record(folder)
    original = _find_original(against, record, folder)
    checks: list[Check] = []
    notes: list[str] = []
    with stages("Reading the files"):
        try:
            saved = _read(str(model), folder)
        except ModelLoadError as error:
            return CheckReport(model=str(model), checks=(Check(what=_FILES, passed=False, found=str(error)),))
    checks.append(Check(what=_FILES, passed=True, found=_describe(saved)))
    outputs: Tensor | None = None
    batch: Batch | None = None
    plan = record.cuts[0].plan if record is not None and record.cuts else None
    stack = record.stack if record is not None else AUTO
    dense = _read(str(original), _folder(original)) if original is not None else None
    if plan is None and dense is not None:
        plan, stack = _infer_plan(saved, dense, head=head, trust_remote_code=trust_remote_code)
    with stages("Running it in a fresh process"):
        batch, outputs, found, unrun = _run(
            saved, head=head, trust_remote_code=trust_remote_code, stack=stack, allowed=allowed
        )
    checks += found
    notes += unrun
    if dense is None or plan is None:
        notes.append(_no_original(record))
        return CheckReport(model=str(model), plan=plan, checks=tuple(checks), notes=tuple(notes))
    with stages("Comparing with the original"):
        if dense.gguf is not None:
            empty, num_blocks = None, dense.gguf.num_blocks
        else:
            empty = load_empty(dense.source, head=head, trust_remote_code=trust_remote_code, stack=stack)
            num_blocks = _num_blocks(empty)
        _check_length(plan, num_blocks)
        changed = _changed_weights(record)
        if changed:
            notes.append(f"Its weights were changed after the cut ({changed}), so it need not equal the original.")
        else:
            # A healing that helped nothing is saved from memory too.
            copied = record is not None and record.model.device == "disk" and record.cuts[0].healing is None
            checks += _compare_bytes(saved, dense, plan, notes, empty, copied=copied)
            whole_fits = OVERHEAD_BYTES + 2 * 4 * dense.num_values <= allowed
            if saved.gguf is not None and dense.gguf is None:
                notes.append("Its outputs were not compared: it is quantised, and the original is not.")
            elif outputs is None or batch is None:
                notes.append("Its outputs were not compared: it did not run.")
            elif not whole_fits and not _fits_at_rest(dense, empty, allowed):
                notes.append("Its outputs were not compared: the original does not fit in the memory there is.")
            else:
                if saved.gguf is not None:
                    # A stranger's weights have the digits that decoding gives; avss rounds them, for both alike.
                    decoded = load_model(saved.source, head=head, dtype="float32", device="cpu")
                    outputs = outputs_at_tokens(decoded, batch)
                with contextlib.nullcontext() if dense.checkpoint is None else indexed(dense.checkpoint) as folder:
                    whole = load_model(
                        folder or dense.source,
                        head=head,
                        dtype="float32",
                        device="cpu" if whole_fits else "disk:cpu",
                        trust_remote_code=trust_remote_code,
                        stack=stack,
                        scratch=None if whole_fits else scratch_folder("blocks"),
                    )
                    checks.append(_compare_outputs(outputs, batch, whole, plan))
                    if whole.files is not None:
                        whole.files.close()
            if against is None and not all(check.passed for check in checks):
                notes.append(
                    f"The original, `{original}`, was found by its name in the record. If that is another model of "
                    "this name, name the one it was cut from with `--against`."
                )
    return CheckReport(model=str(model), against=str(original), plan=plan, checks=tuple(checks), notes=tuple(notes))


# --- finding ---


def _folder(model: str | Path) -> Path:
    path = checkpoint_folder(model)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent
    if path.is_dir() and ((path / "config.json").is_file() or list(path.glob("*.gguf"))):
        return path
    if (cached := _cached(str(model))) is not None:
        return cached
    kind = "is not a model" if path.exists() else "is not there"
    raise ModelLoadError(
        f"`{model}` {kind}. Give a folder with a `config.json`, or a GGUF file; a hub id only once it is downloaded."
    )


def _read(name: str, folder: Path) -> _Saved:
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or not (folder / "config.json").is_file():
        return _Saved(name=name, folder=folder, gguf=GgufFile(find_gguf(str(path if path.is_file() else folder))))
    return _Saved(name=name, folder=folder, checkpoint=read_checkpoint(folder))


def _record(folder: Path) -> RunRecord | None:
    return RunRecord.read(folder) if (folder / "record.json").is_file() else None


def _find_original(against: str | Path | None, record: RunRecord | None, folder: Path) -> str | Path | None:
    """The original: the one named, or the one in the record where it can be reached."""
    if against is not None:
        _folder(against)
        return against
    if record is None:
        return None
    for place in places_of(record, folder):
        with contextlib.suppress(ModelLoadError):
            _folder(place)
            return place
    return _cached(record.model.source, record.model.revision)


def _cached(name: str, revision: str | None = None) -> Path | None:
    """The folder of a hub model that was downloaded before; None where the name is none, or it was not."""
    if not is_hub_id(name):
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _no_original(record: RunRecord | None) -> str:
    if record is None:
        return "It was compared with no original: it has no record. Name one with `--against`."
    return f"It was compared with no original: `{record.model.source}` is not at hand. Name it with `--against`."


def _describe(saved: _Saved) -> str:
    if saved.gguf is not None:
        return (
            f"{saved.gguf.num_blocks} blocks, {len(saved.gguf.reader.tensors)} tensors, mostly {saved.gguf.main_type}"
        )
    assert saved.checkpoint is not None
    count, files = len(saved.checkpoint.tensors), len(saved.checkpoint.shards)
    return f"{count} tensors in {files} file{'s' if files > 1 else ''}, mostly {saved.checkpoint.dtype}"


# --- running ---


def _fits_at_rest(saved: _Saved, empty: Loaded | None, allowed: int) -> bool:
    """Whether a model can be run a block at a time."""
    if saved.checkpoint is None or empty is None:
        return False
    num_blocks = len(empty.stack)
    path = find_stack_path(list(saved.checkpoint.tensors), num_blocks, empty.stack.path)
    return memory_at_rest(saved.checkpoint, path, num_blocks) <= allowed


def _run(
    saved: _Saved, *, head: str, trust_remote_code: bool, stack: str, allowed: int
) -> tuple[Batch | None, Tensor | None, list[Check], list[str]]:
    """The probe batch, the outputs at its real tokens, what was checked, and what could not be."""
    gguf_file = saved.gguf.path.name if saved.gguf else None
    fits = OVERHEAD_BYTES + 4 * saved.num_values <= allowed
    scratch: Path | None = None
    too_large = ["It was not run: it does not fit in the memory there is."]
    if not fits and allowed < OVERHEAD_BYTES:
        return None, None, [], too_large
    try:
        empty = load_empty(
            saved.source, head=head, trust_remote_code=trust_remote_code, with_tokenizer=True, stack=stack
        )
        if not fits:
            if not _fits_at_rest(saved, empty, allowed):
                return None, None, [], too_large
            scratch = scratch_folder("blocks")
        batch, tower = _in_float32(probe_batch(empty)), empty.tower()
        fresh = run_afresh(
            saved.folder,
            batch,
            head=empty.head,
            architecture=type(empty.model).__name__,
            part=next(name for name, part in empty.model.named_modules() if part is tower.model),
            gguf_file=gguf_file,
            trust_remote_code=trust_remote_code,
            places=None if fits else device_map(empty.model, torch.device("cpu")),
            scratch=scratch,
        )
    except (ModelLoadError, FreshRunError) as error:
        if not fits:  # not every architecture runs so
            return None, None, [], [f"It was not run: it does not fit in memory, and from disk it stops ({error})."]
        return None, None, [Check(what=_LOADS, passed=False, found=str(error))], []
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    # Of a GGUF file transformers renames every key, and some have no place in the class: only what lacks is told.
    kinds = ("missing_keys", "mismatched_keys") if saved.gguf else tuple(fresh.problems)
    wrong = {kind: keys for kind, keys in fresh.problems.items() if kind in kinds}
    told = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}" for kind, keys in wrong.items())
    checks = [Check(what=_LOADS, passed=not wrong, found=told or f"as {fresh.architecture}")]
    outputs = at_tokens(fresh.outputs, keep_of(batch))
    checks.append(
        Check(what=_FINITE, passed=bool(outputs.isfinite().all()), found=f"outputs {tuple(fresh.outputs.shape)}")
    )
    if fresh.cached_generation is not None:
        checks.append(Check(what=_CACHE, passed=fresh.cached_generation, found="greedy tokens compared"))
    return batch, outputs, checks, []


def _in_float32(batch: Batch) -> Batch:
    """The batch as both models read it: they are compared in float32, whatever they are stored in."""
    if not isinstance(batch, Mapping):
        return batch
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def _compare_outputs(outputs: Tensor, batch: Batch, original: Loaded, plan: Plan) -> Check:
    with bypassed(original.stack, plan.removed):
        reference = outputs_at_tokens(original.tower(), batch)
    difference, tolerance = largest_difference(outputs, reference), tolerance_of(reference)
    found = f"largest difference {difference:.2g}, allowed {tolerance:.2g}; blocks {plan.describe() or 'none'}"
    return Check(what=_BYPASS, passed=difference <= tolerance, found=found)


# --- comparing files ---


def _compare_bytes(
    saved: _Saved, dense: _Saved, plan: Plan, notes: list[str], empty: Loaded | None, *, copied: bool
) -> list[Check]:
    """Whether what is stored here is what is stored there; `copied` says that it went from file to file."""
    if saved.gguf is not None and dense.gguf is not None:
        wrong = check_cut(dense.gguf, plan, saved.gguf)
        found = f"{len(plan.kept)} blocks and the rest"
    elif saved.checkpoint is not None and dense.checkpoint is not None and empty is not None:
        if saved.checkpoint.dtype != dense.checkpoint.dtype:
            notes.append(f"Its bytes were not compared: {saved.checkpoint.dtype} here, {dense.checkpoint.dtype} there.")
            return []
        pairs = _pairs(saved.checkpoint, dense.checkpoint, plan, empty, any_dtype=copied)
        path = _later(empty, find_stack_path(list(saved.checkpoint.tensors), len(plan.kept), empty.stack.path))
        compared = {_inside(_later(empty, name), path)[0] for name in pairs.values()}
        if not compared >= set(range(len(plan.kept))):
            notes.append("Its bytes were not compared: its weights are stored under other names than the original's.")
            return []
        others = sorted(saved.checkpoint.tensors.keys() - pairs.values())
        wrong = [f"`{name}` is left over" for name in others] if copied else []
        if others and not copied:
            notes.append(
                f"{len(others)} of its weights (`{others[0]}`, ...) are not stored in the original under that name, in "
                "that type and as a whole: their bytes were not compared."
            )
        wrong += compare_bytes(dense.checkpoint, pairs.get, saved.checkpoint)
        found = f"{len(plan.kept)} blocks and the rest: {len(pairs)} tensors"
    else:
        notes.append("Its bytes were not compared: one of both is a GGUF file.")
        return []
    return [Check(what=_BYTES, passed=not wrong, found="; ".join(wrong[:3]) or found)]


def _pairs(saved: Checkpoint, dense: Checkpoint, plan: Plan, empty: Loaded, *, any_dtype: bool) -> dict[str, str]:
    """The names of what must be equal, there -> here.

    What a load from memory drops (buffers, other heads) is no loss, what it renames is found by either name, what it
    converts is left out unless `any_dtype`; so is what holds a slice for each block.
    """
    family = facts_of(empty.stack.owner(empty.model.config).model_type)
    path = _later(empty, find_stack_path(list(dense.tensors), plan.num_blocks, empty.stack.path))
    here = {_later(empty, name): name for name in saved.tensors}
    pairs: dict[str, str] = {}
    for name, tensor in dense.tensors.items():
        if family.packed_axis(name) is not None:
            continue
        later = _later(empty, name)
        block, inner = _inside(later, path)
        # What the first block holds for all moves to the new first one.
        new = f"{path}.0.{inner}" if block == 0 and family.leads(inner) else plan.rename(later, path)
        if new in here and (any_dtype or saved.tensors[here[new]].dtype == tensor.dtype):
            pairs[name] = here[new]
    return pairs


def _later(loaded: Loaded, name: str) -> str:
    return later_name(name, loaded.model.base_model_prefix)


def _inside(name: str, path: str) -> tuple[int | None, str]:
    """Block and name inside it; (None, the name) for a weight of no block."""
    index, _, inner = name.removeprefix(f"{path}.").partition(".")
    inside = name.startswith(f"{path}.") and index.isdecimal()
    return (int(index), inner) if inside else (None, name)


def _num_blocks(empty: Loaded) -> int:
    """Length of the stack that was cut, in the original."""
    try:
        return len(empty.stack)
    except UnsupportedArchitectureError as error:
        raise InvalidPlanError(
            f"`{empty.source}` has not the blocks that the record speaks of, `{empty.stack_name}`. Name the model that "
            "this one was cut from."
        ) from error


def _check_length(plan: Plan, num_blocks: int) -> None:
    if plan.num_blocks != num_blocks:
        raise InvalidPlanError(
            f"The record speaks of an original of {plan.num_blocks} blocks; the one given has {num_blocks}. Name the "
            "model that this one was cut from."
        )


def _changed_weights(record: RunRecord | None) -> str:
    """How weights were changed after the cut, by the record: compensation or healing that was kept."""
    if record is None or not record.cuts:
        return ""
    repair, healing = record.cuts[0].compensation, record.cuts[0].healing
    kept = {"compensation": repair is not None and repair.applied, "healing": healing is not None and healing.kept}
    return ", ".join(name for name, is_kept in kept.items() if is_kept)


def _infer_plan(saved: _Saved, dense: _Saved, *, head: str, trust_remote_code: bool) -> tuple[Plan, str]:
    """The removed blocks, told by the weights: each block of the smaller model is found in the original, in order.

    Returns:
        The plan, and the path of the stack: the first whose length differs, else the one that is taken by itself.

    Raises:
        InvalidPlanError: A block is not found.
    """
    if saved.checkpoint is None or dense.checkpoint is None:
        raise InvalidPlanError(
            "There is no `record.json` that says which blocks are gone, and they are only told by comparing "
            "safetensors weights. Verify without `--against`, or keep the record beside the model."
        )
    original = load_empty(dense.source, head=head, trust_remote_code=trust_remote_code)
    smaller = load_empty(saved.source, head=head, trust_remote_code=trust_remote_code)
    left = {stack.path: len(stack) for stack in find_stacks(smaller.model)[0]}
    for stack in find_stacks(original.model)[0]:
        if left.get(stack.path, len(stack)) != len(stack):
            original, smaller = (dataclasses.replace(one, stack_name=stack.path) for one in (original, smaller))
            break
    before, after = _block_digests(dense, original), _block_digests(saved, smaller)
    removed: list[int] = []
    place = 0
    for block in range(len(before)):
        if place < len(after) and _same(before[block], after[place]):
            place += 1
        else:
            removed.append(block)
    if place < len(after):
        raise InvalidPlanError(
            f"Block {place} of `{saved.name}` is none of the blocks of `{dense.name}` in their order, and there is no "
            "`record.json` that says what was cut. Is it the right original?"
        )
    plan = Plan(num_blocks=len(before), removed=tuple(removed), method="explicit", rule="told by equal weights")
    return plan, original.stack.path


def _block_digests(saved: _Saved, loaded: Loaded) -> list[dict[str, str]]:
    """Of each block, name inside it -> a digest of type, shape and beginning, whatever files hold it."""
    checkpoint = saved.checkpoint
    assert checkpoint is not None
    path = _later(loaded, find_stack_path(list(checkpoint.tensors), len(loaded.stack), loaded.stack.path))
    digests: list[dict[str, str]] = [{} for _ in loaded.stack.blocks]
    for shard in checkpoint.shards:
        with shard.path.open("rb", buffering=0) as file:
            for tensor in shard.tensors:
                block, inner = _inside(_later(loaded, tensor.name), path)
                if block is not None and block < len(digests):
                    begins = os.pread(file.fileno(), min(tensor.num_bytes, 65536), tensor.start)
                    digests[block][inner] = hashlib.sha256(
                        f"{tensor.dtype}{tensor.shape}".encode() + begins
                    ).hexdigest()
    return digests


def _same(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether blocks agree in what both store: old checkpoints store buffers too, which are no longer saved."""
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[name] == other[name] for name in shared)
