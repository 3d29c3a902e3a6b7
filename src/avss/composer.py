"""The composer: the one module that knows all stages, and the Python API.

    model + text --collect--> statistics --score--> scores --plan--> plan --cut--> model' --verify, evaluate--> record

Every function takes a model by name or as an object, and returns values that show themselves in a notebook.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

import avss
from avss.collect import collect
from avss.config import DataConfig, ModelConfig, PlanConfig, RunConfig, TaskConfig, build
from avss.criteria import CRITERIA, AbstractCriterion, find_criteria
from avss.cut import cut
from avss.data.batches import Batches, Layout, make_batches, need_tokenizer
from avss.data.sources import read_texts
from avss.errors import (
    ConfigError,
    DegenerateStatisticError,
    OutputExistsError,
    UnsupportedArchitectureError,
)
from avss.evaluation import TaskResult, evaluate_task, retention
from avss.models.forward import can_generate, generate
from avss.models.load import Loaded, adopt, load_model, save_model
from avss.models.rewrite import config_changes, rewrite_config
from avss.models.verify import verify
from avss.output import check_free, fresh_folder
from avss.plan import check_one_target, explicit_plan, make_plan
from avss.progress import Stages, Timed, silent
from avss.record import BlockScores, Cut, FieldChange, ModelFacts, Plan, RunRecord, ScoreTable
from avss.reporting.card import render_card
from avss.reporting.charts import save_figures
from avss.reporting.page import render_page
from avss.reporting.tables import scores_csv
from avss.scoring import score_blocks, score_warnings
from avss.statistics.collected import Collected

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AnyModel = Union[str, Path, "PreTrainedModel", Loaded]
"""A hub id, a folder, a GGUF file, a transformers model object, or what `load` returned."""

DEFAULT_CRITERIA = ("avss", "avss-product", "avss-update", "block-influence", "update-norm")
COSTLY, WRECKED = 1.5, 10.0
"""Perplexity ratios from which a cut is said to need repair, and to be a wreck."""

_CONTINUATION_TOKENS = 32
DEFAULT_PROMPTS = ("The three states of matter are", "Once upon a time, in a small village by the sea,")


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A smaller model and its story.

    Attributes:
        model: The smaller model. It shares the kept weights with the model it was cut from.
        tokenizer: The tokenizer, if there is one.
        plan: The blocks removed.
        record: Everything known about it.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    plan: Plan
    record: RunRecord

    def _repr_html_(self) -> str:
        return self.record._repr_html_()


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `avss` sees in a model before anything is cut.

    Attributes:
        model: The model in numbers.
        block_class: Class of the blocks.
        block_parameters: Parameters of each block.
        refusal: Why it cannot be cut; None where it can.
        example: The plan the changes are shown for.
        changes: Config fields that plan would change.
    """

    model: ModelFacts
    block_class: str
    block_parameters: tuple[int, ...]
    refusal: str | None
    example: Plan
    changes: tuple[FieldChange, ...]


