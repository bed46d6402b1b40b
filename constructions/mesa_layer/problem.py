"""What a mesa layer is given, and its linear systems: (H_t + ridge) x_t = b_t at every time.

Arguments are checked, with one line of error for what they may not be. Then come causal sums with
forgetting, chunk by chunk: gated linear attention.

Arrays are cut into chunks, `[chunk, batch, head, time, dim]` with `time` the place in the chunk:
what crosses chunks is one matrix a chunk, what stays inside is a masked product of matrices.
Yang et al. 2024 (arXiv 2312.06635), section 4. Every product is at the highest precision: with TF32
a Gram matrix of this kind need not be positive definite.

Last are inverse Cholesky factors of many small matrices at once. In large batches of these XLA's
products are fast and its triangular solves slow (32 x 32 on a CPU: eight times a product), so the
inverse of the factor is built from products of halves.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

Tokens = Float[Array, "chunk batch head time _"]
Scalars = Float[Array, "chunk batch head time"]
States = Float[Array, "chunk batch head _ _"]


class Given(NamedTuple):
    """The arguments of a layer, whole or cut into chunks; gates are None where they are ones.

    Attributes:
        query, key: `[..., dim]`.
        value: `[..., value_dim]`.
        ridge: `[head, dim]`.
        input_gate, forget_gate: `[...]`.
    """

    query: Array
    key: Array
    value: Array
    ridge: Array
    input_gate: Array | None
    forget_gate: Array | None


def floating(name: str, dtype: DTypeLike) -> None:
    """ValueError unless the dtype is one of real floating numbers."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {jnp.dtype(dtype)}, must be floating")


def _every(name: str, x: Array | None, allowed: Callable, range_: str) -> None:
    """Every entry is allowed; of concrete arrays only, a traced one has no values yet."""
    if x is None or isinstance(x, Tracer):
        return
    values = np.asarray(x, np.float64)
    wrong = ~allowed(values)
    if wrong.any():
        raise ValueError(f"{name} has {values[wrong][0]}, every entry must be {range_}")


def checked(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    regularization: ArrayLike,
    input_gate: ArrayLike | None,
    forget_gate: ArrayLike | None,
    axes: tuple[str, ...],
) -> Given:
    """The arguments as arrays of one floating dtype, float32 or more; `axes` in front of dim."""
    given = {"query": query, "key": key, "value": value, "regularization": regularization}
    gates = {"input_gate": input_gate, "forget_gate": forget_gate}
    arrays = {name: jnp.asarray(x) for name, x in (given | gates).items() if x is not None}
    for name, x in arrays.items():
        floating(name, x.dtype)

    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    layout = f"[{', '.join(axes)}, dim]"
    if query.ndim != len(axes) + 1 or 0 in query.shape:
        raise ValueError(f"query has shape {query.shape}, must be {layout}, no axis empty")
    if key.shape != query.shape:
        raise ValueError(f"key has shape {key.shape}, must be that of query, {query.shape}")
    if value.ndim != query.ndim or value.shape[:-1] != query.shape[:-1] or 0 in value.shape:
        raise ValueError(
            f"value has shape {value.shape}, must be {query.shape[:-1]} and a last axis, not empty"
        )
    ridge = ridge_of(arrays["regularization"], *query.shape[-2:])
    for name in gates:
        if name in arrays and arrays[name].shape != query.shape[:-1]:
            raise ValueError(
                f"{name} has shape {arrays[name].shape}, must be [{', '.join(axes)}] = "
                f"{query.shape[:-1]}"
            )
    beta, gamma = arrays.get("input_gate"), arrays.get("forget_gate")
    _every("input_gate", beta, lambda x: (x >= 0) & np.isfinite(x), "at least 0 and finite")
    _every("forget_gate", gamma, lambda x: (x > 0) & (x <= 1), "in (0, 1]")

    dtype = jnp.result_type(jnp.float32, *arrays.values())
    query, key, value, ridge = (x.astype(dtype) for x in (query, key, value, ridge))
    beta, gamma = (None if x is None else x.astype(dtype) for x in (beta, gamma))
    return Given(query, key, value, ridge, beta, gamma)


def ridge_of(regularization: Array, heads: int, dim: int) -> Array:
    """The ridge of these heads, `[head, dim]`."""
    shape = regularization.shape
    if shape not in ((heads,), (heads, dim)):
        raise ValueError(
            f"regularization has shape {shape}, must be [head] = {(heads,)} or "
            f"[head, dim] = {(heads, dim)}"
        )
    allowed = "positive and finite"
    _every("regularization", regularization, lambda x: (x > 0) & np.isfinite(x), allowed)
    ridge = regularization if len(shape) == 2 else regularization[:, None]
    return jnp.broadcast_to(ridge, (heads, dim))


