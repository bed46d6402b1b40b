r"""In-context regression of sine waves, and the least loss of a kernel smoother on them.

    x_i, x_query ~ U(low, high),   y = a sin(x + rho),   a ~ U(low_amplitude, high_amplitude),
    rho ~ U(0, pi)

(von Oswald et al. 2022, arXiv 2212.07677, fig. 4). Since a sin(x + rho) = w^T phi(x) with
phi(x) = (sin x, cos x) and w = a (cos rho, sin rho), this is linear regression in phi, and what a
step of gradient descent on any features m reaches follows from moments of m and of w.

Notation: N examples, L = E[w w^T], u = E[w], R(x) = phi(x)^T L phi(x) = E[y(x)^2], E over x. A
smoother on features m predicts

    y_hat = (sum_i y_i m(x_i))^T M m(x_query),

a gradient step from zero if M = eta / N I. A step from W_0 is the same with y - W_0 m(x) in the
place of y, wherever y stands. Averages over x are composite Gauss-Legendre sums in float64.

The phase covers half a turn, so that w has a mean: a wave is known in part before any example is
seen, and the best step does not start from zero.

`smoother_loss` and `optimal_kernel_loss` are for use as a library; no command calls them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from synthetic.compilation import compile_once, many
from synthetic.guards import number
from synthetic.tasks.task import Batch, half_squared_error
from synthetic.threefry import unit_uniform

Features = Callable[[np.ndarray], np.ndarray]

_PANELS, _NODES = 256, 8


@dataclass(frozen=True)
class SineTask:
    """Sine waves of random amplitude and phase; a `Task`.

    Hashable, hence a static argument of `jit`. Arrays have JAX's default float.

    Attributes:
        num_examples: examples in the context, `N`.
        queries: queries to each context.
        low_amplitude, high_amplitude: bounds of the uniform amplitude. The public code of the paper
            has 0.1 and 0.5, its text 0.1 and 5.
        low, high: bounds of the uniform inputs.
        tied: draw amplitude and phase from the same number, as that code does by using one key
            twice: their correlation is then 1.

    Raises:
        ValueError: a size is below 1, a bound is not finite, or bounds are out of order.
        TypeError: `tied` is not a bool.
    """

    num_examples: int = 10
    queries: int = 1
    low_amplitude: float | int = 0.1
    high_amplitude: float | int = 0.5
    low: float | int = -5.0
    high: float | int = 5.0
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("num_examples", "queries"):
            size = number(name, getattr(self, name), whole=True, least=1)
            object.__setattr__(self, name, size)
        for below, above in (("low_amplitude", "high_amplitude"), ("low", "high")):
            ends = float(getattr(self, below)), float(getattr(self, above))
            if not (np.isfinite(ends).all() and ends[0] < ends[1]):
                raise ValueError(
                    f"{below} and {above} must be finite and in this order, got {ends}"
                )
            object.__setattr__(self, below, ends[0])
            object.__setattr__(self, above, ends[1])
        if not isinstance(self.tied, bool):
            raise TypeError(f"tied must be true or false, got {self.tied!r}")

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw independent contexts, at least 1.

        Returns:
            `inputs`: x `[batch, num_examples, 1]`, y `[batch, num_examples, 1]`,
            x_query `[batch, queries, 1]`; `target`: y at the queries, `[batch, queries, 1]`.
        """
        return _draw(self, key, number("batch", batch, whole=True, least=1))

    def loss(self, prediction: Float[Array, "..."], batch: Batch) -> Float[Array, " batch"]:
        """`half_squared_error` of predictions `[batch, queries, 1]`."""
        return half_squared_error(prediction, batch.target)


@compile_once(static_argnums=(0, 2), often=many)
def _draw(task: SineTask, key: Array, batch: int) -> Batch:
    n = task.num_examples
    # the batch is the fast axis, as in `synthetic.tasks.regression`
    unit = unit_uniform(key, n + task.queries + 2, batch)
    x = task.low + (task.high - task.low) * unit[:-2]
    amplitude = task.low_amplitude + (task.high_amplitude - task.low_amplitude) * unit[-1]
    phase = jnp.pi * (unit[-1] if task.tied else unit[-2])
    y = amplitude * jnp.sin(x + phase)
    x, y = x.T[..., None], y.T[..., None]
    return Batch(inputs=(x[:, :n], y[:, :n], x[:, n:]), target=y[:, n:])


