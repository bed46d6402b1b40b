"""Does training find the construction's loss, and does it fail where the algorithm fails?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from constructions.claims import mean_loss, predict
from constructions.family import Construction
from constructions.runs import Run
from probes.probe import Probe, Result, compiled_like, own_near_misses, seed_names, table
from probes.style import (
    CONSTRUCTION,
    GREEN,
    GREY,
    NEAR_MISSES,
    OPTIMUM,
    ORANGE,
    PURPLE,
    SKY,
    TRAINED,
    Picture,
    band,
    figure_of,
    four,
    in_style,
    number,
    percent,
    png,
    span,
    ticks,
)

SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)
#: The examples of the levels in the loss curves are drawn in so many parts, for an error.
DRAWS = 12


@dataclass(frozen=True)
class Curves:
    """What the fit recorded, and the levels that it is compared with.

    Attributes:
        steps: optimiser steps done, `[record]`.
        losses: mean training loss of each chunk, `[seed, record]`; empty where the run was not
            fitted here.
        metrics: further quantities along the fit, `[seed, record]` each.
        optimum: the lowest loss that the class can reach, None where it is not known.
        construction: loss of the compiled construction.
        trained: loss of every trained model, on the same inputs.
        standard_error: of the construction's loss, from several draws of inputs.
    """

    steps: list[int]
    losses: list[list[float]]
    metrics: dict[str, list[list[float]]]
    optimum: float | None
    construction: float
    trained: list[float]
    standard_error: float


@dataclass(frozen=True)
class ScaleCurve:
    """Loss on inputs scaled by a factor, of the construction and of every trained model.

    And of the near-misses by name: what the curve would be of another algorithm.
    """

    scales: list[float]
    construction: list[float]
    trained: list[list[float]]
    near_misses: dict[str, list[float]] = field(default_factory=dict)


def mean_losses(
    construction: Construction,
    models: Sequence[Any],
    seed: int,
    batch: int,
    task: Any = None,
) -> list[float]:
    """Mean loss of every model on the same inputs: the construction's task's, or another's."""
    task = construction.task if task is None else task
    drawn = task.sample(jax.random.key(seed), batch)
    predictions = (predict(construction, model, *drawn.inputs) for model in models)
    return [float(mean_loss(construction, prediction, drawn)) for prediction in predictions]


