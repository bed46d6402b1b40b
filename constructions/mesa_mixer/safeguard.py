"""What a direct solve lost to rounding is seen in its residual, and solved again.

Keys that repeat or differ in size by many orders make H_t + ridge so ill-conditioned that a direct
solve has no digits left, or overflows, in float32 before float64. Conjugate gradients from zero
only ever come closer.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from constructions.mesa_mixer import conjugate_gradients
from constructions.mesa_mixer.problem import Problem, Settings, multiply, weighted
from constructions.mesa_mixer.products import Tokens, decay_of, dot

Marks = Bool[Array, "chunk batch head time 1"]


def squared(a: Tokens) -> Float[Array, "chunk batch head time 1"]:
    """|a_t|^2."""
    return (a**2).sum(-1, keepdims=True)


def unsolved(problem: Problem, x: Tokens, right: Tokens) -> Marks:
    """Whether |b - A x| is above 1000 epsilon (|A| |x| + |b|), or above |b| / 2.

    Below the first, x is the exact solution of a system that differs by rounding. An x that is much
    too large may pass that, as |A| |x| grows with it; the second does not. NaN is above.
    """
    squares = weighted(problem.key**2, problem.input_gate).sum(-1, keepdims=True)
    before = jnp.trace(problem.gram, axis1=-2, axis2=-1)[..., None, None]
    before = before * problem.decay.since_start[..., None]
    trace = before + dot(problem.decay.within, squares) + problem.ridge.sum(-1, keepdims=True)
    left, size = (jnp.sqrt(squared(a)) for a in (right - multiply(problem, x), right))
    allowed = 1000 * jnp.finfo(x.dtype).eps * (trace * jnp.sqrt(squared(x)) + size)
    return ~((left <= allowed) & (left <= size / 2))


def repaired(
    problem: Problem, x: Tokens, failed: Marks, right: Tokens, settings: Settings
) -> Tokens:
    """x, and where it has failed the solution of conjugate gradients."""
    gates = (problem.input_gate, problem.forget_gate)

    def any_left(carry: tuple[Tokens, Marks]) -> Array:
        return carry[1].any()

    def repair_chunk(carry: tuple[Tokens, Marks]) -> tuple[Tokens, Marks]:
        # One chunk at a time: what is rarely run should not be what needs the most memory.
        x, failed = carry
        number = jnp.argmax(failed.any((1, 2, 3, 4)))
        everything = (problem.key, *gates, problem.gram, right, failed, x)
        key, beta, gamma, gram, b, marks, old = jax.tree.map(
            lambda a: lax.dynamic_slice_in_dim(a, number, 1), everything
        )
        decay = decay_of(gamma, 1, key.shape[3], key.dtype)
        part = Problem(key, problem.ridge, beta, gamma, decay, gram)
        rest = jnp.where(marks, b, 0)  # a right side of zero is done before the first step
        diagonal = conjugate_gradients.prepare(part)
        found, _ = conjugate_gradients.solve(part, diagonal, rest, settings)
        new = jnp.where(marks, found, old)
        return lax.dynamic_update_slice_in_dim(x, new, number, 0), failed.at[number].set(False)

    return lax.while_loop(any_left, repair_chunk, (x, failed))[0]
