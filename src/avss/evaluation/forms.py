"""The forms that tasks ask in, for a repair and for healing (`avss.forms`)."""

from collections.abc import Sequence

from avss.config import TaskConfig
from avss.errors import ConfigError
from avss.evaluation import choice, classification
from avss.evaluation.labelled import label_words
from avss.forms import Form


def task_forms(tasks: Sequence[TaskConfig]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prompts of these tasks, with room for sentences where their data would stand; and what has none and why.

    Classification gives its template and its label words, with solved examples as often as the task has them; choice
    its template with a sentence for the question and the next one for the answer. Of the data only the names of the
    labels are taken, where the task does not name them. Other tasks have no prompt.

    Args:
        tasks: Of a run, for a model that continues text.

    Returns:
        The forms, and a sentence for each task whose prompt cannot be written as one.

    Raises:
        DataError: The data of a classification are missing or faulty.
        TaskError: Its label words do not fit them.
    """
    forms: list[str] = []
    warnings: list[str] = []
    for task in tasks:
        if task.kind not in ("classification", "choice"):
            continue
        form, expected = _choice(task) if task.kind == "choice" else _classification(task)
        try:
            understood = Form.parse(form).parts == expected
        except ConfigError:
            understood = False
        if understood:
            forms.append(form)
        else:
            warnings.append(
                f"The model was not repaired or healed in the prompt of the task `{task.kind}={task.data}`: its "
                "braces, bars or line breaks cannot be told from places for a sentence or an answer."
            )
    return tuple(dict.fromkeys(forms)), tuple(warnings)


Parts = tuple[str | tuple[str, ...], ...]


def _choice(task: TaskConfig) -> tuple[str, Parts]:
    template = task.template or choice.DEFAULT_TEMPLATE
    return f"{template.replace('{question}', '{text}')} {{text}}", (*_split(template, "{question}", " "), (), "")


def _classification(task: TaskConfig) -> tuple[str, Parts]:
    template = task.template or classification.DEFAULT_TEMPLATE
    words = task.labels or label_words(classification.read(task), None)
    form = classification.EXAMPLE_BREAK.join([f"{template} {{{'|'.join(words)}}}"] * (1 + task.shots))
    parts: list[str | tuple[str, ...]] = [""]
    for place in range(1 + task.shots):
        first, *rest = _split(template, "{text}", " ")
        parts[-1] = (classification.EXAMPLE_BREAK if place else "") + str(first)
        parts += [*rest, tuple(words), ""]
    return form, tuple(parts)


def _split(template: str, placeholder: str, end: str) -> list[str | tuple[str, ...]]:
    """The literal parts of a template and the places between them, as a form has them, up to the answer."""
    first, *others = template.split(placeholder)
    parts: list[str | tuple[str, ...]] = [first]
    for other in others:
        parts += [(), other]
    parts[-1] = f"{parts[-1]}{end}"
    return parts
