"""The rows of every table: the record's own numbers, untouched, next to their text."""

import dataclasses
from typing import Literal

from avss.record import Cut, Retention
from avss.reporting import numbers

Kind = Literal["language", "quality", "cost"]
"""What a measurement is about: language modelling (lower is better), right answers (higher is better), or size and
speed."""


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
        """What there is to say of the retention, e.g. `("91.9 ± 2.1 % of dense", "69.9 ± 7.0 % chance-corrected")`."""
        said = [(self.ratio_text, "of dense")]
        if not self.higher_is_better:
            said.append((self.kept_text, "kept"))
        said += [(self.chance_corrected_text, "chance-corrected"), (self.flips_text, "flipped")]
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
