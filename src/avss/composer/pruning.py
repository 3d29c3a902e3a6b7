"""`avss.prune`: choose, cut, save, prove."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from avss.compensation import compensate as compensate_cut
from avss.compensation import split
from avss.composer.asking import Asking
from avss.composer.choosing import choose
from avss.composer.disk import (
    block_sizes,
    find_folder,
    fits_memory,
    memory_at_rest,
    prune_on_disk,
    scores_of,
    size_text,
    wants_scores,
)
from avss.composer.gguf_pruning import prune_gguf
from avss.composer.inputs import AnyModel, calibration, load, probe_batch
from avss.composer.inspection import example_plan, refuse_uncuttable
from avss.composer.records import begin_record
from avss.composer.scores import score_loaded
from avss.config import (
    DataConfig,
    PlanConfig,
    SearchConfig,
    as_given,
    build,
    check_compensation,
    check_rewriting,
    check_short,
    check_written,
    parse_bytes,
    seeded,
)
from avss.criteria import find_criteria
from avss.cut import cut
from avss.data.batches import Batches
from avss.errors import ConfigError, unknown_name
from avss.evaluation import rehearse
from avss.models.load import Loaded, save_model
from avss.models.outline import EmptyModel
from avss.models.rewrite import config_changes
from avss.models.shards import find_stack_path, indexed, read_checkpoint
from avss.models.verify import verify
from avss.output import check_free, fresh_folder
from avss.plan import Room, check_one_target, check_plain, check_search, files_of
from avss.progress import MayGoOn, Stages, Timed, always, silent
from avss.record import Compensation, Cut, Plan, RunRecord, ScoreTable
from avss.reporting.card import render_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_LOADING = ("device", "dtype", "head", "revision", "trust_remote_code")


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A smaller model and its story.

    Attributes:
        model: The smaller model. It shares the kept weights with the model it was cut from, but for repaired ones. None
            where the cut went from file to file (on disk, or GGUF): load it from `out`.
        tokenizer: The tokenizer, if there is one.
        plan: The blocks removed.
        record: Everything known about it.
        loaded: The same as avss holds it: with the dtype it is stored in and the files that belong to it.
    """

    model: "PreTrainedModel | None"
    tokenizer: "PreTrainedTokenizerBase | None"
    plan: Plan
    record: RunRecord
    loaded: Loaded | None = dataclasses.field(default=None, repr=False)

    def _repr_html_(self) -> str:
        return self.record._repr_html_()


