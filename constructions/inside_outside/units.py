"""The units in which the construction holds probabilities, and what they can hold for certain.

A linear layer cannot rescale what it reads, so there is one unit a word: the inside value of a
word w is its emission times `scale / max_T emission[T, w]`. Values of a span of n words are then
multiplied by n such factors, and so is Z: they cancel in every probability.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float

from constructions.inside_outside.tableau import Layout
from synthetic.grammar import Grammar

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
    reached, seen = g.root, g.root.copy()
    for _ in range(longest):
        reached = reached[:inner] @ g.expected_children
        reached = reached / max(reached.sum(), 1)
        seen += reached
    often = seen[inner:] @ g.emission
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
