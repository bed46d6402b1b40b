"""Ridge regression in context, with and without knowledge of the noise: the baselines.

    w_hat = (X^T X + lambda I)^-1 X^T y,   prediction w_hat . x_query

With `w ~ N(0, I)` the posterior mean has `lambda = sigma^2`. The algorithms differ in what they
take for it (Vladymyrov et al. 2024, section 3):

    oracle   sigma^2 of the context itself (Bayes optimal given sigma)
    ConstRR  one constant; `E sigma^2` is the best there is for large N
    AdaRR    sigma_hat^2 = RSS / (N - d), the unbiased estimate from the residuals of least squares
    TunedRR  min(factor sigma_hat^2, ceiling), both numbers tuned on the distribution of tasks
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from synthetic.compilation import compile_once
from synthetic.tasks.noisy import Moments
from synthetic.theory.spectral import Estimate, estimate


class Tuning(NamedTuple):
    """The two numbers of TunedRR; `ceiling` may be infinite."""

    factor: float
    ceiling: float


def ridge(
    x: Float[Array, "batch context dim_x"],
    y: Float[Array, "batch context 1"],
    x_query: Float[Array, "batch query dim_x"],
    penalty: ArrayLike,
) -> Float[Array, "batch query 1"]:
    """Ridge regression; `penalty` is a scalar or `[batch]`, and 0 gives least squares.

    With penalty 0 and fewer examples than dimensions, the least-norm solution.
    """
    moments, vectors = context_moments(x, y)
    w = jnp.einsum("bij,jb->bi", vectors, ridge_weight(moments, penalty), precision="highest")
    return jnp.einsum("bqi,bi->bq", x_query, w, precision="highest")[..., None]


def adaptive_ridge(
    x: Float[Array, "batch context dim_x"],
    y: Float[Array, "batch context 1"],
    x_query: Float[Array, "batch query dim_x"],
    factor: float = 1.0,
    ceiling: float = np.inf,
) -> Float[Array, "batch query 1"]:
    """AdaRR, and TunedRR with a `factor` and a `ceiling`.

    Raises:
        ValueError: no more examples than dimensions: the residuals do not show the noise.
    """
    moments, _ = context_moments(x, y)
    return ridge(x, y, x_query, adaptive_penalty(moments, x.shape[1], factor, ceiling))


def context_moments(
    x: Float[Array, "batch context dim_x"], y: Float[Array, "batch context 1"]
) -> tuple[Moments, Float[Array, "batch dim_x dim_x"]]:
    """Moments of contexts and the eigenvectors (columns) that they are written in.

    What the context does not determine, `weight` and `noise`, is NaN.
    """
    values, vectors = jnp.linalg.eigh(jnp.einsum("bni,bnj->bij", x, x, precision="highest"))
    correlation = jnp.einsum("bni,bnk->bi", x, y, precision="highest")
    correlation = jnp.einsum("bij,bi->jb", vectors, correlation, precision="highest")
    power = jnp.sum(y**2, (1, 2))
    unknown = jnp.full_like(power, jnp.nan)
    hidden = jnp.full_like(correlation, jnp.nan)
    return Moments(values.T, correlation, power, hidden, unknown), vectors


@compile_once
def ridge_weight(moments: Moments, penalty: ArrayLike) -> Float[Array, "dim_x context"]:
    """`w_hat` in the eigenbasis, `correlation / (values + penalty)`; see `ridge`."""
    total = moments.values + penalty
    # Eigenvalues that are 0 but for rounding: no example determines anything along them.
    smallest = moments.values[-1] * len(moments.values) * jnp.finfo(total.dtype).eps
    seen = total > smallest
    return jnp.where(seen, moments.correlation / jnp.where(seen, total, 1), 0)


@compile_once(static_argnums=1)
def adaptive_penalty(
    moments: Moments, num_examples: int, factor: ArrayLike = 1.0, ceiling: ArrayLike = np.inf
) -> Float[Array, " context"]:
    """`min(factor RSS / (N - d), ceiling)`, RSS of least squares; 0 where rounding makes it < 0.

    Raises:
        ValueError: no more examples than dimensions.
    """
    spare = num_examples - len(moments.values)
    if spare < 1:
        raise ValueError(
            f"num_examples must exceed dim_x={len(moments.values)} to estimate the noise, "
            f"got {num_examples}"
        )
    rss = moments.power - jnp.sum(moments.correlation * ridge_weight(moments, 0.0), 0)
    return jnp.minimum(factor * jnp.maximum(rss, 0) / spare, ceiling)


@compile_once
def expected_loss(
    weight: Float[Array, "dim_x context"], moments: Moments
) -> Float[Array, " context"]:
    """`1/2 |w_hat - w|^2`, the loss in expectation over a query from `N(0, I)`."""
    return 0.5 * jnp.sum((weight - moments.weight) ** 2, 0)


def oracle_weight(moments: Moments) -> Float[Array, "dim_x context"]:
    """Ridge with the context's own `sigma^2`."""
    return ridge_weight(moments, moments.noise**2)


def expected_adjusted_loss(weight: Float[Array, "dim_x context"], moments: Moments) -> Estimate:
    """Expected loss less the oracle's on the same contexts; the paired standard error."""
    oracle = expected_loss(oracle_weight(moments), moments)
    return estimate(expected_loss(weight, moments) - oracle)


def fit_constant(moments: Moments, start: float) -> float:
    """The best constant penalty on a sample, a search in factors of up to e around `start`.

    Returns `start` where it is 0 (no noise: nothing to be gained).
    """
    if start == 0:
        return 0.0
    grid = start * np.exp(np.linspace(-1, 1, 81))
    return float(grid[np.argmin(_losses(moments, jnp.asarray(grid)))])


@jax.jit
def _losses(moments: Moments, penalties: Array) -> Array:
    def loss(penalty: Array) -> Array:
        return expected_loss(ridge_weight(moments, penalty), moments).mean()

    return jax.lax.map(loss, penalties)


def tune(
    moments: Moments,
    num_examples: int,
    factors: Sequence[float] | np.ndarray | None = None,
    ceilings: Sequence[float] | np.ndarray | None = None,
) -> Tuning:
    """The factor and ceiling of TunedRR that are best on a sample, over a grid.

    Args:
        moments: the sample to tune on; report losses on another.
        num_examples: N.
        factors: default 0.6 to 2 in steps of 0.1.
        ceilings: default none at all, and 24 quantiles of `sigma_hat^2` with 0 below them.
    """
    raw = adaptive_penalty(moments, num_examples)
    if factors is None:
        factors = np.arange(6, 21) / 10
    if ceilings is None:
        quantiles = np.quantile(np.asarray(raw), np.linspace(0.04, 1, 25)[:-1])
        ceilings = np.concatenate([[np.inf], quantiles])
    pairs = np.array([(f, c) for f in factors for c in ceilings])
    losses = _tuned_losses(num_examples, moments, jnp.asarray(pairs))
    factor, ceiling = map(float, pairs[int(np.argmin(losses))])
    return Tuning(factor, ceiling)


@partial(jax.jit, static_argnums=0)
def _tuned_losses(num_examples: int, moments: Moments, pairs: Array) -> Array:
    def loss(pair: Array) -> Array:
        penalty = adaptive_penalty(moments, num_examples, pair[0], pair[1])
        return expected_loss(ridge_weight(moments, penalty), moments).mean()

    return jax.lax.map(loss, pairs)
