"""Inside-Outside: against every tree of short sentences, and the chart at all lengths."""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.claims import is_function
from constructions.core.inventory import counts
from constructions.inside_outside.construction import InsideOutside
from constructions.inside_outside.exactness import known
from constructions.inside_outside.low_rank import LowRank
from constructions.inside_outside.paper import (
    all_sentences,
    bag_posterior,
    tags_posterior,
    window_posterior,
)
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar


def random_grammar(seed, nonterminals=2, preterminals=3, words=4, sparse=0.0):
    """Proper, every symbol at the top; `sparse` of the rules left out."""
    rng = np.random.default_rng(seed)
    symbols = nonterminals + preterminals
    rules = rng.random((nonterminals, symbols, symbols)) + 0.05
    rules *= rng.random(rules.shape) >= sparse
    emission = rng.random((preterminals, words)) + 0.05
    root = rng.random(symbols) + 0.1
    return Grammar(
        tuple(f"N{n}" for n in range(nonterminals)),
        tuple(f"P{n}" for n in range(preterminals)),
        tuple(f"w{n}" for n in range(words)),
        root / root.sum(),
        rules / rules.sum((1, 2), keepdims=True),
        emission / emission.sum(1, keepdims=True),
    )


def all_trees(g, symbol, words):
    """(probability, constituents as (first, last, symbol) within the words) of every tree."""
    inner = len(g.nonterminals)
    if symbol >= inner:
        if len(words) == 1:
            yield g.emission[symbol - inner, words[0]], [(0, 0, symbol)]
        return
    for cut in range(1, len(words)):
        for left, right in product(range(len(g.symbols)), repeat=2):
            for p, a in all_trees(g, left, words[:cut]):
                for q, b in all_trees(g, right, words[cut:]):
                    moved = [(i + cut, j + cut, x) for i, j, x in b]
                    here = (0, len(words) - 1, symbol)
                    yield g.rules[symbol, left, right] * p * q, [here, *a, *moved]


def enumerate_posterior(g, words, mask):
    """Z, span and tag marginals given what is visible, and the word posterior at every place."""
    n, inner, v = len(words), len(g.nonterminals), len(g.vocabulary)
    spans, tags = np.zeros((n, n, inner)), np.zeros((n, len(g.preterminals)))
    by_word, z = np.zeros((n, v)), 0.0
    for filled in product(range(v), repeat=n):
        # every filling that agrees with what is seen, but for one place at most
        wrong = [t for t in range(n) if not mask[t] and filled[t] != words[t]]
        if len(wrong) > 1:
            continue
        for top in range(len(g.symbols)):
            for p, parts in all_trees(g, top, filled):
                p = p * g.root[top]
                for t in wrong or range(n):
                    by_word[t, filled[t]] += p
                if wrong:
                    continue
                z += p
                for i, j, x in parts:
                    if x >= inner:
                        tags[i, x - inner] += p
                    else:
                        spans[i, j, x] += p
    return z, spans / z, tags / z, by_word / by_word.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        c = InsideOutside(random_grammar(0), max_length=4)
        return c, c.compile().model


@pytest.mark.parametrize(
    "length, hidden",
    [(1, ()), (1, (0,)), (2, (1,)), (3, ()), (3, (1,)), (3, (0, 2)), (3, (0, 1, 2)), (4, (2,))],
)
def test_against_every_tree(small, length, hidden, x64):
    c, model = small
    words = np.random.default_rng(length).integers(4, size=length)
    mask = np.isin(np.arange(length), hidden)
    _, spans, tags, posterior = enumerate_posterior(c.grammar, words, mask)
    behind, n = (0, 4 - length), length
    given = np.pad(words, behind)[None], np.array([length]), np.pad(mask, behind)[None]
    close = {"rtol": 1e-12, "atol": 1e-15}
    np.testing.assert_allclose(c.word_posterior(model, *given)[0, :n], posterior, **close)
    np.testing.assert_allclose(c.span_marginals(model, *given)[0, :n, :n], spans, **close)
    np.testing.assert_allclose(c.tag_marginals(model, *given)[0, :n], tags, **close)


