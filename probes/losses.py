"""Losses as plain data: along the fit, off the training distribution, and beyond the last layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from constructions.claims import predict
from constructions.core.canonical import without_inert
from constructions.core.transformer import Transformer
from constructions.family import Construction
from constructions.runs import Run
from probes import interpolation
from probes.sections import NotApplicable
from synthetic.compilation import compile_once
from synthetic.tasks.task import Batch

SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)
DAMPINGS = (1.0, 0.75)
#: The levels in the loss curves are means over this many draws of a quarter of the examples.
DRAWS = 12


@dataclass(frozen=True)
class Curves:
    """What the fit recorded, and the levels that it is compared with.

    Attributes:
        steps: optimiser steps done, `[record]`.
        losses: mean training loss of each chunk, `[seed, record]`.
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
    """Loss on inputs scaled by a factor, of the construction and of every trained model."""

    scales: list[float]
    construction: list[float]
    trained: list[list[float]]


@dataclass(frozen=True)
class RollOut:
    """Loss when one layer is applied over and over, h <- h + damping * delta(h).

    Attributes:
        dampings: the factors.
        construction: `[damping, step]`, before the first and after every application.
        trained: `[damping, seed, step]`.
    """

    dampings: list[float]
    construction: list[list[float]]
    trained: list[list[list[float]]]


def mean_losses(
    construction: Construction,
    models: Sequence[Transformer],
    seed: int,
    batch: int,
    task: Any = None,
) -> list[float]:
    """Mean loss of every model on the same inputs of the construction's task, or of another."""
    task = construction.task if task is None else task
    drawn = task.sample(jax.random.key(seed), batch)
    predictions = (predict(construction, model, *drawn.inputs) for model in models)
    return [float(task.loss(prediction, drawn).mean()) for prediction in predictions]


def curves(run: Run, reference: Transformer, seed: int) -> Curves:
    """Loss along the fit, and the levels of the construction and the optimum."""
    if not run.history:
        raise NotApplicable("the run has no records")
    names = set(run.history[0]) - {"step", "loss", "gradient_norm", "excess"}

    def column(name: str) -> list[list[float]]:
        values = [np.atleast_1d(np.asarray(record[name], float)) for record in run.history]
        return np.stack(values, axis=1).tolist()

    inputs = run.construction.examples // 4
    draws = np.array([
        mean_losses(run.construction, (reference, *run.models), seed + n, inputs)
        for n in range(DRAWS)
    ])  # fmt: skip
    level, *trained = draws.mean(0).tolist()
    return Curves(
        steps=[int(record["step"]) for record in run.history],
        losses=column("loss"),
        metrics={name: column(name) for name in sorted(names)},
        optimum=run.optimum,
        construction=level,
        trained=trained,
        standard_error=float(draws[:, 0].std(ddof=1) / np.sqrt(DRAWS)),
    )


def scale_curve(
    construction: Construction,
    models: Sequence[Transformer],
    reference: Transformer,
    seed: int,
    batch: int,
) -> ScaleCurve:
    """Loss on inputs that are larger or smaller than those of the task."""
    scaled = getattr(construction.task, "scaled_inputs", None)
    if scaled is None:
        raise NotApplicable("the task's inputs have no scale to change")
    losses = np.array([
        mean_losses(
            construction, (reference, *models), seed, batch, task=scaled(factor)
        )
        for factor in SCALES
    ])  # fmt: skip
    return ScaleCurve(list(SCALES), losses[:, 0].tolist(), losses[:, 1:].T.tolist())


def roll_out(
    construction: Construction,
    models: Sequence[Transformer],
    reference: Transformer,
    seed: int,
    batch: int,
    depth: int = 12,
) -> RollOut:
    """Loss of the last layer looped, undamped and damped: does it go on as the algorithm would?

    Inert weights are removed first: training leaves them where they began, and a second application
    would read what they wrote.
    """
    drawn = construction.task.sample(jax.random.key(seed), batch)
    try:
        bare = [without_inert(model, construction.gauge()) for model in (reference, *models)]
        losses = np.array([
            [_rolled(construction, model, drawn, depth, damping) for model in bare]
            for damping in DAMPINGS
        ])  # fmt: skip
    except (TypeError, ValueError) as error:
        raise NotApplicable(str(error)) from error
    return RollOut(list(DAMPINGS), losses[:, 0].tolist(), losses[:, 1:].tolist())


@compile_once(static_argnums=(0, 3), often=True)
def _rolled(construction: Any, model: Transformer, drawn: Batch, depth: int, damping: Any) -> Array:
    steps = interpolation.roll_out(construction, model, *drawn.inputs, depth=depth, damping=damping)
    return jax.vmap(lambda p: construction.task.loss(p, drawn).mean())(steps)