def load(
    model: AnyModel, tokenizer: "PreTrainedTokenizerBase | None" = None, *, head: str = "auto", **settings: Any
) -> Loaded:
    """Loads a model by name, or wraps one that is loaded already.

    Args:
        model: Hub id, folder, GGUF file, or a model object.
        tokenizer: For a model object: its tokenizer.
        head: `auto`, or what to use it as: causal, masked, classifier, encoder, seq2seq.
        **settings: `dtype`, `device`, `revision`, `trust_remote_code`; see `avss.config.ModelConfig`.

    Raises:
        ModelLoadError: It cannot be read.
    """
    if isinstance(model, Loaded):
        return model
    if isinstance(model, torch.nn.Module):
        return adopt(model, tokenizer, head=head)
    config = build(ModelConfig, {"source": str(model), "head": head, **settings})
    return load_model(
        config.source,
        head=config.head,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def calibration(loaded: Loaded, data: DataConfig | str | Sequence[str] = "builtin", **settings: Any) -> Batches:
    """The batches a model is scored on.

    Args:
        loaded: The model.
        data: A source (`avss.data.sources`), a list of texts, or a whole `DataConfig`.
        **settings: `samples`, `seq_len`, `batch_size`, `seed`, `layout`.

    Raises:
        DataError: The text cannot be read or is too short.
    """
    if isinstance(data, DataConfig):
        config, source = data, data.source
    else:
        is_name = isinstance(data, str | Path)
        config = build(DataConfig, {**({"source": str(data)} if is_name else {}), **settings})
        source = config.source if is_name else data
    layout: Layout = config.layout if config.layout != "auto" else "packed" if loaded.head == "causal" else "padded"
    tokenizer = need_tokenizer(loaded.tokenizer, loaded.source)
    return make_batches(
        read_texts(source),
        tokenizer,
        layout=layout,
        samples=config.samples,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        max_len=loaded.max_len,
    )


def score(
    model: AnyModel,
    data: DataConfig | str | Sequence[str] = "builtin",
    *,
    criteria: str | Sequence[str] = DEFAULT_CRITERIA,
    first_token: bool = True,
    fraction: float = 0.25,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stages: Stages = silent,
    **settings: Any,
) -> ScoreTable:
    """Scores every block by every criterion, from one forward pass.

    Args:
        model: Hub id, folder, GGUF file, or a model object.
        data: The calibration text: a source, a list of texts, or a `DataConfig`.
        criteria: Names from `avss.CRITERIA`, or `all`.
        first_token: Whether the first token of each sequence counts.
        fraction: Share of blocks whose choice the warnings speak of.
        tokenizer: For a model object.
        stages: Where progress goes.
        **settings: `samples`, `seq_len`, `batch_size`, `seed`, `layout`.

    Returns:
        A table that shows itself in a notebook; `table["block-influence"].values` are the numbers.

    Raises:
        UserError: Anything the caller can fix, in one sentence.
    """
    wanted = find_criteria(criteria if isinstance(criteria, str) else list(criteria))
    loaded = load(model, tokenizer)
    return _score(loaded, calibration(loaded, data, **settings), wanted, first_token, fraction, stages)[0]


def _score(
    loaded: Loaded,
    batches: Batches,
    criteria: tuple[AbstractCriterion, ...],
    first_token: bool,
    fraction: float,
    stages: Stages,
) -> tuple[ScoreTable, Collected]:
    with stages("Scoring blocks") as advance:
        done = 0

        def on_batch() -> None:
            nonlocal done
            done += 1
            advance(done, len(batches))

        advance(0, len(batches))
        needs = [need for criterion in criteria for need in criterion.needs]
        collected = collect(loaded, batches, needs, on_batch=on_batch)
    scores, problems = _defined(collected, criteria, first_token=first_token, seed=batches.facts.seed)
    count = max(1, round(fraction * len(loaded.stack)))
    warnings = (*problems, *score_warnings(scores, collected, count=count))
    return ScoreTable(scores=scores, model=loaded.facts(), data=batches.facts, warnings=warnings), collected


def _defined(
    collected: Collected, criteria: tuple[AbstractCriterion, ...], *, first_token: bool, seed: int
) -> tuple[tuple[BlockScores, ...], tuple[str, ...]]:
    """The scores that exist, and a sentence for each that does not; an error if none does."""
    scores: list[BlockScores] = []
    problems: list[DegenerateStatisticError] = []
    for criterion in criteria:
        try:
            scores += score_blocks(collected, (criterion,), first_token=first_token, seed=seed)
        except DegenerateStatisticError as error:
            problems.append(error)
    if not scores:
        raise problems[0]
    return tuple(scores), tuple(f"Left out: {problem}" for problem in problems)


def prune(
    model: AnyModel,
    *,
    criterion: str = "block-influence",
    fraction: float | None = None,
    count: int | None = None,
    blocks: str | Iterable[int] | None = None,
    contiguous: bool = False,
    protect: str = "auto",
    data: DataConfig | str | Sequence[str] = "builtin",
    out: str | Path | None = None,
    force: bool = False,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
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
        protect: Blocks that stay: `auto`, `none`, or a list.
        data: The calibration text.
        out: Folder for the checkpoint; it appears whole and verified, or not at all.
        force: Whether a folder that avss wrote may be replaced.
        tokenizer: For a model object.
        command: The command to note in the record.
        stages: Where progress goes.
        **settings: `samples`, `seq_len`, `batch_size`, `seed`, `layout`.

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
            "protect": protect,
        },
    )
    check_one_target(config)
    (wanted,) = find_criteria([criterion])
    if out is not None:
        check_free(Path(out), force=force)
    timed = Timed(stages)
    with timed("Loading the model") if not isinstance(model, Loaded) else contextlib.nullcontext():
        loaded = load(model, tokenizer)
        rewrite_config(loaded.model.config, loaded.stack, _example_plan(len(loaded.stack)))  # refuse before scoring
    table = None
    if config.blocks is not None:
        plan = explicit_plan(config, len(loaded.stack))
    else:
        batches = calibration(loaded, data, **settings)
        table, _ = _score(loaded, batches, (wanted,), True, fraction or 0.25, timed)
        plan = make_plan(table.scores[0], config, protects_ends=wanted.protects_ends)
    smaller = cut(loaded, plan)
    one = _describe_cut(loaded, smaller, plan)
    record = _record(loaded, command or f"avss.prune({loaded.source!r}, ...)", timed, table).model_copy(
        update={"cuts": (one,), "settings": config.model_dump(mode="json")}
    )
    if out is not None:
        with fresh_folder(Path(out), force=force) as folder:
            record = _save_verified(folder, loaded, smaller, record, timed)
            (folder / "README.md").write_text(render_card(record, record.cuts[0]), encoding="utf-8")
            (folder / "record.json").write_text(record.to_json(), encoding="utf-8")
    return Pruned(model=smaller.model, tokenizer=smaller.tokenizer, plan=plan, record=record)


