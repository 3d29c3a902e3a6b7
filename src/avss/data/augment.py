"""The same text in another writing: what a model must also read, though its calibration text has none of it.

A text file is in one writing: sentences, capitals, punctuation. Trained on that alone, a cut model answers as the dense
one does there and less so on lower case, on tokenised text, on lists. Distillation may change its inputs at will, since
the dense model says what is right for whatever comes out. Likewise some of it is read in the form of prompts
(`avss.forms`).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from avss.data.batches import Layout, leading_ids, tokenise
from avss.errors import ConfigError
from avss.forms import SHARE, Form, Rows, sentences_of

_PUNCTUATION = re.compile(r"[^\w\s]")
_BLANKS = re.compile(r"(?<=\S) {2,}")
_LETTER = r"[^\W\d_]"
_ENDING = re.compile(rf"(?<={_LETTER})(?=n['’]t\b)|(?<={_LETTER})(?=['’](?!t\b){_LETTER}+\b)")
"""Where treebanks part a short ending from its word: it|'s, do|n't."""
_WITHIN = re.compile(
    rf"(?P<joint>(?<=\d)[.,](?=\d)|(?<=\w)-(?=\w))|(?P<ending>['’](?={_LETTER}))|(?P<initial>(?<=\b{_LETTER})(?<!['’]{_LETTER})\.)"
)
"""Marks inside a number or a word, before an ending, and after a letter that stands for a word."""
_LINE_BREAKS = re.compile(r"\s*\n\s*")

LOWER, UPPER = 0.4, 0.06
"""Shares of rewritten texts in lower and in upper case."""
APART, WITHOUT = 0.4, 0.15
"""Shares with punctuation set apart by blanks, and without punctuation."""
Style = Literal["every", "penn", "moses"]
STYLES: tuple[Style, ...] = get_args(Style)
"""How punctuation is set apart, each as often; see `apart`."""
JOINED = 0.3
"""Share with its lines joined."""
GAPPED, GAP = 0.2, 0.1
"""Share that lacks words, and which share of its words."""

JUDGING = 4
"""Of the rows given to fill prompts with answers, every fourth is kept out of windows: nothing is fitted to it, and it
judges."""

DEFAULT_SHARE = 0.5
"""Of the sequences of a model that continues text, where none is asked for (measured, see docs/log.md)."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt up to the place where one of several answers is asked for.

    Attributes:
        token_ids: `[T]`; the answer would be next.
        words: The token that each answer begins with, all different.
        row: The number of the row that fills it: prompts of one row differ in their writing alone.
    """

    token_ids: Tensor
    words: tuple[int, ...]
    row: int


class Prompts:
    """Windows of prompts.

    Args:
        tokenizer: Of the model.
        forms: The prompts' forms, see `Form.parse`; one is drawn for each prompt.
        rows: What fills forms in place of the sentences of the text, where there is any for a form; of windows, all
            but those that judge (`JUDGING`), where a form asks for one of several answers.

    Raises:
        ConfigError: A form is none.
    """

    def __init__(self, tokenizer: Any, forms: Sequence[str], rows: Rows | None = None) -> None:
        self._forms = [Form.parse(form) for form in forms]
        self._rows = {Form.parse(form): some for form, some in (rows or {}).items() if some}
        # Rows are numbered on from form to form.
        sizes = itertools.accumulate(map(len, self._rows.values()), initial=0)
        self._first = dict(zip(self._rows, sizes, strict=False))
        self._fitted = {
            form: [row for place, row in enumerate(some, self._first[form]) if place % JUDGING or not form.answers]
            or list(some)
            for form, some in self._rows.items()
        }
        self._tokenizer = tokenizer
        lead, end = leading_ids(tokenizer), tokenizer.eos_token_id
        self._lead = torch.tensor(lead, dtype=torch.long)
        # Each prompt is a text of its own, as texts stand side by side in pretraining.
        self._break = torch.tensor([end, *lead], dtype=torch.long) if isinstance(end, int) else None

    def window(
        self,
        sentences: Sequence[str],
        num_tokens: int,
        draw: np.random.Generator,
        written: Callable[[str], str] = lambda sentence: sentence,
    ) -> Tensor | None:
        """Prompts one after the other, `[T]`, cut off at `num_tokens`; None where the sentences fill no prompt.

        Args:
            sentences: Of a text, as they will stand there.
            num_tokens: Most tokens.
            draw: Decides.
            written: How a given row's sentence will stand there.
        """
        rest = list(sentences)
        found: list[Tensor] = []
        length = 0
        while length < num_tokens:
            fitting = [form for form in self._forms if form in self._rows or form.num_sentences <= len(rest)]
            if not fitting:
                break
            form = fitting[int(draw.integers(len(fitting)))]
            rows = self._fitted.get(form)
            if rows is None:
                taken, rest = rest[: form.num_sentences], rest[form.num_sentences :]
            else:
                taken = [written(sentence) for sentence in rows[int(draw.integers(len(rows)))]]
            prompt = form.filled(taken, draw)
            between = self._lead if not found else self._break
            if between is None:
                between = tokenise(self._tokenizer, "\n\n")
            found += [between, tokenise(self._tokenizer, prompt)]
            length += len(found[-1]) + len(between)
        return torch.cat(found)[:num_tokens] if found else None

    def asked(
        self, draw: np.random.Generator, written: Callable[[str], str] = lambda sentence: sentence
    ) -> list[Asked]:
        """Prompts of each given row up to the first answer, where each answer begins with a token of its own.

        Args:
            draw: Of what stands in a prompt beside its sentences.
            written: Another writing of a sentence; each row is asked in it too where it differs.
        """
        found = []
        for form, rows in self._rows.items():
            first = next((place for place, part in enumerate(form.parts) if part and not isinstance(part, str)), None)
            for number, row in enumerate(rows if first is not None else (), self._first[form]):
                for sentences in dict.fromkeys((row, tuple(map(written, row)))):
                    before = "".join(form.pieces(sentences, draw)[:first])
                    one = self._asked(before, form.parts[first or 0], number)
                    found += [one] if one is not None else []
        return found

    def _asked(self, before: str, answers: Sequence[str], row: int) -> Asked | None:
        # A blank belongs to the word behind it.
        head = tokenise(self._tokenizer, before.rstrip(" "))
        next_tokens = [_next_token(tokenise(self._tokenizer, before + answer), head) for answer in answers]
        words = tuple(token for token in next_tokens if token is not None)
        if not len(head) or len(set(words)) != len(next_tokens):
            return None
        return Asked(torch.cat([self._lead, head]), words, row)


def _next_token(token_ids: Tensor, head: Tensor) -> int | None:
    """The token behind a beginning; None where the text does not begin so, or ends there."""
    begins = len(token_ids) > len(head) and torch.equal(token_ids[: len(head)], head)
    return int(token_ids[len(head)]) if begins else None


class Augmentation:
    """Another writing, or the form of prompts, for some sequences of token ids.

    Args:
        tokenizer: Reads and writes.
        share: Of the sequences, those drawn to be rewritten; an attribute too. By chance one in seven of them stays as
            it is, and more where the tokenizer does not tell writings apart, e.g. an uncased one.
        layout: `packed` windows of a running text, or `padded` rows with the tokenizer's special tokens.
        forms: Forms of prompts (`avss.forms.Form`); an attribute too. Where there are any, a quarter of the
            sequences (`form_share`) is drawn for them first. For `packed` windows.
        form_share: That quarter, or another share; an attribute too.
        rows: See `Prompts`.

    Raises:
        ConfigError: A form is none.
    """

    def __init__(
        self,
        tokenizer: Any,
        share: float,
        layout: Layout,
        forms: Sequence[str] = (),
        *,
        form_share: float = SHARE,
        rows: Rows | None = None,
    ) -> None:
        self.share, self.forms = share, tuple(forms)
        self.form_share = form_share
        self._tokenizer = tokenizer
        self._layout: Layout = layout
        self._lead = torch.tensor(leading_ids(tokenizer) if layout == "packed" else [], dtype=torch.long)
        self._special = set(tokenizer.all_special_ids)
        self._prompts = Prompts(tokenizer, forms, rows) if forms else None

    def __call__(self, token_ids: Tensor, seed: tuple[int, ...]) -> Tensor:
        """The sequence `[T]` as it is, rewritten or as prompts, a function of it and the seed; never longer."""
        prompts = self.as_prompts(token_ids, seed)
        return self.rewritten(token_ids, seed) if prompts is None else prompts

    def with_rows(self, rows: Rows) -> "Augmentation":
        """The same with given sentences in its forms."""
        return Augmentation(
            self._tokenizer, self.share, self._layout, self.forms, form_share=self.form_share, rows=rows
        )

    def asked(self, seed: tuple[int, ...]) -> list[Asked]:
        """The given rows as prompts, up to their answers: as they are and, where some are rewritten, rewritten too."""
        if self._prompts is None:
            return []
        draw = np.random.default_rng((*seed, 3))
        return self._prompts.asked(draw, self._written(draw, float(self.share > 0)))

    def _written(self, draw: np.random.Generator, share: float) -> Callable[[str], str]:
        """How a sentence is written: as it is or, for a share of them, in another writing that leaves some of it."""

        def written(sentence: str) -> str:
            other = rewrite(sentence, draw) if draw.random() < share else sentence
            return other if other.strip() else sentence

        return written

    def as_prompts(self, token_ids: Tensor, seed: tuple[int, ...]) -> Tensor | None:
        """Prompts of the sequence's sentences, some of them rewritten; None where it was not drawn, or has none."""
        if self._prompts is None:
            return None
        draw = np.random.default_rng((*seed, 2))
        if draw.random() >= self.form_share:
            return None
        sentences = [
            rewrite(sentence, draw) if draw.random() < self.share else sentence
            for sentence in sentences_of(self._text(token_ids))
        ]
        kept = [one for one in sentences if one.strip()]
        return self._prompts.window(kept, len(token_ids), draw, self._written(draw, self.share))

    def rewritten(self, token_ids: Tensor, seed: tuple[int, ...]) -> Tensor:
        """The sequence in another writing, or as it is."""
        draw = np.random.default_rng((*seed, 1))
        if draw.random() >= self.share:
            return token_ids
        text = rewrite(self._text(token_ids), draw)
        if self._layout == "packed":
            found = torch.cat([self._lead, tokenise(self._tokenizer, text)])[: len(token_ids)]
        else:
            encoded = self._tokenizer(text, truncation=True, max_length=len(token_ids), verbose=False)
            found = torch.tensor(encoded["input_ids"], dtype=torch.long)
        has_words = any(token not in self._special for token in found.tolist())
        return found if has_words and len(found) > 1 else token_ids

    def _text(self, token_ids: Tensor) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # Half a character at a window's end is no character.
        return text.strip("\ufffd")


