"""Full-batch descent of a function of one vector, with what it passes through.

Everything here and in `kernels` and `sharpness` takes functions `f(theta, data)`, as `Flat.loss`
and its like are: compiled code then has its data as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from synthetic.compilation import compile_once

Theta = Float[Array, " weight"]
Loss = Callable[[Any, Any], Array]


class Path(NamedTuple):
    """Where a descent went.

    Attributes:
        steps: steps taken at every record, from 0 on.
        thetas: the weights there.
        losses: before every step, and at the end.
        states: of the optimiser, at every record.
    """

    steps: Int[np.ndarray, " record"]
    thetas: Float[Array, "record weight"]
    losses: Float[Array, " step"]
    states: Any


def descend(
    loss: Loss,
    theta: Theta,
    data: Any,
    rule: float | optax.GradientTransformation,
    steps: int,
    every: int | None = None,
) -> Path:
    """`steps` steps down `loss(theta, data)`, always the same data.

    Args:
        loss: to a scalar; pure.
        theta: where to begin.
        data: any pytree.
        rule: the step size of gradient descent, or an optax transformation.
        steps: at least 1.
        every: steps between records, a divisor of `steps`; None records the two ends.

    Raises:
        ValueError: `steps` or `every` is out of range.
    """
    every = steps if every is None else every
    if steps < 1 or every < 1 or steps % every:
        raise ValueError(f"steps={steps}, every={every}: must be at least 1, and a multiple of it")
    if not isinstance(rule, optax.GradientTransformation):
        return _descend(loss, None, steps // every, every, theta, data, rule)
    return _descend(loss, rule, steps // every, every, theta, data, 0.0)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    loss: Loss, rule: Any, records: int, every: int, theta: Array, data: Any, rate: Any
) -> Any:
    update = optax.sgd(rate) if rule is None else rule

    def step(carry: Any, _: None) -> Any:
        theta, state = carry
        value, gradient = jax.value_and_grad(loss)(theta, data)
        change, state = update.update(gradient, state, theta)
        return (optax.apply_updates(theta, change), state), value

    def record(carry: Any, _: None) -> Any:
        carry, losses = jax.lax.scan(step, carry, None, every)
        return carry, (carry, losses)

    begin = (theta, update.init(theta))
    (last, _), (visited, losses) = jax.lax.scan(record, begin, None, records)
    thetas, states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), begin, visited)
    return thetas, states, jnp.append(losses.ravel(), loss(last, data))


def _descend(
    loss: Loss, rule: Any, records: int, every: int, theta: Array, data: Any, rate: Any
) -> Path:
    thetas, states, losses = _run(loss, rule, records, every, theta, data, rate)
    return Path(np.arange(records + 1) * every, thetas, losses, states)


def normalised(rate: float) -> optax.GradientTransformation:
    """Steps of one length: theta <- theta - rate g / |g|; none where g = 0."""

    def update(gradient: Any, params: Any) -> Any:
        del params
        norm = optax.tree.norm(gradient)
        factor = jnp.where(norm > 0, -rate / jnp.where(norm > 0, norm, 1), 0)
        return jax.tree.map(lambda g: factor * g, gradient)

    return optax.stateless(update)


def root(loss: Loss) -> Loss:
    """The square root of a loss that is at least 0: its gradient keeps its length near minima."""

    def square_root(theta: Any, data: Any) -> Array:
        return jnp.sqrt(loss(theta, data))

    return square_root


@compile_once(static_argnums=(0, 1), often=True)
def gradient_moments(
    loss: Loss, sample: Callable[[Any], Any], theta: Theta, keys: Array
) -> tuple[Theta, Float[Array, ""]]:
    """Mean over batches of the gradient, and the trace of its covariance.

    Args:
        loss: `loss(theta, data)`.
        sample: key to data.
        theta: where.
        keys: one a batch, `[n]`, at least 2.
    """

    def gradient(key: Array) -> Array:
        return jax.grad(loss)(theta, sample(key))

    gradients = jax.lax.map(gradient, keys)
    return gradients.mean(0), gradients.var(0, ddof=1).sum()
