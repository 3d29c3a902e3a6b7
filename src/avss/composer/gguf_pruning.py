"""`avss.prune` of a GGUF file into a GGUF file: quantised weights stay as they are."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from avss.composer.disk import OVERHEAD_BYTES, score_blind, scores_of
from avss.composer.inputs import calibration
from avss.composer.proof import prove_gguf
from avss.composer.provenance import now, versions
from avss.composer.scores import score_loaded
from avss.config import DataConfig, PlanConfig
from avss.criteria import find_criteria
from avss.errors import ModelLoadError, UnsupportedArchitectureError, VerificationError
from avss.models.gguf_file import GgufFile, check_cut, metadata_changes, write_cut
from avss.models.load import Loaded, load_model
from avss.output import check_free, fresh_folder
from avss.plan import Room, check_one_target, explicit_plan, plan_within
from avss.progress import Stages, Timed, silent
from avss.record import Cut, ModelFacts, Plan, RunRecord, ScoreTable, Verification
from avss.reporting.card import render_card

MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"


def find_gguf(source: str, revision: str | None = None) -> Path:
    """The GGUF file that a user names: itself, the only one in a folder, or `owner/name/file.gguf` on the hub.

    Raises:
        ModelLoadError: There is none, or several.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
        found = ", ".join(file.name for file in files[:4]) or "none"
        raise ModelLoadError(f"`{source}` holds {len(files)} GGUF files ({found}); `--format gguf` cuts one. Name it.")
    parts = source.split("/")
    if len(parts) != 3 or not source.endswith(".gguf") or source.startswith((".", "/", "~")):
        raise ModelLoadError(
            f"`{source}` is no GGUF file, and `--format gguf` cuts one. Name a file, or `owner/name/file.gguf` on the "
            "hub."
        )
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise ModelLoadError(
            f"`{source}` cannot be had: {first}. Check its name, the network and your access."
        ) from error


def prune_gguf(
    source: str | Path,
    config: PlanConfig,
    *,
    out: Path,
    force: bool = False,
    data: DataConfig | str | Sequence[str] = "builtin",
    scores: str | Path | None = None,
    max_memory: int | None = None,
    head: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    command: str | None = None,
    stages: Stages = silent,
    **settings: Any,
) -> RunRecord:
    """Removes blocks from a GGUF file and writes a GGUF file, quantised as it was.

    Scores, where the plan needs them, come from the weights that transformers decodes out of the file. The result is
    read back and compared byte for byte, and, where the model fits in memory, run and compared with the original.

    Args:
        source: The file; see `find_gguf`.
        config: Which blocks go.
        out: Folder to write; it appears whole, or not at all, with `model.gguf` and a `Modelfile` for Ollama in it.
        force: Whether a folder that avss wrote may be replaced.
        data: The calibration text.
        scores: Record of an earlier run to choose by.
        max_memory: Bytes that verification may use; by default what is free.
        head: What the model is used as.
        device: Where it is scored.
        revision: Hub branch, tag or commit.
        command: The command to note in the record.
        stages: Where progress goes.
        **settings: `samples`, `seq_len`, `batch_size`, `seed`, `layout`.

    Raises:
        UserError: Anything the caller can fix, in one sentence.
        VerificationError: The result was not what it should be; it has been withdrawn.
    """
    check_one_target(config)
    check_free(out, force=force, sources=(source, data, scores))
    timed = Timed(stages)
    path = find_gguf(str(source), revision)
    with timed("Reading the file"):
        file = GgufFile(path)
        metadata_changes(file, _nothing(file))  # refuse before scoring what can never be cut
        values, sizes = file.block_sizes()
        room = Room.of(config, (file.num_values, values), (file.num_bytes, sizes))
        if room is not None:
            room.refuse_fitting()
    loaded: Loaded | None = None
    table: ScoreTable | None = None
    (criterion,) = find_criteria([config.criterion])
    if config.blocks is not None:
        plan = explicit_plan(config, file.num_blocks)
    elif scores is not None:
        found = scores_of(scores, config.criterion).of(_facts(str(source), revision, file))
        table = ScoreTable(scores=(found,))
        plan = plan_within(found, config, room, protects_ends=criterion.protects_ends)
    elif not criterion.needs:
        seed = data.seed if isinstance(data, DataConfig) else int(settings.get("seed", 0))
        ranked = score_blind(criterion, file.num_blocks, seed)
        table = ScoreTable(scores=(ranked,))
        plan = plan_within(ranked, config, room, protects_ends=criterion.protects_ends)
    else:
        with timed("Loading the model"):
            loaded = load_model(path, head=head, device=device)
        batches = calibration(loaded, data, **settings)
        table, _ = score_loaded(
            loaded,
            batches,
            (criterion,),
            True,
            config.share(file.num_blocks),
            timed,
            protect=config.protect,
            chooses=config.takes_the_lowest,
        )
        plan = plan_within(table.scores[0], config, room, protects_ends=criterion.protects_ends)
    metadata_changes(file, plan)  # refuse before anything is written
    with fresh_folder(out, force=force) as folder:
        with timed("Writing the smaller file") as advance:
            changes = write_cut(file, plan, folder / MODEL_FILE, on_bytes=advance)
        with timed("Verifying it"):
            written = GgufFile(folder / MODEL_FILE)
            wrong = check_cut(file, plan, written)
            if wrong:
                raise VerificationError(
                    f"The written file failed verification and has been withdrawn: {'; '.join(wrong[:4])}. Nothing was "
                    "published. Is the disk full?"
                )
            proof, note = _prove(path, folder / MODEL_FILE, file, loaded, plan, head=head, max_memory=max_memory)
        (folder / MODELFILE).write_text(f"FROM ./{MODEL_FILE}\n", encoding="utf-8")
        one = Cut(
            plan=plan,
            model=_facts(str(source), revision, written),
            changes=changes,
            path=".",
            file_format="gguf",
            verification=proof,
        )
        record = RunRecord(
            created=now(),
            command=command or f"avss.prune({str(source)!r}, file_format='gguf', ...)",
            versions={**versions(), "gguf": importlib.metadata.version("gguf")},
            model=_facts(str(source), revision, file),
            data=table.data if table else None,
            scores=table.scores if table else (),
            warnings=(*(table.warnings if table else ()), *filter(None, (note,))),
            cuts=(one,),
            seconds=timed.seconds,
            settings=config.model_dump(mode="json"),
        )
        (folder / "README.md").write_text(render_card(record, one), encoding="utf-8")
        (folder / "record.json").write_text(record.to_json(), encoding="utf-8")
    return record