def prune(
    model: AnyModel,
    *,
    criterion: str = "block-influence",
    fraction: float | None = None,
    count: int | None = None,
    blocks: str | Iterable[int] | None = None,
    contiguous: bool = False,
    rule: str = "count",
    protect: str = "auto",
    select: str = "scores",
    plan: Mapping[str, Any] | None = None,
    search: SearchConfig | Mapping[str, Any] | None = None,
    compensate: str = "none",
    data: DataConfig | str | Sequence[str] = "builtin",
    out: str | Path | None = None,
    force: bool = False,
    scores: str | Path | None = None,
    on_disk: bool | None = None,
    file_format: Literal["safetensors", "gguf"] = "safetensors",
    max_memory: str | int | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stack: str = "auto",
    loading: Mapping[str, Any] | None = None,
    command: str | None = None,
    stages: Stages = silent,
    **settings: Any,
) -> Pruned:
    """Removes blocks, and saves and verifies the smaller model where `out` is given.

    Args:
        model: Hub id, folder, GGUF file, or a model object (left as it was).
        criterion: Chooses the blocks.
        fraction: Share of blocks to remove, rounded half up; or
        count: their number; or
        blocks: the blocks themselves, `"3,12-15"` or indices.
        contiguous: Whether they must be neighbours.
        rule: What `fraction` is a share of: the `count` of blocks, or the `mass`, the sum of all scores.
        protect: Blocks that stay: `auto`, `none`, or a list.
        select: Who chooses: `scores`, or a search by measured damage: `greedy`, `window`, `evolution`.
        plan: More of `avss.config.PlanConfig`: `max_params`, `speedup`, `min_retention`, `from_search`, ...
        search: How hard a search looks: a `avss.config.SearchConfig`, or settings of one.
        compensate: Repair without training: `auto`, `refit`, `linear`, `cosine`, `scale`, `sweep`, `steer` or `none`
            (see `avss.compensation`). What does not help on held-out text is thrown away.
        data: The calibration text, to score on and to repair with; images for a stack that reads those, as for
            `avss.score`.
        out: Folder for the checkpoint; it appears whole and verified, or not at all.
        force: Whether a folder that avss wrote may be replaced.
        scores: Record of an earlier `avss.score` to choose by, instead of scoring again.
        on_disk: Whether to cut from file to file, without the model in memory. By default, where it does not fit.
        file_format: `gguf` cuts a GGUF file into a GGUF file, its quantised weights as they are. `safetensors` writes
            an ordinary checkpoint, whatever the model came from.
        max_memory: Memory that may be used, e.g. `"16GB"`; by default what is free.
        tokenizer: For a model object.
        stack: Which stack of blocks: `auto`, or its name or path.
        loading: For a model named: `head`, `revision`, `trust_remote_code`, `device`, and in memory `dtype`.
        command: The command to note in the record.
        stages: Where progress goes.
        **settings: Of the text: `samples`, `seq_len`, `batch_size`, `seed`, `layout`, `augment`, `forms`, `written`,
            `short`.

    Returns:
        The smaller model with its tokenizer, and the record of how it came to be. After a cut from file to file the
        model is not in memory.

    Raises:
        UserError: Anything the caller can fix, in one sentence.
        VerificationError: The saved model was not what it should be; it has been withdrawn.
    """
    named = blocks if isinstance(blocks, str) or blocks is None else ",".join(map(str, blocks))
    config = build(
        PlanConfig,
        {
            "criterion": criterion,
            "fraction": fraction,
            "count": count,
            "blocks": named,
            "contiguous": contiguous,
            "rule": rule,
            "protect": protect,
            "select": select,
            **(plan or {}),
        },
    )
    hard = search if isinstance(search, SearchConfig) else build(SearchConfig, dict(search or {}))
    check_one_target(config)
    check_search(hard, config, repairs=compensate != "none")
    seed = data.seed if isinstance(data, DataConfig) else int(settings.get("seed", 0))
    hard = seeded(hard, seed)
    check_compensation(compensate)
    if file_format not in ("safetensors", "gguf"):
        raise ConfigError(unknown_name("file_format", file_format, ["safetensors", "gguf"]))
    build(DataConfig, settings)  # a name that nothing reads is a mistake, whether or not text is needed
    given = _given(data, settings)
    check_rewriting(given, repairs=compensate != "none")
    check_written(given["written"], given["forms"], compensate)
    check_short(given["short"], compensate)
    (wanted,) = find_criteria([config.criterion])
    if hard.screen != "damage":
        find_criteria([hard.screen])
    command = command or f"avss.prune({model if isinstance(model, str | Path) else 'model'!r}, ...)"
    if out is not None:
        check_free(Path(out), force=force, sources=(model, data, scores, *files_of(config, hard)))
    allowed = parse_bytes(max_memory) if isinstance(max_memory, str) else max_memory
    from_file = isinstance(model, str | Path)
    loading = dict(loading or {})
    strange = [name for name in loading if name not in _LOADING]
    if strange:
        raise ConfigError(unknown_name("setting of loading", strange[0], _LOADING))
    reason = None
    if from_file and on_disk is None and out is not None:
        dtype = str(loading.get("dtype", "auto"))
        reason = fits_memory(str(model), max_memory=allowed, dtype=dtype, revision=loading.get("revision"))
    if on_disk or reason or file_format == "gguf":
        check_plain(config, stack=stack)
        check_compensation(compensate, in_memory=False)
        if not from_file or out is None:
            raise ConfigError("A cut from file to file needs the name of a model, not an object, and a folder `out`.")
        if loading.pop("dtype", "auto") != "auto":
            raise ConfigError("A cut from file to file keeps every weight as it is stored. Leave out `dtype`.")
        common: dict[str, Any] = {"out": Path(out), "force": force, "scores": scores, "max_memory": allowed}
        common |= {"command": command, "stages": stages}
        if file_format == "gguf":
            loading.pop("trust_remote_code", None)  # a GGUF file brings no code
            record = prune_gguf(model, config, data=data, **common, **loading, **settings)
        else:
            common["stages"] = Timed(stages)
            if wants_scores(config, scores):
                common["scores"] = score_on_disk(
                    str(model),
                    config,
                    data=data,
                    settings=settings,
                    loading=loading,
                    max_memory=allowed,
                    stages=common["stages"],
                )
            record = prune_on_disk(str(model), config, seed=seed, note=reason, **loading, **common)
        return Pruned(model=None, tokenizer=None, plan=record.cuts[0].plan, record=record)
    timed = Timed(stages)
    with timed("Loading the model") if not isinstance(model, Loaded) else contextlib.nullcontext():
        loaded = load(model, tokenizer, stack=stack, **loading)
        refuse_uncuttable(loaded)
    _check_reads_text(loaded, config, hard, compensate)
    table, batches = None, None
    if compensate != "none" or (config.blocks is None and scores is None and config.from_search is None):
        batches = calibration(loaded, data, **settings)
    rehearse(loaded, [config.retention_task, hard.task])
    if scores is not None:
        table = ScoreTable(scores=(scores_of(scores, config.criterion).of(loaded.facts()),))
    elif batches is not None and config.blocks is None and config.from_search is None and config.select == "scores":
        table, _ = score_loaded(
            loaded,
            batches,
            (wanted,),
            True,
            config.share(len(loaded.stack)),
            timed,
            protect=config.protect,
            chooses=config.takes_the_lowest,
        )
    asking = None
    if batches is not None and compensate == "auto":
        asking = Asking(loaded, batches, given["written"], timed, short=given["short"])
        asking.check_short()
    chosen = choose(
        loaded,
        config,
        hard,
        timed,
        batches=batches,
        table=table,
        repairs=compensate != "none",
        prompts=tuple if asking is None else asking.prompts,
        command=command,
    )
    raw = cut(loaded, chosen.plan)
    smaller, story = raw, None
    if batches is not None and compensate != "none":
        smaller, story = repair(loaded, raw, chosen.plan, batches, compensate, timed, asking=asking)
    one = describe_cut(loaded, smaller, chosen.plan).model_copy(update={"compensation": story})
    record = begin_record(loaded, command, timed, table)
    record = record.model_copy(
        update={
            "cuts": (one,),
            **({"data": batches.facts} if batches is not None else {}),
            "search": chosen.search,
            "warnings": (*record.warnings, *chosen.warnings),
            "settings": config.model_dump(mode="json")
            | {"search": hard.model_dump(mode="json"), "compensate": compensate},
        }
    )
    if out is not None:
        with fresh_folder(Path(out), force=force) as folder:
            record = save_verified(folder, loaded, smaller, record, timed, raw=raw)
            (folder / "README.md").write_text(render_card(record, record.cuts[0]), encoding="utf-8")
            (folder / "record.json").write_text(record.to_json(), encoding="utf-8")
    return Pruned(model=smaller.model, tokenizer=smaller.tokenizer, plan=chosen.plan, record=record, loaded=smaller)


