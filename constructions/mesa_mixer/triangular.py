"""Inverse Cholesky factors of many small matrices at once.

Of small matrices in large batches XLA's products are fast and its triangular solves slow (32 x 32
on a CPU: eight times a product), so the inverse of the factor is built from products of halves.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from constructions.mesa_mixer.products import dot

LEAF = 4  # below this the products are too small to pay


def inverse_cholesky(
    matrix: Float[Array, "*batch n n"], floor: Float[Array, "*#batch n"]
) -> Float[Array, "*batch n n"]:
    """L^-1, lower triangular, for matrix = L L^T with the squares of L's diagonal >= `floor`.

    In halves, with A = [[A11, .], [A21, A22]] and L11^-1, L22^-1 from the two recursions:

        L21 = A21 L11^-T,    L22 L22^T = A22 - L21 L21^T,    (L^-1)21 = -L22^-1 L21 L11^-1

    The j-th pivot of H + diag(ridge), H >= 0, is the least x^T (H + diag(ridge)) x over x with
    x_j = 1 and x_i = 0 for i > j, which is at least ridge_j. With the ridge as `floor` the
    factor is therefore the exact one where rounding is harmless. Where it is not, a pivot below
    n epsilon A_jj has no digits left, and the floor of that size is what a backward error of the
    size that any factorisation makes would have made of it.
    """
    rounding = matrix.shape[-1] * jnp.finfo(matrix.dtype).eps
    rounding = rounding * jnp.diagonal(matrix, axis1=-2, axis2=-1)
    return _halves(matrix, jnp.maximum(floor, rounding))


def _halves(
    matrix: Float[Array, "*batch n n"], floor: Float[Array, "*batch n"]
) -> Float[Array, "*batch n n"]:
    n = matrix.shape[-1]
    if n <= LEAF:
        return _eliminate(matrix, floor)
    half = n // 2
    first = _halves(matrix[..., :half, :half], floor[..., :half])
    below = dot(matrix[..., half:, :half], first.mT)
    rest = matrix[..., half:, half:] - dot(below, below.mT)
    second = _halves(rest, floor[..., half:])
    corner = -dot(second, dot(below, first))
    zero = jnp.zeros_like(corner.mT)
    return jnp.concatenate(
        [jnp.concatenate([first, zero], -1), jnp.concatenate([corner, second], -1)], -2
    )


def _eliminate(
    matrix: Float[Array, "*batch n n"], floor: Float[Array, "*batch n"]
) -> Float[Array, "*batch n n"]:
    """Rows of [A | I] eliminated one after another; what is left of I is L^-1."""
    n = matrix.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(n, dtype=matrix.dtype), matrix.shape)
    # The batch is the last axis here, the one that vector instructions run along.
    rows = jnp.concatenate([matrix, identity], -1).reshape(-1, n, 2 * n).transpose(1, 2, 0)
    floors = floor.reshape(-1, n).T
    inverse = []
    for column in range(n):
        row = rows[0] * lax.rsqrt(jnp.maximum(rows[0][column], floors[column]))
        inverse.append(row[n:])
        # By symmetry row[i] is also what stands in this column of row i.
        rows = rows[1:] - row[column + 1 : n, None] * row[None]
    return jnp.stack(inverse).transpose(2, 0, 1).reshape(matrix.shape)
