"""Attention that chooses has little gradient: what value-only attention drops, and a bound on it.

With weights a_ij of head h, c_ij = <dy_i, v_j> and keys j <= i, the gradient of a query is

    dq_i  =  sum_j a_ij (c_ij - sum_l a_il c_il) k_j / sqrt d.

Let eps_i = 1 - max_j a_ij, m be where the maximum is, and R_i = max_j c_ij - min_j c_ij. The mean
of c_i with weights a is within eps_i R_i of c_im, and the other weights sum to eps_i, so that

    |dq_i|  <=  (a_im eps_i + eps_i) R_i max_j |k_j| / sqrt d  <=  2 eps_i R_i max_j |k_j| / sqrt d.

Panigrahi et al. 2023 (arXiv 2307.01189) stop the gradient here, and argue with heads that are hard.
The bound is ours. Everything is read from the tape of an exact simulator.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from constructions.evaluator import evaluate
from constructions.tint.construction import Tint
from constructions.tint.contents import contents
from constructions.tint.layout import TEXT
from constructions.tint.weights import Weights

_READ = ("query", "key", "value", "d mixed", "d query")


class Hardness(NamedTuple):
    """Of every query of every head, `[sequence, layer, head, position]` each.

    Attributes:
        softness: eps, 1 less the largest weight of attention.
        dropped: |dq|, what value-only attention does not send back.
        bound: on `dropped`.
    """

    softness: Float[Array, "sequence layer head position"]
    dropped: Float[Array, "sequence layer head position"]
    bound: Float[Array, "sequence layer head position"]


def hardness(c: Tint, tokens: Array, train: Array, weights: Weights | None = None) -> Hardness:
    """How hard attention is, and the gradient of its queries, in the first pass.

    Args:
        c: a simulator all of whose parts are exact.
        tokens, train: sequences, and where they are trained on.
        weights: of the auxiliary model, in the place of those of `c` and of their shapes.

    Raises:
        ValueError: a part of the simulator goes back in another way.
    """
    for part in ("attention", "norm", "activation"):
        if getattr(c.back, part) != "exact":
            raise ValueError(f"{part} is {getattr(c.back, part)!r}, must be 'exact'")
    c.check(tokens, train)
    q, k, v, dy, dq = _tape(c, c.weights if weights is None else weights, tokens, train)
    scale, time = q.shape[-1] ** -0.5, q.shape[-2]
    seen = jnp.tril(jnp.ones((time, time), bool))
    times = partial(jnp.einsum, "...id,...jd->...ij", precision="highest")
    a = jax.nn.softmax(jnp.where(seen, scale * times(q, k), -jnp.inf))
    each = times(dy, v)
    spread = each.max(-1, where=seen, initial=-jnp.inf) - each.min(-1, where=seen, initial=jnp.inf)
    longest = jax.lax.cummax(jnp.linalg.norm(k, axis=-1), 3)
    # 1 - max a loses its digits where attention is hard, the sum of the others does not
    top = jnp.arange(time) == a.argmax(-1)[..., None]
    softness = jnp.where(top, 0, a).sum(-1)
    return Hardness(softness, jnp.linalg.norm(dq, axis=-1), 2 * scale * softness * spread * longest)


@partial(jax.jit, static_argnums=0)
def _tape(
    c: Tint, weights: Weights, tokens: Array, train: Array
) -> tuple[Float[Array, "sequence layer head position row"], ...]:
    """What the first pass and its way back keep of attention, in the order of `_READ`."""
    time, text = tokens.shape[1], c.layout.tokens(TEXT, tokens.shape[1])
    out = evaluate(c.program, contents(c.layout, weights, tokens, train), c.layout.kinds(time))

    def read(name: str) -> Array:
        slots = [f"pass 0, layer {n}: {name}" for n in range(c.shape.layers)]
        found = jnp.stack([out[slot][:, text.start : text.stop] for slot in slots], 1)
        return jnp.moveaxis(found.reshape(*found.shape[:-1], c.shape.heads, -1), 2, 3)

    return tuple(read(name) for name in _READ)
