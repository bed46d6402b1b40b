"""The mesa layer one token at a time: what a decoder keeps, at constant cost a token."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from constructions.mesa_layer.arguments import at_least, checked, floating, ridge_of
from constructions.mesa_layer.orthogonal import advance, in_double, start


class MesaState(NamedTuple):
    """All that the tokens so far leave behind, to the digits of float64 in pairs of arrays.

    Attributes:
        root: R, upper triangular, with R^T R = H + ridge and H = sum zeta beta k k^T.
        moment: Z with R^T Z = sum zeta beta k v^T (see `orthogonal`).
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
        at_least(name, size, 1)
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

    It computes in float64, whatever the tokens' dtype, by rotations (see `orthogonal`): dim^2 work
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
    query, key, value, ridge, beta, gamma = checked(
        query, key, value, regularization, input_gate, forget_gate, ("batch", "head")
    )
    fits = (*key.shape, value.shape[-1])
    if state.moment.shape != fits:
        raise ValueError(f"state is of shape {state.moment.shape}, these tokens are of {fits}")
    state, output = _step(state, query, key, value, ridge, beta, gamma)
    return state, output.astype(dtype)


@jax.jit
@in_double
def _step(
    state: MesaState,
    query: Array,
    key: Array,
    value: Array,
    ridge: Array,
    beta: Array | None,
    gamma: Array | None,
) -> tuple[MesaState, Array]:
    rows = jnp.concatenate(
        [state.root + state.root_rest, state.moment + state.moment_rest], axis=-1
    )
    rows, output = advance(jnp.moveaxis(rows, 2, 0), query, key, value, ridge, beta, gamma)
    return _packed(rows), output


def _start(batch: int, value_dim: int, ridge: Array) -> MesaState:
    return _packed(start(ridge, batch, ridge.shape[-1] + value_dim))


def _packed(rows: Array) -> MesaState:
    """Rows [R | Z] as float32 and what it leaves."""
    rows = jnp.moveaxis(rows, 0, 2)
    dim = rows.shape[2]
    rounded = rows.astype(jnp.float32).astype(rows.dtype)
    rest = rows - rounded
    return MesaState(rounded[..., :dim], rounded[..., dim:], rest[..., :dim], rest[..., dim:])
