r"""What a parametrisation prefers: gradient flow of two factors is mirror flow of their product.

One layer of linear attention with a head for each coordinate, which scales scores by q_i and what
it writes by p_i, multiplies sum_n y_n x_n of a context by diag(m), m_i = p_i q_i. Its exact loss L
is a quadratic in m. Gradient flow of p and q keeps c_i = p_i^2 - q_i^2, so that p_i^2 + q_i^2 =
sqrt(c_i^2 + 4 m_i^2) and

    dm_i/dt = -(p_i^2 + q_i^2) dL/dm_i,    d/dt asinh(2 m_i / c_i) / 2 = -dL/dm_i:

mirror flow, of the potential R'' = 1 / sqrt(c^2 + 4 m^2). Where inputs have low rank many m have
the least loss. The flow ends at the one with the least Bregman divergence from where it began: from
m = 0 the least l2 norm for large c, the least l1 norm as c falls to 0.

Li et al. 2022, arXiv 2207.04036: gradient flow is mirror flow where the gradients of the m_i, as
fields, commute (Theorem 4.8). Of a value scale that all heads share, m_i = p q_i, they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike
from scipy.optimize import linprog

from constructions.measurement import Measurement
from synthetic.tasks.regression import Gaussian, RegressionTask
from synthetic.theory.one_layer import gram_tensor, one_layer_excess

_PAPER = "Li et al. 2022, arXiv 2207.04036"


def low_rank_task(seed: int = 0, dim: int = 6, rank: int = 2) -> RegressionTask:
    """Regression with inputs of covariance A A^T / rank, A `[dim, rank]` standard normal."""
    root = np.random.default_rng(seed).normal(size=(dim, rank))
    return RegressionTask(dim, 10, inputs=Gaussian(root @ root.T / rank))


def head_loss(p: ArrayLike, q: ArrayLike, task: RegressionTask) -> Array:
    """Exact loss, less a constant, of heads i that score q_i x_i x'_i and write p_i y; `[dim]`."""
    p, q = jnp.asarray(p), jnp.asarray(q)
    unit = jnp.eye(task.dim_x, dtype=q.dtype)
    value = jnp.concatenate([jnp.zeros_like(unit), p[:, None]], axis=1)[:, None]
    score = q[:, None, None] * unit[:, :, None] * unit[:, None, :]
    return one_layer_excess(gram_tensor(value, jnp.pad(score, ((0, 0), (0, 1), (0, 0)))), task)


class Quadratic(NamedTuple):
    """L(m) = m^T matrix m / 2 - vector . m, and a basis of the range of the matrix."""

    matrix: np.ndarray
    vector: np.ndarray
    basis: np.ndarray

    @classmethod
    def of(cls, task: RegressionTask) -> Quadratic:
        """The loss of the heads as a function of m, exactly: its derivatives at 0; float64."""
        slope = jax.jit(jax.grad(head_loss, 1), static_argnums=2)
        dim = task.dim_x
        at = np.stack([slope(jnp.ones(dim), m, task) for m in np.eye(dim + 1, dim)])
        matrix = at[:-1] - at[-1]
        values, vectors = np.linalg.eigh(matrix)
        return cls(matrix, -at[-1], vectors[:, values > 1e-9 * values[-1]])


def flow(field: Callable, state: Array, time: float, steps: int) -> Array:
    """The state after `time`, by Runge and Kutta's method of order 4."""
    h = time / steps

    def step(w: Array, _: None) -> tuple[Array, None]:
        a = field(w)
        b = field(w + h / 2 * a)
        c = field(w + h / 2 * b)
        return w + h / 6 * (a + 2 * b + 2 * c + field(w + h * c)), None

    return jax.lax.scan(step, state, None, length=steps)[0]


