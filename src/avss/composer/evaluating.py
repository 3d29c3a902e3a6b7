"""`avss.evaluate`: a model beside its baseline, on the same items."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from avss.composer.inputs import AnyModel, load
from avss.composer.pruning import describe_cut
from avss.composer.records import begin_record
from avss.config import PlanConfig, TaskConfig, build, refuse_unread
from avss.evaluation import TaskResult, evaluate_task, retention
from avss.evaluation.base import task_name, with_own_names
from avss.models.forward import can_generate, generate
from avss.models.load import Loaded
from avss.models.stack import AUTO
from avss.progress import Stages, Timed, silent
from avss.record import Cut, Plan, RunRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COSTLY, WRECKED = 1.5, 10.0
"""Perplexity ratios from which a cut is said to need repair, and to be a wreck."""

_SHORT_OF = 0.95
"""Share of a wanted speedup below which it is said to be missed: timings scatter."""

_CONTINUATION_TOKENS = 32

_READ_BY: dict[str, tuple[str, ...]] = {
    "shots": ("classification",),
    "shots_data": ("classification",),
    "labels": ("classification",),
    "label_column": ("classification", "choice"),
    "template": ("classification", "choice"),
    "text_column": ("classification", "choice", "perplexity", "similarity"),
}
"""Settings of tasks that not every kind reads."""


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
        loading: For models named: `head`, `dtype`, `device`, `revision` (the model's), `stack`, `trust_remote_code`.
        command: The command to note in the record.
        stages: Where progress goes.
        **settings: For every task given as a string: `limit`, `seq_len`, ...; see `avss.config.TaskConfig`.

    Returns:
        A record: `dense` holds the baseline's measurements and `cuts[0]` the model's; without a baseline, `dense`
        holds the model's own.
    """
    timed = Timed(stages)
    has_record = isinstance(model, str | Path) and (Path(model) / "record.json").is_file()
    earlier = RunRecord.read(Path(str(model))) if has_record else None
    stack = (loading or {}).get("stack", AUTO)
    if stack == AUTO and earlier is not None:
        stack = earlier.stack
    with timed("Loading the model"):
        loaded = load(model, tokenizer, **{**(loading or {}), "stack": stack})
    models = [loaded]
    if baseline is not None:
        same = {**(loading or {}), "head": loaded.head, "revision": None}
        with timed("Loading the baseline"):
            dense = load(baseline, tokenizer, **same)
        if type(dense.model) is type(loaded.model):
            dense = dataclasses.replace(dense, stack_name=loaded.stack.path)
        models.insert(0, dense)
    dense = models[0]
    wanted = choose_tasks(tasks, dense, settings)
    results = evaluate_all(models, wanted, timed)
    cuts: tuple[Cut, ...] = ()
    if baseline is not None:
        as_loaded = Plan(num_blocks=len(loaded.stack), removed=(), method="model", rule="as loaded")
        told = earlier.cuts[0] if earlier is not None and earlier.cuts else None
        if told is None or told.plan.num_blocks != len(dense.stack):  # cut from another model than the baseline
            one = describe_cut(dense, loaded, as_loaded)
        else:
            kept = {name: getattr(told, name) for name in ("compensation", "healing", "verification")}
            one = describe_cut(dense, loaded, told.plan).model_copy(update=kept)
        cuts = with_measurements((one,), results)
    record = begin_record(dense, command or f"avss.evaluate({loaded.source!r}, ...)", timed, None)
    return record.model_copy(
        update={
            "dense": tuple(m for result in results for m in result[0].measurements),
            "cuts": cuts,
            "warnings": wreck_warnings(cuts),
            "settings": {"tasks": [task.model_dump(mode="json") for task in wanted]},
        }
    )


