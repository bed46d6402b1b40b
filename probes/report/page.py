"""A comparison as one self-contained page, its numbers as JSON and its figures as PNG files.

The page asks nothing of any other file or machine: figures are embedded, styles are inline, there
are no scripts. Its last element holds the numbers of `report.json`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from probes.ledger import CONSTRUCTION, NOT_APPLICABLE, RANDOM, Row
from probes.report.data import FORMAT, SECTIONS, Comparison
from probes.style import Picture, number
from synthetic.files import RunError, atomic, check_writable, parse_json, remove

PAGE, DATA, FIGURES = "report.html", "report.json", "figures"


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


def slug(verdict: str) -> str:
    """A verdict as the name of a style."""
    return verdict.replace(" ", "-")


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


def _listing(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_listing(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_listing, value)) or "none"
    if isinstance(value, float):
        return repr(value)
    return "none" if value is None else str(value)


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("probes.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "mean": mean,
        "interval": interval,
        "tone": tone,
        "slug": slug,
        "listing": _listing,
        "base64": lambda data: base64.b64encode(data).decode(),
    }
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
    made = [comparison.sections[name].picture for name in SECTIONS if name in comparison.sections]
    return [make() for make in made if make is not None]


def claim_directory(out: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """A directory that a report may be written to; made where missing.

    Raises:
        RunError: it is a file, or holds anything and `overwrite` is False, or holds something
            that is no report of ours.
    """
    out = Path(out)
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: exists and is no directory")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise RunError(f"{out}: exists and is not empty; give --overwrite to replace a report")
        if not is_report(out):
            raise RunError(f"{out}: holds no report, so nothing in it is overwritten")
    out.mkdir(parents=True, exist_ok=True)
    return out


def is_report(directory: Path) -> bool:
    """Whether a directory holds an earlier report."""
    try:
        content = parse_json((directory / DATA).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


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
    _write_json(out / DATA, comparison.to_json())
    folder = out / FIGURES
    if folder.is_symlink():
        remove(folder)  # what it leads to is not ours
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        remove(old)
    for picture in figures:
        with atomic(folder / f"{picture.name}.png") as partial:
            partial.write_bytes(picture.png)
    return _write(out / PAGE, page)


def write_index(comparisons: Sequence[Comparison], out: str | PathLike[str]) -> Path:
    """Write the page that lists several reports, each in a folder named by its family."""
    out = Path(out)
    families = {c.family: {"verdict": c.verdict, "counts": c.counts} for c in comparisons}
    _write_json(out / DATA, {"format": FORMAT, "families": families})
    page = (
        _templates()
        .get_template("index.html.j2")
        .render(title="orrery: all families", comparisons=comparisons)
    )
    return _write(out / PAGE, page)


def _write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> Path:
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
