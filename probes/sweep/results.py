"""The table of a sweep, its figures and its page, written anew as it grows.

A line of a figure is the mean over seeds, its band the 95 % interval of that mean (Student's t).
The first axis of the grid with several values is across; the others make lines, up to eight.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probes.report.index import templates, write_json, write_text
from probes.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Picture,
    figure_of,
    in_style,
    number,
    png,
)
from probes.sweep.plan import Sweep, written
from synthetic.files import atomic, plain, remove

COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, "#8a6d3b", "#6b7280")
#: Drawn beside the loss where they are known: of the construction, and of the best of the class.
REFERENCES = {"construction": (VERMILION, "--"), "optimum": (BLACK, ":")}
MOST_CELLS = 400


def columns(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of the table, whatever order its points came in."""
    first = ["point", *sweep.grid, "seed"]
    rest = dict.fromkeys(name for row in rows for name in row)
    return [*first, *(name for name in rest if name not in (*first, "failed")), "failed"]


def write(
    sweep: Sweep,
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    missing: int,
    last: bool,
) -> None:
    """Write `table.csv`, `table.json`, `figures/` and `report.html`; parquet where pyarrow is.

    Args:
        sweep, out: the sweep and its folder.
        rows: of the table, in the order of the points.
        notes: what could not be measured, in lines.
        missing: how many points are not there.
        last: whether nothing will follow.
    """
    names = columns(sweep, rows)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    table.writerows([_cell(row.get(name)) for name in names] for row in rows)
    write_text(out / "table.csv", text.getvalue())
    content = {"sweep": sweep.to_json(), "columns": names, "rows": list(rows), "notes": list(notes)}
    write_json(out / "table.json", plain(content))
    if last:
        _write_parquet(out / "table.parquet", names, rows)
    pictures = draw(sweep, rows)
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        remove(old)
    for picture in pictures:
        with atomic(folder / f"{picture.name}.png") as partial:
            partial.write_bytes(picture.png)
    page = templates().get_template("sweep.html.j2")
    failed = [row for row in rows if row["failed"]]
    points = int(np.prod([len(values) for values in sweep.grid.values()]))
    write_text(
        out / "report.html",
        page.render(
            title=f"{sweep.name}: a sweep", sweep=sweep, rows=rows, columns=names, failed=failed,
            notes=notes, missing=missing, points=points, last=last, pictures=pictures,
        ),
    )  # fmt: skip


def _cell(value: Any) -> Any:
    """A value in CSV: numbers with all their digits, lists as JSON, nothing for None."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _write_parquet(path: Path, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    found = {name: [row.get(name) for row in rows] for name in names}
    for name, values in found.items():  # a column has one type
        if len({type(value) for value in values if value is not None} - {int, float}) > 0:
            found[name] = [None if value is None else written(value) for value in values]
    with atomic(path) as partial:
        pyarrow.parquet.write_table(pyarrow.table(found), partial)


def draw(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """A figure of lines for every measure, and a heat map where two axes have several values."""
    axes = [name for name, values in sweep.grid.items() if len(values) > 1]
    good = [row for row in rows if not row["failed"]]
    found = []
    for n, name in enumerate(measured_columns(sweep, rows)):
        if not axes or not any(_known(row, name) for row in good):
            continue
        found.append(lines(f"lines-{n}", name, axes, sweep, good))
        if len(axes) > 1:
            found.append(heat_map(f"map-{n}", name, axes, sweep, good))
    return found


def measured_columns(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What figures show: the measures, and of probes the columns of trained models."""
    fixed = {"point", *sweep.grid, "seed", "failed", *REFERENCES}
    every = [name for name in columns(sweep, rows) if name not in fixed]
    return [name for name in every if not name.startswith("probe:") or "trained" in name]


