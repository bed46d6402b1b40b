"""Conjugate gradients on all times at once: for any gates.

Of H_t only products H_t x_t are needed, which are linear attention (von Oswald et al. 2025, arXiv
2506.05233, section 3). Steps are preconditioned by the diagonal of H_t + ridge, which equals the
initial guess b / diag(H_t + ridge) there.
"""

import jax.numpy as jnp
from jax import Array, lax

from constructions.mesa_layer.problem import Problem, Settings, Tokens, dot, multiply, weighted


def prepare(problem: Problem) -> Tokens:
    """The diagonal of H_t + ridge."""
    squares = weighted(problem.key**2, problem.input_gate)
    before = jnp.diagonal(problem.gram, axis1=-2, axis2=-1)[..., None, :]
    kept = problem.decay.since_start[..., None]
    return kept * before + dot(problem.decay.within, squares) + problem.ridge


def solve(problem: Problem, diagonal: Tokens, right: Tokens, settings: Settings) -> Tokens:
    """x with |b - (H + ridge) x| <= tolerance |b|, or after `settings.steps` steps.

    A time that is done stands still while others go on: its residual is rounding error, and steps
    along it would be quotients of such. So no denominator needs a constant added.
    """
    target = settings.tolerance**2 * (right**2).sum(-1, keepdims=True)

    def inner(a: Tokens, b: Tokens) -> Array:
        return (a * b).sum(-1, keepdims=True)

    def quotient(above: Array, below: Array, where: Array) -> Array:
        safe = where & (below > 0)
        return jnp.where(safe, above / jnp.where(safe, below, 1), 0)

    def running(residual: Tokens) -> Array:
        return inner(residual, residual) > target

    def unfinished(carry: tuple[Array, ...]) -> Array:
        step, _, residual, _, _ = carry
        return (step < settings.steps) & running(residual).any()

    def step(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        number, x, residual, direction, size = carry
        active = running(residual)
        image = multiply(problem, direction)
        length = quotient(size, inner(direction, image), active)
        x = x + length * direction
        residual = residual - length * image
        scaled = residual / diagonal
        new_size = inner(residual, scaled)
        direction = scaled + quotient(new_size, size, active) * direction
        return number + 1, x, residual, direction, jnp.where(active, new_size, size)

    scaled = right / diagonal
    start = (jnp.zeros((), int), jnp.zeros_like(right), right, scaled, inner(right, scaled))
    return lax.while_loop(unfinished, step, start)[1]
