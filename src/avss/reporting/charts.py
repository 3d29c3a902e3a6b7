"""The figures of a record: which ones it has data for, and how they become files."""

from pathlib import Path

import altair as alt

from avss.record import RunRecord
from avss.reporting import theme
from avss.reporting.block_charts import cuts_chart, ranks_chart, scores_chart, windows_chart
from avss.reporting.damage_charts import damage_chart, search_chart, verdicts_chart
from avss.reporting.healing_chart import healing_chart
from avss.reporting.published_chart import published_chart
from avss.reporting.result_charts import cost_chart, language_chart, retention_chart

CAPTIONS = {
    "retention": "Retention of a loss is dense loss over loss. Retention of an accuracy is accuracy over dense "
    "accuracy, which flatters a guesser; the diamonds do not.",
    "scores": "Scales differ between criteria; only the order within one decides.",
    "verdicts": "What a criterion is worth: the damage of the blocks it would remove, measured, before any repair.",
    "ranks": "Columns that are dark throughout are blocks that all criteria would let go.",
}
"""What to read off a figure, where its own title does not say it."""


def figures(record: RunRecord) -> dict[str, alt.Chart]:
    """The charts that the record has data for, by name, in reading order.

    Names: `language` (perplexity and losses), `retention`, `search` (damage by size), `healing`, `scores`, `ranks`,
    `cuts`, `verdicts` and `damage` (what leaving out blocks costs), `cost` (size and speed), `published` (what the
    published script measures), `windows-CRITERION` (distances across runs of neighbours).
    """
    drawn: dict[str, alt.Chart | None] = {
        "verdicts": verdicts_chart(record.comparison) if record.comparison else None,
        "language": language_chart(record) if record.cuts else None,
        "retention": retention_chart(record),
        "search": search_chart(record.search) if record.search is not None else None,
        "healing": healing_chart(record.cuts[0].healing) if record.cuts else None,
        "scores": scores_chart(record.scores, record.cuts) if record.scores else None,
        "ranks": ranks_chart(record.scores, record.cuts) if len(record.scores) > 1 else None,
        "cuts": cuts_chart(record.cuts) if record.cuts else None,
        "damage": damage_chart(record.damage) if record.damage else None,
        "cost": cost_chart(record),
        "published": published_chart(record.published) if record.published else None,
    }
    drawn |= {f"windows-{one.criterion}": windows_chart(one) for one in record.scores if one.windows}
    return {name: chart for name, chart in drawn.items() if chart is not None}


def save_figures(record: RunRecord, folder: Path) -> list[Path]:
    """Writes every figure as PNG (two pixels to a point) and SVG; returns the files in reading order.

    Args:
        record: The run.
        folder: Made where it does not exist; files of the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, chart in figures(record).items():
        drawing = theme.svg(chart.to_dict())
        (folder / f"{name}.png").write_bytes(theme.png(drawing))
        (folder / f"{name}.svg").write_text(drawing, encoding="utf-8")
        files += [folder / f"{name}.png", folder / f"{name}.svg"]
    return files
