"""Gradient descent and GD++ in context as filters on the eigenvalues of each context.

Notation. A context is `X` `[N, d]` with `y = X w + noise`, noise of variance `s2`, and `lambda` is
an eigenvalue of `X^T X`. Every algorithm here predicts `x_query^T g(X^T X) X^T y`, so that it
leaves the fraction `rho = 1 - lambda g(lambda)` of the weights unlearnt in that direction. With
isotropic inputs (variance `v`) and weights (variance `omega`) the expected loss given the context,
exact over weights, noise and query, is

    1/2 dim_y v sum_i [omega rho_i^2 + s2 lambda_i g_i^2],

which leaves only the contexts to be sampled. It is linear in `s2`: where the noise level is random,
its mean square is all that a filter sees.

GD++ (von Oswald et al. 2022, appendix A.10, eq. 23) from zero weights: every step, with `r` =
step size / N and curvature `gamma`, both from the old values,

    rho <- rho (1 - r lambda),   lambda <- lambda (1 - gamma lambda)^2

(Vladymyrov et al. 2024, section 5, Theorem 5.1). Gradient descent has `gamma = 0`.

For use as a library: `descent_losses`, `ridge_losses` and `oracle_losses`; no command calls them.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from synthetic.compilation import compile_once
from synthetic.tasks.regression import RegressionTask


class Filter(NamedTuple):
    """What descent does to each eigenvalue; the first axis counts the steps taken, from 0.

    Attributes:
        residual: `rho`, the fraction of the weights not learnt yet, `[steps + 1, ...]`.
        gain: `g = (1 - rho) / lambda`, finite at 0, `[steps + 1, ...]`.
        eigenvalues: of the context as the steps have changed it, `[steps + 1, ...]`.
    """

    residual: Array
    gain: Array
    eigenvalues: Array


class Estimate(NamedTuple):
    """A mean over sampled contexts and its standard error."""

    mean: float
    standard_error: float


def estimate(losses: ArrayLike | Sequence[float]) -> Estimate:
    """Mean and standard error of losses of independent contexts, `[context]`, in float64."""
    values = np.asarray(losses, np.float64)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(values.size)))


def context_eigenvalues(
    task: RegressionTask, key: Array, contexts: int
) -> Float[Array, "context dim_x"]:
    """Eigenvalues of `X^T X` of the contexts that `task.sample(key, contexts)` draws.

    Args:
        task: its inputs and weights must be isotropic.
        key: of `jax.random`.
        contexts: how many, at least 1.

    Returns:
        In ascending order, JAX's default float; exactly 0 in the `dim_x - N` directions that a
        short context does not reach, and nowhere negative.

    Raises:
        ValueError: inputs or weights are not isotropic, or do not have mean 0.
    """
    variances_of(task)
    return _eigenvalues(task, key, contexts)


@partial(jax.jit, static_argnums=(0, 2))
def _eigenvalues(task: RegressionTask, key: Array, contexts: int) -> Array:
    x = task.sample(key, contexts).inputs[0]
    n, d = task.num_examples, task.dim_x
    # X X^T has the same eigenvalues but for the zeros
    inner, axes = ("cnd,cne->cde", d) if n >= d else ("cnd,cmd->cnm", n)
    values = jnp.linalg.eigvalsh(jnp.einsum(inner, x, x, precision="highest"))
    return jnp.pad(jnp.maximum(values, 0), ((0, 0), (d - axes, 0)))


def descent_filter(eigenvalues: ArrayLike, rates: ArrayLike, curvatures: ArrayLike) -> Filter:
    """The module's recursion on eigenvalues of any shape.

    Args:
        eigenvalues: of `X^T X`, `[...]`.
        rates: step size / N of every step, `[steps]`.
        curvatures: `gamma` of every step, `[steps]`.

    Raises:
        ValueError: `rates` and `curvatures` are not vectors of one length.
    """
    start, rates, curvatures = (jnp.asarray(a) for a in (eigenvalues, rates, curvatures))
    if rates.ndim != 1 or rates.shape != curvatures.shape:
        raise ValueError(
            "rates and curvatures must be vectors of one length, "
            f"got shapes {rates.shape} and {curvatures.shape}"
        )

    # g and the change of lambda are followed beside rho and lambda: (1 - rho) / lambda would lose
    # the digits of small eigenvalues, and 0 / 0 their zeros
    def step(state: tuple[Array, Array, Array], now: tuple[Array, Array]) -> tuple:
        residual, gain, change = state
        rate, curvature = now
        eigenvalue = start * change
        state = (
            residual * (1 - rate * eigenvalue),
            gain + residual * rate * change,
            change * (1 - curvature * eigenvalue) ** 2,
        )
        return state, state

    one = jnp.ones_like(start)
    begin = (one, jnp.zeros_like(start), one)
    _, after = jax.lax.scan(step, begin, (rates, curvatures))
    residual, gain, change = (
        jnp.concatenate([first[None], rest]) for first, rest in zip(begin, after, strict=True)
    )
    return Filter(residual, gain, start * change)


def descent_losses(
    task: RegressionTask,
    eigenvalues: Float[Array | np.ndarray, "context dim_x"],
    step_sizes: ArrayLike | Sequence[float],
    curvatures: ArrayLike | Sequence[float],
) -> Float[Array, " context"]:
    """Expected loss given each context, of descent with these step sizes `eta` and `gamma`.

    Args:
        task: gives the scale of the loss and the noise.
        eigenvalues: what `context_eigenvalues` gave.
        step_sizes: `eta` of every step, `[steps]`; `eta / N` multiplies the sum over examples.
        curvatures: `gamma` of every step, `[steps]`; the Gram matrix is not divided by `N`.

    Raises:
        ValueError: not vectors of one length, or the task is not isotropic.
    """
    steps = jnp.asarray(step_sizes), jnp.asarray(curvatures)
    return losses_by_eigenvalue(task, jnp.asarray(eigenvalues), *steps).sum(-1)


def ridge_losses(
    task: RegressionTask,
    eigenvalues: Float[Array | np.ndarray, "context dim_x"],
    penalty: float | None = None,
) -> Float[Array, " context"]:
    """Expected loss given each context, of ridge regression `(X^T X + penalty I)^-1 X^T y`.

    The default penalty, `s2 / omega`, minimises every term of the loss: no filter is better on
    any context. It bounds descent with fixed step sizes from below, and is the best single penalty
    ("ConstRR" of Vladymyrov et al. 2024) where the noise level is random with mean square `s2`.

    Raises:
        ValueError: a negative penalty, or the task is not isotropic.
    """
    _, weights = variances_of(task)
    strength = task.noise**2 / weights if penalty is None else float(penalty)
    if not strength >= 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    values = jnp.asarray(eigenvalues)
    # a direction that the context does not reach is not learnt, with any penalty
    gain = jnp.where(values > 0, 1 / jnp.where(values > 0, values + strength, 1), 0)
    return _terms(task, values, 1 - values * gain, gain).sum(-1)


def oracle_losses(
    task: RegressionTask,
    eigenvalues: Float[Array | np.ndarray, "context dim_x"],
    noises: Sequence[float],
) -> Float[Array, " context"]:
    """Loss given each context of ridge regression that knows the noise level, mean over levels.

    Args:
        task: its own noise is not used.
        eigenvalues: what `context_eigenvalues` gave.
        noises: standard deviations, equally likely.

    Raises:
        ValueError: a negative noise, or the task is not isotropic.
    """
    levels = [ridge_losses(replace(task, noise=noise), eigenvalues) for noise in noises]
    return jnp.stack(levels).mean(0)


@compile_once(static_argnums=0)
def losses_by_eigenvalue(
    task: RegressionTask, eigenvalues: Array, step_sizes: ArrayLike, curvatures: ArrayLike
) -> Array:
    """What each eigenvalue adds to `descent_losses`, of the shape of the eigenvalues."""
    last = descent_filter(eigenvalues, jnp.asarray(step_sizes) / task.num_examples, curvatures)
    return _terms(task, eigenvalues, last.residual[-1], last.gain[-1])


def _terms(task: RegressionTask, eigenvalues: Array, residual: Array, gain: Array) -> Array:
    """What each eigenvalue adds to the loss."""
    inputs, weights = variances_of(task)
    error = weights * residual**2 + task.noise**2 * eigenvalues * gain**2
    return 0.5 * task.dim_y * inputs * error


def variances_of(task: RegressionTask) -> tuple[float, float]:
    """Variances of inputs and weights; refuses a task for which the loss is another."""
    variances = []
    for name, distribution in (("inputs", task.inputs), ("weights", task.weights)):
        matrix = distribution.covariance_matrix(task.dim_x)
        variance = float(matrix[0, 0])
        if distribution.mean != 0 or not np.array_equal(matrix, variance * np.eye(task.dim_x)):
            raise ValueError(
                f"{name} must have mean 0 and covariance v I for the eigenvalue reduction, "
                f"got {distribution}"
            )
        variances.append(variance)
    return variances[0], variances[1]
