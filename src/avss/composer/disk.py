"""`avss.prune` on disk: the same cut, from file to file, for a model that memory does not hold. No torch here.

headers + config --outline--> plan --lay out, check--> files without bytes --copy--> checkpoint --prove--> record
"""

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from avss.composer.provenance import now, versions
from avss.config import PlanConfig
from avss.criteria import CRITERIA, AbstractCriterion, Evidence, find_criteria
from avss.errors import (
    ConfigError,
    InvalidPlanError,
    ModelLoadError,
    UnsupportedArchitectureError,
    VerificationError,
)
from avss.models.apart import empty_model
from avss.models.shards import (
    Checkpoint,
    bits_of,
    check_copy,
    copy_companions,
    fill,
    find_stack_path,
    fingerprint,
    indexed,
    lay_out,
    read_checkpoint,
)
from avss.output import check_free, fresh_folder
from avss.plan import Room, check_one_target, explicit_plan, plan_within, protecting
from avss.progress import Stages, Timed, silent
from avss.record import BlockScores, Cut, FieldChange, ModelFacts, Plan, RunRecord, ScoreTable, Verification
from avss.reporting.card import render_card

OVERHEAD_BYTES = 600_000_000
"""What Python, torch and transformers take before a model is loaded, with some room."""

_HUB_ERRORS = (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError)
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "*.bpe", "*.py", "LICENSE*"]
_WANTED += ["[0-9]*_*/*"]  # modules of sentence-transformers, some of which have weights in other formats


def memory_needed(num_values: int, *, dtype: str = "auto") -> int:
    """Bytes that a cut in memory takes: the model and the saved one beside it, in the dtype computed in."""
    width = 2 if dtype in ("bfloat16", "float16") else 4
    return OVERHEAD_BYTES + 2 * width * num_values


def memory_to_load(num_values: int, num_bytes: int, *, width: int) -> int:
    """Bytes that a model takes to be loaded and run.

    Args:
        num_values: Its parameters.
        num_bytes: Bytes of them as they are stored.
        width: Bytes of a value that is computed with; where most are stored otherwise, both are held for a moment.
    """
    stored_width = round(num_bytes / max(1, num_values))
    return OVERHEAD_BYTES + width * num_values + (num_bytes if stored_width != width else 0)


def fits_memory(
    source: str, *, max_memory: int | None = None, dtype: str = "auto", revision: str | None = None
) -> str | None:
    """None where a model can be cut in memory; otherwise a sentence that says why not.

    What is no folder of safetensors, here or on the hub, is not judged: it is cut in memory, or refused there.
    """
    stored = stored_size(source, revision)
    if stored is None:
        return None
    needed = memory_needed(stored[0], dtype=dtype)
    allowed = max_memory or psutil.virtual_memory().available
    if needed <= allowed:
        return None
    what = "`--max-memory` allows" if max_memory else "are free"
    return f"The model takes about {size_text(needed)} in memory and {size_text(allowed)} {what}: it is cut on disk."


