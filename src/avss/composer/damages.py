"""`avss.damage`: the true cost of leaving out each block."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avss.ablation import Judge, leave_one_out, table_of
from avss.composer.inputs import AnyModel, calibration, load
from avss.composer.records import now, versions, write_record
from avss.config import DataConfig
from avss.data.batches import Batches
from avss.errors import ConfigError
from avss.models.load import Loaded
from avss.output import fresh_folder
from avss.progress import Stages, silent
from avss.record import DamageTable, RunRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DAMAGE_SAMPLES, DAMAGE_BATCH_SIZE = 16, 2
"""Less text than a score's, since it is read once for each block; small batches, since hidden states and word
probabilities of a batch are kept."""


_log = logging.getLogger(__name__)


def damage(
    model: AnyModel,
    data: DataConfig | str | Sequence[str] = "builtin",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stack: str = "auto",
    stages: Stages = silent,
    samples: int = DAMAGE_SAMPLES,
    batch_size: int = DAMAGE_BATCH_SIZE,
    **settings: Any,
) -> DamageTable:
    """Measures what leaving out each block costs: the number that every criterion guesses at.

    Language models by KL divergence from their own predictions and by loss, classifiers (of texts or images) by KL
    divergence of their labels, encoders by the cosine of their embeddings; see `avss.ablation`. Computes about half the
    blocks that running all the shorter models would take, for the same numbers to the bit.

    Args:
        model: Hub id, folder, GGUF file, or a model object.
        data: The text, or the images: a source, a list, or a `DataConfig`; as for `avss.score`.
        tokenizer: For a model object.
        stack: Which stack of blocks: `auto`, or its name or path.
        stages: Where progress goes.
        samples: Sequences. A `DataConfig` has its own, and its own `batch_size`.
        batch_size: Sequences in a forward pass.
        **settings: `seq_len`, `seed`, `layout`.

    Returns:
        A table that shows itself in a notebook; `table.values` are the distances, `table.ranking()` the cheapest first.

    Raises:
        UserError: Anything the caller can fix, in one sentence.
    """
    loaded = load(model, tokenizer, stack=stack, or_disk=True)
    if loaded.note and not isinstance(model, Loaded):
        _log.warning(loaded.note)
    if not isinstance(data, DataConfig):
        settings |= {"samples": samples, "batch_size": batch_size}
    return damage_loaded(loaded, calibration(loaded, data, **settings), stages)


def damage_loaded(loaded: Loaded, batches: Batches, stages: Stages) -> DamageTable:
    """Measures a loaded model on given data."""
    judge = Judge(loaded, batches)
    with stages("Leaving out each block") as advance:
        damages = leave_one_out(judge, len(loaded.stack), on_step=advance)
    return table_of(judge, damages, model=loaded.facts(), data=batches.facts)


def write_damage(table: DamageTable, out: str | Path, *, command: str, force: bool = False) -> RunRecord:
    """Writes measured damage as a record with its table, figure and page to a new folder.

    Raises:
        OutputExistsError: The folder exists.
    """
    if table.model is None:
        raise ConfigError("This damage names no model; measure it with `avss.damage`.")
    record = RunRecord(
        created=now(), command=command, versions=versions(), model=table.model, data=table.data, damage=table
    )
    with fresh_folder(Path(out), force=force) as folder:
        write_record(record, folder)
    return record
