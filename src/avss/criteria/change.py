"""Criteria that ask how much a block changes what passes through it."""

import dataclasses
from typing import ClassVar, final

from avss.criteria.base import AbstractCriterion, Evidence, Scored
from avss.statistics.base import AbstractStatistic
from avss.statistics.change import CosineSimilarity, RelativeUpdate


@final
@dataclasses.dataclass(frozen=True)
class BlockInfluence(AbstractCriterion):
    r"""$1 - \mathbb E_t[\cos(x_t, y_t)]$ of a block's input and output, 0 to 2. Zero for a block that does nothing."""

    name: ClassVar[str] = "block-influence"
    title: ClassVar[str] = "Block Influence"
    paper: ClassVar[str | None] = (
        "Men et al. (2024), ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"
    )
    reference_url: ClassVar[str | None] = "https://arxiv.org/abs/2403.03853"

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (CosineSimilarity(),)

    def score(self, evidence: Evidence) -> Scored:
        cosine = evidence.summaries[CosineSimilarity()]["cosine"]
        return Scored(1 - cosine, {"cosine": cosine})


@final
@dataclasses.dataclass(frozen=True)
class UpdateNorm(AbstractCriterion):
    r"""$\mathbb E_t[\|y_t - x_t\| / \|x_t\|]$: relative length of the update. Zero for a block that does nothing.

    Samragh et al. divide by the length of the *output*; the order of blocks is nearly the same.
    """

    name: ClassVar[str] = "update-norm"
    title: ClassVar[str] = "Relative update norm"
    paper: ClassVar[str | None] = (
        "Samragh et al. (2023), Weight subcloning: direct initialization of transformers using larger pretrained ones"
    )
    reference_url: ClassVar[str | None] = "https://arxiv.org/abs/2312.09299"

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (RelativeUpdate(),)

    def score(self, evidence: Evidence) -> Scored:
        return Scored(evidence.summaries[RelativeUpdate()]["ratio"])
