r"""Fisher information of a model's weights, example by example, and merging by it.

With f(x) what a model predicts and p its likelihood, the Fisher information of example i is

    F_i = A_i^T A_i,     rows of A_i:  sqrt(p_y) grad log p_y   for every outcome y,

and for values of unit Gaussian likelihood A_i is the Jacobian of f(x_i). Where an example has many
outcomes, rows may be drawn: A_i^T A_i is then F_i in the mean, from gradients of log p at outcomes
that the model itself draws.

Merging (Matena and Raffel 2021, arXiv 2111.09832) multiplies Gaussian posteriors: with lambda_m the
model's share,

    theta* = (sum_m lambda_m F_m)^-1 sum_m lambda_m F_m theta_m,

exactly the joint least squares solution for linear models and full F_m, and an approximation with
the diagonals, which depend on the basis that the weights are written in. It is for models of one
lineage: the same initial weights, and so the same basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from probes.flat import Flat
from synthetic.compilation import compile_once
from synthetic.tasks.task import Batch, outcome

#: Examples whose gradients are taken at once.
_BLOCK = 32

Rows = Float[Array, "example outcome weight"]


def fisher_rows(
    flat: Flat, theta: Float[Array, " weight"], batch: Batch, samples: int = 0, key: Any = None
) -> Rows:
    """A_i of every example, `[example, outcome, weight]`.

    Outcomes that the task's loss does not look at (words that are not hidden) count for nothing.

    Args:
        flat: the model's functions.
        theta: where.
        batch: of the task.
        samples: 0 for all outcomes, else how many are drawn from the model for each example.
        key: of the draws; None takes that of seed 0.
    """
    found = _blocks(flat, samples, False, theta, batch, _keys(key, batch))
    return found.reshape(-1, *found.shape[2:])


def diagonal_fisher(
    flat: Flat, theta: Float[Array, " weight"], batch: Batch, samples: int = 0, key: Any = None
) -> Float[Array, " weight"]:
    """The diagonal of the mean F_i; arguments as for `fisher_rows`, at the memory of a few rows."""
    keys = _keys(key, batch)
    return _blocks(flat, samples, True, theta, batch, keys).sum(0) / len(keys)


def full_fisher(rows: Rows) -> Float[Array, "weight weight"]:
    """The mean F_i; for small models."""
    return jnp.einsum("ncp,ncq->pq", rows, rows, precision="highest") / len(rows)


def divergences(
    flat: Flat,
    theta: Float[Array, " weight"],
    others: Iterable[Float[Array, " weight"]],
    batch: Batch,
) -> Float[Array, "other example"]:
    """KL(p_theta | p_other) of every example, to second order d^T F_i d / 2 with d = other - theta.

    Half the squared distance for values.
    """
    ours, counted = _outputs(flat, theta, batch)
    values = outcome(flat.construction.task) == "values"

    def apart(other: Array) -> Array:
        theirs, _ = _outputs(flat, other, batch)
        each = (
            jnp.square(ours - theirs) / 2
            if values
            else (jnp.exp(ours) * (ours - theirs)).sum(-1) * counted
        )
        return each.reshape(len(each), -1).sum(1)

    return jnp.stack([apart(other) for other in others])


@compile_once(static_argnums=0, often=True)
def _outputs(flat: Flat, theta: Array, batch: Batch) -> tuple[Array, Array]:
    """Values or log probabilities, and which of them the loss looks at."""
    kind = outcome(flat.construction.task)
    predict = flat.predict if kind == "values" else flat.log_probabilities
    return predict(theta, *batch.inputs), _counted(flat, theta, batch, kind)


def outcomes(flat: Flat, batch: Batch) -> int:
    """How many rows each A_i has if none is drawn."""
    shape = jax.eval_shape(flat.predict, flat.theta, *batch.inputs).shape
    return int(np.prod(shape[1:]))


def _keys(key: Any, batch: Batch) -> Array:
    count = len(jax.tree.leaves(batch.inputs)[0])
    return jax.random.split(jax.random.key(0) if key is None else key, count)


@compile_once(static_argnums=(0, 1, 2), often=True)
def _blocks(
    flat: Flat, samples: int, squared: bool, theta: Array, batch: Batch, keys: Array
) -> Array:
    """Rows of each block of examples, stacked; or the sums of their squares."""
    kind = outcome(flat.construction.task)
    counted = _counted(flat, theta, batch, kind)

    def one(inputs: tuple[Array, ...], counted: Array, key: Array) -> Array:
        def predicted(theta: Array) -> Array:
            alone = tuple(a[None] for a in inputs)
            if kind == "values":
                return flat.predict(theta, *alone)[0]
            return flat.log_probabilities(theta, *alone)[0]

        found, pull = jax.vjp(predicted, theta)
        return jax.vmap(lambda w: pull(w)[0])(_weights(kind, found, counted, samples, key))

    def block(part: Any) -> Array:
        rows = jax.vmap(one)(*part)
        return jnp.square(rows).sum((0, 1)) if squared else rows

    size = max(s for s in range(1, _BLOCK + 1) if len(keys) % s == 0)
    split = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (batch.inputs, counted, keys))
    return jax.lax.map(block, split)


def _counted(flat: Flat, theta: Array, batch: Batch, kind: str) -> Array:
    """Which places of a prediction the loss looks at, `[example, ...]` without the outcomes."""
    if kind == "values":
        return jnp.ones(jax.eval_shape(flat.predict, theta, *batch.inputs).shape, theta.dtype)
    task = flat.construction.task
    prediction = flat.predict(theta, *batch.inputs)
    slope = jax.grad(lambda p: task.loss(p, batch).sum())(prediction)
    return (slope != 0).any(-1).astype(prediction.dtype)


def _weights(kind: str, found: Array, counted: Array, samples: int, key: Array) -> Array:
    """What the rows of A are sums of gradients with, `[row, *prediction]`."""
    if not samples and kind == "values":
        return jnp.eye(found.size, dtype=found.dtype).reshape(-1, *found.shape)
    if not samples:
        scale = jnp.exp(found / 2) * counted[..., None]
        return jnp.diag(scale.reshape(-1)).reshape(-1, *found.shape)
    if kind == "values":
        drawn = jax.random.normal(key, (samples, *found.shape), found.dtype)
    else:
        chosen = jax.random.categorical(key, found, shape=(samples, *found.shape[:-1]))
        drawn = jax.nn.one_hot(chosen, found.shape[-1], dtype=found.dtype) * counted[..., None]
    return drawn / np.sqrt(samples)


def normalised(fisher: Float[Array, " *entries"]) -> Float[Array, " *entries"]:
    """F over its Euclidean norm, so that no model weighs more for being surer."""
    return fisher / jnp.linalg.norm(fisher)


def merge(
    thetas: Float[Array, "model weight"],
    fishers: Float[Array, "model weight"] | Float[Array, "model weight weight"],
    shares: Float[Array, " model"],
    floor: float = 1e-6,
) -> Float[Array, " weight"]:
    """theta*, with diagonal or with full Fisher matrices.

    Args:
        thetas: the models' weights.
        fishers: F of each; the paper's are `normalised`.
        shares: lambda of each.
        floor: added to the first model's F (its diagonal), which keeps its weights where no model
            has any information.
    """
    thetas, fishers = jnp.asarray(thetas), jnp.asarray(fishers)
    if fishers.ndim == 2:
        weighted = jnp.asarray(shares)[:, None] * fishers.at[0].add(floor)
        return (weighted * thetas).sum(0) / weighted.sum(0)
    size = thetas.shape[1]
    weighted = jnp.asarray(shares)[:, None, None] * fishers.at[0].add(floor * jnp.eye(size))
    right = jnp.einsum("mpq,mq->p", weighted, thetas, precision="highest")
    return jnp.linalg.solve(weighted.sum(0), right)


def share_grid(models: int, parts: int = 10) -> np.ndarray:
    """All shares that are multiples of 1 / parts and sum to 1, `[choice, model]`.

    The first model's is never 0: it is what entries without information fall back on.
    """
    grid = np.stack(np.meshgrid(*[np.arange(parts + 1)] * models, indexing="ij"), -1)
    grid = grid.reshape(-1, models)
    return grid[(grid.sum(1) == parts) & (grid[:, 0] > 0)] / parts


def best_merge(
    loss: Callable[[Array], Array],
    thetas: Float[Array, "model weight"],
    fishers: Float[Array, "model weight"],
    shares: np.ndarray,
) -> tuple[np.ndarray, float]:
    """The shares, of those given, of the merge with the least loss; and that loss.

    The choice is made on the loss given: measure the merge on other examples.
    """
    losses = [float(loss(merge(thetas, fishers, jnp.asarray(s)))) for s in shares]
    best = int(np.nanargmin(losses))
    return shares[best], losses[best]
