r"""The global optimum of a small ReLU layer, by enumeration, and how often descent finds it.

A unit relu(a . x) on N points x_n of the plane (an input and a bias) is linear in a where it has
one activation pattern. Patterns are the vertices of the zonotope sum_n [0, 1] x_n (Matena and
Raffel 2022, arXiv 2210.00176); for N points in general position there are 2 N, each a cone of a
between two neighbouring rays that are orthogonal to points. In a cone a unit is a combination, with
weights of at least 0, of the units at its two rays. So the least loss of m units

    f(x) = sum_j s_j relu(a_j . x),    s_j = 1 or -1,

given their cones and signs, is a non-negative least-squares problem of 2 m columns, and the global
optimum the least of these over all choices of m signed cones out of 4 N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike
from scipy.optimize import nnls

from constructions.measurement import Measurement, Remark

_PAPER = "Matena and Raffel 2022, arXiv 2210.00176"


def rays(points: ArrayLike) -> np.ndarray:
    """The rays between cones of one pattern, by angle, `[2 N, 2]`, of points `[N, 2]`.

    Raises:
        ValueError: points are no such array of two or more, or two are on one line through 0.
    """
    points = np.asarray(points, float)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2 or not np.isfinite(points).all():
        raise ValueError(f"points has shape {points.shape}, must be finite numbers [N > 1, 2]")
    angle = np.sort(
        np.concatenate([np.arctan2(*points.T)] * 2) + np.repeat([0, np.pi], len(points))
    )
    angle = np.sort(np.mod(-angle, 2 * np.pi))
    if np.diff(angle).min() < 1e-9:
        raise ValueError("points: two are on one line through 0, must be in general position")
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def columns(points: np.ndarray) -> np.ndarray:
    """What units at the rays of every signed cone say, `[4 N, 2, N]`."""
    unit = np.maximum(rays(points) @ points.T, 0)
    both = np.stack([unit, np.roll(unit, -1, axis=0)], axis=1)
    return np.concatenate([both, -both])


def least_loss(chosen: Sequence[int], features: np.ndarray, target: np.ndarray) -> float:
    """Mean of squares / 2 of the best units in these signed cones; see `columns`."""
    matrix = features[list(chosen)].reshape(-1, len(target)).T
    return float(nnls(matrix, target)[1] ** 2 / (2 * len(target)))


def optimum(points: np.ndarray, target: np.ndarray, units: int) -> tuple[float, tuple[int, ...]]:
    """The global optimum of so many units, and its signed cones, by enumeration."""
    features = columns(points)
    every = combinations_with_replacement(range(len(features)), units)
    return min((least_loss(chosen, features, target), chosen) for chosen in every)


def greedy(points: np.ndarray, target: np.ndarray, start: tuple[int, ...]) -> float:
    """Loss after moving units to neighbouring cones, or changing signs, while that lowers it."""
    features, n = columns(points), 2 * len(points)
    here, loss = list(start), least_loss(start, features, target)
    while True:
        near = [
            (*here[:j], moved, *here[j + 1 :])
            for j, c in enumerate(here)
            for moved in ((c + 1) % n + c // n * n, (c - 1) % n + c // n * n, (c + n) % (2 * n))
        ]
        best, chosen = min((least_loss(c, features, target), c) for c in near)
        if best >= loss * (1 - 1e-9):
            return loss
        here, loss = list(chosen), best


@partial(jax.jit, static_argnames=("units", "steps"))
@partial(jax.vmap, in_axes=(0, None, None, None, None))
def descend(key: Array, points: Array, target: Array, units: int, steps: int) -> Array:
    """Loss of v . relu(A x) after gradient descent with momentum from N(0, 1) weights, `[key]`."""

    def loss(w: tuple[Array, Array]) -> Array:
        return 0.5 * jnp.mean((jax.nn.relu(points @ w[0]) @ w[1] - target) ** 2)

    first, second = jax.random.split(key)
    start = (
        jax.random.normal(first, (2, units), points.dtype),
        jax.random.normal(second, (units,), points.dtype) / units**0.5,
    )

    def step(state: tuple, t: Array) -> tuple[tuple, None]:
        w, speed = state
        rate = 0.1 * (1 - t / steps)
        speed = jax.tree.map(lambda s, g: 0.9 * s - rate * g, speed, jax.grad(loss)(w))
        return (jax.tree.map(jnp.add, w, speed), speed), None

    (w, _), _ = jax.lax.scan(step, (start, jax.tree.map(jnp.zeros_like, start)), jnp.arange(steps))
    return loss(w)


def points_and_targets(seed: int, count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Points (t, 1), t uniform on [-1, 1), `[N, 2]`, and standard normal targets, `[N]`."""
    rng = np.random.default_rng(seed)
    place = np.sort(rng.uniform(-1, 1, count))
    return np.stack([place, np.ones(count)], axis=1), rng.normal(size=count)


