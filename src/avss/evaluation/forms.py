"""The forms that tasks ask in, for a repair and for healing (`avss.forms`)."""

from collections.abc import Sequence

from avss.config import TaskConfig
from avss.errors import ConfigError
from avss.evaluation import choice, classification
from avss.evaluation.labelled import asked_words, label_words
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
        form, num_sentences, answers = _choice(task) if task.kind == "choice" else _classification(task)
        try:
            parsed = Form.parse(form)
            understood = parsed.num_sentences == num_sentences and parsed.answers == answers
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


def _choice(task: TaskConfig) -> tuple[str, int, tuple[tuple[str, ...], ...]]:
    """The form, and how many sentences and which answers it has if it is understood."""
    template = task.template or choice.DEFAULT_TEMPLATE
    return f"{template.replace('{question}', '{text}')} {{text}}", template.count("{question}") + 1, ()


def _classification(task: TaskConfig) -> tuple[str, int, tuple[tuple[str, ...], ...]]:
    """The same for a classification."""
    template = task.template or classification.DEFAULT_TEMPLATE
    words = asked_words(task.labels) if task.labels else label_words(classification.read(task), None)
    count = 1 + task.shots
    form = classification.EXAMPLE_BREAK.join([f"{template} {{{'|'.join(words)}}}"] * count)
    return form, template.count("{text}") * count, (words,) * count