def _known(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) is not None and bool(np.isfinite(row[name]))


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval: 0 of a single number."""
    from scipy.stats import t

    many = np.asarray(values, float)
    if len(many) < 2:
        return float(many.mean()), 0.0
    error = many.std(ddof=1) / np.sqrt(len(many))
    return float(many.mean()), float(t.ppf(0.975, len(many) - 1) * error)


@in_style
def lines(
    anchor: str, name: str, axes: Sequence[str], sweep: Sweep, rows: Sequence[Mapping[str, Any]]
) -> Picture:
    """A measure along the first axis, a line for each setting of the others."""
    across, others = axes[0], axes[1:]
    values = list(sweep.grid[across])
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    at = values if numeric else range(len(values))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        key = ", ".join(f"{other} {written(row[other])}" for other in others)
        groups.setdefault(key, []).append(row)
    shown = list(groups)[: len(COLORS)]
    drawing, (axis,) = figure_of(7.2, 3.8)
    for key, color in zip(shown, COLORS, strict=False):
        curve = {}
        for x, value in zip(at, values, strict=True):
            at_value = [r for r in groups[key] if r[across] == value and _known(r, name)]
            if at_value:
                curve[x] = mean_and_half([r[name] for r in at_value])
        x, middle = list(curve), np.array([m for m, _ in curve.values()])
        half = np.array([h for _, h in curve.values()])
        axis.plot(x, middle, color=color, marker="o", ms=3.5, label=key or name)
        axis.fill_between(x, middle - half, middle + half, color=color, alpha=0.2, linewidth=0)
        for reference, (tint, dash) in REFERENCES.items() if name == "loss" else ():
            beside = {
                x: np.mean([r[reference] for r in groups[key] if r[across] == v])
                for x, v in zip(at, values, strict=True)
                if any(r[across] == v for r in groups[key])
                and all(_known(r, reference) for r in groups[key] if r[across] == v)
            }
            label = reference if key == shown[0] else None
            axis.plot(list(beside), list(beside.values()), color=tint, ls=dash, lw=1, label=label)
    if not numeric:
        axis.set_xticks(list(at), [written(value) for value in values])
    elif min(values) > 0 and max(values) / min(values) >= 30:
        axis.set_xscale("log")
    low = [r[name] for r in rows if _known(r, name)]
    if min(low) > 0 and max(low) / min(low) >= 30:
        axis.set_yscale("log")
    axis.set(xlabel=across, ylabel=name)
    axis.legend(fontsize=8)
    left_out = len(groups) - len(shown)
    caption = f"Mean over {len(sweep.seeds)} seed(s), with its 95 % interval."
    if name == "loss":
        caption += " Dashed: the construction on the same inputs; dotted: the best of its class."
    if left_out:
        caption += f" {left_out} further lines are in the table."
    title = f"{name} by {across}"
    return Picture(anchor, title, caption, f"{title}, a line for each other setting.", png(drawing))


@in_style
def heat_map(
    anchor: str, name: str, axes: Sequence[str], sweep: Sweep, rows: Sequence[Mapping[str, Any]]
) -> Picture:
    """A measure over the first two axes: the mean over seeds and over all other axes."""
    across, up = axes[:2]
    grid = np.full((len(sweep.grid[up]), len(sweep.grid[across])), np.nan)
    for i, y in enumerate(sweep.grid[up]):
        for j, x in enumerate(sweep.grid[across]):
            own = [r[name] for r in rows if r[across] == x and r[up] == y and _known(r, name)]
            if own:
                grid[i, j] = np.mean(own)
    drawing, (axis,) = figure_of(7.2, 1.4 + 0.35 * min(len(grid), 12))
    image = axis.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    if grid.size <= MOST_CELLS:
        for (i, j), value in np.ndenumerate(grid):
            color = "white" if value < middle else "black"
            shown = number(float(value)) if np.isfinite(value) else "failed"
            axis.text(j, i, shown, ha="center", va="center", color=color, fontsize=7)
    axis.set_xticks(range(grid.shape[1]), [written(v) for v in sweep.grid[across]])
    axis.set_yticks(range(grid.shape[0]), [written(v) for v in sweep.grid[up]])
    axis.set(xlabel=across, ylabel=up)
    drawing.colorbar(image, ax=axis, label=name)
    over = f" and over {', '.join(axes[2:])}" if axes[2:] else ""
    title = f"{name} by {across} and {up}"
    caption = f"Mean over seeds{over}."
    return Picture(anchor, title, caption, f"{title}, as a heat map.", png(drawing))
