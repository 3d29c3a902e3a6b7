"""Short windows: the same number of tokens of a running text, from more places.

Most of what a model is asked stands at the beginning of a context, where a window of 512 tokens has a twentieth of its
own; and short windows from many places tell more of a text than a few long ones (measured, see docs/log.md).
"""

import numpy as np
import torch
from torch import Tensor

from avss.data.batches import Batches

SHORT = 64
"""Tokens of a short window."""


def can_divide(seq_len: float, num_leading: int, pad_id: int | None) -> bool:
    """Whether windows are long enough to be cut into short ones, and these can lie side by side.

    Args:
        seq_len: Tokens of a window.
        num_leading: Tokens that every window begins with.
        pad_id: What fills up a batch; None where nothing can.
    """
    return pad_id is not None and seq_len >= 2 * SHORT and num_leading < SHORT // 2


def needed(seq_len: float | None, head: str) -> str:
    """What short windows are cut from, and what there is, for a refusal.

    Args:
        seq_len: Tokens of a window; None for rows.
        head: Of the model that reads them.
    """
    there = f"rows, as the head `{head}` reads them" if seq_len is None else f"windows of {round(seq_len)}"
    return f"running text in windows of {2 * SHORT} tokens or more (`--seq-len`), and here are {there}"


def count_pieces(seq_len: int, num_leading: int) -> int:
    """Short windows in a window."""
    return (seq_len - num_leading) // (SHORT - num_leading)


def piece_of(window: Tensor, num_leading: int, number: int) -> Tensor:
    """Short window `number` of a window, which begins as every window does."""
    body = SHORT - num_leading
    start = num_leading + number * body
    return torch.cat([window[:num_leading], window[start : start + body]])


def shortened(batches: Batches, share: float, num_leading: int) -> tuple[Batches, ...]:
    """A text in batches of windows and batches of short ones, as many tokens as before.

    What is read in short windows comes from the last of the windows and from all over the rest of the text
    (`Batches.others`), in an order drawn from the seed.

    Args:
        batches: Windows of one length, for which `can_divide` holds.
        share: Of the windows, what is read in short ones: above 0 one at least.
        num_leading: Tokens that every window begins with.

    Returns:
        Batches of windows, where any are left, and batches of short ones, where there are any.
    """
    total = len(batches.sequences)
    num_long = total - (max(1, round(share * total)) if share else 0)
    long, replaced = batches.sequences[:num_long], batches.sequences[num_long:]
    parts = (batches.with_sequences(long),) if long else ()
    if not replaced:
        return parts
    pool = [*replaced, *batches.others]
    pieces = count_pieces(batches.facts.seq_len, num_leading)
    drawn = np.random.default_rng((batches.facts.seed, SHORT)).permutation(len(pool) * pieces)
    short = [
        piece_of(pool[place // pieces], num_leading, int(place % pieces)) for place in drawn[: len(replaced) * pieces]
    ]
    return (*parts, batches.with_sequences(short).in_batches_of(batches.batch_size * pieces))
