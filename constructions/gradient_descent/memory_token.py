r"""A memory token: with it a frozen layer learns a new task, and keeps the old one to the bit.

Old tasks have weights w ~ N(0, I), new ones w ~ N(w0, I). For both a frozen layer of linear
attention takes the best step of the old ones, c sum_i y_i x_i with c = eta / N; with one token
more, which only queries of the new task see, it predicts for these

    (c sum_i y_i x_i + b) . x,    b = c y_m x_m,  (x_m, y_m) what the token holds.

The loss is least where the error has mean 0 (v: variance of a coordinate of an input),

    b  =  w0 - c E[S] w0  =  (1 - c N v) w0,    S = sum_i x_i x_i^T,

and every other b adds 1/2 v |b - b*|^2; what more tokens do is one vector as well. Sandler et al.
2022, arXiv 2203.15243, tune such tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.claims import Evidence, known_weights, predict
from constructions.core.program import Head, Layer, Mlp, Program
from constructions.core.slots import Slots, constant
from constructions.core.transformer import Transformer
from constructions.core.weights import Part
from constructions.family import Claim, Counterpart, NearMiss, Place, Tokens
from constructions.inputs import FLAGS, Input
from constructions.regression import LinearRegression, least_squares
from synthetic.fitting.recipe import Recipe
from synthetic.tasks.regression import Gaussian, ShiftedTasks
from synthetic.theory.one_layer import gradient_descent_loss


@dataclass(frozen=True)
class MemoryToken(LinearRegression):
    """A step of gradient descent from 0 for old tasks, from a token's b for new ones.

    Attributes:
        shift: w0, the mean of the weights of new tasks: `dim_x` numbers, or one for each.
    """

    dim_x: int = 10
    num_examples: int = 10
    shift: float | tuple[float, ...] = 1.0
    dim_y = 1

    def __post_init__(self) -> None:
        self.whole("dim_x", "num_examples")
        self.check_distributions()
        shift = np.asarray(self.shift, float)
        if shift.shape not in ((), (self.dim_x,)) or not np.isfinite(shift).all():
            raise ValueError(f"shift is {self.shift!r}, must be 1 or {self.dim_x} finite numbers")
        if not shift.any():
            raise ValueError("shift is 0, must be another: new tasks would be the old ones")
        object.__setattr__(self, "shift", tuple(np.broadcast_to(shift, self.dim_x).tolist()))

    @property
    def rate(self) -> float:
        """c, the best one for old tasks."""
        return self.best_step_size() / self.num_examples

    @property
    def bias(self) -> np.ndarray:
        """b = (I - c N C) w0, C the covariance of the inputs, `[dim_x]`."""
        seen = self.num_examples * self.task.base.inputs.covariance_matrix(self.dim_x)
        return np.asarray(self.shift) @ (np.eye(self.dim_x) - self.rate * seen)

    @property
    def program(self) -> Program:
        """The token is written, then the frozen layer looks at it and at the context."""
        return self._program(self.bias)

    def _program(self, bias: np.ndarray, seen: Any = "new") -> Program:
        slots = Slots()
        x = slots.add("x", self.dim_x, accumulates=True, meaning="x_i; x_m at the token")
        y = slots.add("y", 1, accumulates=True, meaning="y_i; y_m = 1 at the token; -prediction")
        to_x, to_y = np.split(np.append(bias / self.rate, 1.0)[:, None], [self.dim_x])
        token = Mlp(constant(1.0), {x: to_x, y: to_y}, token_groups="memory", name="token")
        heads = [
            Head(x, x, -y, {y: self.rate}, keys=keys, queries=queries, name=keys)
            for keys, queries in (("context", ("old", "new")), ("memory", seen))
        ]
        groups = ("context", "memory", "old", "new")
        return Program(slots, [Layer(mlp=token), Layer(heads)], token_groups=groups)

    @property
    def task(self) -> ShiftedTasks:
        """Old and new tasks, each half of the time."""
        assert isinstance(self.shift, tuple)
        return ShiftedTasks(self.regression_task(self.num_examples), self.shift)

    @property
    def losses(self) -> dict[str, float]:
        """Exact losses: of old tasks, of new ones with the token, and of new ones without it."""
        base, eta = self.task.base, self.rate * self.num_examples
        # the loss is linear in the second moment of the weights, which has w0 w0^T more
        mean = replace(base, weights=Gaussian(np.outer(self.shift, self.shift)), noise=0.0)
        old, added = (gradient_descent_loss(eta, task) for task in (base, mean))
        gain = 0.5 * self.bias @ base.inputs.covariance_matrix(self.dim_x) @ self.bias
        return {"old": old, "new": old + added - float(gain), "without": old + added}

    @property
    def arguments(self) -> tuple[Input, ...]:
        """Those of a regression, and whether each context is of the new task, `[batch]` of bool."""
        return (*super().arguments, Input("new", ("batch",), FLAGS))

    def subset(self, kept: Any, *inputs: Any) -> tuple[Any, ...]:
        """These pairs (x_i, y_i) only."""
        return (*super().subset(kept, *inputs[:3]), inputs[3])

    def trace(self, x: Any, y: Any, x_query: Any, new: Any) -> dict[str, Array]:
        """The "prediction", by (c sum_i y_i x_i + b) in weight space."""
        x, y, x_query, new = self.given(0.0, x, y, x_query, new)
        weight = self.rate * jnp.einsum("bno,bni->boi", y, x, precision="highest")
        weight += jnp.where(new[:, None, None], jnp.asarray(self.bias, x.dtype), 0)
        return {"prediction": jnp.einsum("boi,bqi->bqo", weight, x_query, precision="highest")}

    def embed(self, x: Array, y: Array, x_query: Array, new: Array) -> list[Tokens]:
        """The context, the token with nothing in it yet, and queries of one of two groups."""
        kinds = jnp.broadcast_to(2 + new.astype(int)[:, None], x_query.shape[:2])
        empty = Tokens("memory", {"x": jnp.zeros_like(x[:, :1]), "y": 0.0})
        query = Tokens(kinds, {"x": x_query, "y": 0.0}, read=True)
        return [Tokens("context", {"x": x, "y": y}), empty, query]

    def places(self, depth: int, x: Any, y: Any, x_query: Any, new: Any) -> dict[str, Place]:
        """The prediction at the queries, with its sign turned."""
        first = x.shape[1] + 1
        return {"prediction": Place.of("y", range(first, first + x_query.shape[1]), depth, -1.0)}

    def apply(self, model: Transformer, *inputs: Array) -> Array:
        """As the base class has it; of the weights, gradients reach those of the token alone."""

        def frozen(part: Part) -> dict[str, Array]:
            held = jax.tree.map(jax.lax.stop_gradient, part.weights)
            return held | ({"output": part.weights["output"]} if part.kind == "mlp" else {})

        return super().apply(model.map_parts(frozen), *inputs)

    def counterpart(self) -> Counterpart:
        """The same model with a token drawn at random, which alone is trained."""

        def init(key: Array) -> Transformer:
            held = 0.3 * jax.random.normal(key, (1, self.program.slots.width, 1))
            drawn = {"mlp": {"output": held}}
            return self.reference.map_parts(lambda p: p.weights | drawn.get(p.kind, {}))

        recipe = Recipe(500, 256, learning_rate=5e-2, schedule="linear", average_tail=0.4)
        return Counterpart(
            init, self.task, recipe, 0.5 * (self.losses["old"] + self.losses["new"]),
            quick=replace(recipe, steps=250), random=self.random_weights(0.3),
        )  # fmt: skip

    def near_misses(self) -> dict[str, NearMiss]:
        """No token, all of w0, a token that old queries see; and what does without the layer.

        Those are functions: w0 alone for new tasks, a step of gradient descent that begins there,
        which one token cannot make of a layer that starts at 0, and least squares.
        """
        near = {"no token": 0 * self.bias, "all of w0": np.asarray(self.shift)}
        programs = {name: self._program(b) for name, b in near.items()}
        programs["seen by old queries"] = self._program(self.bias, ("old", "new"))
        rivals = {
            "w0 alone": partial(self._from_mean, steps=False),
            "a step from w0": self._from_mean,
            "least squares": lambda x, y, x_query, new: least_squares(x, y, x_query),
        }
        return {name: self.near_miss(program) for name, program in programs.items()} | {
            name: NearMiss(rival, self) for name, rival in rivals.items()
        }

    def _from_mean(self, x: Any, y: Any, x_query: Any, new: Any, steps: bool = True) -> np.ndarray:
        """w0 . x for new tasks, 0 for old ones, and the layer's step from there."""
        x, y, x_query, new = (np.asarray(a, np.float64) for a in (x, y, x_query, new))
        start = new[:, None] * np.asarray(self.shift)
        missed = y[..., 0] - np.einsum("bnd,bd->bn", x, start)
        weight = start + steps * self.rate * np.einsum("bn,bnd->bd", missed, x)
        return np.einsum("bqd,bd->bq", x_query, weight)[..., None]

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What Sandler et al. say of tokens that are tuned alone."""
        return CLAIMS


def new_loss(e: Evidence) -> float:
    """|loss / loss of the construction - 1| on new tasks."""
    loss, new = e.construction.task.loss, e.examples.inputs[3]
    ours, theirs = (float(loss(p, e.examples) @ new) for p in (e.prediction, e.expected))
    return abs(ours / theirs - 1)


def old_change(e: Evidence) -> float:
    """Largest change of a prediction for old tasks by the token, 0 if all bits are the same."""
    without, inputs = e.construction.near_misses()["no token"].model, e.examples.inputs
    kept = e.once("no token", lambda: predict(e.construction, without, *inputs))
    return float(jnp.where(inputs[3][:, None, None], 0, jnp.abs(e.prediction - kept)).max())


_PAPER = "Sandler et al. 2022, arXiv 2203.15243"
CLAIMS = (
    Claim(
        "least loss of new tasks",
        "A memory token, tuned alone, reaches the least loss of a new task that tokens can reach.",
        new_loss, 0.01, "<=", f"{_PAPER}, section 3", 
        catches=("no token", "all of w0", "w0 alone", "a step from w0", "least squares"),
    ),
    Claim(
        "old outputs",
        "Masked from queries of the old task, the token leaves every bit of their outputs.",
        old_change, 0.0, "<=", f"{_PAPER}, section 3 (attention masking)",
        catches=("seen by old queries",), needs=(known_weights,),
        note="It follows from the mask: a token that holds anything else passes as well.",
    ),
)  # fmt: skip
