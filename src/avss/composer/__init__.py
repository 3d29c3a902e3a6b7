"""The composer: the one room that knows all stages, and the Python API. One file per verb.

    model + text --collect--> statistics --score--> scores --plan--> plan --cut--> model' --verify, evaluate--> record

Every function takes a model by name or as an object, and returns values that show themselves in a notebook. Names are
looked up when they are used: a checkpoint can be cut on disk without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avss.composer.checking import verify
    from avss.composer.comparison import compare, write_comparison
    from avss.composer.damages import damage, write_damage
    from avss.composer.evaluating import evaluate
    from avss.composer.healing import heal
    from avss.composer.inputs import AnyModel, calibration, load
    from avss.composer.inspection import Inspection, inspect
    from avss.composer.layer_table import LayerTable, from_csv, write_layer_table
    from avss.composer.pruning import Pruned, prune
    from avss.composer.records import report, write_record
    from avss.composer.reproducing import reproduce, write_reproduction
    from avss.composer.scores import score, write_scores
    from avss.composer.stabilities import stability, write_stability
    from avss.composer.whole import run

_PLACES = {
    "AnyModel": "inputs",
    "Inspection": "inspection",
    "LayerTable": "layer_table",
    "Pruned": "pruning",
    "calibration": "inputs",
    "compare": "comparison",
    "damage": "damages",
    "evaluate": "evaluating",
    "from_csv": "layer_table",
    "heal": "healing",
    "inspect": "inspection",
    "load": "inputs",
    "prune": "pruning",
    "report": "records",
    "reproduce": "reproducing",
    "run": "whole",
    "score": "scores",
    "stability": "stabilities",
    "verify": "checking",
    "write_comparison": "comparison",
    "write_damage": "damages",
    "write_layer_table": "layer_table",
    "write_record": "records",
    "write_reproduction": "reproducing",
    "write_scores": "scores",
    "write_stability": "stabilities",
}
"""Name -> the module of this package that has it."""

__all__ = [
    "AnyModel",
    "Inspection",
    "LayerTable",
    "Pruned",
    "calibration",
    "compare",
    "damage",
    "evaluate",
    "from_csv",
    "heal",
    "inspect",
    "load",
    "prune",
    "report",
    "reproduce",
    "run",
    "score",
    "stability",
    "verify",
    "write_comparison",
    "write_damage",
    "write_layer_table",
    "write_record",
    "write_reproduction",
    "write_scores",
    "write_stability",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module `avss.composer` has no attribute `{name}`.")
    value = getattr(importlib.import_module(f"avss.composer.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
