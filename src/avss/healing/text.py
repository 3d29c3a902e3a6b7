"""What to heal on: what is trained on, what is held out, and in which order it comes. All of it drawn from seeds.

Shape letters: B batch, T token.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avss.config import HealConfig, refuse_unread
from avss.data.augment import Asked, Augmentation, augmentation
from avss.data.batches import (
    DOCUMENT_BREAK,
    Batches,
    Inputs,
    Layout,
    check_one_size,
    content_hash,
    leading_ids,
    masked_places,
    need_tokenizer,
    pad,
    windows,
)
from avss.data.short import can_divide, count_pieces, needed, piece_of
from avss.data.sources import Texts
from avss.errors import DataError
from avss.forms import HEALING_SHARE, Rows
from avss.models.load import Loaded
from avss.record import DataFacts

STEP_TOKENS = 1024
"""Tokens in a step of the optimiser, about, where no number of sequences is asked for."""
HELD_OUT_TOKENS = 8192
"""Tokens held out, about, likewise."""

SHORT_SHARE = 0.5
"""Of the steps, those that read short windows, where no share is asked for."""

_STRETCHES = 8


@dataclasses.dataclass(frozen=True)
class Draw:
    """What is read next: a training sequence, or a piece of it.

    Attributes:
        epoch: How often everything of its kind was read before.
        index: Of the sequence.
        piece: Which piece of it; None for the whole.
    """

    epoch: int
    index: int
    piece: int | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences side by side, and what is asked about them.

    Attributes:
        inputs: What the models read: token ids `[B, T]`, padded on the right, or images.
        keep: True for real tokens, `[B, T]`.
        asked: Places whose prediction or state counts, `[B, T]`.
        words: The text's own token at each place asked about, -100 where there is none, `[B, T]`.
        labels: A label for each sequence, `[B]`; None without labels.
    """

    inputs: Inputs
    keep: Tensor
    asked: Tensor
    words: Tensor
    labels: Tensor | None

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return int(self.keep.sum())