def score_on_disk(
    model: str,
    plan: PlanConfig,
    *,
    data: DataConfig | str | Sequence[str],
    settings: Mapping[str, Any],
    loading: Mapping[str, Any],
    max_memory: int | None,
    stages: Stages,
) -> ScoreTable:
    """The scores that a cut on disk chooses by, a block at a time.

    Args:
        model: Folder or hub id.
        plan: Names the criterion.
        data: The calibration text.
        settings: Of the text.
        loading: `head`, `revision`, `trust_remote_code`, `device` to compute on.
        max_memory: Bytes that may be used; by default what is free.
        stages: Where progress goes.

    Raises:
        ConfigError: The criterion needs gradients, or not even a block at a time fits.
        InvalidPlanError: The size that is the target cannot be reached, or is none.
        UnsupportedArchitectureError: The model cannot be cut from file to file, whatever its scores.
    """
    (criterion,) = find_criteria([plan.criterion])
    if any(need.probe == "backward" for need in criterion.needs):
        raise ConfigError(
            f"`{criterion.name}` needs gradients, and so the whole model in memory; a cut on disk does not load it. "
            "Choose by another criterion, name the blocks (`--blocks`), or give scores made where it fits (`--scores`)."
        )
    options = {name: value for name, value in loading.items() if name in ("head", "trust_remote_code")}
    place = str(loading.get("device", "auto"))
    if place.partition(":")[0] != "disk":
        place = "disk" if place == "auto" else f"disk:{place}"
    with indexed(read_checkpoint(find_folder(model, loading.get("revision")))) as folder:
        empty = EmptyModel(str(folder), **options)
        refuse_uncuttable(empty.loaded)
        empty.check_movable(example_plan(empty.loaded, removed=0))
        checkpoint, num_blocks = read_checkpoint(folder), len(empty.loaded.stack)
        path = find_stack_path(list(checkpoint.tensors), num_blocks, empty.loaded.stack.path)
        needed, room = memory_at_rest(checkpoint, path, num_blocks), max_memory or psutil.virtual_memory().available
        if needed > room:
            raise ConfigError(
                f"Scoring it a block at a time takes about {size_text(needed)} and there are {size_text(room)} "
                "(`--max-memory`). Name the blocks (`--blocks`), or give scores made elsewhere (`--scores`)."
            )
        values, sizes = block_sizes(checkpoint, path, num_blocks)
        aim = Room.of(plan, (checkpoint.num_values, values), (checkpoint.num_bytes, sizes))
        if aim is not None:
            aim.most(range(num_blocks))  # refuses what cannot be before it is scored
        with stages("Loading the model"):
            loaded = load(folder, **options, device=place)
        try:
            table, _ = score_loaded(
                loaded,
                calibration(loaded, data, **settings),
                (criterion,),
                True,
                plan.share(num_blocks),
                stages,
                protect=plan.protect,
                chooses=plan.takes_the_lowest,
            )
        finally:
            assert loaded.files is not None
            loaded.files.close()
    return table


