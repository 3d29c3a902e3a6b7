"""What a task gives back, how sure it is, and what the tasks share: the draw of items, names, progress."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avss.config import TaskConfig
from avss.data.batches import need_tokenizer
from avss.data.sources import Row, exists, split_column
from avss.errors import DataError, TaskError, unknown_name
from avss.models.load import Loaded
from avss.record import Measurement

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each forward pass."""

BUILTIN_OF_KIND: dict[str, str] = {
    "perplexity": "builtin:evaluation",
    "similarity": "builtin:evaluation",
    "choice": "builtin:choice",
    "classification": "builtin:sentiment",
}
"""The data that come with avss, for each kind of task that reads data."""


@dataclasses.dataclass(frozen=True, eq=False)
class TaskResult:
    """What one model scored on one task, down to the single item, so that two models can be compared item by item.

    Attributes:
        measurements: One per metric, the most important first.
        samples: Metric -> one value per item, `[N]`, whose mean is the measurement's value: 1 or 0 for an accuracy, the
            mean nats per token of each window for a loss, an item's share of an area under the ROC curve. Metrics that
            are no mean over items have no entry (speed; a perplexity is the exponential of the mean of the loss's
            entry).
        predictions: Metric -> index of the answer given to each item, `[N]`; accuracies only.

    All results of one `evaluate_task` call have their items in the same order.
    """

    measurements: tuple[Measurement, ...]
    samples: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    predictions: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __getitem__(self, metric: str) -> Measurement:
        """The measurement of one metric.

        Raises:
            KeyError: It was not measured; the message lists those that were.
        """
        for measurement in self.measurements:
            if measurement.metric == metric:
                return measurement
        raise KeyError(f"`{metric}` was not measured. Measured: {', '.join(m.metric for m in self.measurements)}.")


class Steps:
    """Counts forward passes and tells whoever waits.

    Args:
        total: Passes in all.
        on_step: Called after each.
    """

    def __init__(self, total: int, on_step: OnStep) -> None:
        self._total = total
        self._on_step = on_step
        self._done = 0

    def advance(self, num: int = 1) -> None:
        """Notes that `num` more passes are done."""
        self._done = min(self._done + num, self._total)
        self._on_step(self._done, self._total)


def standard_error(samples: np.ndarray) -> float | None:
    r"""Standard error of the mean of independent items: $\sqrt{\sum (x_i - \bar x)^2 / (n (n - 1))}$.

    For items that are 0 or 1 this is $\sqrt{p (1 - p) / (n - 1)}$. None for fewer than two items.

    Example:
        >>> standard_error(np.array([1.0, 0.0, 1.0, 1.0]))  # sqrt(0.75 * 0.25 / 3)
        0.25
    """
    num = len(samples)
    return float(np.std(samples, ddof=1) / math.sqrt(num)) if num > 1 else None


def measure(
    task: TaskConfig,
    metric: str,
    samples: np.ndarray,
    *,
    higher_is_better: bool,
    chance: float | None = None,
    unit: str = "",
) -> Measurement:
    """The mean of the items as a measurement, with its standard error."""
    return Measurement(
        task=task_name(task),
        metric=metric,
        value=float(np.mean(samples)),
        stderr=standard_error(samples),
        num_samples=len(samples),
        higher_is_better=higher_is_better,
        chance=chance,
        unit=unit,
        source=short_source(task),
    )


def task_name(task: TaskConfig) -> str:
    """What tables call a task: its own name, else the kind, with the data's name unless these are the built-in ones.

    Example:
        >>> task_name(TaskConfig.parse("choice=data/piqa.jsonl"))
        'choice:piqa'
    """
    if task.name:
        return task.name
    source = data_source(task)
    if task.kind not in BUILTIN_OF_KIND or source == BUILTIN_OF_KIND[task.kind]:
        return task.kind
    bare = source.rpartition("#")[0] or source
    if exists(bare):
        return f"{task.kind}:{Path(bare).stem or bare}"
    # A hub data set (`owner/name:config@split`), `builtin:name`, or a file that is not there.
    last = bare.rsplit("/", 1)[-1].removeprefix("builtin:").partition("@")[0].partition(":")[0]
    return f"{task.kind}:{Path(last).stem or last}"


