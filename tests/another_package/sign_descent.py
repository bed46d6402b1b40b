"""One step of sign descent on in-context linear regression: a family of another package.

    W_1 = eta sign(g),    g = sum_i y_i x_i,    prediction W_1 x

A token for each coordinate j holds its code e_j and gathers g_j = sum_i x_ij y_i; the RMS norm of
one number is its sign; a query then sums eta sign(g_j) x_j over these tokens.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from orrery import Claim, Head, Layer, Norm, Place, Program  # isort: skip
from orrery import Regression, RegressionTask, Slots, Tokens  # isort: skip


@dataclass(frozen=True)
class SignDescent(Regression):
    """Two layers of linear attention and a norm are one step of sign descent from W = 0."""

    dim_x: int = 2
    num_examples: int = 4
    step_size: float = 0.5
    dim_y = 1

    def __post_init__(self):
        self.whole("dim_x", "num_examples")
        self.finite("step_size", above=0)

    @property
    def task(self):
        return RegressionTask(self.dim_x, self.num_examples)

    @property
    def program(self):
        slots, groups = Slots(), ("context", "weight", "query")
        x, y = slots.add("x", self.dim_x), slots.add("y", 1, accumulates=True)
        g = slots.add("gradient", 1, token_groups="weight", born=1)
        sign = slots.add("sign", 1, token_groups="weight", born=2)
        gather = Head(x, x, y, {g: 1.0}, queries="weight", keys="context")
        step = Head(x, x, sign, {y: self.step_size}, queries="query", keys="weight")
        norm = Norm(g, sign, kind="rms", eps=1e-24, token_groups="weight")
        return Program(slots, [Layer([gather]), Layer([step], norm=norm)], token_groups=groups)

    def trace(self, x, y, x_query):
        g = jnp.matmul(x.mT, y, precision="highest")
        w = self.step_size * jnp.sign(g)
        predicted = jnp.matmul(x_query, w, precision="highest")
        return {"gradient": g, "sign": jnp.sign(g), "prediction": predicted}

    def embed(self, x, y, x_query):
        codes = jnp.eye(self.dim_x, dtype=x.dtype)[None]
        query = Tokens("query", {"x": x_query}, read=True)
        return [Tokens("context", {"x": x, "y": y}), Tokens("weight", {"x": codes}), query]

    def places(self, depth, x, y, x_query):
        n, last = x.shape[1], x.shape[1] + self.dim_x
        return {
            "gradient": Place.of("gradient", range(n, last), 1),
            "sign": Place.of("sign", range(n, last), depth),
            "prediction": Place.of("y", range(last, last + x_query.shape[1]), depth),
        }

    def near_misses(self):
        return {"twice the step": self.near_miss(SignDescent(step_size=2 * self.step_size))}

    claims = (
        Claim("equal predictions", "It predicts what a step of sign descent does.",
              "prediction_distance", 0.1, "<=", "a test", catches=("twice the step",)),
    )  # fmt: skip
