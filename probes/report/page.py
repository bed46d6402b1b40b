"""A comparison as one self-contained page, its numbers as JSON and its figures as PNG files.

The page asks nothing of any other file or machine: figures are embedded, styles are inline, there
are no scripts. Its last element holds the numbers of `report.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from probes.ledger import CONSTRUCTION, NOT_APPLICABLE, RANDOM, Row
from probes.report.data import SECTIONS, Comparison
from probes.report.index import (
    DATA,
    FIGURES,
    PAGE,
    Entry,
    claim_directory,
    templates,
    write_json,
    write_text,
)
from probes.style import Picture, number
from synthetic.files import atomic, remove


@dataclass(frozen=True)
class ClaimRow:
    """A row of the ledger as the page shows it."""

    row: Row

    @property
    def must_catch(self) -> set[str]:
        """Controls that the claim must reject."""
        return {RANDOM, *self.row.claim.catches}

    @property
    def accepts(self) -> dict[str, bool]:
        """Whether the claim holds on each subject."""
        return {name: self.row.claim.holds(value) for name, value in self.row.values.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.row, name)

    def __getitem__(self, name: str) -> Any:
        return getattr(self.row, name)


def mean(row: Row | ClaimRow) -> str:
    """Mean of the trained models' values."""
    return number(sum(row.trained) / len(row.trained)) if row.trained else "not measured"


def interval(row: Row | ClaimRow) -> str:
    """The 95 % interval of that mean, empty where there is none."""
    if row.interval is None:
        return ""
    return f"[{number(row.interval[0])}, {number(row.interval[1])}]"


def controls(rows: Sequence[Row]) -> list[str]:
    """The subjects besides construction and trained models, in the ledger's order."""
    return [n for n in dict.fromkeys(n for row in rows for n in row.values) if n != CONSTRUCTION]


def tone(comparison: Comparison) -> str:
    """ "good": something was claimed and held; "none": nothing was decided; "mixed": the rest."""
    if comparison.confirmed:
        return "good"
    decided = any(row.verdict != NOT_APPLICABLE for row in comparison.rows)
    return "mixed" if decided or not comparison.certificate.passed else "none"


def entry(comparison: Comparison, seconds: float) -> Entry:
    """A comparison as the index of a demonstration has it."""
    return Entry(
        comparison.verdict,
        tone(comparison),
        comparison.counts,
        comparison.certificate.passed,
        round(seconds, 1),
    )


def _templates() -> jinja2.Environment:
    environment = templates()
    environment.filters |= {"mean": mean, "interval": interval}
    return environment


def render(comparison: Comparison, figures: Sequence[Picture]) -> str:
    """The page of a comparison."""
    # a "<" inside JSON could end the element that holds it
    data = Markup(json.dumps(comparison.to_json(), allow_nan=False).replace("<", "\\u003c"))
    shown = _View(comparison, [ClaimRow(row) for row in comparison.rows])
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            c=shown,
            title=f"{comparison.family}: {comparison.verdict}",
            tone=tone(comparison),
            pictures=figures,
            controls=controls(comparison.rows),
            data=data,
        )
    )


@dataclass(frozen=True)
class _View:
    """The comparison with its rows as the page wants them."""

    comparison: Comparison
    rows: list[ClaimRow]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comparison, name)


def pictures(comparison: Comparison) -> list[Picture]:
    """The figures of all sections, in the order of the page."""
    drawn = [] if comparison.program is None else [program_picture(comparison)]
    made = [comparison.sections[name].picture for name in SECTIONS if name in comparison.sections]
    return drawn + [make() for make in made if make is not None]


def program_picture(comparison: Comparison) -> Picture:
    """The construction itself: slots as lanes, heads between them, and their equations."""
    assert comparison.program is not None
    drawing = comparison.program.draw(name=comparison.family)
    caption = (
        "Every lane is a slot of the stream, every node a head, an MLP or a norm: it reads the "
        "lanes to its left and adds to those that its arrows lead to. Layers that repeat are drawn "
        "once; i is the token at which a head acts, j one that it attends to, M a matrix."
    )
    return Picture("program", "What is the construction?", caption, drawing.alt, drawing.png)


def write_report(
    comparison: Comparison, out: str | PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write `report.html`, `report.json` and `figures/*.png`; returns the page's path.

    Raises:
        RunError: as `claim_directory`.
    """
    out = claim_directory(out, overwrite=overwrite)
    figures = pictures(comparison)
    page = render(comparison, figures)  # whatever can fail comes before the first file
    write_json(out / DATA, comparison.to_json())
    folder = out / FIGURES
    if folder.is_symlink():
        remove(folder)  # what it leads to is not ours
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        remove(old)
    for picture in figures:
        with atomic(folder / f"{picture.name}.png") as partial:
            partial.write_bytes(picture.png)
    return write_text(out / PAGE, page)
