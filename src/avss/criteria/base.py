"""What every criterion promises: one finite score per block, higher = keep, from declared statistics only."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from avss.errors import DegenerateStatisticError
from avss.statistics.base import AbstractStatistic, FloatArray
from avss.statistics.collected import Summary

AVSS_PAPER = "Song et al. (2024), AVSS: Layer Importance Evaluation in LLMs via Activation Variance-Sparsity Analysis"
AVSS_URL = "https://arxiv.org/abs/2411.02117"


@dataclasses.dataclass(frozen=True)
class Scored:
    """A criterion's answer.

    Attributes:
        values: One score per block.
        factors: The parts it is made of, by name, one value per block.
        windows: Distances across runs of neighbours, `windows[n - 1][l]` for the run [l, l + n), if it measures them.
    """

    values: FloatArray
    factors: Mapping[str, FloatArray] = dataclasses.field(default_factory=dict)
    windows: tuple[FloatArray, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        num_blocks: Length of the stack.
        summaries: The statistics it declared in `needs`, and no others.
        seed: For criteria that draw lots.
    """

    num_blocks: int
    summaries: Mapping[AbstractStatistic, Summary]
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class AbstractCriterion(abc.ABC):
    """Turns statistics into one score per block. Subclasses are frozen dataclasses; their fields are their settings.

    Attributes:
        name: What users type.
        title: What tables and charts show.
        paper: Citation; None for a baseline.
        reference_url: Where it was published; None for a baseline.
        note: What a reader must know to trust it, in a sentence.
        protects_ends: Whether a plan leaves the first and the last block alone unless told otherwise. False for
            criteria that reproduce a published selection or serve as a baseline.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None] = None
    reference_url: ClassVar[str | None] = None
    note: ClassVar[str | None] = None
    protects_ends: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def needs(self) -> tuple[AbstractStatistic, ...]:
        """The statistics it reads."""

    @abc.abstractmethod
    def score(self, evidence: Evidence) -> Scored:
        """One score per block.

        Deterministic; permuting the blocks permutes the scores (but for criteria that score positions).

        Raises:
            DegenerateStatisticError: The score does not exist for this evidence, with the blocks at fault.
        """


def ratio(numerator: FloatArray, denominator: FloatArray, *, criterion: str, remedy: str) -> FloatArray:
    """Divides block by block, and refuses where the result does not exist.

    Raises:
        DegenerateStatisticError: A denominator is zero, or either side is not finite.
    """
    bad = np.flatnonzero((denominator == 0) | ~np.isfinite(denominator) | ~np.isfinite(numerator))
    if bad.size:
        blocks = ", ".join(str(block) for block in bad[:8]) + (" ..." if bad.size > 8 else "")
        raise DegenerateStatisticError(
            f"`{criterion}` is undefined for block{'s' if bad.size > 1 else ''} {blocks}: it would divide "
            f"{numerator[bad[0]]:.3g} by {denominator[bad[0]]:.3g}. {remedy}"
        )
    return numerator / denominator
