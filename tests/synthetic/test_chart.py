"""Charts against enumeration of all trees, textbook loops, autodiff, and what must hold."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar, Weights


def weights(seed=0, n=3, p=3, v=4, proper=True, dtype=None):
    rng = np.random.default_rng(seed)
    s = n + p
    arrays = [
        rng.dirichlet(np.ones(s)),
        rng.dirichlet(np.ones(s * s), n).reshape(n, s, s),
        rng.dirichlet(np.ones(v), p),
    ]
    if not proper:  # a restricted grammar: some rules gone, the rest as they were
        arrays[1] *= rng.random(arrays[1].shape) < 0.5
        arrays[2] *= rng.random(arrays[2].shape) < 0.8
    return Weights(*(jnp.asarray(a, dtype) for a in arrays))


def trees(symbol, i, j, n):
    """All derivations of words i..j from a symbol, as (spans, rules, tags)."""
    root_symbols, count = n
    if symbol >= count:
        if i == j:
            yield (), (), ((i, symbol - count),)
        return
    for k in range(i, j):
        for b, c in itertools.product(range(root_symbols), repeat=2):
            for left in trees(b, i, k, n):
                for right in trees(c, k + 1, j, n):
                    yield (
                        ((i, j, symbol), *left[0], *right[0]),
                        ((symbol, b, c), *left[1], *right[1]),
                        left[2] + right[2],
                    )


def every_tree(w, length):
    """(root times rules, top, spans, rules, tags) of every tree with this many words."""
    root, rules, _ = map(np.asarray, w)
    size = (rules.shape[1], rules.shape[0])
    for top in range(rules.shape[1]):
        for spans, used, tags in trees(top, 0, length - 1, size):
            yield root[top] * np.prod([rules[r] for r in used]), top, spans, used, tags


def brute_force(w, words, hidden):
    """log Z, span and tag marginals, posteriors, by adding up all trees."""
    emission = np.asarray(w.emission)
    length, (p, v), n = len(words), emission.shape, w.rules.shape[0]
    leaf = np.where(hidden[:, None], emission.sum(1), emission[:, words].T)
    z, span, tag, post = 0, np.zeros((length, length, n)), np.zeros((length, p)), 0
    post = np.zeros((length, v))
    for weight, _, spans, _, tags in every_tree(w, length):
        factors = [leaf[t, x] for t, x in tags]
        prob = weight * np.prod(factors)
        z += prob
        for i, j, a in spans:
            span[i, j, a] += prob
        for t, x in tags:
            tag[t, x] += prob
            post[t] += weight * np.prod(factors[:t] + factors[t + 1 :]) * emission[x]
    return np.log(z), span / z, tag / z, post / post.sum(-1, keepdims=True)


def textbook(w, words, hidden):
    """The same by loops over spans."""
    root, rules, emission = map(np.asarray, w)
    n, s = rules.shape[:2]
    length = len(words)
    ins, out = np.zeros((2, length, length, s))
    for t in range(length):
        ins[t, t, n:] = emission.sum(1) if hidden[t] else emission[:, words[t]]
    for i in reversed(range(length)):
        for j in range(i + 1, length):
            for k in range(i, j):
                ins[i, j, :n] += rules.reshape(n, -1) @ np.outer(
                    ins[i, k], ins[k + 1, j]
                ).ravel()  # fmt: skip
    z = root @ ins[0, -1]
    out[0, -1] = root * (ins[0, -1] >= 0)
    if length > 1:
        out[0, -1, n:] = 0
    for i in range(length):
        for j in reversed(range(i + 1, length)):
            for k in range(i, j):
                out[i, k] += np.einsum("abc,a,c->b", rules, out[i, j, :n], ins[k + 1, j])
                out[k + 1, j] += np.einsum("abc,a,b->c", rules, out[i, j, :n], ins[i, k])
    inner = ins * out / z
    t = np.arange(length)
    post = out[t, t, n:] @ emission
    return np.log(z), inner[..., :n], inner[t, t, n:], post / post.sum(-1, keepdims=True)


def masks(length):
    """No word hidden, each one, two, all."""
    for many in {0, 1, 2, length}:
        for where in itertools.islice(itertools.combinations(range(length), many), 3):
            yield np.isin(np.arange(length), where)


def compare(w, cases, oracle, time, tolerance=1e-12):
    """One batch of (words, hidden) against an oracle; returns what was found."""
    rng = np.random.default_rng(5)
    v = w.emission.shape[1]
    tokens = rng.integers(-9, v + 9, (len(cases), time))
    mask = rng.random((len(cases), time)) < 0.5
    for row, (words, hidden) in enumerate(cases):
        tokens[row, : len(words)], mask[row, : len(words)] = words, hidden
    lengths = np.array([len(words) for words, _ in cases])
    found = chart.inside_outside(w, tokens, lengths, mask)
    for row, (words, hidden) in enumerate(cases):
        n = len(words)
        log_z, span, tag, post = oracle(w, words, hidden)
        np.testing.assert_allclose(found.log_z[row], log_z, rtol=tolerance)
        for ours, theirs in (
            (found.span_marginals[row, :n, :n], span),
            (found.tag_marginals[row, :n], tag),
            (found.word_posterior[row, :n], post),
        ):
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=1e-300)
        assert not np.asarray(found.span_marginals[row, n:]).any()
        assert not np.asarray(found.span_marginals[row, :, n:]).any()
        assert not np.asarray(found.tag_marginals[row, n:]).any()
        assert not np.asarray(found.word_posterior[row, n:]).any()
    np.testing.assert_allclose(chart.log_z(w, tokens, lengths, mask), found.log_z, rtol=1e-14)
    return found, lengths


@pytest.mark.parametrize("proper", [True, False])
def test_all_trees(x64, proper):
    w = weights(1, 2, 2, 3, proper=proper)
    if not proper:
        w = w._replace(emission=w.emission.at[0, 0].set(0.0))
    rng = np.random.default_rng(2)
    cases = [
        (words, hidden)
        for length in range(1, 6)
        for hidden in masks(length)
        for words in [rng.integers(1, 3, length)]
    ]
    cases = [c for c in cases if textbook(w, *c)[0] > -np.inf][:30]
    assert len(cases) == 30
    compare(w, cases, brute_force, time=6)


def test_textbook_at_all_lengths(x64):
    w = weights(3, 4, 5, 7)
    rng = np.random.default_rng(4)
    cases = []
    for length in range(1, 13):
        for many in {0, min(2, length), length}:
            cases.append((rng.integers(0, 7, length), rng.permutation(length) < many))
    found, lengths = compare(w, cases, textbook, time=12)
    np.testing.assert_allclose(found.span_marginals.sum((1, 2, 3)), lengths - 1, atol=1e-12)
    whole = np.arange(12) < lengths[:, None]
    np.testing.assert_allclose(found.tag_marginals.sum(-1), whole, atol=1e-13)
    np.testing.assert_allclose(found.word_posterior.sum(-1), whole, atol=1e-13)


def test_chunks_of_any_time(x64):
    """Longer arrays run other loops; the numbers stay."""
    w = weights(5)
    words = np.random.default_rng(6).integers(0, 4, 7)
    want = textbook(w, words, np.zeros(7, bool))
    for time in (15,):
        tokens = np.zeros((1, time), int)
        tokens[0, :7] = words
        found = chart.inside_outside(w, tokens, np.array([7]))
        np.testing.assert_allclose(found.span_marginals[0, :7, :7], want[1], rtol=1e-12)
        np.testing.assert_allclose(found.word_posterior[0, :7], want[3], rtol=1e-12)


def test_padding_changes_nothing():
    w = weights(7, dtype=np.float32)
    rng = np.random.default_rng(8)
    tokens, lengths = rng.integers(0, 4, (6, 9)), np.array([1, 2, 3, 5, 8, 9])
    beyond = np.arange(9) >= lengths[:, None]
    first = chart.inside_outside(w, tokens, lengths)
    second = chart.inside_outside(w, np.where(beyond, 999, tokens), lengths, beyond)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_posterior_does_not_look(x64):
    w = weights(9)
    tokens = np.random.default_rng(10).integers(0, 4, (4, 6))
    tokens[:, 2] = np.arange(4)
    tokens[:, [0, 1, 3, 4, 5]] = tokens[:1, [0, 1, 3, 4, 5]]
    found = chart.inside_outside(w, tokens, np.full(4, 6))
    np.testing.assert_allclose(found.word_posterior[:, 2], found.word_posterior[:1, 2].repeat(4, 0))
    hidden = chart.inside_outside(w, tokens, np.full(4, 6), np.arange(6)[None] == [[2]] * 4)
    np.testing.assert_allclose(hidden.word_posterior[:, 2], found.word_posterior[:, 2])
    # and it is the change of Z with the word
    z = np.exp(np.asarray(found.log_z))
    np.testing.assert_allclose(found.word_posterior[0, 2], z / z.sum(), rtol=1e-12)


def test_gradient(x64):
    """d log Z / d log emission of a word seen once is its tag marginal; finite differences."""
    w = weights(11, 3, 3, 8)
    tokens, lengths = np.array([[3, 1, 4, 0, 5, 2, 6]]), np.array([7])
    found = chart.inside_outside(w, tokens, lengths)
    slope = jax.grad(lambda w: chart.log_z(w, tokens, lengths).sum())(w)
    by_word = np.asarray(slope.emission * w.emission)[:, tokens[0]].T
    np.testing.assert_allclose(found.tag_marginals[0], by_word, rtol=1e-12)
    whole = found.span_marginals[0].sum((0, 1))
    np.testing.assert_allclose((slope.rules * w.rules).sum((1, 2)), whole, rtol=1e-12)
    rng = np.random.default_rng(12)
    way = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)) * a, w)
    up, down = (
        chart.log_z(jax.tree.map(lambda a, b, e=e: a + e * b, w, way), tokens, lengths)[0]
        for e in (1e-5, -1e-5)
    )
    along = sum(jnp.vdot(a, b) for a, b in zip(slope, way, strict=True))
    np.testing.assert_allclose(along, (up - down) / 2e-5, rtol=1e-8)


@pytest.mark.parametrize(
    "length, hidden",
    [(100, False), (100, True)]
    + [pytest.param(40, h, marks=pytest.mark.slow) for h in (False, True)],
)
def test_float32(x64, length, hidden):
    """Weights as small as 1e-3 to a word: 2^-300 and less in all."""
    w = weights(13, 4, 6, 300, dtype=np.float32)
    tokens = np.random.default_rng(14).integers(0, 300, (2, length))
    mask = np.full((2, length), hidden)
    mask[1, ::7] = not hidden
    single = chart.inside_outside(w, tokens, np.full(2, length), mask)
    double = Weights(*(a.astype(np.float64) for a in w))
    double = chart.inside_outside(double, tokens, np.full(2, length), mask)
    assert all(a.dtype == np.float32 for a in single)
    np.testing.assert_allclose(single.log_z, double.log_z, rtol=1e-6)
    for name in ("span_marginals", "tag_marginals", "word_posterior"):
        np.testing.assert_allclose(getattr(single, name), getattr(double, name), atol=1e-6)


def test_probability_zero():
    """Nothing is finite or counted; the others of the batch do not notice."""
    w = weights(15, dtype=np.float32)
    w = w._replace(emission=w.emission.at[:, 2].set(0.0), root=w.root.at[3:].set(0.0))
    tokens, lengths = np.array([[0, 1, 2], [0, 1, 3], [1, 0, 0]]), np.array([3, 3, 1])
    found = chart.inside_outside(w, tokens, lengths, strict=False)
    assert found.log_z[0] == found.log_z[2] == -np.inf
    with pytest.raises(ValueError, match=r"sentence 2 \(word 1\) has no parse"):
        chart.inside_outside(w, tokens, lengths)
    for row, n in ((0, 3), (2, 1)):  # nothing is said of what cannot be, and 0 behind the end
        assert np.isnan(found.tag_marginals[row, :n]).all()
        assert np.isnan(found.span_marginals[row][np.triu_indices(n, 1)]).all()
        assert np.isnan(found.word_posterior[row, :2]).sum() == (8 if n == 3 else 4)
        assert not any(np.asarray(a)[row, n:].any() for a in found[1:])
    # the third word is as any other there
    same = chart.inside_outside(w, np.array([[0, 1, 0]]), np.array([3]))
    np.testing.assert_array_equal(found.word_posterior[0, 2], same.word_posterior[0, 2])
    with pytest.raises(ValueError, match=r"sentence 0 \(word 0 word 1 word 2\) has no parse"):
        chart.entropy(w, tokens[:1], lengths[:1])
    same = tokens[[1, 1, 1]], lengths[[1, 1, 1]]
    alone = chart.inside_outside(w, *same)
    for ours, theirs in zip(found, alone, strict=True):
        np.testing.assert_allclose(ours[1], theirs[0], rtol=1e-6)
    counts = chart.expected_counts(w, tokens, lengths)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-5),
        counts,
        chart.expected_counts(w, *same),
    )


def test_improbable_word_hides_nothing():
    """Outside values have scales of their own: paths through spans that cannot be count as well."""
    # S -> A B | C D: "a" and "c" stand first, "b" and "d" second.
    g = Grammar(
        ("S",), ("A", "B", "C", "D"), ("a", "b", "c", "d"),
        np.array([1.0, 0, 0, 0, 0]),
        np.array([[[0.0] * 5, [0, 0, 0.5, 0, 0], [0.0] * 5, [0, 0, 0, 0, 0.5], [0.0] * 5]]),
        np.eye(4) * (1 - 1e-30) + 1e-30 / 4,
    )  # fmt: skip
    found = chart.inside_outside(g.weights(np.float32), np.array([[0, 3]]), np.array([2]))
    assert np.isfinite(found.log_z[0])
    np.testing.assert_allclose(found.word_posterior[0], np.eye(4)[[2, 1]], atol=1e-6)


def test_one_compilation_for_all_lengths():
    w = weights(17, dtype=np.float32)
    chart.inside_outside(w, np.zeros((2, 5), int), np.array([5, 5]))
    before = chart._inside_outside._cache_size()
    chart.inside_outside(w, np.ones((2, 5), int), np.array([1, 3]), np.ones((2, 5), bool))
    assert chart._inside_outside._cache_size() == before


def test_empty_batch_and_jit():
    w = weights(18, dtype=np.float32)
    found = chart.inside_outside(w, np.zeros((0, 4), int), np.zeros(0, int))
    assert [a.shape for a in found] == [(0,), (0, 4, 4, 3), (0, 4, 3), (0, 4, 4)]
    tokens, lengths = jnp.array([[1, 2, 3]]), jnp.array([3])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        jax.jit(chart.inside_outside)(w, tokens, lengths),
        chart.inside_outside(w, tokens, lengths),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": np.zeros(3, int)}, "tokens has shape"),
        ({"tokens": np.zeros((1, 3))}, "tokens has dtype"),
        ({"tokens": np.array([["a", "b", "c"]])}, "tokens has dtype <U1, must be integers"),
        ({"tokens": np.array([[0, 1, 2]], object)}, "tokens has dtype object"),
        ({"tokens": [[0, 1], [2]]}, "tokens has rows of different lengths"),
        ({"tokens": np.array([[0, 4, 0]])}, "tokens has 4, must be in 0..3"),
        ({"tokens": np.array([[0, -1, 0]])}, "tokens has -1"),
        ({"lengths": np.array([3, 3])}, "lengths has shape"),
        ({"lengths": np.array([3.0])}, "lengths has dtype"),
        ({"lengths": np.array([0])}, "lengths has 0, must be in 1..3"),
        ({"lengths": np.array([4])}, "lengths has 4, must be in 1..3"),
        ({"mask": np.zeros((1, 2), bool)}, "mask has shape"),
        ({"mask": np.zeros((1, 3), int)}, "mask has dtype"),
    ],
)
def test_errors(change, message):
    good = {"tokens": np.zeros((1, 3), int), "lengths": np.array([3]), "mask": None}
    with pytest.raises(ValueError, match=message):
        chart.inside_outside(weights(), **{**good, **change})


# Trees


def test_viterbi(x64):
    w = weights(20, 2, 2, 3)
    g = Grammar(tuple("AB"), tuple("xy"), tuple("uvw"), *map(np.asarray, w))
    rng = np.random.default_rng(21)
    lengths = np.arange(1, 6).repeat(3)
    tokens = rng.integers(0, 3, (15, 5))
    mask = rng.random((15, 5)) < 0.2
    found = chart.viterbi(w, tokens, lengths, mask)
    emission = np.asarray(w.emission)
    grown = chart.viterbi_trees(g, found, lengths)
    for row, n in enumerate(lengths):
        leaf = np.where(mask[row, :n, None], emission.max(1), emission[:, tokens[row, :n]].T)
        scored = [
            (weight * np.prod([leaf[t, x] for t, x in tags]), spans, tags)
            for weight, _, spans, _, tags in every_tree(w, n)
        ]
        best, spans, tags = max(scored, key=lambda item: item[0])
        np.testing.assert_allclose(found.log_prob[row], np.log(best), rtol=1e-12)
        tree = grown[row]
        assert tree is not None
        assert [t.label() for t in tree.subtrees(lambda t: t.height() == 2)] == [
            "xy"[x] for _, x in tags
        ]
        inner = tree.subtrees(lambda t: t.height() > 2)
        assert sorted(t.label() for t in inner) == sorted("AB"[a] for _, _, a in spans)
        said = [g.vocabulary.index(word) for word in tree.leaves()]
        assert all(m or a == b for m, a, b in zip(mask[row], said, tokens[row], strict=False))


def test_viterbi_of_probability_zero(x64):
    w = weights(22, 2, 2, 3)
    g = Grammar(tuple("AB"), tuple("xy"), tuple("uvw"), *map(np.asarray, w))
    w = w._replace(emission=w.emission.at[:, 0].set(0.0))
    found = chart.viterbi(w, np.zeros((1, 3), int), np.array([3]))
    assert found.log_prob[0] == -np.inf
    assert chart.viterbi_trees(g, found, np.array([3])) == [None]


def bracketings(i, j):
    if i == j:
        yield ()
    for k in range(i, j):
        for left, right in itertools.product(bracketings(i, k), bracketings(k + 1, j)):
            yield ((i, j), *left, *right)


@pytest.mark.parametrize("exclude, threshold", [((), 0.0), ((1,), 0.0), ((), 0.3), ((0,), 0.2)])
def test_labelled_recall(x64, exclude, threshold):
    w = weights(23, 3, 3, 4)
    g = Grammar(tuple("ABC"), tuple("xyz"), tuple("uvwt"), *map(np.asarray, w))
    rng = np.random.default_rng(24)
    tokens, lengths = rng.integers(0, 4, (12, 6)), np.array([1, 2, 3, 4, 5, 6] * 2)
    result = chart.inside_outside(w, tokens, lengths)
    found = chart.labelled_recall(result, lengths, exclude=exclude, threshold=threshold)
    spans = np.array(result.span_marginals)
    spans[..., list(exclude)] = 0
    score = np.maximum(spans.max(-1) - threshold, 0)
    for row, n in enumerate(lengths):
        best = max(bracketings(0, n - 1), key=lambda tree: sum(score[row][s] for s in tree))
        want = sum(score[row][s] for s in best)
        np.testing.assert_allclose(found.score[row], want, rtol=1e-12)
        labels = sorted("ABC"[spans[row][s].argmax()] for s in best if score[row][s] > 0)
        (tree,) = chart.labelled_recall_trees(
            g,
            jax.tree.map(lambda a, row=row: a[row : row + 1], found),
            tokens[row : row + 1],
            np.array([n]),
        )
        kept = [t.label() for t in tree.subtrees(lambda t: t.height() > 2)]
        assert sorted(label for label in kept if label) == labels
        assert tree.leaves() == [g.vocabulary[t] for t in tokens[row, :n]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": np.array([3, 3])}, "lengths has shape"),
        ({"exclude": [3]}, "exclude has 3, must be in 0..2"),
        ({"threshold": 1.0}, "threshold is 1.0, must be in"),
    ],
)
def test_labelled_recall_errors(change, message):
    result = chart.inside_outside(weights(), np.zeros((1, 3), int), np.array([3]))
    with pytest.raises(ValueError, match=message):
        chart.labelled_recall(result, **{"lengths": np.array([3]), **change})


def test_binarisation_symbols():
    w = weights(25, 2, 2, 3)
    g = Grammar(("S", "@S|NP"), tuple("xy"), tuple("uvw"), *map(np.asarray, w))
    assert chart.binarisation_symbols(g) == [1]
