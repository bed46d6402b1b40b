"""Expected counts against enumeration, EM on a toy, entropy against its definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.grammar import chart
from synthetic.grammar.grammar import Weights


def weights(rng, n=2, p=2, v=3, sharp=1.0):
    s = n + p
    return Weights(
        jnp.asarray(rng.dirichlet(np.full(s, sharp))),
        jnp.asarray(rng.dirichlet(np.full(s * s, sharp), n).reshape(n, s, s)),
        jnp.asarray(rng.dirichlet(np.full(v, sharp), p)),
    )


def derivations(w, symbol, i, j):
    """(probability, rules) of every way to get from a symbol to leaves i..j, without words."""
    n, s = w.rules.shape[:2]
    if symbol >= n:
        if i == j:
            yield 1.0, (), (symbol - n,)
        return
    for k, b, c in itertools.product(range(i, j), range(s), range(s)):
        for left, right in itertools.product(derivations(w, b, i, k), derivations(w, c, k + 1, j)):
            prob = float(w.rules[symbol, b, c]) * left[0] * right[0]
            yield prob, ((symbol, b, c), *left[1], *right[1]), left[2] + right[2]


def enumerate_all(w, words, hidden):
    """Z, expected counts and entropy over trees and hidden words, one derivation at a time."""
    n, s = w.rules.shape[:2]
    choices = [range(w.emission.shape[1]) if h else [x] for x, h in zip(words, hidden, strict=True)]
    host = Weights(*map(np.asarray, w))
    counts, probs = Weights(*(np.zeros(a.shape) for a in w)), []
    for top in range(s):
        for prob, rules, tags in derivations(host, top, 0, len(words) - 1):
            for spoken in itertools.product(*choices):
                p = host.root[top] * prob
                p *= np.prod([host.emission[pair] for pair in zip(tags, spoken, strict=True)])
                probs.append(p)
                counts.root[top] += p
                for rule in rules:
                    counts.rules[rule] += p
                for pair in zip(tags, spoken, strict=True):
                    counts.emission[pair] += p
    z, p = sum(probs), np.array([p for p in probs if p > 0])
    entropy = -(p / z * np.log(p / z)).sum()
    return Weights(*(a / z for a in counts)), entropy


@pytest.fixture(scope="module")
def cases():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        tokens, lengths = rng.integers(0, 3, (6, 4)), np.array([1, 2, 3, 4, 4, 1])
        mask = np.arange(4) == np.array([-1, -1, 0, -1, 2, 0])[:, None]
        w = weights(rng)
        rows = [enumerate_all(w, tokens[b, :n], mask[b, :n]) for b, n in enumerate(lengths)]
        return w, (tokens, lengths, mask), rows


def test_expected_counts(x64, cases):
    w, data, rows = cases
    found = chart.expected_counts(w, *data)
    for part in range(3):
        want = sum(row[0][part] for row in rows)
        np.testing.assert_allclose(found[part], want, rtol=1e-12, atol=1e-14)


def test_entropy(x64, cases):
    w, data, rows = cases
    np.testing.assert_allclose(
        chart.entropy(w, *data), [row[1] for row in rows], rtol=1e-11, atol=1e-13
    )


def test_em_step_is_relative_frequencies(x64, cases):
    w, data, rows = cases
    new, value = chart.em_step(w, *data)
    np.testing.assert_allclose(value, chart.log_z(w, *data).sum(), rtol=1e-13)
    counts = sum(row[0].rules for row in rows)
    np.testing.assert_allclose(
        new.rules, counts / counts.sum((1, 2), keepdims=True), rtol=1e-12, atol=1e-14
    )
    np.testing.assert_allclose(new.emission.sum(1), 1, rtol=1e-14)
    np.testing.assert_allclose(new.root.sum(), 1, rtol=1e-14)


def test_unseen_symbols_keep_their_weights(x64):
    w = weights(np.random.default_rng(1))
    w = w._replace(root=jnp.array([0.0, 0.0, 1.0, 0.0]))
    new, _ = chart.em_step(w, np.array([[1]]), np.array([1]))
    np.testing.assert_array_equal(new.rules, w.rules)
    np.testing.assert_array_equal(new.emission[1], w.emission[1])
    np.testing.assert_allclose(new.emission[0], [0, 1, 0])


def toy(rng, count=400, longest=8):
    """Sentences a^n b^n with n geometric, and the highest likelihood a geometric law gives them.

    S -> a S b | a b is two nonterminals' work; they cannot count beyond that.
    """
    n = np.minimum(rng.geometric(0.5, count), longest // 2)
    tokens = (np.arange(longest) >= n[:, None]).astype(int)
    again = 1 - 1 / n.mean()
    return tokens, 2 * n, (np.log(1 - again) + (n - 1) * np.log(again)).sum()


def test_em_on_a_toy(x64):
    """Never falls, and finds the grammar that the sentences were drawn with."""
    rng = np.random.default_rng(2)
    tokens, lengths, ceiling = toy(rng)
    for _ in range(2):
        fit = chart.em(weights(rng, 2, 2, 2), tokens, lengths, steps=50)
        assert fit.log_likelihood.shape == (51,)
        assert np.diff(fit.log_likelihood).min() > -1e-9 * abs(ceiling)
        np.testing.assert_allclose(fit.log_likelihood[-1], ceiling, rtol=1e-9)
    with pytest.raises(ValueError, match="steps is -1"):
        chart.em(weights(rng, 2, 2, 2), tokens, lengths, steps=-1)
