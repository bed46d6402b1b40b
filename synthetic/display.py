"""How objects show themselves in a notebook: one look for all, that of the reports.

Whatever has something to show gives its parts as `Block`s, and `shown` makes HTML of them. Colours
are those of the page around it where it is dark, too: text keeps the page's own colour, and
everything else is drawn with a share of it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

STYLE = """
.orrery { font: 14px/1.5 system-ui, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
  color: inherit; max-width: 1160px; overflow-x: auto; margin: .3em 0; }
.orrery table { border-collapse: collapse; margin: .4em 0; font-variant-numeric: tabular-nums; }
.orrery caption, .orrery b.title { caption-side: top; text-align: left; font-weight: 600;
  padding: .2em 0; color: inherit; }
.orrery th { text-align: left; font-weight: 600; opacity: .75; border: 0;
  border-bottom: 2px solid rgba(128, 138, 150, .55); padding: .25em .7em .25em 0; }
.orrery td { text-align: left; vertical-align: top; border: 0; background: none;
  border-bottom: 1px solid rgba(128, 138, 150, .3); padding: .25em .7em .25em 0; }
.orrery tr { background: none; }
.orrery p { margin: .3em 0; opacity: .8; }
.orrery pre { overflow-x: auto; background: rgba(128, 138, 150, .12); color: inherit;
  padding: .6em .8em; border-radius: 6px; }
.orrery img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.orrery .mark { display: inline-block; padding: 0 .6em; border-radius: 1em; font-weight: 600;
  white-space: nowrap; color: #16202c; background: #dfe3e8; }
.orrery .mark.good { color: #00543e; background: #ddf3ea; }
.orrery .mark.bad { color: #8f3500; background: #fde5d6; }
.orrery .mark.open { color: #6b4700; background: #fdf0cf; }
"""

#: The tone of every verdict of ours.
TONES = {
    "holds": "good",
    "passed": "good",
    "reproduced": "good",
    "better": "good",
    "refuted": "bad",
    "failed": "bad",
    "differs": "bad",
    "void": "open",
    "not certified": "open",
}


def number(value: Any, digits: int = 3) -> str:
    """A number as reports print it: `digits` significant digits, "n/a" where undefined."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "n/a"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {number(v, digits)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(number(item, digits) for item in value)}]"
    if isinstance(value, int | np.integer):
        return str(value)
    text = f"{value:.{digits}g}"
    return text.replace("e-0", "e-").replace("e+0", "e+")


@dataclass(frozen=True)
class Mark:
    """A verdict, coloured by what it means."""

    text: str

    def html(self) -> str:
        """As a badge."""
        return f'<span class="mark {TONES.get(self.text, "")}">{html.escape(self.text)}</span>'


@dataclass(frozen=True)
class Table:
    """Rows of text, numbers and marks.

    Attributes:
        columns: their names; nothing where rows speak for themselves.
        rows: cells.
        title: above it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""

    def html(self) -> str:
        """As a table."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        head = f"<thead><tr>{head}</tr></thead>" if self.columns else ""
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` keeps its lines."""

    text: str
    code: bool = False

    def html(self) -> str:
        """As a paragraph."""
        tag = "pre" if self.code else "p"
        return f"<{tag}>{html.escape(self.text)}</{tag}>" if self.text else ""


@dataclass(frozen=True)
class Image:
    """A picture inside of the page.

    Attributes:
        png: its bytes.
        alt: what is to be seen, for readers who do not see it.
    """

    png: bytes
    alt: str

    def html(self) -> str:
        """As an image."""
        data = base64.b64encode(self.png).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{html.escape(self.alt)}">'


Block = Mark | Table | Text | Image


def _cell(value: Any) -> str:
    return value.html() if isinstance(value, Mark) else html.escape(number(value))


def shown(title: str, *blocks: Block) -> str:
    """HTML for `_repr_html_`: a heading and what stands below it."""
    heading = f'<b class="title">{html.escape(title)}</b> ' if title else ""
    body = "".join(block.html() for block in blocks)
    return f'<div class="orrery"><style>{STYLE}</style>{heading}{body}</div>'


def settings_table(config: Any, title: str = "") -> str:
    """A dataclass of settings: a row for each."""
    rows = [(f.name, _plain(getattr(config, f.name))) for f in fields(config)]
    return shown(title or type(config).__name__, Table(("setting", "value"), rows))


def _plain(value: Any) -> Any:
    simple = value is None or isinstance(value, str | bool | int | float)
    return "none" if value is None else value if simple else repr(value)


def curve(steps: Sequence[int | float], losses: Any, optimum: float | None = None) -> bytes:
    """A small figure of losses over steps, one line a seed; PNG.

    Args:
        steps: of the records.
        losses: `[records]` or `[records, seeds]`.
        optimum: the lowest loss that can be reached, as a dashed line.
    """
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.4), layout="constrained", facecolor="white")
    axis = figure.subplots()
    values = np.asarray(losses, float)
    axis.plot(steps, values, lw=1.3, color="#0072B2", alpha=0.8)
    if optimum is not None:
        axis.axhline(optimum, color="black", ls="--", lw=1, label="lowest that can be reached")
        axis.legend(frameon=False, fontsize=8)
    if np.isfinite(values).all() and (values > 0).all() and values.max() > 10 * values.min():
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel="loss")
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


class ShowsHistory:
    """A base for what has a `history` of records and `seeds`: their last losses, and the curve."""

    history: list[dict[str, Any]]
    seeds: tuple[int, ...]

    def _repr_html_(self) -> str:
        kind, count = type(self).__name__, len(self.seeds)
        title = f"{kind} of {count} model{'' if count == 1 else 's'}"
        records = [record for record in self.history if "loss" in record]
        if not records:
            return shown(f"{title} without a history")
        steps, losses = ([record[name] for record in records] for name in ("step", "loss"))
        last = losses[-1] if isinstance(losses[-1], list) else [losses[-1]]
        rows = [(seed, number(loss, 4)) for seed, loss in zip(self.seeds, last, strict=False)]
        alt = f"Loss over steps: from {number(losses[0])} to {number(losses[-1])}."
        picture = Image(curve(steps, losses), alt)
        return shown(f"{title}, {steps[-1]} steps", picture, Table(("seed", "last loss"), rows))


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, whose first line is its head, with columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *rows = lines
    return "\n".join(
        "| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + " |"
        for line in (head, ["-" * width for width in widths], *rows)
    )


class ShowsMarkdown:
    """A base for what says itself as a table of Markdown."""

    def markdown(self) -> str:
        """The table as text."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        lines = [line.strip("| ").split(" | ") for line in self.markdown().splitlines()]
        columns, _, *rows = [[cell.strip() for cell in line] for line in lines]
        return shown("", Table(columns, rows))
