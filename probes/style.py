"""How results look: palette and sizes of figures, how numbers are written, and plain data."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from synthetic.display import number as number

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# Okabe and Ito's palette, told apart by colour-blind readers
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#6b7280"
TRAINED, CONSTRUCTION, OPTIMUM = BLUE, VERMILION, BLACK

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#4b5563",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#1f2937",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
MOST_LABELS = 24
DPI = 160
#: Columns of what is printed where there is no terminal to say how many it has.
WIDTH = 100


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: of the PNG file and the anchor.
        title, caption: what it answers, and the answer with numbers.
        alt: what is to be seen, for readers who do not see it.
        png: the image.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes

    @property
    def width(self) -> int:
        """At which the page shows it, in CSS pixels, so that all labels have one size."""
        return round(int.from_bytes(self.png[16:20]) / DPI * 112)


def percent(value: float) -> str:
    """A fraction in per cent."""
    return f"{number(100 * value)} %"


def span(values: Sequence[float], show: Callable[[float], str] = number) -> str:
    """The range of several numbers, or the one there is."""
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    # no date and no version inside: the same data give the same bytes
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def figure_of(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many inches and its axes, in one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


#: Their lines in a figure are grey and thin.
NEAR_MISSES = "near-misses (another algorithm)"


def band(axis: Any, x: Any, curves: Any, color: str, label: str) -> None:
    """The mean over seeds, and the range of all seeds as a band."""
    curves = np.asarray(curves, float)
    axis.plot(x, curves.mean(0), color=color, label=label)
    if len(curves) > 1:
        axis.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.22, linewidth=0)


def four(value: float) -> str:
    """A number with four significant digits."""
    return number(value, 4)


def ticks(axis: Any, labels: list[str], **options: Any) -> None:
    """Labels of an axis, as many as there is room for."""
    every = -(-len(labels) // MOST_LABELS)
    axis.set_ticks(range(0, len(labels), every), labels[::every], **options)


def in_style(make: Callable[..., Picture]) -> Callable[..., Picture]:
    """A function that draws, with the settings of all our figures."""

    @wraps(make)
    def drawn(*data: Any) -> Picture:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return make(*data)

    return drawn


def headed_table(title: str, *columns: str) -> Table:
    """An empty table for `rich`; what must be typed stands in its first column, never broken."""
    from rich.table import Column, Table

    first, *others = (Column(name, overflow="fold") for name in columns)
    first.no_wrap = True
    return Table(first, *others, title=title, title_justify="left", header_style="bold")
