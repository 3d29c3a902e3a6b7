"""The rows that the command line, the page and the model card share.

Every row holds the record's own numbers, untouched, next to their text; whoever shows them chooses no digits.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from avss.record import (
    BlockScores,
    Comparison,
    Cut,
    DamageTable,
    Finalist,
    Measurement,
    PublishedMetrics,
    RunRecord,
    ScoreTable,
    SearchResult,
    SiteFigures,
    Stability,
    StabilityStudy,
    describe_blocks,
)
from avss.reporting import numbers
from avss.reporting.rows import ComparisonCell, ComparisonRow, CutRow, Estimate, Kind, ScoreCell, ScoreRow

_COST_UNITS = ("ms", "s", "tokens/s", "bytes", "GB", "MB", "samples/s")
_COST_TASKS = ("speed", "size", "memory", "latency", "throughput")
MEASURES = {"kl": "KL, nats", "cosine": "1 - cosine", "squared": "squared difference"}
"""What distances from the dense model are, in a table's head."""

PERPLEXITIES = {"perplexity": "Perplexity", "masked_perplexity": "Masked perplexity"}
"""Metric -> what sentences call it."""
_LIKELIHOODS = ("perplexity", "loss", "nll", "kl", "cross_entropy")


def kind_of(measurement: Measurement) -> Kind:
    """What a measurement is about; decides which table and chart it belongs to."""
    if measurement.unit in _COST_UNITS or measurement.task.split(":")[0] in _COST_TASKS:
        return "cost"
    if measurement.higher_is_better or not measurement.metric.removeprefix("masked_").startswith(_LIKELIHOODS):
        return "quality"
    return "language"


def cut_labels(cuts: Sequence[Cut]) -> tuple[str, ...]:
    """A name for each cut: its method, with the number of blocks or a counter added where two share it."""
    names = [cut.name for cut in cuts]
    seen = Counter(names)
    names = [
        f"{name}-{len(cut.plan.removed)}" if seen[name] > 1 else name for name, cut in zip(names, cuts, strict=True)
    ]
    seen = Counter(names)
    return tuple(f"{name} #{place + 1}" if seen[name] > 1 else name for place, name in enumerate(names))


def ranks(scores: BlockScores) -> tuple[int | None, ...]:
    """Place of each block, 0 goes first. A block whose score is not a number has none and takes no place."""
    known = sorted((value, block) for block, value in enumerate(scores.values) if not math.isnan(value))
    place = {block: index for index, (_, block) in enumerate(known)}
    return tuple(place.get(block) for block in range(scores.num_blocks))


def score_rows(source: RunRecord | ScoreTable) -> list[ScoreRow]:
    """One row per block; empty where nothing was scored."""
    if not source.scores:
        return []
    cuts = source.cuts if isinstance(source, RunRecord) else ()
    gone = [(label, frozenset(cut.plan.removed)) for label, cut in zip(cut_labels(cuts), cuts, strict=True)]
    columns = [_score_cells(scores) for scores in source.scores]
    return [
        ScoreRow(block, cells, tuple(label for label, removed in gone if block in removed))
        for block, cells in enumerate(zip(*columns, strict=True))
    ]


def scores_csv(table: ScoreTable) -> str:
    """The table as CSV: one row per block; per criterion its score, rank, first-token-free score and factors.

    Floats are written so that they read back exactly; nan is an empty field. Lines end in a line feed.
    """
    places = {f"{scores.criterion}.rank": ranks(scores) for scores in table.scores}
    return _csv([
        row | {name: column[block] for name, column in places.items()} for block, row in enumerate(table.rows())
    ])  # fmt: skip


def site_texts(sites: Sequence[SiteFigures]) -> tuple[list[str], list[list[str]]]:
    """The figures of sub-layers as plain text: column titles, then one row per block."""
    header = ["block", *(f"{one.title.lower()}: {name}" for one in sites for name in one.values)]
    columns = [values for one in sites for values in one.values.values()]
    body = [
        [str(block), *(numbers.number(value, digits=3) for value in row)]
        for block, row in enumerate(zip(*columns, strict=True))
    ]
    return header, body


def sites_csv(sites: Sequence[SiteFigures]) -> str:
    """The figures of sub-layers as CSV: one row per block and site; floats read back exactly, what lacks is empty."""
    names = list(dict.fromkeys(name for one in sites for name in one.values))
    return _csv([
        {"block": block, "site": one.site}
        | {name: one.values[name][block] if name in one.values else None for name in names}
        for one in sites
        for block in range(len(one.values[names[0]]))
    ])  # fmt: skip


