r"""Four ways to solve (H_t + ridge) x_t = b_t at every time, and the layer by any of them.

A method is data: what the solves of the forward and of the backward pass share (`prepare`), and the
solve itself. None of the methods is differentiated. x = A^-1 b has the derivative
dx = A^-1 (db - dA x), one more solve with the same symmetric matrices, and all that is left of the
layer are causal sums, which differentiate as they are (von Oswald et al. 2025, arXiv 2506.05233,
appendix D; the backward recursion of arXiv 2309.05858, appendix C, takes the inverse apart again,
which is unstable).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from constructions.mesa_layer.problem import (
    Given,
    Problem,
    Scalars,
    Tokens,
    causal,
    condition,
    decay_of,
    diagonal,
    dot,
    inverse_cholesky,
    multiply,
    problem_of,
    states,
    weighted,
)

Matrix = Float[Array, "*heads dim dim"]


class Settings(NamedTuple):
    """What a method may be told: static, so that it can be part of a compiled function."""

    refinements: int
    steps: int
    tolerance: float


class Method(NamedTuple):
    """A way to solve the systems, and whether it allows forget gates.

    `prepare(problem)` is what both solves share; `solve(problem, prepared, right, settings)` gives
    the solutions.
    """

    prepare: Callable[[Problem], Any]
    solve: Callable[[Problem, Any, Tokens, Settings], Tokens]
    forgets: bool


def solved(method: Method, settings: Settings, given: Given) -> tuple[Tokens, Scalars]:
    """o_t = G_t (H_t + ridge)^-1 q_t in chunks, and bounds of the condition numbers."""
    query, key, value, ridge, input_gate, forget_gate = given
    decay = decay_of(forget_gate, key.shape[0], key.shape[-2], key.dtype)
    problem = problem_of(key, ridge[:, None], input_gate, decay)
    fixed = lax.stop_gradient(problem)
    prepared = method.prepare(fixed)

    def solve(_: Any, right: Tokens) -> Tokens:
        x = method.solve(fixed, prepared, right, settings)
        # Times that overflowed `mesa` takes from elsewhere: their cotangents are 0, and a product
        # with 0 has to be 0.
        return jnp.where(jnp.isfinite(x), x, 0) if settings.refinements else x

    x = lax.custom_linear_solve(partial(multiply, problem), query, solve, symmetric=True)
    values = weighted(value, input_gate)
    output = causal(x, key, values, states(key, values, decay), decay)
    return output, condition(fixed)


# chunked


def prepare_chunks(problem: Problem) -> tuple[Array, Tokens]:
    r"""R_c and W of every chunk: the exact solution by products of matrices alone.

    In front of a chunk the inverse is one matrix, R_c = (H_c + ridge)^-1. Inside it the formula of
    Sherman and Morrison takes it from pair to pair,

        R_t = R_c - sum_{c < j <= t} w_j w_j^T,   w_j = R_{j-1} k_j / sqrt(1 + k_j^T R_{j-1} k_j),

    and no recursion is needed to find the w_j: with K the keys of the chunk, Woodbury gives
    R_t = R_c - R_c K_t^T (I + K_t R_c K_t^T)^-1 K_t R_c for its first t keys, and the leading
    blocks of one Cholesky factor, L_S L_S^T = S = I + K R_c K^T, factor all of these at once. So
    W = L_S^-1 K R_c has the rows w_j, and

        x_t = b_t R_c - sum_{j <= t} (b_t . w_j) w_j

    is linear attention with w as keys and values: the mesa layer is two linear attentions. A ridge
    that stays while the pairs decay is no such sequence, so there is no forget gate.
    """
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


def solve_chunks(
    problem: Problem, prepared: tuple[Array, Tokens], right: Tokens, settings: Settings
) -> Tokens:
    """x_t = R_t b_t, and x <- x + R (b - (H + ridge) x), `settings.refinements` times.

    By rounding in the difference R_t, x is off by about epsilon times the condition number of
    H_t + ridge, relative to its size, and one refinement squares this number.
    """
    start, update = prepared
    lower = problem.decay.within

    def inverse(b: Tokens) -> Tokens:
        return dot(b, start) - dot(dot(b, update.mT) * lower, update)

    x = inverse(right)
    for _ in range(settings.refinements):
        x = x + inverse(right - multiply(problem, x))
    return x


# token by token


def nothing(problem: Problem) -> None:
    """What "scan" and "cholesky" prepare: a second solve forms its matrices again, none stored."""


def apply(matrix: Array, x: Array) -> Array:
    """A x as sums: exact in every backend's default precision, and quick for one small vector."""
    return (matrix * x[..., None, :]).sum(-1)


