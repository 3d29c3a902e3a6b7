"""The chart of a healing: the objective on the training text and on the held-out text, over the tokens trained on."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from avss.record import Healing, HealingStep
from avss.reporting import numbers, theme


def healing_chart(healing: Healing | None) -> alt.Chart | None:
    """A line for the training text and dots for the held-out text; None where nothing was trained."""
    if healing is None or not healing.losses:
        return None
    rows = [
        *_rows(healing.losses, "training text", healing.best_step),
        *_rows(healing.validation, "held-out text", healing.best_step),
    ]
    base = alt.Chart().encode(
        x=alt.X("tokens:Q", title="tokens trained on", axis=alt.Axis(format="~s")),
        y=alt.Y("loss:Q", title="objective", scale=alt.Scale(zero=False)),
        tooltip=["step:Q", "tokens:Q", alt.Tooltip("text:N", title="objective"), "of:N"],
    )
    training = base.transform_filter("datum.of == 'training text'").mark_line(color=theme.KEPT, strokeWidth=1.5)
    held_out = base.transform_filter("datum.of == 'held-out text'")
    line = held_out.mark_line(color=theme.ASKED, strokeWidth=1.5)
    dots = held_out.mark_circle(size=45, opacity=1, color=theme.ASKED)
    best = held_out.transform_filter("datum.best").mark_point(size=140, color=theme.ASKED, strokeWidth=2)
    chart = alt.layer(training, line, dots, best).properties(width=theme.PAGE_WIDTH - 70, height=190)
    chart = chart.properties(data=alt.NamedData("healing"))
    return theme.finished(
        chart,
        "Healing: the objective over the tokens trained on",
        "Grey: training text. Dots: held-out text; the ring marks the weights that were kept.",
        {"healing": rows},
    )


def _rows(points: Sequence[HealingStep], of: str, best_step: int) -> list[dict[str, Any]]:
    return [
        {
            "step": point.step,
            "tokens": point.num_tokens,
            "loss": point.loss if math.isfinite(point.loss) else None,
            "text": numbers.number(point.loss),
            "of": of,
            "best": point.step == best_step,
        }
        for point in points
    ]
