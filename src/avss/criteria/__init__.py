"""Statistics -> scores. Pure: a criterion never sees a model, a tensor or a token."""

from avss.criteria.base import AbstractCriterion, Evidence, Scored
from avss.criteria.table import CRITERIA, find_criteria

__all__ = ["CRITERIA", "AbstractCriterion", "Evidence", "Scored", "find_criteria"]
