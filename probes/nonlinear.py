"""Probes with one hidden layer: what can be read off features, but not by a linear map.

    found(x)  =  b + W relu(c + V s(x)),        s standardises by the training rows,

is fitted to the least squared error by Adam on batches of rows, and of all the weights on the way
those are kept that are best on validation rows (early stopping). W and b start at 0, so that a
probe that finds nothing predicts the training mean.

A hidden layer finds more than is there for the model to use: compare with the same probe on the
embedding and on control targets, and with the linear probe (`probes.linear`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from probes.linear import Split, standardise


@dataclass(frozen=True)
class ProbeRecipe:
    """How a probe is fitted.

    Attributes:
        hidden: units of the hidden layer.
        steps: of Adam; the learning rate falls to 0 along a cosine.
        batch: rows in a step.
        learning_rate: at the start.
        checks: how often, at equal distances, the validation rows are looked at.
    """

    hidden: int = 64
    steps: int = 1500
    batch: int = 256
    learning_rate: float = 3e-3
    checks: int = 30

    def __post_init__(self) -> None:
        for name in ("hidden", "steps", "batch", "learning_rate", "checks"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0")
        if self.steps % self.checks:
            raise ValueError(f"checks is {self.checks}, must divide steps, {self.steps}")


class TwoLayer(NamedTuple):
    """Probes of several feature sets (layers) for several targets (steps).

    Attributes:
        hidden_weight: V, `[layer, step, feature, hidden]`, of features as they were given.
        hidden_bias: c, `[layer, step, hidden]`.
        weight, bias: W and b, `[layer, step, hidden, target]` and `[layer, step, target]`.
        stopped: steps of Adam after which these were the weights, `[layer, step]`.
    """

    hidden_weight: Array
    hidden_bias: Array
    weight: Array
    bias: Array
    stopped: Array

    def __call__(self, features: Any) -> np.ndarray:
        """Predictions `[step, layer, row, target]` from features `[layer, row, feature]`."""
        found = []
        for layer, x in enumerate(np.asarray(features, np.float32)):
            v, c, w, b = (np.asarray(a[layer]) for a in self[:4])
            hidden = np.maximum(x @ v + c[:, None], 0)
            found.append(hidden @ w + b[:, None])
        return np.stack(found, 1)


def two_layer(
    features: Any, targets: Any, parts: Split, key: Array, recipe: ProbeRecipe | None = None
) -> TwoLayer:
    """Probes for all pairs of `features[layer]` and `targets[step]`, in one compiled call.

    Args:
        features: `[layer, row, feature]`.
        targets: `[step, row, target]`.
        parts: rows of the training, validation and test parts; the latter is not looked at.
        key: of the weights at the start and the order of the rows, the same for all pairs.
        recipe: None: `ProbeRecipe()`.

    Raises:
        ValueError: rows of features and targets are not as many.
    """
    features, targets = jnp.asarray(features), jnp.asarray(targets)
    if features.ndim != 3 or targets.ndim != 3 or features.shape[1] != targets.shape[1]:
        raise ValueError(
            f"features has shape {features.shape} and targets {targets.shape}, must be [layer, row,"
            " feature] and [step, row, target] with the same rows"
        )
    seen = tuple(map(jnp.asarray, parts[:2]))
    return _two_layer(features, targets, seen, key, recipe=recipe or ProbeRecipe())


@partial(jax.jit, static_argnames="recipe")
def _two_layer(
    features: Array, targets: Array, parts: tuple[Array, ...], key: Array, *, recipe: ProbeRecipe
) -> TwoLayer:
    dtype, size = features.dtype, targets.shape[-1]
    start_key, order_key = jax.random.split(key)
    every = recipe.steps // recipe.checks
    decay = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
    optimizer = optax.adam(decay)
    dot = partial(jnp.matmul, precision="highest")

    def predict(w: Any, x: Array) -> Array:
        return dot(jax.nn.relu(dot(x, w[0]) + w[1]), w[2]) + w[3]

    def loss(w: Any, x: Array, y: Array) -> Array:
        return jnp.sum((predict(w, x) - y) ** 2, -1).mean()

    def probe(rows: list[Array], y: Array) -> tuple[Any, Array]:
        fan = rows[0].shape[1]
        v = jax.random.normal(start_key, (fan, recipe.hidden), dtype) * (2 / fan) ** 0.5
        zeros = (jnp.zeros(recipe.hidden, dtype), jnp.zeros((recipe.hidden, size), dtype))
        start = (v, *zeros, jnp.zeros(size, dtype))
        wanted = [y[part] for part in parts]

        def step(carry: Any, number: Array) -> tuple[Any, None]:
            w, state = carry
            own = jax.random.fold_in(order_key, number)
            drawn = jax.random.randint(own, (recipe.batch,), 0, len(rows[0]))
            gradient = jax.grad(loss)(w, rows[0][drawn], wanted[0][drawn])
            update, state = optimizer.update(gradient, state, w)
            return (optax.apply_updates(w, update), state), None

        def check(carry: Any, number: Array) -> tuple[Any, None]:
            running, best, least, stopped = carry
            running, _ = jax.lax.scan(step, running, number * every + jnp.arange(every))
            missed = loss(running[0], rows[1], wanted[1])
            # NaN is not less: a fit that diverges keeps what it had
            better = missed < least
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), running[0], best)
            stopped = jnp.where(better, (number + 1) * every, stopped)
            return (running, best, jnp.where(better, missed, least), stopped), None

        first = (start, start, loss(start, rows[1], wanted[1]), jnp.zeros((), int))
        carry = ((start, optimizer.init(start)), *first[1:])
        (_, best, _, stopped), _ = jax.lax.scan(check, carry, jnp.arange(recipe.checks))
        return best, stopped

    def layer(x: Array) -> TwoLayer:
        rows, mean, std = standardise([x[part] for part in parts])

        def task(y: Array) -> TwoLayer:
            centre = y[parts[0]].mean(0)
            # one unit for all targets: the error that is least is that of the pooled R^2
            unit = jnp.sqrt(jnp.mean((y[parts[0]] - centre) ** 2))
            unit = jnp.where(unit > 10 * jnp.finfo(dtype).eps * jnp.abs(centre).max(), unit, 1)
            (v, c, w, b), stopped = probe(rows, (y - centre) / unit)
            v = v / std[:, None]
            return TwoLayer(v, c - dot(mean, v), w * unit, b * unit + centre, stopped)

        return jax.lax.map(task, targets)

    return jax.lax.map(layer, features)
