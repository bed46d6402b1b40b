r"""The layer by orthogonal rotations, in float64: what is taken where float32 has no digits left.

Where keys leave directions open, or repeat, x = (H + ridge)^-1 q is of size q / ridge along them,
and G x has to cancel that: with the condition number kappa of H + ridge all digits beyond
1 / (epsilon kappa) are gone, however well x is solved for. Nothing large is ever formed if the data
themselves are rotated. Rows [sqrt(w_s) k_s | sqrt(w_s) v_s], s <= t, under [sqrt(ridge) | 0] are
brought to

    [R | Z],    R upper triangular,    R^T R = H + ridge,    R^T Z = K^T W V = G^T,

so that o = G R^-1 R^-T q = Z^T u with R^T u = q: components of u may be of size q / sqrt(ridge),
and the rows of Z that meet them are as small, with all their digits. This is least squares by
Givens rotations, a row at a time (Golub and Van Loan 2013, section 6.5.3), whose errors are those
of rounding each pair (k_s, v_s) by itself.

A forget gate g multiplies all rows by sqrt(g), the ridge's too; (1 - g) ridge is added back as
rows of their own. That is an addition: nothing is ever taken away from R^T R.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from constructions.mesa_layer.problem import Scalars, Tokens

Marks = Bool[Array, "chunk batch head time 1"]
Rows = Float[Array, "row *heads column"]


def in_double(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arrays (or None) computed in float64, in and out in the dtype of the first.

    JAX need not be in 64 bit mode: that is entered for this function alone, and for its reverse
    derivative, both of which see no array of another dtype.
    """

    def converted(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: lax.convert_element_type(x, dtype), tree)

    @jax.custom_vjp
    def run(*arrays: Any) -> Any:
        dtype = jax.tree.leaves(arrays)[0].dtype
        with jax.enable_x64(True):
            return converted(function(*converted(arrays, jnp.float64)), dtype)

    def backward(arrays: Any, error: Any) -> Any:
        dtype = jax.tree.leaves(arrays)[0].dtype
        with jax.enable_x64(True):
            _, back = jax.vjp(function, *converted(arrays, jnp.float64))
            return converted(back(converted(error, jnp.float64)), dtype)

    run.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return run


def start(ridge: Float[Array, "head dim"], batch: int, columns: int) -> Rows:
    """[R | Z] = [sqrt(ridge) | 0] in front of the first pair."""
    heads, dim = ridge.shape
    rows = jnp.eye(dim, columns, dtype=ridge.dtype)[:, None, None] * jnp.ones((1, batch, heads, 1))
    return rows * jnp.pad(jnp.sqrt(ridge), ((0, 0), (0, columns - dim)))


def advance(
    rows: Rows,
    query: Float[Array, "*heads dim"],
    key: Float[Array, "*heads dim"],
    value: Float[Array, "*heads value"],
    ridge: Float[Array, "head dim"],
    input_gate: Float[Array, "*heads"] | None,
    forget_gate: Float[Array, "*heads"] | None,
) -> tuple[Rows, Float[Array, "*heads value"]]:
    """[R | Z] with one more pair, and its answer to a query."""
    dim, columns = rows.shape[0], rows.shape[-1]
    new = jnp.concatenate([key, value], -1)[None]
    if input_gate is not None:
        # The root of 0 has no derivative. One of 1e-18 has one with the digits that count, and
        # such a pair is below any ridge of a condition number that float64 can tell from infinity.
        new = new * jnp.sqrt(input_gate + 1e-18)[..., None]
    if forget_gate is not None:
        # behind a barrier, or XLA adds 1 and 1e-18 first
        left = lax.optimization_barrier(1 - forget_gate) + 1e-18
        again = jnp.sqrt(left)[..., None] * start(ridge, 1, columns)
        rows = rows * jnp.sqrt(forget_gate + 1e-40)[..., None]
        new = jnp.concatenate([new, again], 0)

    def eliminate(carry: tuple[Rows, Array], xs: tuple[Array, Array]) -> tuple:
        new, asked = carry
        old, unit = xs
        new = _gathered(new, unit)
        first = new[0]
        pivot, entry = (old * unit).sum(-1, keepdims=True), (first * unit).sum(-1, keepdims=True)
        length = _length(jnp.stack([pivot, entry]))
        cosine, sine = pivot / length, entry / length
        kept = cosine * first - sine * old
        old = cosine * old + sine * first
        share = (asked * unit).sum(-1, keepdims=True) / length
        return (new.at[0].set(kept), asked - share * old), old

    asked = jnp.concatenate([query, jnp.zeros_like(value)], -1)
    units = jnp.eye(dim, columns, dtype=rows.dtype)
    (_, asked), rows = lax.scan(eliminate, (new, asked), (rows, units))
    return rows, -asked[..., dim:]


