"""The same text in another writing: what a model must also read, though its calibration text has none of it.

A text file is in one writing: sentences, capitals, punctuation. Trained on that alone, a cut model answers as the dense
one does there and less so on lower case, on tokenised text, on lists. Distillation may change its inputs at will, since
the dense model says what is right for whatever comes out.
"""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avss.data.batches import Layout, leading_ids, tokenise

_PUNCTUATION = re.compile(r"[^\w\s]")
_LINE_BREAKS = re.compile(r"\s*\n\s*")

LOWER, UPPER = 0.4, 0.06
"""Shares of rewritten texts in lower and in upper case."""
APART, WITHOUT = 0.4, 0.15
"""Shares with punctuation set apart by blanks, and without punctuation."""
JOINED = 0.3
"""Share with its lines joined."""
GAPPED, GAP = 0.2, 0.1
"""Share that lacks words, and which share of its words."""

DEFAULT_SHARE = 0.5
"""Of the sequences of a model that continues text, where none is asked for (measured, see docs/log.md)."""


class Augmentation:
    """Another writing of some sequences of token ids.

    Args:
        tokenizer: Reads and writes.
        share: Of the sequences, those drawn to be rewritten; an attribute too. By chance one in seven of them stays as
            it is, and more where the tokenizer does not tell writings apart, e.g. an uncased one.
        layout: `packed` windows of a running text, or `padded` rows with the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, share: float, layout: Layout) -> None:
        self.share = share
        self._tokenizer, self._layout = tokenizer, layout
        self._lead = torch.tensor(leading_ids(tokenizer) if layout == "packed" else [], dtype=torch.long)
        self._special = set(tokenizer.all_special_ids)

    def __call__(self, token_ids: Tensor, seed: tuple[int, ...]) -> Tensor:
        """The sequence `[T]` as it is or rewritten, a function of it and the seed; never longer than it was."""
        draw = np.random.default_rng((*seed, 1))
        if draw.random() >= self.share:
            return token_ids
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # Half a character at a window's end is no character.
        text = rewrite(text.strip("\ufffd"), draw)
        if self._layout == "packed":
            found = torch.cat([self._lead, tokenise(self._tokenizer, text)])[: len(token_ids)]
        else:
            encoded = self._tokenizer(text, truncation=True, max_length=len(token_ids), verbose=False)
            found = torch.tensor(encoded["input_ids"], dtype=torch.long)
        has_words = any(token not in self._special for token in found.tolist())
        return found if has_words and len(found) > 1 else token_ids


def augmentation(
    tokenizer: Any, head: str, share: float | None, layout: Layout, *, labelled: bool = False
) -> Augmentation | None:
    """What rewrites the sequences for a model; None to leave them as they are.

    Args:
        tokenizer: The model's.
        head: The model's.
        share: Of the sequences; None for `DEFAULT_SHARE` where the model continues text, else none.
        layout: Of the sequences.
        labelled: Whether the texts carry labels, which another writing might belie.
    """
    if share is None:
        share = DEFAULT_SHARE if head == "causal" and not labelled else 0.0
    return Augmentation(tokenizer, share, layout) if share else None


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
        text = _PUNCTUATION.sub(r" \g<0> ", text)
    elif marks < APART + WITHOUT:
        text = _PUNCTUATION.sub("", text)
    if lines < JOINED:
        text = _LINE_BREAKS.sub(" ", text)
    if words < GAPPED:
        all_words = text.split(" ")
        kept = draw.random(len(all_words)) >= GAP
        text = " ".join(word for word, keeps in zip(all_words, kept, strict=True) if keeps)
    return text