def measure(quick: bool = False, seed: int = 0) -> Iterator[Measurement | Remark]:
    """What descent, search among cones and chance reach, on five sets of eight points."""
    with jax.enable_x64(True):
        rows = list(_measure(100 if quick else 2000, seed))
    yield from rows


def _measure(tries: int, seed: int) -> Iterator[Measurement | Remark]:
    sets, lowest = [points_and_targets(seed + i) for i in range(5)], []
    rng = np.random.default_rng(seed)

    def row(
        name: str, statement: str, values: list[float], note: str, **bounds: Any
    ) -> Measurement | Remark:
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        number = float(np.mean(values))
        if not bounds:
            return Remark(name, statement, _PAPER, number, error, note)
        return Measurement(name, statement, _PAPER, None, number, error, note=note, **bounds)

    def chance(units: int, best: list[float]) -> list[float]:
        return [
            float(np.median([least_loss(c, columns(x), y) for c in _drawn(rng, x, units, 100)])) / b
            for (x, y), b in zip(sets, best, strict=True)
        ]

    for units in (1, 2, 3):
        best = [optimum(*each, units)[0] for each in sets]
        keys = jax.random.split(jax.random.key(seed + units), tries)
        found = [np.asarray(descend(keys, *map(jnp.asarray, s), units, 3000)) for s in sets]
        lowest += [loss.min() / b - 1 for loss, b in zip(found, best, strict=True)]
        shares = {
            "descent": [float((f < 1.01 * b).mean()) for f, b in zip(found, best, strict=True)]
        }
        shares["search among cones"] = [
            float(np.mean([greedy(x, y, c) < 1.01 * b for c in _drawn(rng, x, units, 20)]))
            for (x, y), b in zip(sets, best, strict=True)
        ]
        within = f"Within 1 % of the global optimum, of {tries} and 20 starts a set."
        for how, share in shares.items():
            yield row(
                f"share at the optimum, {how}, units = {units}",
                "Share of the starts that end at the optimum, mean over the sets.", share, within,
            )  # fmt: skip
        gains = np.subtract(shares["search among cones"], shares["descent"])
        yield row(
            f"gain of the search over descent, units = {units}",
            "Moving units from cone to cone beats gradient descent where there are few units.",
            gains.tolist(), f"Difference of the two shares, set by set. {within}", at_least=0.0,
        )  # fmt: skip
        if units == 2:
            yield row(
                "loss of random cones over the optimum, units = 2",
                "Of few units the choice of the vertices decides.",
                chance(2, best), "The median of 100 draws.", at_least=1.1,
            )  # fmt: skip
    yield row(
        "loss of random cones over that of 0, units = 32",
        "With many units randomly chosen vertices are as good as any.",
        chance(32, [float(np.mean(y**2) / 2) for _, y in sets]), "Eight points, as many as 4 N.",
        at_most=0.01,
    )  # fmt: skip
    yield row(
        "descent below the optimum",
        "No descent has less loss than the enumeration: the least one over it, less 1.",
        [min(lowest)], f"The smallest of {15 * tries} tries.", at_least=-1e-9,
    )  # fmt: skip


def _drawn(rng: np.random.Generator, x: np.ndarray, units: int, many: int) -> list[tuple]:
    return [tuple(each) for each in rng.integers(0, 4 * len(x), (many, units)).tolist()]
