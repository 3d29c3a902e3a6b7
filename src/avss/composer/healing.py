"""`avss.heal`: train a cut model to answer as the dense one does, save, prove."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avss.composer.inputs import AnyModel, checkpoint_folder, load, probe_batch
from avss.composer.pruning import Pruned, describe_cut
from avss.composer.records import begin_record, now, places_of, versions
from avss.config import HealConfig, build
from avss.cut import cut
from avss.data.images import Images, find_images
from avss.data.sources import Texts, read_table, read_texts
from avss.errors import ConfigError, InvalidPlanError, ModelLoadError
from avss.evaluation.labelled import match_classifier, read_labelled
from avss.healing import heal as heal_loaded
from avss.healing.state import Checkpoint
from avss.healing.team import Team
from avss.models.load import Loaded, save_model
from avss.models.predictions import label_answers
from avss.models.verify import verify
from avss.output import check_free, fresh_folder
from avss.progress import Advance, Stages, Timed, silent
from avss.record import Cut, Healing, Plan, RunRecord
from avss.reporting.card import render_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def heal(
    model: AnyModel | Pruned,
    *,
    teacher: AnyModel | None = None,
    data: str | Path | Sequence[str] = "builtin",
    budget: str = "30m",
    labels: str | None = None,
    plan: Plan | None = None,
    out: str | Path | None = None,
    force: bool = False,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    loading: dict[str, Any] | None = None,
    command: str | None = None,
    stages: Stages = silent,
    **settings: Any,
) -> Pruned:
    """Trains a cut model to answer as the model it was cut from, and saves and verifies it where `out` is given.

    A run that was killed goes on where it stopped when it is started again with the same models, text, settings and
    `out`: its state stands beside `out` until the result is safe.

    Args:
        model: The smaller model: a folder that `avss prune` or `avss run` wrote, or what `avss.prune` returned. Any
            other model needs `plan`. It is left as it was.
        teacher: The dense model; by default the one named in the folder's record.
        data: The text to train on, or the images (as for `avss.score`); a part of it is held out.
        budget: A time or a number of tokens: `30m`, `1h30m`, `500k`, `2M`, or `30m,2M`.
        labels: For classifiers: the column of `data` that holds the labels; `label_weight` says how much they count,
            one half unless it is given.
        plan: The blocks removed, where the model carries no record.
        out: Folder for the checkpoint; it appears whole and verified, or not at all.
        force: Whether a folder that avss wrote may be replaced.
        tokenizer: For a model object.
        loading: For models named: `head`, `dtype`, `device`, `trust_remote_code`; `stack`, where no record tells it.
        command: The command to note in the record.
        stages: Where progress goes.
        **settings: See `avss.config.HealConfig`: `weights`, `learning_rate`, `batch_size`, `seq_len` ...

    Returns:
        The healed model; `record.cuts[0].healing` tells how it went.

    Raises:
        UserError: Anything the caller can fix, in one sentence.
        VerificationError: The saved model was not what it should be; it has been withdrawn.
    """
    source = str(data) if isinstance(data, str | Path) else "texts"
    if labels is not None and settings.get("label_weight") is None:
        settings["label_weight"] = 0.5
    config = build(HealConfig, {"source": source, "budget": budget, **settings})
    target = Path(out) if out is not None else None
    team = Team()
    if target is not None and team.leads:
        # A model may be healed in its place: it is replaced by what it became.
        read = [source for source in (model, teacher, data) if source is not model or not _is_same(source, target)]
        check_free(target, force=force, sources=read)
    timed = Timed(stages)
    options = _device_of(team, loading or {})
    with timed("Loading the models"):
        smaller, record = _smaller(model, tokenizer, options)
        smaller.check_in_memory("Healing")
        if not smaller.is_vision:
            smaller.check_reads_text("Healing")
        plan = plan or _plan(record, smaller)
        dense = _dense(
            teacher,
            record,
            Path(smaller.source),
            # Beside the smaller model, wherever that lies.
            {"device": str(smaller.device), **options, "head": smaller.head, "stack": smaller.stack.path},
            # What is cut in memory still names the dense model as its source.
            in_memory=isinstance(model, Pruned),
        )
        cut(dense, plan)  # what cannot be proven in the end is refused before the time is spent
    texts, label_ids = _texts(data, labels, smaller)
    with timed("Healing") as advance:
        healed, healing, checkpoint = heal_loaded(
            dense,
            smaller,
            plan,
            texts,
            config,
            labels=label_ids,
            checkpoint_folder=None if target is None else checkpoints_beside(target),
            report=_reporter(advance),
        )
    record = _healed_record(record, dense, healed, plan, healing, command, timed)
    if target is not None and team.leads:
        with fresh_folder(target, force=force) as folder:
            record = _save_verified(folder, dense, healed, record, timed)
            (folder / "README.md").write_text(render_card(record, record.cuts[0]), encoding="utf-8")
            (folder / "record.json").write_text(record.to_json(), encoding="utf-8")
        forget(checkpoint)
    return Pruned(model=healed.model, tokenizer=healed.tokenizer, plan=plan, record=record, loaded=healed)


def _is_same(source: object, folder: Path) -> bool:
    return isinstance(source, str | Path) and checkpoint_folder(source).resolve() == folder.resolve()


def _reporter(advance: Advance) -> Callable[[int, int | None, str], None]:
    return lambda done, total, note: advance(done, total, note)


def checkpoints_beside(out: Path) -> Path:
    """Where a run that writes this folder keeps the state of unfinished healing."""
    return out.parent / f".{out.name}.healing"


def forget(checkpoint: Checkpoint | None) -> None:
    """Removes the state of a run whose result is safe."""
    if checkpoint is None:
        return
    checkpoint.remove()
    with contextlib.suppress(OSError):  # another unfinished run of this name keeps its state
        checkpoint.path.parent.rmdir()


# --- models ---


def _device_of(team: Team, loading: dict[str, Any]) -> dict[str, Any]:
    """Each process of several on its own device."""
    if team.size > 1 and loading.get("device", "auto") == "auto":
        return {**loading, "device": str(team.device)}
    return loading


def _smaller(
    model: AnyModel | Pruned, tokenizer: "PreTrainedTokenizerBase | None", loading: dict[str, Any]
) -> tuple[Loaded, RunRecord | None]:
    if isinstance(model, Pruned):
        if model.loaded is not None:
            return model.loaded, model.record
        if model.model is None:
            raise ConfigError("The model was cut from file to file and is not in memory. Give the folder it is in.")
        head = model.record.cuts[0].model.head
        return load(model.model, model.tokenizer, head=head, stack=model.record.stack), model.record
    if not isinstance(model, str | Path):
        return load(model, tokenizer, **loading), None
    folder = checkpoint_folder(model)
    record = RunRecord.read(folder) if (folder / "record.json").is_file() else None
    head = loading.get("head", "auto")
    if head == "auto" and record is not None and record.cuts:
        head = record.cuts[0].model.head
    stack = {} if record is None else {"stack": record.stack}
    return load(model, tokenizer, **{**loading, "head": head, **stack}), record


def _plan(record: RunRecord | None, smaller: Loaded) -> Plan:
    if record is None or not record.cuts:
        raise ConfigError(
            f"`{smaller.source}` carries no record of what was cut from which model. Heal a folder that `avss prune` "
            "or `avss run` wrote, or give `plan` and `teacher` to `avss.heal`."
        )
    return record.cuts[0].plan


def _dense(
    teacher: AnyModel | None,
    record: RunRecord | None,
    folder: Path,
    loading: dict[str, Any],
    *,
    in_memory: bool = False,
) -> Loaded:
    """The model named as the teacher, or the one that a record in `folder` says was cut, or that `folder` itself is."""
    if teacher is not None:
        return load(teacher, **loading)
    if record is None:
        raise ConfigError("No dense model was named. Name the model that it was cut from with `--teacher`.")
    source = record.model.source
    itself = in_memory and folder.name == source and folder.exists()
    places = [folder] if itself else places_of(record, folder)
    if not places and "/" not in source:  # of a folder the record keeps the last part; on the hub it may be any model
        raise ModelLoadError(
            f"The dense model `{source}` that the record names is neither beside `{folder}` nor in the working "
            "directory. Name it with `--teacher`."
        )
    revision: dict[str, Any] = {"revision": record.model.revision} if record.model.revision else {}
    try:
        dense = load(str(places[0]) if places else source, **{**loading, **revision})
    except ModelLoadError as error:
        raise ModelLoadError(
            f"The dense model `{source}` that the record names cannot be loaded. Name it with `--teacher`. ({error})"
        ) from error
    _check_teacher(dense, record)
    return dense


def _check_teacher(dense: Loaded, record: RunRecord) -> None:
    """Refuses a model of the recorded name that is another one, where fingerprints can tell.

    Raises:
        InvalidPlanError: It is another one.
    """
    found, known = dense.facts(), record.model
    # A fingerprint is of the values computed with and of the config as transformers writes it; or of files.
    alike = found.compute_dtype == known.compute_dtype
    alike = alike and versions()["transformers"] == record.versions.get("transformers")
    if alike and not known.fingerprint.startswith("file-") and found.fingerprint != known.fingerprint:
        raise InvalidPlanError(
            f"`{dense.source}` is not the `{known.source}` that was cut: its fingerprint is `{found.fingerprint}`, not "
            f"`{known.fingerprint}`. Name the model that was cut with `--teacher`."
        )


# --- text ---


def training_data(data: str | Path | Sequence[str], model: Loaded) -> Texts | Images:
    """What a model is healed on: text, or images for one that reads those.

    Raises:
        DataError: It cannot be read.
    """
    return find_images(data) if model.is_vision else read_texts(data)


def _texts(
    data: str | Path | Sequence[str], column: str | None, smaller: Loaded
) -> tuple[Texts | Images, list[int] | None]:
    if column is None:
        return training_data(data, smaller), None
    if smaller.head != "classifier" or not isinstance(data, str | Path):
        raise ConfigError(
            f"`--labels {column}` is for classifiers and a table of labelled texts; the model has a `{smaller.head}` "
            "head. Leave it out: the model then learns from the dense model's answers."
        )
    if label_answers(smaller.model.config) != "choice":
        raise ConfigError(
            f"`--labels {column}` is for classifiers with one right label of two or more, and `{smaller.source}` has "
            f"{smaller.model.config.num_labels} outputs of the problem type `{smaller.model.config.problem_type}`. "
            "Leave it out: the model then learns from the dense model's answers."
        )
    name, _, text_column = str(data).partition("#")
    table = read_labelled(
        read_table(data), Path(name).name, text_column=text_column or None, label_column=column, names=None
    )
    config = smaller.model.config
    table = match_classifier(table, int(config.num_labels or 0), config.label2id or {}, None)
    texts = Texts(texts=table.texts, source=Path(name).name, column=text_column or None)
    return texts, list(table.labels)


# --- result ---


def _healed_record(
    record: RunRecord | None,
    dense: Loaded,
    healed: Loaded,
    plan: Plan,
    healing: Healing,
    command: str | None,
    timed: Timed,
) -> RunRecord:
    """The record of the cut, carried on. What was measured before healing stays, as that of another model."""
    command = command or f"avss.heal({healed.source!r}, ...)"
    base = record or begin_record(dense, command, timed, None)
    one = describe_cut(dense, healed, plan).model_copy(update={"healing": healing})
    earlier: tuple[Cut, ...] = ()
    if base.cuts:
        first = base.cuts[0]
        kept = {name: getattr(first, name) for name in Cut.model_fields if name not in _OF_THE_WEIGHTS}
        if first.file_format != one.file_format:  # a GGUF file's metadata are not those of the checkpoint it became
            kept = {name: value for name, value in kept.items() if name not in ("file_format", "changes")}
        one = one.model_copy(update={**kept, "model": one.model, "healing": healing})
        measured = first.model_copy(update={"path": None, "verification": None})
        earlier = ((measured,) if first.measurements else ()) + base.cuts[1:]
        if not healing.kept and first.healing is not None:
            one = one.model_copy(update={"healing": first.healing})  # the weights are what that one made of them
    return base.model_copy(
        update={
            "created": now(),
            "command": command if record is None else f"{record.command}\n{command}",
            "cuts": (one, *earlier),
            "warnings": (*_still_true(base, healing), *healing_warnings(healing)),
            "seconds": {**base.seconds, **timed.seconds},
            "settings": {**base.settings, "healing": healing.settings},
        }
    )


def _still_true(base: RunRecord, healing: Healing) -> tuple[str, ...]:
    """What the record warned of, without what an earlier healing did not do and this one did."""
    if not healing.kept or not base.cuts:
        return base.warnings
    past = healing_warnings(base.cuts[0].healing)
    return tuple(warning for warning in base.warnings if warning not in past)


def healing_warnings(healing: Healing | None) -> tuple[str, ...]:
    """A sentence where healing left the weights as they were."""
    if healing is None or healing.kept:
        return ()
    if not healing.num_steps:
        return (
            f"The {healing.seconds:,.0f} s that were left for healing did not suffice for one step, so the weights are "
            "as they were before it. Give it more time.",
        )
    return ("Healing made the held-out text no better, so the weights are as they were before it.",)


_OF_THE_WEIGHTS = frozenset({"model", "path", "verification", "measurements", "retention", "samples", "healing"})
"""Fields of a cut that training makes untrue."""


def _save_verified(folder: Path, dense: Loaded, healed: Loaded, record: RunRecord, timed: Timed) -> RunRecord:
    """Saves the healed model and proves it: saved = in memory, and the cut it came from = the bypassed original."""
    with timed("Saving the smaller model"):
        save_model(healed, folder)
    plan = record.cuts[0].plan
    with timed("Verifying it"):
        proof = verify(str(folder), healed, dense, plan, probe_batch(healed), raw=cut(dense, plan))
    first = record.cuts[0].model_copy(update={"path": ".", "verification": proof})
    seconds = {**record.seconds, **timed.seconds}
    return record.model_copy(update={"cuts": (first, *record.cuts[1:]), "seconds": seconds})
