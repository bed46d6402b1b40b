"""The linear systems of a mesa layer: (H_t + ridge) x_t = b_t at every time of every head."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from constructions.mesa_mixer.products import Decay, Scalars, States, Tokens, causal, dot, states
from constructions.mesa_mixer.triangular import inverse_cholesky


class Problem(NamedTuple):
    """H_t = sum_{s <= t} zeta_ts beta_s k_s k_s^T and a ridge, in chunks.

    Attributes:
        key: k_s.
        ridge: the diagonal of the ridge, which does not decay.
        input_gate: beta_s, or None for ones.
        forget_gate: gamma_s, or None for ones.
        decay: zeta, the products of the forget gates.
        gram: H in front of every chunk.
        root: L^-1 of the Cholesky factor L L^T = H + ridge in front of every chunk.
    """

    key: Tokens
    ridge: Float[Array, "head 1 dim"]
    input_gate: Scalars | None
    forget_gate: Scalars | None
    decay: Decay
    gram: States
    root: States


class Settings(NamedTuple):
    """What a method may be told: static, so that it can be part of a compiled function."""

    refinements: int
    steps: int
    tolerance: float


def weighted(x: Tokens, input_gate: Scalars | None) -> Tokens:
    """beta_s x_s."""
    return x if input_gate is None else x * input_gate[..., None]


def problem_of(
    key: Tokens,
    ridge: Float[Array, "head 1 dim"],
    input_gate: Scalars | None,
    forget_gate: Scalars | None,
    decay: Decay,
) -> Problem:
    """The systems with these keys."""
    gram = states(key, weighted(key, input_gate), decay)
    root = inverse_cholesky(gram + diagonal(ridge), ridge[:, 0])
    return Problem(key, ridge, input_gate, forget_gate, decay, gram, root)


def multiply(problem: Problem, x: Tokens) -> Tokens:
    """(H_t + ridge) x_t: linear attention with the keys as values, H_t never formed."""
    value = weighted(problem.key, problem.input_gate)
    return causal(x, problem.key, value, problem.gram, problem.decay) + problem.ridge * x


def condition(problem: Problem) -> Scalars:
    """Bounds of the condition number of H_t, that is of |H_t| |(H_t + ridge)^-1|.

    With H_t = zeta H_c + sum_{c < s <= t} w_s k_s k_s^T the spectral norm of H_t is at most that of
    zeta H_c and the Frobenius norm of the sum; H_t + ridge is at least zeta (H_c + ridge), and at
    least the ridge. The norm of a positive matrix A is at most |A^2|^(1/2), in Frobenius' norm, and
    at least |A^2|^(1/2) / dim^(1/4).
    """

    def norm(matrix: States) -> Array:
        # over its trace, so that no square overflows
        size = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
        unit = matrix / jnp.where(size > 0, size, 1)
        return size[..., 0] * jnp.sqrt(jnp.linalg.norm(dot(unit, unit), axis=(-2, -1)))[..., None]

    weights = weighted(jnp.ones_like(problem.key[..., :1]), problem.input_gate) * jnp.ones(
        problem.key.shape[-2], problem.key.dtype
    )
    within = problem.decay.within * weights.mT
    squares = dot(problem.key, problem.key.mT) ** 2
    added = (dot(within, squares) * within).sum(-1)
    kept = problem.decay.since_start
    size = kept * norm(problem.gram) + jnp.sqrt(added)
    inverse = norm(dot(problem.root.mT, problem.root)) / kept
    return size * jnp.minimum(inverse, 1 / problem.ridge.min(-1))


def diagonal(ridge: Float[Array, "head 1 dim"]) -> Float[Array, "head dim dim"]:
    """The ridge as matrices."""
    return ridge * jnp.eye(ridge.shape[-1], dtype=ridge.dtype)