def measure(run: Run, seed: int, batch: int = 2**16) -> Result:
    """Loss along the fit, where it was recorded, and the levels of construction and optimum.

    Each of the levels is the mean over `batch` inputs, or as many as the construction has as its
    `examples` if that is less, drawn in `DRAWS` parts.
    """
    first = run.history[0] if run.history else {}
    names = set(first) - {"step", "loss", "gradient_norm", "excess"}

    def column(name: str) -> list[list[float]]:
        values = [np.atleast_1d(np.asarray(record[name], float)) for record in run.history]
        return np.stack(values, axis=1).tolist()

    reference = compiled_like(run.construction, run.models[0])
    inputs = max(1, min(batch, run.construction.examples) // DRAWS)
    draws = np.array([
        mean_losses(run.construction, (reference, *run.models), seed + n, inputs)
        for n in range(DRAWS)
    ])  # fmt: skip
    level, *trained = draws.mean(0).tolist()
    found = Curves(
        steps=[int(record["step"]) for record in run.history],
        losses=column("loss") if run.history else [],
        metrics={name: column(name) for name in sorted(names)},
        optimum=run.optimum,
        construction=level,
        trained=trained,
        standard_error=float(draws[:, 0].std(ddof=1) / np.sqrt(DRAWS)),
    )
    best = [] if run.optimum is None else [("optimum of the class", run.optimum, np.nan)]
    last = [losses[-1] for losses in found.losses] or [np.nan] * len(trained)
    rows = [("construction", level, np.nan), *zip(seed_names(run), trained, last, strict=True)]
    return table(
        "loss of construction and trained models",
        ("on fresh inputs", "last of the fit's records"),
        [row[0] for row in (*rows, *best)],
        [row[1:] for row in (*rows, *best)],
        data=found,
        picture=partial(figure, found),
    )


def measure_scaled(run: Run, seed: int, batch: int = 1024) -> Result:
    """Loss on inputs that are larger or smaller than those of the task."""
    construction = run.construction
    reference = compiled_like(construction, run.models[0])
    near = own_near_misses(construction)
    models = (reference, *run.models, *near.values())
    scaled = construction.task.scaled_inputs  # type: ignore[attr-defined]
    losses = np.array(
        [mean_losses(construction, models, seed, batch, task=scaled(f)) for f in SCALES]
    )
    own, *trained = losses.T.tolist()
    missed = dict(zip(near, trained[len(run.models) :], strict=True))
    found = ScaleCurve(list(SCALES), own, trained[: len(run.models)], missed)
    return table(
        "loss on inputs scaled by a factor",
        [f"{factor:g} times" for factor in SCALES],
        ("construction", *seed_names(run), *(f"near-miss: {name}" for name in near)),
        losses.T,
        data=found,
        picture=partial(figure_scaled, found),
    )


def needs_a_scale(run: Run) -> str:
    """A task whose inputs can be made larger."""
    task = run.construction.task
    return "" if hasattr(task, "scaled_inputs") else "the task's inputs have no scale to change"


@in_style
def figure(curves: Curves) -> Picture:
    """Loss along the fit, and further quantities beside it."""
    import matplotlib.ticker

    names = {"exact_excess": "exact excess over the optimum"}
    metrics = {n: np.asarray(v, float) for n, v in curves.metrics.items()}
    metrics = {n: v for n, v in metrics.items() if np.isfinite(v).all() and (v > 0).all()}
    drawing, axes = figure_of(9.2, 3.3, 2 if metrics else 1)
    left, seeds = axes[0], len(curves.trained)
    if curves.losses:
        who = f"trained, {seeds} seeds (mean, range)" if seeds > 1 else "trained"
        band(left, curves.steps, curves.losses, TRAINED, who)
        where = "optimiser steps"
    else:
        left.plot(
            range(seeds), curves.trained, "o", color=TRAINED, label="trained, on fresh inputs"
        )
        ticks(left.xaxis, [str(n) for n in range(seeds)])
        where = "model"
    if curves.construction > 0:  # the axis is logarithmic
        left.axhline(curves.construction, color=CONSTRUCTION, ls="--", label="construction")
    if curves.optimum is not None:
        left.axhline(curves.optimum, color=OPTIMUM, ls=":", label="optimum of the class")
    left.set(xlabel=where, ylabel="loss", title="Loss", yscale="log")
    digits = matplotlib.ticker.FormatStrFormatter("%.4g")  # narrow ranges differ in the fourth
    low, high = left.get_ylim()
    left.yaxis.set_major_formatter(digits)
    narrow = high < 30 * low  # else the labels of minor ticks would overlap
    left.yaxis.set_minor_formatter(digits if narrow else matplotlib.ticker.NullFormatter())
    left.legend()
    for (name, values), color in zip(metrics.items(), (GREEN, PURPLE, ORANGE, SKY), strict=False):
        band(axes[1], curves.steps, values, color, names.get(name, name).replace("_", " "))
    if metrics:
        title = "Distance to the optimum"
        axes[1].set(xlabel="optimiser steps", ylabel="fraction", title=title, yscale="log")
        axes[1].legend()
    level = curves.construction
    when = f"After {curves.steps[-1]} steps the" if curves.steps else "The"
    caption = (
        f"{when} trained loss is {span(curves.trained, four)} on "
        f"fresh inputs, and the construction's {four(level)} (standard error "
        f"{number(curves.standard_error, 2)})"
    )
    if level:
        excess = [loss / level - 1 for loss in curves.trained]
        caption += f"; on the same inputs they differ by {span(excess, percent)}"
    caption += "."
    if curves.optimum is not None:
        caption += f" The optimum of the class is {four(curves.optimum)}."
    for name, values in metrics.items():
        shown = names.get(name, name).replace("_", " ")
        caption += f" Last {shown}: {span(values[:, -1].tolist(), percent)}."
    alt = "Training loss of every seed falls onto the lines of construction and optimum."
    if not curves.losses:
        alt = "Losses of the trained models beside the lines of construction and optimum."
    return Picture(
        "loss", "Does training find the construction's loss?", caption, alt, png(drawing)
    )


@in_style
def figure_scaled(curve: ScaleCurve) -> Picture:
    """Loss against the scale of the inputs."""
    drawing, (axis,) = figure_of(6.4, 3.2)
    band(axis, curve.scales, curve.trained, TRAINED, "trained (mean, range of seeds)")
    axis.plot(curve.scales, curve.construction, color=CONSTRUCTION, ls="--", label="construction")
    for n, losses in enumerate(curve.near_misses.values()):
        axis.plot(
            curve.scales, losses, color=GREY, lw=0.8, zorder=1, label=None if n else NEAR_MISSES
        )
    axis.axvline(1, color=GREY, lw=0.8, ls=":")
    axis.set(xlabel="scale of the inputs (1: as in training)", ylabel="loss", yscale="log")
    axis.legend()
    built, trained = np.asarray(curve.construction), np.asarray(curve.trained)
    gap = np.abs(trained / built - 1)
    worst = int(gap.max(0).argmax())
    caption = (
        "Off the training distribution the losses differ by at most "
        f"{percent(float(gap.max()))}, at scale {number(curve.scales[worst])} "
        f"(construction {four(float(built[worst]))}, trained "
        f"{span(trained[:, worst].tolist(), four)}): a shared failure is evidence of a shared "
        "algorithm."
    )
    if curve.near_misses:
        far = {
            n: float(np.abs(np.array(v) / built - 1).max()) for n, v in curve.near_misses.items()
        }
        nearest = min(far, key=lambda name: far[name])
        caption += (
            f" If the claim were false: of {len(far)} near-misses, in grey, the closest "
            f"({nearest}) is {percent(far[nearest])} away."
        )
    others = ", trained and near-misses." if curve.near_misses else " and trained."
    alt = f"Loss against the scale of the inputs, construction{others}"
    title = "Does it fail where the algorithm fails?"
    return Picture("scale", title, caption, alt, png(drawing))


LOSSES = Probe(
    "losses",
    "does training find the construction's loss?",
    "the task is solved by much else: an equal loss says nothing of how",
    measure,
    functions=True,
)

SCALE = Probe(
    "scale",
    "does the trained model fail where the algorithm fails, on inputs of another scale?",
    "models that are linear in their inputs scale alike, whatever they compute",
    measure_scaled,
    needs_a_scale,
    functions=True,
)
