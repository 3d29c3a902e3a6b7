"""Find the blocks that a transformer can do without, prove it, and ship the smaller model.

    import avss

    table = avss.score("owner/model", "text.txt")          # scores of every block, by several criteria
    small = avss.prune("owner/model", fraction=0.25, out="smaller")
    avss.evaluate("smaller", ["perplexity=text.txt"], baseline="owner/model")

Importing avss imports no torch; the first call does.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from avss.composer import (
        Inspection,
        Pruned,
        compare,
        damage,
        evaluate,
        inspect,
        load,
        prune,
        report,
        run,
        score,
        stability,
        verify,
    )
    from avss.config import DataConfig, ModelConfig, PlanConfig, RunConfig, TaskConfig
    from avss.criteria import CRITERIA
    from avss.errors import AvssError
    from avss.record import (
        BlockScores,
        CheckReport,
        Comparison,
        Cut,
        DamageTable,
        Measurement,
        Plan,
        Retention,
        RunRecord,
        ScoreTable,
    )

_PLACES = {
    "AvssError": "avss.errors",
    "BlockScores": "avss.record",
    "CRITERIA": "avss.criteria",
    "CheckReport": "avss.record",
    "Comparison": "avss.record",
    "Cut": "avss.record",
    "DamageTable": "avss.record",
    "DataConfig": "avss.config",
    "Inspection": "avss.composer",
    "Measurement": "avss.record",
    "ModelConfig": "avss.config",
    "Plan": "avss.record",
    "PlanConfig": "avss.config",
    "Pruned": "avss.composer",
    "Retention": "avss.record",
    "RunConfig": "avss.config",
    "RunRecord": "avss.record",
    "ScoreTable": "avss.record",
    "TaskConfig": "avss.config",
    "compare": "avss.composer",
    "damage": "avss.composer",
    "evaluate": "avss.composer",
    "inspect": "avss.composer",
    "load": "avss.composer",
    "prune": "avss.composer",
    "report": "avss.composer",
    "run": "avss.composer",
    "score": "avss.composer",
    "stability": "avss.composer",
    "verify": "avss.composer",
}

__all__ = [
    "CRITERIA",
    "AvssError",
    "BlockScores",
    "CheckReport",
    "Comparison",
    "Cut",
    "DamageTable",
    "DataConfig",
    "Inspection",
    "Measurement",
    "ModelConfig",
    "Plan",
    "PlanConfig",
    "Pruned",
    "Retention",
    "RunConfig",
    "RunRecord",
    "ScoreTable",
    "TaskConfig",
    "compare",
    "damage",
    "evaluate",
    "inspect",
    "load",
    "prune",
    "report",
    "run",
    "score",
    "stability",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module `avss` has no attribute `{name}`. Public: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
