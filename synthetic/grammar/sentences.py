"""Sentences of a grammar with their trees, sampled inside `jit`, millions of words a second.

A derivation rewrites the leftmost nonterminal. A row holds its whole sentential form, one symbol a
place, and each of `max_length - 1` steps rewrites the first nonterminal A of every row,

    T .. T A x y ..   ->   T .. T B C x y ..        with probability rules[A, B, C],

so no stack is needed: what is left of A is finished, and its number is the position of A's first
word. Rows that still have a nonterminal at the end are longer than `max_length`; they are dropped
and others drawn until the batch is full, so that what is returned has exactly the distribution of
the grammar given that a sentence has at most `max_length` words.

Choices come from alias tables (Walker, "An efficient method for generating discrete random
variables with general distributions", 1977): with the choices padded to 2^k, the upper k bits of a
uniform word pick a cell, the others decide whether the cell's own choice or its alias is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import ceil, sqrt
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int32, UInt32
from nltk.tree import Tree

from synthetic.grammar.grammar import Grammar
from synthetic.threefry import random_bits

#: The most that `sample` takes on: rounds of rejection, symbols written, and memory.
MOST_ROUNDS = 20_000
MOST_WORK = 1e11
MOST_BYTES = 16 * 2**30


class Sentences(NamedTuple):
    """A batch of sentences and their trees; all int32.

    Attributes:
        tokens: `[batch, max_length]`, padded with 0.
        lengths: `[batch]`.
        tags: `[batch, max_length]`, numbers of pre-terminals, padded with -1.
        nonterminals: `[batch, max_length - 1]`, the tree's nonterminals in preorder, padded
            with -1; there are `length - 1`.
        starts: `[batch, max_length - 1]`, where the words of each begin, padded with -1. With
            `nonterminals` and `tags` this is the whole tree (`ends`, `trees`).
    """

    tokens: Int32[Array, "batch time"]
    lengths: Int32[Array, " batch"]
    tags: Int32[Array, "batch time"]
    nonterminals: Int32[Array, "batch nodes"]
    starts: Int32[Array, "batch nodes"]


class Alias(NamedTuple):
    """Alias tables of several distributions, `2^k` cells each.

    Attributes:
        own, other: `[rows, cells]`, a cell's two choices.
        threshold: `[rows, cells]`, the chance of `own` times `2^(32 - k)`.
    """

    own: Int32[Array, "rows cells"]
    other: Int32[Array, "rows cells"]
    threshold: UInt32[Array, "rows cells"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["root", "rules", "words"],
    meta_fields=["grammar"],
)
@dataclass(frozen=True)
class Sampler:
    """What `sample` draws from, on the device; `Sampler.of(grammar)` makes it.

    A pair of children (B, C) is the number `B symbols + C`.
    """

    root: Alias
    rules: Alias
    words: Alias
    grammar: Grammar = field(repr=False)

    @classmethod
    def of(cls, grammar: Grammar) -> Sampler:
        """The tables of a grammar.

        Raises:
            GrammarError: probabilities do not sum to 1.
            ValueError: the grammar is supercritical: its sentences have no distribution.
        """
        grammar.refuse_improper()
        if grammar.spectral_radius > 1 + 1e-6:
            raise ValueError(
                f"cannot sample from {grammar}: the spectral radius of its expected children is "
                f"{grammar.spectral_radius:.6g}, must be at most 1"
            )
        n, s = len(grammar.nonterminals), len(grammar.symbols)
        return cls(
            _alias(grammar.root[None]),
            _alias(grammar.rules.reshape(n, s * s)),
            _alias(grammar.emission),
            grammar,
        )


def sample(source: Grammar | Sampler, key: Array, batch: Any, max_length: Any) -> Sentences:
    """`batch` independent sentences of at most `max_length` words; may be called inside `jit`.

    With a `Sampler` the tables may be an argument of the caller's `jit`.

    Raises:
        ValueError: `batch` or `max_length` is no whole number of at least 1, too large for memory
            or time, no sentence is that short, or so few that the batch takes too many draws; or
            as `Sampler.of`.
    """
    for name, value in (("batch", batch), ("max_length", max_length)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} is {value!r}, must be a whole number")
    if batch < 1 or max_length < 1:
        raise ValueError(f"batch is {batch} and max_length {max_length}, must be at least 1")
    grammar = source.grammar if isinstance(source, Sampler) else source
    # `length_probabilities` takes this many products, and `_sample` at least so many numbers
    work = max_length**2 * len(grammar.symbols) ** 2
    size = 4 * 6 * batch * max_length
    if work > MOST_WORK or size > MOST_BYTES:
        raise ValueError(
            f"batch is {batch} and max_length {max_length}: drawing takes {size / 2**30:.3g} GiB "
            f"and {work:.2g} products for the lengths alone, must take at most "
            f"{MOST_BYTES / 2**30:.3g} GiB and {MOST_WORK:.2g}"
        )
    sampler = source if isinstance(source, Sampler) else Sampler.of(source)
    share = _share(sampler.grammar, max_length)
    if not share > 0:
        raise ValueError(f"max_length is {max_length}, but no sentence of the grammar is so short")
    # Rows of one round: enough for the batch but once in some 30000 times, or else within memory.
    wanted = (batch + 4 * sqrt(batch * max(1 - share, 0))) / share  # above 1 by rounding is 1
    rows = ceil(min(wanted, 4 * batch + 4096))
    draws, size = max(batch / share, rows), 4 * 6 * rows * max_length
    if draws / rows > MOST_ROUNDS or draws * max_length**2 > MOST_WORK or size > MOST_BYTES:
        raise ValueError(
            f"max_length is {max_length}, but a share of {share:.3g} of the grammar's sentences is "
            f"so short: a batch of {batch} takes about {draws:.2g} draws of {size / 2**30:.2g} GiB "
            f"at a time, must take at most {MOST_ROUNDS * rows:.2g}, {MOST_WORK:.2g} symbols and "
            f"{MOST_BYTES / 2**30:.3g} GiB; take a larger max_length or a smaller batch"
        )
    return _sample(sampler, key, int(batch), int(max_length), rows)


@lru_cache(maxsize=256)
def _share(grammar: Grammar, max_length: int) -> float:
    """Probability of a sentence of at most `max_length` words."""
    return float(grammar.length_probabilities(max_length).sum())


@partial(jax.jit, static_argnames=("batch", "max_length", "rows"))
def _sample(sampler: Sampler, key: Array, batch: int, max_length: int, rows: int) -> Sentences:
    words_key, key = jax.random.split(key)

    def short_of_batch(state: tuple) -> Bool[Array, ""]:
        return state[0] < batch

    def draw(state: tuple) -> tuple:
        count, key, kept = state
        key, now = jax.random.split(key)
        *drawn, fits = _derive(sampler, now, rows, max_length)
        total = jnp.cumsum(fits, dtype=jnp.int32)
        # The first rows that fit, in order, go behind those that are there.
        wanted = jnp.arange(batch, dtype=jnp.int32) - count
        source = jnp.searchsorted(total, wanted + 1, side="left", method="scan_unrolled")
        source = jnp.minimum(source, rows - 1)
        kept = tuple(
            jnp.where(wanted >= 0, new.at[:, source].get(mode="promise_in_bounds"), old)
            for new, old in zip(drawn, kept, strict=True)
        )
        return count + total[-1], key, kept

    blank = tuple(jnp.zeros((rows, batch), jnp.int32) for rows in (max_length, max_length - 1))
    _, _, (form, nodes) = lax.while_loop(short_of_batch, draw, (jnp.int32(0), key, blank))
    n, s = len(sampler.grammar.nonterminals), len(sampler.grammar.symbols)
    tags, there, open_ = form - n, form < s, nodes < max_length * s
    bits = random_bits(words_key, max_length, batch)
    tokens = jnp.where(there, _choose(sampler.words, jnp.where(there, tags, 0), bits), 0)
    return Sentences(
        tokens.T,
        there.sum(0, dtype=jnp.int32),
        jnp.where(there, tags, -1).T,
        jnp.where(open_, nodes % s, -1).T,
        jnp.where(open_, nodes // s, -1).T,
    )


def _derive(sampler: Sampler, key: Array, rows: int, max_length: int) -> tuple[Array, ...]:
    """Derivations: final forms `[place, row]`, the node of each step, and which rows fit."""
    n, s = len(sampler.grammar.nonterminals), len(sampler.grammar.symbols)
    bits = random_bits(key, max_length, rows)
    place = jnp.arange(max_length, dtype=jnp.int32)[:, None]
    root = _choose(sampler.root, jnp.zeros(rows, jnp.int32), bits[0])
    form = jnp.where(place == 0, root, jnp.int32(s))  # s: behind the end

    def first(form: Array) -> Array:
        """Place and symbol of the first nonterminal, `place s + symbol`, or beyond all."""
        return jnp.min(jnp.where(form < n, place * s + form, max_length * s), 0)

    def rewrite(state: tuple[Array, Array], bits: Array) -> tuple[tuple[Array, Array], Array]:
        form, node = state
        at = node // s
        pair = _choose(sampler.rules, jnp.minimum(node % s, n - 1), bits)
        # Once for each row, not again for each place; and XLA's CPU back end is several times
        # faster at a padded slice than at a concatenation.
        left, right = lax.optimization_barrier((pair // s, pair % s))
        shifted = jnp.pad(form, ((1, 0), (0, 0)))[:max_length]
        form = jnp.where(place > at, shifted, form)
        form = jnp.where(place == at, left, form)
        form = jnp.where(place == at + 1, right, form)
        form = lax.optimization_barrier(form)
        return (form, first(form)), node

    (form, _), nodes = lax.scan(rewrite, (form, first(form)), bits[1:])
    return form, nodes, jnp.all(form >= n, 0)


def _choose(alias: Alias, row: Array, bits: Array) -> Array:
    """One choice of each row's distribution, by one uniform word each."""
    cells = alias.own.shape[1]
    shift = 33 - cells.bit_length()  # 2^k cells: 32 - k
    cell = row * cells
    if cells > 1:
        cell += (bits >> np.uint32(shift)).astype(jnp.int32)
        bits &= np.uint32(2**shift - 1)
    own, other, threshold = (
        table.ravel().at[cell].get(mode="promise_in_bounds") for table in alias
    )
    return jnp.where(bits < threshold, own, other)