def evaluate(
    model: AnyModel,
    tasks: Sequence[TaskConfig | str] = (),
    *,
    baseline: AnyModel | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    loading: dict[str, Any] | None = None,
    command: str | None = None,
    stages: Stages = silent,
    **settings: Any,
) -> RunRecord:
    """Measures a model, beside its baseline if there is one, in one run on the same items.

    Args:
        model: Hub id, folder, GGUF file, or a model object.
        tasks: `TaskConfig`s, or strings such as `"choice=piqa.jsonl"`; by default what suits the model's head.
        baseline: The dense model.
        tokenizer: For model objects.
        loading: For models named: `head`, `dtype`, `device`, `revision` (the model's), `trust_remote_code`.
        command: The command to note in the record.
        stages: Where progress goes.
        **settings: For every task given as a string: `limit`, `seq_len`, ...; see `avss.config.TaskConfig`.

    Returns:
        A record: `dense` holds the baseline's measurements and `cuts[0]` the model's; without a baseline, `dense`
        holds the model's own.
    """
    timed = Timed(stages)
    with timed("Loading the model"):
        loaded = load(model, tokenizer, **(loading or {}))
    models = [loaded]
    if baseline is not None:
        same = {**(loading or {}), "head": loaded.head, "revision": None}
        with timed("Loading the baseline"):
            models.insert(0, load(baseline, tokenizer, **same))
    dense = models[0]
    wanted = _tasks(tasks, dense, settings)
    results = _evaluate_all(models, wanted, timed)
    cuts: tuple[Cut, ...] = ()
    if baseline is not None:
        plan = _plan_of(model, loaded, dense)
        cuts = _measured((_describe_cut(dense, loaded, plan),), results)
    record = _record(dense, command or f"avss.evaluate({loaded.source!r}, ...)", timed, None)
    return record.model_copy(
        update={
            "dense": tuple(m for result in results for m in result[0].measurements),
            "cuts": cuts,
            "warnings": _wreck_warnings(cuts),
            "settings": {"tasks": [task.model_dump(mode="json") for task in wanted]},
        }
    )


