"""Calibration text of random tokens, images of noise, and cuts of tiny models."""

import torch

from avss.data.batches import Batches
from avss.models.images import count_places
from avss.models.load import Loaded
from avss.record import DataFacts, Plan
from tests.support.architectures import VOCAB
from tests.support.images import SIDE


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


def random_images(loaded: Loaded, num_images: int = 64) -> Batches:
    """Images of noise, as a tiny vision model reads them."""
    generator = torch.Generator().manual_seed(1)
    sequences = tuple(torch.randn((3, SIDE, SIDE), generator=generator) for _ in range(num_images))
    places = count_places(loaded, sequences[0])
    facts = DataFacts(
        source="drawn",
        layout="images",
        image_size=(SIDE, SIDE),
        num_sequences=num_images,
        seq_len=places,
        num_tokens=places * num_images,
        batch_size=4,
        seed=0,
        content_hash="drawn",
    )
    return Batches(sequences=sequences, batch_size=4, pad_id=None, facts=facts)


def read_by(loaded: Loaded) -> Batches:
    """What a tiny model reads: text, or images."""
    return random_images(loaded) if loaded.reads_images else random_text()


def without(num_blocks: int, *removed: int) -> Plan:
    """A plan that removes these blocks."""
    return Plan(num_blocks=num_blocks, removed=removed, method="explicit", rule="by hand")
