"""Texts -> batches of token ids with a mask of the real ones; and batches of images (`avss.data.images`).

Language models read packed windows: the texts joined, tokenised once, cut into equal pieces, no padding. Everything
else reads one text a row, padded within its batch.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from avss.data.sources import Texts
from avss.errors import ConfigError, DataError
from avss.record import DataFacts

if TYPE_CHECKING:
    from avss.data.augment import Augmentation

Layout = Literal["packed", "padded"]

Inputs = Tensor | Mapping[str, Tensor]
"""What a model reads of one batch: token ids `[B, T]`, or its own keyword arguments (images)."""

DOCUMENT_BREAK = "\n\n"

OTHERS = 8
"""Windows kept beside each that is drawn, for a repair that reads short windows from all over the text."""

MASKED_SHARE = 0.15
"""Share of the tokens that a masked language model is asked about, as in its pretraining."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Token ids, or images, in batches, in a fixed order.

    Attributes:
        sequences: Token ids `[T]` of each sequence, without padding; of images (`facts.layout`) the pixels of each as
            the model reads them, `[channel, height, width]`.
        batch_size: Sequences in a batch.
        pad_id: Token id that fills up a batch; never observed. None where every batch is one sequence.
        facts: For the record.
        augmentation: Gives `rewritten` another writing; None to leave the sequences as they are.
        others: Windows of the same text that were not drawn, up to `OTHERS` times as many as were.
    """

    sequences: tuple[Tensor, ...]
    batch_size: int
    pad_id: int | None
    facts: DataFacts
    augmentation: "Augmentation | None" = None
    others: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.sequences) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Batches of (token ids `[B, T]`, keep `[B, T]`), padded on the right.

        Of images, batches of (the model's keyword arguments, keep `[B, T]`), T being the places of its hidden state
        that an image takes; all of them count.
        """
        for start in range(0, len(self.sequences), self.batch_size):
            part = self.sequences[start : start + self.batch_size]
            if self.facts.layout == "images":
                keep = torch.ones((len(part), self.facts.seq_len), dtype=torch.bool)
                yield {"pixel_values": torch.stack(part)}, keep
            else:
                yield pad(part, self.pad_id or 0)

    def tokens(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, for whoever reads text alone.

        Raises:
            DataError: They are of images.
        """
        for inputs, keep in self:
            if not isinstance(inputs, Tensor):
                raise DataError(f"`{self.facts.source}` holds images, and text is needed here. Give a text.")
            yield inputs, keep

    def in_batches_of(self, batch_size: int) -> "Batches":
        """The same sequences in batches of another size, or of one where nothing can fill them up."""
        batch_size = batch_size if self.pad_id is not None else 1
        facts = self.facts.model_copy(update={"batch_size": batch_size})
        return dataclasses.replace(self, batch_size=batch_size, facts=facts)

    def padded_with(self, pad_id: int | None) -> "Batches":
        """The same, filled up with a model's own token id; for None, in batches of one sequence."""
        return dataclasses.replace(self, pad_id=pad_id).in_batches_of(self.batch_size)

    def lengths(self) -> list[int]:
        """Tokens of each sequence, or places that each image takes: all the same."""
        return _lengths(self.sequences, self.facts)

    def first(self, num_tokens: int | None) -> "Batches":
        """The first sequences that hold at most so many tokens together, one at least; all of them for None."""
        if num_tokens is None:
            return self
        ends = itertools.accumulate(self.lengths())
        count = sum(end <= num_tokens for end in ends) or 1
        if count == len(self.sequences):
            return self
        part = self.sequences[:count]
        return dataclasses.replace(self, sequences=part, facts=_facts_of(part, self.facts))

    def rewritten(self) -> "Batches":
        """Some of the sequences in another writing, the same ones every time."""
        if self.augmentation is None:
            return self
        changed = [self.augmentation(one, (self.facts.seed, place)) for place, one in enumerate(self.sequences)]
        return dataclasses.replace(self.with_sequences(changed), augmentation=None)

    def with_sequences(self, sequences: Sequence[Tensor]) -> "Batches":
        """The same with other sequences in the place of its own."""
        return dataclasses.replace(self, sequences=tuple(sequences), facts=_facts_of(sequences, self.facts))

    def other_than(self, known: "Batches", num_sequences: int) -> "Batches":
        """The first sequences that are none of the known ones, so many at most.

        Raises:
            DataError: There is no other one.
        """
        seen = {one.numpy().tobytes() for one in known.sequences}
        other = tuple(one for one in self.sequences if one.numpy().tobytes() not in seen)[:num_sequences]
        if not other:
            raise DataError(
                f"`{self.facts.source}` holds nothing but {self.facts.unit} that are scored on, and damage is measured "
                "on others. Give more text, or other text."
            )
        return dataclasses.replace(self, sequences=other, facts=_facts_of(other, self.facts))

    def split(self, num_sequences: int) -> "tuple[Batches, Batches]":
        """The first sequences and the rest, as batches of their own: to choose on some and measure on others.

        Raises:
            DataError: One of the two would be empty.
        """
        if not 0 < num_sequences < len(self.sequences):
            raise DataError(
                f"`{self.facts.source}` gives {len(self.sequences)} {self.facts.unit}, which cannot be split into "
                f"{num_sequences} and some others. Give more of them or fewer `--samples`."
            )
        parts = self.sequences[:num_sequences], self.sequences[num_sequences:]
        first, rest = (dataclasses.replace(self, sequences=part, facts=_facts_of(part, self.facts)) for part in parts)
        return first, rest


def _facts_of(sequences: Sequence[Tensor], facts: DataFacts) -> DataFacts:
    """The facts with what depends on the sequences counted anew."""
    lengths = _lengths(sequences, facts)
    return facts.model_copy(
        update={
            "num_sequences": len(sequences),
            "seq_len": max(lengths),
            "num_tokens": sum(lengths),
            "content_hash": content_hash(sequences),
        }
    )


def _lengths(sequences: Sequence[Tensor], facts: DataFacts) -> list[int]:
    """Tokens of each sequence, or places that each image takes: all the same."""
    return [facts.seq_len if facts.layout == "images" else len(sequence) for sequence in sequences]


def pad(sequences: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stacks sequences of unequal length: token ids `[B, T]` and keep `[B, T]`, padding on the right."""
    length = max(len(sequence) for sequence in sequences)
    token_ids = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    keep = torch.zeros((len(sequences), length), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        token_ids[row, : len(sequence)] = sequence
        keep[row, : len(sequence)] = True
    return token_ids, keep


def masked_places(token_ids: Tensor, special_ids: Sequence[int], seed: tuple[int, ...]) -> Tensor:
    """The places of a sequence that a masked model is asked about, ascending; a function of the seed.

    `MASKED_SHARE` of those without a special token, one at least; none where every token is special.
    """
    special = torch.isin(token_ids, torch.tensor(special_ids, dtype=torch.long))
    places = torch.arange(len(token_ids))[~special].numpy()
    count = min(len(places), max(1, round(MASKED_SHARE * len(places))))
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(places, size=count, replace=False)))


def need_tokenizer(tokenizer: Any, source: str) -> Any:
    """The tokenizer.

    Raises:
        DataError: There is none.
    """
    if tokenizer is None:
        raise DataError(
            f"`{source}` has no tokenizer, so no text can be read for it. Put tokenizer files beside the model."
        )
    return tokenizer


def pad_id_of(tokenizer: Any) -> int:
    """A token id for padding; which one is without effect, since padding is masked."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0


def leading_ids(tokenizer: Any) -> list[int]:
    """`[bos]` where the tokenizer starts texts with it (Gemma and Llama want it), else nothing."""
    encoded = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and encoded[:1] == [bos] else []


def tokenise(tokenizer: Any, text: str) -> Tensor:
    """The token ids of a running text, `[N]`, without special tokens. Any length: windows are cut later."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def windows(tokenizer: Any, text: str, seq_len: int, *, least: int | None = None) -> list[Tensor]:
    """Non-overlapping windows of exactly `seq_len` tokens, BOS included where the model wants it; the rest is dropped.

    Args:
        tokenizer: The model's.
        text: A running text.
        seq_len: Tokens in a window.
        least: How many windows even a short text gives, which are shorter then; None to keep their length.

    Raises:
        DataError: The text does not fill one window.
    """
    lead = torch.tensor(leading_ids(tokenizer), dtype=torch.long)
    ids = tokenise(tokenizer, text)
    if least is not None:
        seq_len = min(seq_len, max(2, len(ids) // least) + len(lead))
    body = seq_len - len(lead)
    if body < 1:
        raise ConfigError(f"A window of `{seq_len}` token leaves no room for text; use at least 2.")
    pieces = [ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]
    if not pieces:
        raise DataError(
            f"The text has {len(ids)} tokens and does not fill one window of {seq_len}. Give more text or a smaller "
            "`--seq-len`."
        )
    return [torch.cat([lead, piece]) for piece in pieces]


def make_batches(
    texts: Texts,
    tokenizer: Any,
    *,
    layout: Layout,
    samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    max_len: int | None = None,
) -> Batches:
    """Calibration batches: a seeded draw of `samples` sequences.

    Args:
        texts: Where from.
        tokenizer: The model's.
        layout: `packed` or `padded`.
        samples: Sequences wanted; all there are, if fewer.
        seq_len: Tokens in a packed window, and the most in a padded row.
        batch_size: Sequences in a forward pass.
        seed: Of the draw.
        max_len: The most tokens the model can take; `seq_len` is lowered to it.

    Raises:
        ConfigError: A count is not positive.
        DataError: The text is too short.
    """
    for name, value in (("samples", samples), ("batch-size", batch_size)):
        if value < 1:
            raise ConfigError(f"`--{name} {value}` must be at least 1.")
    if seq_len < 2:
        raise ConfigError(f"`--seq-len {seq_len}` must be at least 2: one token has nothing after it.")
    seq_len = min(seq_len, max_len or seq_len)
    if layout == "packed":
        pool = windows(tokenizer, DOCUMENT_BREAK.join(texts.texts), seq_len, least=1)
    else:
        pool = _padded(texts, tokenizer, seq_len)
    if not pool:
        raise DataError(f"No text of `{texts.source}` has two tokens. Give longer texts.")
    order = np.random.default_rng(seed).permutation(len(pool))
    sequences = tuple(pool[index] for index in order[:samples])
    rest = order[samples : (1 + OTHERS) * samples] if layout == "packed" else ()
    return Batches(
        sequences=sequences,
        others=tuple(pool[index] for index in rest),
        batch_size=batch_size,
        pad_id=pad_id_of(tokenizer),
        facts=DataFacts(
            source=texts.source,
            column=texts.column,
            layout=layout,
            num_sequences=len(sequences),
            seq_len=max(len(sequence) for sequence in sequences),
            num_tokens=sum(len(sequence) for sequence in sequences),
            batch_size=batch_size,
            seed=seed,
            content_hash=content_hash(sequences),
        ),
    )


def interleave(parts: Sequence[Batches]) -> Batches:
    """Several texts as one, their sequences taking turns: any part of it is a mixture. Or several folders of images.

    Where one has fewer sequences than another, its turns are spread over the whole.

    Args:
        parts: At least one; made for the same model, with the same batch size.

    Raises:
        DataError: They are images of different sizes.
    """
    if len(parts) == 1:
        return parts[0]
    source = ", ".join(part.facts.source for part in parts)
    check_one_size([part.facts.image_size for part in parts], source)
    turns = sorted(
        ((index + 0.5) / len(part.sequences), place, index)
        for place, part in enumerate(parts)
        for index in range(len(part.sequences))
    )
    sequences = tuple(parts[place].sequences[index] for _, place, index in turns)
    columns = list(dict.fromkeys(part.facts.column for part in parts if part.facts.column))
    names = {"source": source, "column": ", ".join(columns) or None}
    facts = _facts_of(sequences, parts[0].facts).model_copy(update=names)
    others = tuple(itertools.chain.from_iterable(part.others for part in parts))
    return dataclasses.replace(parts[0], sequences=sequences, facts=facts, others=others)


def check_one_size(sizes: Sequence[tuple[int, ...] | None], source: str) -> None:
    """Whether images fit into one batch.

    Args:
        sizes: Height and width of each as the model reads it; None for text.
        source: Their name.

    Raises:
        DataError: They have different sizes.
    """
    found = sorted({size for size in sizes if size is not None})
    if len(found) > 1:
        raise DataError(
            f"The model's image processor keeps the shapes of images, and those of `{source}` differ: "
            f"{found[0][1]} x {found[0][0]} and {found[1][1]} x {found[1][0]}, for two. Give images of one shape."
        )


def _padded(texts: Texts, tokenizer: Any, seq_len: int) -> list[Tensor]:
    rows = list(texts.paragraphs())
    encoded = tokenizer(rows, truncation=True, max_length=seq_len, verbose=False)["input_ids"]
    return [torch.tensor(ids, dtype=torch.long) for ids in encoded if len(ids) > 1]


def content_hash(sequences: Sequence[Tensor]) -> str:
    """SHA-256 over lengths and token ids (or pixels), 16 hex digits: same hash, same data in the same order."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.numpy().tobytes())
    return digest.hexdigest()[:16]