class Decay(NamedTuple):
    """Products of forget gates, zeta_ts = prod_{s < j <= t} gamma_j.

    Attributes:
        within: zeta_ts for s <= t in one chunk, 0 for s > t.
        since_start: what is left at t of the state in front of the chunk.
        until_end: what is left of t's pair behind the chunk.
        across: what is left behind the chunk of the state in front of it.
    """

    within: Float[Array, "*chunks time time"]
    since_start: Float[Array, "*chunks time"]
    until_end: Float[Array, "*chunks time"]
    across: Float[Array, "chunk *heads"]


def dot(a: Array, b: Array) -> Array:
    """Matrix product at the highest precision."""
    return jnp.matmul(a, b, precision="highest")


def split(x: Array, chunk: int, fill: float = 0.0) -> Array:
    """`[batch, time, head, ...]` to `[chunk, batch, head, time, ...]`, filled up at the end."""
    batch, time, heads, *rest = x.shape
    widths = [(0, 0), (0, -time % chunk), (0, 0)] + [(0, 0)] * len(rest)
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(batch, -1, chunk, heads, *rest)
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def join(x: Array, time: int) -> Array:
    """The inverse of `split`."""
    x = x.transpose(1, 0, 3, 2, *range(4, x.ndim))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]


def decay_of(forget: Scalars | None, chunks: int, chunk: int, dtype: jnp.dtype) -> Decay:
    """Products of the gates; without gates all are one, and cost nothing."""
    lower = jnp.tril(jnp.ones((chunk, chunk), dtype))
    if forget is None:
        one = jnp.ones(chunk, dtype)
        return Decay(lower, one, one, jnp.ones(chunks, dtype))
    within, since_start = _products(forget)
    return Decay(within, since_start, within[..., -1, :], since_start[..., -1])


@jax.custom_jvp
def _products(forget: Scalars) -> tuple[Array, Scalars]:
    """`Decay.within` and `since_start`, zeta_ts and zeta_t0.

    Products, not differences of logarithms, which would cost all digits of small gates; and their
    derivatives, zeta_ts sum_{s < j <= t} dgamma_j / gamma_j, by sums of what enters them.
    """
    lower = jnp.tril(jnp.ones(forget.shape[-1:] * 2, forget.dtype))
    gates = jnp.where(jnp.tril(lower, -1) > 0, forget[..., None], 1)
    within = lax.cumprod(gates, axis=gates.ndim - 2) * lower
    return within, within[..., :, 0] * forget[..., :1]


@_products.defjvp
def _products_jvp(
    forget: tuple[Scalars], change: tuple[Scalars]
) -> tuple[tuple[Array, Scalars], tuple[Array, Scalars]]:
    within, since_start = _products(*forget)
    rate = (change[0] / forget[0])[..., None]
    lower = jnp.tril(jnp.ones_like(within[0, 0, 0]))
    inside = dot(lower, jnp.where(jnp.tril(lower, -1) > 0, rate, 0))
    changes = within * inside, since_start * dot(lower, rate)[..., 0]
    return (within, since_start), changes


def states(key: Tokens, value: Tokens, decay: Decay) -> Float[Array, "chunk batch head key value"]:
    """S in front of every chunk: S_c = sum_{s before c} zeta k_s v_s^T."""
    added = dot((key * decay.until_end[..., None]).mT, value)

    def step(state: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        product, kept = xs
        return kept[..., None, None] * state + product, state

    return lax.scan(step, jnp.zeros_like(added[0]), (added, decay.across))[1]


def causal(
    query: Tokens, key: Tokens, value: Tokens, before: States, decay: Decay
) -> Float[Array, "chunk batch head time value"]:
    """sum_{s <= t} zeta_ts (q_t . k_s) v_s, with `before` = states(key, value)."""
    carried = dot(query * decay.since_start[..., None], before)
    return carried + dot(dot(query, key.mT) * decay.within, value)


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


class Problem(NamedTuple):
    """H_t = sum_{s <= t} zeta_ts beta_s k_s k_s^T and a ridge, in chunks.

    Attributes:
        key: k_s.
        ridge: the diagonal of the ridge, which does not decay.
        input_gate: beta_s, or None for ones.
        decay: zeta, the products of the forget gates.
        gram: H in front of every chunk.
        root: L^-1 of the Cholesky factor L L^T = H + ridge in front of every chunk.
    """

    key: Tokens
    ridge: Float[Array, "head 1 dim"]
    input_gate: Scalars | None
    decay: Decay
    gram: States
    root: States


def weighted(x: Tokens, input_gate: Scalars | None) -> Tokens:
    """beta_s x_s."""
    return x if input_gate is None else x * input_gate[..., None]


def problem_of(
    key: Tokens,
    ridge: Float[Array, "head 1 dim"],
    input_gate: Scalars | None,
    decay: Decay,
) -> Problem:
    """The systems with these keys; their roots have no derivative."""
    gram = states(key, weighted(key, input_gate), decay)
    fixed, floor = lax.stop_gradient((gram + diagonal(ridge), ridge[:, 0]))
    return Problem(key, ridge, input_gate, decay, gram, inverse_cholesky(fixed, floor))


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
