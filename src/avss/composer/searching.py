"""Search as the composer runs it: the judge, the budget and the file are wired together here."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from avss.ablation import Judge, bytes_to_hold, mean_and_error
from avss.composer.provenance import now, versions
from avss.config import PlanConfig, SearchConfig, TaskConfig
from avss.cut import cut
from avss.data.batches import Batches
from avss.data.sources import read_table
from avss.errors import ConfigError, TaskError, UnsupportedArchitectureError
from avss.evaluation import evaluate_task
from avss.evaluation.base import data_sources
from avss.models.load import Loaded
from avss.models.rewrite import refusal
from avss.output import cache_folder
from avss.progress import Stages
from avss.record import CurvePoint, Plan, SearchResult
from avss.search import Budget, Curve, Ledger, Measure, Rules, find_curve
from avss.search.ledger import FloatArray, Removed

_SHARE_OF_MEMORY = 0.25
"""Of the free memory, that the whole model's states and answers may take."""

_UNCUT = 1e6
"""Added to the cost of a set that no config can express: it loses to every one that can be cut, and such sets still
compare among themselves, since a larger one that can be cut may be built from them."""


def search_loaded(
    loaded: Loaded,
    batches: Batches,
    plan: PlanConfig,
    config: SearchConfig,
    *,
    count: int,
    protected: Sequence[int],
    prior: Sequence[float] | None,
    fallback: tuple[str, Callable[[], Sequence[float]]] | None = None,
    stages: Stages,
    command: str = "",
) -> SearchResult:
    """Searches a loaded model for the best set of every size from 1 to `count`.

    Args:
        loaded: The model; left as it was.
        batches: The text that damage is measured on.
        plan: `select` names the method.
        config: How hard to look.
        count: The largest number of blocks.
        protected: Blocks that stay.
        prior: Importance of each block by a criterion, to try the likeliest first; None: each block alone is measured.
        fallback: A criterion, and what makes its scores, to take where the budget does not reach for that; the
            result's settings then name it as the screen.
        stages: Where progress goes.
        command: The command to note in the result.

    Raises:
        ConfigError: The objective does not suit the model, or the budget is too small for a search.
        InvalidPlanError: No run of that many neighbours is free, and runs were asked for.
    """
    num_blocks = len(loaded.stack)
    screen = config.screen

    def fall_back() -> Sequence[float]:
        nonlocal screen
        assert fallback is not None
        screen, scores = fallback
        return scores()

    judge = Judge(loaded, batches, holds_all=bytes_to_hold(loaded, batches) <= _free_bytes(loaded) * _SHARE_OF_MEMORY)
    by_task = config.objective == "accuracy"
    refused = _Refused(loaded)
    measure = _by_accuracy(loaded, config, refused) if by_task else _by_judge(judge, config, refused)
    rules = Rules(
        count=count,
        free=tuple(block for block in range(num_blocks) if block not in protected),
        prior=None if prior is None else tuple(prior),
        fallback=None if fallback is None else fall_back,
        width=config.width,
        beam=config.beam,
        num_windows=config.windows,
        rounds=config.exchanges,
        error=config.error,
        seed=config.seed,
    )
    key = _key(loaded, batches, plan.select, config, rules)
    ledger = Ledger(
        measure,
        num_blocks=num_blocks,
        num_batches=1 if by_task else len(judge),
        budget=Budget(passes=config.max_passes or math.inf, seconds=config.seconds or math.inf),
        path=state_folder(config) / f"{key}.jsonl" if config.resume else None,
        key=key,
        dense_each_time=not judge.holds_all and not by_task,
        shares_prefixes=not by_task,
    )
    with stages(f"Searching {count} of {num_blocks} blocks") as advance:
        note = ""

        def on_call() -> None:
            limited = config.max_passes is not None or config.seconds is not None
            done, total = (
                (round(1000 * min(1.0, ledger.share_spent)), 1000) if limited else (round(ledger.passes), None)
            )
            advance(done, total, note)

        def on_best(size: int, removed: Removed, cost: float) -> None:
            nonlocal note
            note = f"{size}: {cost - refused.penalty(removed):.4g} without {_plan(loaded, removed).describe()}"
            on_call()

        ledger.on_call = on_call
        curve = find_curve(plan.select, ledger, rules, on_best=on_best)
    config = config.model_copy(update={"screen": screen})
    return _result(curve, ledger, loaded, batches, plan, config, judge, protected, command, refused)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """What the columns of the measure are; 0 is the cost."""

    distance: int = 1
    loss: int = 2
    dense_loss: int = 3