def _nothing(file: GgufFile) -> Plan:
    return Plan(num_blocks=file.num_blocks, removed=(), method="explicit", rule="nothing")


def _prove(
    source: Path, result: Path, file: GgufFile, loaded: Loaded | None, plan: Plan, *, head: str, max_memory: int | None
) -> tuple[Verification, str | None]:
    """The proof, and what stood in the way of a full one."""
    copied = Verification(reload_strict=None, bytes_equal=True, outputs_compared=False)
    # The original, the decoded copy that its rounding makes, and the result, in float32.
    needed = OVERHEAD_BYTES + 3 * 4 * file.num_values
    if needed > (max_memory or psutil.virtual_memory().available):
        return copied, "The model was not run after the cut: it does not fit in memory. Its bytes were compared."
    try:
        # Where it was scored; else on the CPU, whose memory it was measured against.
        original = loaded or load_model(source, head=head, device="cpu")
        return prove_gguf(result, original, plan), None
    except (ModelLoadError, UnsupportedArchitectureError) as error:
        return copied, f"The model was not run after the cut, its bytes were compared: {error}"


def _facts(source: str, revision: str | None, file: GgufFile) -> ModelFacts:
    own = file.own()
    return ModelFacts(
        source=Path(source).name if Path(source).exists() else source,
        revision=revision,
        architecture=file.architecture,
        model_type=file.architecture,
        head="causal" if own.get("attention.causal", True) else "encoder",
        stack="blk",
        num_blocks=file.num_blocks,
        hidden_size=int(own.get("embedding_length", 0)),
        num_parameters=file.num_values,
        num_block_parameters=sum(file.block_sizes()[0]),
        checkpoint_bytes=file.num_bytes,
        dtype=file.main_type,
        compute_dtype="float32",
        device="disk",
        fingerprint=_fingerprint(file),
    )


def _fingerprint(file: GgufFile) -> str:
    """`file-` and 16 hex digits of a SHA-256 over names, types, shapes and the first bytes of every tensor."""
    digest = hashlib.sha256()
    for tensor in file.reader.tensors:
        digest.update(f"{tensor.name}{tensor.tensor_type.name}{list(tensor.shape)}".encode())
        digest.update(tensor.data.reshape(-1)[:1024].tobytes())
    return f"file-{digest.hexdigest()[:16]}"
