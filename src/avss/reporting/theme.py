"""How every chart looks, and how one becomes a picture: one palette, one configuration, one renderer.

Blue and orange of Okabe and Ito's palette tell kept from removed for every kind of colour vision. The font is the one
that the offline renderer carries, followed by its metric twins, so that a picture and the page look the same.
"""

import functools
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import altair as alt
import vl_convert

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
REMOVED = "#D55E00"
KEPT = "#8FAFCB"
DENSE = "#4A5560"
ASKED = "#0072B2"
OTHERS = "#9AA5B1"
SERIES = (ASKED, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8B6D3F", "#6F4E9B")
"""One colour for each of a few cuts; the first is the cut that was asked for."""
EMPTY = "#E9EDF1"
RANKS = ("#0B3C5D", "#2F76A8", "#8FBBDA", "#EDF3F8")
"""From the first block to go to the last."""

PAGE_WIDTH = 860
"""Pixels that the widest chart may take, axes included only roughly."""

_INK = "#2B333B"
_FAINT = "#DDE3E9"

CONFIG: dict[str, Any] = {
    "background": "white",
    "font": FONT,
    "padding": 8,
    "view": {"stroke": None},
    "title": {
        "anchor": "start",
        "font": FONT,
        "fontSize": 13,
        "fontWeight": "bold",
        "color": _INK,
        "subtitleFont": FONT,
        "subtitleFontSize": 11,
        "subtitleColor": "#5A6570",
        "offset": 8,
        "limit": PAGE_WIDTH,
    },
    "axis": {
        "labelFont": FONT,
        "titleFont": FONT,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelColor": "#4A5560",
        "titleColor": "#4A5560",
        "domainColor": "#B8C2CC",
        "tickColor": "#B8C2CC",
        "gridColor": _FAINT,
        "labelLimit": 230,
    },
    "axisBand": {"grid": False, "ticks": False},
    "legend": {
        "labelFont": FONT,
        "titleFont": FONT,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelColor": "#4A5560",
        "titleColor": "#4A5560",
        "labelLimit": 260,
        "offset": 10,
    },
    "mark": {"aria": False},  # the tables say the same, and a role on each of 2,500 cells multiplies the page's size
    "text": {"font": FONT, "color": _INK, "fontSize": 11},
    "concat": {"spacing": 22},
}

DARK: dict[str, Any] = {
    "background": "transparent",
    "title": {"color": "#E6EAEE", "subtitleColor": "#A9B4BF"},
    "axis": {
        "labelColor": "#B8C2CC",
        "titleColor": "#B8C2CC",
        "domainColor": "#55606B",
        "tickColor": "#55606B",
        "gridColor": "#333C45",
    },
    "legend": {"labelColor": "#B8C2CC", "titleColor": "#B8C2CC"},
    "text": {"color": "#E6EAEE"},
}
"""What the page puts over `CONFIG` for a reader who prefers dark."""

DARK_COLORS = {DENSE: "#A9B4BF", EMPTY: "#2B343C", ASKED: "#4DA6DC", OTHERS: "#74808C", REMOVED: "#F07A2B"}
"""Mark colours that vanish on a dark page, and what stands for them there."""


def finished(
    chart: Any, title: str | alt.ExprRef, subtitle: str = "", datasets: Mapping[str, list[dict[str, Any]]] | None = None
) -> alt.Chart:
    """The chart with its title and the one configuration, ready to be saved.

    Args:
        chart: Any Altair chart.
        title: What it shows.
        subtitle: How to read it.
        datasets: The rows of its `NamedData`. Altair copies what is inside a chart at every step; this is not copied.
    """
    words = alt.TitleParams(title, subtitle=subtitle) if subtitle else alt.TitleParams(title)
    whole = chart.properties(title=words, config=CONFIG)
    if datasets:
        whole.datasets = dict(datasets)
    return whole


def block_axis(num_blocks: int, width: float, title: str | None = "block (original index)") -> alt.Axis:
    """An axis over blocks that labels as many as fit into `width` pixels."""
    room = 18 if num_blocks <= 100 else 26  # pixels for a label
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, num_blocks) if step * width >= num_blocks * room)
    return alt.Axis(values=list(range(0, num_blocks, every)), labelAngle=0, title=title, labelOverlap=True)


def vegalite_version() -> str:
    """The Vega-Lite that draws, closest to the one that Altair writes for."""
    wanted = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    same_major = [version for version in known if version.split(".")[0] == wanted.split(".")[0]]
    return wanted if wanted in known else (same_major or known)[-1]


def svg(spec: dict[str, Any]) -> str:
    """A chart's `to_dict()` as an SVG document; drawn without a browser and without a network."""
    return vl_convert.vegalite_to_svg(spec, vl_version=vegalite_version())


def png(drawing: str, scale: float = 2.0) -> bytes:
    """An SVG document as a PNG picture, `scale` pixels to a point."""
    return vl_convert.svg_to_png(drawing, scale=scale)


def inline_svg(spec: dict[str, Any]) -> str:
    """A chart's `to_dict()` as an `<svg>` element that can stand beside others: its ids are its own."""
    drawn = re.sub(r'\b(?:d|transform)="[^"]*"', _rounded, svg(spec))
    own = hashlib.sha256(drawn.encode()).hexdigest()[:8]
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="avss{own}-\1"', drawn)
    drawn = re.sub(r"url\(#([^)]+)\)", rf"url(#avss{own}-\1)", drawn)
    return re.sub(r'href="#([^"]+)"', rf'href="#avss{own}-\1"', drawn)


def _rounded(attribute: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `window.vegaEmbed`."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vegalite_version())