_COLUMNS = _Columns()


def _plan(loaded: Loaded, removed: Removed) -> Plan:
    return Plan(num_blocks=len(loaded.stack), removed=tuple(sorted(removed)), method="search", rule="")


class _Refused:
    """Knows which sets cannot be cut out of a model, and why: by its config, or by a cut that was tried."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._reasons: dict[Removed, str | None] = {}

    def reason(self, removed: Removed) -> str | None:
        """Why a set cannot go; None where it can as far as is known."""
        if removed not in self._reasons:
            loaded = self._loaded
            self._reasons[removed] = refusal(loaded.model.config, loaded.stack, _plan(loaded, removed))
        return self._reasons[removed]

    def note(self, removed: Removed, reason: str) -> None:
        """A cut was tried, and refused."""
        self._reasons[removed] = reason

    def penalty(self, removed: Removed) -> float:
        """What is added to the cost of a set."""
        return 0.0 if self.reason(removed) is None else _UNCUT


def _by_judge(judge: Judge, config: SearchConfig, refused: _Refused) -> Measure:
    def measure(sets: Sequence[Removed], batches: Sequence[int]) -> list[FloatArray]:
        found = []
        for removed, one in zip(sets, judge.judge(sets, batches=batches), strict=True):
            nothing = np.full_like(one.distance, np.nan)
            loss = nothing if one.loss is None else one.loss
            dense = nothing if one.dense_loss is None else one.dense_loss
            if config.objective == "loss" and one.loss is None:
                raise ConfigError(
                    "`--objective loss` needs a causal language model; this one predicts no next word. Use `kl`, or "
                    "`accuracy` with a task."
                )
            cost = loss - dense if config.objective == "loss" else one.distance
            found.append(np.stack([cost + refused.penalty(removed), one.distance, loss, dense], axis=1))
        return found

    return measure


def _by_accuracy(loaded: Loaded, config: SearchConfig, refused: _Refused) -> Measure:
    """One minus the accuracy on a task, item by item. The cut models share the weights; only forwards cost."""
    if config.task is None:
        raise ConfigError(
            "`--objective accuracy` needs a task with right answers: name one, e.g. "
            "`--objective-task choice=questions.jsonl`."
        )
    task: TaskConfig = config.task

    def wrong_of(model: Loaded) -> FloatArray:
        (result,) = evaluate_task([model], task)
        if "accuracy" not in result.samples:
            raise TaskError(f"The task `{task.kind}` has no right answers to count. Use choice or classification.")
        return 1 - result.samples["accuracy"]

    @functools.cache
    def num_items() -> int:
        return len(wrong_of(loaded))

    def measure(sets: Sequence[Removed], batches: Sequence[int]) -> list[FloatArray]:
        del batches  # there is one: all items
        found = []
        for one in sets:
            try:
                wrong = wrong_of(cut(loaded, _plan(loaded, one)))
            except UnsupportedArchitectureError as error:
                # It cannot be run, so nothing tells it from its kind.
                refused.note(one, str(error))
                wrong = np.full(num_items(), 1 + _UNCUT)
            nothing = np.full_like(wrong, np.nan)
            found.append(np.stack([wrong, nothing, nothing, nothing], axis=1))
        return found

    return measure


def _result(
    curve: Curve,
    ledger: Ledger,
    loaded: Loaded,
    batches: Batches,
    plan: PlanConfig,
    config: SearchConfig,
    judge: Judge,
    protected: Sequence[int],
    command: str,
    refused: _Refused,
) -> SearchResult:
    def point(removed: Removed, how: str) -> CurvePoint:
        return _point(removed, how, ledger.known(removed), refused)

    sizes = sorted(curve.best)
    measured = (ledger.known(curve.best[size]) for size in sizes)
    dense = [float(np.mean(rows[:, _COLUMNS.dense_loss])) for rows in measured if len(rows)]
    return SearchResult(
        created=now(),
        command=command,
        method=plan.select,
        objective=config.objective,
        task=None if config.task is None else f"{config.task.kind}={config.task.data}",
        measure=judge.measure,
        num_blocks=len(loaded.stack),
        protected=tuple(protected),
        points=tuple(point(curve.best[size], curve.how[size]) for size in sizes),
        others=tuple(
            point(one, "runner-up")
            for size in sizes
            for one in _others(ledger, curve, size)
            if refused.reason(one) is None
        ),
        dense_loss=dense[-1] if dense and math.isfinite(dense[-1]) else None,
        num_blocks_run=ledger.num_blocks_run,
        passes=ledger.passes,
        passes_of_all=passes_of_all(len(loaded.stack), len(loaded.stack) - len(protected), max(sizes)),
        num_sets=ledger.num_sets,
        seconds=ledger.seconds,
        is_complete=curve.is_complete,
        settings=config.model_dump(mode="json"),
        model=loaded.facts(),
        data=batches.facts,
    )


_OTHERS = 8
_ENOUGH = 0.25
"""Share of the text that a set must have been measured on to be named beside the best."""


def _others(ledger: Ledger, curve: Curve, size: int) -> list[Removed]:
    """The sets of a size that came closest to the best one."""
    enough = [
        one
        for one in ledger.sets
        if len(one) == size and one != curve.best[size] and len(ledger.batches_of(one)) >= _ENOUGH * ledger.num_batches
    ]
    return sorted(enough, key=lambda one: (ledger.mean(one), sorted(one)))[:_OTHERS]


def _point(removed: Removed, how: str, rows: FloatArray, refused: _Refused) -> CurvePoint:
    blocks, reason = tuple(sorted(removed)), refused.reason(removed)
    if not len(rows):
        return CurvePoint(removed=blocks, how=how, cost=math.nan, distance=math.nan, num_sequences=0, refusal=reason)
    cost, cost_error = mean_and_error(rows[:, 0] - refused.penalty(removed))
    distance, error = mean_and_error(rows[:, _COLUMNS.distance])
    loss, dense = rows[:, _COLUMNS.loss], rows[:, _COLUMNS.dense_loss]
    change = mean_and_error(loss - dense) if np.isfinite(loss).all() else (None, None)
    return CurvePoint(
        removed=blocks,
        how=how,
        cost=cost,
        cost_stderr=cost_error,
        distance=distance,
        stderr=error if math.isfinite(distance) else None,
        loss_change=change[0],
        loss_change_stderr=change[1],
        perplexity=None if change[0] is None else math.exp(min(float(loss.mean()), 700.0)),
        num_sequences=len(rows),
        refusal=reason,
    )


def passes_of_all(num_blocks: int, num_free: int, count: int) -> float:
    """Passes of the whole model that it takes to try every remaining block in each step, each model from its start.

    Example:
        >>> passes_of_all(num_blocks=30, num_free=28, count=8)
        168.0
    """
    return sum((num_free - step) * (num_blocks - step - 1) for step in range(count)) / num_blocks


def state_folder(config: SearchConfig) -> Path:
    """Where searches keep their measurements: the setting, or a folder in the cache."""
    return Path(config.cache) if config.cache is not None else cache_folder() / "search"


def _key(loaded: Loaded, batches: Batches, method: str, config: SearchConfig, rules: Rules) -> str:
    """What the measurements depend on, but for the budget: a larger one goes on where a smaller one ended."""
    facts = loaded.facts()
    content = {
        "versions": versions(),
        "model": [facts.fingerprint, facts.stack],
        "compute": [facts.compute_dtype, facts.device],
        "head": loaded.head,
        "data": [batches.facts.content_hash, batches.batch_size],
        "method": method,
        "objective": [config.objective, *([] if config.task is None else _task_content(config.task))],
        "rules": {name: value for name, value in vars(rules).items() if name != "fallback"},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _task_content(task: TaskConfig) -> list[Any]:
    """The task's settings, and a hash of every row it may read: a file may change under its name."""
    rows = [read_table(source) for source in data_sources(task)]
    text = json.dumps(rows, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    return [task.model_dump(mode="json"), hashlib.sha256(text.encode()).hexdigest()]


def _free_bytes(loaded: Loaded) -> int:
    if loaded.device.type == "cuda":
        return int(torch.cuda.mem_get_info(loaded.device)[0])
    return psutil.virtual_memory().available if loaded.device.type == "cpu" else 0
