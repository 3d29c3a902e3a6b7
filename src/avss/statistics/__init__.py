"""What can be observed of a block. Each file holds one idea; `base` states the laws they all obey."""

from avss.statistics.angles import WindowAngles
from avss.statistics.base import AbstractStatistic, Rows, Site
from avss.statistics.change import CosineSimilarity, RelativeUpdate, RelativeVariance, Unchanged
from avss.statistics.gradients import GradientNorms, WeightNorms
from avss.statistics.moments import Moments
from avss.statistics.near_zero import NearZero
from avss.statistics.published import PublishedAverages, PublishedGradients

STATISTICS: tuple[type[AbstractStatistic], ...] = (
    CosineSimilarity,
    GradientNorms,
    Moments,
    NearZero,
    PublishedAverages,
    PublishedGradients,
    RelativeUpdate,
    RelativeVariance,
    Unchanged,
    WeightNorms,
    WindowAngles,
)
"""Every statistic; the law tests run over this list."""

__all__ = [
    "STATISTICS",
    "AbstractStatistic",
    "CosineSimilarity",
    "GradientNorms",
    "Moments",
    "NearZero",
    "PublishedAverages",
    "PublishedGradients",
    "RelativeUpdate",
    "RelativeVariance",
    "Rows",
    "Site",
    "Unchanged",
    "WeightNorms",
    "WindowAngles",
]
