"""The best DIAG layers for a task: few numbers, fitted to the last digit on thousands of contexts.

A fit minimises the expected loss `1/2 |w^L - w|^2` over a sample of contexts by
Levenberg-Marquardt (`synthetic.fitting.second_order`) from many starts, one depth after the other:
the best model of one layer fewer, with a layer that does next to nothing put in at each place, is
where a deeper one starts.

The prediction of a deep linear transformer is a polynomial of high degree in the eigenvalues of a
context. A plain sample of thousands misses contexts so rare that they hardly count until a fit
lets them explode; the samples here take rare largest eigenvalues often and weigh them down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from constructions.noisy_regression.recursion import diag_weight
from synthetic.fitting.second_order import Fitted, least_squares
from synthetic.tasks.noisy import Contexts, Moments, NoisyRegressionTask, draw_contexts
from synthetic.theory.ridge import expected_adjusted_loss, expected_loss
from synthetic.theory.spectral import Estimate

# Numbers that a layer has: DIAG; DIAG of one head, w_xx w_yy = w_xy w_yx; GD++, w_xy = w_yy = 0.
KINDS = {"diag": 4, "one-head": 3, "descent": 2}

_BLOCK = 1024
# How far a start is moved from an idle layer, in the units of `_units`.
_MOVES = (0.05, 0.1, 0.3)


class Sample(NamedTuple):
    """Contexts to fit on; `share` is what each stands for, `[context]`, with sum 1."""

    contexts: Contexts
    share: Array


@dataclass(frozen=True, eq=False)
class Layers:
    """Fitted layers.

    Attributes:
        layers: `(w_xx, w_xy, w_yx, w_yy)` of each.
        parameters: what was fitted, `[layers, KINDS[kind]]`.
        loss: mean over the pool that the samples were taken from; to choose among fits by, not to
            be reported.
        fit: how the last search ended.
    """

    layers: tuple[tuple[float, float, float, float], ...]
    parameters: np.ndarray
    loss: float
    fit: Fitted


def expand(kind: str, parameters: ArrayLike) -> Array:
    """Parameters of layers as `(w_xx, w_xy, w_yx, w_yy)`.

    "diag": these themselves. "one-head": `(p_x, q_x, q_y)` with `p_y = 1`, the scale that a head
    may share out between P and Q as it likes. "descent": `(w_xx, w_yx)`.

    Args:
        kind: of `KINDS`.
        parameters: `[layers * KINDS[kind]]` or `[layers, KINDS[kind]]`.

    Returns:
        `[layers, 4]`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    table = jnp.reshape(jnp.asarray(parameters), (-1, KINDS[kind]))
    if kind == "diag":
        return table
    zero = jnp.zeros_like(table[:, 0])
    if kind == "one-head":
        p_x, q_x, q_y = table.T
        return jnp.stack([p_x * q_x, p_x * q_y, q_x, q_y], 1)
    return jnp.stack([table[:, 0], zero, table[:, 1], zero], 1)


@dataclass(frozen=True)
class WeightError:
    """Residuals `sqrt(share) (w^L - w)`: half their sum of squares is the expected loss."""

    kind: str

    def __call__(self, parameters: Array, block: tuple[Moments, Array]) -> Array:
        """Residuals of one block of contexts, `[dim_x, context]`."""
        moments, root = block
        return root * (diag_weight(expand(self.kind, parameters), moments) - moments.weight)


def pool_sample(
    contexts: Contexts, count: int, seed: int = 0, scores: Sequence[ArrayLike] = ()
) -> Sample:
    """A part of a pool of contexts in which those of a high score are frequent.

    Systematic sampling along the contexts ordered by their largest eigenvalue. Half of the sample
    is uniform, the other half uniform in the logarithm of the rank in each score; `share` makes up
    for it.

    Args:
        contexts: the pool.
        count: size of the sample.
        seed: of the sample.
        scores: each `[context]`; the largest eigenvalue is one already.

    Raises:
        ValueError: the pool has fewer than `count` contexts.
    """
    pool = contexts.values.shape[1]
    if not 1 <= count <= pool:
        raise ValueError(f"count must be 1 to the pool's {pool}, got {count}")
    order = np.argsort(-np.asarray(contexts.values[-1]), kind="stable")
    density = np.full(pool, 0.5 / pool)
    tail = 1 / np.arange(1, pool + 1)
    tail *= 0.5 / tail.sum() / (1 + len(scores))
    density[order] += tail
    for score in scores:
        density[np.argsort(-np.asarray(score), kind="stable")] += tail
    density = density[order]
    scale = float(count)
    for _ in range(100):  # until the chances, none above 1, sum to the count
        chance = np.minimum(1, scale * density)
        scale *= count / chance.sum()
    edges = np.cumsum(chance) * count / chance.sum()
    random = np.random.default_rng(seed)
    start = random.uniform()
    chosen = np.minimum(np.searchsorted(edges, np.arange(count) + start), pool - 1)
    share = 1 / chance[chosen]
    # shuffled, so that every block has its part of the rare ones
    shuffle = random.permutation(count)
    picked = order[chosen][shuffle]
    return Sample(
        Contexts(*(part[..., picked] for part in contexts)),
        jnp.asarray((share / share.sum())[shuffle]),
    )