def inspect(model: AnyModel, *, tokenizer: "PreTrainedTokenizerBase | None" = None, **settings: Any) -> Inspection:
    """The block stack found in a model, and every config field that a cut would change.

    Raises:
        ModelLoadError: The model cannot be read.
        UnsupportedArchitectureError: No block stack was found; the message lists what was.
    """
    loaded = load(model, tokenizer, **settings)
    stack = loaded.stack
    plan = _example_plan(len(stack))
    refusal, changes = None, ()
    try:
        changes = config_changes(loaded.model.config, rewrite_config(loaded.model.config, stack, plan))
    except UnsupportedArchitectureError as error:
        refusal = str(error)
    return Inspection(
        model=loaded.facts(),
        block_class=stack.block_class,
        block_parameters=tuple(sum(p.numel() for p in block.parameters()) for block in stack.blocks),
        refusal=refusal,
        example=plan,
        changes=changes,
    )


def run(config: RunConfig, *, command: str | None = None, stages: Stages = silent) -> RunRecord:
    """The whole path: score, choose, cut, verify, evaluate before and after, report. Writes `config.out`.

    Args:
        config: The run.
        command: The command to note in the record.
        stages: Where progress goes.

    Raises:
        UserError: Anything the caller can fix, in one sentence; nothing has been written.
        VerificationError: The saved model was not what it should be; nothing has been published.
    """
    out = Path(config.out)
    check_one_target(config.plan)
    names = dict.fromkeys((*config.criteria, config.plan.criterion, *config.compare))
    criteria = find_criteria([name for name in names if name != "explicit"])
    check_free(out, force=config.force)
    timed = Timed(stages)
    with timed("Loading the model"):
        loaded = load(**_model_settings(config.model))
        rewrite_config(loaded.model.config, loaded.stack, _example_plan(len(loaded.stack)))
    tasks = _tasks(config.tasks, loaded, {})
    batches = calibration(loaded, config.data)
    fraction = config.plan.fraction or (config.plan.count or 1) / len(loaded.stack)
    table, collected = _score(loaded, batches, criteria, config.first_token, fraction, timed)
    plans = _plans(config, table, len(loaded.stack))
    smaller = [cut(loaded, plan) for plan in plans]
    cuts = tuple(_describe_cut(loaded, model, plan) for model, plan in zip(smaller, plans, strict=True))
    with fresh_folder(out, force=config.force) as folder:
        record = _record(loaded, command or "avss.run(...)", timed, table).model_copy(
            update={"cuts": cuts, "settings": config.model_dump(mode="json")}
        )
        (folder / "model").mkdir()
        record = _save_verified(folder / "model", loaded, smaller[0], record, timed, path="model")
        results = _evaluate_all([loaded, *smaller], tasks, timed)
        prompts = config.prompts or (DEFAULT_PROMPTS if can_generate(loaded.head) else ())
        with timed("Writing samples"):
            samples = [_continuations(model, prompts) for model in (loaded, *smaller)]
        cuts = tuple(
            one.model_copy(update={"samples": texts}) for one, texts in zip(record.cuts, samples[1:], strict=True)
        )
        cuts = _measured(cuts, results)
        record = record.model_copy(
            update={
                "dense": tuple(m for result in results for m in result[0].measurements),
                "cuts": cuts,
                "warnings": (*table.warnings, *_wreck_warnings(cuts)),
                "prompts": prompts if samples[0] else (),
                "samples": samples[0],
                "seconds": timed.seconds,
            }
        )
        collected.save(folder / "statistics.safetensors")
        (folder / "model" / "README.md").write_text(render_card(record, record.cuts[0]), encoding="utf-8")
        (folder / "model" / "record.json").write_text(record.to_json(), encoding="utf-8")
        with timed("Drawing the report"):
            write_record(record, folder)
    return record


def write_scores(table: ScoreTable, out: str | Path, *, command: str, force: bool = False) -> RunRecord:
    """Writes scores as a record with its tables, figures and page to a new folder.

    Raises:
        OutputExistsError: The folder exists.
    """
    if table.model is None:
        raise ConfigError("These scores name no model; make them with `avss.score`.")
    record = RunRecord(
        created=_now(),
        command=command,
        versions=_versions(),
        model=table.model,
        data=table.data,
        scores=table.scores,
        warnings=table.warnings,
    )
    with fresh_folder(Path(out), force=force) as folder:
        write_record(record, folder)
    return record


