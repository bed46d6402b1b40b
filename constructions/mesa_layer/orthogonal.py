r"""The layer by rotations of the data, in float64: for ill-conditioned times, and for decoding.

Where keys leave directions open, or repeat, x = (H + ridge)^-1 q is of size q / ridge along them,
and G x has to cancel that: with the condition number kappa of H + ridge all digits beyond
1 / (epsilon kappa) are gone, however well x is solved for. Nothing large is ever formed if the data
themselves are rotated. Rows (k_s, v_s) of weights w_s, s <= t, under (unit vector i, 0) of weights
ridge_i are brought to

    [U | Z],    U unit upper triangular, of weights D:    U^T D U = H + ridge,    U^T D Z = G^T,

so that o = G (H + ridge)^-1 q = Z^T y with U^T y = q. This is least squares by Givens rotations, a
row at a time, in the form that needs no square root (Gentleman 1973; Golub and Van Loan 2013,
section 6.5): where a row x of weight w meets row i, u of weight d, with a = x_i,

    d' = d + w a^2,   u' = (d u + w a x) / d',   x' = x - a u,   w' = w d / d'.

Errors are those of rounding each pair by itself. Weights enter as they are, not by their roots, so
a gate of 0 or 1 has a derivative like any other. Nothing is ever taken away from U^T D U: a forget
gate g multiplies all weights, the ridge's too, and (1 - g) ridge is added back as further rows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float

from constructions.mesa_layer.problem import Given, Tokens, checked, floating, ridge_of
from synthetic.guards import number

Marks = Bool[Array, "chunk batch head time 1"]
Rows = Float[Array, "row *heads column"]
RANGE = 2.0**200  # sizes up to here, and down to the inverse, overflow in no product of three
SMALL = 2.0**-40  # of a forget gate: less, and the ridge is the heavier part


def in_double(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arrays (or None) computed in float64, in and out in the dtype of the first.

    JAX need not be in 64 bit mode: that is entered for this function alone.
    """

    def converted(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: lax.convert_element_type(x, dtype), tree)

    def run(*arrays: Any) -> Any:
        dtype = jax.tree.leaves(arrays)[0].dtype
        with jax.enable_x64(True):
            return converted(function(*converted(arrays, jnp.float64)), dtype)

    return run


def start(ridge: Float[Array, "head dim"], batch: int, columns: int) -> Rows:
    """[U | Z] = [I | 0] in front of the first pair, with D = ridge in place of U's diagonal."""
    heads, dim = ridge.shape
    units = jnp.eye(dim, columns, dtype=ridge.dtype)[:, None, None]
    return jnp.broadcast_to(units * ridge.T[:, None, :, None], (dim, batch, heads, columns))


def advance(rows: Rows, given: Given) -> tuple[Rows, Float[Array, "*heads value"]]:
    """[U | Z] with one more pair, and its answer to a query; each `[*heads, dim]`, one token."""
    query, key, value, ridge, input_gate, forget_gate = given
    dim, columns = rows.shape[0], rows.shape[-1]
    units = jnp.eye(dim, columns, dtype=rows.dtype)
    pair = jnp.concatenate([key, value], -1)
    pair = jnp.where(jnp.abs(pair) <= RANGE, pair, jnp.nan)
    weight = jnp.ones_like(pair[..., :1]) if input_gate is None else input_gate[..., None]
    more = None
    if forget_gate is not None:
        rows, more = _forgotten(rows, forget_gate[..., None], ridge, units)

    def eliminate(carry: tuple, xs: tuple[Array, Array]) -> tuple:
        pair, weight, more, asked = carry
        row, unit = xs
        d, u = (row * unit).sum(-1, keepdims=True), jnp.where(unit > 0, 1, row)
        if more is not None:
            d, u, more = _absorbed(d, u, more, unit)
        a = (pair * unit).sum(-1, keepdims=True)
        new = d + weight * a**2
        pair, u = pair - a * u, (d * u + weight * a * pair) / new
        asked = asked - (asked * unit).sum(-1, keepdims=True) * u
        return (pair, weight * (d / new), more, asked), jnp.where(unit > 0, new, u)

    asked = jnp.concatenate([query, jnp.zeros_like(value)], -1)
    (*_, asked), rows = lax.scan(eliminate, (pair, weight, more, asked), (rows, units))
    return rows, -asked[..., dim:]


