"""What a notebook shows for a value: a table and a drawn chart, without JavaScript and without a network."""

import html
from collections.abc import Iterable, Sequence

from avss.record import Comparison, DamageTable, RunRecord, ScoreTable, SearchResult, StabilityStudy
from avss.reporting import numbers, tables, theme, verdict
from avss.reporting.block_charts import scores_chart
from avss.reporting.damage_charts import damage_chart, search_chart, verdicts_chart
from avss.reporting.result_charts import language_chart, retention_chart
from avss.reporting.rows import ScoreCell

_CELL = 'style="padding:2px 10px;text-align:right;white-space:nowrap"'
_MOST_ROWS = 48


def scores_html(table: ScoreTable) -> str:
    """The scores as an HTML fragment: a chart of all criteria, then one row per block with score and rank."""
    header = ["block", *(name for scores in table.scores for name in (scores.title, "rank"))]
    rows = [
        [str(row.block), *(text for cell in row.cells for text in _score_texts(cell))]
        for row in tables.score_rows(table)
    ]
    head = f"<strong>Scores of {table.num_blocks} blocks</strong>"
    if table.model:
        head += f" of {html.escape(table.model.source)}"
    return _fragment(
        head, table.warnings, [theme.inline_svg(scores_chart(table.scores).to_dict())], _table(header, rows)
    )


def damage_html(table: DamageTable) -> str:
    """The measured damage as an HTML fragment: the chart, then one row per block."""
    header, rows = tables.damage_texts(table)
    head = f"<strong>Measured damage of leaving out each of {table.num_blocks} blocks</strong>"
    if table.model:
        head += f" of {html.escape(table.model.source)}"
    return _fragment(head, (), [theme.inline_svg(damage_chart(table).to_dict())], _table(header, rows))


def comparison_html(comparison: Comparison) -> str:
    """Every criterion against measured damage as an HTML fragment: the charts, then one row per method."""
    header, rows = tables.verdict_texts(comparison)
    drawings = [
        theme.inline_svg(chart.to_dict()) for chart in (verdicts_chart(comparison), damage_chart(comparison.damage))
    ]
    return _fragment("<strong>Criteria against measured damage</strong>", (), drawings, _table(header, rows))


def study_html(study: StabilityStudy) -> str:
    """How a choice depends on the text as an HTML fragment."""
    header, rows = tables.study_texts(study)
    head = "<strong>Stability over seeds, amounts and kinds of text</strong>"
    return _fragment(head, (), [], _table(header, rows))


def search_html(search: SearchResult) -> str:
    """A search as an HTML fragment: the curve, then one row per size."""
    header, rows = tables.search_texts(search)
    head = f"<strong>The best sets of 1 to {len(search.points)} of {search.num_blocks} blocks</strong>"
    if search.model:
        head += f" of {html.escape(search.model.source)}"
    head += f"<br>{html.escape(tables.search_effort(search))}"
    return _fragment(head, (), [theme.inline_svg(search_chart(search).to_dict())], _table(header, rows))


def record_html(record: RunRecord) -> str:
    """A run as an HTML fragment: what was found, what was measured, and the charts that show it.

    Without a cut, the scores take the place of the results.
    """
    head = f"<strong>{html.escape(verdict.headline(record))}</strong>"
    head += "".join(f"<br>{html.escape(sentence)}" for sentence in verdict.sentences(record))
    results = [language_chart(record), retention_chart(record)] if record.cuts else []
    charts = [chart for chart in results if chart is not None]
    if record.search is not None:
        charts.append(search_chart(record.search))
    if record.scores:
        charts.append(scores_chart(record.scores, record.cuts))
    header, rows = tables.comparison_texts(record)
    return _fragment(
        head, record.warnings, [theme.inline_svg(chart.to_dict()) for chart in charts], _table(header, rows)
    )


def _score_texts(cell: ScoreCell) -> tuple[str, str]:
    return numbers.number(cell.value), numbers.MISSING if cell.rank is None else str(cell.rank)


def _fragment(head: str, warnings: Iterable[str], drawings: Sequence[str], table: str) -> str:
    notes = "".join(f"<li>{html.escape(warning)}</li>" for warning in warnings)
    listed = f'<ul style="color:#8a5a00">{notes}</ul>' if notes else ""
    charts = "".join(f'<div style="background:#fff;overflow-x:auto">{drawing}</div>' for drawing in drawings)
    return f'<div class="avss"><p>{head}</p>{listed}{table}{charts}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    titles = "".join(f"<th {_CELL}>{html.escape(title)}</th>" for title in header)
    body = "".join("<tr>" + "".join(f"<td {_CELL}>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    scroll = "overflow:auto;max-height:420px" if len(rows) > _MOST_ROWS // 4 else "overflow-x:auto"
    return f'<div style="{scroll}"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
