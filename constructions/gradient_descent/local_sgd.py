r"""Along the minima of a layer: how fast label noise makes it flat, with workers apart for H steps.

The layer of gradient descent with its value scaled by u and its scores by w has the step size
m = u w, and on an isotropic task the exact loss L = a (u w - m*)^2 / 2 more than its least. All
(P V s, K Q / s) are minima, with the closed form of the trace of the Hessian

    h(s) = a (u^2 + w^2) = a m* (s^2 + 1 / s^2),    least where u = w.

With label noise, gradients a (u w - m*) + sigma xi, a step of size eta multiplies u^2 - w^2 by
1 - eta^2 g^2: the layer drifts along its minima to the flat one. K workers that average their
weights after H steps drift faster than steps on all their data by

    ratio = 1 + (K - 1) (1 - (1 - rho^H) / (H (1 - rho))),    rho = (1 - eta h)^2,

in the lowest order of the noise; as eta falls that is 1 + (K - 1) psi(2 eta h H) with psi(x) =
1 - (1 - e^-x) / x, of the slow SDE of Gu et al. 2023, arXiv 2303.01215. So it goes to 1 at constant
H, stays at H ~ 1 / eta, and goes to K under the quadratic synchronisation rule H ~ 1 / eta^2 (Gu et
al. 2023, arXiv 2310.14423). Gradient flow without noise keeps u^2 - w^2, and the other orbit of the
layer, rotations of K and Q, has one sharpness and no drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from constructions.measurement import Measurement
from synthetic.tasks.regression import RegressionTask
from synthetic.theory.one_layer import gradient_descent_loss, optimal_step_size

_PAPER = "Gu et al. 2023, arXiv 2303.01215"


def curvature(task: RegressionTask) -> float:
    """a, the second derivative of the loss of one step by its step size, which is quadratic."""
    low, middle, high = (gradient_descent_loss(m, task) for m in (-1.0, 0.0, 1.0))
    return low - 2 * middle + high


def sharpness(s: float | np.ndarray, task: RegressionTask) -> float | np.ndarray:
    """h(s), the trace of the Hessian in (u, w) at the minimum (s sqrt m*, sqrt m* / s)."""
    return curvature(task) * optimal_step_size(task) * (s**2 + s**-2.0)


def drift_ratio(workers: int, local: ArrayLike, step: ArrayLike) -> np.ndarray:
    """How much faster K workers with H local steps drift, `step` being eta h; see the module."""
    local, rho = np.asarray(local), (1 - np.asarray(step, float)) ** 2
    return np.asarray(1 + (workers - 1) * (1 - (1 - rho**local) / (local * (1 - rho))))


def slow_drift_ratio(workers: int, product: ArrayLike) -> np.ndarray:
    """The same for small steps, 1 + (K - 1) psi(2 eta h H), `product` being eta h H."""
    x = 2 * np.asarray(product, float)
    return np.asarray(1 + (workers - 1) * (1 + np.expm1(-x) / x))


@partial(jax.jit, static_argnames=("local", "rounds", "workers"))
@partial(jax.vmap, in_axes=(0, *[None] * 6))
def descend(
    key: Array,
    start: Array,
    constants: Array,
    step: ArrayLike,
    local: int,
    rounds: int,
    workers: int,
) -> Array:
    """(u, w) after every round of `local` steps of each worker, `[seed, round, 2]`.

    Args:
        key: one a seed, `[seed]`.
        start: u and w, `[2]`.
        constants: a, m* and sigma, `[3]`.
        step: eta.
    """
    a, best, sigma = constants

    def one(weights: Array, noise: Array) -> tuple[Array, None]:
        slope = a * (weights[0] * weights[1] - best) + sigma * noise
        return weights - step * slope * weights[::-1], None

    def turn(weights: Array, key: Array) -> tuple[Array, Array]:
        noise = jax.random.normal(key, (local, workers), start.dtype)
        apart = jnp.broadcast_to(weights[:, None], (2, workers))
        after = jax.lax.scan(one, apart, noise)[0].mean(1)
        return after, after

    return jax.lax.scan(turn, start, jax.random.split(key, rounds))[1]


def drift(
    keys: Array, task: RegressionTask, product: float, local: int, steps: int, workers: int = 8,
    s: float = 1.5, noise: float = 0.05,
) -> np.ndarray:  # fmt: skip
    """Decay of log(u^2 - w^2) a step, `[seed]`, after a fifth of the steps, from s.

    Args:
        keys: one a seed.
        task: isotropic.
        product: eta h at s.
        local, workers: H and K.
        noise: sigma over a m*, of the gradient of one worker.
    """
    a, best = curvature(task), optimal_step_size(task)
    start = jnp.sqrt(best) * jnp.asarray([s, 1 / s])
    constants, eta = jnp.asarray([a, best, noise * a * best]), product / float(sharpness(s, task))
    rounds = max(5, steps // local)
    u, w = jnp.moveaxis(descend(keys, start, constants, eta, local, rounds, workers), -1, 0)
    first = rounds // 5
    gap = np.log(np.asarray(u**2 - w**2))
    return (gap[:, first] - gap[:, -1]) / (local * (rounds - 1 - first))


def measure(quick: bool = False, seed: int = 0) -> Iterator[Measurement]:
    """Drift ratios of 8 workers at four H, five seeds each of several runs, beside the SDE's."""
    with jax.enable_x64(True):
        rows = list(_measure(12_000 if quick else 60_000, seed))
    yield from rows


def _measure(steps: int, seed: int, runs: int = 8, product: float = 0.005) -> Iterator[Measurement]:
    task = RegressionTask(10, 10)
    keys = jax.random.split(jax.random.key(seed), 5 * runs)
    alone = drift(keys, task, product, 1, steps).mean()
    for local in (20, 100, 400, 2000):
        found = drift(keys, task, product, local, max(steps, 20 * local)).reshape(5, runs).mean(1)
        ratio = found / alone
        exact = float(drift_ratio(8, local, product))
        yield Measurement(
            f"drift ratio, H = {local}",
            "Local steps make the drift to flat minima faster, by 1 + (K - 1) psi(2 eta h H).",
            f"{_PAPER}, slow SDE", float(slow_drift_ratio(8, product * local)),
            float(ratio.mean()), float(ratio.std(ddof=1) / np.sqrt(5)), tolerance=0.02,
            note=f"Eight workers. Published is the formula, which is for steps of size 0; with "
            f"eta h = {product} it is {exact:.3f}.",
        )  # fmt: skip