def _length(entries: Array) -> Array:
    """Root of the sum of squares along the first axis; squares neither overflow nor vanish."""
    largest = lax.stop_gradient(jnp.abs(entries).max(0))
    return largest * jnp.sqrt(((entries / largest) ** 2).sum(0))


def _gathered(new: Rows, unit: Array) -> Rows:
    """Rows reflected so that only the first has an entry in the unit vector's column."""
    if len(new) == 1:
        return new
    entries = (new * unit).sum(-1, keepdims=True)
    some = (entries[1:] != 0).any(0)
    length = _length(jnp.where(some, entries, 1))
    first = entries[0] + jnp.where(entries[0] < 0, -length, length)
    # the vector of the reflection, over its first entry
    mirror = jnp.where(some, entries / jnp.where(some, first, 1), 0).at[0].set(1)
    share = jnp.where(some, jnp.abs(first) / length, 0) * (mirror * new).sum(0)
    return new - mirror * share


@jax.custom_vjp
def by_rotations(
    doubtful: Marks,
    query: Tokens,
    key: Tokens,
    value: Tokens,
    ridge: Float[Array, "head dim"],
    input_gate: Scalars | None,
    forget_gate: Scalars | None,
) -> Tokens:
    """o_t where it is marked, in float64; other entries say nothing. Nothing marked costs nothing.

    Work is dim^2 a token up to the last chunk with a mark, dim^3 with a forget gate.
    """
    wanted = doubtful.any((1, 2, 3, 4)).astype(key.dtype)
    given = (query, key, value, ridge, input_gate, forget_gate)

    def found() -> Tokens:
        with jax.enable_x64(True):
            return outputs(*given, wanted)

    return _if_any(wanted, found, jnp.zeros_like(value))


def _backward(saved: tuple, error: Tokens) -> tuple:
    doubtful, *given = saved
    wanted = doubtful.any((1, 2, 3, 4)).astype(error.dtype)
    error = jnp.where(doubtful, error, 0)

    def gradients() -> tuple:
        with jax.enable_x64(True):
            return jax.vjp(lambda *x: outputs(*x, wanted), *given)[1](error)

    return None, *_if_any(wanted, gradients, jax.tree.map(jnp.zeros_like, tuple(given)))


by_rotations.defvjp(lambda *arrays: (by_rotations(*arrays), arrays), _backward)


def _if_any(wanted: Array, function: Callable[[], Any], otherwise: Any) -> Any:
    """`lax.cond` that skips under `vmap` too: a loop of one turn at most."""

    def once(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        return jnp.zeros_like(carry[0]), function()

    return lax.while_loop(lambda carry: carry[0], once, ((wanted > 0).any(), otherwise))[1]


def outputs(
    query: Array,
    key: Array,
    value: Array,
    ridge: Float[Array, "head dim"],
    input_gate: Array | None,
    forget_gate: Array | None,
    wanted: Float[Array, " chunk"],
) -> Array:
    """o_t of chunks up to the last that is wanted (not 0), `[chunk, batch, head, time, value]`.

    In 64 bit mode: it computes in float64, one chunk of whose arrays exist at a time.
    """
    needed = lax.cummax(wanted, reverse=True)
    ridge = ridge.astype(jnp.float64)

    def token(rows: Rows, xs: tuple[Array | None, ...]) -> tuple[Rows, Array]:
        q, k, v, beta, gamma = xs
        return advance(rows, q, k, v, ridge, beta, gamma)

    def chunk(rows: Rows, xs: tuple[Any, Array]) -> tuple[Rows, Array]:
        tokens, wanted = xs
        tokens = jax.tree.map(lambda x: jnp.moveaxis(x.astype(jnp.float64), 2, 0), tokens)

        def run(rows: Rows) -> tuple[Rows, Array]:
            rows, found = lax.scan(jax.checkpoint(token), rows, tokens)
            return rows, jnp.moveaxis(found, 0, 2).astype(value.dtype)

        def skip(rows: Rows) -> tuple[Rows, Array]:
            return rows, jnp.zeros(value.shape[1:], value.dtype)

        return lax.cond(wanted > 0, run, skip, rows)

    begin = start(ridge, key.shape[1], key.shape[-1] + value.shape[-1])
    xs = ((query, key, value, input_gate, forget_gate), needed)
    return lax.scan(jax.checkpoint(chunk), begin, xs)[1]
