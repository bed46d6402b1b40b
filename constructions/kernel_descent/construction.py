r"""Gradient descent on features: an MLP in front of linear attention.

The algorithm, on context pairs (x_i, y_i), i <= N, with features m(x), from W_0:

    W_{k+1} = W_k - (eta / N) sum_i (W_k m(x_i) - y_i) m(x_i)^T.

The construction (von Oswald et al. 2022, arXiv 2212.07677, Prop. 2): the MLP of layer 1 writes
m(x_j) = V act(U x_j + b) into a slot of its own at every token, and every layer behind it has the
head of gradient descent with the features in the place of the inputs,

    query m,  key m,  value -y,  written to y with eta / N.

One step from W_0 = 0 is a kernel smoother, y_hat = (eta / N) sum_i y_i m(x_i)^T m(x). Any other
W_0 costs nothing: the MLP also writes -W_0 m(x_j) to y, so that context tokens hold
y_i - W_k m(x_i) and query tokens -W_k m(x) from layer 1 on.

The MLP is any given one, or sine and cosine written by hand (`interpolant`): for sine waves m
interpolates (sin, cos) linearly between `knots` equally spaced points t_0 < t_1 < ..., with hinges
that open away from the point c in the middle,

    m(x) = m(c) relu(1) + sum_{t_j >= c} b_j relu(x - t_j) + sum_{t_j <= c} b'_j relu(t_j - x),

b_j and b'_j the changes of slope on the way out from slope 0 at c; beyond the ends the slope is 0
again. The spacing h bounds the error, h^2 / 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from constructions.core.layer import ACTIVATIONS
from constructions.core.program import Head, Layer, Mlp, Program
from constructions.core.slots import Slots
from constructions.core.transformer import Transformer, randomise
from constructions.core.weights import Part
from constructions.family import Claim, Counterpart, NearMiss, Place, Tokens
from constructions.kernel_descent.paper import (
    FROM_PRIOR_MEAN_CLAIMS,
    FROM_ZERO_CLAIMS,
    waves_by_least_squares,
)
from constructions.regression import Inputs, LinearRegression, Outputs, Queries
from synthetic.fitting.recipe import Recipe
from synthetic.guards import number
from synthetic.tasks.regression import RegressionTask
from synthetic.tasks.sine import SineTask, coefficient_moments, optimal_step, sine_and_cosine


class MlpWeights(NamedTuple):
    """m(x) = output act(hidden x + bias): `[hidden, dim_x]`, `[hidden]`, `[features, hidden]`."""

    hidden: np.ndarray
    bias: np.ndarray
    output: np.ndarray


def interpolant(points: np.ndarray) -> MlpWeights:
    """ReLU units for the interpolant of (sin, cos) between increasing points, at least 2."""
    values = sine_and_cosine(points)
    slopes = np.diff(values, axis=0) / np.diff(points)[:, None]
    centre = len(points) // 2
    right = np.diff(slopes[centre:], axis=0, prepend=0, append=0)
    left = np.diff(slopes[:centre], axis=0, prepend=0, append=0)
    # the last unit sees no input: relu(1) = 1 carries the value at the centre
    signs = np.repeat([1.0, -1.0, 0.0], [len(right), len(left), 1])
    hinges = np.concatenate([points[centre:], points[: centre + 1], [0.0]])
    bends = np.concatenate([right, left, values[centre : centre + 1]])
    bias = np.where(signs == 0, 1.0, -signs * hinges)
    return MlpWeights(signs[:, None], bias, bends.T)


def given_mlp(given: Any, dim_x: int) -> tuple[Any, ...]:
    """The MLP as nested tuples, which keep settings hashable and JSON-ready; ValueError if bad."""
    must = f"must be hidden weights [h, {dim_x}], hidden biases [h], output weights [f, h]"
    try:
        parts = [np.asarray(part, float) for part in given]
    except (TypeError, ValueError):
        raise ValueError(f"features is {given!r}, {must}") from None
    shapes = [part.shape for part in parts]
    fits = [len(shape) for shape in shapes] == [2, 1, 2]
    h = len(parts[0]) if fits else 0
    if not fits or h == 0 or shapes != [(h, dim_x), (h,), (len(parts[2]), h)] or not len(parts[2]):
        raise ValueError(f"features has shapes {shapes}, {must}")
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(f"features holds NaN or infinite values, {must}")
    rows = [tuple(tuple(row) for row in part.tolist()) for part in (parts[0], parts[2])]
    return (rows[0], tuple(parts[1].tolist()), rows[1])


PRIOR_MEAN = "prior mean"


@dataclass(frozen=True)
class KernelDescent(LinearRegression):
    """`steps` steps of gradient descent on 1/(2N) sum_i |W m(x_i) - y_i|^2.

    Attributes:
        dim_x, dim_y: dimensions of inputs and outputs. Where both are 1 the task is `SineTask`,
            else `RegressionTask`.
        num_examples: N, the number of context pairs of the task and the N in eta / N.
        steps: K, at least 1.
        step_size: eta. None: the best one for a single step on the sine task, from the moments of
            the features.
        features: hidden weights `[hidden, dim_x]`, hidden biases `[hidden]` and output weights
            `[features, hidden]` of the MLP. None: sine and cosine, interpolated.
        activation: of a given MLP, a name in `constructions.core.layer.ACTIVATIONS`.
        init_weight: W_0, `[dim_y, features]`; None is zero. "prior mean" is the mean of the sine
            waves' coefficients (features=None only).
        knots: points of the interpolant, at least 2.
        amplitudes: lowest and highest amplitude of the sine waves.

    Raises:
        ValueError: a setting out of range, named.
    """

    dim_x: int = 1
    dim_y: int = 1
    num_examples: int = 10
    steps: int = 1
    step_size: float | int | None = None
    features: Any = None
    activation: str = "relu"
    init_weight: Any = None
    knots: int = 158
    amplitudes: Sequence[float | int] = (0.1, 0.5)

    def __post_init__(self) -> None:
        self.whole("dim_x", "dim_y", "num_examples", "steps")
        number("knots", self.knots, whole=True, least=2)
        if np.shape(self.amplitudes) != (2,):
            raise ValueError(f"amplitudes is {self.amplitudes!r}, must be two numbers")
        bounds = tuple(number("amplitudes", a) for a in self.amplitudes)
        object.__setattr__(self, "amplitudes", bounds)
        self.check_distributions()
        if isinstance(self.task, SineTask) and self.regression_task(1) != RegressionTask(1, 1):
            raise ValueError(
                f"inputs, weights and noise are {self.inputs}, {self.weights} and {self.noise}, "
                "must be left out for dim_x=1, dim_y=1: the task is sine waves"
            )
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation is {self.activation!r}, must be one of {known}")
        if self.features is not None:
            object.__setattr__(self, "features", given_mlp(self.features, self.dim_x))
        elif self.dim_x != 1:
            raise ValueError(f"features is None, must be given for dim_x={self.dim_x}")
        elif self.activation != "relu":
            raise ValueError(f"activation is {self.activation!r}, must be 'relu' for features=None")
        self._check_start()
        if self.step_size is not None:
            self.finite("step_size")
            return
        task = self.task
        if self.steps > 1 or not isinstance(task, SineTask):
            raise ValueError(
                f"step_size is None, must be given for steps={self.steps}, dim_x={self.dim_x}, "
                f"dim_y={self.dim_y}"
            )
        best = optimal_step(task, self.feature_map, self.kinks, self.initial[0])
        object.__setattr__(self, "step_size", best.size)

    def _check_start(self) -> None:
        """W_0 as nested tuples; the name of the prior mean stays as it is."""
        given = self.init_weight
        if given is None:
            return
        if isinstance(given, str):
            waves = isinstance(self.task, SineTask) and self.features is None
            if given != PRIOR_MEAN or not waves:
                raise ValueError(
                    f"init_weight is {given!r}, must be numbers, or {PRIOR_MEAN!r} for sine waves "
                    "with features=None"
                )
            return
        shape = (self.dim_y, self.dim_features)
        try:
            weight = np.asarray(given, float)
        except (TypeError, ValueError):
            weight = np.empty(0)
        if weight.shape != shape or not np.isfinite(weight).all():
            raise ValueError(f"init_weight is {given!r}, must be finite numbers of shape {shape}")
        rows: Any = weight.tolist()
        object.__setattr__(self, "init_weight", tuple(map(tuple, rows)))

    @property
    def task(self) -> SineTask | RegressionTask:
        """Sine waves where x and y are numbers, else linear regression."""
        if self.dim_x == self.dim_y == 1:
            low, high = self.amplitudes
            return SineTask(self.num_examples, low_amplitude=low, high_amplitude=high)
        return self.regression_task(self.num_examples)

    @cached_property
    def points(self) -> np.ndarray:
        """Where the interpolant of sine and cosine is exact, `[knots]`."""
        return np.linspace(SineTask.low, SineTask.high, self.knots)

    @property
    def kinks(self) -> np.ndarray | None:
        """Where averages over x must be cut to be exact; None: nowhere in particular."""
        return self.points if self.features is None else None

    @cached_property
    def mlp(self) -> MlpWeights:
        """The weights of the MLP, given or those of the interpolant."""
        if self.features is not None:
            return MlpWeights(*(np.asarray(part) for part in self.features))
        return interpolant(self.points)

    @property
    def dim_features(self) -> int:
        """Number of features."""
        return len(self.mlp.output)

    @property
    def initial(self) -> np.ndarray:
        """W_0, `[dim_y, features]`."""
        if self.init_weight is None:
            return np.zeros((self.dim_y, self.dim_features))
        if isinstance(self.init_weight, str):
            assert isinstance(self.task, SineTask)  # __post_init__ has seen to it
            return coefficient_moments(self.task)[0][None]
        return np.asarray(self.init_weight, float)

    def feature_map(self, x: np.ndarray) -> np.ndarray:
        """The features of inputs `[n]`, dim_x = 1, as `synthetic.tasks.sine` takes them."""
        with jax.enable_x64(True):
            return np.asarray(self._features(jnp.asarray(x, jnp.float64)[:, None]))

    def _features(self, x: Array) -> Array:
        """m(x), `[..., features]`; the interpolant by its definition, not by hinges."""
        if self.features is None:
            values = sine_and_cosine(self.points).T
            ends = jnp.asarray(self.points, x.dtype)
            return jnp.stack(
                [jnp.interp(x[..., 0], ends, jnp.asarray(v, x.dtype)) for v in values], axis=-1
            )
        einsum = partial(jnp.einsum, precision="highest")
        hidden, bias, output = (jnp.asarray(part, x.dtype) for part in self.mlp)
        u = ACTIVATIONS[self.activation](einsum("...i,ui->...u", x, hidden) + bias)
        return einsum("...u,fu->...f", u, output)

    @property
    def program(self) -> Program:
        """The MLP, then K layers of one head."""
        return self._program()

    def _program(self, mixer: str = "linear", shift: float = 0.0, leak: float = 0.0) -> Program:
        slots = Slots()
        x = slots.add("x", self.dim_x, meaning="x_j")
        features = slots.add("features", self.dim_features, born=1, meaning="m(x_j)")
        y = slots.add("y", self.dim_y, accumulates=True, meaning="y_j - W_k m(x_j)")
        hidden, bias, output = self.mlp
        write: dict[Any, Any] = {features: output}
        if self.initial.any():
            write[y] = -self.initial @ output
        head = Head(
            query=features + shift if shift else features,
            key=features + np.full((features.size, y.size), leak) @ y if leak else features,
            value=-y,
            write={y: self.rate},
            keys="context",
            mixer=mixer,
        )
        mlp = Mlp(hidden @ x + bias, write, activation=self.activation)
        layers = [Layer(mlp=mlp), *[Layer([head])] * self.steps]
        return Program(slots, layers, token_groups=("context", "query"))

    @property
    def rate(self) -> float:
        """eta / N."""
        assert self.step_size is not None  # __post_init__ has filled it in
        return self.step_size / self.num_examples

    @property
    def unplaced(self) -> tuple[str, ...]:
        """W_k, which acts through what it writes."""
        return ("weight",)

    def check(self, *inputs: Any) -> None:
        """As the base class has it; inputs of the interpolant are at most ten times its range.

        Further out its features are constant, as sums of hinges that cancel: past 1000 float32
        loses digits, past 1e5 all of them.
        """
        super().check(*inputs)
        if self.features is not None:
            return
        most = 10 * float(np.abs(self.points).max())
        for argument, array in zip(self.arguments, inputs, strict=True):
            if argument.name == "y" or isinstance(array, Tracer):
                continue
            largest = float(np.max(np.abs(np.asarray(array, float)), initial=0.0))
            if largest > most:
                raise ValueError(
                    f"{argument.name} holds {largest:.3g} in size, must be at most {most:g}: the "
                    f"features are sine and cosine from {self.points[0]:g} to {self.points[-1]:g}"
                )

    def trace(self, x: ArrayLike, y: ArrayLike, x_query: ArrayLike) -> dict[str, Array]:
        """The algorithm, in weight space; arguments and errors as for `predict`.

        Returns:
            features: m(x_i) and m(x), `[batch, token, features]`.
            weight: W_k, `[batch, step, dim_y, features]`, k = 0..K.
            residual: y_i - W_k m(x_i), `[batch, step, context, dim_y]`.
            estimate: W_k m(x) for the queries, `[batch, step, query, dim_y]`.
            prediction: W_K m(x), `[batch, query, dim_y]`.
        """
        x, y, x_query = self.given(0.0, x, y, x_query)
        einsum = partial(jnp.einsum, precision="highest")
        m, m_query = self._features(x), self._features(x_query)
        initial = jnp.asarray(self.initial, x.dtype)

        def step(weight: Array, _: None) -> tuple[Array, Array]:
            error = einsum("bof,bnf->bno", weight, m) - y
            return weight - self.rate * einsum("bno,bnf->bof", error, m), weight

        start = jnp.broadcast_to(initial, (len(x), *initial.shape))
        last, before = jax.lax.scan(step, start, length=self.steps)
        weight = jnp.moveaxis(jnp.concatenate([before, last[None]]), 0, 1)
        estimate = einsum("bkof,bqf->bkqo", weight, m_query)
        return {
            "features": jnp.concatenate([m, m_query], axis=1),
            "weight": weight,
            "residual": y[:, None] - einsum("bkof,bnf->bkno", weight, m),
            "estimate": estimate,
            "prediction": estimate[:, -1],
        }

    def embed(self, x: Inputs, y: Outputs, x_query: Queries) -> list[Tokens]:
        """Context tokens (x_i, 0, y_i), then query tokens (x, 0, 0); the features come later."""
        return [Tokens("context", {"x": x, "y": y}), Tokens("query", {"x": x_query}, read=True)]

    def places(self, depth: int, x: Inputs, y: Outputs, x_query: Queries) -> dict[str, Place]:
        """Every value but the weights themselves stands in a slot, from layer 1 on."""
        steps, n, t = range(1, depth + 1), x.shape[1], x.shape[1] + x_query.shape[1]
        return {
            "features": Place.of("features", range(t), 1),
            "residual": Place.of("y", range(n), steps),
            "estimate": Place.of("y", range(n, t), steps, scale=-1.0),
            "prediction": Place.of("y", range(n, t), depth, scale=-1.0),
        }

    def domain(self, *inputs: Array) -> dict[str, float | str]:
        """The task, and how near its contexts come to the largest stable step size."""
        m = np.asarray(self._features(jnp.asarray(inputs[0])))
        gram = np.einsum("bnf,bng->bfg", m, m) * self.rate
        largest = float(np.linalg.eigvalsh(gram).max())
        name = f"step size times largest curvature of {len(m)} contexts (converges below 2)"
        return {"task": repr(self.task), name: largest}

    def tolerance(self, dtype: str) -> float:
        """Four times the usual one for the interpolant, whose hinges reach 5 before they cancel."""
        return super().tolerance(dtype) * (4 if self.features is None else 1)

    def counterpart(self) -> Counterpart:
        """The MLP and attention as wide as the tokens, trained with Adam.

        Its MLP reads and writes every column. The least loss of this class has no closed form;
        `synthetic.tasks.sine.optimal_kernel_loss` bounds what affine functions of y can reach.
        """
        base = self.in_trained_shape()
        recipe = Recipe(
            steps=6000, batch=128, learning_rate=1e-2, schedule="cosine", warmup=100, clip=0.1
        )
        reach = 5.0 if isinstance(self.task, SineTask) else 0.5
        return Counterpart(
            partial(_initial, base, self.dim_x, reach),
            self.task,
            recipe,
            quick=replace(recipe, steps=1500),
        )

    def near_misses(self) -> dict[str, NearMiss]:
        """Wrong step sizes, starts, features and heads."""
        near: dict[str, Any] = {
            "step size + 10 %": replace(self, step_size=1.1 * self.rate * self.num_examples),
            "step size - 10 %": replace(self, step_size=0.9 * self.rate * self.num_examples),
            "one step too many": replace(self, steps=self.steps + 1),
        }
        if self.features is None:
            near["4 knots"] = replace(self, knots=4)
        if isinstance(self.task, SineTask) and self.features is None:
            other = PRIOR_MEAN if self.init_weight is None else None
            near[f"W_0 = {other or 0}"] = replace(self, init_weight=other)
        near |= {
            "centred attention": self._program(mixer="centred"),
            "shifted features": self._program(shift=0.2),
            "keys that read y": self._program(leak=0.5),
        }
        found = {name: self.near_miss(other) for name, other in near.items()}
        if isinstance(self.task, SineTask) and self.features is None:
            found["least squares"] = NearMiss(waves_by_least_squares, self)
        return found

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The paper's statements about one step on sine waves; none for other settings."""
        if self.steps > 1 or self.features is not None or not isinstance(self.task, SineTask):
            return ()
        by_start = {None: FROM_ZERO_CLAIMS, PRIOR_MEAN: FROM_PRIOR_MEAN_CLAIMS}
        return by_start.get(self.init_weight, ())


