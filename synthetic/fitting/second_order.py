"""Nonlinear least squares for few parameters and many examples, from many starts.

Minimises `1/2 |r(theta)|^2` by the Levenberg-Marquardt iteration (Levenberg 1944; Marquardt 1963;
damping by the ratio of actual to predicted decrease as in More 1978):

    (J^T J + mu diag(J^T J)) step = -J^T r

Marquardt's diagonal makes it indifferent to the parameters' units. The Jacobian comes forward, a
direction at a time, so that the memory needed does not grow with the number of parameters; it
suits up to about 30 of them. Residuals need not vanish at the minimum; convergence is then linear.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

Residuals = Callable[[Array, Any], Array]


@dataclass(frozen=True, eq=False)
class Fitted:
    """Where the search ended.

    Attributes:
        parameters: the best found, `[parameters]` float64.
        loss: half the sum of squared residuals there.
        losses: of every start at its end, in the order given (of those given up early, then),
            infinite where a start itself was.
        iterations: accepted and rejected steps of the best start.
        converged: whether its last step promised less than the tolerance.
    """

    parameters: np.ndarray
    loss: float
    losses: tuple[float, ...]
    iterations: int
    converged: bool


@dataclass
class _Search:
    """One start on its way."""

    parameters: np.ndarray
    loss: float
    gradient: np.ndarray
    hessian: np.ndarray
    damping: float
    iterations: int = 0
    converged: bool = False
    stuck: bool = False


def least_squares(
    residuals: Residuals,
    starts: Sequence[ArrayLike | Sequence[float]] | np.ndarray,
    data: Any,
    *,
    steps: int = 100,
    tolerance: float = 1e-8,
    screening: int = 15,
    keep: int = 3,
) -> Fitted:
    """Minimises half the sum of squared residuals over all blocks of the data.

    Every start gets `screening` steps; the best `keep` of them go on to `steps`. Deterministic.

    Args:
        residuals: of parameters `[p]` and one block of the data to an array of any shape. Compiled
            once per function and shape: pass the same (or an equal, hashable) callable again.
        starts: `[start, p]`.
        data: a pytree of arrays whose first axis counts blocks; the blocks are summed one by one,
            so that the work of each stays in cache.
        steps: most steps of a start.
        tolerance: a start has converged when a step promises to lower the loss by less than this,
            relatively.
        screening: steps that every start gets.
        keep: starts that go on.

    Raises:
        ValueError: an argument is out of range, no start is given, or the starts are not finite.
        FloatingPointError: the loss is infinite or NaN at every start.
    """
    for name, value, low in (
        ("steps", steps, 1),
        ("screening", screening, 1),
        ("keep", keep, 1),
        ("tolerance", tolerance, 0),
    ):
        if not value >= low:
            raise ValueError(f"{name}={value}: must be at least {low}")
    points = np.atleast_2d(np.asarray(starts, np.float64))
    if points.size == 0 or points.ndim != 2:
        raise ValueError(f"starts must have shape [start, parameters], got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("starts must be finite, got NaN or infinity")

    searches = [_begin(residuals, point, data) for point in points]
    if not any(np.isfinite(search.loss) for search in searches):
        raise FloatingPointError("the loss is not finite at any start")
    for search in searches:
        _advance(residuals, search, data, min(screening, steps), tolerance)
    order = sorted(range(len(searches)), key=lambda i: (searches[i].loss, i))
    for i in order[:keep]:
        _advance(residuals, searches[i], data, steps, tolerance)
    best = min(searches, key=lambda search: search.loss)
    return Fitted(
        parameters=best.parameters,
        loss=best.loss,
        losses=tuple(search.loss for search in searches),
        iterations=best.iterations,
        converged=best.converged,
    )


def _begin(residuals: Residuals, point: np.ndarray, data: Any) -> _Search:
    loss, gradient, hessian = _expand(residuals, point, data)
    finite = np.isfinite(loss) and np.isfinite(gradient).all() and np.isfinite(hessian).all()
    return _Search(point, loss if finite else np.inf, gradient, hessian, 1e-2, stuck=not finite)


def _expand(
    residuals: Residuals, point: np.ndarray, data: Any
) -> tuple[float, np.ndarray, np.ndarray]:
    loss, gradient, hessian = _gauss_newton(residuals, jnp.asarray(point), data)
    return float(loss), np.asarray(gradient, np.float64), np.asarray(hessian, np.float64)


def _advance(
    residuals: Residuals, search: _Search, data: Any, steps: int, tolerance: float
) -> None:
    while search.iterations < steps and not (search.converged or search.stuck):
        search.iterations += 1
        step, promised = _step(search)
        loss = float(_loss(residuals, jnp.asarray(search.parameters + step), data))
        ratio = (search.loss - loss) / promised if promised > 0 and np.isfinite(loss) else -1.0
        if promised <= tolerance * search.loss:
            search.converged = True
        if ratio <= 0:
            search.damping *= 5
            search.stuck = search.damping > 1e12
            continue
        point = search.parameters + step
        expansion = _expand(residuals, point, data)
        if not all(np.isfinite(part).all() for part in expansion):
            search.damping *= 5
            continue
        search.parameters = point
        search.loss, search.gradient, search.hessian = expansion
        if ratio > 0.75:
            search.damping = max(search.damping / 5, 1e-12)
        elif ratio < 0.25:
            search.damping *= 3


def _step(search: _Search) -> tuple[np.ndarray, float]:
    """The damped step and the decrease that the quadratic model promises for it."""
    diagonal = np.diag(search.hessian)
    # In units in which the diagonal is 1; a parameter that does nothing stays where it is.
    inert = diagonal <= 1e-30 * max(diagonal.max(), 1e-300)
    unit = np.where(inert, 0.0, 1 / np.sqrt(np.where(inert, 1.0, diagonal)))
    scaled = search.hessian * np.outer(unit, unit)
    values, vectors = np.linalg.eigh(scaled)
    gradient = vectors.T @ (unit * search.gradient)
    values = np.maximum(values, 0)
    move = -gradient / (values + search.damping)
    promised = -float(gradient @ move + 0.5 * move @ (values * move))
    return unit * (vectors @ move), promised


@partial(jax.jit, static_argnums=0)
def _loss(residuals: Residuals, parameters: Array, data: Any) -> Array:
    def block(total: Array, part: Any) -> tuple[Array, None]:
        return total + 0.5 * jnp.sum(residuals(parameters, part) ** 2), None

    return jax.lax.scan(block, jnp.zeros_like(parameters[0]), data)[0]


@partial(jax.jit, static_argnums=0)
def _gauss_newton(residuals: Residuals, parameters: Array, data: Any) -> tuple[Array, Array, Array]:
    """Loss, gradient `J^T r` and `J^T J`."""
    directions = jnp.eye(len(parameters), dtype=parameters.dtype)

    def block(total: tuple[Array, Array, Array], part: Any) -> tuple[Any, None]:
        def here(parameters: Array) -> Array:
            return residuals(parameters, part).ravel()

        def along(direction: Array) -> Array:
            return jax.jvp(here, (parameters,), (direction,))[1]

        r, jacobian = here(parameters), jax.lax.map(along, directions)
        products = (
            0.5 * jnp.sum(r**2),
            jnp.matmul(jacobian, r, precision="highest"),
            jnp.matmul(jacobian, jacobian.T, precision="highest"),
        )
        return jax.tree.map(jnp.add, total, products), None

    zero = (jnp.zeros_like(parameters[0]), jnp.zeros_like(parameters), jnp.zeros_like(directions))
    return jax.lax.scan(block, zero, data)[0]
