"""The linear systems of a mesa layer: (H_t + ridge) x_t = b_t at every time of every head."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from constructions.mesa_mixer.products import Decay, Scalars, States, Tokens, causal, states


class Problem(NamedTuple):
    """H_t = sum_{s <= t} zeta_ts beta_s k_s k_s^T and a ridge, in chunks.

    Attributes:
        key: k_s.
        ridge: the diagonal of the ridge, which does not decay.
        input_gate: beta_s, or None for ones.
        forget_gate: gamma_s, or None for ones.
        decay: zeta, the products of the forget gates.
        gram: H in front of every chunk.
    """

    key: Tokens
    ridge: Float[Array, "head 1 dim"]
    input_gate: Scalars | None
    forget_gate: Scalars | None
    decay: Decay
    gram: States


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
    return Problem(key, ridge, input_gate, forget_gate, decay, gram)


def multiply(problem: Problem, x: Tokens) -> Tokens:
    """(H_t + ridge) x_t: linear attention with the keys as values, H_t never formed."""
    value = weighted(problem.key, problem.input_gate)
    return causal(x, problem.key, value, problem.gram, problem.decay) + problem.ridge * x


def diagonal(ridge: Float[Array, "head 1 dim"]) -> Float[Array, "head dim dim"]:
    """The ridge as matrices."""
    return ridge * jnp.eye(ridge.shape[-1], dtype=ridge.dtype)
