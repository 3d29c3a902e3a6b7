"""Evaluation: what the dense and the smaller models score on the same items, and how much is kept."""

from collections.abc import Callable, Iterable, Sequence

from avss.config import TaskConfig, TaskKind
from avss.errors import TaskError
from avss.evaluation.base import OnStep, TaskResult
from avss.evaluation.choice import evaluate_choice
from avss.evaluation.classification import evaluate_classification
from avss.evaluation.perplexity import evaluate_perplexity
from avss.evaluation.retention import retention
from avss.evaluation.similarity import evaluate_similarity
from avss.evaluation.speed import evaluate_speed
from avss.models.load import Loaded

__all__ = ["TASKS", "TaskResult", "evaluate_task", "rehearse", "retention"]

Runner = Callable[[Sequence[Loaded], TaskConfig, OnStep], list[TaskResult]]

TASKS: dict[TaskKind, Runner] = {
    "choice": evaluate_choice,
    "classification": evaluate_classification,
    "perplexity": evaluate_perplexity,
    "similarity": evaluate_similarity,
    "speed": evaluate_speed,
}
"""What runs each kind of task."""


_REHEARSED = 3
"""Items of a rehearsal: the fewest that every task is defined for."""


def evaluate_task(
    models: Sequence[Loaded], task: TaskConfig, *, on_step: OnStep = lambda done, total: None
) -> list[TaskResult]:
    """Measures all models on the same items of one task.

    Args:
        models: The dense one first, then any number of smaller ones; all with the same head and, but for `speed`, the
            same vocabulary. Cuts share their weights with the dense model, so holding all of them is free.
        task: What to measure, on which data.
        on_step: Called with (steps done, steps in all) after each forward pass.

    Returns:
        One result a model, in the given order.

    Raises:
        TaskError: The task does not fit the models. Found before any forward pass.
        DataError: The data cannot be read, or a row is not what the task needs. Found before any forward pass.
    """
    heads = list(dict.fromkeys(model.head for model in models))
    if len(heads) != 1:
        raise TaskError(
            f"The models have {len(heads)} different heads ({', '.join(heads) or 'there is no model'}), so they cannot "
            "be measured on the same task. Load all of them with the same `--head`."
        )
    if models[0].model.main_input_name == "pixel_values":
        _check_sees(models[0], task)
    return TASKS[task.kind](models, task, on_step)


def _check_sees(loaded: Loaded, task: TaskConfig) -> None:
    """Refuses a task that has no meaning for a model that reads images.

    Raises:
        TaskError: It reads text, or asks for labels that the model does not give; or the model reads more than images.
    """
    name = type(loaded.model).__name__
    if not loaded.is_vision:
        raise TaskError(
            f"`{name}` reads images and decodes them, and no task here measures that. What its blocks are worth is "
            "measured by `avss damage` and `avss compare`."
        )
    if task.kind not in ("classification", "similarity", "speed"):
        raise TaskError(
            f"The task `{task.kind}` reads text, and `{name}` reads images. For images there are "
            "`classification=DIR`, `similarity=DIR` and `speed`."
        )
    if task.kind == "classification" and loaded.head != "image-classifier":
        raise TaskError(
            f"`{name}` gives no labels (its head is `{loaded.head}`), so it cannot classify images. For such a model "
            "there are `similarity=DIR` and `speed`."
        )


def rehearse(loaded: Loaded, tasks: Iterable[TaskConfig | None]) -> None:
    """Runs a model on a few items of each task: what is wrong with one shall not show after hours of other work.

    Args:
        loaded: The dense model.
        tasks: Those to come; None among them is none.

    Raises:
        TaskError: As `evaluate_task` does.
        DataError: Likewise.
    """
    for task in tasks:
        if task is not None and task.kind != "speed":
            evaluate_task([loaded], task.model_copy(update={"limit": min(task.limit or _REHEARSED, _REHEARSED)}))
