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

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from constructions.canonical import canonical_distance, layer_tensors
from constructions.compiler import compile_program, config_of
from constructions.family import (
    Claim,
    Construction,
    Counterpart,
    Embedded,
    Gauge,
    NearMiss,
    Place,
)
from constructions.gradient_descent.claims import ONE_STEP_CLAIMS, PUBLISHED_LOSS
from constructions.program import Head, Layer, Program
from constructions.slots import Slots
from constructions.transformer import Transformer, randomise
from synthetic.recipe import Recipe
from synthetic.regression import RegressionTask
from synthetic.theory import one_layer_excess, optimal_one_layer, optimal_step_size

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
        step_size: eta. The iteration converges if eta < 2 / lambda_max(X^T X / N). None: the best
            one for a single step on the task; more steps need it given.
        init_weight: W_0, `[dim_y, dim_x]`; None is zero.
        recurrent: one layer applied K times instead of K equal layers.
    """

    dim_x: int = 10
    dim_y: int = 1
    num_examples: int = 10
    steps: int = 1
    step_size: float | None = None
    init_weight: Any = None
    recurrent: bool = False

    def __post_init__(self) -> None:
        for name in ("dim_x", "dim_y", "num_examples", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, must be an integer of at least 1")
        if self.step_size is None and self.steps == 1:
            object.__setattr__(self, "step_size", optimal_step_size(self.task))
        size = self.step_size
        if size is None:
            raise ValueError(f"step_size is None, must be given for steps={self.steps}")
        number = isinstance(size, int | float | np.number) and not isinstance(size, bool)
        if not number or not np.isfinite(size):
            raise ValueError(f"step_size is {size!r}, must be a finite number")
        if not isinstance(self.recurrent, bool | np.bool_):
            raise ValueError(f"recurrent is {self.recurrent!r}, must be true or false")
        if self.init_weight is not None:
            object.__setattr__(self, "init_weight", self._weight(self.init_weight))

    def _weight(self, given: Any) -> tuple[tuple[float, ...], ...]:
        """W_0 as nested tuples, which keep the settings hashable, comparable and JSON-ready."""
        must = f"must be finite numbers of shape ({self.dim_y}, {self.dim_x})"
        try:
            weight = np.asarray(given, float)
        except (TypeError, ValueError):
            raise ValueError(f"init_weight is {given!r}, {must}") from None
        if weight.shape != (self.dim_y, self.dim_x):
            raise ValueError(f"init_weight has shape {weight.shape}, {must}")
        if not np.isfinite(weight).all():
            raise ValueError(f"init_weight holds NaN or infinite values, {must}")
        return tuple(map(tuple, weight.tolist()))

    @property
    def eta(self) -> float:
        """The step size."""
        assert self.step_size is not None  # __post_init__ has chosen one
        return float(self.step_size)

    @property
    def initial(self) -> np.ndarray:
        """W_0, `[dim_y, dim_x]`."""
        if self.init_weight is None:
            return np.zeros((self.dim_y, self.dim_x))
        return np.asarray(self.init_weight, float)

    @property
    def program(self) -> Program:
        """K layers of one head; `recurrent`, one layer K times."""
        return self._program(mixer="linear", keys="context")

    def _program(self, mixer: str, keys: str | None) -> Program:
        slots = Slots()
        x = slots.add("x", self.dim_x, meaning="x_i")
        y = slots.add("y", self.dim_y, accumulates=True, meaning="y_i - (W_k - W_0) x_i")
        rate = self.eta / self.num_examples
        head = Head(
            query=x, key=x, value=self.initial @ x - y, write={y: rate}, keys=keys, mixer=mixer
        )
        layers, loops = ([head], self.steps) if self.recurrent else ([head] * self.steps, 1)
        return Program(slots, [Layer([h]) for h in layers], loops, ("context", "query"))

    @property
    def task(self) -> RegressionTask:
        """Noise-free regression with inputs uniform on (-1/2, 1/2) and weights N(0, I)."""
        return RegressionTask(self.dim_x, self.num_examples, self.dim_y)

    def trace(self, x: ArrayLike, y: ArrayLike, x_query: ArrayLike) -> dict[str, Array]:
        """The algorithm; arguments and errors as for `predict`.

        Returns:
            weight: W_k, `[batch, step, dim_y, dim_x]`, k = 0..K.
            residual: y_i - (W_k - W_0) x_i, `[batch, step, context, dim_y]`.
            estimate: W_k x for the queries, `[batch, step, query, dim_y]`.
            inputs: x_i and x after every step, `[batch, step, token, dim_x]`: they never change.
            prediction: W_K x, `[batch, query, dim_y]`.
        """
        x, y, x_query = self._floats(0.0, x, y, x_query)
        rate = self.eta / self.num_examples

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
        """Every value but the weights themselves stands in a slot."""
        slots, steps = self.program.slots, range(depth + 1)
        n, t = x.shape[1], x.shape[1] + x_query.shape[1]
        return {
            "inputs": Place.of(slots["x"], range(t), steps),
            "residual": Place.of(slots["y"], range(n), steps),
            "estimate": Place.of(slots["y"], range(n, t), steps, scale=-1.0),
            "prediction": Place.of(slots["y"], range(n, t), depth, scale=-1.0),
        }

    def gauge(self) -> Gauge:
        """Queries enter as (x, -W_0 x); only their y is read, with its sign turned."""
        identity = np.eye(self.dim_x + self.dim_y)
        return Gauge(-identity[self.dim_x :], np.concatenate([np.eye(self.dim_x), -self.initial]))

    def domain(self, *inputs: Array) -> dict[str, float | str]:
        """The task, and how near its contexts come to the largest stable step size."""
        x = inputs[0]
        gram = jnp.einsum("bni,bnj->bij", x, x, precision="highest") / self.num_examples
        largest = float(self.eta * jnp.linalg.eigvalsh(gram).max())
        return {
            "task": repr(self.task),
            f"step size times largest curvature of {len(x)} contexts (converges below 2)": largest,
        }

    def counterpart(self) -> Counterpart:
        """Linear attention as wide as its tokens, trained with Adam.

        One layer from W_0 = 0 has a closed-form optimum; its exact distance to it is a metric.
        """
        shape = config_of(self.program)
        base = compile_program(self.program, config=shape.with_heads(shape.width, shape.width))
        std = 0.2 / math.sqrt(self.steps)
        recipe = Recipe(
            steps=3000, batch=512, learning_rate=1e-2, schedule="linear", average_tail=0.6
        )
        optimum, metrics = None, None
        if self.steps == 1 and self.init_weight is None:
            gauge, reference = self.gauge(), replace(self, step_size=None).compile().model
            optimum = self.optimal_loss

            def measure(model: Transformer) -> dict[str, Array]:
                return {
                    "exact_excess": self.population_excess(model) / self.optimal_loss,
                    "canonical_distance": canonical_distance(model, reference, gauge),
                }

            metrics = measure

        return Counterpart(
            lambda key: randomise(base, key, std),
            self.task,
            recipe,
            optimum,
            metrics,
            quick=replace(recipe, steps=1500),
            exact=self.population_excess if metrics else None,
        )

    @property
    def optimal_loss(self) -> float:
        """The least population loss of one layer of linear attention on the task."""
        return float(optimal_one_layer(self.task)[1])

    def population_excess(self, model: Transformer) -> Array:
        """Exact mean loss of a one-layer model on the task less the least one, a scalar; pure.

        ValueError unless W_0 = 0: the closed form has no residual connection.
        """
        if self.init_weight is not None:
            raise ValueError("init_weight must be None for the closed form of the loss")
        (tensor,) = layer_tensors(model, self.gauge())
        return one_layer_excess(tensor, self.task)

    def near_misses(self) -> dict[str, NearMiss]:
        """Wrong step sizes, a step too many, centred attention, the query among the keys."""

        def of(construction: GradientDescent, **changes: Any) -> NearMiss:
            program = construction._program(**({"mixer": "linear", "keys": "context"} | changes))
            return NearMiss(compile_program(program), construction)

        elsewhere = replace(self, init_weight=np.full((self.dim_y, self.dim_x), 0.5))
        others = {
            "step size + 10 %": replace(self, step_size=1.1 * self.eta),
            "step size - 10 %": replace(self, step_size=0.9 * self.eta),
            "one step too many": replace(self, steps=self.steps + 1),
        }
        # the model is the other construction's, the claims are measured as this one's
        return {name: NearMiss(of(other).model, self) for name, other in others.items()} | {
            "centred attention": of(self, mixer="centred"),
            "query among the keys, W_0 != 0": of(elsewhere, keys=None),
        }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The paper's statements about one trained layer, with W_0 = 0; none for other settings."""
        if self.steps > 1 or self.init_weight is not None:
            return ()
        published = (self.dim_x, self.dim_y, self.num_examples) == (10, 1, 10)
        return (*ONE_STEP_CLAIMS, *([PUBLISHED_LOSS] if published else []))

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

    def predict(
        self, model: Transformer, x: ArrayLike, y: ArrayLike, x_query: ArrayLike
    ) -> Float[Array, "batch query dim_y"]:
        """W_K x_query as the model computes it (sign already turned).

        Args:
            model: the compiled construction or a model of the same class.
            x, y, x_query: `[batch, context, dim_x]`, `[batch, context, dim_y]` and
                `[batch, query, dim_x]`; computed in the widest of their and the model's types.

        Raises:
            ValueError: for shapes that do not fit or, on concrete arrays, values that are not
                finite.
        """
        weights = jax.tree.leaves(nnx.state(model, nnx.Param))
        return self.apply(model, *self._floats(weights[0].dtype, x, y, x_query))

    def _floats(self, like: Any, *inputs: ArrayLike) -> list[Array]:
        """Checked inputs in one floating point type, `like`'s or a wider one that they have."""
        arrays = [jnp.asarray(a) for a in inputs]
        self.check(*arrays)
        dtype = jnp.result_type(like, *arrays)
        return [a.astype(dtype) for a in arrays]
