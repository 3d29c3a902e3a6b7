"""The figure of the published script: three rows of two panels, the last one empty."""

from typing import Any

import altair as alt

from avss.record import PublishedMetrics
from avss.reporting import theme

PANELS = (
    ("Activation Variance per Layer", "Variance", "variance"),
    ("L1 Norm per Layer", "L1 Norm", "l1_norm"),
    ("L2 Norm per Layer", "L2 Norm", "l2_norm"),
    ("Frobenius Norm per Layer", "Frobenius Norm", "frobenius_norm"),
    ("Activation Sparsity per Layer", "Sparsity", "sparsity"),
)
"""Title, y label and field of each panel, as published, in reading order. The sixth place stays empty."""


_TINY = 1e-3  # below it, zeros after the point are counted, not read


def published_chart(metrics: PublishedMetrics) -> alt.Chart:
    """Bars over layers: variance, L1 norm, L2 norm, Frobenius norm, sparsity."""
    panels = [_panel(title, label, getattr(metrics, field)) for title, label, field in PANELS]
    return theme.finished(alt.concat(*panels, columns=2), "What the published script measures")


def _panel(title: str, label: str, values: tuple[float, ...]) -> Any:
    width = 360
    rows = [{"layer": layer, "value": value} for layer, value in enumerate(values)]
    form = ".1e" if max(values) < _TINY else alt.Undefined
    axis = theme.block_axis(len(values), width, title="Layer")
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(color=theme.ASKED, opacity=0.6)
        .encode(
            x=alt.X("layer:O", axis=axis),
            y=alt.Y("value:Q", title=label, axis=alt.Axis(tickCount=5, format=form, minExtent=50)),
            tooltip=[alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("value:Q", title=label, format=".6g")],
        )
        .properties(width=width, height=220, title=alt.TitleParams(title, fontSize=12, offset=4, anchor="middle"))
    )