def augmentation(
    tokenizer: Any,
    head: str,
    share: float | None,
    layout: Layout,
    *,
    forms: Sequence[str] = (),
    form_share: float = SHARE,
    labelled: bool = False,
) -> Augmentation | None:
    """What rewrites the sequences for a model; None to leave them as they are.

    Args:
        tokenizer: The model's.
        head: The model's.
        share: Of the sequences; None for `DEFAULT_SHARE` where the model continues text, else none.
        layout: Of the sequences.
        forms: Forms of prompts.
        form_share: Of the sequences, those read as prompts, where there are forms.
        labelled: Whether the texts carry labels, which another writing might belie.

    Raises:
        ConfigError: There are forms, and the model does not continue text, or reads labelled rows; or one is none.
    """
    check_forms(forms, head, layout)
    if share is None:
        share = DEFAULT_SHARE if head == "causal" and not labelled else 0.0
    return Augmentation(tokenizer, share, layout, forms, form_share=form_share) if share or forms else None


def check_forms(forms: Sequence[str], head: str, layout: Layout = "packed") -> None:
    """Whether a model can be read prompts to.

    Args:
        forms: Of the prompts; none are always in order.
        head: The model's.
        layout: Of its sequences.

    Raises:
        ConfigError: It does not continue running text.
    """
    if forms and (head != "causal" or layout != "packed"):
        what = "texts a row" if head == "causal" else f"a `{head}` head"
        raise ConfigError(
            f"Forms of prompts (`--form`) are for models that continue running text, not for {what}. Leave them out."
        )


