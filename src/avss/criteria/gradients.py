"""Criteria that ask what the loss would feel, from one backward pass over the text."""

import dataclasses
from typing import ClassVar, final

from avss.criteria.base import AVSS_PAPER, AVSS_URL, AbstractCriterion, Evidence, Scored
from avss.statistics.base import AbstractStatistic
from avss.statistics.gradients import GradientNorms

KIM = (
    "Kim et al. (2024), Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining Methods"
)
KIM_URL = "https://arxiv.org/abs/2402.02834"

_LOGGED = "; its script logs the norm, and does not choose by it"


@final
@dataclasses.dataclass(frozen=True)
class GradientL1(AbstractCriterion):
    r"""$\|g\|_1$ over a block's weight matrices; see `GradientNorms`. The script adds up feed-forward matrices only."""

    name: ClassVar[str] = "gradient-l1"
    title: ClassVar[str] = "Gradient, L1 norm"
    paper: ClassVar[str | None] = AVSS_PAPER + _LOGGED
    reference_url: ClassVar[str | None] = AVSS_URL
    note: ClassVar[str | None] = "Needs a backward pass. Depends on the batch size; compare blocks of one run only."

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (GradientNorms(),)

    def score(self, evidence: Evidence) -> Scored:
        return Scored(evidence.summaries[GradientNorms()]["l1"])


@final
@dataclasses.dataclass(frozen=True)
class GradientL2(AbstractCriterion):
    r"""$\|g\|_2$ over a block's weight matrices together; see `GradientNorms`.

    The script adds up one L2 norm a matrix, which weighs many small matrices more than one large one.
    """

    name: ClassVar[str] = "gradient-l2"
    title: ClassVar[str] = "Gradient, L2 norm"
    paper: ClassVar[str | None] = AVSS_PAPER + _LOGGED
    reference_url: ClassVar[str | None] = AVSS_URL
    note: ClassVar[str | None] = "Needs a backward pass. Depends on the batch size; compare blocks of one run only."

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (GradientNorms(),)

    def score(self, evidence: Evidence) -> Scored:
        return Scored(evidence.summaries[GradientNorms()]["l2"])


@final
@dataclasses.dataclass(frozen=True)
class Taylor(AbstractCriterion):
    r"""$\sum |w \, \partial L / \partial w|$ over a block's weight matrices: first-order cost of zeroing them.

    The paper adds gradients up over its calibration text before it takes absolute values; here they are taken batch by
    batch (see `GradientNorms`). In the paper's setting, ten sequences of 128 tokens, one batch holds them all
    (`--samples 10 --seq-len 128 --batch-size 10`), and the two agree. Its variant `Taylor+` keeps the first four and
    the last two blocks: `--protect 0-3,-2,-1`.
    """

    name: ClassVar[str] = "taylor"
    title: ClassVar[str] = "Taylor"
    paper: ClassVar[str | None] = KIM
    reference_url: ClassVar[str | None] = KIM_URL
    note: ClassVar[str | None] = (
        "Needs a backward pass. Absolute values are taken batch by batch. The paper protects the first four and the "
        "last two blocks (`--protect 0-3,-2,-1`)."
    )

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (GradientNorms(),)

    def score(self, evidence: Evidence) -> Scored:
        return Scored(evidence.summaries[GradientNorms()]["taylor"])
