"""Charts of what was measured: perplexities and losses before and after, retention, size and speed."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from avss.record import Cut, RunRecord
from avss.reporting import numbers, tables, theme, verdict
from avss.reporting.rows import ComparisonRow, Estimate

_LOG_SPAN = 20
_ROW = 22


def language_chart(record: RunRecord) -> alt.Chart | None:
    """Perplexity and its kin: one panel per measure, one row per model, a line from the dense value to the cut's."""
    rows = [row for row in tables.comparison_rows(record) if row.kind == "language"]
    panels = [panel for row in rows if (panel := _language_panel(record, row)) is not None]
    if not panels:
        return None
    chart = alt.concat(*panels, columns=2)
    models = any(row.metric in tables.PERPLEXITIES for row in rows)
    title = "Language modelling before and after" if models else "Losses before and after"
    return theme.finished(chart, title, "Lower is better. Bars: ± one standard error.")


def retention_chart(record: RunRecord) -> alt.Chart | None:
    """The share kept of each result, one dot per cut, with the published promise and the dense model as rules."""
    labels = tables.cut_labels(record.cuts)
    rows = [row for label, cut in zip(labels, record.cuts, strict=True) for row in _retention_rows(record, label, cut)]
    if not rows:
        return None
    shown = [row[key] for row in rows for key in ("kept", "low", "high", "corrected") if row[key] is not None]
    scale = alt.Scale(domain=[min(0.0, *shown), max(1.05, *shown)], nice=True)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    some = [label for label in labels if any(row["cut"] == label for row in rows)]
    y = alt.Y("task:N", sort=tasks, title=None, scale=alt.Scale(paddingInner=0.35))
    offset = alt.YOffset("cut:N", sort=some)
    x = alt.X("kept:Q", scale=scale, title="share of the dense model's result", axis=alt.Axis(format="%", tickCount=6))
    color = alt.Color("cut:N", sort=some, scale=_cut_scale(some, labels), title=None, legend=_cut_legend(some))
    base = alt.Chart(alt.Data(values=rows)).encode(y=y, yOffset=offset, color=color)
    tooltip = ["task:N", "cut:N", alt.Tooltip("text:N", title="kept"), alt.Tooltip("ctext:N", title="above chance")]
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6).encode(
        x=alt.X("low:Q", scale=scale), x2="high:Q"
    )  # fmt: skip
    dots = base.mark_circle(size=62, opacity=1).encode(x=x, tooltip=tooltip)
    diamonds = base.transform_filter("isValid(datum.corrected)").mark_point(
        shape="diamond", size=42, filled=False, strokeWidth=1.4
    )  # fmt: skip
    layers = [*_rules(scale), bars, dots, diamonds.encode(x=alt.X("corrected:Q", scale=scale), tooltip=tooltip)]
    height = max(26, 11 * len(some) + 12) * len(tasks)
    chart = alt.layer(*layers).properties(width=560, height=height)
    words = "Dot: share kept, ± one standard error. Diamond: the same with guessing subtracted."
    if len(labels) > len(theme.SERIES):
        words += " Grey: the other cuts."
    return theme.finished(chart, "What is left of each result", words)


def cost_chart(record: RunRecord) -> alt.Chart | None:
    """Size, and speed where it was measured: one panel each, one bar per model."""
    if not record.cuts:
        return None
    names = ["dense", *tables.cut_labels(record.cuts)]
    models = [record.model, *(cut.model for cut in record.cuts)]
    panels = [
        _cost_panel("Parameters", names, [(m.num_parameters, numbers.count(m.num_parameters)) for m in models]),
        _cost_panel("Checkpoint", names, [(m.checkpoint_bytes, numbers.size(m.checkpoint_bytes)) for m in models]),
    ]
    for row in tables.comparison_rows(record):
        if row.kind == "cost":
            found = [row.dense, *(cell.estimate if cell else None for cell in row.cells)]
            better = "higher is better" if row.higher_is_better else "lower is better"
            values = [(one.value, one.text) if one else (math.nan, "") for one in found]
            panels.append(_cost_panel(f"{row.title} ({better})", names, values))
    return theme.finished(alt.concat(*panels, columns=2), "Size and speed")


def _language_panel(record: RunRecord, row: ComparisonRow) -> Any | None:
    names = ["dense", *tables.cut_labels(record.cuts)]
    found = [row.dense, *(cell.estimate if cell else None for cell in row.cells)]
    values = [
        _estimate_row(name, place, one) for place, (name, one) in enumerate(zip(names, found, strict=True)) if one
    ]
    values = [value for value in values if value["value"] is not None]
    if not values:
        return None
    scale = _scale([value["value"] for value in values])
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("model:N", sort=[value["model"] for value in values], title=None),
        color=alt.Color("role:N", scale=_ROLES, legend=None),
        tooltip=["model:N", alt.Tooltip("text:N", title=row.metric)],
    )
    x = alt.X(
        "value:Q",
        scale=scale,
        title=None,
        axis=alt.Axis(tickCount=5, grid=False, format="~s" if _is_log(scale) else alt.Undefined),
    )
    start = row.dense.value if row.dense and math.isfinite(row.dense.value) else None
    layers = []
    if start is not None:
        layers.append(base.mark_rule(strokeWidth=1, strokeDash=[2, 2], opacity=0.7).encode(x=x, x2=alt.datum(start)))
    layers += [
        base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2, clip=True).encode(
            x=alt.X("low:Q", scale=scale), x2="high:Q"
        ),
        base.mark_circle(size=46, opacity=1).encode(x=x),
        base.mark_text(align="left", dx=9).encode(
            x=alt.X("end:Q", scale=scale), text="text:N", color=alt.value(theme.DENSE)
        ),
    ]  # fmt: skip
    title = f"{row.title}{' (log scale)' if _is_log(scale) else ''}"
    return alt.layer(*layers).properties(
        width=300, height=alt.Step(_ROW), title=alt.TitleParams(title, fontSize=12, offset=4)
    )