@pytest.mark.parametrize(
    ("seed", "longest"), [(0, 7), *(pytest.param(s, 12, marks=pytest.mark.slow) for s in (0, 1))]
)
def test_all_lengths_and_masks_against_the_chart(seed, longest, x64):
    rng = np.random.default_rng(seed)
    sizes = [int(rng.integers(*r)) for r in ((1, 4), (2, 5), (3, 8))]
    g = random_grammar(seed, *sizes, sparse=0.3)
    c = InsideOutside(g, max_length=longest)
    lengths = np.repeat(np.arange(1, longest + 1), 4)
    tokens = rng.integers(sizes[2], size=(len(lengths), longest))
    # none hidden, one, two, all
    ranks = rng.random(tokens.shape).argsort(1)
    mask = ranks < np.tile([0, 1, 2, longest], longest)[:, None]
    found = c.evaluate(tokens, lengths, mask)
    exact = chart.inside_outside(g, jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(mask))
    close = {"rtol": 1e-12, "atol": 1e-15}
    np.testing.assert_allclose(found["prediction"], exact.word_posterior, **close)
    np.testing.assert_allclose(found["span_marginals"], exact.span_marginals, **close)
    np.testing.assert_allclose(found["tag_marginals"], exact.tag_marginals, **close)
    total = np.asarray(found["span_marginals"]).sum((1, 2, 3))
    np.testing.assert_allclose(total, lengths - 1, atol=1e-12)
    # relative to each value, not to the largest
    trace = c.trace(tokens, lengths, mask)
    for name in ("inside", "outside", "leaves", "around"):
        np.testing.assert_allclose(found[name], trace[name], rtol=1e-12)


def test_padding_changes_nothing(small, x64):
    c, model = small
    tokens, lengths, mask = np.array([[1, 2, 3]]), np.array([3]), np.array([[False, True, False]])
    alone = c.word_posterior(model, tokens, lengths, mask)
    rng = np.random.default_rng(0)
    for behind in (1, 9):
        padded = np.concatenate([tokens, rng.integers(-5, 99, (1, behind))], 1)
        more = np.pad(mask, ((0, 0), (0, behind)), constant_values=True)
        found = np.asarray(c.word_posterior(model, padded, lengths, more))
        np.testing.assert_array_equal(found[:, :3], alone)
        assert not found[:, 3:].any()
        spans = np.asarray(c.span_marginals(model, padded, lengths, more))
        assert not spans[:, 3:].any() and not spans[:, :, 3:].any()


def test_the_scale_cancels(x64):
    g = random_grammar(3)
    given = np.array([[0, 1, 2, 3]]), np.array([4]), np.array([[False, True, False, False]])
    found = [InsideOutside(g, 4, scale=s).evaluate(*given) for s in (None, 1.0, 1e3)]
    for other in found[1:]:
        for name in ("prediction", "span_marginals", "tag_marginals"):
            np.testing.assert_allclose(other[name], found[0][name], rtol=1e-12, atol=1e-300)
    ratio = np.asarray(found[2]["inside"][0, 0, 2] / found[1]["inside"][0, 0, 2])
    np.testing.assert_allclose(ratio, 1e9, rtol=1e-12)  # three words are seen, the mask has none


def test_scale_keeps_float32_from_underflow():
    g = random_grammar(1, nonterminals=4, preterminals=4, words=9)
    tokens = np.random.default_rng(0).integers(9, size=(4, 7))
    given = tokens, np.full(4, 7), np.zeros((4, 7), bool)
    plain, scaled = (InsideOutside(g, 7, scale=s) for s in (1e-6, None))
    exact = chart.inside_outside(g, *(jnp.asarray(a) for a in given)).word_posterior
    np.testing.assert_allclose(scaled.evaluate(*given)["prediction"], exact, atol=1e-5)
    with pytest.raises(ValueError, match="sentence 0 .*log Z -.*float32 .* does not hold"):
        plain.evaluate(*given)
    assert np.isnan(plain.evaluate(*given, strict=False)["prediction"]).all()


