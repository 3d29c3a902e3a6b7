"""Charts of measured damage: what each block's absence costs, and how well each criterion guessed it."""

import math
from typing import Any

import altair as alt

from avss.record import Comparison, DamageTable, describe_blocks
from avss.reporting import numbers, theme

UNITS = {"kl": "KL divergence from the dense model, nats", "cosine": "1 - cosine with the dense model's embedding"}
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
    colors = alt.Scale(domain=list(kinds.values()), range=[theme.ASKED, theme.OTHERS, theme.SERIES[2]])
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
