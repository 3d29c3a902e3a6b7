"""The rows that the command line, the page and the model card share.

Every row holds the record's own numbers, untouched, next to their text; whoever shows them chooses no digits.
"""

import csv
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from avss.record import BlockScores, Cut, Measurement, Retention, RunRecord, ScoreTable
from avss.report import numbers

Kind = Literal["language", "quality", "cost"]
"""What a measurement is about: language modelling (lower is better), right answers (higher is better), or size and
speed."""

_COST_UNITS = ("ms", "s", "tokens/s", "bytes", "GB", "MB", "samples/s")
_COST_TASKS = ("speed", "size", "memory", "latency", "throughput")
_LIKELIHOODS = ("perplexity", "loss", "nll", "kl", "cross_entropy")


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """A value with what is known of its error.

    Attributes:
        value: In the measurement's unit.
        stderr: Standard error, same unit; None where there is none.
        unit: `nats`, `ms`, `bytes` ... or empty.
    """

    value: float
    stderr: float | None = None
    unit: str = ""

    @property
    def text(self) -> str:
        """For people, e.g. `36.07 ± 0.81`."""
        return numbers.quantity(self.value, self.unit, self.stderr)


@dataclasses.dataclass(frozen=True, slots=True)
class ComparisonCell:
    """What one cut scored on one task, and what that keeps of the dense model.

    Attributes:
        estimate: The cut's own result.
        retention: The record's entry for this task and metric; None where it has none.
        higher_is_better: Direction of the value.
    """

    estimate: Estimate
    retention: Retention | None
    higher_is_better: bool

    @property
    def ratio_text(self) -> str:
        """Value over dense value: a percentage for answers (`93.1 ± 1.2 %`), times for the rest (`2.80x`)."""
        entry = self.retention
        if entry is None:
            return numbers.MISSING
        if self.higher_is_better:
            return numbers.percent(entry.ratio, entry.ratio_stderr)
        return numbers.times(entry.ratio, entry.ratio_stderr)

    @property
    def chance_corrected_text(self) -> str:
        """The share of what the dense model has above guessing."""
        entry = self.retention
        return numbers.percent(entry.chance_corrected, entry.chance_corrected_stderr) if entry else numbers.MISSING

    @property
    def kept_text(self) -> str:
        """The share kept, higher is better; for language modelling it is the dense loss over the loss."""
        return numbers.percent(self.retention.kept) if self.retention else numbers.MISSING

    @property
    def flips_text(self) -> str:
        """Share of answers that changed, right or wrong."""
        return numbers.percent(self.retention.flips) if self.retention else numbers.MISSING

    @property
    def details(self) -> tuple[str, ...]:
        """What there is to say of the retention, e.g. `("91.9 ± 2.1 % of dense", "69.9 ± 7.0 % above chance")`."""
        said = [(self.ratio_text, "of dense")]
        if not self.higher_is_better:
            said.append((self.kept_text, "kept"))
        said += [(self.chance_corrected_text, "above chance"), (self.flips_text, "flipped")]
        return tuple(f"{text} {word}" for text, word in said if text != numbers.MISSING)


@dataclasses.dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One task and metric: the dense model, then every cut in the record's order.

    Attributes:
        task: As in `Measurement`.
        metric: As in `Measurement`.
        kind: What it is about.
        higher_is_better: Direction of the values.
        chance: What guessing would give, if that means anything here.
        num_samples: Windows, items or repeats it rests on.
        source: The evaluation data.
        dense: The dense model's result; None for what compares with the dense model, e.g. a divergence from it.
        cells: One per cut; None where that cut was not measured.
    """

    task: str
    metric: str
    kind: Kind
    higher_is_better: bool
    chance: float | None
    num_samples: int
    source: str | None
    dense: Estimate | None
    cells: tuple[ComparisonCell | None, ...]

    @property
    def title(self) -> str:
        """Task and metric in one, e.g. `choice:piqa, accuracy`."""
        metric = self.metric.removesuffix("_nats")
        return self.task if self.task == metric else f"{self.task}, {metric.replace('_', ' ')}"

    @property
    def dense_text(self) -> str:
        """The dense model's figure for people."""
        return self.dense.text if self.dense else numbers.MISSING


@dataclasses.dataclass(frozen=True, slots=True)
class CutRow:
    """What one cut costs and saves.

    Attributes:
        label: How every table and chart calls it; unique within a record.
        cut: The record's entry.
        dense: The record's dense model, to compare with.
        speed: Its size and speed measurements as (title, dense text, cut text, change).
    """

    label: str
    cut: Cut
    dense_parameters: int
    dense_bytes: int
    speed: tuple[tuple[str, str, str, str], ...]

    @property
    def cells(self) -> dict[str, str]:
        """Column title -> text: what was removed, and what is left."""
        model = self.cut.model
        return {
            "cut": self.label,
            "removed": self.cut.plan.describe() or "none",
            "blocks": f"{self.cut.plan.num_blocks} to {len(self.cut.plan.kept)}",
            "parameters": f"{numbers.count(model.num_parameters)}"
            f" ({numbers.change(self.dense_parameters, model.num_parameters)})",
            "checkpoint": f"{numbers.size(model.checkpoint_bytes)}"
            f" ({numbers.change(self.dense_bytes, model.checkpoint_bytes)})",
            **{title: f"{after} ({delta})" for title, _, after, delta in self.speed},
        }


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreCell:
    """One criterion's word on one block.

    Attributes:
        value: The score; higher = keep.
        rank: 0 goes first; None where the score is not a number.
        without_first_token: The score with every sequence's first token left out; None where that means nothing.
    """

    value: float
    rank: int | None
    without_first_token: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreRow:
    """One block as all criteria see it.

    Attributes:
        block: Original index.
        cells: One per criterion, in the record's order.
        removed_by: Labels of the cuts that remove it.
    """

    block: int
    cells: tuple[ScoreCell, ...]
    removed_by: tuple[str, ...]


def kind_of(measurement: Measurement) -> Kind:
    """What a measurement is about; decides which table and chart it belongs to."""
    if measurement.unit in _COST_UNITS or measurement.task.split(":")[0] in _COST_TASKS:
        return "cost"
    if measurement.higher_is_better or not measurement.metric.startswith(_LIKELIHOODS):
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
    rows = table.rows()
    places = {f"{scores.criterion}.rank": ranks(scores) for scores in table.scores}
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for block, row in enumerate(rows):
        row |= {name: column[block] for name, column in places.items()}
        writer.writerow({name: _csv_field(value) for name, value in row.items()})
    return out.getvalue()


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


def _cell_text(cell: ComparisonCell | None) -> str:
    if cell is None:
        return numbers.MISSING
    return cell.estimate.text + (f" ({cell.ratio_text})" if cell.ratio_text != numbers.MISSING else "")


def _score_cells(scores: BlockScores) -> list[ScoreCell]:
    bare: Sequence[float | None] = scores.without_first_token or (None,) * scores.num_blocks
    return [ScoreCell(*cell) for cell in zip(scores.values, ranks(scores), bare, strict=True)]


def _csv_field(value: float | int | None) -> str:
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