def _forgotten(
    rows: Rows, gate: Float[Array, "*heads 1"], ridge: Float[Array, "head dim"], units: Array
) -> tuple[Rows, tuple[Array, Rows]]:
    """Rows of g D and of (1 - g) ridge: one kind as [U | Z], the other as weights and rows to add.

    The heavier kind comes first: that is the ridge where the gate is as good as closed, and there
    the rotation of rows whose weight is 0 would have no derivative.
    """
    units = units[:, None, None]
    weights = (rows * units).sum(-1, keepdims=True)
    old = jnp.where(units > 0, 1, rows), gate * weights
    again = units * jnp.ones_like(rows), (1 - gate) * ridge.T[:, None, :, None]
    closed = gate < SMALL
    first, weight = (jnp.where(closed, b, a) for a, b in zip(old, again, strict=True))
    more, more_weight = (jnp.where(closed, a, b) for a, b in zip(old, again, strict=True))
    return jnp.where(units > 0, weight, first), (more_weight, more)


def _absorbed(
    d: Array, u: Array, rows: tuple[Array, Rows], unit: Array
) -> tuple[Array, Array, tuple[Array, Rows]]:
    """Many rows X at once, of weights W, which they keep: with a = X e_i and a^T W a = d' - d,

        u' = (d u + X^T W a) / d',   X' = (I - a a^T W / (d' + sqrt(d d'))) (X - a u^T).

    X'^T W X' + d' u' u'^T = X^T W X + d u u^T, since the first factor squares, in the metric W, to
    I - a a^T W / d' (Potter). It is for weights that are light beside d: of heavier ones it would
    leave rounding errors where a rotation leaves little.
    """
    weights, more = rows
    a = (more * unit).sum(-1, keepdims=True)
    part = weights * a
    new = d + (part * a).sum(0)
    rest = more - a * u
    shared = (part * rest).sum(0) / (new + jnp.sqrt(d * new))
    return new, (d * u + (part * more).sum(0)) / new, (weights, rest - a * shared)


@custom_vmap
def _anywhere(marks: Bool[Array, " chunk"]) -> Bool[Array, " chunk"]:
    """The same; under `vmap` in any of its instances, so that a `cond` on it stays one."""
    return marks


@_anywhere.def_vmap
def _(size: int, batched: list[bool], marks: Array) -> tuple[Array, bool]:
    del size, batched
    return _anywhere(marks.any(0)), False


def by_rotations(doubtful: Marks, output: Tokens, given: Given) -> Tokens:
    """The output, and where it is marked o_t computed anew, in float64; next to free without marks.

    Work is dim^2 a token up to the last chunk with a mark, dim^3 with a forget gate; the float64
    arrays of one chunk exist at a time. The output passes through, rather than being chosen from
    afterwards, so that in the backward pass what was kept here is done with before the rest begins.
    """
    # No `cond` around the whole: what it keeps for the backward pass it copies, taken or not.
    wanted = _anywhere(doubtful.any((1, 2, 3, 4)))
    needed = lax.cummax(wanted.astype(jnp.int32), reverse=True)
    with jax.enable_x64(True):
        wide = jnp.maximum(given.ridge.astype(jnp.float64), 1 / RANGE)

        def token(rows: Rows, xs: tuple[Any, ...]) -> tuple[Rows, Array]:
            q, k, v, beta, gamma = xs
            return advance(rows, Given(q, k, v, wide, beta, gamma))

        def chunk(rows: Rows, xs: tuple[Any, ...]) -> tuple[Rows, Array]:
            tokens, output, doubtful, _ = xs
            tokens = jax.tree.map(lambda x: jnp.moveaxis(x.astype(jnp.float64), 2, 0), tokens)
            rows, found = scan_in_groups(token, rows, tokens)
            found = jnp.moveaxis(found, 0, 2).astype(output.dtype)
            return rows, jnp.where(doubtful, found, output)

        def where_needed(step: Callable) -> Callable:
            """The step for chunks, or groups of them, one of which is needed; others pass."""

            def guarded(rows: Rows, xs: tuple[Any, ...]) -> tuple[Rows, Array]:
                return lax.cond(
                    (xs[-1] > 0).any(),
                    jax.checkpoint(step),
                    lambda rows, xs: (rows, xs[1]),
                    rows,
                    xs,
                )

            return guarded

        columns = given.key.shape[-1] + given.value.shape[-1]
        begin = start(wide, given.key.shape[1], columns)
        tokens = (*given[:3], *given[4:])
        xs = (tokens, output, doubtful, needed)
        return scan_in_groups(chunk, begin, xs, where_needed)[1]


def scan_in_groups(
    step: Callable, carry: Any, xs: Any, around: Callable[[Callable], Callable] = lambda f: f
) -> tuple[Any, Any]:
    """`lax.scan` whose backward pass keeps about 2 sqrt(n) carries of n, and computes two anew.

    What is `around` the step is around a group of steps as well.
    """
    length = len(jax.tree.leaves(xs)[0])
    group = max(n for n in range(1, math.isqrt(2 * length) + 1) if length % n == 0)
    grouped = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), xs)
    inner = jax.checkpoint(around(step))
    outer = jax.checkpoint(around(lambda carry, xs: lax.scan(inner, carry, xs)))
    carry, ys = lax.scan(outer, carry, grouped)
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


