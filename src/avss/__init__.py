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
        heal,
        inspect,
        load,
        prune,
        report,
        reproduce,
        run,
        score,
        stability,
        verify,
    )
    from avss.composer.layer_table import LayerTable, from_csv
    from avss.config import DataConfig, HealConfig, ModelConfig, PlanConfig, RunConfig, SearchConfig, TaskConfig
    from avss.criteria import CRITERIA
    from avss.errors import AvssError
    from avss.record import (
        BlockScores,
        CheckReport,
        Comparison,
        Cut,
        DamageTable,
        Healing,
        Measurement,
        Plan,
        PublishedMetrics,
        Retention,
        RunRecord,
        ScoreTable,
        SearchResult,
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
    "HealConfig": "avss.config",
    "Healing": "avss.record",
    "Inspection": "avss.composer",
    "LayerTable": "avss.composer",
    "Measurement": "avss.record",
    "ModelConfig": "avss.config",
    "Plan": "avss.record",
    "PlanConfig": "avss.config",
    "Pruned": "avss.composer",
    "PublishedMetrics": "avss.record",
    "Retention": "avss.record",
    "RunConfig": "avss.config",
    "RunRecord": "avss.record",
    "ScoreTable": "avss.record",
    "SearchConfig": "avss.config",
    "SearchResult": "avss.record",
    "TaskConfig": "avss.config",
    "compare": "avss.composer",
    "damage": "avss.composer",
    "evaluate": "avss.composer",
    "from_csv": "avss.composer",
    "heal": "avss.composer",
    "inspect": "avss.composer",
    "load": "avss.composer",
    "prune": "avss.composer",
    "report": "avss.composer",
    "reproduce": "avss.composer",
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
    "HealConfig",
    "Healing",
    "Inspection",
    "LayerTable",
    "Measurement",
    "ModelConfig",
    "Plan",
    "PlanConfig",
    "Pruned",
    "PublishedMetrics",
    "Retention",
    "RunConfig",
    "RunRecord",
    "ScoreTable",
    "SearchConfig",
    "SearchResult",
    "TaskConfig",
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
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module `avss` has no attribute `{name}`. Public: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
