"""The exact solution of all times at once, chunk by chunk, by products of matrices alone.

In front of a chunk the inverse is one matrix, R_c = (H_c + ridge)^-1. Inside it the formula of
Sherman and Morrison takes it from pair to pair,

    R_t = R_c - sum_{c < j <= t} w_j w_j^T,     w_j = R_{j-1} k_j / sqrt(1 + k_j^T R_{j-1} k_j),

and no recursion is needed to find the w_j: with K the keys of the chunk, Woodbury gives
R_t = R_c - R_c K_t^T (I + K_t R_c K_t^T)^-1 K_t R_c for its first t keys, and the leading blocks of
one Cholesky factor, L_S L_S^T = S = I + K R_c K^T, factor all of these at once. So W = L_S^-1 K R_c
has the rows w_j, and

    x_t = b_t R_c - sum_{j <= t} (b_t . w_j) w_j

is linear attention with w as keys and values: the mesa layer is two linear attentions. A ridge that
stays while the pairs decay is no such sequence, so there is no forget gate.

By rounding in the difference x is off by about epsilon times the condition number of H_t + ridge,
relative to its size, and one refinement squares this number.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from constructions.mesa_layer.problem import (
    Problem,
    Settings,
    Tokens,
    dot,
    inverse_cholesky,
    multiply,
)

Prepared = tuple[Float[Array, "chunk batch head dim dim"], Tokens]


def prepare(problem: Problem) -> Prepared:
    """R_c and W of every chunk."""
    key = problem.key
    if problem.input_gate is not None:
        key = key * jnp.sqrt(problem.input_gate)[..., None]
    root = problem.root
    # With R_c = root^T root, S is a Gram matrix and stays one in floating point.
    seen = dot(key, root.mT)
    identity = jnp.eye(key.shape[-2], dtype=key.dtype)
    one = jnp.ones(key.shape[-2], key.dtype)
    schur = inverse_cholesky(dot(seen, seen.mT) + identity, one)
    update = dot(dot(schur, seen), root)
    # Of an ill-conditioned S later rows may overflow: earlier times, which they are masked for in
    # products, must not see 0 times infinity.
    return dot(root.mT, root), jnp.where(jnp.isfinite(update), update, 0)


def solve(problem: Problem, prepared: Prepared, right: Tokens, settings: Settings) -> Tokens:
    """x_t = R_t b_t, and x <- x + R (b - (H + ridge) x), `settings.refinements` times."""
    start, update = prepared
    lower = problem.decay.within

    def inverse(b: Tokens) -> Tokens:
        return dot(b, start) - dot(dot(b, update.mT) * lower, update)

    x = inverse(right)
    for _ in range(settings.refinements):
        x = x + inverse(right - multiply(problem, x))
    return x