def projection(loss: Quadratic, c: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The m of least loss with the least Bregman divergence from `start`; Newton on the dual.

    m = c sinh(2 theta) / 2, theta = theta_0 + basis lambda, with basis^T m what least loss needs.
    """
    first = np.arcsinh(2 * start / c) / 2
    wanted = loss.basis.T @ np.linalg.pinv(loss.matrix, 1e-9) @ loss.vector
    dual = np.zeros(loss.basis.shape[1])

    def value(dual: np.ndarray) -> float:
        with np.errstate(over="ignore"):
            return float((c * np.cosh(2 * (first + loss.basis @ dual))).sum() / 4 - wanted @ dual)

    for _ in range(200):
        theta = first + loss.basis @ dual
        slope = loss.basis.T @ (c * np.sinh(2 * theta) / 2) - wanted
        move = np.linalg.solve(
            loss.basis.T @ ((c * np.cosh(2 * theta))[:, None] * loss.basis), slope
        )
        size = 1.0
        while size > 1e-12 and value(dual - size * move) > value(dual) - 1e-4 * size * slope @ move:
            size /= 2
        dual = dual - size * move
        if size <= 1e-12 or abs(slope).max() < 1e-12 * abs(wanted).max():  # to rounding
            break
    return c * np.sinh(2 * (first + loss.basis @ dual)) / 2


@partial(jax.jit, static_argnums=4)
@partial(jax.vmap, in_axes=(None, 0, 0, None, None))
def _train(loss: Quadratic, p: Array, q: Array, rate: ArrayLike, steps: int) -> Array:
    def step(w: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        slope = jax.vjp(jnp.multiply, *w)[1](loss.matrix @ (w[0] * w[1]) - loss.vector)
        return (w[0] - rate * slope[0], w[1] - rate * slope[1]), None

    (p, q), _ = jax.lax.scan(step, (p, q), None, length=steps)
    return p * q


def limits(loss: Quadratic, p: np.ndarray, q: np.ndarray, steps: int = 200_000) -> np.ndarray:
    """m after gradient descent on the exact loss from each p and q, `[seed, head]`.

    p of one column is a value scale that all heads share.
    """
    rate = 0.5 / np.linalg.eigvalsh(loss.matrix)[-1] / max(1, (p**2).max())
    return np.asarray(_train(loss, jnp.asarray(p), jnp.asarray(q), rate, steps))


def least_norms(loss: Quadratic) -> tuple[float, float]:
    """The least l1 norm and the least l2 norm among the m of least loss."""
    exact, dim = np.linalg.pinv(loss.matrix, 1e-9) @ loss.vector, len(loss.vector)
    found = linprog(
        np.ones(2 * dim), A_eq=np.hstack([loss.basis.T, -loss.basis.T]), b_eq=loss.basis.T @ exact
    )
    return float(found.fun), float(np.linalg.norm(exact))


def order_of_flows(fields: Callable[[Array], Array], state: Array, time: float) -> float:
    """Relative change of the end if the flows along the gradients of m_0 and m_1 change places."""

    def along(w: Array, i: int) -> Array:
        return flow(jax.grad(lambda w: fields(w)[i]), w, time, 200)

    ends = [along(along(state, i), 1 - i) for i in (0, 1)]
    return float(jnp.linalg.norm(ends[0] - ends[1]) / jnp.linalg.norm(ends[0]))


#: A solution so near the projection, relatively, is there: what steps of finite size leave.
_THERE = 0.01


def measure(quick: bool = False, seed: int = 0) -> Iterator[Measurement]:
    """What the heads prefer, and what heads with a shared scale do; five seeds each."""
    del quick  # seconds either way
    with jax.enable_x64(True):
        rows = list(_measure(seed))
    yield from rows


def _measure(seed: int) -> Iterator[Measurement]:
    loss, rng = Quadratic.of(low_rank_task()), np.random.default_rng(seed)
    least, _ = least_norms(loss)
    p, q = 0.1 * rng.uniform(0.8, 1.2, (5, 6)), 0.05 * rng.uniform(-1, 1, (5, 6))

    def gap(m: np.ndarray, c: Any, start: np.ndarray) -> float:
        nearest = projection(loss, np.broadcast_to(c, 6), start)
        return float(np.linalg.norm(m - nearest) / np.linalg.norm(nearest))

    begun = "Gradient flow of commuting factors ends at the Bregman projection of where it began."
    norms = "As the scale of the start falls, the solution goes from least l2 to least l1 norm."
    shared, starts = limits(loss, p[:, :1], q), rng.uniform(0.8, 1.2, (5, 6))
    large, small = (limits(loss, size * starts, 0 * starts) for size in (10.0, 0.01))
    apart = "That of factors which do not commute ends elsewhere."
    flat = np.abs(np.linalg.pinv(loss.matrix, 1e-9) @ loss.vector).sum() / least
    for name, statement, values, note, decided in (
        ("mirror flow, distance from the projection", begun,
         list(map(gap, limits(loss, p, q), p**2 - q**2, p * q)), "Small unequal starts.",
         {"published": None, "at_most": _THERE}),
        ("shared value scale, distance from every projection", apart,
         [min(gap(m, c, start) for c in np.logspace(-6, 2, 33))
          for m, start in zip(shared, p[:, :1] * q, strict=True)], "The least over c.",
         {"published": None, "at_least": _THERE}),
        ("l1 norm over the least, large scale", norms, np.abs(large).sum(1) / least,
         "p near 10. Published: that of the least l2 norm.", {"published": float(flat)}),
        ("l1 norm over the least, small scale", norms, np.abs(small).sum(1) / least,
         "p near .01. Published: the limit.", {"published": 1.0}),
    ):  # fmt: skip
        error = float(np.std(values, ddof=1) / np.sqrt(5))
        yield Measurement(
            name, statement, _PAPER, measured=float(np.mean(values)), error=error, note=note,
            **dict[str, Any](decided),
        )  # fmt: skip
