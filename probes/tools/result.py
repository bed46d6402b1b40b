"""What a tool returns: one table, which can be printed, kept as JSON or drawn."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from constructions.runs import Run
from probes.flat import Flat


@dataclass(frozen=True)
class Result:
    """A table of numbers, None where one is not defined.

    Attributes:
        title: what the numbers are.
        columns, rows: names.
        values: `[row][column]`.
        note: what a reader should know, one line; empty where there is nothing.
    """

    title: str
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def draw(self) -> bytes:
        """The table as a heat map, PNG."""
        from matplotlib.figure import Figure

        shown = np.array(self.values, float)
        width, height = 4 + 0.7 * len(self.columns), 4 + 0.3 * len(self.rows)
        figure = Figure(figsize=(min(width, 16), min(height, 14)), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(shown, aspect="auto", cmap="cividis")
        axis.set_xticks(range(len(self.columns)), self.columns, rotation=90)
        axis.set_yticks(range(len(self.rows)), self.rows)
        axis.set_title(self.title, fontsize=9, wrap=True)
        figure.colorbar(image, ax=axis)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
        return buffer.getvalue()


#: Weights of a model beyond which tools that fit it, or take its gradients one by one, refuse it.
MOST_WEIGHTS = 2**18

OF_ONE_BASIS = "the same function in another basis of the weights has other numbers"


@dataclass(frozen=True)
class Tool:
    """From a run and a seed to a table; ValueError, in one line, where a run does not fit it.

    Attributes:
        measure: the function.
        invariant: whether a model in another basis of its keys and values, which is the same
            function, has the same numbers. Where it has not, the table's note says so.
        seeds: how many of the run's seeds it looks at, None for all: rows of more say the same.
    """

    measure: Callable[[Run, int], Result]
    invariant: bool = True
    seeds: int | None = None

    def __call__(self, run: Run, seed: int) -> Result:
        """The tool's table."""
        few = replace(run, models=run.models[: self.seeds], seeds=run.seeds[: self.seeds])
        found = self.measure(few, seed)
        if self.invariant:
            return found
        return replace(found, note="; ".join(filter(None, [found.note, OF_ONE_BASIS])))


def check_weights(flat: Flat, tool: str, most: int) -> None:
    """ValueError for a model of more weights than a tool has time for."""
    if flat.theta.size > most:
        raise ValueError(f"the model has {flat.theta.size} weights, {tool} takes at most {most}")


def table(title: str, columns: Any, rows: Any, values: Any, note: str = "") -> Result:
    """A `Result` from anything array-like; numbers that are not finite become None."""
    array = np.asarray(values, float)
    plain = [[float(v) if np.isfinite(v) else None for v in row] for row in array]
    return Result(title, [str(c) for c in columns], [str(r) for r in rows], plain, note)


def seed_names(run: Run) -> list[str]:
    """A row for each trained model of a run."""
    return [f"seed {seed}" for seed in run.seeds]