def choose_tasks(tasks: Sequence[TaskConfig | str], loaded: Loaded, settings: dict[str, Any]) -> tuple[TaskConfig, ...]:
    """The tasks as settings: those named, or what suits the model's head."""
    kinds: tuple[str, ...] = {
        "causal": ("perplexity", "choice", "classification", "speed"),
        "masked": ("perplexity", "similarity", "speed"),
    }.get(loaded.head, ("similarity", "speed"))
    if loaded.files is not None:
        kinds = tuple(kind for kind in kinds if kind != "speed")
    if loaded.is_vision:
        kinds = ("speed",)  # no images come with avss
    found = (
        with_own_names([task if isinstance(task, TaskConfig) else TaskConfig.parse(task, **settings) for task in tasks])
        if tasks
        else tuple(build(TaskConfig, {"kind": kind, **settings}) for kind in kinds)
    )
    for name, kinds in _READ_BY.items():
        # A flag is for all tasks: one that reads it is enough.
        read = [getattr(task, name) for task in found if task.kind in kinds]
        unset = TaskConfig.model_fields[name].default
        unread = (value for task in found if (value := getattr(task, name)) != unset and value not in read)
        what = f"tasks of the kind {' or '.join(f'`{kind}`' for kind in kinds)}"
        refuse_unread({name: next(unread, None)}, what)
    for task in found:
        if loaded.is_vision:
            columns = {"text_column": task.text_column, "label_column": task.label_column}
            refuse_unread(columns, "tables, and this model reads folders of images")
        if not task.shots:
            refuse_unread({"shots_data": task.shots_data}, "solved examples, and none were asked for", "`--shots 4`")
        if loaded.head in ("classifier", "encoder", "image-classifier"):
            refuse_unread(
                {"template": task.template}, f"models that continue text, and this has a `{loaded.head}` head"
            )
    return found


def evaluate_all(models: Sequence[Loaded], tasks: Sequence[TaskConfig], timed: Timed) -> list[list[TaskResult]]:
    """One list per task, with one result per model in it."""
    results = []
    for task in tasks:
        with timed(f"Evaluating {task.name or task.kind}") as advance:
            results.append(evaluate_task(models, task, on_step=advance))
    return results


def with_measurements(cuts: tuple[Cut, ...], results: list[list[TaskResult]]) -> tuple[Cut, ...]:
    """The cuts with what each scored and kept; `results` holds the dense model's first in every task."""
    return tuple(
        one.model_copy(
            update={
                "measurements": tuple(m for result in results for m in result[place].measurements),
                "retention": tuple(r for result in results for r in retention(result[0], result[place])),
            }
        )
        for place, one in enumerate(cuts, start=1)
    )


def target_warnings(plan: PlanConfig, cut: Cut) -> tuple[str, ...]:
    """A sentence where the finished model misses what its size was chosen by, measured on the raw cut or estimated."""
    told = []
    share, speedup, named = plan.min_retention, plan.speedup, plan.retention_task
    # A task's first figure with a share is the one that the size was chosen by.
    meant = (one for one in cut.retention if one.kept is not None and (not named or one.task == task_name(named)))
    first = next(meant, None)
    if share is not None and first is not None and first.kept is not None and first.kept < share:
        told.append(
            f"The finished model keeps {first.kept:.1%} of {first.task}, {first.metric}, less than the {share:.1%} "
            "that its size was chosen by."
        )
    latency = next((one for one in cut.retention if one.metric == "latency_ms"), None)
    if speedup is not None and latency is not None and latency.dense < _SHORT_OF * speedup * latency.value:
        told.append(
            f"A forward pass is {latency.dense / latency.value:.2f} times as fast, and {speedup:g} were asked for: the "
            "estimate by which blocks were counted was too good."
        )
    return tuple(told)


def wreck_warnings(cuts: tuple[Cut, ...]) -> tuple[str, ...]:
    """A sentence for every cut whose perplexity says that it cannot be used as it is."""
    return tuple(
        f"The cut by `{one.name}` (blocks {one.plan.describe()}) {_harm(kept.ratio)}: perplexity {kept.dense:,.1f} -> "
        f"{kept.value:,.1f}" + (f", {kept.ratio:,.1f} times." if math.isfinite(kept.ratio) else ".")
        for one in cuts
        for kept in one.retention
        if kept.metric.endswith("perplexity") and not kept.ratio < COSTLY
    )


def _harm(ratio: float) -> str:
    if math.isnan(ratio):
        return "gives outputs that are no numbers"
    return "wrecks the model" if ratio >= WRECKED else "costs too much to be used as it is"


def continuations(loaded: Loaded, prompts: tuple[str, ...]) -> tuple[str, ...]:
    """What a model writes after each prompt, greedily; nothing where it cannot."""
    if not can_generate(loaded.head) or loaded.tokenizer is None:
        return ()
    texts = []
    for prompt in prompts:
        token_ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]], device=loaded.device)
        new = generate(loaded.model, token_ids, num_tokens=_CONTINUATION_TOKENS)
        texts.append(str(loaded.tokenizer.decode(new)))
    return tuple(texts)
