"""A model as a function of one vector: all its trained weights, in one order.

Jacobians, Hessians, masks over the weights and directions in their space all start here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from constructions.core.transformer import Transformer
from constructions.family import Construction
from synthetic.fitting.weights_file import named
from synthetic.tasks.task import Batch, outcome


@dataclass(frozen=True, eq=False)
class Flat:
    """The functions of a construction's model, of its weights as a vector `[weight]`.

    Attributes:
        construction: gives inputs their meaning.
        model: whose shape it is.
    """

    construction: Construction
    model: Transformer

    def __post_init__(self) -> None:
        if not isinstance(self.model, nnx.Module):
            raise ValueError(
                f"model is a {type(self.model).__name__}, must be a Transformer: this one is too "
                "large for dense weights"
            )

    @cached_property
    def _split(self) -> tuple[Any, Any, Any]:
        graphdef, params, rest = nnx.split(self.model, nnx.Param, ...)
        return graphdef, params, rest

    @cached_property
    def _raveled(self) -> tuple[Array, Callable[[Array], Any]]:
        with jax.ensure_compile_time_eval():  # kept beyond a jit that asks first
            return ravel_pytree(self._split[1])

    @property
    def theta(self) -> Float[Array, " weight"]:
        """The model's own weights."""
        return self._raveled[0]

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Which entries are which array, in the order of the vector."""
        sizes = [(name, array.size) for name, array in named(self._split[1]).items()]
        ends = np.cumsum([size for _, size in sizes]).tolist()
        return {name: slice(end - size, end) for (name, size), end in zip(sizes, ends, strict=True)}

    def vector(self, model: Transformer) -> Float[Array, " weight"]:
        """The weights of another model of this shape.

        Raises:
            ValueError: it has another shape.
        """
        if nnx.split(model, nnx.Param, ...)[0] != self._split[0]:
            raise ValueError("the two models have different shapes, must have one")
        return ravel_pytree(nnx.split(model, nnx.Param, ...)[1])[0]

    def merge(self, theta: Float[Array, " weight"]) -> Transformer:
        """The model with these weights; pure."""
        graphdef, _, rest = self._split
        return nnx.merge(graphdef, self._raveled[1](theta), rest)

    def predict(self, theta: Float[Array, " weight"], *inputs: Array) -> Array:
        """`construction.apply`; pure."""
        return self.construction.apply(self.merge(theta), *inputs)

    def losses(self, theta: Float[Array, " weight"], batch: Batch) -> Float[Array, " batch"]:
        """Loss of every example; pure."""
        return self.construction.task.loss(self.predict(theta, *batch.inputs), batch)

    def loss(self, theta: Float[Array, " weight"], batch: Batch) -> Float[Array, ""]:
        """Mean loss; pure."""
        return self.losses(theta, batch).mean()

    def log_probabilities(self, theta: Float[Array, " weight"], *inputs: Array) -> Array:
        """Of the outcomes, on the last axis of the prediction; pure.

        Probabilities of 0 count as the smallest positive number.

        Raises:
            ValueError: the task's predictions are no distributions.
        """
        task = self.construction.task
        kind, found = outcome(task), self.predict(theta, *inputs)
        if kind == "values":
            raise ValueError(f"{type(task).__name__}: its predictions are no distributions")
        if kind == "logits":
            return jax.nn.log_softmax(found)
        return jnp.log(jnp.maximum(found, jnp.finfo(found.dtype).tiny))