@pytest.mark.parametrize("n, p, length", [(3, 4, 6), (4, 5, 9), (1, 2, 2)])
def test_counts_are_formulas(n, p, length):
    g = random_grammar(0, n, p, 5, sparse=0.4)
    found = counts(InsideOutside(g, max_length=length).program)
    more = length - 1
    assert found.layers == 2 * length
    assert found.width == 7 * n * more - 2 * n + 5 * p + 2
    # two ends of inside and outside spans, products; copies, first and last
    assert found.heads == 5 * n * more + 2 * p + 2 * more + 2
    assert found.max_head_rows == max(
        p + n * (length - 2), 1 + p + n * (2 * length - 3), 1 + 2 * n * more
    )
    model = InsideOutside(g, max_length=length).compile().model
    arrays = jax.tree.leaves(
        [
            layer["heads"]
            for s in model.arrays()["segments"].values()
            for layer in s["layers"].values()
        ]
    )
    weights = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    ones = sum(int(np.count_nonzero(a)) for a in weights) - found.heads  # less the scales
    assert found.stored == ones


def test_left_out_symbols_leave_an_improper_grammar(x64):
    g = random_grammar(5)
    rules = g.rules.copy()
    rules[:, 1] = 0
    improper = replace(g, rules=rules)
    c = InsideOutside(improper, max_length=4)
    given = np.array([[0, 1, 2, 3]]), np.array([4]), np.array([[False, True, False, False]])
    exact = chart.inside_outside(improper, *(jnp.asarray(a) for a in given))
    np.testing.assert_allclose(c.evaluate(*given)["prediction"], exact.word_posterior, rtol=1e-12)


def test_sentences_of_probability_zero(x64):
    g = random_grammar(6)
    root = g.root.copy()
    root[2:] = 0  # no tree is a single word
    c = InsideOutside(replace(g, root=root / root.sum()), max_length=4)
    model = c.compile().model
    given = np.array([[1, 0, 0, 0]]), np.array([1])
    for ask in (c.word_posterior, c.span_marginals, c.tag_marginals):
        if ask != c.span_marginals:
            with pytest.raises(ValueError, match=r"sentence 0 \('w1'\) has no parse"):
                ask(model, *given)
    assert np.isnan(jax.jit(c.word_posterior)(model, *given)[0, 0]).all()
    tags = c.tag_marginals(model, *given, strict=False)
    assert np.isnan(tags[0, 0]).all() and not np.asarray(tags[0, 1:]).any()


# Its one sentence is "a dog ran".
ONE = "S -> NP V [1]\nNP -> D N [1]\nD -> 'a' [1]\nN -> 'dog' [1]\nV -> 'ran' [1]"


def test_posterior_where_the_sentence_itself_has_no_parse(x64):
    """P(word | the others) by enumeration of the language, for every sentence of three words."""
    g = Grammar.from_text(ONE)
    right = g.encode([["a", "dog", "ran"]])[0][0]
    tokens, lengths = np.array([*product(range(3), repeat=3)]), np.full(27, 3)
    want = np.full((27, 3, 3), np.nan)
    for row, t in product(range(27), range(3)):
        if (np.delete(tokens[row], t) == np.delete(right, t)).all():
            want[row, t] = np.eye(3)[right[t]]
    c = InsideOutside(g, max_length=3)
    model = c.compile().model
    whole = replace(c, reduction=LowRank(np.eye(2), np.eye(2)))
    for found in (
        chart.inside_outside(g, tokens, lengths, strict=False).word_posterior,
        c.evaluate(tokens, lengths, strict=False)["prediction"],
        c.word_posterior(model, tokens, lengths, strict=False),
        jax.jit(c.word_posterior)(model, tokens, lengths),
        whole.evaluate(tokens, lengths, strict=False)["prediction"],
    ):
        np.testing.assert_array_equal(found, want)
    # one word off is an answer, three are an error that names the sentence
    mended = g.encode([["a", "dog", "dog"]])
    last = [0, 0, 0]
    last[g.vocabulary.index("ran")] = 1
    for given in (mended, [a.tolist() for a in mended]):
        assert chart.inside_outside(g, *given).word_posterior[0, 2].tolist() == last
        assert c.evaluate(*given)["prediction"][0, 2].tolist() == last
        assert c.word_posterior(model, *given)[0, 2].tolist() == last
        assert np.isneginf(chart.log_z(g, *given)).all()
    with pytest.raises(ValueError, match=r"sentence 0 \('a' 'dog' 'dog'\) has no parse"):
        c.tag_marginals(model, *mended)
    lost = g.encode([["a", "dog", "ran"], ["ran", "ran", "a"]])
    for ask in (
        partial(chart.inside_outside, g),
        partial(c.word_posterior, model),
        c.evaluate,
        whole.evaluate,
    ):
        with pytest.raises(ValueError, match=r"sentence 1 \('ran' 'ran' 'a'\) has no parse"):
            ask(*lost)