@dataclasses.dataclass(frozen=True)
class HealingText:
    """Sequences to train on and sequences held out, none in both.

    Attributes:
        train: Token ids of each sequence, or pixels of each image.
        held_out: The same, never trained on.
        train_labels: A label for each of `train`; None without labels.
        held_out_labels: The same for `held_out`.
        mask_id: The mask token of a masked language model; None for other models.
        special_ids: Tokens that are never masked.
        pad_id: Fills up a batch.
        seed: Of order, masks and rewriting.
        augmentation: Rewrites training sequences, or makes prompts of them; None to leave them as they are.
        short: Share of the steps that read short windows (`avss.data.short`), every one of a step from a place of its
            own.
        num_leading: Tokens that every window begins with, of a packed text.
        facts: Of the training text, for the record.
        held_out_facts: Of the held-out text.
    """

    train: Sequence[Tensor]
    held_out: Sequence[Tensor]
    train_labels: tuple[int, ...] | None
    held_out_labels: tuple[int, ...] | None
    mask_id: int | None
    special_ids: tuple[int, ...]
    pad_id: int
    seed: int
    augmentation: Augmentation | None
    facts: DataFacts
    held_out_facts: DataFacts
    short: float = 0.0
    num_leading: int = 0

    def step(self, number: int) -> list[Draw]:
        """What step `number` of the optimiser reads, counted from 0: a batch of sequences, or as much in short windows.

        A function of the seed and the number alone, so that a resumed run reads on where it stopped.
        """
        size, num_short = self.facts.batch_size, math.floor(number * self.short)
        if math.floor((number + 1) * self.short) == num_short:
            drawn = self.drawn((number - num_short) * size, size)
            # Sequences of one length lie side by side: less padding in a part of the batch.
            return sorted(drawn, key=lambda draw: self._length(draw.index))
        pieces = self._num_pieces
        return [
            Draw(epoch, place // pieces, place % pieces)
            for epoch, place in self._order(num_short * size * pieces, size * pieces, len(self.train) * pieces, pieces)
        ]

    def drawn(self, start: int, count: int) -> list[Draw]:
        """`count` sequences from place `start` of the endless order on: each epoch in an order of its own."""
        return [Draw(*one) for one in self._order(start, count, len(self.train))]

    def _order(self, start: int, count: int, size: int, *kind: int) -> list[tuple[int, int]]:
        orders = {epoch: np.random.default_rng((self.seed, epoch, *kind)).permutation(size)
                  for epoch in range(start // size, (start + count - 1) // size + 1)}  # fmt: skip
        return [(place // size, int(orders[place // size][place % size])) for place in range(start, start + count)]

    def _length(self, index: int) -> int:
        return self.facts.seq_len if self.facts.layout == "images" else len(self.train[index])

    @property
    def _num_pieces(self) -> int:
        """Short windows in a sequence: all packed ones are equally long."""
        return count_pieces(self.facts.seq_len, self.num_leading)

    def _sequence(self, draw: Draw) -> Tensor:
        whole = self.train[draw.index]
        return whole if draw.piece is None else piece_of(whole, self.num_leading, draw.piece)

    def batch(self, drawn: Sequence[Draw]) -> Batch:
        """What was drawn, side by side."""
        labels = None if self.train_labels is None else [self.train_labels[draw.index] for draw in drawn]
        # A whole sequence has the seed that it would have without short windows.
        seeds = [
            (self.seed, 1 + draw.epoch, draw.index, *(() if draw.piece is None else (draw.piece,))) for draw in drawn
        ]
        sequences = [self._sequence(draw) for draw in drawn]
        if self.augmentation is None:
            return self._batch(sequences, labels, seeds)
        read = [self._read(sequence, seed) for sequence, seed in zip(sequences, seeds, strict=True)]
        batch = self._batch([sequence for sequence, _ in read], labels, seeds)
        # The answers in prompts are drawn: no text's own words.
        batch.words[[not is_text for _, is_text in read]] = -100
        return batch

    def with_rows(self, rows: Rows) -> "HealingText":
        """The same with given sentences in its prompts, where there are any for a form."""
        assert self.augmentation is not None
        return dataclasses.replace(self, augmentation=self.augmentation.with_rows(rows))

    def held_out_batches(self) -> Batches:
        """The held-out sequences as calibration text, one at a time."""
        return Batches(tuple(self.held_out), 1, self.pad_id, self.held_out_facts.model_copy(update={"batch_size": 1}))

    def asked(self) -> list[Asked]:
        """The given sentences as prompts, up to their answers."""
        return [] if self.augmentation is None else self.augmentation.asked((self.seed,))

    def _read(self, sequence: Tensor, seed: tuple[int, ...]) -> tuple[Tensor, bool]:
        """A training sequence as it is read, and whether that is text rather than prompts."""
        assert self.augmentation is not None
        prompts = self.augmentation.as_prompts(sequence, seed)
        if prompts is not None:
            return prompts, False
        return self.augmentation.rewritten(sequence, seed), True

    def held_out_batch(self, indices: Sequence[int]) -> Batch:
        """Held-out sequences; masked the same way every time."""
        labels = None if self.held_out_labels is None else [self.held_out_labels[index] for index in indices]
        return self._batch([self.held_out[index] for index in indices], labels, [(self.seed, 0, i) for i in indices])

    def _batch(self, sequences: list[Tensor], labels: list[int] | None, seeds: Sequence[tuple[int, ...]]) -> Batch:
        if self.facts.layout == "images":
            check_one_size([tuple(one.shape[1:]) for one in sequences], self.facts.source)
            keep = torch.ones((len(sequences), self.facts.seq_len), dtype=torch.bool)
            words = torch.full_like(keep, -100, dtype=torch.long)
            return Batch({"pixel_values": torch.stack(sequences)}, keep, keep, words, None)
        token_ids, keep = pad(sequences, self.pad_id)
        words = torch.full_like(token_ids, -100)
        if self.mask_id is None:
            words[:, :-1] = torch.where(keep[:, 1:], token_ids[:, 1:], -100)
            return Batch(token_ids, keep, keep, words, None if labels is None else torch.tensor(labels))
        asked = torch.zeros_like(keep)
        for row, (sequence, seed) in enumerate(zip(sequences, seeds, strict=True)):
            asked[row, masked_places(sequence, self.special_ids, seed)] = True
        words[asked] = token_ids[asked]
        return Batch(token_ids.masked_fill(asked, self.mask_id), keep, asked, words, None)


def prepare_text(
    loaded: Loaded, texts: Texts, config: HealConfig, *, labels: Sequence[int] | None = None
) -> HealingText:
    """Tokenises a text and sets a part of it aside.

    A language model reads packed windows. The held-out ones are the ends of up to eight stretches of the text: whole
    passages, from all over it. Other models read a text a row, and held-out rows are drawn.

    Args:
        loaded: The model.
        texts: Where from.
        config: `seq_len`, `batch_size`, `held_out`, `short`, `augment`, `forms` and `seed` count; what it leaves
            open is in the facts afterwards.
        labels: One a text, for classifiers.

    Raises:
        DataError: No tokenizer, no mask token for a masked model, or too little text to hold some of it out.
        ConfigError: Forms of prompts are no forms, or not for such a model; or short windows are asked for where there
            are none.
    """
    tokenizer = need_tokenizer(loaded.tokenizer, loaded.source)
    if loaded.head == "masked" and tokenizer.mask_token_id is None:
        raise DataError(
            f"The tokenizer of `{loaded.source}` has no mask token, which a model with a `masked` head is trained "
            "with. Add it to the tokenizer's special tokens, or load the model with `--head encoder`."
        )
    seq_len = min(config.seq_len, loaded.max_len or config.seq_len)
    packed = loaded.head == "causal" and labels is None
    if packed:
        sequences, kept_labels = windows(tokenizer, DOCUMENT_BREAK.join(texts.texts), seq_len, least=2), None
    else:
        sequences, kept_labels = _rows(tokenizer, texts, seq_len, labels, masked=loaded.head == "masked")
    if len(sequences) < 2:
        raise DataError(
            f"`{texts.source}` gives {len(sequences)} sequence{'s' if len(sequences) != 1 else ''} of up to {seq_len} "
            "tokens, and healing needs one to train on and one held out at least. Give more text or a smaller "
            "`--seq-len`."
        )
    length = sum(len(sequence) for sequence in sequences) / len(sequences)
    batch_size = config.batch_size or min(32, max(2, round(STEP_TOKENS / length)))
    wanted = config.held_out or min(512, max(16, round(HELD_OUT_TOKENS / length)))
    num_held_out = min(wanted, max(1, len(sequences) // 5))
    held = _ends(len(sequences), num_held_out) if packed else _some(len(sequences), num_held_out, config.seed)
    rest = [index for index in range(len(sequences)) if index not in held]
    train, held_out = (tuple(sequences[index] for index in chosen) for chosen in (rest, sorted(held)))

    layout: Layout = "packed" if packed else "padded"
    rewriting = augmentation(
        tokenizer,
        loaded.head,
        config.augment,
        layout,
        forms=config.forms or (),
        form_share=HEALING_SHARE,
        labelled=labels is not None,
    )

    def facts(chosen: tuple[Tensor, ...]) -> DataFacts:
        return DataFacts(
            source=texts.source,
            column=texts.column,
            layout=layout,
            num_sequences=len(chosen),
            seq_len=max(len(sequence) for sequence in chosen),
            num_tokens=sum(len(sequence) for sequence in chosen),
            batch_size=batch_size,
            seed=config.seed,
            content_hash=content_hash(chosen),
        )

    num_leading = len(leading_ids(tokenizer)) if packed else 0
    divides = packed and can_divide(length, num_leading, loaded.pad_id)
    if not divides:
        refuse_unread({"short": config.short or None}, needed(length if packed else None, loaded.head))

    return HealingText(
        train=train,
        held_out=held_out,
        train_labels=None if kept_labels is None else tuple(kept_labels[index] for index in rest),
        held_out_labels=None if kept_labels is None else tuple(kept_labels[index] for index in sorted(held)),
        mask_id=tokenizer.mask_token_id if loaded.head == "masked" else None,
        special_ids=tuple(tokenizer.all_special_ids),
        pad_id=loaded.pad_id or 0,
        seed=config.seed,
        augmentation=rewriting,
        facts=facts(train),
        held_out_facts=facts(held_out),
        short=(SHORT_SHARE if config.short is None else config.short) if divides else 0.0,
        num_leading=num_leading,
    )


def _rows(
    tokenizer: object, texts: Texts, seq_len: int, labels: Sequence[int] | None, *, masked: bool
) -> tuple[list[Tensor], list[int] | None]:
    rows = list(texts.texts if labels is not None else texts.paragraphs())
    encoded = tokenizer(rows, truncation=True, max_length=seq_len, verbose=False)["input_ids"]  # type: ignore[operator]
    # One token is no text; with a label it still is an example.
    chosen = [index for index, ids in enumerate(encoded) if len(ids) > (labels is None)]
    if masked:
        special = set(tokenizer.all_special_ids)  # type: ignore[attr-defined]
        chosen = [index for index in chosen if not special.issuperset(encoded[index])]
    sequences = [torch.tensor(encoded[index], dtype=torch.long) for index in chosen]
    return sequences, None if labels is None else [labels[index] for index in chosen]


def _ends(total: int, count: int) -> set[int]:
    """The last windows of each of several equal stretches, `count` in all."""
    stretches = min(_STRETCHES, count)
    held: set[int] = set()
    for stretch in range(stretches):
        stop = total * (stretch + 1) // stretches
        share = count * (stretch + 1) // stretches - count * stretch // stretches
        held.update(range(stop - share, stop))
    return held


def _some(total: int, count: int, seed: int) -> set[int]:
    return {int(index) for index in np.random.default_rng(seed).permutation(total)[:count]}
