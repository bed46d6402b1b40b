"""What the constructions on in-context regression share: three arrays in, predictions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, ArrayLike, Float

from constructions.family import Construction
from constructions.inputs import Input
from synthetic.guards import number
from synthetic.tasks.regression import Gaussian, RegressionTask, Uniform, distribution

Inputs = Float[Array, "batch context dim_x"]
Outputs = Float[Array, "batch context dim_y"]
Queries = Float[Array, "batch query dim_x"]


class Regression(Construction):
    """A construction whose inputs are x, y and x_query, of `dim_x` and `dim_y` columns."""

    dim_x: int
    dim_y: int
    num_examples: int

    @property
    def arguments(self) -> tuple[Input, ...]:
        """Pairs x `[batch, context, dim_x]` and y `[batch, context, dim_y]`, and queries.

        Queries are `[batch, query, dim_x]`, predictions for them `[batch, query, dim_y]`.
        """
        return (
            Input("x", ("batch", "context", self.dim_x)),
            Input("y", ("batch", "context", self.dim_y)),
            Input("x_query", ("batch", "query", self.dim_x)),
        )

    def context_size(self, *inputs: Any) -> int:
        """N, the number of pairs."""
        return inputs[0].shape[1]

    def subset(self, kept: Sequence[int] | np.ndarray, *inputs: Any) -> tuple[Any, ...]:
        """These pairs (x_i, y_i) only; the queries stay."""
        x, y, x_query = inputs
        index = np.asarray(kept, int)
        return x[:, index], y[:, index], x_query


@dataclass(frozen=True, kw_only=True)
class LinearRegression(Regression):
    """A construction on linear regression, whose task may have other distributions.

    Attributes:
        inputs: of x_i and the queries: "uniform" on [-1/2, 1/2), "gaussian" for N(0, I),
            {"uniform": [low, high]} or {"gaussian": covariance}, a number or a matrix.
        weights: of each row of W, likewise.
        noise: standard deviation of the noise on the context's outputs.
    """

    # not in the repr, where they would stand in front of the sizes: that of the task has them
    inputs: Uniform | Gaussian | str | Mapping[str, Any] = field(default="uniform", repr=False)
    weights: Uniform | Gaussian | str | Mapping[str, Any] = field(default="gaussian", repr=False)
    noise: float | int = field(default=0.0, repr=False)
    numbers: ClassVar[tuple[str, ...]] = ("noise",)

    def check_distributions(self) -> None:
        """The settings of the task's distributions as they are kept; ValueError for others."""
        object.__setattr__(self, "noise", number("noise", self.noise, least=0))
        for name in ("inputs", "weights"):
            found = distribution(name, getattr(self, name))
            try:
                found.covariance_matrix(self.dim_x)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            object.__setattr__(self, name, found)

    def regression_task(self, num_examples: int, queries: int = 1) -> RegressionTask:
        """Linear regression with these distributions."""
        return RegressionTask(
            self.dim_x, num_examples, self.dim_y, queries,
            distribution("inputs", self.inputs), distribution("weights", self.weights), self.noise,
        )  # fmt: skip

    def best_step_size(self) -> float:
        """The best one of a single step from 0 on the task; ValueError where it is not known."""
        from synthetic.theory.one_layer import optimal_step_size

        try:
            return optimal_step_size(self.regression_task(self.num_examples))
        except ValueError as error:
            raise ValueError(f"step_size is None, must be given: {error}") from None


# Rivals: what predicts well, or looks like the step, without taking it


def least_squares(x: ArrayLike, y: ArrayLike, x_query: ArrayLike) -> np.ndarray:
    """Predictions of least squares, the best there are without noise, `[batch, query, dim_y]`."""
    x, y, x_query = (np.asarray(a, np.float64) for a in (x, y, x_query))
    gram = np.swapaxes(x, 1, 2) @ x
    size = np.trace(gram, axis1=1, axis2=2)[:, None, None] / x.shape[-1]
    weight = np.linalg.solve(gram + 1e-9 * size * np.eye(x.shape[-1]), np.swapaxes(x, 1, 2) @ y)
    return x_query @ weight


def kernel_smoother(x: ArrayLike, y: ArrayLike, x_query: ArrayLike, scale: float) -> np.ndarray:
    """Means of y_i with weights ~ exp(scale x_i . x_query): one head of softmax attention."""
    x, y, x_query = (np.asarray(a, np.float64) for a in (x, y, x_query))
    scores = scale * (x_query @ np.swapaxes(x, 1, 2))
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) @ y


def step_on_the_mean(x: ArrayLike, y: ArrayLike, x_query: ArrayLike, size: float) -> np.ndarray:
    """A step of gradient descent from 0, with N the number of examples that there are."""
    x, y, x_query = (np.asarray(a, np.float64) for a in (x, y, x_query))
    return size * (x_query @ (np.swapaxes(x, 1, 2) @ y)) / max(1, x.shape[1])
