"""Sentences of a text in the form of prompts: what a task asks in, without the task's data.

A cut model soon forgets what a prompt is: it no longer expects a label where one is asked for, though it still reads
the sentence before it. A calibration text has no prompts in it. So some of its sentences are put into the prompts that
the model will be asked with; what is right behind them, the dense model says.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from avss.errors import ConfigError

SHARE = 0.25
"""Of a repair's sequences, those drawn to be read as prompts, where there are forms (measured, see docs/log.md)."""

HEALING_SHARE = 0.15
"""Of healing's: it takes longer, and running text pays for every one of them."""

DOTS = "..."
"""Stands for a sentence where a form is shown."""

MIN_WORDS, MAX_WORDS = 3, 45
"""Words of a sentence that is put into a prompt."""

Rows = Mapping[str, Sequence[tuple[str, ...]]]
"""Form -> sentences to fill it with, as many in a row as it has room for."""

_FIELD = re.compile(r"\{(text|[^{}\n]*\|[^{}\n]*)\}")
_UNKNOWN = re.compile(r"\{\w*\}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\s*\n\s*")
_CHARACTERS = 6
"""What counts as a word in a script without blanks."""


@dataclasses.dataclass(frozen=True)
class Form:
    r"""A prompt with room for sentences, and answers to draw from.

    Attributes:
        parts: Literal text; an empty tuple where a sentence goes; a tuple of words one of which is drawn.

    Example:
        >>> form = Form.parse("Review: {text}\nSentiment: {negative|positive}")
        >>> form.parts
        ('Review: ', (), '\nSentiment: ', ('negative', 'positive'), '')
        >>> form.filled(["It works."], np.random.default_rng(0))
        'Review: It works.\nSentiment: positive'
    """

    parts: tuple[str | tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str) -> "Form":
        """`{text}` is a sentence, the next one each time; `{one|another}` one of several words; the rest is literal.

        Raises:
            ConfigError: It has no `{text}`, or another name in braces.
        """
        pieces = _FIELD.split(text)
        unknown = next((found for piece in pieces[::2] for found in _UNKNOWN.findall(piece)), None)
        if unknown is not None or "text" not in pieces[1::2]:
            problem = f"has `{unknown}`" if unknown is not None else "has no `{text}`"
            raise ConfigError(
                f"The form `{text}` {problem}. Write `{{text}}` where a sentence belongs and, where an answer belongs, "
                "the words to choose from: `Review: {text}\\nSentiment: {negative|positive}`."
            )
        fields = [() if field == "text" else tuple(field.split("|")) for field in pieces[1::2]]
        parts: list[str | tuple[str, ...]] = [pieces[0]]
        for field, literal in zip(fields, pieces[2::2], strict=True):
            parts += [field, literal]
        return cls(tuple(parts))

    @property
    def num_sentences(self) -> int:
        """How many sentences it has room for."""
        return self.parts.count(())

    @property
    def answers(self) -> tuple[tuple[str, ...], ...]:
        """The words to draw from, for each place of an answer."""
        return tuple(part for part in self.parts if part and not isinstance(part, str))

    def filled(self, sentences: Sequence[str], draw: np.random.Generator) -> str:
        """The prompt with these sentences in it, `num_sentences` of them, and drawn answers."""
        return "".join(self.pieces(sentences, draw))

    def pieces(self, sentences: Sequence[str], draw: np.random.Generator) -> list[str]:
        """The same, a piece for each of `parts`."""
        rest = iter(sentences)
        return [
            part if isinstance(part, str) else part[int(draw.integers(len(part)))] if part else next(rest)
            for part in self.parts
        ]

    def shown(self, draw: np.random.Generator) -> str:
        """The prompt with dots where sentences belong, and drawn answers."""
        return self.filled([DOTS] * self.num_sentences, draw)


def choosing_forms(forms: Sequence[str]) -> list[str]:
    """Those that ask for one of several answers.

    Example:
        >>> choosing_forms(["Topic of {text}:", "Review: {text} {negative|positive}"])
        ['Review: {text} {negative|positive}']
    """
    return [form for form in forms if Form.parse(form).answers]


def sentences_of(text: str) -> list[str]:
    r"""The sentences and lines of a text that are of a fit length for a prompt, in order.

    Example:
        >>> sentences_of("Rain fell all night. So what?\nThe river rose by a metre.")
        ['Rain fell all night.', 'The river rose by a metre.']
    """
    pieces = (piece.strip() for piece in _SENTENCE_END.split(text))
    return [piece for piece in pieces if is_fit(piece)]


def is_fit(sentence: str, *, least: int = MIN_WORDS) -> bool:
    """Whether a sentence is of a fit length for a prompt, and is not the dots that stand for one.

    Args:
        sentence: Any text.
        least: Words that it must have.
    """
    return least <= _num_words(sentence) <= MAX_WORDS and any(map(str.isalpha, sentence))


def _num_words(text: str) -> int:
    words = len(text.split())
    return words if len(text) < 20 * words else len(text) // _CHARACTERS
