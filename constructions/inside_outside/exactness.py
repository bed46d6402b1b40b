"""Whether a floating point type holds what the construction computes of a sentence.

The construction keeps every value in one unit a word (`InsideOutside.factors`), since a linear
layer cannot rescale what it reads. In float32 a value below 2^-126 is then lost, and one above
2^128 is infinite. Which losses matter is decided by running the recursions twice:

    lower   as they are
    upper   with `delta` added to every value, more than all losses behind it can amount to

All numbers are sums of products of numbers that are not negative, so that both runs are monotone
and the true value lies between them: where lower and upper agree, nothing was lost. A third run, of
zeros and ones, finds what is 0 by the grammar and not by the type; there, nothing is added. Of a
`LowRank` reduction, whose numbers have signs, both runs take absolute values, and their difference
bounds the loss of the signed run: |p(x + d) - p(x)| <= P(|x| + |d|) - P(|x|) for a polynomial p and
the one P that has the absolute values of its coefficients.

Units. The inside value of a word w is its emission times `scale / max_T emission[T, w]`. Values of
a span of n words are then multiplied by n such factors, and so is Z: they cancel in every
probability. `typical_scale` chooses the scale, `surely_held` decides most cases without a run.

Sentences without a parse, or beyond the range of the type, give NaN under `jit` or on demand, and
else an error that names the sentence (`settled`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Bool, Float

from constructions.core.transformer import Transformer
from constructions.inside_outside.tableau import Layout
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar

#: Powers of e between what is sure to be held and the ends of the range of a type.
MARGIN = 20.0


#: The most terms that a program may have: compiling its layers takes minutes there.
MOST_TERMS = 50_000
#: The most bytes that the matrices of a compiled model may take.
MOST_BYTES = 16 * 2**30


def check_size(longest: int) -> None:
    """ValueError where a program for sentences of so many words is too large to be run."""
    terms = 3 * longest**2
    if terms > MOST_TERMS:
        most = int((MOST_TERMS / 3) ** 0.5)
        raise ValueError(
            f"max_length is {longest}: the program has about {terms} terms, 3 max_length^2, must "
            f"have at most {MOST_TERMS} (max_length {most})"
        )


def check_memory(symbols: int, preterminals: int, longest: int, at: Layout) -> None:
    """ValueError where the matrices of the compiled model would not fit.

    Args:
        symbols: numbers that a span passes on.
        preterminals, longest: of the program.
        at: its slots.
    """
    heads = 0  # rows of the queries of all heads, and their keys, values and outputs
    for n in range(2, longest + 1):
        heads += 2 * symbols * (2 * (preterminals + symbols * max(n - 2, 0)) + 2)
    for n in range(1, longest + 1):
        own = preterminals if n == 1 else 2 * symbols
        heads += own * (2 * (1 + 2 * preterminals + 2 * symbols * (longest - n)) + 2)
    size = 4 * heads * at.slots.width
    if size > MOST_BYTES:
        raise ValueError(
            f"max_length is {longest}: the compiled model takes {size / 2**30:.3g} GiB, must take "
            f"at most {MOST_BYTES / 2**30:.3g} GiB; evaluate() runs the program without them"
        )


@lru_cache(maxsize=256)
def typical_scale(grammar: Grammar, longest: int) -> float:
    """The scale at which Z of sentences of 1 to `longest` words is about 1.

    With word frequencies q of the grammar, and every word replaced by their mean,

        Z_n = root . f_n,   f_n[A] = sum rules[A, B, C] f_m[B] f_{n-m}[C],
        f_1[T] = sum_w q[w] emission[T, w] / max_T' emission[T', w]

    and log scale is the slope of -log Z_n against n, by least squares through 0.
    """
    g, inner = grammar, len(grammar.nonterminals)
    best = g.emission.max(0)
    relative = g.emission / np.where(best > 0, best, 1)
    reached, expected = g.root, g.root.copy()
    for _ in range(longest):
        reached = reached[:inner] @ g.expected_children
        reached = reached / max(reached.sum(), 1)
        expected += reached
    often = expected[inner:] @ g.emission
    often = often / often.sum() if often.any() else np.where(best > 0, 1, 0) / len(best)
    values, logs = np.zeros((longest + 1, len(g.root))), np.full(longest + 1, -np.inf)
    rules = g.rules.reshape(inner, -1)
    for n in range(1, longest + 1):
        if n == 1:
            own, size = relative @ often, 0.0
            place = slice(inner, None)
        else:
            joint = logs[1:n] + logs[n - 1 : 0 : -1]
            size, place = joint.max(), slice(inner)
            if size == -np.inf:
                continue
            left = values[1:n] * np.exp(joint - size)[:, None]
            own = rules @ (left.T @ values[n - 1 : 0 : -1]).ravel()
        if own.any():
            values[n, place], logs[n] = own / own.max(), size + np.log(own.max())
    whole = values @ g.root
    n = np.flatnonzero(whole > 0)
    if not len(n):
        return 1.0
    z = np.log(whole[n]) + logs[n]
    return float(np.exp(np.clip(-(n @ z) / (n @ n), -60, 60)))


def surely_held(
    root: Float[np.ndarray, " symbols"],
    rules: Float[np.ndarray, "inner symbols symbols"],
    leaves: Float[np.ndarray, "numbers preterminals"],
    emission: Float[np.ndarray, "preterminals words"],
    longest: int,
    dtype: np.dtype,
) -> bool:
    """Whether a type holds every value of every sentence of up to `longest` words.

    Every number on the way is a sum of products of some of a tree's factors: one of `root`, at most
    `longest - 1` rules, `longest` leaves, and an emission at the end. The least product is bounded
    by the least factors; the greatest sum by the recursions with the greatest leaf of all.
    """

    def least(array: np.ndarray) -> float:
        positive = array[array > 0]
        return min(0.0, float(np.log(positive.min()))) if positive.size else 0.0

    info = np.finfo(dtype)
    low = least(root) + least(emission) + (longest - 1) * least(rules) + longest * least(leaves)
    if low < np.log(float(info.tiny)) + MARGIN:
        return False
    inner = len(rules)
    with np.errstate(over="ignore"):
        most = np.full(longest + 1, 0.0)
        most[1] = max(1.0, leaves.max(initial=0))
        row = max(1.0, float(rules.sum((1, 2)).max(initial=0)))
        for n in range(2, longest + 1):
            most[n] = row * (most[1:n] @ most[n - 1 : 0 : -1])
        # an outside value: less than Z of the sentence, with a symbol in the place of the span
        column = float(max(rules.sum((0, 1)).max(initial=0), rules.sum((0, 2)).max(initial=0)))
        out = np.full(longest + 1, max(1.0, root.max(initial=0)))
        for n in range(longest - 1, 0, -1):
            out[n] += 2 * column * (out[n + 1 :] @ most[1 : longest - n + 1]) * inner
        greatest = np.log(most.max()) + np.log(out.max()) + np.log(len(root) * longest)
    return bool(greatest < np.log(float(info.max)) - MARGIN)


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


POSTERIOR, MARGINALS = ("prediction",), ("span_marginals", "tag_marginals")


def is_parser(model: Transformer) -> bool:
    """Whether a model is a compiled one, or has its shape: it ends in shares of products."""
    tokens = model.config.tokens
    return tokens is not None and tokens.probabilities == "shares"


def dtype_of(model: Transformer) -> Any:
    """In which a model with an embedding computes."""
    return model.arrays()["tokens"]["embedding"].dtype


def settled(
    c: Any,
    found: Mapping[str, Array],
    given: tuple[Array, ...],
    dtype: Any,
    strict: bool,
) -> dict[str, Array]:
    """Values of sentences, with NaN for what a type does not hold; an error where `strict`.

    Args:
        c: the construction.
        found: some of its named values, NaN where they are undefined.
        given: tokens, lengths and mask.
        dtype: in which they were computed.
        strict: raise, for concrete arrays.

    Raises:
        ValueError: a sentence of which nothing is defined, or that the type does not hold.
    """
    kept = dict(found)
    if not len(given[0]):
        return kept
    held = known(c, given, dtype)
    for names, rows in ((POSTERIOR, held.posterior), (MARGINALS, held.marginals)):
        for name in kept.keys() & {*names}:
            own = rows.reshape(-1, *(1,) * (kept[name].ndim - 1))
            kept[name] = jnp.where(own, kept[name], jnp.nan)
    if strict and not any(isinstance(a, Tracer) for a in (*kept.values(), *given)):
        _refuse(c, kept, given, held, dtype)
    return kept


def known(c: Any, given: tuple[Array, ...], dtype: Any) -> Exactness:
    """Of which sentences a floating point type holds what the construction computes."""
    (tokens, lengths, mask), dtype = given, np.dtype(dtype)
    emission = c.grammar.emission
    longest = min(c.max_length, tokens.shape[1])
    if not isinstance(lengths, Tracer):
        longest = int(np.asarray(lengths).max())
    start, passed = c.passed
    if c.reduction is None and surely_held(start, passed, c.leaves, emission, longest, dtype):
        return Exactness(*jnp.ones((2, len(tokens)), bool))
    numbers = c.numbers(tokens, lengths, mask)[:, 1:-1]
    root, rules, leaves, words = (jnp.asarray(a, dtype) for a in (*c.passed, c.leaves, emission))
    return exactness(root, rules, leaves[numbers], words, lengths)


def _refuse(
    c: Any,
    kept: Mapping[str, Array],
    given: tuple[Array, ...],
    held: Exactness,
    dtype: Any,
) -> None:
    """Raise the error of `settled` for the first sentence that has one."""
    fine = np.ones(len(given[0]), bool)
    for names, rows in ((POSTERIOR, held.posterior), (MARGINALS, held.marginals)):
        if kept.keys() & {*names}:
            fine &= np.asarray(rows)
    refuse_lost(c, fine, given, dtype)
    there = np.arange(given[0].shape[1]) < np.asarray(given[1])[:, None]
    name = min(kept.keys() & {*POSTERIOR, *MARGINALS})  # the posterior, where there is one
    lost = np.isnan(np.asarray(kept[name])).reshape((*there.shape, -1))
    lost = np.asarray(lost.any(-1))
    if name in POSTERIOR:
        nothing, what = ~(there & ~lost).any(1), "even if one of its words were another"
    else:
        nothing, what = lost.any(1), ""
    if c.reduction is not None:
        what = "under the reduction (its Z is not positive)"
    chart.refuse_unparsed(c.grammar, np.asarray(nothing), given[0], given[1], given[2], what)


def refuse_lost(c: Any, held: np.ndarray, given: tuple[Array, ...], dtype: Any) -> None:
    """Raise ValueError that names the first sentence that a type does not hold."""
    if held.all():
        return
    row, info = int(held.argmin()), np.finfo(dtype)
    one = tuple(a[row : row + 1] for a in given)
    log_z = float(chart.log_z(c.grammar, *one)[0])
    own = np.asarray(c.numbers(*one))[0, 1 : 1 + int(one[1][0])]
    raise ValueError(
        f"{chart.name_sentence(c.grammar, row, *given)} has log Z {log_z:.6g}, in units of the "
        f"construction {log_z + np.log(c.factors[own]).sum():.6g}: {np.dtype(dtype).name} "
        f"({float(info.tiny):.2g} to {float(info.max):.2g}) does not hold its probabilities; "
        "take another scale, or float64"
    )
