"""The composer: the one room that knows all stages, and the Python API. One file per verb.

    model + text --collect--> statistics --score--> scores --plan--> plan --cut--> model' --verify, evaluate--> record

Every function takes a model by name or as an object, and returns values that show themselves in a notebook.
"""

from avss.composer.comparison import compare, write_comparison
from avss.composer.damages import damage, write_damage
from avss.composer.evaluating import evaluate
from avss.composer.inputs import AnyModel, calibration, load
from avss.composer.inspection import Inspection, inspect
from avss.composer.pruning import Pruned, prune
from avss.composer.records import report, write_record
from avss.composer.reproducing import reproduce, write_reproduction
from avss.composer.scores import score, write_scores
from avss.composer.stabilities import stability, write_stability
from avss.composer.whole import run

__all__ = [
    "AnyModel",
    "Inspection",
    "Pruned",
    "calibration",
    "compare",
    "damage",
    "evaluate",
    "inspect",
    "load",
    "prune",
    "report",
    "reproduce",
    "run",
    "score",
    "stability",
    "write_comparison",
    "write_damage",
    "write_record",
    "write_reproduction",
    "write_scores",
    "write_stability",
]