def apart(text: str, style: Style) -> str:
    """The text with its punctuation set apart by blanks, in one of the ways that tokenised corpora have.

    Args:
        text: Any.
        style: `every`: each mark by itself. `penn`, as treebanks are written: marks within words and numbers stay,
            short endings are parted from their word. `moses`, as translation corpora and WikiText are: marks within
            words and numbers stand between at signs, an apostrophe goes with what follows.

    Example:
        >>> text = "He didn't pay $1,500 (it's well-known)."
        >>> for style in STYLES:
        ...     print(apart(text, style))
        He didn ' t pay $ 1 , 500 ( it ' s well - known ) .
        He did n't pay $ 1,500 ( it 's well-known ) .
        He didn 't pay $ 1 @,@ 500 ( it 's well @-@ known ) .
    """
    if style == "every":
        parted = _PUNCTUATION.sub(r" \g<0> ", text)
    elif style == "penn":
        parted = _around(_ENDING.sub(" ", text), joint="{}", ending="{}")
    else:
        parted = _around(text, joint=" @{}@ ", ending=" {}")
    return _BLANKS.sub(" ", parted).strip(" ")


def _around(text: str, **within: str) -> str:
    """Sets marks apart, but for those within words and numbers, which are written as told, and those of initials."""

    def written(found: re.Match[str]) -> str:
        inside = _WITHIN.match(text, found.start())
        form = " {} " if inside is None else within.get(str(inside.lastgroup), "{}")
        return form.format(found.group())

    return _PUNCTUATION.sub(written, text)


def rewrite(text: str, draw: np.random.Generator) -> str:
    """The text in another writing, or by chance (one in seven) as it is.

    Four things are drawn apart from each other: its case, what becomes of its punctuation, whether its lines are
    joined, and whether every tenth word is missing.

    Args:
        text: Any.
        draw: Decides; equal draws give equal texts.
    """
    case, marks, lines, words = draw.random(4)
    if case < LOWER:
        text = text.lower()
    elif case < LOWER + UPPER:
        text = text.upper()
    if marks < APART:
        # The same draw says which of the three ways.
        text = apart(text, STYLES[int(marks / APART * len(STYLES))])
    elif marks < APART + WITHOUT:
        text = _PUNCTUATION.sub("", text)
    if lines < JOINED:
        text = _LINE_BREAKS.sub(" ", text)
    if words < GAPPED:
        all_words = text.split(" ")
        kept = draw.random(len(all_words)) >= GAP
        text = " ".join(word for word, keeps in zip(all_words, kept, strict=True) if keeps)
    return text
