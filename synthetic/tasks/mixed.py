"""In-context regression on mixtures: weights with and without a mean, inputs of several scales."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from synthetic.tasks.regression import RegressionTask
from synthetic.tasks.task import Batch


@dataclass(frozen=True)
class ShiftedTasks:
    """Linear regression, half of the time with weights of mean `shift` in the place of 0.

    Attributes:
        base: the task whose weights have mean 0, with one output.
        shift: the other's mean, `[dim_x]`.
    """

    base: RegressionTask
    shift: tuple[float, ...]

    def sample(self, key: Array, batch: int) -> Batch:
        """Inputs x, y, x_query and `new`, `[batch]` of bool; the target for x_query."""
        flags, rest = jax.random.split(key)
        (x, y, x_query), target = self.base.sample(rest, batch)
        new = jax.random.bernoulli(flags, 0.5, (batch,))
        mean = jnp.where(new[:, None], jnp.asarray(self.shift, x.dtype), 0)
        more = [jnp.einsum("bni,bi->bn", a, mean, precision="highest") for a in (x, x_query)]
        return Batch((x, y + more[0][..., None], x_query, new), target + more[1][..., None])

    def loss(self, prediction: Array, batch: Batch) -> Array:
        """As for linear regression."""
        return self.base.loss(prediction, batch)


@dataclass(frozen=True)
class ScaledTasks:
    """Linear regression whose contexts differ in the scale of their inputs, and not in y.

    x = s u and w = v / s, with s drawn from the scales for each context, u and v as in the base.
    A step of gradient descent on s is s^2 steps on 1.

    Attributes:
        base: the task of scale 1.
        scales: s, all equally likely.
    """

    base: RegressionTask
    scales: tuple[float, ...]

    def sample(self, key: Array, batch: int) -> Batch:
        """As `RegressionTask.sample`."""
        first, rest = jax.random.split(key)
        (x, y, x_query), target = self.base.sample(rest, batch)
        drawn = jax.random.randint(first, (batch, 1, 1), 0, len(self.scales))
        scale = jnp.asarray(self.scales, x.dtype)[drawn]
        return Batch((scale * x, y, scale * x_query), target)

    def loss(self, prediction: Array, batch: Batch) -> Array:
        """As for linear regression."""
        return self.base.loss(prediction, batch)