def fit(
    task: NoisyRegressionTask,
    layers: int,
    *,
    kind: str = "diag",
    shallower: Layers | None = None,
    starts: Sequence[ArrayLike] = (),
    nested: bool = True,
    pool: Contexts | None = None,
    seed: int = 0,
    sizes: tuple[int, ...] = (1024, 8192, 8192),
) -> Layers:
    """The best layers that are found for a task.

    Args:
        task: its `mean_square_noise` sets the scale of the starts.
        layers: how many, at least 1.
        kind: of `KINDS`.
        shallower: the fit with one layer fewer; made first where it is not given.
        starts: further parameters to start from, `[layers, KINDS[kind]]` each.
        nested: whether to start from `shallower` too, with a layer put in at each place.
        pool: contexts that the samples are taken from; default 65536 of `seed`.
        seed: of the samples and of the starts.
        sizes: of the samples, one after the other. Starts are compared on the first; each later
            one is weighted towards contexts on which the last fit did badly.

    Raises:
        ValueError: `layers` below 1, an unknown kind, no start, or starts of another shape.
    """
    if not (nested or starts):
        raise ValueError("nested is False and starts is empty: give one of them")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    with jax.enable_x64(True):
        if pool is None:
            pool = draw_contexts(jax.random.key(seed), task.dim_x, task.num_examples, 65536)
        if nested and layers > 1 and shallower is None:
            shallower = fit(task, layers - 1, kind=kind, pool=pool, seed=seed, sizes=sizes)
        points = [_checked(start, layers, kind) for start in starts]
        if nested:
            points += _nested(task, layers, kind, shallower, seed)
        moments = task.moments(pool)
        scores: list[np.ndarray] = []
        for number, size in enumerate(sizes):
            sample = pool_sample(pool, size, seed + number, scores)
            fitted = least_squares(
                WeightError(kind),
                points,
                _data(task, sample),
                steps=60,
                screening=12,
                keep=3,
                tolerance=1e-5 if number else 1e-4,
            )
            points = [fitted.parameters]
            weight = weights_of(expand(kind, fitted.parameters), moments)
            scores = [np.asarray(expected_loss(weight, moments))]
    parameters = fitted.parameters.reshape(layers, -1).copy()
    # What the last layer does to x, nothing reads.
    parameters[-1, : 2 if kind == "diag" else 1] = 0
    with jax.enable_x64(True):
        table = np.asarray(expand(kind, parameters))
    return Layers(
        layers=tuple(tuple(map(float, row)) for row in table),  # type: ignore[misc]
        parameters=parameters,
        loss=float(scores[0].mean()),
        fit=fitted,
    )


def _units(task: NoisyRegressionTask, kind: str) -> np.ndarray:
    """The size that a layer's numbers have, up to a factor of a few."""
    x = 1 / task.num_examples
    y = x / (task.dim_x + task.mean_square_noise)
    return np.array({"diag": [x, x, x, y], "one-head": [1, x, y], "descent": [x, x]}[kind])


def _checked(start: ArrayLike, layers: int, kind: str) -> np.ndarray:
    point = np.asarray(start, np.float64)
    if point.shape != (layers, KINDS[kind]):
        raise ValueError(f"starts must have shape {(layers, KINDS[kind])}, got {point.shape}")
    return point.ravel()


def _nested(
    task: NoisyRegressionTask, layers: int, kind: str, shallower: Layers | None, seed: int
) -> list[np.ndarray]:
    """The shallower fit with an idle layer at each place, moved a little, and not so little."""
    units, random = _units(task, kind), np.random.default_rng(seed)
    below = np.zeros((0, len(units))) if shallower is None else shallower.parameters
    if below.shape != (layers - 1, len(units)):
        raise ValueError(
            f"shallower must have parameters {(layers - 1, len(units))}, got {below.shape}"
        )
    points = []
    for place in range(layers):
        point = np.insert(below, place, 0.0, axis=0)
        for size in _MOVES:
            points.append((point + size * units * random.normal(size=point.shape)).ravel())
    return points


def _data(task: NoisyRegressionTask, sample: Sample) -> tuple[Moments, Array]:
    """Blocks of contexts; a sample that does not fill them is padded with contexts of no share."""
    moments = task.moments(sample.contexts)
    return blocked((moments, jnp.sqrt(sample.share)), even=True)


def held_out_loss(
    task: NoisyRegressionTask, layers: Sequence[Sequence[float]] | ArrayLike, contexts: Contexts
) -> Estimate:
    """Adjusted loss of layers on contexts, expected over the query; paired standard error.

    Args:
        task: whose noise the contexts get.
        layers: `[layer, 4]`.
        contexts: which took no part in the fit.
    """
    with jax.enable_x64(True):
        moments = task.moments(contexts)
        weight = weights_of(jnp.asarray(layers), moments)
        return expected_adjusted_loss(weight, moments)


@partial(jax.jit)
def weights_of(layers: Array, moments: Moments) -> Array:
    """`diag_weight` in blocks, `[dim_x, context]`."""
    weight = jax.lax.map(partial(diag_weight, layers), blocked(moments))
    return jnp.moveaxis(weight, 0, 1).reshape(weight.shape[1], -1)[:, : len(moments.power)]


def blocked(tree: Any, even: bool = False) -> Any:
    """Arrays `[..., context]` as `[block, ..., context]`, filled up with zeros.

    Blocks are of `_BLOCK` contexts, or as equal as their number allows.
    """
    count = jax.tree.leaves(tree)[0].shape[-1]
    blocks = -(-count // _BLOCK)
    size = -(-count // blocks) if even else _BLOCK

    def cut(part: Array) -> Array:
        width = [(0, 0)] * (part.ndim - 1) + [(0, blocks * size - count)]
        return jnp.moveaxis(jnp.pad(part, width).reshape(*part.shape[:-1], blocks, size), -2, 0)

    return jax.tree.map(cut, tree)
