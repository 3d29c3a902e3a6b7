"""How every chart looks, and how one becomes a picture: one palette, one configuration, one renderer.

Blue and orange of Okabe and Ito's palette tell kept from removed for every kind of colour vision. The font is the one
that the offline renderer carries, followed by its metric twins, so that a picture and the page look the same.
"""

import functools
import hashlib
import re
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


def finished(chart: Any, title: str, subtitle: str | list[str] = "") -> alt.Chart:
    """The chart with its title and the one configuration, ready to be saved."""
    words = alt.TitleParams(title, subtitle=subtitle) if subtitle else alt.TitleParams(title)
    return chart.properties(title=words, config=CONFIG)


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


def png(chart: alt.Chart, scale: float = 2.0) -> bytes:
    """The chart as a PNG picture; drawn without a browser and without a network."""
    return vl_convert.vegalite_to_png(chart.to_dict(), vl_version=vegalite_version(), scale=scale)


def svg(chart: alt.Chart) -> str:
    """The chart as an SVG document."""
    return vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=vegalite_version())


def inline_svg(chart: alt.Chart) -> str:
    """The chart as an `<svg>` element that can stand beside others: its ids are its own."""
    drawn = svg(chart)
    own = hashlib.sha256(drawn.encode()).hexdigest()[:8]
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="avss{own}-\1"', drawn)
    drawn = re.sub(r"url\(#([^)]+)\)", rf"url(#avss{own}-\1)", drawn)
    return re.sub(r'href="#([^"]+)"', rf'href="#avss{own}-\1"', drawn)


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `window.vegaEmbed`."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vegalite_version())
