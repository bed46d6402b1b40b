"""Inside and outside of a batch of sentences, all spans of one width at a time; re-estimation.

With nonterminals A, B, C, any symbol X, and (i, w) the span of w words from word i,

    inside   (i, w)[A] = sum_m sum_{B, C} rules[A, B, C] inside(i, w - m)[B] inside(i + w - m, m)[C]
    outside  (i, w)[X] = root[X], where (i, w) is the sentence
        + sum_m sum_{A, C} rules[A, X, C] outside(i, w + m)[A] inside(i + w, m)[C]
        + sum_m sum_{A, B} rules[A, B, X] outside(i - m, w + m)[A] inside(i - m, m)[B]

(Baker 1979; Lari and Young 1990). Outer products are summed over the splits m first, so that the
rules come in once a span, as one matrix product for all spans of a width. Only nonterminals are
wider than one word, so that a pre-terminal meets a wider sibling at one split alone: there, rules
and word are contracted once a word (`Leaves.left`, `Leaves.right`).

Every span is scaled by a power of two of its own, so that no product of many probabilities
underflows:

    v = mantissa * 2^exponent,     1/2 <= max(mantissa) < 1

A symbol is lost only where it is below 2^-126 (float32) of the largest of its span, and a split
likewise. Scaling by powers of two is exact: float32 charts differ from float64 ones by the rounding
of sums and products alone. A vector of zeros has the exponent `NOTHING`.

Tables are `[word, batch, width, symbol]`, or `[word, batch, symbol, width]` where they stand left
in the products over splits. `start` tables go by a span's first word; in `end` tables row j + 1 has
the spans whose last word is j, so that row i has those that end just before word i. Spans that
would leave the sentence are zeros, as are all further rows and widths, so that no split or position
needs a bound of its own.

Re-estimation (`em`) is the inside-outside algorithm as expectation-maximisation (Baker 1979). A
weight's expected count is its part in the logarithm of the likelihood (Eisner 2016),

    E[count of rule | words] = weight * d log Z / d weight
"""

import math
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from synthetic.grammar.grammar import Weights

#: Exponent of a vector of zeros: far below any other, and sums of a few of it are still int32.
NOTHING = -(2**24)


def power_of_two(exponent: Array, dtype: Any) -> Array:
    """2^exponent, exactly, from its bits; 0 below the smallest normal number."""
    integer, info = _layout(dtype)
    bias = 1 - int(info.minexp)
    biased = jnp.clip(exponent + bias, 0, 2 * bias).astype(integer)
    return lax.bitcast_convert_type(biased << info.nmant, jnp.dtype(dtype))


def normalise(values: Array, exponent: Array) -> tuple[Array, Array]:
    """values * 2^exponent with the largest of the last axis in [1/2, 1); one exponent for it.

    Gradients take the exponents as constants, which is exact: they cancel wherever they are used.
    """
    integer, info = _layout(values.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(values).max(-1), integer) >> info.nmant
    shift = bits.astype(jnp.int32) + int(info.minexp)
    values = values * power_of_two(-shift, values.dtype)[..., None]
    return values, jnp.where(bits > 0, exponent + shift, NOTHING)


def log_of(value: Array, exponent: Array) -> Array:
    """log(value * 2^exponent): -inf, with gradient 0, where the value is 0."""
    some = value > 0
    log = jnp.log(jnp.where(some, value, 1))
    return jnp.where(some, log + exponent.astype(value.dtype) * math.log(2), -jnp.inf)


def _layout(dtype: Any) -> tuple[Any, Any]:
    """The integer as wide as a float, and what `jnp.finfo` knows of the float."""
    info = jnp.finfo(dtype)
    return (jnp.int32 if info.bits == 32 else jnp.int64), info


einsum = partial(jnp.einsum, precision="highest")


class Leaves(NamedTuple):
    """The emissions of words, `[word, batch, ...]`.

    Attributes:
        values: P(word | T), or its sum over all words where the word is hidden, scaled.
        exponent: powers of two of `values`.
        left: `[.., A, X]`, `sum_T rules[A, T, X] values[T]`: the word is the left child.
        right: `[.., A, X]`, `sum_T rules[A, X, T] values[T]`: the word is the right child.
    """

    values: Array
    exponent: Array
    left: Array
    right: Array


class Inside(NamedTuple):
    """Inside values of nonterminals, scaled; width w stands at w, in `flipped` at last - w.

    Attributes:
        start, end: `[word, batch, width, symbol]`.
        flipped: `[word, batch, symbol, last - width]`, by first word.
        start_exponent, end_exponent, flipped_exponent: the same without symbols. At width 1, those
            of the leaves.
    """

    start: Array
    end: Array
    flipped: Array
    start_exponent: Array
    end_exponent: Array
    flipped_exponent: Array


