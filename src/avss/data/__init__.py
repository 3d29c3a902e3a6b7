"""Text in: sources of every common kind, and batches of token ids out of them."""

from avss.data.batches import Batches, make_batches
from avss.data.sources import BUILTIN, Texts, read_table, read_texts

__all__ = ["BUILTIN", "Batches", "Texts", "make_batches", "read_table", "read_texts"]
