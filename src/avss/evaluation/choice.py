"""Multiple choice: the answer that the model finds most likely."""

from collections.abc import Sequence

import numpy as np

from avss.config import TaskConfig
from avss.data.sources import read_table
from avss.errors import TaskError
from avss.evaluation.base import (
    OnStep,
    TaskResult,
    data_source,
    draw,
    measure,
    need_placeholder,
    short_source,
    text_column_of,
)
from avss.evaluation.questions import Question, read_questions
from avss.evaluation.scoring import score_continuations
from avss.models.load import Loaded

DEFAULT_TEMPLATE = "Question: {question}\nAnswer:"


def evaluate_choice(models: Sequence[Loaded], task: TaskConfig, on_step: OnStep) -> list[TaskResult]:
    """Accuracy on multiple-choice questions.

    Each choice, after one blank, is scored as the continuation of the question in the template, see
    `scoring.score_continuations`. Metrics:

    - `accuracy`: the choice with the highest score is the answer; where a score is no number, none is. A score is a sum
      over tokens, so short choices have an advantage.
    - `accuracy_norm`: the score is divided by the choice's length in UTF-8 bytes first. The `acc_norm` of
      lm-evaluation-harness, described as byte-length normalised, counts characters: the same for plain ASCII.

    Equal scores go to the first choice; of choices with one text each is as good as the other. `chance` is the mean of
    1 / number of choices.

    An encoder answers with the choice whose embedding has the largest cosine with the question's. It reads both as they
    are, without template, and has `accuracy` only: a cosine has no length to correct for.

    Raises:
        TaskError: The head cannot score text, or the template has no `{question}`.
        DataError: The data are missing, or a row is not a question.
    """
    if models[0].head == "classifier":
        raise TaskError(
            "A model with a `classifier` head knows its own labels only and cannot choose among texts. Use the task "
            "`classification`, or load the model with another `--head`."
        )
    template = need_placeholder(task.template or DEFAULT_TEMPLATE, "{question}")
    rows = read_table(data_source(task))
    questions = read_questions(
        rows, short_source(task), text_column=text_column_of(task), answer_column=task.label_column
    )
    questions = [questions[index] for index in draw(len(questions), task.limit, task.seed)]
    is_encoder = models[0].head == "encoder"
    pairs = [_pair(question, choice, template, is_encoder) for question in questions for choice in question.choices]
    scores = score_continuations(models, pairs, batch_size=task.batch_size, on_step=on_step)
    return [_result(task, questions, one, normalised=not is_encoder) for one in scores]


def _pair(question: Question, choice: str, template: str, is_encoder: bool) -> tuple[str, str]:
    # Plain replacement: questions may hold braces.
    return (question.text, choice) if is_encoder else (template.replace("{question}", question.text), f" {choice}")


def _best(scores: np.ndarray) -> int:
    """Place of the highest score; -1 where one is no number: a broken model answers nothing."""
    return -1 if np.isnan(scores).any() else int(np.argmax(scores))


def _is_right(question: Question, chosen: int) -> bool:
    return chosen >= 0 and question.choices[chosen] == question.choices[question.answer]


def _result(task: TaskConfig, questions: Sequence[Question], scores: np.ndarray, *, normalised: bool) -> TaskResult:
    ends = np.cumsum([len(question.choices) for question in questions])
    per_question = np.split(scores, ends[:-1])
    chosen = {"accuracy": np.array([_best(own) for own in per_question])}
    if normalised:
        lengths = [np.array([len(choice.encode()) for choice in question.choices]) for question in questions]
        normed = zip(per_question, lengths, strict=True)
        chosen["accuracy_norm"] = np.array([_best(own / length) for own, length in normed])
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    samples = {
        metric: np.array([float(_is_right(*pair)) for pair in zip(questions, predicted, strict=True)])
        for metric, predicted in chosen.items()
    }
    return TaskResult(
        measurements=tuple(
            measure(task, metric, correct, higher_is_better=True, chance=chance) for metric, correct in samples.items()
        ),
        samples=samples,
        predictions=chosen,
    )
