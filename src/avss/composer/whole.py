"""`avss.run`: the whole path."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from avss.composer.asking import Asking
from avss.composer.choosing import choose, with_pinned
from avss.composer.clock import Clock
from avss.composer.evaluating import (
    choose_tasks,
    continuations,
    evaluate_all,
    target_warnings,
    with_measurements,
    wreck_warnings,
)
from avss.composer.healing import checkpoints_beside, forget, healing_warnings, training_data
from avss.composer.inputs import calibration, load, model_settings
from avss.composer.inspection import refuse_uncuttable
from avss.composer.provenance import versions as library_versions
from avss.composer.pruning import describe_cut, repair, save_verified
from avss.composer.records import begin_record, write_record
from avss.composer.scores import score_loaded
from avss.config import (
    Budget,
    DataConfig,
    HealConfig,
    PlanConfig,
    RunConfig,
    TaskConfig,
    as_given,
    check_rewriting,
    check_short,
    refuse_unread,
    seeded,
)
from avss.criteria import CRITERIA, AbstractCriterion, find_criteria
from avss.cut import cut
from avss.data.augment import check_forms
from avss.data.batches import Batches
from avss.data.images import holds_images
from avss.data.sources import read_texts
from avss.errors import ConfigError, DegenerateStatisticError
from avss.evaluation import rehearse
from avss.evaluation.forms import task_forms
from avss.healing import heal as heal_cut
from avss.healing import prepare
from avss.healing.state import Checkpoint
from avss.healing.text import HealingText
from avss.models.forward import can_generate
from avss.models.load import Loaded
from avss.output import check_free, fresh_folder
from avss.plan import check_one_target, check_search, files_of, make_plan
from avss.progress import Stages, Timed, silent
from avss.record import BlockScores, Cut, Plan, RunRecord, ScoreTable
from avss.reporting.card import render_card

DEFAULT_PROMPTS = ("The three states of matter are", "Once upon a time, in a small village by the sea,")

BEST_SECONDS = 1800.0
"""Time for search, repair and healing under `best` where none is given."""

_SEARCH_TOKENS = 8192
"""Of the calibration text, that a search under `best` measures on, at most."""

_SEARCH_SHARE = 0.2
"""Share of that time that a search may take: healing brings more from the same seconds."""

_FINALISTS_FROM = 1200.0
"""Seconds in all below which no finalists are repaired: each costs what a minute or two of healing brings more with."""

_WRITTEN_UNTIL, _FINALISTS_UNTIL, _REPAIR_UNTIL = 0.28, 0.45, 0.6
"""Shares of that time after which no further prompt is written, no further finalist looked at, and no further round of
the repair begun. What the repair solves for at each cut comes always: healing would need longer for the same."""


def _key_of(config: RunConfig, loaded: Loaded, batches: Batches) -> str:
    """16 hex digits over what a run's decisions depend on: same key, same run."""
    settings = config.model_dump(mode="json", exclude={"out", "force"})
    content = {"settings": settings, "model": loaded.facts().fingerprint, "text": batches.facts.content_hash}
    return hashlib.sha256(json.dumps({**content, **library_versions()}, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _Version:
    """One state of the chosen cut: as cut, repaired, or healed."""

    model: Loaded
    told: Cut


def run(config: RunConfig, *, command: str | None = None, stages: Stages = silent) -> RunRecord:
    """The whole path: score, choose, cut, repair, heal, verify, evaluate, report. Writes `config.out`.

    Every stage that changes the weights (repair, healing) leaves the state before it as a cut of its own in the record,
    measured on the same items: what each stage gave can be read off.

    Args:
        config: The run.
        command: The command to note in the record.
        stages: Where progress goes.

    Returns:
        The record, as it stands in `config.out`.

    Raises:
        UserError: Anything the caller can fix, in one sentence; nothing has been written.
        VerificationError: The saved model was not what it should be; nothing has been published.
    """
    config, criteria = _checked(config)
    out = Path(config.out)
    timed = Timed(stages)
    source = config.heal and (config.heal.source or config.data.source)
    # Before anything dear: a mistake in its name shall not cost a search.
    training = read_texts(source) if source and not holds_images(source) else None
    with timed("Loading the model"):
        loaded = load(**model_settings(config.model))
        refuse_uncuttable(loaded)
        if not loaded.is_vision:
            loaded.check_reads_text("The evaluation of `avss run`")
    if source and (training is None or loaded.is_vision):
        training = training_data(source, loaded)
    tasks = choose_tasks(config.tasks, loaded, config.task_settings.model_dump())
    config, said = _with_forms(config, tasks, loaded.head)
    _check_written(config)
    config = _with_shared_settings(config)
    # What healing would not read is refused before a search is paid for, too.
    healing_text = prepare(loaded, training, config.heal) if training is not None and config.heal is not None else None
    batches = calibration(loaded, config.data)
    with timed("Reading the tasks"):
        rehearse(loaded, [*tasks, config.plan.retention_task, config.search.task])
    share = config.plan.share(len(loaded.stack))
    table, collected = score_loaded(
        loaded,
        batches,
        criteria,
        config.first_token,
        share,
        timed,
        protect=config.plan.protect,
        chooses=config.plan.takes_the_lowest,
    )
    for name in config.compare:
        _scores_by(name, table)  # refused before a search is paid for
    notes = checkpoints_beside(out) / f"{_key_of(config, loaded, batches)}.json"
    clock = Clock(config.time or BEST_SECONDS, counts=config.quality == "best", notes=notes)
    asking = None
    if config.compensate == "auto":
        written = notes.with_suffix(".prompts.json")
        in_time, heals = clock.in_time(_WRITTEN_UNTIL), config.heal is not None
        asking = Asking(
            loaded, batches, config.data.written, timed, in_time, written, heals=heals, short=config.data.short
        )
        if not heals:  # healing has read its text already, and refused what it could not read
            asking.check_short()
    chosen = choose(
        loaded,
        config.plan,
        config.search,
        timed,
        batches=batches,
        table=table,
        task=next((task for task in tasks if task.kind != "speed"), None),
        repairs=config.compensate != "none",
        first_token=config.first_token,
        may_go_on=clock.until(_FINALISTS_UNTIL),
        prompts=tuple if asking is None else asking.prompts,
        command=command or "avss.run(...)",
    )
    same_size = config.plan.sized(len(chosen.plan.removed)).model_copy(update={"select": "scores", "from_search": None})
    others = [_plan_by(name, same_size, table, loaded) for name in config.compare]
    # The criterion that chose needs no comparison with itself; in rounds it may have chosen other blocks.
    others = [plan for plan in others if (plan.method, plan.removed) != (chosen.plan.method, chosen.plan.removed)]
    raw = cut(loaded, chosen.plan)
    rivals = [cut(loaded, plan) for plan in others]  # what cannot be cut is refused before the hours of healing
    versions, checkpoint = _versions(loaded, raw, chosen.plan, batches, asking, healing_text, config, timed, clock)
    smaller = [*(version.model for version in versions), *rivals]
    told = (describe_cut(loaded, model, plan) for model, plan in zip(rivals, others, strict=True))
    cuts = (*(version.told for version in versions), *told)
    with fresh_folder(out, force=config.force) as folder:
        record = begin_record(loaded, command or "avss.run(...)", timed, table).model_copy(
            update={"cuts": cuts, "search": chosen.search, "settings": config.model_dump(mode="json")}
        )
        (folder / "model").mkdir()
        record = save_verified(folder / "model", loaded, smaller[0], record, timed, path="model", raw=raw)
        record = _measured(record, config, [loaded, *smaller], tasks, timed)
        warnings = (*table.warnings, *chosen.warnings, *said, *healing_warnings(record.cuts[0].healing))
        warnings += (*target_warnings(config.plan, record.cuts[0]), *wreck_warnings(record.cuts))
        record = record.model_copy(update={"warnings": warnings, "seconds": timed.seconds})
        collected.save(folder / "statistics.safetensors")
        (folder / "model" / "README.md").write_text(render_card(record, record.cuts[0]), encoding="utf-8")
        (folder / "model" / "record.json").write_text(record.to_json(), encoding="utf-8")
        with timed("Drawing the report"):
            write_record(record, folder)
    clock.forget()
    notes.with_suffix(".prompts.json").unlink(missing_ok=True)
    forget(checkpoint)
    with contextlib.suppress(OSError):  # another unfinished run of this name keeps its state
        notes.parent.rmdir()
    return record


def _checked(config: RunConfig) -> tuple[RunConfig, tuple[AbstractCriterion, ...]]:
    """The run as it will be, and the criteria to score by.

    Raises:
        UserError: It asks for what cannot be had, or for two things at once, or writes where something is.
    """
    asked, config = config, _at_its_best(config)
    repairs = config.compensate != "none" or config.heal is not None
    given = {name: getattr(config.data, name) for name in ("augment", "forms", "written", "short")}
    check_rewriting(given, repairs=repairs)
    if config.heal is None:
        check_short(config.data.short, config.compensate)
    check_one_target(config.plan)
    check_search(asked.search, config.plan, repairs=config.compensate != "none")
    if config.quality == "plain":
        refuse_unread({"time": config.time}, "`--quality best`, which was not asked for", "`--quality best`")
    screens = (config.search.screen,) if config.search.screen != "damage" else ()
    if config.compare:
        compared = tuple(one.name for one in find_criteria(config.compare))
        config = config.model_copy(update={"compare": compared})
    if any(not prompt.strip() for prompt in config.prompts):
        raise ConfigError("A prompt (`--prompt`) is blank. Give some words for the models to continue.")
    names = dict.fromkeys((*config.criteria, config.plan.criterion, *config.compare, *screens))
    criteria = find_criteria([name for name in names if name != "explicit"])
    read = [config.model.source, config.data.source, *files_of(config.plan, config.search)]
    read += [
        config.heal and config.heal.source,
        *(name for task in config.tasks for name in (task.data, task.shots_data)),
    ]
    check_free(Path(config.out), force=config.force, sources=read)
    return config, criteria


def _measured(
    record: RunRecord, config: RunConfig, models: Sequence[Loaded], tasks: Sequence[TaskConfig], timed: Timed
) -> RunRecord:
    """The record with the results and the samples of its models, the dense one first and then one for each cut."""
    results = evaluate_all(models, tasks, timed)
    prompts = config.prompts or (DEFAULT_PROMPTS if can_generate(models[0].head) else ())
    with timed("Writing samples"):
        samples = [continuations(model, prompts) for model in models]
    cuts = tuple(one.model_copy(update={"samples": texts}) for one, texts in zip(record.cuts, samples[1:], strict=True))
    return record.model_copy(
        update={
            "dense": tuple(m for result in results for m in result[0].measurements),
            "cuts": with_measurements(cuts, results),
            "prompts": prompts if samples[0] else (),
            "samples": samples[0],
        }
    )


def _at_its_best(config: RunConfig) -> RunConfig:
    """What `quality = best` stands for, under the settings given; the text's seed is that of every draw without one."""
    config = config.model_copy(
        update={
            "search": seeded(config.search, config.data.seed),
            "heal": None if config.heal is None else seeded(config.heal, config.data.seed),
        }
    )
    if config.quality == "plain":
        return config
    # Who names a way of choosing has chosen it.
    searches = not {"select", "blocks", "from_search", "score_rounds", "contiguous", "rule"} & set(
        as_given(config.plan)
    )
    plan = config.plan.model_copy(update={"select": "greedy"}) if searches else config.plan
    search = config.search
    if search.seconds is None and search.max_passes is None:
        search = search.model_copy(update={"seconds": _SEARCH_SHARE * (config.time or BEST_SECONDS)})
    if (config.time or BEST_SECONDS) < _FINALISTS_FROM and "finalists" not in as_given(search):
        search = search.model_copy(update={"finalists": 1})
    if search.max_tokens is None:
        search = search.model_copy(update={"max_tokens": _SEARCH_TOKENS})
    heal = config.heal or HealConfig(seed=config.data.seed)
    repair = config.compensate if "compensate" in config.model_fields_set else "auto"
    return config.model_copy(update={"plan": plan, "search": search, "compensate": repair, "heal": heal})


def _with_forms(config: RunConfig, tasks: Sequence[TaskConfig], head: str) -> tuple[RunConfig, tuple[str, ...]]:
    """The prompts that repair and healing read: those of the tasks, where no others are named; and what is to be said.

    Raises:
        ConfigError: Forms are named, and the model does not continue text.
    """
    data, heal = config.data, config.heal
    check_forms((*(data.forms or ()), *((heal.forms or ()) if heal is not None else ())), head)
    repairs, heals = config.compensate != "none", heal is not None and heal.forms is None
    if head != "causal" or data.forms is not None or not (repairs or heals):
        return config, ()
    forms, said = task_forms(tasks)
    # Texts a row have no room for prompts; healing reads windows whatever the layout.
    found: dict[str, object] = {"data": data.model_copy(update={"forms": () if data.layout == "padded" else forms})}
    if heal is not None and heals:
        found["heal"] = heal.model_copy(update={"forms": forms})
    return config.model_copy(update=found), said


def _with_shared_settings(config: RunConfig) -> RunConfig:
    """The run with what healing reads as the repair does, where its own settings say nothing."""
    data, heal = config.data, config.heal
    if heal is None:
        return config
    forms = data.forms if heal.forms is None else heal.forms
    found = {
        "augment": data.augment,
        "forms": forms,
        "written": data.written if forms else None,
        "short": data.short,
    }
    usual = {name: value for name, value in found.items() if getattr(heal, name) is None and value is not None}
    return config.model_copy(update={"heal": heal.model_copy(update=usual)})


def _check_written(config: RunConfig) -> None:
    """Refuses prompts to write that nothing would read.

    Raises:
        ConfigError: There are such.
    """
    heal = config.heal
    heals = heal is not None and (config.data.forms if heal.forms is None else heal.forms)
    repairs = config.compensate == "auto" and config.data.forms
    if not (heals or repairs):
        what = "the forms of prompts, and no repair by `auto` and no healing has any"
        refuse_unread({"written": config.data.written}, what, "`--form`")


def _versions(
    loaded: Loaded,
    raw: Loaded,
    plan: Plan,
    batches: Batches,
    asking: Asking | None,
    healing_text: HealingText | None,
    config: RunConfig,
    timed: Timed,
    clock: "Clock",
) -> tuple[list[_Version], Checkpoint | None]:
    """The states of the chosen cut, the last one first: it is the one that is saved; and healing's own state."""
    checkpoint = None
    versions = [_Version(raw, describe_cut(loaded, raw, plan))]
    if config.compensate != "none":
        in_time = clock.until(_REPAIR_UNTIL)
        repaired, story = repair(loaded, raw, plan, batches, config.compensate, timed, in_time, asking)
        told = describe_cut(loaded, repaired, plan).model_copy(update={"compensation": story})
        if story.applied:
            versions.insert(0, _Version(repaired, told))
        else:
            versions = [_Version(raw, told)]
    if config.heal is not None and healing_text is not None:
        heal = config.heal
        clock.write_down()  # healing is what takes long, and is looked for again by the model that it begins with
        takes_the_rest = config.quality == "best" and "budget" not in heal.model_fields_set
        if takes_the_rest:
            heal = heal.model_copy(update={"budget": Budget(seconds=max(clock.left, 1.0))})
        with timed("Healing") as advance:
            healed, healing, checkpoint = heal_cut(
                loaded,
                versions[0].model,
                plan,
                healing_text,
                heal,
                rows=asking.rows if asking is not None and _asks_the_same(heal, config.data) else None,
                budget_name=f"the rest of {clock.seconds:g} seconds" if takes_the_rest else None,
                checkpoint_folder=checkpoints_beside(Path(config.out)),
                report=lambda done, total, note: advance(done, total, note),
            )
        told = describe_cut(loaded, healed, plan).model_copy(
            update={"compensation": versions[0].told.compensation, "healing": healing}
        )
        versions.insert(0, _Version(healed, told))
    return versions, checkpoint


def _asks_the_same(heal: HealConfig, data: DataConfig) -> bool:
    """Whether healing reads the prompts of the repair, and what was written for these is written for it too."""
    return heal.forms == data.forms and heal.written == data.written


def _scores_by(criterion: str, table: ScoreTable) -> BlockScores:
    try:
        return table[criterion]
    except KeyError as error:
        problem = next((text for text in table.warnings if f"`{criterion}`" in text), f"`{criterion}` was not scored.")
        raise DegenerateStatisticError(problem.removeprefix("Left out: ")) from error


def _plan_by(criterion: str, config: PlanConfig, table: ScoreTable, loaded: Loaded) -> Plan:
    scores = _scores_by(criterion, table)
    protects_ends = CRITERIA[criterion].protects_ends
    guarded = with_pinned(config, loaded, protects_ends=protects_ends)
    return make_plan(scores, guarded, protects_ends=protects_ends)
