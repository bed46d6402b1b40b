"""What the constructions on in-context regression share: three arrays in, predictions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from constructions.family import Construction
from constructions.transformer import Transformer

Inputs = Float[Array, "batch context dim_x"]
Outputs = Float[Array, "batch context dim_y"]
Queries = Float[Array, "batch query dim_x"]


class Regression(Construction):
    """A construction whose inputs are x, y and x_query, of `dim_x` and `dim_y` columns."""

    dim_x: int
    dim_y: int

    def predict(
        self, model: Transformer, x: ArrayLike, y: ArrayLike, x_query: ArrayLike
    ) -> Float[Array, "batch query dim_y"]:
        """The prediction for x_query as the model computes it (sign already turned).

        Args:
            model: the compiled construction or a model of the same class.
            x, y, x_query: `[batch, context, dim_x]`, `[batch, context, dim_y]` and
                `[batch, query, dim_x]`; computed in the widest of their and the model's types.

        Raises:
            ValueError: for shapes that do not fit or, on concrete arrays, values that are not
                finite.
        """
        weights = jax.tree.leaves(nnx.state(model, nnx.Param))
        return self.apply(model, *self.floats(weights[0].dtype, x, y, x_query))

    def check(self, *inputs: Any) -> None:
        """Shapes, and finite values where they are concrete."""
        shapes = {
            "x": ("batch", "context", self.dim_x),
            "y": ("batch", "context", self.dim_y),
            "x_query": ("batch", "query", self.dim_x),
        }
        if len(inputs) != 3:
            raise ValueError(f"expected x, y and x_query, got {len(inputs)} arrays")
        sizes: dict[str, int] = {}
        for (name, axes), array in zip(shapes.items(), inputs, strict=True):
            shape = jnp.shape(array)
            want = [axis if isinstance(axis, int) else sizes.get(axis) for axis in axes]
            if len(shape) != 3 or any(w not in (None, s) for w, s in zip(want, shape, strict=True)):
                raise ValueError(f"{name} has shape {shape}, must be {list(axes)} with {sizes}")
            sizes |= {a: s for a, s in zip(axes, shape, strict=True) if isinstance(a, str)}
            if 0 in shape[1:]:
                raise ValueError(f"{name} has shape {shape}, must hold at least one token")
            if not isinstance(array, Tracer) and not np.isfinite(np.asarray(array)).all():
                raise ValueError(f"{name} holds NaN or infinite values, must be finite")

    def context_size(self, *inputs: Any) -> int:
        """N, the number of pairs."""
        return inputs[0].shape[1]

    def subset(self, kept: Sequence[int] | np.ndarray, *inputs: Any) -> tuple[Any, ...]:
        """These pairs (x_i, y_i) only; the queries stay."""
        x, y, x_query = inputs
        index = np.asarray(kept, int)
        return x[:, index], y[:, index], x_query

    def floats(self, like: Any, *inputs: ArrayLike) -> list[Array]:
        """Checked inputs in one floating point type, `like`'s or a wider one that they have."""
        arrays = [jnp.asarray(a) for a in inputs]
        self.check(*arrays)
        dtype = jnp.result_type(like, *arrays)
        return [a.astype(dtype) for a in arrays]


def at_least_one(construction: Any, *names: str) -> None:
    """ValueError unless these settings are integers of at least 1."""
    for name in names:
        value = getattr(construction, name)
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, must be an integer of at least 1")


def finite_number(name: str, value: Any) -> float:
    """The setting as a float; ValueError unless it is a finite number."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not np.isfinite(value):
        raise ValueError(f"{name} is {value!r}, must be a finite number")
    return float(value)
