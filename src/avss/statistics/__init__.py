"""What can be observed of a block. Each file holds one idea; `base` states the laws they all obey."""

from avss.statistics.base import AbstractStatistic, Rows, Site
from avss.statistics.change import CosineSimilarity, RelativeUpdate
from avss.statistics.moments import Moments
from avss.statistics.near_zero import NearZero
from avss.statistics.published import PublishedAverages

STATISTICS: tuple[type[AbstractStatistic], ...] = (
    CosineSimilarity,
    Moments,
    NearZero,
    PublishedAverages,
    RelativeUpdate,
)
"""Every statistic; the law tests run over this list."""

__all__ = [
    "STATISTICS",
    "AbstractStatistic",
    "CosineSimilarity",
    "Moments",
    "NearZero",
    "PublishedAverages",
    "RelativeUpdate",
    "Rows",
    "Site",
]
