r"""Hedge over step sizes: heads are experts, and a softmax over their validation losses mixes them.

Expert j is a step of gradient descent from W = 0 on N training examples, with a step size of its
own. It predicts T validation examples one after the other, and

    estimate_tj = eta_j / N sum_i y_i x_i . x_t,      loss_tj = min(1, (estimate_tj - y_t)^2),
    p_tj  ~  exp(-rate sum_{s < t} loss_sj),          rate = sqrt(8 log n / T),

are Hedge's weights (Freund and Schapire 1997): whatever the losses, sum_t p_t . loss_t is at most
sqrt(T log n / 2) more than the best expert's sum. One token for each expert holds its code, so that
softmax attention to these tokens, by what each has lost, is p; queries see all T losses. Lu et al.
2022, arXiv 2203.01400 (SAMUEL) mix preconditioners so, with experts that sleep outside of intervals
(`sleeping` in `synthetic.theory.experts`), which have low regret on each; they look at their own
losses, and so take T layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.claims import Evidence, predict
from constructions.core.program import Head, Layer, Mlp, Program
from constructions.core.slots import Slots, constant
from constructions.family import Claim, Construction, Counterpart, NearMiss, Place, Tokens
from constructions.gradient_descent.paper import added_loss
from constructions.inputs import Input
from constructions.regression import least_squares, step_on_the_mean
from synthetic.fitting.recipe import Recipe
from synthetic.guards import number
from synthetic.tasks.regression import RegressionTask, ScaledTasks
from synthetic.theory.one_layer import optimal_step_size

BY_POWER = "step size by power"
_PAPER, _CONTROLS = "Lu et al. 2022, arXiv 2203.01400", ("one step size", "shuffled labels")
_READERS = ("validation", "query")


def added_to_single(e: Evidence) -> float:
    """Loss over that of the best single step size, less 1."""
    single, inputs = e.construction.near_misses()["one step size"].model, e.examples.inputs
    fixed = e.once("single", lambda: predict(e.construction, single, *inputs))
    return e.loss(e.prediction) / e.loss(fixed) - 1


def _shuffled(n: int, y: Array) -> Array:
    """Validation labels, those after the first n, of the context before."""
    return jnp.concatenate([y[:, :n], jnp.roll(y[:, n:], 1, axis=0)], axis=1)


@dataclass(frozen=True)
class Hedge(Construction):
    """Four layers that mix one step of gradient descent of each of several step sizes.

    Attributes:
        dim_x, num_examples: d and N, of the training examples.
        validation: T, how many examples follow them.
        step_sizes: eta, one an expert, at least two.
        scales: of the inputs of a context, one drawn for each: a curvature of its own.
    """

    dim_x: int = 3
    num_examples: int = 8
    validation: int = 8
    step_sizes: tuple[float, ...] = (2.0, 6.0, 18.0, 54.0)
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        self.whole("dim_x", "num_examples", "validation")
        for name, least in (("step_sizes", 2), ("scales", 1)):
            each = tuple(number(name, v, above=0) for v in np.atleast_1d(getattr(self, name)))
            if len(each) < least:
                raise ValueError(f"{name} is {each}, must be {least} numbers or more")
            object.__setattr__(self, name, each)

    @property
    def rate(self) -> float:
        """Of Hedge, the one with the least bound on the regret of T losses in [0, 1]."""
        return float(np.sqrt(8 * np.log(len(self.step_sizes)) / self.validation))

    @property
    def program(self) -> Program:
        """Experts predict; losses are clipped; summed over what came before; and mixed."""
        n, slots = len(self.step_sizes), Slots()
        x = slots.add("x", self.dim_x, token_groups=("training", *_READERS))
        y = slots.add("y", 1, token_groups=("training", "validation"))
        code = slots.add("code", n, token_groups="expert", meaning="1_j")
        estimate = slots.add("estimate", n, token_groups=_READERS, born=1)
        error = slots.add("error", n, token_groups="validation", born=1)
        gain = slots.add("gain", n, token_groups="validation", born=2, meaning="1 - loss_tj")
        total = slots.add("total", n, token_groups=_READERS, born=3, meaning="of gains before")
        weight = slots.add("weight", n, token_groups=_READERS, born=4, meaning="p_tj")
        out = slots.add("prediction", 1, token_groups=_READERS, born=4)
        experts = [
            Head(x, x, y, {estimate[j : j + 1]: eta / self.num_examples}, queries=_READERS,
                 keys="training", name=f"expert {j}")
            for j, eta in enumerate(self.step_sizes)
        ]  # fmt: skip
        miss, one = estimate - np.ones((n, 1)) @ y, constant(1.0)
        square = Mlp(miss, {error: 1.0}, miss, "identity", "validation")
        clip = Mlp(1.0 - error, {gain: 1.0}, token_groups="validation")
        add, hedge = (
            Head(one, one, gain, {total: 1.0}, queries=_READERS, keys="validation",
                 window=(None, -1), name="sum"),
            Head(total, code, code, {weight: 1.0}, mixer="softmax", queries=_READERS,
                 keys="expert", scale=self.rate, name="hedge"),
        )  # fmt: skip
        mix = Mlp(weight, {out: np.ones((1, n))}, estimate, "identity", _READERS)
        layers = [Layer(experts, square), Layer(mlp=clip), Layer([add]), Layer([hedge], mix)]
        return Program(slots, layers, token_groups=("training", "expert", *_READERS))

    @property
    def task(self) -> ScaledTasks:
        """Regression with contexts of N + T examples, of mixed curvature."""
        context = self.num_examples + self.validation
        return ScaledTasks(RegressionTask(self.dim_x, context), self.scales)

    @property
    def arguments(self) -> tuple[Input, ...]:
        """N training and T validation examples x, y of one output, and queries."""
        context = self.num_examples + self.validation
        axes = {"x": (context, self.dim_x), "y": (context, 1), "x_query": ("query", self.dim_x)}
        return tuple(Input(name, ("batch", *rest)) for name, rest in axes.items())

    def trace(self, x: Any, y: Any, x_query: Any) -> dict[str, Array]:
        """The algorithm; what experts say, sums and weights are `[batch, T + query, n]`."""
        x, y, x_query = self.given(0.0, x, y, x_query)
        n, etas = self.num_examples, jnp.asarray(self.step_sizes, x.dtype)
        step = jnp.einsum("bno,bni->bi", y[:, :n], x[:, :n], precision="highest") / n
        read = jnp.concatenate([x[:, n:], x_query], axis=1)
        estimate = jnp.einsum("bi,bti->bt", step, read, precision="highest")[..., None] * etas
        error = (estimate[:, : self.validation] - y[:, n:]) ** 2
        gain = 1 - jnp.minimum(error, 1)
        total = jnp.cumsum(jnp.pad(gain, ((0, 0), (1, x_query.shape[1] - 1), (0, 0))), axis=1)
        weight = jax.nn.softmax(self.rate * total)
        mixed = (weight * estimate).sum(-1, keepdims=True)[:, self.validation :]
        return {"estimate": estimate, "error": error, "gain": gain, "total": total,
                "weight": weight, "prediction": mixed}  # fmt: skip

    def embed(self, x: Array, y: Array, x_query: Array) -> list[Tokens]:
        """Training examples, experts, validation examples, queries."""
        n, codes = self.num_examples, jnp.eye(len(self.step_sizes), dtype=x.dtype)[None]
        training = Tokens("training", {"x": x[:, :n], "y": y[:, :n]})
        validation = Tokens("validation", {"x": x[:, n:], "y": y[:, n:]})
        experts, queries = Tokens("expert", {"code": codes}), {"x": x_query}
        return [training, experts, validation, Tokens("query", queries, read=True)]

    def places(self, depth: int, x: Any, y: Any, x_query: Any) -> dict[str, Place]:
        """Every value in its slot."""
        first = self.num_examples + len(self.step_sizes)
        middle, last = first + self.validation, first + self.validation + x_query.shape[1]
        where = {"estimate": last, "error": middle, "gain": middle, "total": last, "weight": last}
        found = {name: Place.of(name, range(first, end), depth) for name, end in where.items()}
        return found | {"prediction": Place.of("prediction", range(middle, last), depth)}

    def counterpart(self) -> Counterpart:
        """The same shape from random weights."""
        recipe = Recipe(steps=3000, batch=256, learning_rate=5e-3, schedule="cosine", warmup=100,
                        clip=1.0, average_tail=0.1)  # fmt: skip
        init, quick = self.random_weights(0.3), replace(recipe, steps=1000)
        return Counterpart(init, self.task, recipe, quick=quick)

    def near_misses(self) -> dict[str, NearMiss]:
        """The best single step size for all scales, and validation labels of another context.

        And what does without experts: a step size by the power of the inputs, which no validation
        label enters, and least squares on all examples.
        """
        s = np.square(self.scales)  # at scale s the loss of eta is that of eta s^2 at scale 1
        best = optimal_step_size(RegressionTask(self.dim_x, self.num_examples))
        best *= float(s.mean() / (s**2).mean())
        single = replace(self, step_sizes=(best,) * len(self.step_sizes))

        def shuffled(x: Array, y: Array, x_query: Array) -> Array:
            return predict(self, self.reference, x, _shuffled(self.num_examples, y), x_query)

        def by_power(x: Any, y: Any, x_query: Any) -> np.ndarray:
            x, n = np.asarray(x, np.float64), self.num_examples
            unit = np.trace(self.task.base.inputs.covariance_matrix(self.dim_x)) / self.dim_x
            power = np.square(x).mean((1, 2), keepdims=True) / unit  # about s^2
            eta = optimal_step_size(RegressionTask(self.dim_x, n)) / power
            return eta * step_on_the_mean(x[:, :n], np.asarray(y)[:, :n], x_query, 1.0)

        return {"one step size": NearMiss(single.reference, self),
                "shuffled labels": NearMiss(shuffled, self),
                BY_POWER: NearMiss(by_power, self),
                "least squares": NearMiss(least_squares, self)}  # fmt: skip

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What the paper says of mixing step sizes, and how near training comes to it."""
        return _CLAIMS


_CLAIMS = (
    Claim(
        "better than one step size",
        "Choosing among step sizes by validation losses beats every single one of them.",
        added_to_single, -0.3, "<=", f"{_PAPER}, abstract", catches=_CONTROLS,
        note="A step size by the power of the inputs gains .59, least squares all: no validation "
        "label is needed for it. 'Predictions of Hedge' tells them apart.",
    ),
    Claim(
        "as good as Hedge", "Trained on mixed curvature, the same layers are as good.",
        added_loss, 0.1, "<=", "here", catches=_CONTROLS,
        note="A step size by the power of the inputs is .03 above Hedge, least squares below.",
    ),
    Claim(
        "predictions of Hedge", "Its predictions are those of Hedge.",
        "prediction_distance", 0.1, "<=", "here",
        catches=(*_CONTROLS, BY_POWER, "least squares"),
    ),
)  # fmt: skip
