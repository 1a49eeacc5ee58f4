"""Drawing with matplotlib into SVG that follows the page: light or dark, any width.

No pyplot and no display: figures are made and saved directly. Lines of ink and grid are drawn in two marker
colours that become CSS colours in the SVG.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.figure import Figure

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

INK, RULE = "#0a0b0c", "#0d0e0f"
"""Marker colours: text and axes; grid."""

PALETTE = ("#3b7dd8", "#e0803a", "#2f9e77", "#b05fc9", "#d14d72", "#8a8f3c", "#5aa9c9", "#9a7b5b")
"""Colours of series, readable on white and on black."""

MOST_POINTS = 1500
"""Points a line is thinned to: a long run must not make a page of many megabytes."""

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.5,
}


class Chart:
    """A figure of equal panels in rows of at most `columns`, to be finished by `svg()`."""

    def __init__(self, panels: int, *, columns: int = 3, height: float = 2.5, width: float = 9.6) -> None:
        """Lay the panels out; sizes in inches."""
        # At least two, so that a single panel is not stretched over the page; four stand better two by two.
        columns = 2 if panels in (1, 2, 4) else min(columns, panels)
        rows = -(-panels // columns)
        self.figure = Figure(figsize=(width, height * rows), layout="constrained")
        grid = self.figure.subplots(rows, columns, squeeze=False).flatten()
        self.axes: list[Any] = list(grid[:panels])
        for spare in grid[panels:]:
            spare.set_visible(False)

    def svg(self, label: str) -> str:
        """Return an `<svg>` element that scales to its container.

        Args:
            label: What the picture shows, for readers who do not see it.
        """
        buffer = io.StringIO()
        # The salt keeps the ids apart between the pictures of one page, and equal between two writings of it.
        with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "none"}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
        return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


@contextmanager
def style() -> Iterator[None]:
    """Draw the body in the report's style."""
    with matplotlib.rc_context(_STYLE):
        yield


def colour(place: int) -> str:
    """Colour of the n-th series."""
    return PALETTE[place % len(PALETTE)]


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[Floats, Floats]:
    """Keep at most `MOST_POINTS` points of a line, the first and the last among them."""
    places = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int))
    return np.asarray(x, float)[places], np.asarray(y, float)[places]


def smooth(values: Sequence[float], span: float | None = None) -> Floats:
    """Return the running mean with exponential weights, right from the first value on (no pull towards 0).

    Args:
        values: The series. Values that are not finite are passed over.
        span: Steps that the mean reaches back; a twentieth of the series by default.

    Returns:
        A series of the same length.
    """
    span = max(span if span is not None else len(values) / 20, 1.0)
    keep = 1 - 1 / span
    total = weight = 0.0
    means = []
    for value in values:
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if weight else np.nan)
    return np.asarray(means)


def bins(
    x: Sequence[float], columns: Sequence[Sequence[float]], count: int = 200
) -> tuple[Floats, list[Floats]]:
    """Average columns over at most `count` stretches of x, so that a stacked area keeps its mean height."""
    parts = np.array_split(np.arange(len(x)), min(count, len(x)))
    middle = np.array([np.mean(np.asarray(x, float)[part]) for part in parts])
    return middle, [
        np.array([np.mean(np.asarray(column, float)[part]) for part in parts]) for column in columns
    ]