def _initial(base: Transformer, dim_x: int, reach: float, key: Array) -> Transformer:
    """Random weights from which Adam finds features that wind as often as the waves do.

    Units of the MLP are hinges with corners spread over the inputs, |x| <= reach: biases of 0
    would put all of them at x = 0. Their sum starts small. W_K = W_Q, so that the kernel starts
    positive semidefinite; with independent ones two seeds in five end in poorer optima.
    """
    turn, corner, output, rest = jax.random.split(key, 4)
    slope = 2 / reach

    def edit(part: Part) -> dict[str, Array]:
        w = part.weights
        if part.kind == "mlp":
            shape, dtype = w["hidden"].shape[:2], w["hidden"].dtype
            direction = jax.random.normal(turn, (*shape, dim_x), dtype)
            direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True)
            hidden = jnp.zeros_like(w["hidden"]).at[..., :dim_x].set(slope * direction)
            scale = 0.1 / np.sqrt(shape[-1])
            new = {"output": scale * jax.random.normal(output, w["output"].shape, dtype)}
            if "hidden_bias" in w:
                bias = slope * jax.random.uniform(corner, shape, dtype, -reach, reach)
                new["hidden_bias"] = bias
            return w | new | {"hidden": hidden}
        if part.kind == "heads" and part.segment:
            query, value = (w[name].at[..., :dim_x].set(0) for name in ("query", "value"))
            return w | {"query": query, "key": query, "value": value}
        return w

    return randomise(base, rest, 0.5).map_parts(edit)
