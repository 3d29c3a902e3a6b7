"""Batches as the published script makes them: texts padded to one length, in the order of a shuffled DataLoader."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from avss.data.batches import content_hash
from avss.data.sources import Texts
from avss.errors import ConfigError
from avss.record import DataFacts


@dataclasses.dataclass(frozen=True)
class PublishedBatches:
    """Rows of one length in a fixed order.

    Attributes:
        token_ids: `[N, T]`, padding included, in the order they are read.
        mask: `[N, T]`, 1 for real tokens.
        labels: `[N]`, or None where the texts have none.
        batch_size: Rows in a batch; the last batch may be shorter.
        facts: For the record.
    """

    token_ids: Tensor
    mask: Tensor
    labels: Tensor | None
    batch_size: int
    facts: DataFacts

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.token_ids) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Batches of (token ids, mask, labels)."""
        for start in range(0, len(self.token_ids), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.token_ids[part], self.mask[part], None if self.labels is None else self.labels[part]


def published_batches(
    texts: Texts,
    labels: Sequence[int] | None,
    tokenizer: Any,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    max_len: int | None = None,
) -> PublishedBatches:
    """Tokenises every text to exactly `seq_len` tokens and shuffles them as the published script does.

    The order is drawn by torch's own `DataLoader(shuffle=True)` from the *default* generator, as it stands: the script
    seeds it once, at its top, so whoever wants its order seeds it and loads the model in between.

    Args:
        texts: All of them are used.
        labels: One a text, or None.
        tokenizer: The model's. One without a padding token pads with its end-of-text token.
        seq_len: Tokens in a row; longer texts are cut.
        batch_size: Rows in a batch.
        seed: For the record only.
        max_len: The most tokens the model takes.

    Raises:
        ConfigError: The rows would be longer than the model takes, or the batch size is not positive.
    """
    if batch_size < 1 or seq_len < 2:
        raise ConfigError(f"`--batch-size {batch_size}` must be at least 1 and `--seq-len {seq_len}` at least 2.")
    if max_len is not None and seq_len > max_len:
        raise ConfigError(
            f"`--seq-len {seq_len}` is more than the {max_len} tokens that the model takes, and every text is padded "
            f"to it. Use at most {max_len}."
        )
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    encoded = tokenizer(list(texts.texts), padding="max_length", truncation=True, max_length=seq_len, verbose=False)
    order = [int(place) for batch in DataLoader(range(len(texts.texts)), batch_size, shuffle=True) for place in batch]  # pyright: ignore[reportArgumentType] (a range is a sequence)
    token_ids = torch.tensor(encoded["input_ids"], dtype=torch.long)[order]
    mask = torch.tensor(encoded["attention_mask"], dtype=torch.long)[order]
    return PublishedBatches(
        token_ids=token_ids,
        mask=mask,
        labels=None if labels is None else torch.tensor(labels, dtype=torch.long)[order],
        batch_size=batch_size,
        facts=DataFacts(
            source=texts.source,
            column=texts.column,
            layout="padded",
            num_sequences=len(order),
            seq_len=seq_len,
            num_tokens=int(mask.sum()),
            batch_size=batch_size,
            seed=seed,
            content_hash=content_hash(list(token_ids)),
        ),
    )