def write_record(record: RunRecord, folder: Path) -> None:
    """Writes `record.json` and all that can be made from it: `scores.csv`, `report.html`, `figures/`."""
    (folder / "record.json").write_text(record.to_json(), encoding="utf-8")
    if record.scores:
        table = ScoreTable(scores=record.scores, model=record.model, data=record.data)
        (folder / "scores.csv").write_text(scores_csv(table), encoding="utf-8")
    (folder / "report.html").write_text(render_page(record), encoding="utf-8")
    (folder / "figures").mkdir(exist_ok=True)
    save_figures(record, folder / "figures")


def report(record: RunRecord | str | Path, out: str | Path | None = None, *, force: bool = False) -> Path:
    """Draws a record again.

    Args:
        record: The record, its file, or the folder that holds it.
        out: A new folder for record, tables, figures and page; by default those beside the record are replaced.
        force: Whether an existing `out` that avss wrote may be replaced.

    Returns:
        The page.
    """
    value = record if isinstance(record, RunRecord) else RunRecord.read(Path(record))
    if out is not None:
        with fresh_folder(Path(out), force=force) as folder:
            write_record(value, folder)
        return Path(out) / "report.html"
    if isinstance(record, RunRecord):
        raise OutputExistsError("A record in memory has no folder to be drawn in. Give `out`.")
    path = Path(record)
    folder = path if path.is_dir() else path.parent
    write_record(value, folder)
    return folder / "report.html"


# --- parts ---


def _model_settings(config: ModelConfig) -> dict[str, Any]:
    settings = config.model_dump()
    return {"model": settings.pop("source"), **settings}


