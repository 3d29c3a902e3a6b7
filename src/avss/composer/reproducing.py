"""`avss.reproduce`: what the published script measures, on the same batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from avss.composer.inputs import AnyModel, load
from avss.composer.records import now, versions, write_record
from avss.criteria import CRITERIA
from avss.data.batches import need_tokenizer
from avss.data.published import PublishedBatches, published_batches
from avss.data.sources import Texts, read_table, read_texts
from avss.errors import ConfigError, DataError
from avss.evaluation.labelled import LABEL_COLUMNS, match_classifier, read_labelled
from avss.models.load import Loaded
from avss.models.sublayers import WeightChoice
from avss.output import fresh_folder
from avss.progress import Stages, silent
from avss.record import BlockScores, PublishedMetrics, RunRecord
from avss.reproduction import reproduce_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEQ_LEN, BATCH_SIZE, SEED = 128, 8, 42
"""The settings of the published SST-2 script."""


def reproduce(
    model: AnyModel,
    data: str | Path | Sequence[str],
    *,
    weights: WeightChoice = "ffn",
    samples: int | None = None,
    seq_len: int = SEQ_LEN,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
    head: str = "auto",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stages: Stages = silent,
    **loading: Any,
) -> PublishedMetrics:
    """Measures what the published AVSS script measures: variance, sparsity, gradient and weight norms of every block.

    Follows the script for SST-2: all texts padded to one length, padding counted, the attention mask passed, the loss
    of the model with the labels of the data, batches in the order of torch's shuffled `DataLoader`. The generator is
    seeded where the script seeds it, before the model is loaded, so a head that the checkpoint lacks gets the same
    weights, and the batches the same order; afterwards the caller's generator is as it was. A language model predicts
    its own input ids, padding included, as in the scripts for language models (which pass no mask; here it is passed).

    Args:
        model: Hub id, folder, GGUF file, or a model object.
        data: A table with texts and, for a classifier, labels; or texts.
        weights: Whose gradients and weights are measured: `ffn`, `attention` or `all`.
        samples: Texts, from the first on; all if None.
        seq_len: Tokens in a row.
        batch_size: Rows in a batch.
        seed: Of the head and the order.
        head: `auto` takes the class named in the config; a model without a loss of its own, or a masked language model,
            becomes a classifier, as in the script.
        tokenizer: For a model object.
        stages: Where progress goes.
        **loading: `dtype`, `device`, `revision`, `trust_remote_code`.

    Raises:
        UserError: Anything the caller can fix, in one sentence.
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"`--samples {samples}` must be at least 1.")
    texts = read_texts(data)
    texts = Texts(texts.paragraphs(), texts.source, texts.column)
    with torch.random.fork_rng(devices=[]):
        with stages("Loading the model"):
            loaded = _load_seeded(model, tokenizer, head=head, seed=seed, **loading)
            loaded.check_reads_text("`--reference`")
        labels = None
        if loaded.head == "classifier":
            texts, labels = _labelled(data, texts, loaded)
        if samples is not None:
            texts = Texts(texts.texts[:samples], texts.source, texts.column)
            labels = None if labels is None else labels[:samples]
        batches = published_batches(
            texts,
            labels,
            need_tokenizer(loaded.tokenizer, loaded.source),
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            max_len=loaded.max_len,
        )
    with stages("Measuring blocks") as advance:
        metrics = reproduce_metrics(loaded, batches, weights=weights, on_batch=_counter(advance, len(batches)))
    return metrics.model_copy(
        update={"model": loaded.facts(), "data": batches.facts, "notes": _notes(loaded, batches, metrics)}
    )


def _counter(advance: Callable[[int, int], None], total: int) -> Callable[[], None]:
    done = 0
    advance(0, total)

    def on_batch() -> None:
        nonlocal done
        done += 1
        advance(done, total)

    return on_batch


def _load_seeded(model: AnyModel, tokenizer: Any, *, head: str, seed: int, **loading: Any) -> Loaded:
    torch.default_generator.manual_seed(seed)
    loaded = load(model, tokenizer, head=head, **loading)
    loaded.check_in_memory("`--reference`, which measures gradients,")
    if isinstance(model, str | Path) and head == "auto" and loaded.head in ("encoder", "masked"):
        torch.default_generator.manual_seed(seed)
        loaded = load(model, tokenizer, head="classifier", **loading)
    return loaded


def _labelled(data: str | Path | Sequence[str], texts: Texts, loaded: Loaded) -> tuple[Texts, tuple[int, ...]]:
    if not isinstance(data, str | Path) or texts.column is None:
        raise DataError(
            f"`{loaded.source}` is a classifier, and `{texts.source}` has no labels for its loss. Give a table with a "
            f"label column ({', '.join(LABEL_COLUMNS)}), or another `--head`."
        )
    read = read_labelled(read_table(data), texts.source, text_column=texts.column)
    matched = match_classifier(read, loaded.model.config.num_labels or 0, loaded.model.config.label2id or {}, None)
    return Texts(matched.texts, texts.source, texts.column), matched.labels


def _notes(loaded: Loaded, batches: PublishedBatches, metrics: PublishedMetrics) -> tuple[str, ...]:
    targets = "the labels of the data" if batches.labels is not None else "the input ids, padding included"
    notes = [
        f"As published for SST-2: {len(batches.token_ids):,} texts padded to {batches.facts.seq_len} tokens, in "
        f"{len(batches):,} batches of {batches.batch_size}, shuffled by torch's DataLoader after seed "
        f"{batches.facts.seed}; padding counts in variance and sparsity; the loss is the model's own on {targets}.",
        "The attention mask is passed, as in the SST-2 script; the published scripts for language models pass none, so "
        "that their models attend to padding.",
        f"Gradients and weights of {', '.join(f'`{name}`' for name in metrics.matrices)} in each block "
        f"(`--weights {metrics.weights}`).",
    ]
    silent_blocks = [block for block, share in enumerate(metrics.sparsity) if share == 0]
    if silent_blocks:
        notes.append(
            f"No activation of block {', '.join(map(str, silent_blocks))} is below 1e-5, so the published AVSS divides "
            "by 0 there. `avss score --criteria avss` smooths the count."
        )
    return tuple(notes)


def published_scores(metrics: PublishedMetrics) -> BlockScores | None:
    """The published AVSS of these averages, or None where it does not exist."""
    if not all(metrics.sparsity):
        return None
    criterion = CRITERIA["avss-reference"]
    return BlockScores(
        criterion=criterion.name,
        title=criterion.title,
        values=tuple(one / share for one, share in zip(metrics.variance, metrics.sparsity, strict=True)),
        factors={"variance": metrics.variance, "sparsity": metrics.sparsity},
        paper=criterion.paper,
        reference_url=criterion.reference_url,
        note=criterion.note,
    )


def write_reproduction(metrics: PublishedMetrics, out: str | Path, *, command: str, force: bool = False) -> RunRecord:
    """Writes `published.csv`, the figure, and a record with its page to a new folder.

    Raises:
        OutputExistsError: The folder exists.
    """
    if metrics.model is None:
        raise ConfigError("These averages name no model; make them with `avss.reproduce`.")
    scores = published_scores(metrics)
    record = RunRecord(
        created=now(),
        command=command,
        versions=versions(),
        model=metrics.model,
        data=metrics.data,
        scores=() if scores is None else (scores,),
        warnings=metrics.notes,
        published=metrics.model_copy(update={"model": None, "data": None, "notes": ()}),
    )
    with fresh_folder(Path(out), force=force) as folder:
        write_record(record, folder)
    return record