class Outside(NamedTuple):
    """Outside values, scaled: `[word, batch, symbol, width]`, of leaves `[word, batch, T]`."""

    start: Array
    end: Array
    start_exponent: Array
    end_exponent: Array
    leaf: Array
    leaf_exponent: Array


def chunks(time: int) -> list[tuple[int, int]]:
    """Widths 3..time as one to three runs (first, final) of about the same length.

    A chunk is one loop whose arrays have the size that its largest step needs: more of them
    waste less work and compile longer.
    """
    pieces = min(max((time - 2) // 4, 1), 3)
    bounds = [3 + (time - 2) * k // pieces for k in range(pieces + 1)]
    return [(a, b - 1) for a, b in pairwise(bounds) if a < b]


def leaves(weights: Weights, tokens: Array, lengths: Array, mask: Array) -> Leaves:
    """Leaves of tokens `[batch, word]`; beyond the end of a sentence they are zeros."""
    count = weights.rules.shape[0]
    emission = weights.emission.T
    seen = jnp.take(emission, tokens.T, axis=0, mode="clip")
    values = jnp.where(mask.T[..., None], emission.sum(0), seen)
    within = jnp.arange(tokens.shape[1])[:, None] < lengths
    values = jnp.where(within[..., None], values, 0)
    values, exponent = normalise(values, jnp.zeros(within.shape, jnp.int32))
    left = einsum("atx,ibt->ibax", weights.rules[:, count:], values)
    right = einsum("axt,ibt->ibax", weights.rules[:, :, count:], values)
    return Leaves(values, exponent, left, right)


def inside(weights: Weights, leaf: Leaves) -> Inside:
    """All inside values, narrow spans first."""
    time, batch = leaf.exponent.shape
    count = weights.rules.shape[0]
    rules = weights.rules[:, :count, :count].reshape(count, count**2).T
    slack = _slack(time)
    left, right = (_pad(m[..., :count], 0, slack) for m in (leaf.left, leaf.right))
    table = _empty_inside(leaf, count)
    if time > 1:
        values = _times(leaf.right[1:, :, :, count:], leaf.values[:-1])
        table = _write_inside(table, 2, *normalise(values, leaf.exponent[:-1] + leaf.exponent[1:]))
    for first, final in chunks(time):
        starts, splits = time - first + 1, _fast(final - 1)

        def step(
            table: Inside, width: Array, starts: int = starts, splits: int = splits
        ) -> tuple[Inside, None]:
            # m = 1, 2, .. words in the right child, and width - m in the left one.
            flip = time - width + 1
            shape = (starts, batch, splits)
            e = _cut(table.flipped_exponent, (0, 0, flip), shape)
            e += _cut(table.end_exponent, (width, 0, 1), shape)
            largest = e.max(-1)
            scale = power_of_two(e - largest[..., None], weights.rules.dtype)
            x = _cut(table.flipped, (0, 0, 0, flip), (starts, batch, count, splits))
            x *= scale[:, :, None]
            y = _cut(table.end, (width, 0, 1), shape)
            values = _products(x, y) @ rules
            values += _times(_cut(right, (width - 1,), (starts,)), x[..., 0])
            # m = width - 1: the left child is a leaf
            z = _cut(table.end, (width, 0, width - 1), (starts, batch, 1))[:, :, 0]
            z *= _cut(scale, (0, 0, width - 2), (starts, batch, 1))
            values += _times(left[:starts], z)
            return _write_inside(table, width, *normalise(values, largest)), None

        table, _ = lax.scan(step, table, jnp.arange(first, final + 1))
    return table


def outside(weights: Weights, leaf: Leaves, table: Inside, lengths: Array) -> Outside:
    """All outside values, wide spans first."""
    time, batch = leaf.exponent.shape
    count, dtype = weights.rules.shape[0], weights.rules.dtype
    slack = _slack(time)
    root, e_root = normalise(weights.root, jnp.zeros((), jnp.int32))
    after = _pad(leaf.right, 0, slack)  # row i: word i is the sibling on the right
    before = _pad(leaf.left, 1, 0)  # row i: word i - 1 is the sibling on the left

    def spans(out: Outside, width: Array | int, starts: int, splits: int, children: slice):
        """Values of all spans of one width, whose symbols are `children`."""
        # m = 1, 2, .. words in the sibling, and width + m in the parent.
        shape = (starts, batch, splits)
        e_right = _cut(out.start_exponent, (0, 0, width + 1), shape)
        e_right += _cut(table.start_exponent, (width, 0, 1), shape)
        e_left = _cut(out.end_exponent, (width, 0, width + 1), shape)
        e_left += _cut(table.end_exponent, (0, 0, 1), shape)
        largest = jnp.maximum(e_right.max(-1), e_left.max(-1))

        def part(parents: Array, row: Any, e: Array, siblings: Array, place: Any) -> Any:
            x = _cut(parents, (row, 0, 0, width + 1), (starts, batch, count, splits))
            x *= power_of_two(e - largest[..., None], dtype)[:, :, None]
            return _products(x, _cut(siblings, (place, 0, 1), shape)), x[..., 0]

        products, parent = part(out.start, 0, e_right, table.start, width)
        rules = jnp.swapaxes(weights.rules[:, children, :count], 1, 2).reshape(count**2, -1)
        values = products @ rules
        values += _transposed_times(_cut(after, (width,), (starts,))[..., children], parent)
        products, parent = part(out.end, width, e_left, table.end, 0)
        values += products @ weights.rules[:, :count, children].reshape(count**2, -1)
        values += _transposed_times(before[:starts, ..., children], parent)
        values, e = normalise(values, largest)
        sentence = (width == lengths) & (jnp.arange(starts)[:, None] == 0)
        values = jnp.where(sentence[..., None], root[children], values)
        return values, jnp.where(sentence, e_root, e)

    out = _empty_outside(leaf, count)
    wide = [(2, 2)] * (time > 1) + chunks(time)
    for first, final in reversed(wide):
        starts, splits = time - first + 1, _fast(max(time - first, 1))

        def step(
            out: Outside, width: Array, starts: int = starts, splits: int = splits
        ) -> tuple[Outside, None]:
            values, e = spans(out, width, starts, splits, slice(0, count))
            return out._replace(
                start=_put(out.start, values[..., None], (0, 0, 0, width)),
                end=_put(out.end, values[..., None], (width, 0, 0, width)),
                start_exponent=_put(out.start_exponent, e[..., None], (0, 0, width)),
                end_exponent=_put(out.end_exponent, e[..., None], (width, 0, width)),
            ), None

        out, _ = lax.scan(step, out, jnp.arange(first, final + 1), reverse=True)
    values, e = spans(out, 1, time, _fast(max(time - 1, 1)), slice(count, None))
    return out._replace(leaf=values, leaf_exponent=e)


def top(weights: Weights, leaf: Leaves, table: Inside, lengths: Array) -> tuple[Array, Array]:
    """Z of every sentence, scaled, and its exponent."""
    count = weights.rules.shape[0]
    rows = jnp.arange(lengths.shape[0])
    z = einsum("bx,x->b", table.start[0, rows, lengths], weights.root[:count])
    single = einsum("bx,x->b", leaf.values[0], weights.root[count:])
    return jnp.where(lengths == 1, single, z), table.start_exponent[0, rows, lengths]


def _slack(time: int) -> int:
    """Rows and widths beyond a sentence that a step reads or writes: its chunk's are fixed."""
    return max((final - first for first, final in chunks(time)), default=0) + 5


def _fast(splits: int) -> int:
    """As many splits or a few more: small products on CPUs are up to twice slower off fours."""
    return splits if splits <= 6 else -(-splits // 4) * 4


def _empty_inside(leaf: Leaves, count: int) -> Inside:
    time, batch = leaf.exponent.shape
    dtype, slack = leaf.values.dtype, _slack(time)
    by_start = jnp.full((time + slack, batch, time + 5), NOTHING, jnp.int32)
    by_end = jnp.full((time + slack, batch, time + 5), NOTHING, jnp.int32)
    flipped = jnp.full((time, batch, time + slack), NOTHING, jnp.int32)
    e = leaf.exponent[..., None]
    return Inside(
        start=jnp.zeros((*by_start.shape, count), dtype),
        end=jnp.zeros((*by_end.shape, count), dtype),
        flipped=jnp.zeros((time, batch, count, time + slack), dtype),
        start_exponent=_put(by_start, e, (0, 0, 1)),
        end_exponent=_put(by_end, e, (1, 0, 1)),
        flipped_exponent=_put(flipped, e, (0, 0, time - 1)),
    )


def _write_inside(table: Inside, width: Array | int, values: Array, e: Array) -> Inside:
    flip = table.start.shape[2] - 5 - width
    return Inside(
        start=_put(table.start, values[:, :, None], (0, 0, width)),
        end=_put(table.end, values[:, :, None], (width, 0, width)),
        flipped=_put(table.flipped, values[..., None], (0, 0, 0, flip)),
        start_exponent=_put(table.start_exponent, e[..., None], (0, 0, width)),
        end_exponent=_put(table.end_exponent, e[..., None], (width, 0, width)),
        flipped_exponent=_put(table.flipped_exponent, e[..., None], (0, 0, flip)),
    )


def _empty_outside(leaf: Leaves, count: int) -> Outside:
    time, batch = leaf.exponent.shape
    widths, rows = time + _slack(time), time + _slack(time)
    dtype = leaf.values.dtype
    return Outside(
        start=jnp.zeros((time, batch, count, widths), dtype),
        end=jnp.zeros((rows, batch, count, widths), dtype),
        start_exponent=jnp.full((time, batch, widths), NOTHING, jnp.int32),
        end_exponent=jnp.full((rows, batch, widths), NOTHING, jnp.int32),
        leaf=leaf.values,
        leaf_exponent=leaf.exponent,
    )


def _products(x: Array, y: Array) -> Array:
    """`sum_m x[.., B, m] y[.., m, C]` as `[.., B C]`."""
    found = einsum("ibxm,ibmy->ibxy", x, y)
    return found.reshape(*found.shape[:2], x.shape[2] * y.shape[3])


def _times(matrices: Array, vectors: Array) -> Array:
    return einsum("ibax,ibx->iba", matrices, vectors)


def _transposed_times(matrices: Array, vectors: Array) -> Array:
    return einsum("ibax,iba->ibx", matrices, vectors)


def _pad(table: Array, before: int, after: int) -> Array:
    """Rows of zeros before and after."""
    return jnp.pad(table, ((before, after), *((0, 0),) * (table.ndim - 1)))


def _cut(table: Array, start: tuple, shape: tuple) -> Array:
    """The part of this shape from `start`; further axes whole."""
    start = (*start, *(0,) * (table.ndim - len(start)))
    return lax.dynamic_slice(table, start, (*shape, *table.shape[len(shape) :]))


def _put(table: Array, values: Array, start: tuple) -> Array:
    """The table with values written from `start`; further axes whole."""
    start = (*start, *(0,) * (table.ndim - len(start)))
    return lax.dynamic_update_slice(table, values, start)


class Fit(NamedTuple):
    """A grammar after `steps` of re-estimation; `log_likelihood[k]` is what k steps reached."""

    weights: Weights
    log_likelihood: Array


def log_z(weights: Weights, tokens: Array, lengths: Array, mask: Array) -> Array:
    """log Z of every sentence, `[batch]`."""
    leaf = leaves(weights, tokens, lengths, mask)
    z, exponent = top(weights, leaf, inside(weights, leaf), lengths)
    return log_of(z, exponent)


def expected_counts(
    weights: Weights, tokens: Array, lengths: Array, mask: Array
) -> tuple[Weights, Array]:
    """Counts summed over the sentences that have a tree, and their log-likelihood."""

    def likelihood(weights: Weights) -> Array:
        log = log_z(weights, tokens, lengths, mask)
        return jnp.where(log > -jnp.inf, log, 0).sum()

    value, slope = jax.value_and_grad(likelihood)(weights)
    return jax.tree.map(jnp.multiply, weights, slope), value


def proper(counts: Weights, otherwise: Weights) -> Weights:
    """Counts as relative frequencies; a symbol that was never seen keeps its weights."""

    def frequencies(count: Array, old: Array, axes: tuple[int, ...]) -> Array:
        whole = count.sum(axes, keepdims=True)
        return jnp.where(whole > 0, count / jnp.where(whole > 0, whole, 1), old)

    return Weights(
        frequencies(counts.root, otherwise.root, (0,)),
        frequencies(counts.rules, otherwise.rules, (1, 2)),
        frequencies(counts.emission, otherwise.emission, (1,)),
    )


def em(weights: Weights, tokens: Array, lengths: Array, mask: Array, steps: int) -> Fit:
    """`steps` times: expected counts, then relative frequencies. The likelihood never falls."""

    def step(weights: Weights, _: None) -> tuple[Weights, Array]:
        counts, value = expected_counts(weights, tokens, lengths, mask)
        return proper(counts, weights), value

    weights, values = lax.scan(step, weights, length=steps)
    _, final = expected_counts(weights, tokens, lengths, mask)
    return Fit(weights, jnp.append(values, final))


def entropy(weights: Weights, tokens: Array, lengths: Array, mask: Array) -> Array:
    """log Z - sum of expected counts * log weights: nats left in tree and hidden words.

    NaN where there is no parse.
    """

    def one(tokens: Array, length: Array, mask: Array) -> Array:
        counts, value = expected_counts(weights, tokens[None], length[None], mask[None])
        terms = jax.tree.map(
            lambda c, w: (c * jnp.log(jnp.where(w > 0, w, 1))).sum(), counts, weights
        )
        return value - sum(terms)

    some = log_z(weights, tokens, lengths, mask) > -jnp.inf
    return jnp.where(some, jax.vmap(one)(tokens, lengths, mask), jnp.nan)
