"""Sampled sentences and trees against enumeration, closed forms and a walk over every tree."""

from collections import Counter
from itertools import product

import jax
import numpy as np
import pytest
from nltk.tree import Tree
from scipy.stats import chi2

from synthetic.grammar.examples import named
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import Alias, Sampler, Sentences, ends, sample, trees

# Root also at words, words in several pre-terminals, much mass above any small length.
LOOSE = """
S -> S S [0.35] | A S [0.1] | 'x' [0.3] | 'y' [0.25]
A -> 'x' [0.5] | 'z' [0.25] | A A [0.25]
"""


def sentence_probability(grammar: Grammar, tokens: tuple[int, ...]) -> float:
    n, time = len(grammar.nonterminals), len(tokens)
    chart = np.zeros((time, time, len(grammar.symbols)))
    for t, word in enumerate(tokens):
        chart[t, t, n:] = grammar.emission[:, word]
    for width in range(2, time + 1):
        for i in range(time - width + 1):
            for k in range(i, i + width - 1):
                outer = np.outer(chart[i, k], chart[k + 1, i + width - 1])
                chart[i, i + width - 1, :n] += (grammar.rules * outer).sum((1, 2))
    return float(chart[0, -1] @ grammar.root)


def fits(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Pearson's statistic within the quantile that chance exceeds once in 10000."""
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    there = expected > 0
    assert counts[~there].sum() == 0
    statistic = ((counts - expected)[there] ** 2 / expected[there]).sum()
    return statistic < chi2.ppf(0.9999, there.sum() - 1)


@pytest.mark.parametrize("max_length", [1, 2, 4])
def test_sentences_have_their_probabilities_given_the_length(max_length):
    grammar, rows = Grammar.from_text(LOOSE), 40000
    drawn = sample(grammar, jax.random.key(max_length), rows, max_length)
    counts = Counter(
        tuple(row[:length].tolist())
        for row, length in zip(np.asarray(drawn.tokens), np.asarray(drawn.lengths), strict=True)
    )
    sentences = [x for n in range(1, max_length + 1) for x in product(range(3), repeat=n)]
    p = np.array([sentence_probability(grammar, x) for x in sentences])
    assert p.sum() == pytest.approx(grammar.length_probabilities(max_length).sum(), rel=1e-12)
    observed = np.array([counts[x] for x in sentences])
    assert observed.sum() == rows
    assert fits(observed, p / p.sum() * rows)


def test_lengths_and_rules_of_long_sentences():
    grammar = named("english")
    rows, longest = 20000, 60
    drawn = sample(Sampler.of(grammar), jax.random.key(0), rows, longest)
    p = grammar.length_probabilities(longest)
    lengths = np.asarray(drawn.lengths)
    assert fits(np.bincount(lengths, minlength=longest + 1), p / p.sum() * rows)
    mean = (p * np.arange(longest + 1)).sum() / p.sum()
    assert lengths.mean() == pytest.approx(mean, abs=4 * lengths.std() / rows**0.5)
    # Words by pre-terminal, which no limit on the length changes.
    tags, tokens = np.asarray(drawn.tags), np.asarray(drawn.tokens)
    for tag in range(len(grammar.preterminals)):
        counts = np.bincount(tokens[tags == tag], minlength=len(grammar.vocabulary))
        assert fits(counts, grammar.emission[tag] * counts.sum())


def test_rules_of_trees():
    grammar = Grammar.random(3, 3, 2, 5, subcritical=0.5)
    drawn = sample(grammar, jax.random.key(4), 4000, 64)  # practically no longer ones
    assert grammar.length_probabilities(64).sum() > 1 - 1e-6
    counts = np.zeros_like(grammar.rules)
    symbol = {name: number for number, name in enumerate(grammar.symbols)}
    roots = np.zeros(len(grammar.symbols))
    for tree in trees(grammar, drawn):
        roots[symbol[tree.label()]] += 1
        for node in tree.subtrees(lambda node: len(node) == 2):
            counts[tuple(symbol[x.label()] for x in (node, *node))] += 1
    assert fits(roots, grammar.root * 4000)
    for own, expected in zip(counts, grammar.rules, strict=True):
        assert fits(own.ravel(), expected.ravel() * own.sum())


def test_trees_and_spans_are_those_of_the_arrays():
    grammar = named("english")
    drawn = sample(grammar, jax.random.key(5), 300, 17)
    last = np.asarray(ends(drawn.starts))
    tokens, lengths, tags, nonterminals, starts = map(np.asarray, drawn)
    for row, tree in enumerate(trees(grammar, drawn)):
        words, spans, leaves = [], [], []

        def walk(node: Tree, words=words, spans=spans, leaves=leaves) -> None:
            if len(node) == 1:
                leaves.append(node.label())
                words.append(node[0])
                return
            place = len(spans)
            spans.append((node.label(), len(words)))
            for child in node:
                walk(child)
            spans[place] += (len(words) - 1,)

        walk(tree)
        n = lengths[row]
        assert words == grammar.decode(tokens[[row]], lengths[[row]])[0]
        assert leaves == [grammar.preterminals[tag] for tag in tags[row, :n]]
        assert spans == [
            (grammar.nonterminals[a], start, end)
            for a, start, end in zip(
                nonterminals[row, : n - 1], starts[row, : n - 1], last[row, : n - 1], strict=True
            )
        ]
        for array, padding in ((tokens, 0), (tags, -1)):
            assert (array[row, n:] == padding).all()
        for array in (nonterminals, starts, last):
            assert (array[row, n - 1 :] == -1).all()
        assert grammar.normalise(grammar.restore(tree)) == tree


def test_alias_tables_hold_the_distributions():
    grammar = named("english")
    sampler = Sampler.of(grammar)
    flat = grammar.rules.reshape(len(grammar.rules), -1)
    for table, weights in (
        (sampler.root, grammar.root[None]),
        (sampler.rules, flat),
        (sampler.words, grammar.emission),
    ):
        assert isinstance(table, Alias)
        own, other, threshold = (np.asarray(x) for x in table)
        cells = own.shape[1]
        share = threshold * (cells / 2**32)
        rebuilt = np.zeros_like(weights)
        for row in range(len(weights)):
            np.add.at(rebuilt[row], own[row], share[row] / cells)
            np.add.at(rebuilt[row], other[row], (1 - share[row]) / cells)
        np.testing.assert_allclose(rebuilt, weights, atol=1e-9)


def test_same_sentences_inside_jit_and_in_float64():
    grammar = named("toy")
    key = jax.random.key(6)
    plain = sample(grammar, key, 64, 9)
    inside = jax.jit(lambda sampler, key: sample(sampler, key, 64, 9))(Sampler.of(grammar), key)
    with jax.enable_x64(True):
        double = sample(grammar, key, 64, 9)
    for a, b, c in zip(plain, inside, double, strict=True):
        assert a.dtype == b.dtype == c.dtype == np.int32
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert isinstance(inside, Sentences)
    other = sample(grammar, jax.random.key(7), 64, 9)
    assert not np.array_equal(plain.tokens, other.tokens)


def test_errors():
    key = jax.random.key(0)
    with pytest.warns(UserWarning, match="spectral radius"):
        endless = Grammar.from_text("S -> S S [0.6] | 'a' [0.4]")
    with pytest.raises(ValueError, match="expected children is 1.2, must be at most 1"):
        sample(endless, key, 2, 5)
    long = Grammar.from_text("S -> 'a' 'b' 'c' [1]")
    with pytest.raises(ValueError, match="max_length is 2, but no sentence"):
        sample(long, key, 2, 2)
    assert sample(long, key, 2, 3).lengths.tolist() == [3, 3]
    with pytest.raises(ValueError, match="batch is 0 and max_length 3, must be at least 1"):
        sample(long, key, 0, 3)
    rare = Grammar.from_text("S -> A S [0.999999999] | 'a' [0.000000001]\nA -> 'a' [1]")
    for given, message in (
        ((rare, 64, 3), "max_length is 3, but a share of 3e-09 .* takes about 2.1e.10 draws"),
        ((long, 10**9, 3), "drawing takes 67.1 GiB"),
        ((long, 2, 10**6), "max_length 1000000: drawing takes .* products for the lengths"),
        ((long, 2, 10**9), "max_length 1000000000: drawing takes"),
        ((long, 2, "3"), "max_length is '3', must be a whole number"),
        ((long, 2.0, 3), "batch is 2.0, must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(given[0], key, *given[1:])
    half = Grammar(long.nonterminals, long.preterminals, long.vocabulary, long.root,
                   long.rules / 2, long.emission)  # fmt: skip
    with pytest.raises(ValueError, match="sum to 0.5, must sum to 1"):
        sample(half, key, 2, 3)
