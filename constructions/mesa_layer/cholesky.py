"""A Cholesky factor of H_t + ridge at every time: the reference, for any gates.

One chunk of Gram matrices at a time, so that nothing of size time x dim^2 is stored.
"""

import jax.numpy as jnp
from jax import Array, lax

from constructions.mesa_layer.problem import (
    Problem,
    Settings,
    Tokens,
    diagonal,
    dot,
    inverse_cholesky,
    weighted,
)


def prepare(problem: Problem) -> None:
    """Nothing: the factors of all times would be the largest array of all."""


def solve(problem: Problem, prepared: None, right: Tokens, settings: Settings) -> Tokens:
    """x_t = L_t^-T L_t^-1 b_t with L_t L_t^T = H_t + ridge."""
    ridge = problem.ridge
    lead = problem.key.shape[:3]
    within, since_start, _, _ = problem.decay
    within = jnp.broadcast_to(within, (*lead, *within.shape[-2:]))
    since_start = jnp.broadcast_to(since_start, (*lead, *since_start.shape[-1:]))

    def chunk(_: None, xs: tuple[Array, ...]) -> tuple[None, Array]:
        key, weight, before, within, since_start, b = xs
        # [time, earlier, dim] pairs of one time, then one product for its Gram matrix
        pairs = within[..., None] * key[..., None, :, :]
        gram = dot(pairs.mT, jnp.broadcast_to(weight[..., None, :, :], pairs.shape))
        gram = gram + since_start[..., None, None] * before[..., None, :, :]
        inverse = inverse_cholesky(gram + diagonal(ridge)[:, None], ridge)
        return None, dot(inverse.mT, dot(inverse, b[..., None]))[..., 0]

    weight = weighted(problem.key, problem.input_gate)
    xs = (problem.key, weight, problem.gram, within, since_start, right)
    return lax.scan(chunk, None, xs)[1]
