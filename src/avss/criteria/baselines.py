"""Criteria that look at nothing: what a real one must beat."""

import dataclasses
from typing import ClassVar, final

import numpy as np

from avss.criteria.base import AbstractCriterion, Evidence, Scored
from avss.statistics.base import AbstractStatistic


@final
@dataclasses.dataclass(frozen=True)
class First(AbstractCriterion):
    """Removes from the front: the score is the block's index."""

    name: ClassVar[str] = "first"
    title: ClassVar[str] = "First blocks"
    protects_ends: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return ()

    def score(self, evidence: Evidence) -> Scored:
        return Scored(np.arange(evidence.num_blocks, dtype=np.float64))


@final
@dataclasses.dataclass(frozen=True)
class Last(AbstractCriterion):
    """Removes from the back: the score is the number of blocks after this one."""

    name: ClassVar[str] = "last"
    title: ClassVar[str] = "Last blocks"
    protects_ends: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return ()

    def score(self, evidence: Evidence) -> Scored:
        return Scored(np.arange(evidence.num_blocks, dtype=np.float64)[::-1].copy())


@final
@dataclasses.dataclass(frozen=True)
class Random(AbstractCriterion):
    """Draws a uniform score in [0, 1) per block from the run's seed."""

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random"
    protects_ends: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return ()

    def score(self, evidence: Evidence) -> Scored:
        return Scored(np.random.default_rng(evidence.seed).random(evidence.num_blocks))
