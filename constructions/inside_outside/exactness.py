"""Whether a floating point type holds what the construction computes of a sentence.

The construction keeps every value in one unit a word (`InsideOutside.factors`), since a linear
layer cannot rescale what it reads. In float32 a value below 2^-126 is then lost, and one above
2^128 is infinite. Which losses matter is decided by running the recursions twice:

    lower   as they are
    upper   with `delta` added to every value, more than all losses behind it can amount to

All numbers are sums of products of numbers that are not negative, so that both runs are monotone
and the true value lies between them: where lower and upper agree, nothing was lost. A third run, of
zeros and ones, says what is 0 by the grammar and not by the type; there, nothing is added. Of a
`LowRank` reduction, whose numbers have signs, both runs take absolute values, and their difference
bounds the loss of the signed run: |p(x + d) - p(x)| <= P(|x| + |d|) - P(|x|) for a polynomial p and
the one P that has the absolute values of its coefficients.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

#: Relative error of a probability beyond which it counts as lost; rounding comes on top.
LOST = 2e-5
#: Probabilities below this are right to `LOST` of this, not of themselves.
SMALL = 1e-10
#: Sentences looked at in one go.
AT_ONCE = 64


class Exactness(NamedTuple):
    """What a type holds of every sentence, `[batch]` each; what is undefined counts as held.

    Attributes:
        posterior: every probability of the word posterior.
        marginals: those of spans and tags.
    """

    posterior: Bool[Array, " batch"]
    marginals: Bool[Array, " batch"]


@jax.jit
def exactness(
    root: Float[Array, " symbols"],
    rules: Float[Array, "inner symbols symbols"],
    leaves: Float[Array, "batch time preterminals"],
    emission: Float[Array, "preterminals words"],
    lengths: Array,
) -> Exactness:
    """Of sentences whose words have the inside values `leaves`, in the type of the arrays.

    Args:
        root, rules: of the grammar, or of what a reduction passes on.
        leaves: beta(i, i) in units of the construction, 0 behind the end.
        emission: what the word posterior is read with.
        lengths: `[batch]`.
    """
    root, rules, emission = jnp.abs(root), jnp.abs(rules), jnp.abs(emission)
    batch = len(leaves)
    size = min(batch, AT_ONCE)
    runs = -(-batch // size)
    more = runs * size - batch  # the last run is filled up with sentences of no words
    leaves = jnp.pad(leaves, ((0, more), (0, 0), (0, 0))).reshape(runs, size, *leaves.shape[1:])
    lengths = jnp.pad(lengths, (0, more)).reshape(runs, size)
    several = jax.vmap(partial(_sentence, root, rules, emission))
    found = lax.map(lambda given: several(*given), (leaves, lengths))
    return Exactness(*(a.reshape(-1)[:batch] for a in found))


def _sentence(
    root: Array, rules: Array, emission: Array, leaves: Array, length: Array
) -> Exactness:
    time, inner, dtype = len(leaves), len(rules), leaves.dtype
    symbols, tiny = rules.shape[1], float(jnp.finfo(dtype).tiny)
    # Every sum has at most so many products, of at most two factors behind a rule.
    delta = tiny * 4 * symbols**2 * (time + 1) * jnp.maximum(rules.sum((1, 2)).max(initial=0), 1)
    weights = jnp.stack([(rules > 0).astype(dtype), rules, rules])
    tops = jnp.stack([(root > 0).astype(dtype), root, root])
    extra = jnp.array([0, 0, 1], dtype) * delta

    def settle(values: Array, loss: Array, there: Array) -> Array:
        """Values of three runs `[3, token, symbol]`, the losses added and zeros kept."""
        possible = (values[:1] > 0) & there[:, None]
        first = possible.astype(dtype)
        return jnp.where(possible, jnp.concatenate([first, (values + loss)[1:]]), 0)

    def losses(*factors: Array) -> Array:
        """`[3, token, 1]`: what rounding to 0 takes away, with these factors `[m, 3, token, x]`."""
        size = 1 + sum(f.sum((0, -1)) for f in factors)
        return (extra[:, None] * size)[..., None]

    place = jnp.arange(time)
    leaf = jnp.stack([(leaves != 0).astype(dtype), jnp.abs(leaves), jnp.abs(leaves)])
    leaf = jnp.pad(leaf, ((0, 0), (0, 0), (inner, 0)))
    leaf = settle(leaf, jnp.zeros((3, time, 1), dtype), place < length)
    # [width, run, token, symbol], by first and by last word; width 0 and beyond the last are 0
    beta = jnp.zeros((time + 2, *leaf.shape), dtype).at[1].set(leaf)
    m = jnp.arange(1, time + 1)

    def shift(table: Array, by: Array | int) -> Array:
        """The values `by` tokens later, 0 where there is none."""
        wide = jnp.pad(table, ((0, 0), (0, 0), (time, time), (0, 0)))
        return lax.dynamic_slice_in_dim(wide, time + by, time, 2)

    def widen(tables: tuple[Array, Array], n: Array) -> tuple[tuple[Array, Array], None]:
        start, end = tables
        left = jnp.where((m < n)[:, None, None, None], start[m], 0)
        right = shift(end[jnp.clip(n - m, 0)], n - 1)
        values = _apply("raxy,rtxy->rta", weights, _pairs(left, right))
        values = settle(values, losses(left, right), place + n <= length)
        values = jnp.pad(values, ((0, 0), (0, 0), (0, symbols - inner)))
        back = shift(values[None], 1 - n)[0]
        return (start.at[n].set(values), end.at[n].set(back)), None

    (start, end), _ = lax.scan(widen, (beta, beta), jnp.arange(2, time + 1))

    def narrow(tables: tuple[Array, Array], n: Array) -> tuple[tuple[Array, Array], None]:
        out_start, out_end = tables
        wider = jnp.minimum(n + m, time + 1)  # the last is 0
        above, beside = out_start[wider][..., :inner], shift(start[m], n)
        values = _apply("raxy,rtay->rtx", weights, _pairs(above, beside))
        loss = losses(above, beside)
        above, beside = shift(out_end[wider][..., :inner], n - 1), shift(end[m], -1)
        values += _apply("raxy,rtax->rty", weights, _pairs(above, beside))
        whole = (place == 0) & (length == n)
        values = jnp.where(whole[:, None], tops[:, None], values)
        values = jnp.where((jnp.arange(symbols) < inner) == (n > 1), values, 0)
        values = settle(values, loss + losses(above, beside), place + n <= length)
        back = shift(values[None], 1 - n)[0]
        return (out_start.at[n].set(values), out_end.at[n].set(back)), None

    alpha = jnp.zeros_like(beta)
    (outside, _), _ = lax.scan(narrow, (alpha, alpha), jnp.arange(1, time + 1), reverse=True)

    def right(lower: Array, upper: Array, total: Array) -> Array:
        """Whether the share of a total is right; False where it is not a number."""
        return jnp.all(upper - lower <= LOST * jnp.maximum(lower, SMALL * total))

    around = outside[1, :, :, inner:]
    words = jnp.einsum("rtx,xw->rtw", around, emission, precision="highest")
    possible = (words[0] > 0).any(-1)
    totals = words.sum(-1)
    fine = right(words[1], words[2], totals[1][:, None])
    # a total so small that its inverse, or a share of it, is none
    fine &= jnp.all(~possible | ((totals[1] > tiny) & jnp.isfinite(totals[2])))
    products = outside * start
    z = products[1, 1].sum(-1)  # at every word
    parsed = (products[1, 0, 0] > 0).any()
    known = right(products[:, 1], products[:, 2] + delta * (products[:, 0] > 0), z.max())
    known &= jnp.all((place >= length) | (z > tiny)) & jnp.isfinite(z.max())
    return Exactness(fine, known | ~parsed)


def _pairs(left: Array, right: Array) -> Array:
    """Products over all splits, `[run, token, x, y]` of two `[m, run, token, symbol]`."""
    return jnp.einsum("mrtx,mrty->rtxy", left, right, precision="highest")


def _apply(equation: str, rules: Array, pairs: Array) -> Array:
    return jnp.einsum(equation, rules, pairs, precision="highest")