class MesaState(NamedTuple):
    """All that the tokens so far leave behind, to the digits of float64 in pairs of arrays.

    Attributes:
        root: R = D^(1/2) U, upper triangular, R^T R = H + ridge with H = sum zeta beta k k^T.
        moment: D^(1/2) Z, whose product with R^T is sum zeta beta k v^T.
        root_rest: what rounding has left of R in float32; in float64 the same, as its pair.
        moment_rest: the same of Z.
    """

    root: Float[Array, "batch head dim dim"]
    moment: Float[Array, "batch head dim value"]
    root_rest: Float[Array, "batch head dim dim"]
    moment_rest: Float[Array, "batch head dim value"]


def mesa_start(
    batch: int, dim: int, value_dim: int, regularization: ArrayLike, dtype: DTypeLike | None = None
) -> MesaState:
    """The state in front of the first token, in `dtype` or that of the regularization.

    Raises:
        ValueError: a size is no integer of at least 1, the dtype is not floating, or the
            regularization is not `[head]` or `[head, dim]`, positive and finite.
    """
    for name, size in (("batch", batch), ("dim", dim), ("value_dim", value_dim)):
        number(name, size, whole=True, least=1)
    ridge = jnp.asarray(regularization)
    if not ridge.ndim or not ridge.size:
        raise ValueError(f"regularization has shape {ridge.shape}, must be [head] or [head, dim]")
    floating("regularization", ridge.dtype)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {jnp.dtype(dtype)}, must be floating")
    heads = ridge.shape[0]
    ridge = ridge_of(ridge, heads, dim)
    ridge = ridge.astype(jnp.promote_types(dtype or ridge.dtype, jnp.float32))
    return in_double(partial(_start, batch, value_dim))(ridge)


def mesa_step(
    state: MesaState,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    regularization: ArrayLike,
    *,
    input_gate: ArrayLike | None = None,
    forget_gate: ArrayLike | None = None,
) -> tuple[MesaState, Array]:
    """Take in the pair (k, v), answer the query: `mesa` at its newest time, as exact.

    It computes in float64, whatever the tokens' dtype, by rotations of the data: dim^2 work
    without a forget gate, dim^3 with one. Steps of both kinds may follow each other.

    Args:
        state: from `mesa_start` or the step before.
        query: `[batch, head, dim]`.
        key: `[batch, head, dim]`.
        value: `[batch, head, value_dim]`.
        regularization: as in `mesa_start`, and the same at every step.
        input_gate: `[batch, head]`, at least 0; ones if not given.
        forget_gate: `[batch, head]`, in (0, 1]; ones if not given.

    Returns:
        The new state and the output, `[batch, head, value_dim]`, in the dtype that query, key and
        value promote to.

    Raises:
        ValueError: as `mesa`, and where the tokens do not fit the state.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    dtype = jnp.result_type(query, key, value)
    axes = ("batch", "head")
    given = checked(query, key, value, regularization, input_gate, forget_gate, axes)
    fits = (*given.key.shape, given.value.shape[-1])
    if state.moment.shape != fits:
        raise ValueError(f"state is of shape {state.moment.shape}, these tokens are of {fits}")
    state, output = _step(state, given)
    return state, output.astype(dtype)


@jax.jit
@in_double
def _step(state: MesaState, given: Given) -> tuple[MesaState, Array]:
    rows = jnp.concatenate(
        [state.root + state.root_rest, state.moment + state.moment_rest], axis=-1
    )
    diagonal = jnp.eye(rows.shape[2], rows.shape[3]) > 0
    scale = jnp.where(diagonal, rows, 0).sum(-1, keepdims=True)
    rows = jnp.where(diagonal, scale**2, rows / scale)
    given = given._replace(ridge=jnp.maximum(given.ridge, 1 / RANGE))
    rows, output = advance(jnp.moveaxis(rows, 2, 0), given)
    return _packed(rows), output


def _start(batch: int, value_dim: int, ridge: Array) -> MesaState:
    ridge = jnp.maximum(ridge, 1 / RANGE)
    return _packed(start(ridge, batch, ridge.shape[-1] + value_dim))


def _packed(rows: Array) -> MesaState:
    """Rows of roots of D, [R | Z] = D^(1/2) [U | Z], as float32 and what it leaves."""
    rows = jnp.moveaxis(rows, 0, 2)
    diagonal = jnp.eye(rows.shape[2], rows.shape[3]) > 0
    scale = jnp.sqrt(jnp.where(diagonal, rows, 0).sum(-1, keepdims=True))
    rows = scale * jnp.where(diagonal, 1, rows)
    dim = rows.shape[2]
    rounded = rows.astype(jnp.float32).astype(rows.dtype)
    rest = rows - rounded
    return MesaState(rounded[..., :dim], rounded[..., dim:], rest[..., :dim], rest[..., dim:])
