"""Sweeps of the papers, each one line to make again, with what it gave in `results/sweeps.json`.

    python benchmarks/sweeps.py NAME --out reports/sweeps --save --workers 2

    examples     one trained layer beside one step of gradient descent, as many examples as
                 dimensions, N = N_x (von Oswald et al. 2022, arXiv 2212.07677, fig. 2, right)
    covariance   the same at N = 10, d = 5, inputs whose standard deviations run from s to 1
    steps        GD++ applied 1, 2 and 3 times (fig. 3)
    length       one trained mesa layer beside ridge regression, by the length of the sequence (von
                 Oswald et al. 2023, arXiv 2309.05858, section 5)

Of every number the mean over seeds and half the 95 % interval of that mean are kept. `excess` is
the loss over the construction's on the same inputs, less 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from constructions.gradient_descent.construction import GradientDescent
from probes.sweep import Sweep
from probes.sweep.results import mean_and_half
from synthetic.tasks.regression import Gaussian, RegressionTask
from synthetic.theory.optimal_descent import optimal_descent

RESULTS = Path(__file__).parent / "results" / "sweeps.json"


@dataclass(frozen=True)
class AsManyExamples(GradientDescent):
    """One step of gradient descent on as many examples as there are dimensions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_examples", self.dim_x)
        super().__post_init__()


@dataclass(frozen=True)
class Stretched(GradientDescent):
    """One step where inputs are normal, with standard deviations from `smallest` to 1."""

    dim_x: int = 5
    smallest: float | int = 1.0

    def __post_init__(self) -> None:
        deviations = np.geomspace(float(self.smallest), 1, self.dim_x)
        object.__setattr__(self, "inputs", Gaussian(np.diag(deviations**2)))
        super().__post_init__()


@dataclass(frozen=True)
class BestDescent(GradientDescent):
    """Steps of GD++, one layer applied again and again, with the step size and curvature of least
    loss.
    """

    recurrent: bool = True

    def __post_init__(self) -> None:
        step, curvature = best_descent(self.dim_x, self.num_examples, self.steps)
        object.__setattr__(self, "step_size", step)
        object.__setattr__(self, "curvature", curvature)
        super().__post_init__()


@cache
def best_descent(dim: int, examples: int, steps: int) -> tuple[float, float]:
    """eta and gamma of least loss on contexts of the default task, by descent on 2^13 of them."""
    with jax.enable_x64(True):
        found = optimal_descent(
            RegressionTask(dim, examples), steps, shared=True, curvature=True, contexts=2**13,
            starts=2,
        )  # fmt: skip
    return float(found.step_sizes[0]), float(found.curvatures[0])


SEEDS, LOSS = range(3), ("loss", "canonical_distance")
SWEEPS = {
    "examples": Sweep(
        "sweeps:AsManyExamples", {"dim_x": (2, 5, 10, 15, 20)}, SEEDS, LOSS, quick=True
    ),
    "covariance": Sweep(
        "sweeps:Stretched", {"smallest": (1.0, 0.5, 0.25, 0.125)}, SEEDS, LOSS, quick=True
    ),
    "steps": Sweep(
        "sweeps:BestDescent", {"steps": (1, 2, 3)}, SEEDS, ("loss",), quick=True
    ),
    "length": Sweep(
        "mesa-ridge", {"length": (8, 16, 32)}, SEEDS, ("loss",), quick=True,
        settings={"recipe.steps": 600},
    ),  # fmt: skip
}  # fmt: skip


def summary(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with its seeds taken together; see the module. Fits that failed are left out."""
    found = []
    for point in dict.fromkeys(row["point"] for row in rows):
        here = [row for row in rows if row["point"] == point and not row["failed"]]
        if not here:
            continue
        line: dict[str, Any] = {name: here[0][name] for name in sweep.grid}
        for row in here:
            row["excess"] = row["loss"] / row["construction"] - 1
        for name in ("loss", "construction", "excess", *sweep.measures[1:]):
            line[name] = [float(f"{x:.4g}") for x in mean_and_half([row[name] for row in here])]
        found.append(line | {"seeds": len(here)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=SWEEPS)
    parser.add_argument("--out", type=Path, default=Path("reports/sweeps"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--save", action="store_true", help=f"keep them in {RESULTS.name}")
    given = parser.parse_args()
    sweep = SWEEPS[given.name]
    given.out.mkdir(parents=True, exist_ok=True)
    rows = sweep.run(given.out / given.name, progress=print, workers=given.workers)
    found = summary(sweep, rows)
    print(json.dumps(found, indent=1))
    if given.save:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**kept, given.name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
