r"""Gradient descent on in-context linear regression, by linear attention.

The algorithm, on context pairs (x_i, y_i), i <= N, from W_0:

    W_{k+1} = W_k - (eta / N) sum_i (W_k x_i - y_i) x_i^T.

The construction (von Oswald et al. 2022, arXiv 2212.07677, Prop. 1): token i carries
(x_i, y_i), the query carries (x, -W_0 x), and one head of linear attention over the context

    query x,  key x,  value W_0 x - y,  written to y with eta / N

turns every y_j into y_j - (W_1 - W_0) x_j. Since W_0 x_i - (y_i - dW x_i) = (W_0 + dW) x_i - y_i,
the same weights, with the same W_0, make the next step: K layers are K steps, and after k of them
a context token holds y_i - (W_k - W_0) x_i and a query token -W_k x.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from constructions.family import Claim, Construction, Counterpart, Embedded, Family, Gauge, Place
from constructions.program import Head, Layer, Program
from constructions.slots import Slots
from constructions.transformer import Transformer, randomise
from synthetic.regression import RegressionTask

Inputs = Float[Array, "batch context dim_x"]
Outputs = Float[Array, "batch context dim_y"]
Queries = Float[Array, "batch query dim_x"]


@dataclass(frozen=True)
class GradientDescent(Construction):
    """`steps` steps of gradient descent on 1/(2N) sum_i |W x_i - y_i|^2.

    Attributes:
        dim_x, dim_y: dimensions of inputs and outputs.
        num_examples: N, the number of context pairs of the task and the N in eta / N. Contexts of
            other lengths are allowed: eta / N stays what it is.
        steps: K, at least 1.
        step_size: eta. The iteration converges if eta < 2 / lambda_max(X^T X / N).
        init_weight: W_0, `[dim_y, dim_x]`; None is zero.
        recurrent: one layer applied K times instead of K equal layers.
    """

    dim_x: int = 10
    dim_y: int = 1
    num_examples: int = 10
    steps: int = 1
    step_size: float = 1.0
    init_weight: Any = None
    recurrent: bool = False

    def __post_init__(self) -> None:
        for name in ("dim_x", "dim_y", "num_examples", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, must be an integer of at least 1")
        if not np.isfinite(self.step_size):
            raise ValueError(f"step_size is {self.step_size}, must be finite")
        if self.init_weight is not None:
            weight = np.asarray(self.init_weight, float)
            if weight.shape != (self.dim_y, self.dim_x) or not np.isfinite(weight).all():
                raise ValueError(
                    f"init_weight has shape {weight.shape}, must be finite and of shape "
                    f"({self.dim_y}, {self.dim_x})"
                )
            # nested tuples keep the settings hashable, comparable and JSON-ready
            object.__setattr__(self, "init_weight", tuple(map(tuple, weight.tolist())))

    @property
    def initial(self) -> np.ndarray:
        """W_0, `[dim_y, dim_x]`."""
        if self.init_weight is None:
            return np.zeros((self.dim_y, self.dim_x))
        return np.asarray(self.init_weight, float)

    @cached_property
    def program(self) -> Program:
        slots = Slots()
        x = slots.add("x", self.dim_x, meaning="x_i")
        y = slots.add("y", self.dim_y, accumulates=True, meaning="y_i - (W_k - W_0) x_i")
        eta, n = self.step_size, self.num_examples
        step = Layer([
            Head(query=x, key=x, value=self.initial @ x - y, write={y: eta / n}, keys="context")
        ])  # fmt: skip
        groups = ("context", "query")
        if self.recurrent:
            return Program(slots, [step], self.steps, groups, name="gradient descent")
        return Program(slots, [step] * self.steps, 1, groups, name="gradient descent")

    @property
    def task(self) -> RegressionTask:
        return RegressionTask(self.dim_x, self.num_examples, self.dim_y)

    def trace(self, x: Inputs, y: Outputs, x_query: Queries) -> dict[str, Array]:
        """The algorithm.

        Returns:
            weight: W_k, `[batch, step, dim_y, dim_x]`, k = 0..K.
            residual: y_i - (W_k - W_0) x_i, `[batch, step, context, dim_y]`.
            estimate: W_k x for the queries, `[batch, step, query, dim_y]`.
            inputs: x_i and x after every step, `[batch, step, token, dim_x]`: they never change.
            prediction: W_K x, `[batch, query, dim_y]`.
        """
        rate = self.step_size / self.num_examples

        def step(weight: Array, _: None) -> tuple[Array, Array]:
            error = jnp.einsum("boi,bni->bno", weight, x, precision="highest") - y
            gradient = jnp.einsum("bno,bni->boi", error, x, precision="highest")
            return weight - rate * gradient, weight

        initial = jnp.asarray(self.initial, x.dtype)
        first = jnp.broadcast_to(initial, (x.shape[0], *initial.shape))
        last, weights = jax.lax.scan(step, first, length=self.steps)
        weight = jnp.moveaxis(jnp.concatenate([weights, last[None]]), 0, 1)
        estimate = jnp.einsum("bkoi,bqi->bkqo", weight, x_query, precision="highest")
        moved = jnp.einsum("bkoi,bni->bkno", weight - initial, x, precision="highest")
        tokens = jnp.concatenate([x, x_query], axis=1)
        return {
            "weight": weight,
            "residual": y[:, None] - moved,
            "estimate": estimate,
            "inputs": jnp.broadcast_to(
                tokens[:, None], (len(x), self.steps + 1, *tokens.shape[1:])
            ),
            "prediction": estimate[:, -1],
        }

    def embed(self, model: Transformer, x: Inputs, y: Outputs, x_query: Queries) -> Embedded:
        """Context tokens (x_i, y_i), then query tokens (x, -W_0 x)."""
        start = -jnp.einsum(
            "oi,bqi->bqo", jnp.asarray(self.initial, x.dtype), x_query, precision="highest"
        )
        context = jnp.concatenate([x, y], axis=-1)
        queries = jnp.concatenate([x_query, start], axis=-1)
        n, q = x.shape[1], x_query.shape[1]
        groups = jnp.asarray(np.repeat([0, 1], [n, q]))
        return Embedded(jnp.concatenate([context, queries], axis=1), groups, slice(n, n + q))

    def places(self, depth: int, x: Inputs, y: Outputs, x_query: Queries) -> dict[str, Place]:
        n, q = x.shape[1], x_query.shape[1]
        layer = np.arange(depth + 1)[:, None, None]
        token = np.arange(n + q)[:, None]
        xs, ys = np.arange(self.dim_x), self.dim_x + np.arange(self.dim_y)
        return {
            "inputs": Place(layer, token, xs),
            "residual": Place(layer, token[:n], ys),
            "estimate": Place(layer, token[n:], ys, scale=-1.0),
            "prediction": Place(np.asarray(depth), token[n:], ys, scale=-1.0),
        }

    def apply(self, model: Transformer, x: Inputs, y: Outputs, x_query: Queries) -> Array:
        stream, groups, read = self.embed(model, x, y, x_query)
        return -model(stream, groups, read=read)[..., self.dim_x : self.dim_x + self.dim_y]

    def gauge(self) -> Gauge:
        """Queries enter as (x, -W_0 x); only their y is read, with its sign turned."""
        identity = np.eye(self.dim_x + self.dim_y)
        return Gauge(-identity[self.dim_x :], np.concatenate([np.eye(self.dim_x), -self.initial]))

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
            if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
                raise ValueError(f"{name} holds NaN or infinite values, must be finite")

    def predict(
        self, model: Transformer, x: Inputs, y: Outputs, x_query: Queries
    ) -> Float[Array, "batch query dim_y"]:
        """W_K x_query as the model computes it (sign already turned).

        ValueError for shapes that do not fit or, on concrete arrays, values that are not finite.
        """
        self.check(x, y, x_query)
        return self.apply(model, *map(jnp.asarray, (x, y, x_query)))


GRADIENT_DESCENT = Family(
    name="gradient-descent",
    construct=GradientDescent,
    settings={"dim_x": 10, "dim_y": 1, "num_examples": 10, "steps": 1, "step_size": 6.0606},
    about="linear self-attention runs gradient descent on in-context linear regression",
    source="von Oswald et al. 2022, arXiv 2212.07677, Prop. 1",
)
