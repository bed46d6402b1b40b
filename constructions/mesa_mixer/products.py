"""Causal sums with forgetting, chunk by chunk: gated linear attention and its transpose.

Arrays are cut into chunks, `[chunk, batch, head, time, dim]` with `time` the place in the chunk:
what crosses chunks is one matrix a chunk, what stays inside is a masked product of matrices.
Yang et al. 2024 (arXiv 2312.06635), section 4. Every product is at the highest precision: with TF32
a Gram matrix of this kind need not be positive definite.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

Tokens = Float[Array, "chunk batch head time _"]
Scalars = Float[Array, "chunk batch head time"]
States = Float[Array, "chunk batch head _ _"]


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
    # Products, not differences of logarithms: small gates would cost all digits.
    gates = jnp.where(jnp.tril(lower, -1) > 0, forget[..., None], 1)
    within = lax.cumprod(gates, axis=gates.ndim - 2) * lower
    since_start = within[..., :, 0] * forget[..., :1]
    return Decay(within, since_start, within[..., -1, :], since_start[..., -1])


def states(
    key: Tokens, value: Tokens, decay: Decay, reverse: bool = False
) -> Float[Array, "chunk batch head key value"]:
    """S in front of every chunk: S_c = sum_{s before c} zeta k_s v_s^T.

    With `reverse` the sum of the tokens behind every chunk, zeta_ts k_t v_t^T over t after c, as
    the last token of the chunk sees it.
    """
    weight = decay.since_start if reverse else decay.until_end
    added = dot((key * weight[..., None]).mT, value)

    def step(state: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        product, kept = xs
        return kept[..., None, None] * state + product, state

    return lax.scan(step, jnp.zeros_like(added[0]), (added, decay.across), reverse=reverse)[1]


def causal(
    query: Tokens, key: Tokens, value: Tokens, before: States, decay: Decay
) -> Float[Array, "chunk batch head time value"]:
    """sum_{s <= t} zeta_ts (q_t . k_s) v_s, with `before` = states(key, value)."""
    carried = dot(query * decay.since_start[..., None], before)
    return carried + dot(dot(query, key.mT) * decay.within, value)


def anticausal(
    query: Tokens, key: Tokens, value: Tokens, after: States, decay: Decay
) -> Float[Array, "chunk batch head time value"]:
    """sum_{t >= s} zeta_ts (q_s . k_t) v_t, with `after` = states(key, value, reverse=True)."""
    carried = dot(query * decay.until_end[..., None], after)
    return carried + dot(dot(query, key.mT) * decay.within.mT, value)
