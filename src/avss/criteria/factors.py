"""The two factors of AVSS, each as a criterion of its own."""

import dataclasses
from typing import ClassVar, final

from avss.criteria.base import AVSS_PAPER, AVSS_URL, AbstractCriterion, Evidence, Scored
from avss.statistics.base import AbstractStatistic
from avss.statistics.moments import Moments
from avss.statistics.near_zero import NearZero


@final
@dataclasses.dataclass(frozen=True)
class Variance(AbstractCriterion):
    r"""Variance of the block's output over all real tokens and hidden units, in activation units squared."""

    name: ClassVar[str] = "variance"
    title: ClassVar[str] = "Activation variance"
    paper: ClassVar[str | None] = AVSS_PAPER
    reference_url: ClassVar[str | None] = AVSS_URL
    protects_ends: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (Moments("output"),)

    def score(self, evidence: Evidence) -> Scored:
        return Scored(evidence.summaries[Moments("output")]["variance"])


@final
@dataclasses.dataclass(frozen=True)
class Sparsity(AbstractCriterion):
    r"""$1 - S_i$: share of the block's output that is *not* near zero, so that higher means keep.

    Attributes:
        threshold: Near-zero threshold as a share of the token's root mean square.
    """

    threshold: float = 1e-2

    name: ClassVar[str] = "sparsity"
    title: ClassVar[str] = "Activation sparsity"
    paper: ClassVar[str | None] = AVSS_PAPER
    reference_url: ClassVar[str | None] = AVSS_URL
    note: ClassVar[str | None] = "The score is one minus the near-zero share: a sparse block goes first."
    protects_ends: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (NearZero("output", self.threshold),)

    def score(self, evidence: Evidence) -> Scored:
        share = evidence.summaries[NearZero("output", self.threshold)]["share"]
        return Scored(1 - share, {"near_zero_share": share})
