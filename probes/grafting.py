r"""Skill grafting: which few of the weights that a fit moved carry what it learned?

With theta_0 the weights before and theta_1 those after, a mask gamma over the weights gives

    theta(gamma) = theta_0 + gamma * (theta_1 - theta_0),

and its gain is what it recovers of the fall in loss (Panigrahi et al. 2023, arXiv 2302.06600),

    Rel(gamma) = (L(theta_0) - L(theta(gamma))) / (L(theta_0) - L(theta_1)).

The mask is learned as gamma = sigmoid(S) with Adam on -Rel(gamma) + penalty sum gamma, so that
the penalty is the share of the gain that one weight must be worth, and rounded at the end. S begins
at 0: what attention computes is a product of several weights, whose gradient vanishes where all of
them are left out, so the settings of the paper (an empty mask, steps of 1e7) find nothing here.

A mask is a statement about coordinates. W_K -> R W_K, W_Q -> R^-T W_Q changes no prediction and
every mask, so masks are compared within one lineage only: models fitted on from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from constructions.runs import Run, initial_models
from probes.probe import (
    SURE,
    NotApplicable,
    Probe,
    Result,
    batch_size,
    in_its_precision,
    larger,
    seed_names,
    table,
    too_many_weights,
    unknown_fit,
)
from probes.subject import ParameterVector
from synthetic.guards import number

Weights = Float[Array, " weight"]
Mask = Bool[Array, " weight"]

#: (weights, key) -> the mean loss on a batch that the key draws; pure.
Objective = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class MaskSettings:
    """How a mask is learned.

    Attributes:
        penalty: least share of the gain that a weight in the mask is worth, at least 0.
        steps: of Adam, each on a batch of its own; at least 1.
        learning_rate: of Adam, above 0.

    Raises:
        ValueError: a number out of range.
    """

    penalty: float = 1e-3
    steps: int = 300
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        number("penalty", self.penalty, least=0)
        number("steps", self.steps, whole=True, least=1)
        number("learning_rate", self.learning_rate, above=0)


def graft(before: Weights, after: Weights, mask: Array) -> Weights:
    """theta_0 + gamma (theta_1 - theta_0); `mask` holds gamma, bool or numbers from 0 to 1."""
    return before + mask * (after - before)


def learn_mask(
    objective: Objective,
    before: Weights,
    after: Weights,
    fall: float | Array,
    key: Array,
    settings: MaskSettings | None = None,
) -> Mask:
    """The mask of the weights worth their penalty.

    Args:
        objective: the loss that the fit is about.
        before, after: theta_0 and theta_1.
        fall: L(theta_0) - L(theta_1), above 0.
        key: of the batches.
        settings: of the search; None for the defaults.

    Raises:
        ValueError: `fall` is not above 0: there is no gain to graft.
    """
    settings = settings or MaskSettings()
    if not fall > 0:
        raise ValueError(f"fall is {float(fall):.3g}, must be above 0: the fit gained nothing")
    return _search(objective, settings, before, after, jnp.asarray(fall, before.dtype), key)


@partial(jax.jit, static_argnums=(0, 1))
def _search(
    objective: Objective,
    settings: MaskSettings,
    before: Array,
    after: Array,
    fall: Array,
    key: Array,
) -> Array:
    optimizer = optax.adam(settings.learning_rate)

    def loss(scores: Array, key: Array) -> Array:
        gamma = jax.nn.sigmoid(scores)
        left = objective(graft(before, after, gamma), key) / fall
        return left + settings.penalty * gamma.sum()

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        scores, state = carry
        updates, state = optimizer.update(jax.grad(loss)(scores, key), state)
        return (optax.apply_updates(scores, updates), state), None

    scores = jnp.zeros_like(before)
    keys = jax.random.split(key, settings.steps)
    (scores, _), _ = jax.lax.scan(step, (scores, optimizer.init(scores)), keys)
    return scores > 0  # gamma above 1/2: weights without any effect stay at it, and out


def gains(
    objective: Objective,
    before: Weights,
    after: Weights,
    masks: Bool[Array, "mask weight"],
    key: Array,
) -> Float[Array, " mask"]:
    """Rel of every mask, all on the batch that `key` draws.

    1 is all of the gain; more is possible where some of what the fit did was noise, and less than 0
    where a part alone does harm.
    """
    loss = jax.jit(objective)  # compiled once for all of them
    start, end = loss(before, key), loss(after, key)
    found = jnp.stack([loss(graft(before, after, mask), key) for mask in masks])
    return (start - found) / (start - end)


def top_movement(before: Weights, after: Weights, size: int | Array) -> Mask:
    """The baseline: the `size` weights that moved furthest."""
    moved = jnp.abs(after - before)
    order = jnp.argsort(-moved)
    return jnp.zeros(moved.shape, bool).at[order].set(jnp.arange(moved.size) < size)


def random_mask(before: Weights, after: Weights, size: int | Array, key: Array) -> Mask:
    """The control: `size` of the weights that moved at all, drawn without replacement."""
    draw = jax.random.uniform(key, before.shape, before.dtype)
    return top_movement(jnp.zeros_like(before), jnp.where(after != before, draw + 1, 0), size)


def overlap(first: Mask, second: Mask) -> Float[Array, ""]:
    """|first and second| / |second|, the share of the second mask that the first has too.

    Not symmetric; NaN where the second is empty.
    """
    return (first & second).sum() / second.sum()


@in_its_precision
def measure(run: Run, seed: int) -> Result:
    """The few weights that carry what the fit learned, and in which arrays they are.

    From the weights that each fit began with to those that it ended with. Raises NotApplicable
    where a fit did not improve on its start.
    """
    task, flat = run.construction.task, ParameterVector(run.construction, run.models[0])
    pairs = [
        (flat.vector(before), flat.vector(after))
        for before, after in zip(initial_models(run), run.models, strict=True)
    ]
    weights = flat.theta.size
    size = batch_size(flat, 256, passes=2)

    def objective(theta: Array, key: Array) -> Array:
        return flat.loss(theta, task.sample(key, size))

    first, second, third = jax.random.split(jax.random.key(seed), 3)
    batch = task.sample(first, batch_size(flat, 2048))
    losses = jax.jit(flat.losses)
    rows, values = [], []
    for name, (before, after) in zip(seed_names(run), pairs, strict=True):
        start, end = losses(before, batch), losses(after, batch)
        if not larger(start, end):
            raise NotApplicable(
                f"{name}: the loss is {float(start.mean()):.4g} before the fit and "
                f"{float(end.mean()):.4g} after it, on {start.size} examples: grafting needs a "
                f"fit that improved by more than chance, {SURE} standard errors of the difference"
            )
        mask = learn_mask(objective, before, after, start.mean() - end.mean(), second)
        kept = int(mask.sum())
        controls = [random_mask(before, after, kept, key) for key in jax.random.split(third, 5)]
        without = [mask.at[part].set(False) for part in flat.parts.values()]
        masks = [mask, top_movement(before, after, kept), *controls, *without]
        left = [losses(graft(before, after, one), batch).mean() for one in masks]
        gain = (float(start.mean()) - np.asarray(left)) / float(start.mean() - end.mean())
        rows.append(name)
        values.append([weights, kept, 1.0, gain[0], gain[1], gain[2:7].mean(), np.nan])
        for (array, part), rest in zip(flat.parts.items(), gain[7:], strict=True):
            held = int(mask[part].sum())
            rows.append(f"{name}, {array}")
            share = held / kept if kept else np.nan
            values.append([part.stop - part.start, held, share, np.nan, np.nan, np.nan, rest])
    columns = (
        *("weights", "in the mask", "share of the mask", "gain of the mask"),
        *("gain of top movement", "gain of random masks", "gain without the array"),
    )
    note = (
        "gain: share of the fall in loss; a weight in the mask is worth "
        f"{MaskSettings().penalty:g} of it or more; masks compare within one lineage only"
    )
    return table(
        "skill grafting, from the start of the fit to its end", columns, rows, values, note
    )


GRAFT = Probe(
    "graft",
    "which few of the weights that a fit moved carry what it learned, and in which arrays are "
    "they?",
    "masks of two lineages or two bases are compared; a skill is spread over more weights than one "
    "over the penalty, and shows part of its gain only",
    measure,
    needs=lambda run: too_many_weights(run, "grafting") or unknown_fit(run),
    invariant=False,
    seeds=2,
)
