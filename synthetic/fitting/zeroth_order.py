r"""Minimising without gradients: two values of the objective a step, along a random direction.

With z ~ N(0, I) drawn from a key (MeZO, Malladi et al. 2023, arXiv 2305.17333, after Spall 1992),

    s = (L(theta + eps z) - L(theta - eps z)) / (2 eps),       theta <- theta - rate s z.

s z is the gradient in expectation, and E|s z|^2 = (n + 2) |grad L|^2 for n weights: the rate has to
be about n times smaller than that of gradient descent. Nothing of L is differentiated, so it may be
anything that can be computed: an accuracy, the F1 of a parse, a callback to the host.

The published code walks the weights to theta + eps z, to theta - eps z and back, in place. Here
both are made of theta itself: theta is restored exactly, in any precision. z is never kept, as its
key makes it again; so a fit is its key and one number a step, and `replay`, which is
for use as a library, walks it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

#: An objective of a model; the key is that of the step, for data of its own.
Objective = Callable[[Any, Array], Array]


class ZerothOrder(NamedTuple):
    """What `minimize_without_gradients` found.

    Attributes:
        model: after the last step.
        losses: mean of the two values of every step.
        slopes: s of every step, which `replay` needs.
    """

    model: Any
    losses: Float[np.ndarray, " step"]
    slopes: Float[np.ndarray, " step"]


def moved(params: Any, key: Array, length: Any) -> Any:
    """theta + length z(key), leaf by leaf in the leaf's own dtype; pure."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    after = [
        leaf + (length * jax.random.normal(k, leaf.shape, leaf.dtype)).astype(leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, after)


def two_values(
    objective: Callable[[Any], Array], params: Any, key: Array, eps: Any
) -> tuple[Array, Array]:
    """L(theta + eps z) and L(theta - eps z); pure where L is."""
    return objective(moved(params, key, eps)), objective(moved(params, key, -eps))


def minimize_without_gradients(
    model: nnx.Module,
    objective: Objective,
    *,
    key: Array,
    steps: int,
    rate: float,
    eps: float = 1e-3,
) -> ZerothOrder:
    """Steps of a constant rate over the model's `nnx.Param`s; one jitted loop.

    Args:
        model: where to begin; not changed.
        objective: `objective(model, key)` to a scalar; both values of a step get the same key. May
            hold a `jax.pure_callback`.
        key: of directions and data.
        steps: at least 1.
        rate: above 0; for a smooth objective stable below about 2 over the trace of its Hessian.
        eps: above 0; what is minimised is the mean of the objective over theta + eps z, so a
            larger one smooths: one that is constant piece by piece needs it.

    Raises:
        ValueError: a number out of range.
        FloatingPointError: a value of the objective is not finite; names the step.
    """
    _check(rate, steps)
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps is {eps}, must be finite and above 0")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    params, found = _run(objective, graphdef, steps, params, rest, key, rate, eps)
    losses, slopes = (np.asarray(a) for a in found)
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise FloatingPointError(f"the objective is {losses[bad[0]]} at step {bad[0]}")
    return ZerothOrder(nnx.merge(graphdef, params, rest), losses, slopes)


def replay(model: nnx.Module, key: Array, slopes: Any, rate: float) -> Any:
    """The model that `minimize_without_gradients` ended with, from its slopes, up to rounding.

    Args:
        model: what it began with.
        key, rate: what it was given.
        slopes: the first ones of it, or all.
    """
    _check(rate, len(slopes))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    return nnx.merge(graphdef, _replay(params, key, jnp.asarray(slopes), rate), rest)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    objective: Objective, graphdef: Any, steps: int, params: Any, rest: Any, key: Array,
    rate: Any, eps: Any,
) -> Any:  # fmt: skip
    def step(params: Any, number: Array) -> Any:
        direction, own = _keys(key, number)

        def value(params: Any) -> Array:
            return objective(nnx.merge(graphdef, params, rest), own)

        above, below = two_values(value, params, direction, eps)
        slope = (above - below) / (2 * eps)
        return moved(params, direction, -rate * slope), ((above + below) / 2, slope)

    return jax.lax.scan(step, params, jnp.arange(steps))


@jax.jit
def _replay(params: Any, key: Array, slopes: Array, rate: Any) -> Any:
    def step(params: Any, given: Any) -> Any:
        number, slope = given
        return moved(params, _keys(key, number)[0], -rate * slope), None

    return jax.lax.scan(step, params, (jnp.arange(len(slopes)), slopes))[0]


def _keys(key: Array, step: Array) -> Array:
    """Keys of a step's direction, and of its data."""
    return jax.random.split(jax.random.fold_in(key, step))


def _check(rate: float, steps: int) -> None:
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate is {rate}, must be finite and above 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}, must be at least 1")