def _example_plan(num_blocks: int) -> Plan:
    """One block in the middle: what any cut changes, it changes."""
    removed = (num_blocks // 2,) if num_blocks > 1 else ()
    return Plan(num_blocks=num_blocks, removed=removed, method="explicit", rule="an example")


def _plans(config: RunConfig, table: ScoreTable, num_blocks: int) -> list[Plan]:
    if config.plan.blocks is not None:
        plans = [explicit_plan(config.plan, num_blocks)]
    else:
        plans = [_plan_by(config.plan.criterion, config.plan, table)]
    same_size = config.plan.model_copy(update={"fraction": None, "blocks": None, "count": len(plans[0].removed)})
    return plans + [_plan_by(name, same_size, table) for name in config.compare if name != plans[0].method]


def _plan_by(criterion: str, config: PlanConfig, table: ScoreTable) -> Plan:
    try:
        scores = table[criterion]
    except KeyError as error:
        problem = next((text for text in table.warnings if f"`{criterion}`" in text), f"`{criterion}` was not scored.")
        raise DegenerateStatisticError(problem.removeprefix("Left out: ")) from error
    return make_plan(scores, config, protects_ends=CRITERIA[criterion].protects_ends)


def _describe_cut(original: Loaded, smaller: Loaded, plan: Plan) -> Cut:
    return Cut(plan=plan, model=smaller.facts(), changes=config_changes(original.model.config, smaller.model.config))


def _save_verified(
    folder: Path, original: Loaded, smaller: Loaded, record: RunRecord, timed: Timed, *, path: str = "."
) -> RunRecord:
    """Saves the first cut and proves it; the record then carries the proof."""
    with timed("Saving the smaller model"):
        save_model(smaller, folder)
    with timed("Verifying it"):
        proof = verify(str(folder), smaller, original, record.cuts[0].plan, _probe(smaller))
    first = record.cuts[0].model_copy(update={"path": path, "verification": proof})
    return record.model_copy(update={"cuts": (first, *record.cuts[1:]), "seconds": timed.seconds})


def _probe(loaded: Loaded) -> tuple[Tensor, Tensor]:
    """A small batch with padding in it, for verification: real text where there is a tokenizer, drawn ids otherwise."""
    length = min(48, loaded.max_len or 48)
    if loaded.tokenizer is not None:
        batches = make_batches(
            read_texts("builtin"), loaded.tokenizer, layout="padded", samples=3, seq_len=length, batch_size=3, seed=0
        )
        token_ids, keep = next(iter(batches))
        if int(token_ids.max()) < loaded.vocabulary:
            return token_ids, keep
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(loaded.vocabulary, (3, length), generator=generator)
    keep = torch.ones_like(token_ids, dtype=torch.bool)
    return token_ids, keep


def _tasks(tasks: Sequence[TaskConfig | str], loaded: Loaded, settings: dict[str, Any]) -> tuple[TaskConfig, ...]:
    if not tasks:
        kinds = {
            "causal": ("perplexity", "choice", "classification", "speed"),
            "masked": ("perplexity", "similarity", "speed"),
        }.get(loaded.head, ("similarity", "speed"))
        return tuple(build(TaskConfig, {"kind": kind, **settings}) for kind in kinds)
    return tuple(task if isinstance(task, TaskConfig) else TaskConfig.parse(task, **settings) for task in tasks)


def _evaluate_all(models: list[Loaded], tasks: Sequence[TaskConfig], timed: Timed) -> list[list[TaskResult]]:
    """One list per task, with one result per model in it."""
    results = []
    for task in tasks:
        with timed(f"Evaluating {task.name or task.kind}") as advance:
            results.append(evaluate_task(models, task, on_step=advance))
    return results


def _measured(cuts: tuple[Cut, ...], results: list[list[TaskResult]]) -> tuple[Cut, ...]:
    return tuple(
        one.model_copy(
            update={
                "measurements": tuple(m for result in results for m in result[place].measurements),
                "retention": tuple(r for result in results for r in retention(result[0], result[place])),
            }
        )
        for place, one in enumerate(cuts, start=1)
    )


def _wreck_warnings(cuts: tuple[Cut, ...]) -> tuple[str, ...]:
    return tuple(
        f"The cut by `{one.name}` (blocks {one.plan.describe()}) {_harm(kept.ratio)}: perplexity {kept.dense:,.1f} -> "
        f"{kept.value:,.1f}, {kept.ratio:,.1f} times."
        for one in cuts
        for kept in one.retention
        if kept.metric.endswith("perplexity") and kept.ratio >= COSTLY
    )


def _harm(ratio: float) -> str:
    return "wrecks the model" if ratio >= WRECKED else "costs too much to be used as it is"


def _continuations(loaded: Loaded, prompts: tuple[str, ...]) -> tuple[str, ...]:
    if not can_generate(loaded.head) or loaded.tokenizer is None:
        return ()
    texts = []
    for prompt in prompts:
        token_ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]], device=loaded.device)
        new = generate(loaded.model, token_ids, num_tokens=_CONTINUATION_TOKENS)
        texts.append(str(loaded.tokenizer.decode(new)))
    return tuple(texts)


def _plan_of(model: AnyModel, loaded: Loaded, dense: Loaded) -> Plan:
    """The plan noted in a model's folder, if it was cut from a model of the baseline's size; else an empty one."""
    if isinstance(model, str | Path) and (Path(model) / "record.json").is_file():
        plan = RunRecord.read(Path(model)).cuts[0].plan
        if plan.num_blocks == len(dense.stack):
            return plan
    return Plan(num_blocks=len(loaded.stack), removed=(), method="model", rule="as loaded")


def _record(loaded: Loaded, command: str, timed: Timed, table: ScoreTable | None) -> RunRecord:
    return RunRecord(
        created=_now(),
        command=command,
        versions=_versions(),
        model=loaded.facts(),
        data=table.data if table else None,
        scores=table.scores if table else (),
        warnings=table.warnings if table else (),
        seconds=timed.seconds,
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    return {
        "avss": avss.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


__all__ = [
    "Inspection",
    "Pruned",
    "calibration",
    "evaluate",
    "inspect",
    "load",
    "prune",
    "report",
    "run",
    "score",
    "write_record",
    "write_scores",
]
