"""The parts of a comparison, as plain data: loss curves, weights, patching map, input scale.

Every function takes what any family offers, and raises `NotApplicable` where a family lacks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.family import Construction
from constructions.runs import Run
from constructions.symmetries import canonical, head_products
from constructions.transformer import Transformer
from probes import interchange

#: Beyond this width the canonical tensor, of width^4 entries, is not drawn.
WIDEST = 48
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


class NotApplicable(Exception):
    """A section that this family does not have; the message says why."""


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
    """

    steps: list[int]
    losses: list[list[float]]
    metrics: dict[str, list[list[float]]]
    optimum: float | None
    construction: float
    trained: list[float]


@dataclass(frozen=True)
class Weights:
    """One gauge-fixed matrix of a layer, in the construction and in the first trained model.

    Attributes:
        title: the matrix, as an equation.
        rows, columns: what the entries of either axis belong to, one label each.
        construction, trained: the matrices.
        distance: |trained - construction| / |construction| of this matrix, for every seed.
    """

    title: str
    rows: list[str]
    columns: list[str]
    construction: list[list[float]]
    trained: list[list[float]]
    distance: list[float]


@dataclass(frozen=True)
class Patches:
    """Effect of exchanging one token's stream after one layer, `[layer, token]`; see interchange.

    Attributes:
        construction, trained: effects, the trained one the mean over seeds.
        correlation: between the two maps, for every seed.
        relative_error: |trained - construction| / |construction|, for every seed.
    """

    construction: list[list[float]]
    trained: list[list[float]]
    correlation: list[float]
    relative_error: list[float]


@dataclass(frozen=True)
class ScaleCurve:
    """Loss on inputs scaled by a factor, of the construction and of every trained model."""

    scales: list[float]
    construction: list[float]
    trained: list[list[float]]


@partial(jax.jit, static_argnums=(0, 3, 4))
def _losses(
    construction: Any, models: tuple[Transformer, ...], key: Array, batch: int, task: Any
) -> Array:
    drawn = task.sample(key, batch)
    return jnp.stack([task.loss(construction.apply(m, *drawn.inputs), drawn).mean() for m in models])


def mean_losses(
    construction: Construction,
    models: Sequence[Transformer],
    seed: int,
    batch: int,
    task: Any = None,
) -> list[float]:
    """Mean loss of every model on the same inputs of the construction's task, or of another."""
    task = construction.task if task is None else task
    return _losses(construction, tuple(models), jax.random.key(seed), batch, task).tolist()


def curves(run: Run, reference: Transformer, seed: int, batch: int) -> Curves:
    """Loss along the fit, and the levels of the construction and the optimum."""
    if not run.history:
        raise NotApplicable("the run has no records")
    names = set(run.history[0]) - {"step", "loss", "gradient_norm", "excess"}

    def column(name: str) -> list[list[float]]:
        values = [np.atleast_1d(np.asarray(record[name], float)) for record in run.history]
        return np.stack(values, axis=1).tolist()

    level, *trained = mean_losses(
        run.construction, (reference, *run.models), seed, 4 * batch
    )
    return Curves(
        steps=[int(record["step"]) for record in run.history],
        losses=column("loss"),
        metrics={name: column(name) for name in sorted(names)},
        optimum=run.optimum,
        construction=level,
        trained=trained,
    )


def weights(
    construction: Construction, models: Sequence[Transformer], reference: Transformer
) -> list[Weights]:
    """Slices of the canonical tensor of the first layer; products of heads where there is none."""
    width = reference.config.width
    if any(model.config.width != width for model in models):
        raise NotApplicable("the trained model's stream is of another width")
    names = _columns(construction)
    gauge = construction.gauge()
    try:
        if width > WIDEST:
            raise TypeError(f"the stream has {width} columns")
        built, *trained = (np.asarray(canonical(m, gauge)[0]) for m in (reference, *models))
    except TypeError:
        return _products(models, reference, names)
    o, a, b, c = np.unravel_index(np.abs(built).argmax(), built.shape)
    out = _labels(names, gauge.read if reference.config.depth == 1 else np.eye(width))
    into = _labels(names, gauge.query.T if reference.config.depth == 1 else np.eye(width))
    return [
        _weights(
            f"T[{out[o]}, {names[a]}, b, c]",
            (names, into),
            built[o, a],
            [t[o, a] for t in trained],
        ),
        _weights(
            f"T[o, a, {names[b]}, {into[c]}]",
            (out, names),
            built[:, :, b, c],
            [t[:, :, b, c] for t in trained],
        ),
    ]


def _products(
    models: Sequence[Transformer], reference: Transformer, names: list[str]
) -> list[Weights]:
    built, *trained = (head_products(model) for model in (reference, *models))
    if any(len(t.key_query) != len(built.key_query) for t in trained):
        raise NotApplicable("the trained model has another number of layers")
    return [
        _weights(
            f"{title} of layer 1, summed over heads",
            (names, names),
            np.asarray(getattr(built, part)[0].sum(0)),
            [np.asarray(getattr(t, part)[0].sum(0)) for t in trained],
        )
        for part, title in (("key_query", "W_K^T W_Q"), ("output_value", "P W_V"))
    ]


def _weights(
    title: str, labels: tuple[list[str], list[str]], built: np.ndarray, trained: list[np.ndarray]
) -> Weights:
    scale = float(np.linalg.norm(built)) or 1.0
    distance = [float(np.linalg.norm(t - built)) / scale for t in trained]
    return Weights(title, *labels, built.tolist(), trained[0].tolist(), distance)


def _columns(construction: Construction) -> list[str]:
    """A name for every column of the stream: its slot, with an index where it has several."""
    slots = construction.program.slots
    names = [""] * slots.width
    for slot in slots:
        for index in range(slot.size):
            label = slot.name if slot.size == 1 else f"{slot.name}{index + 1}"
            column = slot.start + index
            names[column] = f"{names[column]}/{label}" if names[column] else label
    return names


def _labels(names: list[str], rows: np.ndarray) -> list[str]:
    """A name for every row: that of its largest column."""
    return [names[int(np.abs(row).argmax())] for row in rows]


def patches(
    construction: Construction, models: Sequence[Transformer], reference: Transformer, seed: int
) -> Patches:
    """Effect of exchanging one token's stream between two inputs, at every layer and token."""
    base, source = (construction.sample(key, 64) for key in jax.random.split(jax.random.key(seed)))
    try:
        found = [
            interchange.interchange_agreement(construction, model, reference, base, source)
            for model in models
        ]
    except ValueError as error:
        raise NotApplicable(str(error)) from error
    return Patches(
        construction=found[0].reference.effect.tolist(),
        trained=np.mean([f.model.effect for f in found], axis=0).tolist(),
        correlation=[f.correlation for f in found],
        relative_error=[f.relative_error for f in found],
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