class Smoother(NamedTuple):
    """The best smoother on some features, `y_hat = (sum_i y_i m_i)^T matrix m_query`."""

    matrix: np.ndarray
    loss: float


class Step(NamedTuple):
    """The best gradient step on some features: a smoother with `matrix = size / N I`."""

    size: float
    loss: float


def sine_and_cosine(x: np.ndarray) -> np.ndarray:
    """phi(x) = (sin x, cos x), `[..., 2]`."""
    return np.stack([np.sin(x), np.cos(x)], axis=-1)


def coefficient_moments(task: SineTask) -> tuple[np.ndarray, np.ndarray]:
    """(u, L): mean `[2]` and second moment `[2, 2]` of `w = a (cos rho, sin rho)`.

    Independent: `u = (0, 2 E[a] / pi)` and `L = E[a^2] / 2 I`. Tied, both are integrals over the
    one number that amplitude and phase share, and L has a cross term.
    """
    nodes, mass = np.polynomial.legendre.leggauss(48)
    unit, mass = (nodes + 1) / 2, mass / 2
    amplitude = task.low_amplitude + (task.high_amplitude - task.low_amplitude) * unit
    turn = np.stack([np.cos(np.pi * unit), np.sin(np.pi * unit)])
    if task.tied:
        w = amplitude * turn
        return w @ mass, (w * mass) @ w.T
    return (amplitude @ mass) * (turn @ mass), (amplitude**2 @ mass) * ((turn * mass) @ turn.T)


