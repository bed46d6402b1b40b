"""The mesa layer one token at a time: what a decoder keeps, at constant cost a token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from constructions.mesa_mixer.arguments import at_least, checked, floating, ridge_of
from constructions.mesa_mixer.recursive import absorb, apply, outer, refactor, solve_once


class MesaState(NamedTuple):
    """All that the tokens so far leave behind.

    Attributes:
        gram: H = sum zeta beta k k^T.
        moment: sum zeta beta k v^T.
        root: U with U U^T = (H + ridge)^-1.
    """

    gram: Float[Array, "batch head dim dim"]
    moment: Float[Array, "batch head dim value"]
    root: Float[Array, "batch head dim dim"]


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
    zero = jnp.zeros((batch, heads, dim, dim), ridge.dtype)
    moment = jnp.zeros((batch, heads, dim, value_dim), ridge.dtype)
    return MesaState(zero, moment, zero + outer(1 / jnp.sqrt(ridge), jnp.ones(dim)) * jnp.eye(dim))


def mesa_step(
    state: MesaState,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    regularization: ArrayLike,
    *,
    input_gate: ArrayLike | None = None,
    forget_gate: ArrayLike | None = None,
    refinements: int = 1,
) -> tuple[MesaState, Array]:
    """Take in the pair (k, v), answer the query: `mesa` at its newest time, less its safeguard.

    Where keys repeat or differ much in size, so that the condition number of H + ridge is beyond
    1 / epsilon, digits are lost that `mesa` solves for again: in float32 the output keeps five of
    them at a condition of 1e8, one or two at 1e10, none at 1e12.

    Without a forget gate the work is dim^2, by an update of the root that is exact (see
    `recursive`); with one, dim^3, by a new Cholesky factor. Steps of both kinds may follow each
    other.

    Args:
        state: from `mesa_start` or the step before.
        query: `[batch, head, dim]`.
        key: `[batch, head, dim]`.
        value: `[batch, head, value_dim]`.
        regularization: as in `mesa_start`, and the same at every step.
        input_gate: `[batch, head]`, at least 0; ones if not given.
        forget_gate: `[batch, head]`, in (0, 1]; ones if not given.
        refinements: as in `mesa`.

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
    at_least("refinements", refinements, 0)
    state, output = _step(state, query, key, value, ridge, beta, gamma, refinements)
    return state, output.astype(dtype)


@jax.jit(static_argnames="refinements")
def _step(
    state: MesaState,
    query: Array,
    key: Array,
    value: Array,
    ridge: Array,
    beta: Array | None,
    gamma: Array | None,
    refinements: int,
) -> tuple[MesaState, Array]:
    gram, moment, root = state
    if gamma is not None:
        gram, moment = (gamma[..., None, None] * x for x in (gram, moment))
    weight = key if beta is None else beta[..., None] * key
    gram = gram + outer(weight, key)
    moment = moment + outer(weight, value)
    root = absorb(root, key, beta) if gamma is None else refactor(gram, ridge)
    solution = solve_once(gram, root, ridge, query, refinements)
    return MesaState(gram, moment, root), apply(moment.mT, solution)