_ROLES = alt.Scale(domain=["dense", "asked", "other"], range=[theme.DENSE, theme.ASKED, theme.OTHERS])


def _role(place: int) -> str:
    return ("dense", "asked")[place] if place < 2 else "other"


def _estimate_row(name: str, place: int, one: Estimate) -> dict[str, Any]:
    known = numbers.is_number(one.value)
    spread = one.stderr if known and one.stderr is not None and math.isfinite(one.stderr) else None
    return {
        "model": name,
        "role": _role(place),
        "value": one.value if known else None,
        "low": max(one.value - spread, one.value / 100) if spread is not None else None,
        "high": one.value + spread if spread is not None else None,
        "end": one.value + (spread or 0.0) if known else None,
        "text": one.text,
    }


def _scale(values: Sequence[float]) -> alt.Scale:
    """From zero with room for the labels; logarithmic where the values span more than 20 times."""
    low, high = min(values), max(values)
    if low > 0 and high > _LOG_SPAN * low:
        return alt.Scale(type="log", domain=[low / 1.5, high * (high / low) ** 0.55], nice=False)
    return alt.Scale(domain=[min(0.0, low), 1.55 * high if high > 0 else 1.0], nice=False)


def _is_log(scale: alt.Scale) -> bool:
    return scale.to_dict().get("type") == "log"


def _retention_rows(record: RunRecord, label: str, cut: Cut) -> list[dict[str, Any]]:
    titles = {(row.task, row.metric): _share_title(row) for row in tables.comparison_rows(record)}
    rows, shown = [], set()
    for entry in cut.retention:
        kept = entry.kept if entry.kept is not None else math.nan
        # A perplexity and its loss keep the same share: shown once.
        is_language = entry.metric.removeprefix("masked_").startswith(("perplexity", "loss"))
        if not math.isfinite(kept) or (is_language and (entry.task, round(kept, 9)) in shown):
            continue
        if is_language:
            shown.add((entry.task, round(kept, 9)))
        # The record's error belongs to the ratio; it is the share's error only where the two are the same.
        spread = entry.ratio_stderr if entry.kept == entry.ratio and numbers.is_number(entry.ratio_stderr) else None
        corrected = entry.chance_corrected if numbers.is_number(entry.chance_corrected) else None
        rows.append(
            {
                "task": titles.get((entry.task, entry.metric), f"{entry.task}, {entry.metric}"),
                "cut": label,
                "kept": kept,
                "low": kept - spread if spread is not None else None,
                "high": kept + spread if spread is not None else None,
                "corrected": corrected,
                "text": numbers.percent(kept, spread),
                "ctext": numbers.percent(corrected, entry.chance_corrected_stderr),
            }
        )
    return rows


def _share_title(row: ComparisonRow) -> str:
    return f"{row.task}, as dense loss / loss" if row.kind == "language" else row.title


def _cut_scale(some: Sequence[str], labels: Sequence[str]) -> alt.Scale:
    few = len(labels) <= len(theme.SERIES)
    colors = [theme.SERIES[labels.index(label)] if few else theme.OTHERS for label in some]
    if not few and some[0] == labels[0]:
        colors[0] = theme.ASKED
    return alt.Scale(domain=list(some), range=colors)


def _cut_legend(some: Sequence[str]) -> alt.Legend | None:
    if len(some) > len(theme.SERIES):
        return alt.Legend(orient="right", values=[some[0]], symbolOpacity=1)
    return alt.Legend(orient="right", symbolOpacity=1)


def _rules(scale: alt.Scale) -> list[Any]:
    marks = [
        {"at": verdict.PROMISE, "word": "90 % as published", "dash": [4, 3]},
        {"at": 1.0, "word": "dense", "dash": [1, 0]},
    ]
    layers = []
    for mark, dx, align in zip(marks, (-4, 4), ("right", "left"), strict=True):
        one = alt.Chart(alt.Data(values=[mark])).encode(x=alt.X("at:Q", scale=scale))
        layers.append(one.mark_rule(strokeDash=mark["dash"], color=theme.DENSE, opacity=0.75))
        text = one.mark_text(align=align, dx=dx, dy=-7, fontSize=10, color=theme.DENSE)
        layers.append(text.encode(text="word:N", y=alt.value(0)))
    return layers


def _cost_panel(title: str, names: Sequence[str], values: Sequence[tuple[float, str]]) -> Any:
    rows = [
        {"model": name, "role": _role(place), "value": value, "text": text}
        for place, (name, (value, text)) in enumerate(zip(names, values, strict=True))
        if math.isfinite(value)
    ]
    top = max((row["value"] for row in rows), default=1.0) or 1.0
    scale = alt.Scale(domain=[0, 1.45 * top], nice=False)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("value:Q", scale=scale, axis=None),
        y=alt.Y("model:N", sort=list(names), title=None),
        tooltip=["model:N", alt.Tooltip("text:N", title=title)],
    )
    bars = base.mark_bar(cornerRadiusEnd=2).encode(color=alt.Color("role:N", scale=_ROLES, legend=None))
    texts = base.mark_text(align="left", dx=5).encode(text="text:N")
    return alt.layer(bars, texts).properties(
        width=260, height=alt.Step(_ROW), title=alt.TitleParams(title, fontSize=12, offset=4)
    )
