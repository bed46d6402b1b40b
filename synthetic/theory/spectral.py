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
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.stats import chi2

from synthetic.compilation import compile_once
from synthetic.tasks.regression import RegressionTask, Uniform
from synthetic.theory.wishart import eigenvalue_density

# Of the eigenvalues of Gaussian contexts, this part at either end counts as rare.
_TAIL = 5e-4
_TAIL_NODES = 512
_TAIL_DRAWS = 2_000


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


class Descent(NamedTuple):
    """The best steps of gradient descent or GD++, and their loss on fresh contexts.

    Attributes:
        step_sizes: `eta` (a step moves by `eta / N`), `[steps]` float64.
        curvatures: `gamma`, `[steps]` float64; 0 for gradient descent. Without sharing the last
            has no effect and is 0.
        loss: on contexts that took no part in the search.
        standard_error: of that loss. Losses far below 1e-4 are made by rare contexts, and theirs
            is then itself uncertain.
    """

    step_sizes: np.ndarray
    curvatures: np.ndarray
    loss: float
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
    _variances(task)
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
    return _after(task, jnp.asarray(eigenvalues), step_sizes, curvatures).sum(-1)


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
    _, weights = _variances(task)
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
            inputs the tails up to there are integrated (`synthetic.theory.wishart`), in the search
            and in the loss; for others the upper tail is extrapolated in the search. From `1 /
            contexts` on, there is no such tail for the latter.

    Raises:
        ValueError: an argument out of range, or the task is not isotropic.
    """
    for name, value, low in (("steps", steps, 1), ("contexts", contexts, 2), ("starts", starts, 0)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed))
        searched, held_out = (_sample(task, key, contexts, rarest) for key in keys)
        search = _Search(task, searched, shared, curvature, rarest)
        best = search.run(steps, starts, np.random.default_rng(seed))
        step_sizes = best[0] * task.num_examples
        loss = _evaluate(task, held_out, step_sizes, best[1])
    return Descent(step_sizes, best[1], *loss)


def _after(task: RegressionTask, eigenvalues: Array, step_sizes: Any, curvatures: Any) -> Array:
    rates = jnp.asarray(step_sizes) / task.num_examples
    last = descent_filter(eigenvalues, rates, jnp.asarray(curvatures))
    return _terms(task, eigenvalues, last.residual[-1], last.gain[-1])


def _terms(task: RegressionTask, eigenvalues: Array, residual: Array, gain: Array) -> Array:
    """What each eigenvalue adds to the loss."""
    inputs, weights = _variances(task)
    error = weights * residual**2 + task.noise**2 * eigenvalues * gain**2
    return 0.5 * task.dim_y * inputs * error


def _variances(task: RegressionTask) -> tuple[float, float]:
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


class _Sample(NamedTuple):
    """Contexts, and what they say of the eigenvalues that few of them have."""

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
    variance, _ = _variances(task)
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
    terms = _after(task, sample.eigenvalues, step_sizes, curvatures)
    common = estimate(jnp.where(sample.common, terms, 0).sum(-1))
    rare = estimate((sample.mass * _after(task, sample.rare, step_sizes, curvatures)).sum(-1))
    return Estimate(
        common.mean + rare.mean, float(np.hypot(common.standard_error, rare.standard_error))
    )


@compile_once(often=True)
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
        inputs, weights = _variances(task)
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

    def run(self, steps: int, starts: int, rng: np.random.Generator) -> np.ndarray:
        """Rates and curvatures `[2, steps]` of the least loss that any start leads to."""
        best = [np.zeros((2, 0))]
        for count in range(1, steps + 1):
            trials = self._starts(best, count)
            width = 1 if self.shared else count
            trials += [
                trials[i % len(trials)] * rng.lognormal(0, 0.5, (2, width)) for i in range(starts)
            ]
            best = _distinct([self._descend(trial, steps, self.coarse) for trial in trials])
        return min((self._descend(point, steps, self.fine) for point in best), key=_loss)[1]

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
