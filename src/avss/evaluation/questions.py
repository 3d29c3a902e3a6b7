"""The rows of a multiple-choice data set -> questions, every one of them checked."""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avss.data.sources import Row
from avss.errors import DataError
from avss.evaluation.base import find_column

QUESTION_COLUMNS = ("question", "query", "goal", "ctx", "question_stem", "prompt", "text")
CHOICES_COLUMNS = ("choices", "options", "endings")
ANSWER_COLUMNS = ("answer", "label", "gold", "answerKey", "answer_index")
PIQA_CHOICES = ("sol1", "sol2")
"""Columns that hold one choice each."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: The question itself.
        choices: The answers to choose from, at least two.
        answer: Index of the right one.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


def read_questions(
    rows: Sequence[Row], source: str, *, text_column: str | None = None, answer_column: str | None = None
) -> list[Question]:
    """Reads and checks all rows.

    The question is in `question` (or `query`, `goal`, `ctx`, `question_stem`, `prompt`, `text`), the choices are a list
    in `choices` (or `options`, `endings`, or one a column as in PIQA), the answer's index, counted from 0, is in
    `answer` (or `label`, `gold`, `answerKey`, `answer_index`). An answer may also be a letter, `A` for the first, or
    one of the names that the data give their choices (`{"text": [...], "label": [...]}`, as in ARC).

    Args:
        rows: At least one.
        source: How messages name the data.
        text_column: The question's column, if another.
        answer_column: The answer's column, if another.

    Raises:
        DataError: A column is missing, or a row is not a question with an answer; the message names the row, counted
            from 1.
    """
    question_column = find_column(rows[0], source, "question", text_column, QUESTION_COLUMNS)
    choice_columns = _choice_columns(rows[0], source)
    answer_column = find_column(rows[0], source, "answer", answer_column, ANSWER_COLUMNS)
    questions = []
    for number, row in enumerate(rows, start=1):
        where = f"Row {number} of `{source}`"
        text = row.get(question_column)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where} has no text in the column `{question_column}`. Remove the row or fill it.")
        choices, names = _choices(row, choice_columns, where)
        questions.append(Question(text, choices, _answer(row.get(answer_column), len(choices), names, where)))
    return questions


def _choice_columns(row: Row, source: str) -> tuple[str, ...]:
    if all(column in row for column in PIQA_CHOICES):
        return PIQA_CHOICES
    return (find_column(row, source, "choices", None, CHOICES_COLUMNS),)


def _choices(row: Row, columns: tuple[str, ...], where: str) -> tuple[tuple[str, ...], list[str]]:
    """The choices, and the names that the data give them, if any."""
    cells = [row.get(column) for column in columns]
    value: Any = cells if len(cells) > 1 else cells[0]
    names: list[str] = []
    if isinstance(value, Mapping) and "text" in value:
        labels = value.get("label")
        names = [str(name) for name in labels] if isinstance(labels, list | tuple | np.ndarray) else []
        value = value["text"]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{where}: the choices are `{_shown(value)}`, not a list. Give a list of texts; csv files hold no lists, "
            "jsonl and parquet do."
        )
    if len(value) < 2:
        raise DataError(
            f"{where} has {len(value)} choice. A question needs at least two; remove the row or add choices."
        )
    for choice in value:
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(
                f"{where}: the choice `{_shown(choice)}` is not a text. Give each choice as a text, none blank."
            )
    return tuple(value), names


def _answer(value: Any, num_choices: int, names: list[str], where: str) -> int:
    index = _index(value, names)
    if index is None or not 0 <= index < num_choices:
        raise DataError(
            f"{where}: the answer is `{_shown(value)}`. Allowed: an index from 0 to {num_choices - 1}, or a letter "
            f"from A to {string.ascii_uppercase[min(num_choices, 26) - 1]}. Correct the row or remove it."
        )
    return index


def _index(value: Any, names: list[str]) -> int | None:
    if isinstance(value, str):
        word = value.strip()
        if word in names:
            return names.index(word)
        if len(word) == 1 and word.upper() in string.ascii_uppercase:
            return string.ascii_uppercase.index(word.upper())
        digits = word.removeprefix("-")
        return int(word) if digits.isascii() and digits.isdigit() else None
    if isinstance(value, bool | np.bool_):
        return None
    # A column of integers with a gap somewhere comes out of a table as floats.
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    if isinstance(value, int | np.integer):
        return names.index(str(value)) if str(value) in names else int(value)
    return None


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "…"