def outer(a: Array, b: Array) -> Array:
    """a b^T."""
    return a[..., :, None] * b[..., None, :]


def absorb(root: Matrix, key: Array, input_gate: Array | None) -> Matrix:
    """U of H + beta k k^T, where (H + ridge)^-1 = U U^T (Potter's form of Sherman-Morrison).

        a = U^T k,   alpha = 1 + beta a.a,   U <- U - beta (U a) a^T / (alpha + sqrt(alpha)),

    since (I - c a a^T)^2 = I - beta a a^T / alpha for c = beta / (alpha + sqrt(alpha)). What U U^T
    stands for cannot become indefinite, as the inverse itself does in float32 after many updates.
    """
    seen = apply(root.mT, key)
    beta = jnp.ones((), key.dtype) if input_gate is None else input_gate
    alpha = 1 + beta * (seen**2).sum(-1)
    share = beta / (alpha + jnp.sqrt(alpha))
    return root - share[..., None, None] * outer(apply(root, seen), seen)


def solve_once(gram: Matrix, root: Matrix, ridge: Array, right: Array, refinements: int) -> Array:
    """x = U U^T b, and x <- x + U U^T (b - (H + ridge) x), `refinements` times."""
    x = apply(root, apply(root.mT, right))
    for _ in range(refinements):
        residual = right - apply(gram, x) - ridge * x
        x = x + apply(root, apply(root.mT, residual))
    return x


def solve_tokens(problem: Problem, prepared: None, right: Tokens, settings: Settings) -> Tokens:
    """x_t with a state of constant size, H and U with (H + ridge)^-1 = U U^T, updated exactly.

    With a forget gate, and a ridge that stays, the inverse has no such update.
    """
    ridge = problem.ridge[:, 0]
    shape = (*problem.key.shape[1:3], *diagonal(problem.ridge).shape[-2:])

    def over_time(x: Array) -> Array:
        """`[chunk, batch, head, time, ...]` to `[chunk * time, batch, head, ...]`."""
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(-1, *x.shape[2:])

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
    xs = jax.tree.map(over_time, (problem.key, problem.input_gate, right))
    x = lax.scan(step, start, xs)[1]
    return jnp.moveaxis(x.reshape(right.shape[0], right.shape[3], *x.shape[1:]), 1, 3)


def solve_cholesky(problem: Problem, prepared: None, right: Tokens, settings: Settings) -> Tokens:
    """x_t = L_t^-T L_t^-1 b_t with L_t L_t^T = H_t + ridge: the reference, for any gates.

    One chunk of Gram matrices at a time, so that nothing of size time x dim^2 is stored.
    """
    ridge = problem.ridge
    lead = problem.key.shape[:3]
    within, since_start = problem.decay.within, problem.decay.since_start
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


# conjugate gradients


def prepare_gradients(problem: Problem) -> Tokens:
    """The diagonal of H_t + ridge."""
    squares = weighted(problem.key**2, problem.input_gate)
    before = jnp.diagonal(problem.gram, axis1=-2, axis2=-1)[..., None, :]
    kept = problem.decay.since_start[..., None]
    return kept * before + dot(problem.decay.within, squares) + problem.ridge


def solve_gradients(
    problem: Problem, diagonal: Tokens, right: Tokens, settings: Settings
) -> Tokens:
    """x with |b - (H + ridge) x| <= tolerance |b|, or after `settings.steps` steps.

    Of H_t only products H_t x_t are needed, which are linear attention (arXiv 2506.05233, section
    3). Steps are preconditioned by the diagonal of H_t + ridge, which equals the initial guess
    b / diag(H_t + ridge) there. A time that is done stands still while others go on: its residual
    is rounding error, and steps along it would be quotients of such. So no denominator needs a
    constant added.
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


METHODS = {
    "chunked": Method(prepare_chunks, solve_chunks, forgets=False),
    "scan": Method(nothing, solve_tokens, forgets=False),
    "cholesky": Method(nothing, solve_cholesky, forgets=True),
    "conjugate-gradients": Method(prepare_gradients, solve_gradients, forgets=True),
}
