"""Trees out of charts: the most probable (Viterbi), and that of most expected spans (MBR)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int
from nltk import Tree

from synthetic.grammar.grammar import Grammar, Weights
from synthetic.grammar.trees import unfold


class Viterbi(NamedTuple):
    """The most probable tree of each sentence, as pointers from every span and symbol.

    Attributes:
        log_prob: log of the tree's probability with its words; -inf where there is none.
        top: its top symbol.
        left, right: children of nonterminal A over words i..j, `[batch, i, j, A]`.
        split: last word of the left child, the same shape.
        word: the word of pre-terminal T at word t; the most probable one where hidden.
    """

    log_prob: Float[Array, " batch"]
    top: Int[Array, " batch"]
    left: Int[Array, "batch time time nonterminals"]
    right: Int[Array, "batch time time nonterminals"]
    split: Int[Array, "batch time time nonterminals"]
    word: Int[Array, "batch time preterminals"]


class LabelledRecall(NamedTuple):
    """The binary tree that has most expected correct spans (Goodman 1996).

    Attributes:
        score: expected number of spans kept, each less the threshold.
        label: best nonterminal of words i..j, or -1 where the span is not worth a label.
        split: last word of the left child of the best tree over words i..j.
        tag: best pre-terminal of every word.
    """

    score: Float[Array, " batch"]
    label: Int[Array, "batch time time"]
    split: Int[Array, "batch time time"]
    tag: Int[Array, "batch time"]


@jax.jit
def viterbi(weights: Weights, tokens: Array, lengths: Array, mask: Array) -> Viterbi:
    """Max instead of sum, in logs: best(i, w)[A] = max over m, B, C of log rules + children."""
    batch, time = tokens.shape
    count, symbols = weights.rules.shape[:2]
    root, rules, emission = (_log(a) for a in weights)
    seen = jnp.take(emission.T, tokens, axis=0, mode="clip")
    leaf = jnp.where(mask[..., None], emission.max(1), seen)
    word = jnp.where(mask[..., None], emission.argmax(1), tokens[..., None])
    best = jnp.full((batch, time, time + 1, symbols), -jnp.inf, leaf.dtype)
    best = best.at[:, :, 1, count:].set(leaf)
    m, start = jnp.arange(1, max(time, 2)), jnp.arange(time)

    def children(best: Array, width: Array) -> tuple[Array, Array]:
        """Left and right child at every split, `[batch, start, m, symbol]`."""
        fits = (m < width) & (start[:, None] + width <= time)
        row = jnp.clip(start[:, None] + m, 0, time - 1)
        right = best[:, row, jnp.clip(width - m, 0, time)]
        left = best[:, :, jnp.clip(m, 0, time)]
        return left, jnp.where(fits[..., None], right, -jnp.inf)

    def step(best: Array, width: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
        left, right = children(best, width)

        def widen(pairs: Array, m: Array) -> tuple[Array, None]:
            return jnp.maximum(pairs, left[:, :, m, :, None] + right[:, :, m, None]), None

        pairs = jnp.full((batch, time, symbols, symbols), -jnp.inf, leaf.dtype)
        pairs, _ = lax.scan(widen, pairs, m - 1)
        pairs = pairs.reshape(batch, time, -1)
        number = jnp.arange(symbols**2)

        def choose(rule: Array) -> tuple[Array, Array]:
            scores = pairs + rule.reshape(-1)
            most = scores.max(-1)
            # The first of the largest: an argmax that vector instructions can do.
            first = jnp.where(scores == most[..., None], number, symbols**2 - 1).min(-1)
            return most, first

        values, pair = (jnp.moveaxis(a, 0, -1) for a in lax.map(choose, rules))
        first, second = pair // symbols, pair % symbols
        scores = jnp.take_along_axis(left, first[:, :, None], -1)
        scores += jnp.take_along_axis(right, second[:, :, None], -1)
        split = start[:, None] + scores.argmax(2)
        return best.at[:, :, width, :count].set(values), (first, second, split, values)

    best, (left, right, split, _) = lax.scan(step, best, jnp.arange(2, time + 1))
    whole = best[jnp.arange(batch), 0, lengths] + root
    whole = jnp.where((lengths[:, None] == 1) == (jnp.arange(symbols) >= count), whole, -jnp.inf)

    def by_last_word(pointers: Array) -> Array:
        """`[width - 2, batch, start, A]` as `[batch, i, j, A]`."""
        width = start - start[:, None] + 1
        found = pointers[jnp.clip(width - 2, 0), :, start[:, None]] if time > 1 else None
        if found is None:
            return jnp.full((batch, time, time, count), -1, jnp.int32)
        found = jnp.where((width > 1)[..., None, None], found, -1)
        return jnp.moveaxis(found, 2, 0).astype(jnp.int32)

    return Viterbi(
        whole.max(-1),
        whole.argmax(-1).astype(jnp.int32),
        by_last_word(left),
        by_last_word(right),
        by_last_word(split),
        jnp.broadcast_to(word, leaf.shape).astype(jnp.int32),
    )


@jax.jit
def labelled_recall(
    spans: Array, tags: Array, lengths: Array, scored: Array, threshold: Array
) -> LabelledRecall:
    """s(i, j) = max(0, max_A spans[i, j, A] - threshold) over scored A; best tree by recursion.

    best(i, j) = s(i, j) + max_k best(i, k) + best(k + 1, j).
    """
    batch, time = tags.shape[:2]
    marginal = jnp.where(scored, spans, 0)
    label = marginal.argmax(-1)
    s = jnp.maximum(marginal.max(-1) - threshold, 0)
    label = jnp.where((s > 0) & (marginal.max(-1) > 0), label, -1)
    start = jnp.arange(time)
    best = jnp.zeros((batch, time, time), spans.dtype)
    split = jnp.full((batch, time, time), -1, jnp.int32)

    def step(state: tuple[Array, Array], width: Array) -> tuple[tuple[Array, Array], None]:
        best, split = state
        last = jnp.clip(start + width - 1, 0, time - 1)
        k = start  # last word of the left child
        below = jnp.swapaxes(best, 1, 2)[:, last]  # [batch, i, k + 1]: words k + 1..last
        right = jnp.concatenate([below[..., 1:], jnp.zeros_like(below[..., :1])], -1)
        inside = (k >= start[:, None]) & (k < last[:, None])
        scores = jnp.where(inside, best + right, -jnp.inf)
        fits = start + width <= time
        old = best[:, start, last]
        new = jnp.where(fits, s[:, start, last] + scores.max(-1), old)
        kept = jnp.where(fits, scores.argmax(-1), split[:, start, last])
        # Rows that do not fit all write to the last column what stands there.
        return (
            best.at[:, start, last].set(new),
            split.at[:, start, last].set(kept.astype(jnp.int32)),
        ), None

    (best, split), _ = lax.scan(step, (best, split), jnp.arange(2, time + 1))
    score = best[jnp.arange(batch), 0, lengths - 1]
    return LabelledRecall(score, label.astype(jnp.int32), split, tags.argmax(-1).astype(jnp.int32))


def viterbi_trees(grammar: Grammar, found: Viterbi, lengths: ArrayLike) -> list[Tree | None]:
    """The trees as `nltk.Tree`s, None for sentences of probability zero."""
    log_prob, top, left, right, split, word = (np.asarray(a) for a in found)
    count, names = len(grammar.nonterminals), grammar.symbols

    def one(seed: tuple[int, int, int, int]) -> tuple[list[str], list[Any]]:
        b, i, j, symbol = seed
        if i == j:
            return [names[symbol]], [grammar.vocabulary[word[b, i, symbol - count]]]
        k, first, second = (int(a[b, i, j, symbol]) for a in (split, left, right))
        return [names[symbol]], [(b, i, k, first), (b, k + 1, j, second)]

    return [
        unfold((b, 0, int(n) - 1, int(top[b])), one)[0] if log_prob[b] > -np.inf else None
        for b, n in enumerate(np.asarray(lengths))
    ]


def labelled_recall_trees(
    grammar: Grammar, found: LabelledRecall, tokens: ArrayLike, lengths: ArrayLike
) -> list[Tree]:
    """The trees as `nltk.Tree`s: spans without a label leave their children to the one above.

    The whole sentence is always a node, with the empty label where it has none.
    """
    _, label, split, tag = (np.asarray(a) for a in found)
    words = np.asarray(tokens)

    def one(seed: tuple[int, int, int]) -> tuple[list[str], list[Any]]:
        b, i, j = seed
        if i == j:
            return [grammar.preterminals[tag[b, i]]], [grammar.vocabulary[words[b, i]]]
        k, own = int(split[b, i, j]), int(label[b, i, j])
        labels = [] if own < 0 else [grammar.nonterminals[own]]
        return labels, [(b, i, k), (b, k + 1, j)]

    trees = []
    for b, n in enumerate(np.asarray(lengths)):
        parts = unfold((b, 0, int(n) - 1), one)
        trees.append(parts[0] if len(parts) == 1 else Tree("", parts))
    return trees


def _log(array: Array) -> Array:
    return jnp.where(array > 0, jnp.log(jnp.where(array > 0, array, 1)), -jnp.inf)
