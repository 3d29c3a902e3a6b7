"""Angular distance across a block, and across every run of blocks."""

import dataclasses
from typing import ClassVar, Literal, final

from avss.criteria.base import AbstractCriterion, Evidence, Scored
from avss.statistics.angles import WindowAngles
from avss.statistics.base import AbstractStatistic

GROMOV = "Gromov et al. (2024), The Unreasonable Ineffectiveness of the Deeper Layers"
GROMOV_URL = "https://arxiv.org/abs/2403.17887"


def _score(need: WindowAngles, evidence: Evidence) -> Scored:
    summary = evidence.summaries[need]
    lengths = range(1, evidence.num_blocks + 1)
    windows = tuple(summary[f"window_{length}"][: evidence.num_blocks - length + 1] for length in lengths)
    return Scored(windows[0], windows=windows)


@final
@dataclasses.dataclass(frozen=True)
class Angular(AbstractCriterion):
    r"""$d(l, 1)$ of `WindowAngles`: angle between a block's input and output at the last token, in units of pi.

    Carries the triangle of all runs with it. A contiguous plan takes the run with the smallest distance across it,
    which is what the paper does; single blocks by $d(l, 1)$ are ours.
    """

    token: Literal["last"] = "last"

    name: ClassVar[str] = "angular"
    title: ClassVar[str] = "Angular distance (last token)"
    paper: ClassVar[str | None] = GROMOV
    reference_url: ClassVar[str | None] = GROMOV_URL
    note: ClassVar[str | None] = (
        "Measured at the last token of each sequence, so it rests on as many values as there are sequences. Meant for "
        "runs of neighbours: use it with `--contiguous`."
    )

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (WindowAngles(self.token),)

    def score(self, evidence: Evidence) -> Scored:
        return _score(WindowAngles(self.token), evidence)


@final
@dataclasses.dataclass(frozen=True)
class AngularAll(AbstractCriterion):
    """The same as `angular`, averaged over all real tokens."""

    token: Literal["all"] = "all"

    name: ClassVar[str] = "angular-all"
    title: ClassVar[str] = "Angular distance (all tokens)"
    paper: ClassVar[str | None] = GROMOV + "; averaged over all tokens instead of the last"
    reference_url: ClassVar[str | None] = GROMOV_URL
    note: ClassVar[str | None] = "Averaged over all tokens. Meant for runs of neighbours: use it with `--contiguous`."

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (WindowAngles(self.token),)

    def score(self, evidence: Evidence) -> Scored:
        return _score(WindowAngles(self.token), evidence)
