"""Token mixers: how scores between tokens become the weights of an average.

A mixer maps scores `[..., query, key]` and a mask of the same shape (True where a query may look)
to attention weights a_ij; the head's output is sum_j a_ij v_j. A query that may look nowhere gets
zero. A mesa head is a linear one whose queries were multiplied by the inverse Gram matrix of the
keys so far, `constructions.mesa_mixer`. A transposed mixer normalises over queries and so needs all
of them. New mixers are added to `MIXERS` under their field's name.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from constructions.mesa_mixer import mesa

Scores = Float[Array, "*batch query key"]
Mask = Bool[Array, "*#batch query key"]


def linear(scores: Scores, mask: Mask) -> Scores:
    """a_ij = s_ij: linear attention, softmax attention without the softmax."""
    return jnp.where(mask, scores, 0)


def centred(scores: Scores, mask: Mask) -> Scores:
    """a_ij = s_ij - mean_j s_ij: what two softmax heads with scores +-eps s give to first order.

    von Oswald et al. 2022 (arXiv 2212.07677), appendix A.9.
    """
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    mean = jnp.where(mask, scores, 0).sum(-1, keepdims=True) / count
    return jnp.where(mask, scores - mean, 0)


def softmax(scores: Scores, mask: Mask) -> Scores:
    """a_ij = exp(s_ij) / sum_j exp(s_ij) over the keys in the mask."""
    # jax.nn.softmax(where=mask) returns NaN for a query without keys
    fixed = jax.lax.stop_gradient(scores)
    highest = jnp.max(fixed, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    shift = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - shift, 0)), 0)
    # 1 in the place of an empty sum, not a tiny number: derivatives divide by its square
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def transposed_softmax(scores: Scores, mask: Mask) -> Scores:
    """a_ij = exp(s_ij) / sum_i exp(s_ij) over the queries that may look at key j.

    With the roles of queries and keys of a softmax head exchanged it has that head's weights,
    transposed: what a gradient takes to go back along attention.
    """
    swapped = softmax(jnp.swapaxes(scores, -1, -2), jnp.swapaxes(mask, -1, -2))
    return jnp.swapaxes(swapped, -1, -2)


__all__ = ["MIXERS", "TRANSPOSED", "centred", "linear", "mesa", "softmax", "transposed_softmax"]

MIXERS: dict[str, Callable[[Scores, Mask], Scores]] = {
    "linear": linear,
    "centred": centred,
    "softmax": softmax,
    "mesa": linear,
    "transposed_softmax": transposed_softmax,
}

#: Mixers that normalise over queries: all of them are computed, whichever are read.
TRANSPOSED = ("transposed_softmax",)
