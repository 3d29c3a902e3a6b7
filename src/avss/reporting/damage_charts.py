"""Charts of measured damage: what each block's absence costs, and what the best set of each size does."""

import math
from typing import Any

import altair as alt

from avss.record import Comparison, CurvePoint, DamageTable, SearchResult, describe_blocks
from avss.reporting import numbers, theme

UNITS = {
    "kl": "KL divergence from the dense model, nats",
    "cosine": "1 - cosine with the dense model's embedding",
    "squared": "Squared difference from the dense model's output",
}
"""What the axis of a damage says."""


def damage_chart(table: DamageTable) -> alt.Chart:
    """A dot on a stem per block on a log scale, with a bar of two standard errors each way."""
    positive = [value for value in table.values if math.isfinite(value) and value > 0]
    low, high = min(positive, default=1e-6) / 2, max(positive, default=1.0) * 2
    rows = _rows(table, low)
    width = max(240, min(table.num_blocks * 24, theme.PAGE_WIDTH - 70))
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    decades = [10.0**power for power in range(-30, 31)]
    base = (
        alt.Chart()
        .transform_filter("datum.distance > 0")
        .encode(
            x=alt.X("block:O", axis=theme.block_axis(table.num_blocks, width)),
            tooltip=["block:Q", "rank:Q", alt.Tooltip("text:N", title="damage"), "perplexity:N"],
        )
    )
    y = alt.Y("distance:Q", scale=scale, title=UNITS[table.measure], axis=alt.Axis(values=decades, format="~g"))
    stems = base.mark_rule(strokeWidth=1.5, color=theme.KEPT).encode(y=y, y2=alt.datum(low))
    errors = base.transform_filter("isValid(datum.lower)").mark_rule(strokeWidth=3, color=theme.DENSE, opacity=0.5)
    dots = base.mark_circle(size=40, opacity=1, color=theme.ASKED).encode(y=y)
    chart = alt.layer(stems, errors.encode(y=alt.Y("lower:Q", scale=scale), y2="upper:Q"), dots)
    chart = chart.properties(width=width, height=170, data=alt.NamedData("damage"))
    return theme.finished(
        chart,
        "Measured damage of leaving out each block (log scale)",
        "Grey: two standard errors each way, over sequences.",
        {"damage": rows},
    )


def verdicts_chart(comparison: Comparison) -> alt.Chart:
    """A dot per method on a log scale: what removing the blocks it chooses costs, the least damage on top."""
    kinds = {"criterion": "criterion", "baseline": "looks at nothing", "search": "looks at damage"}
    rows = [
        {
            "method": one.method,
            "kind": kinds[one.kind],
            "distance": one.damage.distance if math.isfinite(one.damage.distance) else None,
            "text": numbers.with_error(one.damage.distance, one.spread if one.num_draws > 1 else one.damage.stderr),
            "agreement": numbers.number(one.spearman, 2),
            "removes": describe_blocks(one.damage.removed),
        }
        for one in comparison.verdicts
    ]
    known = [row["distance"] for row in rows if row["distance"] is not None and row["distance"] > 0]
    domain = [min(known, default=0.1) / 1.4, max(known, default=1.0) * 1.8]
    base = (
        alt.Chart()
        .transform_filter("datum.distance > 0")
        .encode(
            y=alt.Y("method:N", sort=[one.method for one in comparison.verdicts], title=None),
            x=alt.X(
                "distance:Q",
                scale=alt.Scale(type="log", domain=domain, nice=False),
                title=UNITS[comparison.damage.measure],
                axis=alt.Axis(format="~g", tickCount=6),
            ),
            tooltip=["method:N", alt.Tooltip("text:N", title="damage"), "agreement:N", "removes:N"],
        )
    )
    shades = dict(zip(kinds, (theme.ASKED, theme.OTHERS, theme.SERIES[2]), strict=True))
    shown = [kind for kind in kinds if any(one.kind == kind for one in comparison.verdicts)]
    colors = alt.Scale(domain=[kinds[kind] for kind in shown], range=[shades[kind] for kind in shown])
    dots = base.mark_circle(size=90, opacity=1).encode(
        color=alt.Color("kind:N", scale=colors, title=None, legend=alt.Legend(orient="bottom"))
    )
    words = base.mark_text(align="left", dx=9).encode(text="text:N")
    chart = alt.layer(dots, words).properties(
        width=theme.PAGE_WIDTH - 320, height=alt.Step(22), data=alt.NamedData("verdicts")
    )
    title = f"Measured damage of the {comparison.count} blocks that each chooses (log scale)"
    return theme.finished(chart, title, "Further left: less damage.", {"verdicts": rows})


def _rows(table: DamageTable, low: float) -> list[dict[str, Any]]:
    rows = []
    for row, one in zip(table.rows(), table.blocks, strict=True):
        known = math.isfinite(one.distance)
        spread = 2 * one.stderr if known and one.stderr is not None else None
        rows.append(
            {
                "block": row["block"],
                "rank": row["rank"],
                "distance": one.distance if known else None,
                # A log axis has no place for what is below it: the bar then ends at the axis.
                "lower": None if spread is None else max(one.distance - spread, low),
                "upper": None if spread is None else one.distance + spread,
                "text": numbers.with_error(one.distance, one.stderr),
                "perplexity": numbers.number(one.perplexity),
            }
        )
    return rows


def search_chart(search: SearchResult) -> alt.Chart:
    """The curve of a search: what the best set of each size costs, with a bar of two standard errors each way."""
    by_task = search.objective == "accuracy"
    title = "share of wrong answers" if by_task else UNITS[search.measure]
    width = max(240, min(len(search.points) * 48, theme.PAGE_WIDTH - 70))
    rows = [_search_row(point, by_task=by_task) for point in search.points]
    base = (
        alt.Chart()
        .transform_filter("isValid(datum.value)")
        .encode(
            x=alt.X("size:Q", title="blocks removed", axis=alt.Axis(tickMinStep=1, format="d")),
            tooltip=["size:Q", "blocks:N", alt.Tooltip("text:N", title="damage"), "perplexity:N", "how:N"],
        )
    )
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=True))
    line = base.mark_line(strokeWidth=1.5, color=theme.KEPT).encode(y=y)
    errors = base.transform_filter("isValid(datum.lower)").mark_rule(strokeWidth=3, color=theme.DENSE, opacity=0.5)
    dots = base.mark_circle(size=50, opacity=1, color=theme.ASKED).encode(y=y)
    chart = alt.layer(line, errors.encode(y="lower:Q", y2="upper:Q"), dots)
    chart = chart.properties(width=width, height=190, data=alt.NamedData("search"))
    return theme.finished(
        chart,
        f"Damage of the best set of each size, found by {search.method} search",
        "No repair. Grey: two standard errors each way. Another size needs no new search.",
        {"search": rows},
    )


def _search_row(point: CurvePoint, *, by_task: bool) -> dict[str, Any]:
    value, stderr = (point.cost, point.cost_stderr) if by_task else (point.distance, point.stderr)
    known = math.isfinite(value)
    spread = 2 * stderr if known and stderr is not None and math.isfinite(stderr) else None
    return {
        "size": len(point.removed),
        "blocks": describe_blocks(point.removed),
        "how": point.found_by,
        "value": value if known else None,
        "lower": None if spread is None else value - spread,
        "upper": None if spread is None else value + spread,
        "text": numbers.with_error(value, stderr),
        "perplexity": numbers.number(point.perplexity),
    }
