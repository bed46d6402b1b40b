"""How rare the small and the large eigenvalues of a Gaussian context are."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy.special import gammaln


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
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
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
