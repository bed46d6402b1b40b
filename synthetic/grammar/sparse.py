"""Inside-outside and Viterbi over a list of rules, for grammars whose dense rules would not fit.

Plain numpy, float64, one sentence at a time. An induced grammar with a thousand nonterminals has
some ten thousand rules out of its 10^9; a span costs (its splits) x (rules). Every span has a
scale of its own, so that no sentence is too long and no word too rare:

    beta(i, j) = b(i, j) exp(e(i, j)),  max b = 1;     alpha(i, j) = a(i, j) Z exp(-e(i, j))

and the marginals are a b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from nltk.tree import Tree

from synthetic.grammar.grammar import Grammar
from synthetic.grammar.productions import encoded
from synthetic.grammar.trees import unfold

Words = Sequence[int] | np.ndarray
"""Numbers of words in the vocabulary, one or more."""


class RuleList(NamedTuple):
    """A grammar by its rules that are not 0; symbols are nonterminals, then pre-terminals.

    Attributes:
        nonterminals, preterminals, vocabulary: names.
        root: `[symbols]`.
        parent, left, right: symbol numbers of every rule, `[rules]`.
        probability: of every rule, `[rules]`.
        emission: `[preterminals, vocabulary]`.
    """

    nonterminals: tuple[str, ...]
    preterminals: tuple[str, ...]
    vocabulary: tuple[str, ...]
    root: np.ndarray
    parent: np.ndarray
    left: np.ndarray
    right: np.ndarray
    probability: np.ndarray
    emission: np.ndarray

    @classmethod
    def of(cls, grammar: Grammar) -> RuleList:
        """The rules of a grammar that has them all."""
        g = grammar
        a, b, c = np.nonzero(g.rules)
        names = g.nonterminals, g.preterminals, g.vocabulary
        return cls(*names, g.root, a, b, c, g.rules[a, b, c], g.emission)

    def grammar(self) -> Grammar:
        """With dense rules, 8 |N| (|N| + |P|)^2 bytes."""
        inner, symbols = len(self.nonterminals), len(self.root)
        rules = np.zeros((inner, symbols, symbols))
        rules[self.parent, self.left, self.right] = self.probability
        return Grammar(*self[:3], root=self.root, rules=rules, emission=self.emission)

    def encode(self, sentence: Sequence[Any]) -> list[int]:
        """Words as numbers; ValueError if there is none, or one not in the vocabulary."""
        if isinstance(sentence, Sequence) and not len(sentence):
            raise ValueError("the sentence is empty, must have a word")
        return encoded(sentence, {word: n for n, word in enumerate(self.vocabulary)})


class Marginals(NamedTuple):
    """Of one sentence; log_z is -inf and the others are NaN (0/0) if it has no parse.

    Attributes:
        log_z: log of the probability of the words.
        spans: P(words i..j, inclusive, are one constituent A | words), `[time, time, nonterminal]`.
        tags: P(pre-terminal of word t | words), `[time, preterminal]`.
    """

    log_z: float
    spans: np.ndarray
    tags: np.ndarray


def inside_outside(rules: RuleList, words: Words, *, strict: bool = True) -> Marginals:
    """Marginals of one sentence, exactly.

    Raises:
        ValueError: the sentence has no parse, and `strict`.
    """
    n, inner, symbols = len(words), len(rules.nonterminals), len(rules.root)
    beta, scale = _inside(rules, words)
    alpha = np.zeros_like(beta)
    z = float(rules.root @ beta[0, -1])
    if not z > 0:
        if strict:
            said = " ".join(repr(rules.vocabulary[word]) for word in words[:12])
            more = " .." if n > 12 else ""
            raise ValueError(f"the sentence ({said}{more}) has no parse: nothing follows from it")
        spans, tags = np.zeros((n, n, inner)), np.full((n, symbols - inner), np.nan)
        spans[np.triu_indices(n, 1)] = np.nan
        return Marginals(-np.inf, spans, tags)
    alpha[0, -1] = rules.root / z
    for i, j in _spans(n)[::-1]:
        passed = alpha[i, j, rules.parent] * rules.probability
        used = np.flatnonzero(passed)
        if scale[i, j] == -np.inf or not len(used):
            continue
        joint = scale[i, i:j] + scale[i + 1 : j + 1, j] - scale[i, j]
        passed = passed[used] * np.exp(np.minimum(joint, 700))[:, None]
        left, right = rules.left[used], rules.right[used]
        alpha[i, i:j] += _by_column(passed * beta[i + 1 : j + 1, j][:, right], left, symbols)
        alpha[i + 1 : j + 1, j] += _by_column(passed * beta[i, i:j][:, left], right, symbols)
    both = alpha * beta
    log_z = float(np.log(z) + scale[0, -1])
    return Marginals(log_z, both[..., :inner], np.einsum("iix->ix", both)[:, inner:])


def _inside(rules: RuleList, words: Words) -> tuple[np.ndarray, np.ndarray]:
    """b `[time, time, symbol]` and e `[time, time]`; 0 and -inf where nothing spans i..j."""
    n, inner = len(words), len(rules.nonterminals)
    b, e = np.zeros((n, n, len(rules.root))), np.full((n, n), -np.inf)

    def keep(i: int, j: int, values: np.ndarray, first: int, exponent: float) -> None:
        most = values.max()
        if most > 0:
            b[i, j, first : first + len(values)] = values / most
            e[i, j] = exponent + np.log(most)

    for t, word in enumerate(words):
        keep(t, t, rules.emission[:, word], inner, 0.0)
    for i, j in _spans(n):
        joint = e[i, i:j] + e[i + 1 : j + 1, j]
        most = joint.max()
        if most > -np.inf:
            left, right = b[i, i:j][:, rules.left], b[i + 1 : j + 1, j][:, rules.right]
            pairs = np.einsum("k,kr,kr->r", np.exp(joint - most), left, right)
            total = np.bincount(rules.parent, rules.probability * pairs, inner)
            keep(i, j, total, 0, most)
    return b, e


def _by_column(values: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    """Sums of `[row, rules]` over the rules of each column, `[row, size]`."""
    where = size * np.arange(len(values))[:, None] + columns
    return np.bincount(where.ravel(), values.ravel(), size * len(values)).reshape(-1, size)


def _spans(n: int) -> list[tuple[int, int]]:
    """First and last word of the spans of two words or more, the narrowest first."""
    return [(i, i + width - 1) for width in range(2, n + 1) for i in range(n - width + 1)]


def viterbi(rules: RuleList, words: Words) -> tuple[float, Tree | None]:
    """Log probability and tree of the most probable one; -inf and None where there is none."""
    n, inner = len(words), len(rules.nonterminals)
    with np.errstate(divide="ignore"):
        root, rule, emission = map(np.log, (rules.root, rules.probability, rules.emission))
    best = np.full((n, n, len(root)), -np.inf)
    names = rules.nonterminals + rules.preterminals

    def ways(i: int, j: int, used: slice | np.ndarray) -> np.ndarray:
        left, right = best[i, i:j][:, rules.left[used]], best[i + 1 : j + 1, j]
        return left + right[:, rules.right[used]] + rule[used]

    def one(seed: tuple[int, int, int]) -> tuple[list[str], list[Any]]:
        i, j, symbol = seed
        if i == j:
            return [names[symbol]], [rules.vocabulary[words[i]]]
        own = np.flatnonzero(rules.parent == symbol)
        found = ways(i, j, own)
        split, r = divmod(int(found.argmax()), len(own))
        k, left, right = i + split, int(rules.left[own[r]]), int(rules.right[own[r]])
        return [names[symbol]], [(i, k, left), (k + 1, j, right)]

    for t, word in enumerate(words):
        best[t, t, inner:] = emission[:, word]
    for i, j in _spans(n):
        np.maximum.at(best[i, j], rules.parent, ways(i, j, slice(None)).max(0))
    tops = root + best[0, -1]
    top = int(tops.argmax())
    log_prob = float(tops[top])
    return log_prob, unfold((0, n - 1, top), one)[0] if log_prob > -np.inf else None