def _given(data: DataConfig | str | Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was said about rewriting and prompts, in a whole `DataConfig` or beside a text; None for nothing."""
    said = as_given(data) if isinstance(data, DataConfig) else settings
    return {name: said.get(name) for name in ("augment", "forms", "written", "short")}


def _check_reads_text(loaded: Loaded, plan: PlanConfig, search: SearchConfig, compensate: str) -> None:
    """Refuses what runs the whole model for a tower that reads images within one that reads text too.

    Raises:
        ConfigError: Such a thing is asked for.
    """
    if loaded.is_vision:
        return
    asked = {
        f"`--compensate {compensate}`": compensate != "none",
        "`--speedup`": plan.speedup is not None,
        "`--min-retention`": plan.min_retention is not None,
        "`--objective accuracy`": plan.select != "scores" and search.objective == "accuracy",
    }
    for option in (option for option, is_asked in asked.items() if is_asked):
        loaded.check_reads_text(option)


def describe_cut(original: Loaded, smaller: Loaded, plan: Plan) -> Cut:
    """A cut as the record tells it, before anything is measured."""
    return Cut(plan=plan, model=smaller.facts(), changes=config_changes(original.model.config, smaller.model.config))


def repair(
    original: Loaded,
    raw: Loaded,
    plan: Plan,
    batches: Batches,
    method: str,
    timed: Timed,
    may_go_on: MayGoOn = always,
    asking: Asking | None = None,
) -> tuple[Loaded, Compensation]:
    """Repairs a cut without training, and tells how it went. The raw cut is left as it was.

    With `asking`, these sentences fill prompts of the text, some of which is read in short windows, and `auto` ends
    with a solve for their answers.
    """
    rewriting, text = batches.augmentation, batches.rewritten()
    fitted, prompts = ((), ()) if asking is None else (asking.fitted(), asking.prompts())
    with timed("Repairing the cut") as advance:
        model, story = compensate_cut(
            original,
            raw,
            plan,
            text,
            method=method,
            fitted=fitted,
            prompts=prompts,
            running=batches.sequences[: len(split(text)[0].sequences)] if prompts else (),
            on_step=advance,
            may_go_on=may_go_on,
        )
    if rewriting is not None and story.fit_tokens:
        story = story.model_copy(update={"augment": rewriting.share, "forms": rewriting.forms})
    if asking is not None and fitted and story.fit_tokens:
        story = story.model_copy(update={"short": asking.short})
    return model, story


def save_verified(
    folder: Path,
    original: Loaded,
    smaller: Loaded,
    record: RunRecord,
    timed: Timed,
    *,
    path: str = ".",
    raw: Loaded | None = None,
) -> RunRecord:
    """Saves the first cut and proves it; the record then carries the proof.

    Args:
        folder: Where to.
        original: The dense model.
        smaller: The model to save.
        record: Its first cut is the model's.
        timed: Where progress goes.
        path: The folder as the record names it.
        raw: The cut before its weights were changed, if they were: it is what must equal the bypassed original.
    """
    with timed("Saving the smaller model"):
        save_model(smaller, folder)
    with timed("Verifying it"):
        proof = verify(
            str(folder),
            smaller,
            original,
            record.cuts[0].plan,
            probe_batch(smaller),
            raw=None if raw is smaller else raw,
        )
    first = record.cuts[0].model_copy(update={"path": path, "verification": proof})
    return record.model_copy(update={"cuts": (first, *record.cuts[1:]), "seconds": timed.seconds})
