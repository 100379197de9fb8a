"""Draws matplotlib figures as SVG, with the colours and the font of the HTML page around them."""

from __future__ import annotations

import html
import io
import re
from typing import Any, Literal

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, SOFT, GRID, WINNER, PUBLISHED, BAD, OTHER, PAPER = (f"#0a0b{role:02x}" for role in range(1, 9))
CLASSES = tuple(f"#0a0b{role:02x}" for role in range(16, 22))
"""A placeholder colour for each role. It is replaced by the page's CSS variable for that role."""

_ROLES = {INK: "ink", SOFT: "soft", GRID: "line", WINNER: "winner", PUBLISHED: "published", BAD: "bad", OTHER: "other"}
_ROLES |= {PAPER: "paper"}
_ROLES |= {colour: f"class{c}" for c, colour in enumerate(CLASSES)}

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.75,
    "legend.borderpad": 0.2,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

styled = matplotlib.rc_context(_STYLE)
"""A decorator for functions that draw."""

WIDE = 9.6
"""Inches of a chart as wide as the page. The other charts take half of that, or the width of a phone."""


class Chart:
    """A figure in the page's colours; `svg` returns it for the page."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.axes: Axes = self.figure.subplots()
        self.tips: dict[str, str] = {}

    def tip(self, artist: Artist, text: str) -> None:
        """Gives an artist a tooltip."""
        artist.set_gid(gid := f"tip-{len(self.tips)}")
        self.tips[gid] = text

    def legend(self, where: Literal["best", "lower right"]) -> None:
        """Draws a legend, unless nothing has a name: images of one class have no curve, and new searches no trials."""
        if self.axes.get_legend_handles_labels()[0]:
            self.axes.legend(loc=where)

    def svg(self, alt: str) -> Markup:
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": alt}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        drawn = buffer.getvalue()
        drawn = drawn[drawn.index("<svg") :]
        drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.S)
        for gid, text in self.tips.items():
            drawn = drawn.replace(f'<g id="{gid}">', f"<g><title>{html.escape(text)}</title>")
        used = set(re.findall(r"(?:#)([\w-]+)(?=[\")])", drawn))
        drawn = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", drawn)
        drawn = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", drawn)
        for colour, role in _ROLES.items():
            drawn = drawn.replace(colour, f"var(--{role})")
        drawn = re.sub(r' (width|height)="[\d.]+pt"', "", drawn, count=2)
        label = f'<svg role="img" aria-label="{html.escape(alt)}"'
        return Markup(
            re.sub(r"\n\s*", "\n", drawn.replace("<svg", label, 1))
        )  # safe: matplotlib made it, and all text is escaped


def line_style(c: int) -> dict[str, Any]:
    """Colour and dashes of the c-th class or search: some readers cannot tell the colours apart."""
    return {"color": CLASSES[c % len(CLASSES)], "linestyle": ("-", "--", "-.", ":")[c % 4]}


def in_integers(axis: Any) -> None:
    """Labels an axis of counts, such as trials or epochs."""
    axis.set_major_locator(MaxNLocator(integer=True))


def time_unit(longest: float) -> tuple[int, str]:
    """Seconds and name of the unit for an axis of times, up to the longest in seconds."""
    return (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")


def in_percent(axis: Any) -> None:
    """Labels an axis of shares as percentages."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))


def plain(name: str) -> str:
    """Escapes a user's name for matplotlib, which reads dollar signs as mathematics."""
    return name.replace("$", r"\$")