def average_nodes(
    task: SineTask, breaks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(x, mass) with `E[f(x)] = f(x) @ mass`, 8 Gauss-Legendre nodes between breaks.

    Args:
        task: whose inputs.
        breaks: where f has kinks, `[breaks]`, inside the task's interval; default: equal panels.
    """
    if breaks is None:
        breaks = np.linspace(task.low, task.high, _PANELS + 1)
    breaks = np.unique(np.concatenate([[task.low], breaks, [task.high]]))
    nodes, mass = np.polynomial.legendre.leggauss(_NODES)
    half = np.diff(breaks)[:, None] / 2
    x = breaks[:-1, None] + half * (nodes + 1)
    return x.ravel(), (half * mass).ravel() / (task.high - task.low)


class _Moments(NamedTuple):
    """`inputs` E[m m^T], `gram` K = E[s s^T] / N with s = sum_i y_i m_i, `target` E[s y m^T] / N.

    Given w the examples are independent: K = E[R m m^T] + (N - 1) B L B^T, B = E[m phi^T], and
    the target is B L B^T. `signal` is E[y^2].
    """

    inputs: np.ndarray
    gram: np.ndarray
    target: np.ndarray
    signal: float


def _moments(
    task: SineTask, features: Features, breaks: np.ndarray | None, start: np.ndarray | None
) -> _Moments:
    x, mass = average_nodes(task, breaks)
    phi, m = sine_and_cosine(x), np.asarray(features(x), np.float64)
    if m.ndim != 2 or len(m) != len(x):
        raise ValueError(f"features must map {x.shape} to [{len(x)}, features], got {m.shape}")
    mean, second = coefficient_moments(task)
    if start is not None:
        # y - W_0 m is linear in (phi, m), with the coefficients (w, -W_0)
        w0 = np.asarray(start, np.float64)
        if w0.shape != (m.shape[1],):
            raise ValueError(f"start must have shape {(m.shape[1],)}, got {w0.shape}")
        phi = np.concatenate([phi, m], axis=1)
        cross = -np.outer(mean, w0)
        second = np.block([[second, cross], [cross.T, np.outer(w0, w0)]])
    power = np.einsum("na,ab,nb->n", phi, second, phi)
    joint = (m.T * mass) @ phi
    target = joint @ second @ joint.T
    gram = (m.T * (mass * power)) @ m + (task.num_examples - 1) * target
    return _Moments((m.T * mass) @ m, gram, target, float(power @ mass))


def optimal_smoother(
    task: SineTask,
    features: Features = sine_and_cosine,
    breaks: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> Smoother:
    """The best smoother on given features: what one layer of linear attention on them can reach.

        M = K^-1 T C^-1,  loss = 1/2 (E[y^2] - N tr(M^T T)),

    with C = E[m m^T], T = B L B^T, K as in `_Moments`: the minimum of the convex quadratic
    `1/2 (N tr(M^T K M C) - 2 N tr(M^T T) + E[y^2])`. Pseudo-inverses where features depend on each
    other.

    Args:
        task: the distribution.
        features: `m`, from `[n]` to `[n, features]`.
        breaks: kinks of the features, see `average_nodes`.
        start: W_0, `[features]`; default 0. E[w] is the best on sine and cosine.
    """
    c = _moments(task, features, breaks, start)
    left, right = (np.linalg.pinv(a, hermitian=True) for a in (c.gram, c.inputs))
    matrix = left @ c.target @ right
    return Smoother(matrix, _loss(matrix, task, c))


def optimal_step(
    task: SineTask,
    features: Features = sine_and_cosine,
    breaks: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> Step:
    """The best single gradient step from zero on given features; arguments as before.

    `eta = N tr(T) / tr(K C)`, the minimum of the same quadratic over multiples of the identity.
    """
    c = _moments(task, features, breaks, start)
    scale = float(np.trace(c.target) / np.trace(c.gram @ c.inputs))
    return Step(task.num_examples * scale, _loss(scale * np.eye(len(c.inputs)), task, c))


def smoother_loss(
    matrix: np.ndarray,
    task: SineTask,
    features: Features = sine_and_cosine,
    breaks: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> float:
    """Expected loss of any smoother; arguments as before, `matrix` is `[features, features]`."""
    return _loss(np.asarray(matrix, np.float64), task, _moments(task, features, breaks, start))


def _loss(matrix: np.ndarray, task: SineTask, c: _Moments) -> float:
    n = task.num_examples
    square = np.trace(matrix.T @ c.gram @ matrix @ c.inputs)
    return float(0.5 * (n * square - 2 * n * np.trace(matrix.T @ c.target) + c.signal))


def optimal_kernel_loss(task: SineTask, *, affine: bool = False) -> float:
    r"""Least expected loss of `y_hat = sum_i y_i k(x_i, x_query)` over every function k.

    For each query the loss is a quadratic in k(., query), minimal where

        R(x) k(x) + (N - 1) phi(x)^T L b = phi(x)^T L phi(query),   b = E[phi k].

    With D = E[phi phi^T / R] and C = E[phi phi^T] that is b = (I + (N - 1) D L)^-1 D L phi(query),
    k = phi^T L (phi(query) - (N - 1) b) / R, and

        loss = 1/2 (tr(C L) - N tr(L (I + (N - 1) D L)^-1 D L C)).

    Independent amplitude and phase make R constant, so that the best kernel is a smoother on sine
    and cosine: no other features are better. Tied, they are.

    Args:
        task: the distribution.
        affine: over every `y_hat = sum_i (y_i k(x_i, x_query) + h(x_i, x_query))`, which can use
            the mean u of w: the best h takes u^T phi off y, so that L - u u^T replaces L. Features
            beyond sine and cosine then help, since R is no longer constant.
    """
    x, mass = average_nodes(task)
    phi = sine_and_cosine(x)
    mean, second = coefficient_moments(task)
    second = second - np.outer(mean, mean) * affine
    power = np.einsum("na,ab,nb->n", phi, second, phi)
    inputs, weighted = (phi.T * mass) @ phi, (phi.T * (mass / power)) @ phi
    n, spread = task.num_examples, weighted @ second
    b = np.linalg.solve(np.eye(2) + (n - 1) * spread, spread)
    return float(0.5 * (np.trace(inputs @ second) - n * np.trace(second @ b @ inputs)))
