"""Calibration text of random tokens, and cuts of tiny models."""

import torch

from avss.data.batches import Batches
from avss.record import DataFacts, Plan
from tests.support.architectures import VOCAB


def random_text(num_sequences: int = 16, length: int = 16, *, ragged: bool = True, batch_size: int = 4) -> Batches:
    """Sequences of drawn tokens; ragged ones need padding in their batch."""
    generator = torch.Generator().manual_seed(1)
    lengths = [length - 2 * (index % 3) if ragged else length for index in range(num_sequences)]
    sequences = tuple(torch.randint(5, VOCAB, (size,), generator=generator) for size in lengths)
    facts = DataFacts(
        source="drawn",
        layout="padded",
        num_sequences=num_sequences,
        seq_len=length,
        num_tokens=sum(lengths),
        batch_size=batch_size,
        seed=0,
        content_hash="drawn",
    )
    return Batches(sequences=sequences, batch_size=batch_size, pad_id=0, facts=facts)


def without(num_blocks: int, *removed: int) -> Plan:
    """A plan that removes these blocks."""
    return Plan(num_blocks=num_blocks, removed=removed, method="explicit", rule="by hand")