def published_csv(metrics: PublishedMetrics) -> str:
    """What the published script measures, under its column names; floats read back exactly."""
    return _csv(metrics.rows())


def comparison_rows(record: RunRecord) -> list[ComparisonRow]:
    """One row per task and metric, in the order measured; the dense model's first."""
    sets = [record.dense, *(cut.measurements for cut in record.cuts)]
    by_key = [{(found.task, found.metric): found for found in found_in} for found_in in sets]
    keys = dict.fromkeys(key for found in by_key for key in found)
    return [_comparison_row(record, key, by_key) for key in keys]


def cut_rows(record: RunRecord) -> list[CutRow]:
    """One row per cut: blocks removed, parameters, checkpoint size, and speed where it was measured."""
    costs = [row for row in comparison_rows(record) if row.kind == "cost"]
    return [
        CutRow(
            label=label,
            cut=cut,
            dense_parameters=record.model.num_parameters,
            dense_bytes=record.model.checkpoint_bytes,
            speed=tuple(_cost_texts(row, place) for row in costs if row.cells[place] is not None),
        )
        for place, (label, cut) in enumerate(zip(cut_labels(record.cuts), record.cuts, strict=True))
    ]


def comparison_texts(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """The comparison as plain text: column titles, then rows. For a terminal or Markdown.

    A cut's column reads `101.1 ± 2.6 (2.80x)`; size and speed are left to `cut_rows`.
    """
    header = ["task", "dense", *cut_labels(record.cuts)]
    body = [
        [row.title, row.dense_text, *(_cell_text(cell) for cell in row.cells)]
        for row in comparison_rows(record)
        if row.kind != "cost"
    ]
    return header, body


def damage_texts(table: DamageTable) -> tuple[list[str], list[list[str]]]:
    """The damage of each block as plain text: column titles, then one row per block."""
    has_loss = table.dense_loss is not None
    header = ["block", "rank", MEASURES[table.measure]]
    header += ["loss change, nats", "perplexity"] if has_loss else []
    body = []
    for row, one in zip(table.rows(), table.blocks, strict=True):
        texts = [str(row["block"]), str(row["rank"]), numbers.with_error(one.distance, one.stderr)]
        if has_loss:
            texts += [numbers.with_error(one.loss_change, one.loss_change_stderr), numbers.number(one.perplexity)]
        body.append(texts)
    return header, body


def verdict_texts(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Each criterion against measured damage as plain text: column titles, then one row per method, the best first."""
    count, has_loss = comparison.count, comparison.damage.dense_loss is not None
    damage = MEASURES[comparison.damage.measure]
    header = ["chosen by", damage, *(["perplexity"] if has_loss else [])]
    header += ["agreement", "overlap", "depth", "removes"]
    body = []
    for one in comparison.verdicts:
        error = one.spread if one.num_draws > 1 else one.damage.stderr
        name = f"{one.method} (median of {one.num_draws})" if one.num_draws > 1 else one.method
        texts = [name, numbers.with_error(one.damage.distance, error)]
        texts += [numbers.number(one.damage.perplexity)] if has_loss else []
        texts += [
            _signed(one.spearman, one.spearman_stderr),
            numbers.MISSING if one.overlap is None else f"{one.overlap} of {count}",
            _signed(one.depth),
            describe_blocks(one.damage.removed),
        ]
        body.append(texts)
    return header, body


def stability_texts(found: Sequence[Stability]) -> tuple[list[str], list[list[str]]]:
    """Whether the text suffices, per criterion: column titles, then rows."""
    header = [
        "criterion",
        "settled",
        "closest pair",
        "apart, std. errors",
        "choice kept",
        "half against half: tau",
        "overlap",
    ]
    header += ["sequences", "needed"]
    body = [
        [
            one.criterion,
            "yes" if one.settled else "no",
            f"{one.closest[0]} goes, {one.closest[1]} stays",
            numbers.number(one.closest_gap, 2),
            numbers.percent(one.agreement),
            _signed(one.half_kendall),
            numbers.percent(one.half_overlap),
            f"{one.num_sequences:,}",
            "a tie" if one.num_sequences_needed is None else f"{one.num_sequences_needed:,}",
        ]
        for one in found
    ]
    return header, body


def study_texts(study: StabilityStudy) -> tuple[list[str], list[list[str]]]:
    """How the choice depends on the text: column titles, then one row per criterion, text and amount."""
    header = ["criterion", "text", "sequences", "draws", "Kendall tau", "lowest tau", f"overlap of {study.count}"]
    body = [
        [
            row["criterion"],
            row["source"],
            f"{row['num_sequences']:,}",
            str(row["num_seeds"]),
            _signed(row["kendall"]),
            _signed(row["kendall_min"]),
            numbers.percent(row["overlap"]),
        ]
        for row in study.summary()
    ]
    return header, body


def _signed(value: float | None, error: float | None = None) -> str:
    if not numbers.is_number(value):
        return numbers.MISSING
    return f"{value:+.2f}" + (f" ± {error:.2f}" if error is not None and numbers.is_number(error) else "")


def damage_csv(table: DamageTable) -> str:
    """The damage as CSV, one row per block; floats read back exactly, nan is an empty field."""
    return _csv(table.rows())


def search_texts(search: SearchResult) -> tuple[list[str], list[list[str]]]:
    """A search's curve as plain text: column titles, then one row per size."""
    has_loss = search.dense_loss is not None
    measure = MEASURES[search.measure]
    by_task = search.objective == "accuracy"
    header = ["size", "blocks", "wrong answers" if by_task else measure]
    header += [*(["perplexity"] if has_loss else []), "found by"]
    body = []
    for point in search.points:
        value = (point.cost, point.cost_stderr) if by_task else (point.distance, point.stderr)
        texts = [str(len(point.removed)), describe_blocks(point.removed), numbers.with_error(*value)]
        body.append([*texts, *([numbers.number(point.perplexity)] if has_loss else []), point.found_by])
    return header, body


def search_effort(search: SearchResult) -> str:
    """What a search took, in a sentence."""
    share = f"{search.passes:.1f} passes of the whole model over the data in {numbers.duration(search.seconds)}"
    all_of_it = f"trying every block in every step takes {search.passes_of_all:.0f}"
    ended = "" if search.is_complete else " The budget ended it early."
    return f"{search.num_sets} sets measured, {share}; {all_of_it}.{ended}{_finalist_words(search.finalists)}"


def _finalist_words(finalists: Sequence[Finalist]) -> str:
    if not finalists:
        return ""
    told = [
        f"{describe_blocks(one.removed)} ({one.source}) {numbers.number(one.before)} -> {numbers.number(one.after)}"
        + (f", {one.lost:.0%} of the choices lost" if one.lost is not None else "")
        for one in finalists
    ]
    return f" Judged again after a repair, raw -> repaired, the best first: {'; '.join(told)}."


def search_csv(search: SearchResult) -> str:
    """A search's curve as CSV, one row per size; floats read back exactly, nan is an empty field."""
    return _csv(search.rows())


def _cell_text(cell: ComparisonCell | None) -> str:
    if cell is None:
        return numbers.MISSING
    return cell.estimate.text + (f" ({cell.ratio_text})" if cell.ratio_text != numbers.MISSING else "")


def _score_cells(scores: BlockScores) -> list[ScoreCell]:
    bare: Sequence[float | None] = scores.without_first_token or (None,) * scores.num_blocks
    return [ScoreCell(*cell) for cell in zip(scores.values, ranks(scores), bare, strict=True)]


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_field(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _csv_field(value: float | int | str | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None or value != value else repr(value)


def _comparison_row(
    record: RunRecord, key: tuple[str, str], by_key: list[dict[tuple[str, str], Measurement]]
) -> ComparisonRow:
    found = [measured.get(key) for measured in by_key]
    facts = next(measurement for measurement in found if measurement is not None)
    estimates = [Estimate(one.value, one.stderr, one.unit) if one else None for one in found]
    cells = []
    for cut, estimate in zip(record.cuts, estimates[1:], strict=True):
        retention = next((entry for entry in cut.retention if (entry.task, entry.metric) == key), None)
        cells.append(ComparisonCell(estimate, retention, facts.higher_is_better) if estimate else None)
    return ComparisonRow(
        task=facts.task,
        metric=facts.metric,
        kind=kind_of(facts),
        higher_is_better=facts.higher_is_better,
        chance=facts.chance,
        num_samples=facts.num_samples,
        source=facts.source,
        dense=estimates[0],
        cells=tuple(cells),
    )


def _cost_texts(row: ComparisonRow, place: int) -> tuple[str, str, str, str]:
    cell = row.cells[place]
    assert cell is not None
    delta = numbers.change(row.dense.value, cell.estimate.value) if row.dense else numbers.MISSING
    return row.title, row.dense_text, cell.estimate.text, delta
