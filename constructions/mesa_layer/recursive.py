"""The same systems token by token: a state of constant size, and an exact update.

The state keeps H and a square root U of the inverse, (H + ridge)^-1 = U U^T. A pair that arrives
without forgetting changes it by (Potter's form of the Sherman-Morrison update)

    a = U^T k,     alpha = 1 + beta a.a,     U <- U - beta (U a) a^T / (alpha + sqrt(alpha)),

since (I - c a a^T)^2 = I - beta a a^T / alpha for c = beta / (alpha + sqrt(alpha)). The inverse
that it stands for cannot become indefinite, as the inverse itself does in float32 after many
updates.
With a forget gate, and a ridge that stays, the inverse has no such update.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from constructions.mesa_layer.problem import Problem, Settings, Tokens, diagonal

Vector = Float[Array, "*heads dim"]
Matrix = Float[Array, "*heads dim dim"]
Scalar = Float[Array, "*heads"]


def apply(matrix: Array, x: Array) -> Array:
    """A x as sums: exact in every backend's default precision, and quick for one small vector."""
    return (matrix * x[..., None, :]).sum(-1)


def outer(a: Array, b: Array) -> Array:
    """a b^T."""
    return a[..., :, None] * b[..., None, :]


def absorb(root: Matrix, key: Vector, input_gate: Scalar | None) -> Matrix:
    """U for H + beta k k^T."""
    seen = apply(root.mT, key)
    beta = jnp.ones((), key.dtype) if input_gate is None else input_gate
    alpha = 1 + beta * (seen**2).sum(-1)
    share = beta / (alpha + jnp.sqrt(alpha))
    return root - share[..., None, None] * outer(apply(root, seen), seen)


def solve_once(
    gram: Matrix, root: Matrix, ridge: Float[Array, "head dim"], right: Vector, refinements: int
) -> Vector:
    """x = U U^T b, and x <- x + U U^T (b - (H + ridge) x), `refinements` times."""
    x = apply(root, apply(root.mT, right))
    for _ in range(refinements):
        residual = right - apply(gram, x) - ridge * x
        x = x + apply(root, apply(root.mT, residual))
    return x


def prepare(problem: Problem) -> None:
    """Nothing: a second solve runs through time once more, so that nothing is stored."""


def _over_time(x: Array) -> Array:
    """`[chunk, batch, head, time, ...]` to `[chunk * time, batch, head, ...]`."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(-1, *x.shape[2:])


def solve(problem: Problem, prepared: None, right: Tokens, settings: Settings) -> Tokens:
    """x_t with the updated root, without forget gates."""
    ridge = problem.ridge[:, 0]
    shape = (*problem.key.shape[1:3], *diagonal(problem.ridge).shape[-2:])

    def step(carry: tuple[Matrix, Matrix], xs: tuple[Array, Array | None, Array]) -> tuple:
        gram, root = carry
        key, beta, b = xs
        gram = gram + outer(key if beta is None else beta[..., None] * key, key)
        root = absorb(root, key, beta)
        return (gram, root), solve_once(gram, root, ridge, b, settings.refinements)

    start = (
        jnp.zeros(shape, right.dtype),
        jnp.broadcast_to(diagonal(1 / jnp.sqrt(problem.ridge)), shape),
    )
    xs = jax.tree.map(_over_time, (problem.key, problem.input_gate, right))
    x = lax.scan(step, start, xs)[1]
    return jnp.moveaxis(x.reshape(right.shape[0], right.shape[3], *x.shape[1:]), 1, 3)
