"""Criteria that look at the weights alone."""

import dataclasses
from typing import ClassVar, final

from avss.criteria.base import AVSS_PAPER, AVSS_URL, AbstractCriterion, Evidence, Scored
from avss.criteria.gradients import KIM, KIM_URL
from avss.statistics.base import AbstractStatistic
from avss.statistics.gradients import WeightNorms


@final
@dataclasses.dataclass(frozen=True)
class Magnitude(AbstractCriterion):
    r"""$\sum |w|$ over a block's weight matrices. Needs no text."""

    name: ClassVar[str] = "magnitude"
    title: ClassVar[str] = "Weight magnitude (L1)"
    paper: ClassVar[str | None] = KIM
    reference_url: ClassVar[str | None] = KIM_URL
    note: ClassVar[str | None] = "Needs no text. A scale that a norm takes back says nothing of a block's use."

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (WeightNorms(),)

    def score(self, evidence: Evidence) -> Scored:
        return Scored(evidence.summaries[WeightNorms()]["l1"])


@final
@dataclasses.dataclass(frozen=True)
class MagnitudeL2(AbstractCriterion):
    r"""$(\sum w^2)^{1/2}$ over a block's weight matrices together: their Frobenius norm. Needs no text.

    The AVSS script logs the sum of the Frobenius norms of the feed-forward matrices instead.
    """

    name: ClassVar[str] = "magnitude-l2"
    title: ClassVar[str] = "Weight magnitude (Frobenius)"
    paper: ClassVar[str | None] = AVSS_PAPER + "; its script logs the norm, and does not choose by it"
    reference_url: ClassVar[str | None] = AVSS_URL
    note: ClassVar[str | None] = "Needs no text. A scale that a norm takes back says nothing of a block's use."

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (WeightNorms(),)

    def score(self, evidence: Evidence) -> Scored:
        return Scored(evidence.summaries[WeightNorms()]["l2"])
