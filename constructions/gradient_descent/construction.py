r"""Gradient descent on in-context linear regression, by linear attention.

The algorithm, on context pairs (x_i, y_i), i <= N, from W_0:

    W_{k+1} = W_k - (eta / N) sum_i (W_k x_i - y_i) x_i^T.

The construction (von Oswald et al. 2022, arXiv 2212.07677, Prop. 1): token i carries
(x_i, y_i), the query carries (x, -W_0 x), and one head of linear attention over the context

    query x,  key x,  value W_0 x - y,  written to y with eta / N

turns every y_j into y_j - (W_1 - W_0) x_j. Since W_0 x_i - (y_i - dW x_i) = (W_0 + dW) x_i - y_i,
the same weights, with the same W_0, make the next step: K layers are K steps, and after k of them
a context token holds y_i - (W_k - W_0) x_i and a query token -W_k x.

GD++ (appendix A.10, eq. 23) lets the same head write x as well,

    value (x, W_0 x - y),  written to x with -gamma and to y with eta / N:

every layer then also applies x_j <- (I - gamma S) x_j, S = sum_i x_i x_i^T, not divided by N. With
M_k the product of these factors, from W_0 = 0 it is gradient descent preconditioned by M_k^T M_k:

    W_{k+1} = W_k - (eta / N) sum_i (W_k x_i - y_i) x_i^T M_k^T M_k,
    M_{k+1} = (I - gamma M_k S M_k^T) M_k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from constructions.core.canonical import canonical_distance, layer_tensors
from constructions.core.compile import compile_program, config_of
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots, concatenate
from constructions.core.transformer import Transformer
from constructions.family import Claim, Counterpart, Gauge, NearMiss, Place, Tokens
from constructions.gradient_descent.paper import (
    ONE_STEP_CLAIMS,
    PUBLISHED_CURVATURE,
    PUBLISHED_LOSS,
    STEPS_CLAIMS,
    TWO_STEP_CLAIMS,
)
from constructions.regression import (
    Inputs,
    LinearRegression,
    Outputs,
    Queries,
    kernel_smoother,
    least_squares,
    step_on_the_mean,
)
from synthetic.fitting.recipe import Recipe
from synthetic.guards import number
from synthetic.tasks.regression import RegressionTask
from synthetic.theory.one_layer import one_layer_excess, optimal_one_layer


@dataclass(frozen=True)
class GradientDescent(LinearRegression):
    """`steps` steps of gradient descent, or GD++, on 1/(2N) sum_i |W x_i - y_i|^2.

    Attributes:
        dim_x, dim_y: dimensions of inputs and outputs.
        num_examples: N, the number of context pairs of the task and the N in eta / N. Contexts of
            other lengths are allowed: eta / N stays what it is.
        steps: K, at least 1.
        step_size: eta. The iteration converges if eta < 2 / lambda_max(X^T X / N). None: the best
            one for a single step on the task; more steps need it given. K numbers: one a step.
        curvature: gamma of GD++, 0 for gradient descent; K numbers: one a step. The factors
            I - gamma S keep the order of the eigenvalues of S if they are below 1 / (3 gamma).
        init_weight: W_0, `[dim_y, dim_x]`; None is zero.
        recurrent: one layer applied K times instead of K equal layers.
    """

    dim_x: int = 10
    dim_y: int = 1
    num_examples: int = 10
    steps: int = 1
    step_size: float | int | Sequence[float | int] | np.ndarray | None = None
    curvature: float | int | Sequence[float | int] | np.ndarray = 0.0
    init_weight: Any = None
    recurrent: bool = False
    numbers: ClassVar[tuple[str, ...]] = ("noise", "step_size")

    def __post_init__(self) -> None:
        self.whole("dim_x", "dim_y", "num_examples", "steps")
        self.check_distributions()
        if self.step_size is None and self.steps == 1:
            object.__setattr__(self, "step_size", self.best_step_size())
        if self.step_size is None:
            raise ValueError(f"step_size is None, must be given for steps={self.steps}")
        for name in ("step_size", "curvature"):
            object.__setattr__(self, name, self._one_or_each(name, getattr(self, name)))
        if not isinstance(self.recurrent, bool | np.bool_):
            raise ValueError(f"recurrent is {self.recurrent!r}, must be true or false")
        if self.init_weight is not None:
            object.__setattr__(self, "init_weight", self._weight(self.init_weight))

    def _one_or_each(self, name: str, given: Any) -> float | tuple[float, ...]:
        """A number, or one for each step; K equal numbers are one."""
        if np.ndim(given) == 0:
            return number(name, given)
        each = tuple(number(f"{name}[{k}]", v) for k, v in enumerate(given))
        if len(each) != self.steps:
            raise ValueError(f"{name} has {len(each)} numbers, must be one or {self.steps}")
        if len({*each}) == 1:
            return each[0]
        if self.recurrent:
            raise ValueError(f"{name} is {each}, must be one number with recurrent=True")
        return each

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
    def step_sizes(self) -> np.ndarray:
        """eta of every step, `[step]`."""
        return np.broadcast_to(np.asarray(self.step_size, float), self.steps)

    @property
    def curvatures(self) -> np.ndarray:
        """gamma of every step, `[step]`."""
        return np.broadcast_to(np.asarray(self.curvature, float), self.steps)

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
        plus = bool(self.curvatures.any())
        x = slots.add("x", self.dim_x, accumulates=plus, meaning="x_i, or M_k x_i in GD++")
        y = slots.add("y", self.dim_y, accumulates=True, meaning="y_i - (W_k - W_0) x_i")
        error = self.initial @ x - y
        to_x, to_y = np.split(np.eye(self.dim_x + self.dim_y), [self.dim_x])

        def layer(eta: float, gamma: float) -> Layer:
            rate = eta / self.num_examples
            value, write = error, {y: rate}
            if plus:
                value, write = concatenate(x, error), {x: -gamma * to_x, y: rate * to_y}
            return Layer([Head(query=x, key=x, value=value, write=write, keys=keys, mixer=mixer)])

        layers = [layer(*pair) for pair in zip(self.step_sizes, self.curvatures, strict=True)]
        layers, loops = (layers[:1], self.steps) if self.recurrent else (layers, 1)
        return Program(slots, layers, loops, ("context", "query"))

    @property
    def task(self) -> RegressionTask:
        """Linear regression with these inputs, weights and noise."""
        return self.regression_task(self.num_examples)

    @property
    def unplaced(self) -> tuple[str, ...]:
        """W_k, which acts through what it writes."""
        return ("weight",)

    def trace(self, x: ArrayLike, y: ArrayLike, x_query: ArrayLike) -> dict[str, Array]:
        """The algorithm, in weight space; arguments and errors as for `predict`.

        Returns:
            weight: W_k, `[batch, step, dim_y, dim_x]`, k = 0..K.
            residual: y_i - (W_k - W_0) x_i, `[batch, step, context, dim_y]`.
            estimate: W_k x for the queries, `[batch, step, query, dim_y]`.
            inputs: M_k x_i and M_k x, `[batch, step, token, dim_x]`; without curvature M_k = I.
            prediction: W_K x, `[batch, query, dim_y]`.
        """
        x, y, x_query = self.given(0.0, x, y, x_query)
        einsum = partial(jnp.einsum, precision="highest")
        gram = einsum("bni,bnj->bij", x, x)
        initial = jnp.asarray(self.initial, x.dtype)
        plus = bool(self.curvatures.any())

        def step(carry: tuple[Array, Array], size: Array) -> Any:
            weight, m = carry
            rate, gamma = size
            error = einsum("boi,bni->bno", weight, x) - y
            if plus:  # W_0 acts on inputs that have changed
                error += einsum("oi,bij,bnj->bno", initial, m - jnp.eye(self.dim_x), x)
            gradient = einsum("bno,bni->boi", error, x)
            if plus:
                gradient = einsum("boi,bji,bjk->bok", gradient, m, m)
            after = m - gamma * einsum("bij,bjk,blk,blm->bim", m, gram, m, m) if plus else m
            return (weight - rate * gradient, after), carry

        first = jnp.broadcast_to(initial, (x.shape[0], *initial.shape))
        unchanged = jnp.broadcast_to(jnp.eye(self.dim_x, dtype=x.dtype), gram.shape)
        sizes = np.stack([self.step_sizes / self.num_examples, self.curvatures], axis=1)
        last, before = jax.lax.scan(step, (first, unchanged), jnp.asarray(sizes, x.dtype))
        weight, m = (
            jnp.moveaxis(jnp.concatenate([b, a[None]]), 0, 1)
            for a, b in zip(last, before, strict=True)
        )
        estimate = einsum("bkoi,bqi->bkqo", weight, x_query)
        tokens = jnp.concatenate([x, x_query], axis=1)
        return {
            "weight": weight,
            "residual": y[:, None] - einsum("bkoi,bni->bkno", weight - initial, x),
            "estimate": estimate,
            "inputs": einsum("bkij,btj->bkti", m, tokens),
            "prediction": estimate[:, -1],
        }

    def embed(self, x: Inputs, y: Outputs, x_query: Queries) -> list[Tokens]:
        """Context tokens (x_i, y_i), then query tokens (x, -W_0 x)."""
        start = -jnp.einsum(
            "oi,bqi->bqo", jnp.asarray(self.initial, x.dtype), x_query, precision="highest"
        )
        return [
            Tokens("context", {"x": x, "y": y}),
            Tokens("query", {"x": x_query, "y": start}, read=True),
        ]

    def places(self, depth: int, x: Inputs, y: Outputs, x_query: Queries) -> dict[str, Place]:
        """Every value but the weights themselves stands in a slot."""
        steps, n, t = range(depth + 1), x.shape[1], x.shape[1] + x_query.shape[1]
        return {
            "inputs": Place.of("x", range(t), steps),
            "residual": Place.of("y", range(n), steps),
            "estimate": Place.of("y", range(n, t), steps, scale=-1.0),
            "prediction": Place.of("y", range(n, t), depth, scale=-1.0),
        }

    def gauge(self) -> Gauge:
        """Queries enter as (x, -W_0 x); only their y is read, with its sign turned."""
        slots, kinds = self.program.slots, ("query",)
        entering = {"x": np.eye(self.dim_x), "y": -self.initial}
        return Gauge.of(slots, -slots["y"], entering, kinds)

    def domain(self, *inputs: Array) -> dict[str, float | str]:
        """The task, and how near its contexts come to the largest stable step size."""
        x = np.asarray(inputs[0])
        gram = np.einsum("bni,bnj->bij", x, x) / self.num_examples
        largest = float(np.linalg.eigvalsh(gram).max())
        facts: dict[str, float | str] = {
            "task": repr(self.task),
            f"step size times largest curvature of {len(x)} contexts (converges below 2)": (
                float(self.step_sizes.max()) * largest
            ),
        }
        if self.curvatures.any():
            name = f"gamma times largest eigenvalue of {len(x)} contexts (keeps order below 1/3)"
            facts[name] = float(self.curvatures.max()) * largest * self.num_examples
        return facts

    def counterpart(self) -> Counterpart:
        """Linear attention as wide as its tokens, trained with Adam.

        One layer from W_0 = 0 has a closed-form optimum; its exact distance to it is a metric.
        Several layers start from smaller weights (from larger ones, most seeds stay on a plateau)
        and see several queries to each context, which cost little and say more.
        """
        std, task = 0.2, self.task
        recipe = Recipe(
            steps=3000, batch=512, learning_rate=1e-2, schedule="linear", average_tail=0.6
        )
        if self.steps > 1:
            std, task = 0.05, replace(self.task, queries=8)
            recipe = Recipe(
                steps=4000, batch=256, learning_rate=2e-2, schedule="cosine", b2=0.99,
                average_tail=0.05,
            )  # fmt: skip
        reference, gauge = self.reference, self.gauge()

        def distance(model: Transformer) -> dict[str, Array]:
            return {"canonical_distance": canonical_distance(model, reference, gauge)}

        optimum, metrics = None, distance
        if self.steps == 1 and self.has_closed_form:
            reference = replace(self, step_size=None).reference
            optimum = self.optimal_loss

            def measure(model: Transformer) -> dict[str, Array]:
                excess = self.population_excess(model) / self.optimal_loss
                return {"exact_excess": excess} | distance(model)

            metrics = measure

        return Counterpart(
            self.random_weights(std, self.in_trained_shape()),
            task,
            recipe,
            optimum,
            metrics,
            quick=replace(recipe, steps=recipe.steps // 2),
            exact=None if optimum is None else self.population_excess,
        )

    @property
    def has_closed_form(self) -> bool:
        """Whether the loss of one layer is known: W_0 = 0, distributions of mean 0."""
        centred = self.task.inputs.mean == self.task.weights.mean == 0
        return centred and self.init_weight is None

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

    def _one_more(self) -> GradientDescent:
        """The same with the last step once more."""
        sizes = {
            name: tuple(np.append(values, values[-1]).tolist())
            for name, values in (("step_size", self.step_sizes), ("curvature", self.curvatures))
        }
        return replace(self, steps=self.steps + 1, **sizes)

    def near_misses(self) -> dict[str, NearMiss]:
        """Wrong step sizes, N + 2 for N, a step too many, centred attention, the query as a key.

        And rivals, as functions: see `constructions.regression`.
        """

        def of(construction: GradientDescent, **changes: Any) -> NearMiss:
            program = construction._program(**({"mixer": "linear", "keys": "context"} | changes))
            # as wide as the counterpart, whose compilations it shares
            return construction.near_miss(program, config_of(program).wide)

        elsewhere = replace(self, init_weight=np.full((self.dim_y, self.dim_x), 0.5))
        others = {
            "step size + 10 %": replace(self, step_size=1.1 * self.step_sizes),
            "step size - 10 %": replace(self, step_size=0.9 * self.step_sizes),
            "wrong N": replace(self, num_examples=self.num_examples + 2),
            "one step too many": self._one_more(),
        }
        if self.curvatures.any() and self.steps > 1:
            others |= {
                "curvature + 20 %": replace(self, curvature=1.2 * self.curvatures),
                "no curvature": replace(self, curvature=0.0),
            }
        # the model is the other construction's, the claims are measured as this one's
        return {name: NearMiss(of(other).model, self) for name, other in others.items()} | {
            "centred attention": of(self, mixer="centred"),
            "query among the keys, W_0 != 0": of(elsewhere, keys=None),
            "clipped stream": NearMiss(self._clipped(), self),
            **{name: NearMiss(rival, self) for name, rival in self._rivals().items()},
        }

    def _clipped(self) -> Transformer:
        """The construction's weights, in a stream that keeps no number beyond 1/2."""
        model = compile_program(self.program, config=config_of(self.program).wide)
        return Transformer(replace(model.config, clip=0.5), model.arrays())

    def _rivals(self) -> dict[str, Callable[..., Any]]:
        eta = float(self.step_sizes[0])
        return {
            "least squares": least_squares,
            "kernel smoother": partial(kernel_smoother, scale=eta),
            "step on the mean": partial(step_on_the_mean, size=eta),
        }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The paper's statements about one trained layer, applied once or, as GD++, twice.

        For other numbers of steps, other W_0 and other means, those on functions alone.
        """
        published = self.task == RegressionTask()  # the paper's sizes and distributions
        if self.steps == 1 and self.has_closed_form:
            return (*ONE_STEP_CLAIMS, *([PUBLISHED_LOSS] if published else []))
        if self.init_weight is None and self.steps == 2 and self.recurrent and self.curvature:
            return (*TWO_STEP_CLAIMS, *([PUBLISHED_CURVATURE] if published else []))
        return STEPS_CLAIMS