def _alias(weights: np.ndarray) -> Alias:
    """Tables of distributions `[rows, choices]`, by the method of Vose (1991)."""
    cells = 1 << (int((weights > 0).sum(1).max()) - 1).bit_length()
    one = 2 ** (32 - cells.bit_length() + 1)
    shape = (len(weights), cells)
    own, other, threshold = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape)
    for row, given in enumerate(weights):
        choices = given.nonzero()[0]
        own[row, : len(choices)] = choices
        own[row, len(choices) :] = choices[0]
        other[row] = own[row]
        left = np.zeros(cells)
        left[: len(choices)] = given[choices] / given.sum() * cells
        small = [i for i in range(cells) if left[i] < 1]
        large = [i for i in range(cells) if left[i] >= 1]
        threshold[row] = 1
        while small and large:
            i, j = small.pop(), large[-1]
            threshold[row, i], other[row, i] = left[i], own[row, j]
            left[j] -= 1 - left[i]
            if left[j] < 1:
                small.append(large.pop())
    # A cell with threshold 1 has two equal choices, so that 2^32 need not be represented.
    scaled = np.minimum(np.rint(threshold * one), 2**32 - 1).astype(np.uint32)
    return Alias(*map(jax.device_put, (own, other, scaled)))


@jax.jit
def ends(starts: Int32[Array, "batch nodes"]) -> Int32[Array, "batch nodes"]:
    """The position of each nonterminal's last word, padded with -1.

    In preorder, `r_k = k - start_k` symbols wait behind node k when it is rewritten; its subtree
    are the nodes from k on until one has fewer, and has one word more than nodes.
    """
    nodes = starts.shape[1]
    k = jnp.arange(nodes, dtype=jnp.int32)
    there = starts >= 0
    waiting = jnp.where(there, k - starts, -1)
    out = (waiting[:, None, :] < waiting[:, :, None]) & (k > k[:, None])  # [batch, k, later]
    stop = jnp.min(jnp.where(out, k, nodes), 2)
    return jnp.where(there, starts + stop - k, -1)


def trees(grammar: Grammar, sentences: Sentences) -> list[Tree]:
    """The trees in symbols of this grammar, for use as a library; `grammar.restore` undoes the
    conversion to normal form.
    """
    tokens, lengths, tags, nonterminals, starts = map(np.asarray, sentences)
    found = []
    for row, length in enumerate(lengths):
        leaves = [
            Tree(grammar.preterminals[tag], [grammar.vocabulary[word]])
            for tag, word in zip(tags[row, :length], tokens[row, :length], strict=True)
        ]
        # From the last node to the first: the trees that wait, the leftmost on top.
        waiting, word = [], int(length)
        for node in range(length - 2, -1, -1):
            while word > starts[row, node]:
                word -= 1
                waiting.append(leaves[word])
            label = grammar.nonterminals[nonterminals[row, node]]
            waiting.append(Tree(label, [waiting.pop(), waiting.pop()]))
        found.append(waiting[0] if waiting else leaves[0])
    return found
