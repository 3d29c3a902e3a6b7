"""Charts with blocks on the x axis: scores, ranks, and what each cut removes."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import altair as alt

from avss.record import BlockScores, Cut
from avss.reporting import numbers, tables, theme

_LOG_ABOVE = 20  # times the median: beyond it one bar hides all others
_BETWEEN = "|"


def scores_chart(scores: Sequence[BlockScores], cuts: Sequence[Cut] = ()) -> alt.Chart:
    """One panel per criterion: a bar per block, the blocks that a cut removes in orange.

    Where one score is more than 20 times the median, the panel has a log scale and dots on stems, since a bar has no
    honest foot there. A tick marks the score without each sequence's first token. With several cuts, the page offers
    a choice of the one that is shown.
    """
    labels = tables.cut_labels(cuts)
    num_blocks = scores[0].num_blocks
    columns = 2 if len(scores) > 1 and num_blocks <= 40 else 1
    most = (theme.PAGE_WIDTH - 120) // 2 if columns == 2 else theme.PAGE_WIDTH - 70
    width = max(180, min(num_blocks * 24, most))
    panels = [_score_panel(one, place, labels, width) for place, one in enumerate(scores)]
    chart = alt.concat(*panels, columns=columns)
    if labels:
        asked, *others = labels
        choice = alt.binding_select(options=[asked, *others], name="Blocks removed by ") if others else alt.Undefined
        chart = chart.add_params(alt.param(name="cut", value=asked, bind=choice))
    title = alt.ExprRef("'Score of each block; orange: removed by ' + cut") if labels else "Score of each block"
    ticks = " Tick: without the first token of each sequence." if any(s.without_first_token for s in scores) else ""
    data = {_dataset(place): _score_rows(one, cuts, labels) for place, one in enumerate(scores)}
    return theme.finished(chart, title, f"Higher: keep. Across: original index of the block.{ticks}", data)


def ranks_chart(scores: Sequence[BlockScores], cuts: Sequence[Cut] = ()) -> alt.Chart:
    """Criteria by blocks: the darker, the sooner a block goes.

    A criterion's own cut is outlined in its row. A dot marks, in every row, the blocks of the cut that was asked for.
    """
    num_blocks = scores[0].num_blocks
    rows = _rank_rows(scores, cuts)
    step = _step(num_blocks, room=190)
    y = alt.Y("criterion:N", sort=[one.criterion for one in scores], title=None)
    base = alt.Chart().encode(
        x=alt.X("block:O", axis=theme.block_axis(num_blocks, step * num_blocks), scale=alt.Scale(paddingInner=0.06)),
        y=y,
    )
    color = alt.Color(
        "rank:Q",
        title="rank (0 goes first)",
        scale=alt.Scale(domain=[0, max(num_blocks - 1, 1)], range=list(theme.RANKS)),
        legend=alt.Legend(orient="bottom", direction="horizontal", gradientLength=180, tickMinStep=1),
    )
    tooltip = ["criterion:N", "block:Q", "rank:Q", "score:N"]
    known = (
        base.transform_filter("datum.rank !== null")
        .mark_rect(cornerRadius=1 if step > 12 else 0)
        .encode(color=color, tooltip=tooltip)
    )
    unknown = base.transform_filter("datum.rank === null").mark_text(text="?", color=theme.OTHERS)
    own = base.transform_filter("datum.own").mark_rect(
        fillOpacity=0, stroke=theme.REMOVED, strokeWidth=2 if step > 9 else 1.2
    )
    dots = base.transform_filter("datum.asked").mark_circle(
        size=22 if step > 12 else 10, color=theme.REMOVED, opacity=1, stroke="white", strokeWidth=0.6
    )
    chart = alt.layer(known, unknown, own, dots, data=alt.NamedData("ranks")).properties(
        width=alt.Step(step), height=alt.Step(24)
    )
    words = "Dark goes first."
    if any(row["own"] for row in rows):
        words += " Outlined: removed by the criterion of that row."
    if cuts:
        words += f" Dot: removed by {tables.cut_labels(cuts)[0]}."
    return theme.finished(chart, "Rank of each block under each criterion", words, {"ranks": rows})


def windows_chart(scores: BlockScores) -> alt.Chart:
    """Where a run begins by how long it is: the lighter, the less the run changes what passes through it.

    A dot marks the run of each length that changes least, which a contiguous plan of that length takes if no block in
    it is protected.

    Args:
        scores: Of a criterion that measured runs (`scores.windows`).
    """
    windows = scores.windows or ()
    best = [
        min(range(len(row)), key=lambda start, row=row: (not math.isfinite(row[start]), row[start])) for row in windows
    ]
    rows = [
        {
            "start": start,
            "length": length,
            "blocks": str(start) if length == 1 else f"{start}-{start + length - 1}",
            "distance": distance if math.isfinite(distance) else None,
            "text": numbers.number(distance),
            "best": start == best[length - 1],
        }
        for length, row in enumerate(windows, start=1)
        for start, distance in enumerate(row)
    ]
    num_blocks = scores.num_blocks
    step = _step(num_blocks, room=160)
    axis = theme.block_axis(num_blocks, step * num_blocks, title="first block of the run (original index)")
    lengths = theme.block_axis(num_blocks + 1, step * (num_blocks + 1), title="blocks in the run")
    base = alt.Chart().encode(
        x=alt.X("start:O", axis=axis),
        y=alt.Y("length:O", sort="descending", axis=lengths),
        tooltip=[
            alt.Tooltip("blocks:N", title="blocks"),
            alt.Tooltip("length:Q", title="how many"),
            alt.Tooltip("text:N", title="distance"),
        ],
    )
    color = alt.Color(
        "distance:Q",
        title="distance across the run",
        scale=alt.Scale(range=list(reversed(theme.RANKS))),
        legend=alt.Legend(orient="bottom", direction="horizontal", gradientLength=180),
    )
    dots = base.transform_filter("datum.best").mark_circle(size=22 if step > 12 else 9, color=theme.REMOVED, opacity=1)
    chart = alt.layer(base.mark_rect().encode(color=color), dots, data=alt.NamedData("windows")).properties(
        width=alt.Step(step), height=alt.Step(max(4.5, min(step, 14)))
    )
    words = "Light: the run changes little. Dot: the least of each length."
    return theme.finished(chart, f"{scores.title} across runs of neighbours", words, {"windows": rows})


def cuts_chart(cuts: Sequence[Cut]) -> alt.Chart:
    """Cuts by blocks: which blocks each cut removes."""
    num_blocks = cuts[0].plan.num_blocks
    labels = tables.cut_labels(cuts)
    rows = [
        {
            "cut": label,
            "block": block,
            "state": "removed" if block not in cut.plan.index_map else "kept",
            "becomes": cut.plan.index_map.get(block, "removed"),
        }
        for label, cut in zip(labels, cuts, strict=True)
        for block in range(num_blocks)
    ]
    totals = [
        {"cut": label, "total": f"{len(cut.plan.removed)} of {num_blocks}"}
        for label, cut in zip(labels, cuts, strict=True)
    ]
    y = alt.Y("cut:N", sort=list(labels), title=None)
    step = _step(num_blocks, room=250)
    cells = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect(cornerRadius=1 if step > 12 else 0)
        .encode(
            x=alt.X("block:O", axis=theme.block_axis(num_blocks, step * num_blocks), scale=alt.Scale(paddingInner=0.1)),
            y=alt.Y("cut:N", sort=list(labels), title=None, scale=alt.Scale(paddingInner=0.15)),
            color=alt.Color(
                "state:N",
                title=None,
                scale=alt.Scale(domain=["removed", "kept"], range=[theme.REMOVED, theme.EMPTY]),
                legend=alt.Legend(orient="bottom", symbolType="square"),
            ),
            tooltip=["cut:N", "block:Q", alt.Tooltip("becomes:N", title="becomes block")],
        )
    )
    totals_text = (
        alt.Chart(alt.Data(values=totals))
        .mark_text(align="left", dx=8)
        .encode(x=alt.value(num_blocks * step), y=y, text="total:N")
    )
    chart = alt.layer(cells, totals_text).properties(width=alt.Step(step), height=alt.Step(22))
    return theme.finished(chart, "Blocks that each cut removes")


def _dataset(place: int) -> str:
    return f"scores-{place}"


def _score_panel(scores: BlockScores, place: int, labels: Sequence[str], width: int) -> Any:
    values = [value for value in scores.values if math.isfinite(value)]
    shown = [*values, *(value for value in scores.without_first_token or () if math.isfinite(value))]
    log = _needs_log(values)
    low = min((value for value in shown if value > 0), default=1.0) / 1.6
    scale = alt.Scale(type="log", domain=[low, max(shown) * 1.4], nice=False) if log else alt.Scale()
    decades: dict[str, Any] = (
        {"values": [10.0**power for power in range(-30, 31)], "format": "~g"} if log else {"tickCount": 4}
    )
    y = alt.Y("score:Q", scale=scale, title=None, axis=alt.Axis(minExtent=34, **decades))
    removed = f"indexof(datum.removed, '{_BETWEEN}' + cut + '{_BETWEEN}') >= 0" if labels else "false"
    base = alt.Chart().encode(
        x=alt.X("block:O", axis=theme.block_axis(scores.num_blocks, width, title=None)),
        color=alt.condition(removed, alt.value(theme.REMOVED), alt.value(theme.KEPT)),
        tooltip=[
            "block:Q",
            alt.Tooltip("text:N", title="score"),
            "rank:Q",
            alt.Tooltip("bare_text:N", title="without first token"),
            alt.Tooltip("removed_text:N", title="removed by"),
        ],
    )
    if log:
        visible = base.transform_filter("datum.score > 0")
        marks = [
            visible.mark_rule(strokeWidth=1.5).encode(y=y, y2=alt.datum(low)),
            visible.mark_circle(size=34 if width / scores.num_blocks > 9 else 14, opacity=1).encode(y=y),
        ]
    else:
        marks = [base.mark_bar().encode(y=y)]
    thick = max(3.0, 0.8 * width / scores.num_blocks)
    ticks = base.transform_filter(f"isValid(datum.bare) && {'datum.bare > 0' if log else 'true'}")
    marks.append(ticks.mark_tick(thickness=1.2, size=min(thick, 16), color=theme.DENSE).encode(
        y=alt.Y("bare:Q", scale=scale, title=None), color=alt.value(theme.DENSE)
    ))  # fmt: skip
    lost = base.transform_filter("datum.score === null").mark_text(text="?", fontWeight="bold")
    marks.append(lost.encode(y=alt.value(92), color=alt.value(theme.DENSE)))
    title = alt.TitleParams(scores.title + (" (log scale)" if log else ""), fontSize=12, offset=4, limit=width)
    return alt.layer(*marks, data=alt.NamedData(_dataset(place))).properties(width=width, height=100, title=title)


def _score_rows(scores: BlockScores, cuts: Sequence[Cut], labels: Sequence[str]) -> list[dict[str, Any]]:
    bare: Sequence[float | None] = scores.without_first_token or (None,) * scores.num_blocks
    places = tables.ranks(scores)
    gone = [
        [label for label, cut in zip(labels, cuts, strict=True) if block in cut.plan.removed]
        for block in range(scores.num_blocks)
    ]
    return [
        {
            "block": block,
            "score": value if math.isfinite(value) else None,
            "text": numbers.number(value),
            "rank": places[block],
            "bare": bare[block] if numbers.is_number(bare[block]) else None,
            "bare_text": numbers.number(bare[block]),
            "removed": _BETWEEN + _BETWEEN.join(gone[block]) + _BETWEEN,
            "removed_text": ", ".join(gone[block]) or "none",
        }
        for block, value in enumerate(scores.values)
    ]


def _rank_rows(scores: Sequence[BlockScores], cuts: Sequence[Cut]) -> list[dict[str, Any]]:
    asked = set(cuts[0].plan.removed) if cuts else set()
    own: dict[str, set[int]] = {}
    for cut in cuts:
        own.setdefault(cut.plan.method, set(cut.plan.removed))
    return [
        {
            "criterion": one.criterion,
            "block": block,
            "rank": rank,
            "score": numbers.number(one.values[block]),
            "own": block in own.get(one.criterion, ()),
            "asked": block in asked,
        }
        for one in scores
        for block, rank in enumerate(tables.ranks(one))
    ]


def _needs_log(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) > _LOG_ABOVE * statistics.median(values)


def _step(num_blocks: int, room: int) -> float:
    """Pixels per block, so that all fit beside `room` pixels of labels."""
    return max(4.5, min(24.0, (theme.PAGE_WIDTH - room) / num_blocks))