def test_float32_is_right_or_refused_by_name():
    """Probabilities down to 1e-9 against the chart in float64; what is lost has a name."""
    right = refused = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        parts = 10 ** (-9 * rng.random((3, 6, 6)) ** 0.5)
        parts *= rng.random(parts.shape) < 0.4
        root, rules, emission = parts[0, 0] + 1e-9, parts[:2, :5, :5] + 0, parts[2, 2:5, :6] + 0
        rules[:, 0, 2] += 1e-9
        emission[:, 0] += 1e-9
        g = replace(
            random_grammar(0, words=6),
            root=root[:5] / root[:5].sum(),
            rules=rules / rules.sum((1, 2), keepdims=True),
            emission=emission / emission.sum(1, keepdims=True),
        )
        tokens, lengths = rng.integers(6, size=(6, 6)), rng.integers(4, 7, 6)
        c = InsideOutside(g, max_length=6, scale=None if seed % 2 else 1e-4)
        with jax.enable_x64(True):
            exact = jax.device_get(chart.inside_outside(g, tokens, lengths, strict=False))
        found = jax.device_get(c.evaluate(tokens, lengths, strict=False))
        for row in range(6):
            want, got = exact.word_posterior[row], found["prediction"][row]
            if np.isnan(got).all() and not np.isnan(want).all():
                refused += 1
                with pytest.raises(ValueError, match="sentence 0 .* log Z .* float32"):
                    c.evaluate(*(np.tile(a[row], (6,) + (1,) * a[row].ndim)
                                 for a in (tokens, lengths)))  # fmt: skip
                continue
            right += 1
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-14)
            for name, of in (
                ("span_marginals", exact.span_marginals),
                ("tag_marginals", exact.tag_marginals),
            ):
                if not np.isnan(found[name][row]).all() and np.isfinite(exact.log_z[row]):
                    np.testing.assert_allclose(found[name][row], of[row], rtol=1e-4, atol=1e-14)
    assert right > 10 and refused > 2


def test_default_scale_suits_a_grammar_with_one_rare_choice():
    """900 equal pairs in one rule of a sentence, not in every word: Z is about 1 in its units."""
    pairs = " | ".join(f"T{i} T{j} [{1 / 900!r}]" for i, j in product(range(30), repeat=2))
    tags = "\n".join(f"T{i} -> 't{i}' [1]" for i in range(30))
    g = Grammar.from_text(f"S -> A S [.97] | A X [.03]\nA -> 'a' [1]\nX -> {pairs}\n{tags}")
    tokens, lengths = g.encode([["a"] * 28 + ["t3", "t7"]])
    c = InsideOutside(g, max_length=30)
    given = tuple(map(jnp.asarray, (tokens, lengths, tokens < 0)))
    z = 28 * np.log(0.97) + np.log(0.03 / 900 / 0.97)
    assert abs(z + np.log(c.factors[tokens[0]]).sum()) < 40
    assert known(c, given, np.float32) == (True, True)
    bad = replace(c, scale=1e-3)
    assert known(bad, given, np.float32) == (False, False)
    bad = replace(c, scale=1e3)
    assert known(bad, given, np.float32) == (False, False)


def test_empty_batch(small, x64):
    c, model = small
    given = np.zeros((0, 4), int), np.zeros(0, int)
    assert c.word_posterior(model, *given).shape == (0, 4, 4)
    assert c.span_marginals(model, *given).shape == (0, 4, 4, 2)
    found, some = c.evaluate(*given), c.evaluate(np.zeros((1, 4), int), np.array([4]))
    assert {n: a.shape[1:] for n, a in found.items()} == {n: a.shape[1:] for n, a in some.items()}
    assert all(len(a) == 0 for a in found.values())


