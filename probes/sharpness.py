r"""How sharp is a loss where training stands, and where does its step size let it stand?

Sharpness is the largest eigenvalue of the Hessian. Gradient descent of step size eta leaves a
minimum that is sharper than 2 / eta; on the way it settles at that edge of stability. What else is
known of edges, each as a function here:

    gradient descent               lambda_max(H) = 2 / eta
    Adam, moments (b1, b2)         lambda_max(P^-1/2 H P^-1/2) = 2 (1 + b1) / ((1 - b1) eta),
                                   P = diag(sqrt(v) + eps)
    scale-invariant, weight decay  lambda_max(H at theta / |theta|) = 2 |theta|^2 / eta
                                   (Lyu et al. 2022, arXiv 2206.07085)

Normalised gradient descent and descent on sqrt(L) stay at an edge wherever they are, and then move
along the minimisers towards less sharp ones (Arora et al. 2022, arXiv 2205.09745): `normalised` and
`root` of `probes.descent`. Losses are functions `loss(theta, data)`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from constructions.runs import Run
from probes.descent import (
    MOST,
    Loss,
    Path,
    Theta,
    WeightFunctions,
    descend,
    no_forward_derivative,
    weight_functions,
)
from probes.probe import NotApplicable, Probe, Result, seed_names, table, too_many_weights
from synthetic.compilation import compile_once


class NoCurvature(ValueError):
    """A Hessian has no largest eigenvalue that can be found."""


@compile_once(static_argnums=0, often=True)
def hessian_vector(loss: Loss, theta: Theta, data: Any, vector: Theta) -> Theta:
    """H v, at about the cost of two gradients."""

    def gradient(theta: Array) -> Array:
        return jax.grad(loss)(theta, data)

    return jax.jvp(gradient, (theta,), (vector,))[1]


def sharpness(
    loss: Loss,
    theta: Theta,
    data: Any,
    scale: Float[Array, " weight"] | None = None,
) -> float:
    """The largest eigenvalue of the Hessian (the most positive one), by Lanczos.

    Exact to about 1e-9 of it in float64, 1e-4 in float32.

    Args:
        loss: twice differentiable.
        theta: where.
        data: any pytree.
        scale: P, all above 0: of the preconditioned Hessian P^-1/2 H P^-1/2 (see `adam_scale`).

    Raises:
        NoCurvature: the Hessian is not finite there, or Lanczos does not come to an end.
    """
    weigh = np.ones(theta.size) if scale is None else np.asarray(scale, np.float64) ** -0.5

    def weighed(vector: np.ndarray) -> np.ndarray:
        given = jnp.asarray(weigh * vector.ravel(), theta.dtype)
        found = weigh * np.asarray(hessian_vector(loss, theta, data, given), np.float64)
        if not np.isfinite(found).all():
            raise NoCurvature("the Hessian is not finite at these weights")
        return found

    start = np.random.default_rng(0).standard_normal(theta.size)
    first = weighed(start)
    if theta.size == 1:
        return float(first[0] / start[0])
    if not first.any():
        return 0.0
    operator = LinearOperator((theta.size, theta.size), matvec=weighed, dtype=np.float64)  # type: ignore[call-arg]
    tolerance: Any = 1e-10 if theta.dtype == np.float64 else 1e-4
    try:
        found = eigsh(
            operator, 1, which="LA", v0=start, tol=tolerance, return_eigenvectors=False
        )  # fmt: skip
    except ArpackNoConvergence as error:
        raise NoCurvature("Lanczos did not find the largest eigenvalue of the Hessian") from error
    return float(found[0])


def edge(rate: float, b1: float = 0.0) -> float:
    """The sharpness at which steps of this size stop being stable.

    2 / rate for gradient descent; with momentum m <- b1 m + (1 - b1) g, as Adam has it,
    2 (1 + b1) / ((1 - b1) rate): 38 / rate at 0.9. Compare Adam's with preconditioned sharpness.
    """
    return 2 * (1 + b1) / ((1 - b1) * rate)


def adam_scale(state: Any, b2: float = 0.999, eps: float = 1e-8) -> Float[Array, " weight"]:
    """P = sqrt(v / (1 - b2^t)) + eps from the state of `optax.adam`, by which it divides."""
    count, second = (optax.tree.get(state, name) for name in ("count", "nu"))
    return jnp.sqrt(second / (1 - b2**count)) + eps


def along(loss: Loss, path: Path, data: Any) -> Float[np.ndarray, " record"]:
    """Sharpness at every record of a descent; NaN from where it is no longer finite."""
    found = np.full(len(path.steps), np.nan)
    for n, theta in enumerate(path.thetas):
        if not bool(jnp.isfinite(theta).all()):
            break
        found[n] = sharpness(loss, theta, data)
    return found


def spherical_sharpness(loss: Loss, theta: Theta, data: Any) -> float:
    """Sharpness of a scale-invariant loss at theta / |theta|; |theta|^2 times that at theta.

    Weight decay shrinks theta until |theta|^2 is eta / 2 times this.

    Raises:
        ValueError: the loss at theta and 2 theta differ.
    """
    here, there = loss(theta, data), loss(2 * theta, data)
    if not abs(here - there) <= 1e-4 * abs(here):
        raise ValueError(f"loss is {here:.4g} at theta and {there:.4g} at 2 theta, must be equal")
    return sharpness(loss, theta / jnp.linalg.norm(theta), data)


class Curved(NamedTuple):
    """A model with a full batch, and the largest curvature of its loss there."""

    subject: WeightFunctions
    theta: Array
    batch: Any
    sharpness: float


def curved(run: Run, seed: int) -> tuple[dict[str, Curved], str]:
    """The subjects whose loss has second derivatives; what is left out.

    Raises:
        NotApplicable: none has.
    """
    subjects, note = weight_functions(run)
    found, missing = {}, []
    for name, (subject, theta) in subjects.items():
        batch = subject.task.sample(jax.random.key(seed), subject.examples)
        value = np.nan
        if not no_forward_derivative(jax.grad(subject.whole), theta, batch):
            with suppress(NoCurvature):
                value = max(sharpness(subject.whole, theta, batch), 1e-6)
        if np.isnan(value):
            missing.append(name)
        else:
            found[name] = Curved(subject, theta, batch, value)
    if not found:
        raise NotApplicable("the loss has no finite second derivatives, which this probe needs")
    if missing:
        lack = f"no finite second derivatives, left out: {', '.join(missing)}"
        note = "; ".join(filter(None, [note, lack]))
    return found, note


def measure(run: Run, seed: int) -> Result:
    """The largest curvature, and what becomes of it in steps that it does not bear."""
    subjects, note = curved(run, seed)
    recipe, rows = run.recipe, []
    steps = min(given.subject.steps(200, 20) for given in subjects.values())
    trained = subjects.get(seed_names(run)[0], next(iter(subjects.values())))
    rate = 1.25 * edge(1.0) / trained.sharpness

    def moments(subject: WeightFunctions, theta: Array, batch: Any) -> float:
        if recipe is None or recipe.optimizer not in ("adam", "adamw"):
            return np.nan
        keys = jax.random.split(jax.random.key(seed + 1), 16)
        size = min(recipe.batch, 256)
        mean, variance = second_moment(subject, theta, keys, size)
        scale = jnp.sqrt(mean**2 + variance * size / recipe.batch) + recipe.eps
        found = sharpness(subject.whole, theta, batch, scale)
        return found / edge(recipe.learning_rate, recipe.b1)

    for subject, theta, batch, here in subjects.values():
        path = descend(subject.whole, theta, batch, rate, steps)
        there = np.nan
        if bool(jnp.isfinite(path.thetas[-1]).all()):
            with suppress(NoCurvature):  # as far away as that
                there = sharpness(subject.whole, path.thetas[-1], batch) / edge(rate)
        ends = path.losses[0], path.losses[-1]
        adam = moments(subject, theta, batch)
        rows.append([here, edge(1.0) / here, adam, here / edge(rate), there, *ends])
    columns = ("sharpness", "largest stable step", "Adam's sharpness over its edge",
               f"sharpness over the edge of step {rate:.3g}", f"after {steps} such steps",
               "loss before", "after")  # fmt: skip
    return table("sharpness, and steps a quarter too large", columns, subjects, rows, note)


def second_moment(
    subject: WeightFunctions, theta: Array, keys: Array, size: int
) -> tuple[Array, Array]:
    """Mean and variance of every weight's gradient over batches of that size."""

    gradients = _gradients(subject, size, theta, keys)
    return gradients.mean(0), gradients.var(0)


@partial(jax.jit, static_argnums=(0, 1))
def _gradients(subject: WeightFunctions, size: int, theta: Array, keys: Array) -> Array:
    def one(key: Array) -> Array:
        return jax.grad(subject.whole)(theta, subject.task.sample(key, size))

    return jax.lax.map(one, keys)


SHARPNESS = Probe(
    "sharpness",
    "how large a step do these weights bear, and what happens past it?",
    "it is of one batch; weights without gradient make Adam's number explode",
    measure,
    needs=lambda run: too_many_weights(run, "'sharpness'", MOST),
    invariant=False,
    seeds=2,
)
