"""The best step sizes and curvatures of gradient descent and GD++, by a search in closed form.

`synthetic.theory.spectral` gives the loss of a schedule on sampled contexts. Deep descent leaves
next to nothing except on contexts that are rare, so that the tails of the eigenvalues of Gaussian
contexts are integrated over their density (`eigenvalue_density`).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import gammaln
from scipy.stats import chi2

from synthetic.guards import number
from synthetic.tasks.regression import RegressionTask, Uniform
from synthetic.theory.spectral import (
    Estimate,
    context_eigenvalues,
    descent_filter,
    estimate,
    losses_by_eigenvalue,
    variances_of,
)

# Of the eigenvalues of Gaussian contexts, this part at either end counts as rare.
_TAIL = 5e-4
_TAIL_NODES = 512
_TAIL_DRAWS = 2_000


class Descent(NamedTuple):
    """The best steps of gradient descent or GD++, and their loss on fresh contexts.

    Attributes:
        step_sizes: `eta` (a step moves by `eta / N`), `[steps]` float64.
        curvatures: `gamma`, `[steps]` float64; 0 for gradient descent. Without sharing the last
            has no effect and is 0.
        loss: on contexts that took no part in the search.
        standard_error: of that loss. Losses far below 1e-4 are made by rare contexts, and theirs
            is then itself uncertain.
        poorer: losses, on the same contexts, of the next local optima that the search ends in,
            those that are more than 1 % above the best.
    """

    step_sizes: np.ndarray
    curvatures: np.ndarray
    loss: float
    standard_error: float
    poorer: tuple[float, ...] = ()


def optimal_descent(
    task: RegressionTask,
    steps: int,
    *,
    shared: bool,
    curvature: bool,
    contexts: int = 40_000,
    seed: int = 0,
    starts: int = 6,
    rarest: float = 1e-7,
) -> Descent:
    """The best step sizes, and curvatures, of descent from zero weights.

    The expected loss over sampled contexts is minimised by BFGS on its logarithm, in float64, from
    the optimum of one step fewer (with an idle step put in at each place), from a schedule after
    Theorem 5.1 of Vladymyrov et al. (2024) and from random multiples of both. There are poorer
    local minima: two layers of GD++ on Gaussian inputs have one at 1.3 times the least loss.

    Args:
        task: of one noise level; for a random one give its root mean square.
        steps: of descent, at least 1.
        shared: whether all steps have the same step size and curvature (recurrent).
        curvature: whether the inputs are transformed too (GD++), or not (gradient descent).
        contexts: sampled to search on, and as many again to evaluate on, at least 2.
        seed: of the contexts and the random starts.
        starts: random starts at each number of steps, at least 0.
        rarest: eigenvalues further out than this many a context has are left out. It matters to
            deep descent alone, whose loss grows faster beyond its range than contexts get rare:
            the mean over all contexts would be that of a few that never occur. For Gaussian
            inputs the tails up to there are integrated (`eigenvalue_density`), in the search
            and in the loss; for others the upper tail is extrapolated in the search. From `1 /
            contexts` on, there is no such tail for the latter.

    Raises:
        ValueError: an argument out of range, or the task is not isotropic.
    """
    for name, value, low in (("steps", steps, 1), ("contexts", contexts, 2), ("starts", starts, 0)):
        number(name, value, whole=True, least=low)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed))
        searched, held_out = (_sample(task, key, contexts, rarest) for key in keys)
        search = _Search(task, searched, shared, curvature, rarest)
        optima = search.run(steps, starts, np.random.default_rng(seed))
        schedules = [(rates * task.num_examples, curvatures) for rates, curvatures in optima]
        loss, *others = (_evaluate(task, held_out, *schedule) for schedule in schedules)
    poorer = tuple(other.mean for other in others if other.mean > 1.01 * loss.mean)
    return Descent(*schedules[0], *loss, poorer)


def eigenvalue_density(
    key: Array, values: ArrayLike, dim: int, examples: int, draws: int
) -> Float[Array, "draw value"]:
    r"""Unbiased estimates of the density of the eigenvalues of `X^T X`, standard normal `X`.

    The eigenvalues that are not 0, `p = min(dim, examples)` of them, have the joint density
    `prod_i l_i^a exp(-l_i / 2) prod_{i<j} |l_i - l_j| / (p! Z_p)` in any order, with
    `a = (|examples - dim| - 1) / 2`. Fixing one of them leaves the same form in the others, hence

    $$\rho(l) = \frac{Z_{p-1}}{Z_p}\, l^a e^{-l/2}\; \mathbb{E}\, |\det(l I - W')|, \qquad
      \int \rho = p,$$

    with `W'` the Gram matrix of a standard normal matrix that has one row and one column less.
    The expectation is over matrices that are not rare, whatever `l` is, so that the relative
    error stays of one order far out in both tails, where no sampled context ever lies.

    Args:
        key: of `jax.random`.
        values: `l`, positive, `[value]`.
        dim: columns of `X`, at least 1.
        examples: rows of `X`, at least 1.
        draws: of `W'`, at least 1.

    Returns:
        One estimate of the density at each value for each draw; the same draw serves all values.

    Raises:
        ValueError: a size is below 1.
    """
    for name, size in (("dim", dim), ("examples", examples), ("draws", draws)):
        number(name, size, whole=True, least=1)
    return _density(key, jnp.asarray(values), min(dim, examples), max(dim, examples), draws)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _density(key: Array, values: Array, p: int, m: int, draws: int) -> Array:
    power = (m - p - 1) / 2
    # Z_p / (Z_{p-1}) / p by Selberg's integral with weight l^a exp(-l / 2)
    log_constant = (
        np.log(p)
        + gammaln(1.5)
        - (power + p) * math.log(2)
        - gammaln(power + 1 + (p - 1) / 2)
        - gammaln(1 + p / 2)
    )
    log_density = float(log_constant) + power * jnp.log(values) - values / 2
    if p == 1:
        return jnp.broadcast_to(jnp.exp(log_density), (draws, values.size))
    x = jax.random.normal(key, (draws, m - 1, p - 1), values.dtype)
    others = jnp.linalg.eigvalsh(jnp.einsum("cni,cnj->cij", x, x, precision="highest"))
    log_determinant = jnp.sum(jnp.log(jnp.abs(values[None, :, None] - others[:, None])), -1)
    return jnp.exp(log_density + log_determinant)


class _Sample(NamedTuple):
    """Sampled contexts, and the mass of the rare eigenvalues that few of them have."""

    eigenvalues: Array  # [context, dim_x]
    common: Array  # which of them the contexts stand for, the same shape
    rare: Array  # nodes for the others, [node]
    mass: Array  # how many eigenvalues a context has there, one estimate a draw, [draw, node]


def _sample(task: RegressionTask, key: Array, contexts: int, rarest: float) -> _Sample:
    """Sampled contexts; for Gaussian inputs the tails come from the density of eigenvalues.

    A deep filter leaves next to nothing except on contexts that a sample holds one of, or none,
    so that neither its best steps nor its loss could be told from sampled contexts.
    """
    contexts_key, tails_key = jax.random.split(key)
    eigenvalues = context_eigenvalues(task, contexts_key, contexts)
    variance, _ = variances_of(task)
    p = min(task.dim_x, task.num_examples)
    reached = np.asarray(eigenvalues)[:, task.dim_x - p :]
    if isinstance(task.inputs, Uniform):
        return _Sample(eigenvalues, eigenvalues >= 0, jnp.zeros(0), jnp.zeros((2, 0)))
    low, high = np.quantile(reached, [_TAIL, 1 - _TAIL])
    # The density is like l^a at 0: below the first node lies a part 1e-16 of the lower tail
    power = (abs(task.num_examples - task.dim_x) + 1) / 2
    edges = np.geomspace(low * 10 ** (-16 / power), low, _TAIL_NODES + 1)
    top = max(2 * high, variance * chi2.isf(1e-30, task.dim_x + task.num_examples))
    edges = np.stack([edges, np.linspace(high, top, _TAIL_NODES + 1)])
    nodes = ((edges[:, 1:] + edges[:, :-1]) / 2).ravel()
    mass = eigenvalue_density(
        tails_key, nodes / variance, task.dim_x, task.num_examples, _TAIL_DRAWS
    ) * (np.diff(edges).ravel() / variance)
    outer = mass.mean(0).reshape(2, -1)
    outer = jnp.stack([jnp.cumsum(outer[0]), jnp.cumsum(outer[1, ::-1])[::-1]]).ravel()
    common = ((eigenvalues >= low) & (eigenvalues <= high)) | (eigenvalues == 0)
    return _Sample(eigenvalues, common, jnp.asarray(nodes), jnp.where(outer < rarest, 0, mass))


def _evaluate(
    task: RegressionTask, sample: _Sample, step_sizes: np.ndarray, curvatures: np.ndarray
) -> Estimate:
    terms = losses_by_eigenvalue(task, sample.eigenvalues, step_sizes, curvatures)
    common = estimate(np.where(sample.common, terms, 0).sum(-1))
    rare = losses_by_eigenvalue(task, sample.rare, step_sizes, curvatures)
    rare = estimate((np.asarray(sample.mass) * np.asarray(rare)).sum(-1))
    return Estimate(
        common.mean + rare.mean, float(np.hypot(common.standard_error, rare.standard_error))
    )


@jax.jit
def _log_loss(parameters: Array, nodes: Array, signal: Array, noise: Array) -> tuple[Array, Array]:
    """`log sum(signal rho^2 + noise g^2)` of rates and curvatures `[2, steps]`, and gradient."""

    def value(parameters: Array) -> Array:
        last = descent_filter(nodes, *parameters)
        return jnp.log(jnp.sum(signal * last.residual[-1] ** 2 + noise * last.gain[-1] ** 2))

    return jax.value_and_grad(value)(parameters)


class _Search:
    """The loss over sampled contexts as a function of few numbers, and its minimisation."""

    def __init__(
        self,
        task: RegressionTask,
        sample: _Sample,
        shared: bool,
        curvature: bool,
        rarest: float,
    ):
        self.shared, self.curvature = shared, curvature
        inputs, weights = variances_of(task)
        common = np.asarray(sample.eigenvalues)[np.asarray(sample.common)]
        # a mean eigenvalue and a large one, each a scale for the steps
        self.typical = float(common.mean()), float(jnp.max(sample.eigenvalues))
        rare, rare_mass = np.asarray(sample.rare), np.asarray(sample.mass.mean(0))
        if rare.size == 0:
            rare, rare_mass = _upper_tail(np.asarray(sample.eigenvalues)[:, -1], rarest)

        def data(width: float) -> tuple[Array, ...]:
            nodes, mass = _binned(common, width)
            nodes = np.append(nodes, rare)
            mass = np.append(mass / len(sample.eigenvalues), rare_mass)
            scale = 0.5 * task.dim_y * inputs * mass
            return tuple(map(jnp.asarray, (nodes, scale * weights, scale * task.noise**2 * nodes)))

        self.coarse, self.fine = data(1e-2), data(1e-3)

    def run(self, steps: int, starts: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Rates and curvatures `[2, steps]` of the few least losses that any start leads to."""
        best = [np.zeros((2, 0))]
        for count in range(1, steps + 1):
            trials = self._starts(best, count)
            width = 1 if self.shared else count
            trials += [
                trials[i % len(trials)] * rng.lognormal(0, 0.5, (2, width)) for i in range(starts)
            ]
            best = _distinct([self._descend(trial, steps, self.coarse) for trial in trials])
        return _distinct([self._descend(point, steps, self.fine) for point in best])

    def _starts(self, fewer: list[np.ndarray], count: int) -> list[np.ndarray]:
        # Theorem 5.1: gamma = 1 / (3 lambda_max), which takes lambda_max to 4/9 of itself
        shrink = (9 / 4) ** np.arange(count)
        trials = [np.outer([1 / top, 1 / (3 * top)], shrink) for top in self.typical]
        if self.shared:
            trials = [np.tile(trial[:, :1], (1, count)) for trial in trials]
            return trials + [np.tile(steps[:, :1], (1, count)) for steps in fewer if count > 1]
        places = range(count if count > 1 else 0)
        return trials + [np.insert(steps, at, 0, axis=1) for steps in fewer for at in places]

    def _descend(
        self, start: np.ndarray, steps: int, data: tuple[Array, ...]
    ) -> tuple[float, np.ndarray]:
        """From one start `[2, count]` to a local minimum of the loss; its logarithm and place.

        The steps beyond `count` are idle, so that one compilation serves every count.
        """
        count = start.shape[1]
        # The last curvature acts on nothing.
        free = np.zeros((2, count), bool)
        free[0], free[1, : count - 1] = True, self.curvature
        unit = np.where(start != 0, start, np.abs(start).max(1, keepdims=True, initial=1e-3))
        point = np.where(free, start / unit, 0)
        rows = np.flatnonzero(free.any(1))

        def widen(q: np.ndarray) -> np.ndarray:
            full = np.zeros((2, count))
            if self.shared:
                full[rows] = q[:, None]
            else:
                full[free] = q
            return full * unit

        def objective(q: np.ndarray) -> tuple[float, np.ndarray]:
            padded = np.pad(widen(q), ((0, 0), (0, steps - count)))
            value, gradient = (np.asarray(a) for a in _log_loss(padded, *data))
            gradient = gradient[:, :count] * unit
            gradient = gradient[rows].sum(1) if self.shared else gradient[free]
            # a wild step of the line search overflows
            if not (np.isfinite(value) and np.isfinite(gradient).all()):
                return 1e3, np.zeros_like(q)
            return float(value), gradient

        first = point[rows, 0] if self.shared else point[free]
        found = minimize(objective, first, jac=True, method="BFGS", options={"gtol": 1e-8})
        return found.fun, widen(found.x)


def _loss(result: tuple[float, np.ndarray]) -> float:
    return result[0]


def _distinct(results: list[tuple[float, np.ndarray]], most: int = 3) -> list[np.ndarray]:
    """The best few local minima, each once."""
    kept: list[tuple[float, np.ndarray]] = []
    for result in sorted(results, key=_loss):
        if len(kept) < most and all(result[0] > other[0] + 1e-5 for other in kept):
            kept.append(result)
    return [point for _, point in kept]


def _upper_tail(largest: np.ndarray, rarest: float) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues beyond the largest of a sample, as the largest of each context fall off.

    A filter that fits a sample's last eigenvalue closely explodes just above it. The tail is
    `exp(-(l - c)^2 / 2 s^2)`, `c` the mean and `s^2` from the mean excess over a high quantile:
    an exponential would be too heavy. Only the search sees it.

    Args:
        largest: eigenvalue of each context, `[context]`.
        rarest: chance of a context at which the tail ends.

    Returns:
        Nodes, and how many eigenvalues a context has there.
    """
    center, threshold = largest.mean(), np.quantile(largest, 1 - 10 * _TAIL)
    squared = (largest[largest >= threshold].mean() - threshold) * (threshold - center)
    chance = 1 / len(largest)
    edges = np.linspace(0, max(0.0, np.log(chance / rarest)), 65)
    depths = (edges[1:] + edges[:-1]) / 2
    nodes = center + np.sqrt((largest.max() - center) ** 2 + 2 * squared * depths)
    return nodes, chance * (np.exp(-edges[:-1]) - np.exp(-edges[1:]))


def _binned(eigenvalues: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Few nodes and their counts, with nearly the same sum of any smooth function.

    A bin is `width` of its eigenvalue wide (1e-6 of that of the largest, at least) and its node is
    its mean, so that only second differences within a bin are lost. The number of nodes is
    rounded up with empty ones, which spares compilations.
    """
    values = np.sort(eigenvalues, axis=None)
    floor = 1e-6 * values[-1]
    labels = np.floor(np.log1p(values / floor) / width).astype(int)
    first = np.flatnonzero(np.diff(labels, prepend=-1))
    mass = np.diff(np.append(first, values.size)).astype(float)
    nodes = np.add.reduceat(values, first) / mass
    padding = (0, -len(nodes) % 1024)
    return np.pad(nodes, padding, mode="edge"), np.pad(mass, padding)