@pytest.mark.parametrize(
    "tokens, lengths, mask, message",
    [
        ([[0, 1, 2, 3, 0]], [5], None, "lengths are 5 to 5, must be 1 to 4, the construction's"),
        ([[0, 1]], [0], None, "lengths are 0 to 0"),
        ([[0, 1]], [3], None, "lengths are 3 to 3, must be 1 to 2"),
        ([[0, 4]], [2], None, "tokens are 0 to 4, must be 0 to 3"),
        ([[0, -1]], [2], None, "tokens are -1 to 0"),
        ([[0.0, 1.0]], [2], None, "dtype float64, must be .* integers"),
        ([0, 1], [2], None, "tokens has shape"),
        ([[0, 1]], [[2]], None, "lengths has shape"),
        ([[0, 1]], [2], [[0, 1]], "mask has shape .* must be .* bool"),
        ([["a", "b"]], [2], None, "tokens has shape .* must be .* integers"),
        (np.array([[0, 1]], object), [2], None, "tokens has shape .* dtype object, must be .*"),
    ],
)
def test_bad_sentences(small, tokens, lengths, mask, message, x64):
    c, model = small
    given = np.array(tokens), np.array(lengths), None if mask is None else np.array(mask)
    for ask in (lambda: c.word_posterior(model, *given), lambda: c.evaluate(*given)):
        with pytest.raises(ValueError, match=message):
            ask()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_length": 1}, "max_length is 1, must be at least 2"),
        ({"max_length": "7"}, "max_length is '7', must be a whole number"),
        ({"max_length": 10**5}, "max_length is 100000, must be .* at most 1000"),
        ({"grammar": 3}, "grammar is 3, must be a Grammar"),
        ({"grammar": "latin"}, "latin"),
        ({"scale": 0.0}, "scale is 0.0, must be finite and above 0"),
        ({"masking": 0.0}, "rate is 0.0"),
        ({"heads": 3}, "width is 64, must be a multiple of heads=3"),
        ({"layers": 0}, "layers is 0, must be at least 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        InsideOutside(**({"grammar": random_grammar(0)} | settings)).counterpart()


def test_a_looser_program_is_another_function(small, x64):
    """The near-miss without right children is told apart, so that its half of the sum counts."""
    c, model = small
    given = np.array([[0, 1, 2, 0]]), np.array([3]), np.array([[False, True, False, False]])
    exact = np.asarray(c.word_posterior(model, *given))
    for name, (miss, _) in c.near_misses().items():
        if is_function(miss):
            continue
        found = np.nan_to_num(
            np.asarray(c.word_posterior(miss, *given))
        )  # NaN where it says nothing
        assert np.abs(found - exact).max() > 1e-3, name


def test_every_value_is_in_the_slot_that_is_named(small, x64):
    """What stands at the other end of a span, and in the shifted copies, is the same value."""
    c, model = small
    tokens, lengths = np.array([[0, 1, 2, 3]]), np.array([4])
    given = [jnp.asarray(a) for a in (tokens, lengths, np.zeros((1, 4), bool))]
    stream, groups, _ = c.stream(model, *given)
    run = jax.jit(lambda model, stream, groups: model(stream, groups))
    out, trace, at = run(model, stream, groups)[0, 1:-1], jax.jit(c.trace)(*given), c.layout
    out = np.asarray(out)
    inside, outside = (np.asarray(trace[name][0]) for name in ("inside", "outside"))
    held = defaultdict(int)
    for n in range(2, 5):
        for i in range(5 - n):
            j = i + n - 1
            np.testing.assert_allclose(out[j, at.ends[n].columns], inside[i, n - 2], rtol=1e-12)
            ends = out[j, at.outside_ends[n].columns]
            np.testing.assert_allclose(ends, outside[i, n - 2], rtol=1e-12)
            if n < 4 and i > 0:
                behind = out[i - 1, at.behind[n].columns]
                np.testing.assert_allclose(behind, inside[i, n - 2], rtol=1e-12)
                held["behind"] += 1
            if n < 4 and j < 3:
                before = out[j + 1, at.before[n].columns]
                np.testing.assert_allclose(before, inside[i, n - 2], rtol=1e-12)
                held["before"] += 1
    assert held == {"behind": 3, "before": 3}
    assert out[:, at.first.start].tolist() == [1, 0, 0, 0]
    assert out[:, at.last.start].tolist() == [0, 0, 0, 1]


def test_dense_and_slotwise_are_equal(small, x64):
    c, model = small
    tokens = np.random.default_rng(0).integers(4, size=(16, 4))
    given = tokens, np.full(16, 4), tokens == 0
    read, found = c.read(model, *(jnp.asarray(a) for a in given)), c.evaluate(*given)
    for name in ("inside", "outside", "leaves", "around", "span_marginals", "tag_marginals"):
        np.testing.assert_allclose(found[name], read[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("words", [1, 2, 3])
def test_a_window_knows_what_stands_in_it(words):
    """Of a x A, a y z A and the same with b: the first word is told by the last one, if seen."""
    g = Grammar.from_text("S -> 'a' M 'A' [0.3] | 'b' M 'B' [0.7]\nM -> 'x' [0.4] | 'y' 'z' [0.6]")
    tokens, lengths = g.encode([["a", "x", "A"], ["a", "y", "z", "A"]])
    hidden = np.zeros(tokens.shape, bool)
    hidden[:, 0] = True
    found = np.asarray(window_posterior(g, words)(tokens, lengths, hidden))[:, 0]
    first = [g.vocabulary.index(word) for word in "ab"]
    for row, distance in zip(found, (2, 3), strict=True):
        wanted = (1, 0) if words >= distance else (0.3, 0.7)
        np.testing.assert_allclose(row[first], wanted, atol=1e-6)
        np.testing.assert_allclose(row.sum(), 1, atol=1e-6)


#: Every word has one tag.
_AGREE = """
S -> D X [0.6] | N V [0.4]
X -> N V [0.5] | N S [0.5]
D -> 'a' [0.3] | 'the' [0.7]
N -> 'dog' [0.2] | 'cat' [0.8]
V -> 'runs' [0.9] | 'sits' [0.1]
"""


@pytest.mark.parametrize("what", ["bag", "tags"])
def test_less_than_the_sentence_is_known_exactly(what):
    """Against sums over all strings of words, with their probabilities by the chart, one by one."""
    g, longest = Grammar.from_text(_AGREE), 5
    tokens, lengths = g.encode([["a", "dog", "dog", "sits"], ["the", "cat", "runs"]] * 2)
    tokens = np.pad(tokens, [(0, 0), (0, longest - tokens.shape[1])])
    hidden = np.zeros(tokens.shape, bool)
    hidden[0, [0, 3]] = hidden[1, 1] = hidden[2, 1] = hidden[3, [0, 1]] = True
    rival = bag_posterior(g, longest) if what == "bag" else tags_posterior(g)
    found = np.asarray(rival(*(jnp.asarray(a) for a in (tokens, lengths, hidden))))
    kind = g.emission.argmax(0)
    for row, size in enumerate(lengths):
        strings = np.array([*product(range(len(g.vocabulary)), repeat=int(size))])
        chance = np.exp(chart.log_z(g, strings, np.full(len(strings), size)))
        seen = [t for t in range(size) if not hidden[row, t]]
        for t in np.flatnonzero(hidden[row]):
            if what == "bag":
                kept = [sorted(s[seen]) == sorted(tokens[row, seen]) for s in strings]
            else:
                near = [n for n in seen if abs(n - t) == 1]
                kept = [(kind[s[near]] == kind[tokens[row, near]]).all() for s in strings]
            wanted = np.bincount(strings[:, t], chance * kept, len(g.vocabulary))
            np.testing.assert_allclose(found[row, t], wanted / wanted.sum(), atol=1e-6)


def test_all_sentences_are_those_with_a_parse():
    g = Grammar.from_text(_AGREE)
    found = all_sentences(g, 4)
    assert found is not None and all_sentences(g, 4, most=len(found) - 1) is None
    wanted = []
    for size in range(1, 5):
        strings = np.array([*product(range(len(g.vocabulary)), repeat=size)])
        some = np.isfinite(chart.log_z(g, strings, np.full(len(strings), size)))
        wanted += [tuple(s) for s in strings[some].tolist()]
    assert sorted(wanted) == list(found)
