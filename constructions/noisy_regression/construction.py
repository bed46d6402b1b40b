r"""Linear transformers on regression with unknown noise (Vladymyrov et al. 2024, arXiv 2402.14180).

Tokens (x_i, y_i) for the context and (x, 0) for a query. A DIAG layer has four numbers and two
heads, one that compares inputs and one that compares labels,

    query x, key x, value (x, y),  written to x with w_xx and to y with w_yx,
    query y, key y, value (x, y),  written to x with w_xy and to y with w_yy,

which is, with Sigma = sum_i x_i x_i^T, alpha = sum_i y_i x_i and lambda = sum_i y_i^2,

    x_j <- x_j + w_xx Sigma x_j + w_xy y_j alpha,
    y_j <- y_j + w_yx alpha . x_j + w_yy lambda y_j.

The algorithm: every token stays a linear function of its own start (Lemma 4.3), x_j = M x_j^0 +
y_j^0 u and y_j = a y_j^0 - w . x_j^0, so that the prediction is w . x, and (M, u, w, a) obey the
recursion of `recursion`. GD++ is w_xy = w_yy = 0: there w_yx is minus a step size and w_xx minus a
curvature. With w_xy, u collects gradients (momentum) and steps grow with the residual; w_yy < 0
shrinks the labels by their power, hence by the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from constructions.core.canonical import canonical_distance
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots, concatenate
from constructions.core.transformer import Transformer
from constructions.family import Claim, Counterpart, Gauge, NearMiss, Place, Tokens
from constructions.noisy_regression.paper import claims_of, rivals
from constructions.noisy_regression.recursion import context_gram, diag_states
from constructions.regression import Inputs, Outputs, Queries, Regression
from synthetic.fitting.recipe import Recipe
from synthetic.tasks.noisy import NoisyRegressionTask


class Reading(NamedTuple):
    """What the four numbers of a layer do.

    Attributes:
        step_size: -w_yx, of the gradient step; not divided by N.
        curvature: -w_xx, gamma of GD++.
        momentum: w_xy; the next step is -w_yx (1 + w_xy rho), rho the sum of squared residuals.
        rescaling: w_yy; labels are multiplied by 1 + w_yy lambda.
        heads: how many heads a layer with these numbers needs: the rank of [[w_xx, w_xy],
            [w_yx, w_yy]]. One head has w_xx w_yy = w_xy w_yx.
    """

    step_size: float
    curvature: float
    momentum: float
    rescaling: float
    heads: int


@dataclass(frozen=True)
class NoisyRegression(Regression):
    """A DIAG linear transformer with these layers.

    Attributes:
        dim_x: dimension of the inputs; outputs have one.
        num_examples: context pairs of the task; contexts of other lengths are allowed.
        layers: (w_xx, w_xy, w_yx, w_yy) of each, any finite numbers.
        max_noise: of the task: sigma is uniform on (0, max_noise) for each context.
        noise_levels: or one of these.
    """

    dim_x: int = 10
    num_examples: int = 20
    layers: Any = ()
    max_noise: float | int = 0.0
    noise_levels: Sequence[float | int] = ()
    numbers: ClassVar[tuple[str, ...]] = ("max_noise",)

    def __post_init__(self) -> None:
        self.whole("dim_x", "num_examples")
        try:
            table = np.asarray(self.layers, float)
        except (TypeError, ValueError):
            table = np.empty((0, 0))
        if table.ndim != 2 or not len(table) or table.shape[1] != 4:
            raise ValueError(
                f"layers is {self.layers!r}, must be one (w_xx, w_xy, w_yx, w_yy) for each layer"
            )
        if not np.isfinite(table).all():
            raise ValueError(f"layers is {self.layers!r}, must be finite numbers")
        rows: Any = table.tolist()
        object.__setattr__(self, "layers", tuple(map(tuple, rows)))
        object.__setattr__(self, "noise_levels", tuple(self.noise_levels))
        _ = self.task  # refuses noise that no task has

    @property
    def dim_y(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Outputs of the regression: 1, as in the paper."""
        return 1

    @property
    def task(self) -> NoisyRegressionTask:
        """Regression with inputs and weights N(0, I) and noise of a level of each context's own."""
        return NoisyRegressionTask(
            self.dim_x, self.num_examples, self.max_noise, tuple(self.noise_levels)
        )

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Every layer in the names of optimisation."""
        found = []
        for w_xx, w_xy, w_yx, w_yy in self.layers:
            heads = int(np.linalg.matrix_rank([[w_xx, w_xy], [w_yx, w_yy]]))
            found.append(Reading(-w_yx, -w_xx, w_xy, w_yy, heads))
        return tuple(found)

    @property
    def program(self) -> Program:
        """Two heads a layer; GD++ needs only the first."""
        return self._program("linear")

    def _program(self, mixer: str, keys: str | None = "context") -> Program:
        slots = Slots()
        x = slots.add("x", self.dim_x, accumulates=True, meaning="M x_i + y_i u")
        y = slots.add("y", 1, accumulates=True, meaning="a y_i - w . x_i")
        to_x, to_y = np.split(np.eye(self.dim_x + 1), [self.dim_x])
        plain = all(w_xy == 0 == w_yy for _, w_xy, _, w_yy in self.layers)

        def layer(w_xx: float, w_xy: float, w_yx: float, w_yy: float) -> Layer:
            both: dict[str, Any] = {"value": concatenate(x, y), "keys": keys, "mixer": mixer}
            inputs = Head(x, x, write={x: w_xx * to_x, y: w_yx * to_y}, name="inputs", **both)
            labels = Head(y, y, write={x: w_xy * to_x, y: w_yy * to_y}, name="labels", **both)
            return Layer([inputs] if plain else [inputs, labels])

        return Program(slots, [layer(*w) for w in self.layers], token_groups=("context", "query"))

    @property
    def unplaced(self) -> tuple[str, ...]:
        """What the layers do to the tokens, and the statistics of a context that decide it."""
        state = ("matrix", "momentum", "weight", "label_scale")
        return (*state, "gradient", "rescaling", "residual_power")

    def trace(self, x: ArrayLike, y: ArrayLike, x_query: ArrayLike) -> dict[str, Array]:
        """The recursion; arguments and errors as for `predict`.

        Arrays are `[batch, layer, ...]`, from before the first layer to after the last.

        Returns:
            matrix, momentum, weight, label_scale: M `[dim_x, dim_x]`, u and w `[dim_x]`, a `[]`.
            gradient: Sigma^0 (a w* - w) = a alpha^0 - Sigma^0 w, with w* the least-squares weights:
                the negative gradient for w, `[dim_x]`; u collects it.
            rescaling: 1 + w_yy lambda, the factor on labels, of every layer, `[batch, layer]`.
            residual_power: rho = sum_i (y_i - w* . x_i)^2, `[batch]`, by which steps grow.
            inputs, outputs: of all tokens, `[token, dim_x]` and `[token, 1]`.
            prediction: `[batch, query, 1]`.
        """
        x, y, x_query = self.given(0.0, x, y, x_query)
        gram = context_gram(x, y)
        states = jax.tree.map(
            lambda s: jnp.moveaxis(s, 0, 1),
            diag_states([jnp.asarray(w, x.dtype) for w in self.layers], gram),
        )
        labels = jnp.concatenate([y, jnp.zeros_like(x_query[..., :1])], axis=1)
        tokens = jnp.concatenate([x, x_query], axis=1)

        def of(matrix: Array, equation: str, v: Array) -> Array:
            return jnp.einsum(equation, matrix, v, precision="highest")

        inputs = of(states.M, "blij,btj->blti", tokens)
        inputs += of(states.u, "bli,btk->blti", labels)
        outputs = states.a[:, :, None, None] * labels[:, None]
        outputs -= of(states.w, "bli,bti->blt", tokens)[..., None]
        descent = states.a[..., None] * gram.alpha[:, None]
        descent -= of(gram.sigma, "bij,blj->bli", states.w)
        power = jnp.square(outputs[:, :-1, : x.shape[1], 0]).sum(-1)
        best = jnp.linalg.pinv(gram.sigma, hermitian=True)
        return {
            "matrix": states.M,
            "momentum": states.u,
            "weight": states.w,
            "label_scale": states.a,
            "gradient": descent,
            "rescaling": 1 + jnp.asarray([w[3] for w in self.layers], x.dtype) * power,
            "residual_power": gram.lam
            - jnp.einsum("bi,bij,bj->b", gram.alpha, best, gram.alpha, precision="highest"),
            "inputs": inputs,
            "outputs": outputs,
            "prediction": of(states.w[:, -1], "bi,bqi->bq", x_query)[..., None],
        }

    def embed(self, x: Inputs, y: Outputs, x_query: Queries) -> list[Tokens]:
        """Context tokens (x_i, y_i), then query tokens (x, 0)."""
        return [Tokens("context", {"x": x, "y": y}), Tokens("query", {"x": x_query}, read=True)]

    def places(self, depth: int, x: Inputs, y: Outputs, x_query: Queries) -> dict[str, Place]:
        """The stream holds the tokens; M, u, w and a are what they are linear in."""
        steps, n, t = range(depth + 1), x.shape[1], x.shape[1] + x_query.shape[1]
        return {
            "inputs": Place.of("x", range(t), steps),
            "outputs": Place.of("y", range(t), steps),
            "prediction": Place.of("y", range(n, t), depth, scale=-1.0),
        }

    def gauge(self) -> Gauge:
        """Queries enter as (x, 0); only their y is read, with its sign turned."""
        slots = self.program.slots
        return Gauge.of(slots, -slots["y"], {"x": np.eye(self.dim_x)}, ("query",))

    def tolerance(self, dtype: str) -> float:
        """Larger than for a stable descent: layers of any weights amplify what was rounded."""
        return {"float64": 1e-12, "float32": 5e-4}[dtype]

    def domain(self, *inputs: Array) -> dict[str, float | str]:
        """The task, and the numbers of the layers."""
        del inputs
        return {"task": repr(self.task), "layers": repr(self.layers)}

    def counterpart(self) -> Counterpart:
        """FULL: two heads a layer with P and Q of any entries, trained with Adam.

        Several queries to each context cost little and say more; with one, batches must be larger.
        """
        both = replace(self, layers=[(0.0, 1.0, 1.0, 0.0)] * len(self.layers))
        recipe = Recipe(
            steps=4000,
            batch=128,
            learning_rate=1e-2,
            schedule="cosine",
            warmup=200,
            clip=1.0,
            average_tail=0.1,
        )
        reference, gauge = self.reference, self.gauge()

        def measure(model: Transformer) -> dict[str, Array]:
            return {"canonical_distance": canonical_distance(model, reference, gauge)}

        return Counterpart(
            self.random_weights(0.05, both.in_trained_shape()),
            replace(self.task, queries=8),
            recipe,
            metrics=measure,
            quick=replace(recipe, steps=1500),
        )

    def near_misses(self) -> dict[str, NearMiss]:
        """Parts of the layers left out, a step off, centred attention, the query among the keys.

        And rivals, as functions: see `paper.rivals`.
        """

        def with_layers(change: Any) -> NearMiss:
            return self.near_miss(replace(self, layers=[change(*w) for w in self.layers]))

        def of(**changes: Any) -> NearMiss:
            return self.near_miss(self._program(**({"mixer": "linear"} | changes)))

        misses = {
            "step size + 10 %": with_layers(lambda a, b, c, d: (a, b, 1.1 * c, d)),
            "step size - 10 %": with_layers(lambda a, b, c, d: (a, b, 0.9 * c, d)),
            "centred attention": of(mixer="centred"),
            "query among the keys": of(keys=None),
        }
        if any(w[1] or w[3] for w in self.layers):
            misses["GD++ part"] = with_layers(lambda a, b, c, d: (a, 0.0, c, 0.0))
        if any(w[1] for w in self.layers):
            misses["no curvature"] = with_layers(lambda a, b, c, d: (0.0, b, c, d))
            misses["no momentum"] = with_layers(lambda a, b, c, d: (a, 0.0, c, d))
        if any(w[3] for w in self.layers):
            misses["no rescaling"] = with_layers(lambda a, b, c, d: (a, b, c, 0.0))
        return misses | {name: NearMiss(f, self) for name, f in rivals(self).items()}

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The paper's statements about a trained model of this depth."""
        return claims_of(self)
