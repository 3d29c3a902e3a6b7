"""The rows of a classification data set -> texts with label indices, every one of them checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avss.data.sources import TEXT_COLUMNS, Row
from avss.errors import DataError, TaskError
from avss.evaluation.base import find_column

LABEL_COLUMNS = ("label", "labels", "class", "sentiment", "target")

DEFAULT_WORDS = ("negative", "positive")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Texts and their labels.

    Attributes:
        texts: None of them blank.
        labels: Index of each text's label, in `range(num_labels)`.
        names: The labels as the data write them, in index order, where they are words; None where they are numbers.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...] | None

    @property
    def num_labels(self) -> int:
        """Labels there are: two at least, the largest index + 1 for numbers."""
        return len(self.names) if self.names else max(2, max(self.labels) + 1)


def read_labelled(
    rows: Sequence[Row],
    source: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    names: Sequence[str] | None = None,
) -> Labelled:
    """Reads and checks all rows.

    The text is in `text_column`, or the first of `avss.data.sources.TEXT_COLUMNS` that is there; the label in
    `label_column`, or in `label`, `labels`, `class`, `sentiment` or `target`. Labels are numbers from 0 on, or words.
    Words get their index from `names`, without regard to case; where none are given, from their alphabetical order.

    Args:
        rows: At least one.
        source: How messages name the data.
        text_column: The texts' column, if another.
        label_column: The labels' column, if another.
        names: Label words in index order, if known; `data=word` where the model is asked for another word than the
            data's.

    Raises:
        DataError: A column is missing, a row has no text or no label (the message names the row, counted from 1), or
            the data's words are not those named: which is which could only be guessed.
    """
    text_column = find_column(rows[0], source, "text", text_column, TEXT_COLUMNS)
    label_column = find_column(rows[0], source, "label", label_column, LABEL_COLUMNS)
    texts = [_text(row.get(text_column), f"Row {number} of `{source}`") for number, row in enumerate(rows, start=1)]
    values = [_label(row.get(label_column), f"Row {number} of `{source}`") for number, row in enumerate(rows, start=1)]
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values):
        return Labelled(tuple(texts), tuple(numbers), None)
    words = [str(value) for value in values]
    found = sorted(set(words))
    ordered = tuple(found)
    if names is not None:
        ordered = tuple(data for data, _ in map(_pair, names))
        known = {name.casefold(): name for name in ordered}
        unknown = [word for word in found if word.casefold() not in known]
        if unknown:
            raise DataError(
                f"The labels of `{source}` are {_listed(found)}, and those named are {_listed(ordered)}: which is "
                "which is not known. Name the data's own words (`--labels`), or both, as in "
                f"`{found[0]}={ordered[0]}`."
            )
        words = [known[word.casefold()] for word in words]
    if len(ordered) < 2:
        raise DataError(
            f"Every row of `{source}` has the label `{found[0]}`; a classification needs two at least. Give more rows, "
            "or all label words in the task."
        )
    return Labelled(tuple(texts), tuple(ordered.index(word) for word in words), ordered)


def label_words(data: Labelled, words: Sequence[str] | None) -> tuple[str, ...]:
    """The words by which a language model names the labels, in index order; of `data=word`, the second.

    The task's own; else the data's, where these are words; else `negative` and `positive`, where there are two.

    Raises:
        TaskError: There are more numbers than words for them, a word is blank, or two are the same.
    """
    if words is None:
        words = data.names or (DEFAULT_WORDS if data.num_labels == 2 else ())
    words = asked_words(words)
    if len(words) < data.num_labels or (data.names and len(words) != len(data.names)):
        raise TaskError(
            f"The data have {data.num_labels} labels, and the task names {len(words)} words for them "
            f"({', '.join(words) or 'none'}). Give one word a label, in the order of the labels."
        )
    if any(not word.strip() for word in words) or len({word.casefold() for word in words}) < len(words):
        raise TaskError(
            f"The label words ({', '.join(f'`{word}`' for word in words)}) must be different and not blank."
        )
    return words


def asked_words(words: Sequence[str]) -> tuple[str, ...]:
    """What the model is asked for: of `data=word`, the second.

    Example:
        >>> asked_words(["neg=terrible", "great"])
        ('terrible', 'great')
    """
    return tuple(asked for _, asked in map(_pair, words))


def _pair(word: str) -> tuple[str, str]:
    """What the data call a label, and what the model is asked for: `neg=terrible`, or one word for both."""
    data, equals, asked = word.partition("=")
    return (data.strip(), asked.strip()) if equals else (word.strip(), word.strip())


def match_classifier(
    data: Labelled, num_labels: int, label2id: Mapping[str, Any], words: Sequence[str] | None
) -> Labelled:
    """The same texts with the labels numbered as a classifier numbers them.

    Numbers are taken as they are. Words are looked up in the model's `label2id`, without regard to case; where the task
    names its own words, one for each of the model's labels, in those.

    Raises:
        DataError: A label is not one of the model's.
        TaskError: The task's words are not as many as the model's labels.
    """
    if words is not None:
        if len(words) != num_labels:
            raise TaskError(
                f"The task names {len(words)} label words, and the classifier has {num_labels} labels. Give one word a "
                "label, in the model's order."
            )
        known = {_pair(word)[0]: index for index, word in enumerate(words)}
    else:
        known = {name.casefold(): int(index) for name, index in label2id.items()}
    if data.names is None:
        for number, label in enumerate(data.labels, start=1):
            if label >= num_labels:
                raise DataError(
                    f"Row {number}: the label `{label}` is not one of the classifier's, which are 0 to "
                    f"{num_labels - 1}. Use data with the model's own labels."
                )
        return data
    names = [name if words is not None else name.casefold() for name in data.names]
    missing = [name for name, key in zip(data.names, names, strict=True) if key not in known]
    if missing:
        raise DataError(
            f"The label `{missing[0]}` is not one of the classifier's: {', '.join(map(str, known))}. Name the words in "
            "the task, in the model's order, or use numbers from 0 on."
        )
    return dataclasses.replace(data, labels=tuple(known[names[label]] for label in data.labels), names=None)


def _listed(words: Sequence[str]) -> str:
    shown = ", ".join(f"`{word}`" for word in words[:6])
    return shown if len(words) <= 6 else f"{shown}, ..."


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} has no text (`{value}`). Remove the row or fill it.")
    return value


def _label(value: Any, where: str) -> int | str:
    """A number, or a word."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value)
    if isinstance(value, bool | np.bool_):
        value = int(value)
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    if isinstance(value, int | np.integer):
        if value < 0:
            raise DataError(f"{where} has the label `{value}`. Numbers count from 0; rows without a label must go.")
        return int(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise DataError(f"{where} has the label `{value}`. Allowed: a number from 0 on, or a word.")