def with_own_names(tasks: Sequence[TaskConfig]) -> tuple[TaskConfig, ...]:
    """The tasks, those that would have one name with more of it: folder, or configuration and split; else a number.

    Example:
        >>> tasks = [TaskConfig.parse(f"choice={folder}/test.jsonl") for folder in ("piqa", "siqa")]
        >>> [task.name for task in with_own_names(tasks)]
        ['choice:piqa/test', 'choice:siqa/test']
    """
    shared = Counter(map(task_name, tasks))
    longer = [task if shared[task_name(task)] == 1 else _with_longer_name(task) for task in tasks]
    shared, seen = Counter(map(task_name, longer)), Counter[str]()
    found = []
    for task in longer:
        name = task_name(task)
        seen[name] += 1
        found.append(task.model_copy(update={"name": f"{name} #{seen[name]}"}) if shared[name] > 1 else task)
    return tuple(found)


def _with_longer_name(task: TaskConfig) -> TaskConfig:
    bare = data_source(task).rpartition("#")[0] or data_source(task)
    if task.name or task.kind not in BUILTIN_OF_KIND:
        return task
    path = Path(bare)
    is_file = exists(bare) or path.suffix != ""
    last = f"{path.parent.name}/{path.stem}" if is_file else bare.rsplit("/", 1)[-1]
    return task.model_copy(update={"name": f"{task.kind}:{last}"})


def data_source(task: TaskConfig) -> str:
    """Where the task's data are: what the user named, or the built-in data of its kind."""
    return BUILTIN_OF_KIND.get(task.kind, task.data) if task.data == "builtin" else task.data


def shots_source(task: TaskConfig) -> str | None:
    """Where the task's solved examples are, if not among its data."""
    return BUILTIN_OF_KIND.get(task.kind) if task.shots_data == "builtin" else task.shots_data


def data_sources(task: TaskConfig) -> list[str]:
    """All that the task reads."""
    return [source for source in (data_source(task), shots_source(task)) if source is not None]


def text_column_of(task: TaskConfig) -> str | None:
    """The column that the user named for the texts: in the task, or with `#column` in the source."""
    return task.text_column or split_column(data_source(task))[1]


def short_source(task: TaskConfig) -> str:
    """The data as the record names them: a path by its last part."""
    source = data_source(task)
    return Path(source).name if exists(source) else source


def draw(num_items: int, limit: int | None, seed: int) -> list[int]:
    """Which items count: all of them, or a seeded draw of `limit` without replacement, in their original order.

    Example:
        >>> draw(3, None, seed=0), len(draw(100, 8, seed=0))
        ([0, 1, 2], 8)
    """
    if limit is None or limit >= num_items:
        return list(range(num_items))
    return sorted(int(index) for index in np.random.default_rng(seed).choice(num_items, size=limit, replace=False))


def shared_tokenizer(models: Sequence[Loaded]) -> Any:
    """The tokenizer of the first model, which reads the text for all of them.

    Raises:
        DataError: It has none.
        TaskError: Another model has another vocabulary, so the same token ids mean other words to it.
    """
    tokenizer = need_tokenizer(models[0].tokenizer, models[0].source)
    vocabulary = None
    for other in models[1:]:
        if other.tokenizer is None or other.tokenizer is tokenizer:
            continue
        vocabulary = vocabulary or tokenizer.get_vocab()
        if other.tokenizer.get_vocab() != vocabulary:
            raise TaskError(
                f"`{other.source}` and `{models[0].source}` have different vocabularies, so they do not read the same "
                "tokens. Models compared in one call must share the tokenizer; evaluate them one by one."
            )
    return tokenizer


def max_len(models: Sequence[Loaded]) -> int | None:
    """The most tokens that every model can take; None where none sets a limit."""
    return min((model.max_len for model in models if model.max_len is not None), default=None)


def need_placeholder(template: str, placeholder: str) -> str:
    """The template.

    Raises:
        TaskError: It has no room for the item.
    """
    if placeholder not in template:
        raise TaskError(
            f"The template `{template}` has no `{placeholder}`, so every item would read the same. "
            f"Write `{placeholder}` where the item's text belongs."
        )
    return template


def find_column(row: Row, source: str, what: str, named: str | None, candidates: Sequence[str]) -> str:
    """The column the user named, or the first candidate that is there.

    Raises:
        DataError: There is none; the message lists the columns.
    """
    if named is not None:
        if named not in row:
            raise DataError(f"`{source}`: {unknown_name('column', named, map(str, row))}")
        return named
    for candidate in candidates:
        if candidate in row:
            return candidate
    raise DataError(
        f"`{source}` has no column for the {what}. Columns: {', '.join(map(str, row))}. Allowed: "
        f"{', '.join(candidates)}; rename one, or name it in the task."
    )