def stored_size(source: str, revision: str | None = None) -> tuple[int, int] | None:
    """The values in a model's weights and their bytes, by their headers alone; None where these cannot be read."""
    folder = Path(source).expanduser()
    try:
        if not is_hub_id(source):
            return _size_of(read_checkpoint(folder)) if (folder / "config.json").is_file() else None
        with contextlib.suppress(ModelLoadError, LocalEntryNotFoundError):  # a whole snapshot needs no network
            cached = snapshot_download(source, revision=revision, allow_patterns=_WANTED, local_files_only=True)
            return _size_of(read_checkpoint(Path(cached)))
        counts = get_safetensors_metadata(source, revision=revision).parameter_count
        return sum(counts.values()), sum(num * bits_of(dtype) // 8 for dtype, num in counts.items())
    except Exception:  # no network has many names; whoever loads the model says what is wrong
        return None


def _size_of(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.num_values, checkpoint.num_bytes


def is_hub_id(source: str) -> bool:
    """Whether a name is one of the hub, `owner/name` or, for its oldest models, `name`; not one of a file here."""
    if Path(source).expanduser().exists() or source.startswith((".", "~", "/")) or source.endswith(".gguf"):
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def size_text(num_bytes: int) -> str:
    """A number of bytes in words, e.g. `1.2 GB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 10**9 else f"{num_bytes / 1e6:.0f} MB"


def find_folder(source: str, revision: str | None = None) -> Path:
    """The folder of a model: itself, or the hub's snapshot of it, downloaded where it is not cached.

    Raises:
        ModelLoadError: It is neither.
    """
    path = Path(source).expanduser()
    if path.is_file():
        hint = "Use `--format gguf` to cut a GGUF file on disk." if path.suffix == ".gguf" else "Name its folder."
        raise ModelLoadError(f"`{source}` is a file; a cut on disk takes a folder or a hub id. {hint}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"`{source}` holds no `config.json`: it is not a model folder. Name one that does.")
        return path
    if not is_hub_id(source):
        raise ModelLoadError(f"There is no folder `{source}`. A cut on disk takes a folder or a hub id.")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED))
    except _HUB_ERRORS as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise ModelLoadError(
            f"The files of `{source}` cannot be had: {first}. Check the hub id, the network and your access."
        ) from error


@dataclasses.dataclass(frozen=True)
class EarlierScores:
    """Scores that an earlier run wrote.

    Attributes:
        scores: Of one criterion.
        model: What was scored; None where that is not known.
        versions: What computed them.
    """

    scores: BlockScores
    model: ModelFacts | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, model: ModelFacts) -> BlockScores:
        """The scores, if they are this model's.

        In memory the fingerprint decides, where both were loaded alike: with the same head, dtype and transformers.
        Elsewhere (files, GGUF, another head) what remains the same does: the kind of model, the stack and its size.

        Raises:
            InvalidPlanError: They are another model's, or another stack's.
        """
        if self.scores.num_blocks != model.num_blocks:
            raise InvalidPlanError(
                f"The scores are of {self.scores.num_blocks} blocks; this model has {model.num_blocks}. Give the "
                "scores of this model."
            )
        if self.model is None:
            return self.scores
        for what, (scored, here) in differences(self.model, model, self.versions).items():
            raise InvalidPlanError(
                f"The scores are of `{self.model.source}`, whose {what} is `{scored}`; that of this model is `{here}`. "
                "Give the scores of this model."
            )
        return self.scores


def differences(
    scored: ModelFacts, model: ModelFacts, made_with: Mapping[str, str]
) -> dict[str, tuple[object, object]]:
    """What shows that two models are not one.

    Args:
        scored: The model that something was measured on.
        model: The model at hand.
        made_with: Versions of the packages that measured.

    Returns:
        The name of a fact -> what it is of either, where that differs.
    """
    facts: list[tuple[str, object, object]] = [
        ("number of blocks", scored.num_blocks, model.num_blocks),
        ("width", scored.hidden_size, model.hidden_size),
    ]
    if "gguf" not in (_kind(scored), _kind(model)):  # a GGUF file has names of its own
        facts.append(("type", scored.model_type, model.model_type))
        if scored.head == model.head:  # another head wraps the same stack under another path
            facts += [("class", scored.architecture, model.architecture), ("stack", scored.stack, model.stack)]
    same_library = made_with.get("transformers") == versions()["transformers"]
    loaded_alike = (scored.head, scored.compute_dtype, _kind(scored)) == (model.head, model.compute_dtype, _kind(model))
    if loaded_alike and (same_library or _kind(model) != "memory"):
        facts.append(("fingerprint", scored.fingerprint, model.fingerprint))
    return {name: (there, here) for name, there, here in facts if there != here}


def _kind(model: ModelFacts) -> str:
    return "gguf" if model.stack == "blk" else "disk" if model.device == "disk" else "memory"


def scores_of(folder: str | Path, criterion: str) -> EarlierScores:
    """The scores that an earlier run wrote.

    Args:
        folder: What `avss score --out` wrote, or any run's record.
        criterion: Whose scores.

    Raises:
        DataError: There is no record.
        ConfigError: It holds no scores of that criterion.
    """
    record = RunRecord.read(Path(folder))
    for scores in record.scores:
        if scores.criterion == criterion:
            return EarlierScores(scores, record.model, record.versions)
    found = ", ".join(scores.criterion for scores in record.scores) or "none"
    raise ConfigError(
        f"`{folder}` holds no scores by `{criterion}`. It holds: {found}. Name one of them with `--criterion`, or "
        "score the model again."
    )


def score_blind(criterion: AbstractCriterion, num_blocks: int, seed: int) -> BlockScores:
    """The scores of a criterion that looks at nothing but the number of blocks.

    Raises:
        ConfigError: The seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"The seed `{seed}` must be at least 0 (`--seed`).")
    scored = criterion.score(Evidence(num_blocks=num_blocks, summaries={}, seed=seed))
    return BlockScores(criterion=criterion.name, title=criterion.title, values=tuple(map(float, scored.values)))


def choose_unseen(
    config: PlanConfig,
    model: ModelFacts,
    scores: str | Path | ScoreTable | None,
    seed: int,
    pinned: Sequence[int] = (),
    room: Room | None = None,
) -> tuple[Plan, BlockScores | None]:
    """The plan for a model that is not in memory: a list, a baseline, or scores, of an earlier run or made for this.

    Blocks that the architecture cannot lose are `pinned`: nothing but a list names them. `room` is the size to reach,
    where that is the target.

    Raises:
        InvalidPlanError: Nothing can be removed that way.
    """
    num_blocks = model.num_blocks
    if config.blocks is not None:
        return explicit_plan(config, num_blocks), None
    (criterion,) = find_criteria([config.criterion])
    if isinstance(scores, ScoreTable):
        found = EarlierScores(scores[config.criterion], scores.model, versions()).of(model)
    elif scores is not None:
        found = scores_of(scores, config.criterion).of(model)
    else:
        found = score_blind(criterion, num_blocks, seed)
    guarded = protecting(config, pinned, num_blocks, protects_ends=criterion.protects_ends)
    return plan_within(found, guarded, room, protects_ends=criterion.protects_ends), found


def wants_scores(config: PlanConfig, scores: object) -> bool:
    """Whether a plan waits for scores: its blocks are not named, and its criterion looks at the model."""
    (criterion,) = find_criteria([config.criterion])
    return config.blocks is None and scores is None and bool(criterion.needs)


def check_unseen(config: PlanConfig, scores: str | Path | ScoreTable | None) -> None:
    """Refuses early what `choose_unseen` has no way to choose by.

    Raises:
        ConfigError: The criterion needs scores, and there are none.
        DataError: There are no scores where they should be.
    """
    if config.blocks is None and isinstance(scores, str | Path):
        scores_of(scores, config.criterion)
    elif wants_scores(config, scores):
        blind = ", ".join(name for name, one in CRITERIA.items() if not one.needs)
        raise ConfigError(
            f"`{config.criterion}` needs scores of the model, and this cut on disk makes none. Name the blocks with "
            f"`--blocks`; or choose by {blind}; or give scores (`avss score MODEL --out DIR`, then `--scores DIR`)."
        )


def prune_on_disk(
    source: str,
    config: PlanConfig,
    *,
    out: Path,
    force: bool = False,
    scores: str | Path | ScoreTable | None = None,
    max_memory: int | None = None,
    head: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    seed: int = 0,
    command: str | None = None,
    note: str | None = None,
    stages: Stages = silent,
) -> RunRecord:
    """Cuts a safetensors checkpoint from file to file.

    Names and shapes are checked by transformers against the smaller model's class before a byte is copied (types that
    are known to be plain are told by their files alone, `avss.models.known`), the bytes after. Where the model fits in
    memory, it is verified like any other: run, and compared with the original.

    Args:
        source: Folder or hub id.
        config: Which blocks go.
        out: Folder to write; it appears whole, or not at all.
        force: Whether a folder that avss wrote may be replaced.
        scores: Record of an earlier run, or scores made for this one, for criteria that look at the model.
        max_memory: Bytes that verification may use; by default what is free.
        head: What the model is used as; `auto` takes the class named in its config.
        revision: Hub branch, tag or commit.
        trust_remote_code: Whether code that comes with the model may run.
        device: Where the result is run to verify it; `auto` is the CPU, whose memory it was measured against.
        seed: For the criterion `random`.
        command: The command to note in the record.
        note: A sentence for the record, e.g. why it was cut on disk.
        stages: Where progress goes.

    Raises:
        UserError: Anything the caller can fix, in one sentence.
        VerificationError: The result was not what it should be; it has been withdrawn.
    """
    check_one_target(config)
    check_unseen(config, scores)
    table = scores if isinstance(scores, ScoreTable) else None
    check_free(out, force=force, sources=(source,) if table is not None else (source, scores))
    timed = stages if isinstance(stages, Timed) else Timed(stages)  # the time of scores made for this counts
    folder = find_folder(source, revision)
    checkpoint = read_checkpoint(folder)
    with fresh_folder(out, force=force) as target, indexed(checkpoint) as readable:
        with (
            timed("Reading the architecture"),
            empty_model(str(folder), head=head, trust_remote_code=trust_remote_code) as ask,
        ):
            outline = ask("outline")
            path = find_stack_path(list(checkpoint.tensors), outline["num_blocks"], outline["stack"])
            surplus = _surplus(checkpoint, path, outline["num_blocks"])
            dense = _facts(source, revision, outline, checkpoint, path, outline["num_blocks"], folder, surplus)
            values, sizes = block_sizes(checkpoint, path, outline["num_blocks"])
            room = Room.of(config, (dense.num_parameters, values), (dense.checkpoint_bytes, sizes))
            plan, found = choose_unseen(config, dense, scores, seed, outline["pinned"], room)
            changes = tuple(
                FieldChange.model_validate(change)
                for change in ask("write_config", plan=plan.model_dump(mode="json"), folder=str(target))
            )

            def rename(name: str) -> str | None:
                return None if name in surplus else plan.rename(name, path)

            written = lay_out(checkpoint, rename, target)
            problems = ask("problems", folder=str(target))
            if problems:
                _check_load(problems, ask("problems", folder=str(readable)), rename)
        with timed("Copying the weights") as advance:
            fill(checkpoint, rename, written, on_bytes=advance)
            copy_companions(folder, target)
        with timed("Verifying it"):
            wrong = check_copy(checkpoint, rename, written)
            if wrong:
                raise VerificationError(
                    f"The copy failed verification and has been withdrawn: {'; '.join(wrong[:4])}. Nothing was "
                    "published. Is the disk full, or is something writing to the model?"
                )
            proof = _prove(
                readable,
                target,
                plan,
                room=max_memory or psutil.virtual_memory().available,
                whole=memory_needed(checkpoint.num_values),
                at_rest=memory_at_rest(checkpoint, path, outline["num_blocks"]),
                loads=outline["class_asked"],
                head=head,
                trust_remote_code=trust_remote_code,
                device=device,
            )
        record = RunRecord(
            created=now(),
            command=command or f"avss.prune({source!r}, on_disk=True, ...)",
            versions=versions(),
            model=dense,
            scores=() if found is None else (found,),
            data=None if table is None else table.data,
            stability=() if table is None else table.stability,
            warnings=tuple(filter(None, (note, *(() if table is None else table.warnings), _surplus_note(surplus)))),
            cuts=(
                Cut(
                    plan=plan,
                    model=_facts(source, revision, outline, written, path, len(plan.kept), target),
                    changes=changes,
                    path=".",
                    verification=proof,
                ),
            ),
            seconds=timed.seconds,
            settings=config.model_dump(mode="json"),
        )
        (target / "README.md").write_text(render_card(record, record.cuts[0]), encoding="utf-8")
        (target / "record.json").write_text(record.to_json(), encoding="utf-8")
    return record


def _surplus(checkpoint: Checkpoint, path: str, num_blocks: int) -> frozenset[str]:
    """Weights stored after the last block, under its list: prediction heads that transformers does not load."""
    beyond = Plan(num_blocks=num_blocks, removed=(), method="explicit", rule="all")
    return frozenset(name for name in checkpoint.tensors if beyond.rename(name, path) is None)


def _surplus_note(surplus: frozenset[str]) -> str | None:
    if not surplus:
        return None
    return (
        f"{len(surplus)} weights stored after the last block (`{min(surplus)}`, ...) belong to no block that "
        "transformers loads, such as heads that predict several tokens. They are left out, as a load would leave them."
    )


def _check_load(found: dict[str, list[str]], before: dict[str, list[str]], rename: Any) -> None:
    """The smaller checkpoint may have no problem that the original did not have.

    Raises:
        UnsupportedArchitectureError: It has one: a weight must move or change, and a copy cannot do that.
    """
    known = {(kind, rename(key)) for kind, keys in before.items() for key in keys}
    new = [
        f"{kind.replace('_', ' ')}: `{key}`" for kind, keys in found.items() for key in keys if (kind, key) not in known
    ]
    if new:
        raise UnsupportedArchitectureError(
            f"Dropping and renaming weights is not enough for this model: the smaller one would not load as its config "
            f"says ({'; '.join(new[:4])}). Nothing was copied. Cut it in memory (`--in-memory`)."
        )


def memory_at_rest(checkpoint: Checkpoint, path: str, num_blocks: int) -> int:
    """Bytes that it takes to run a model a block at a time: everything but the blocks, and the largest block."""
    values, _ = block_sizes(checkpoint, path, num_blocks)
    # Twice: experts are joined from parts, and both are held for a moment.
    return OVERHEAD_BYTES + 4 * (checkpoint.num_values - sum(values) + 2 * max(values))


def block_sizes(checkpoint: Checkpoint, path: str, num_blocks: int) -> tuple[list[int], list[int]]:
    """The values in each block's weights, and their bytes as they are stored."""
    values, sizes = [0] * num_blocks, [0] * num_blocks
    for name, tensor in checkpoint.tensors.items():
        index, _, _ = name.removeprefix(f"{path}.").partition(".")
        if name.startswith(f"{path}.") and index.isdigit() and int(index) < num_blocks:
            values[int(index)] += math.prod(tensor.shape)
            sizes[int(index)] += tensor.num_bytes
    return values, sizes


def _prove(
    source: Path,
    folder: Path,
    plan: Plan,
    *,
    room: int,
    whole: int,
    at_rest: int,
    loads: bool,
    device: str,
    **loading: Any,
) -> Verification:
    """Runs original and result, as whole models or a block at a time; neither, where there is no room for that.

    `loads` says whether the class has been found to take the names and shapes of the result.
    """
    copied = Verification(reload_strict=True if loads else None, bytes_equal=True, outputs_compared=False)
    if at_rest > room:
        return copied
    # From here on weights are in memory, and so may torch be.
    proof = importlib.import_module("avss.composer.proof")
    if whole <= room:
        place = "cpu" if device.partition(":")[0] in ("auto", "disk") else device
        found = proof.prove_saved(source, folder, plan, device=place, **loading)
    else:
        found = proof.prove_at_rest(source, folder, plan, **loading)
    if not found.outputs_compared:
        return copied.model_copy(update={"note": found.note})
    return found.model_copy(update={"bytes_equal": True})


def _facts(
    source: str,
    revision: str | None,
    outline: dict[str, Any],
    checkpoint: Checkpoint,
    path: str,
    num_blocks: int,
    folder: Path,
    surplus: frozenset[str] = frozenset(),
) -> ModelFacts:
    """A checkpoint in numbers; `surplus` is stored and not of the model, as `_surplus` found it."""
    loaded = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in surplus}
    inside = [tensor for name, tensor in loaded.items() if name.startswith(f"{path}.")]
    return ModelFacts(
        source=Path(source).name if Path(source).exists() else source,
        revision=revision,
        architecture=outline["architecture"],
        model_type=outline["model_type"],
        head=outline["head"],
        stack=outline["stack"],
        num_blocks=num_blocks,
        hidden_size=outline["hidden_size"],
        num_parameters=sum(math.prod(tensor.shape) for tensor in loaded.values()),
        num_block_parameters=sum(math.prod(tensor.shape) for tensor in inside),
        checkpoint_bytes=sum(tensor.num_bytes for tensor in loaded.values()),
        dtype=checkpoint.dtype,
        compute_dtype=checkpoint.dtype,
        device="disk",
        fingerprint=fingerprint(checkpoint, (folder / "config.json").read_bytes()),
    )
