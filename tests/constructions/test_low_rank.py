"""Fewer heads a direction: exact at full rank, the same in both back ends, counted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.inventory import counts
from constructions.inside_outside.construction import InsideOutside
from constructions.inside_outside.low_rank import LowRank, balanced_truncation
from constructions.inside_outside.tableau import marginals
from constructions.runs import construct, plain_settings
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar


def random_grammar(seed, n=4, p=3, v=5, lost=0.3):
    rng = np.random.default_rng(seed)
    s = n + p
    rules = rng.dirichlet(np.ones(s * s), n).reshape(n, s, s)
    rules *= rng.random(rules.shape) >= lost
    sizes = zip("NPw", (n, p, v), strict=True)
    names = (tuple(f"{letter}{k}" for k in range(size)) for letter, size in sizes)
    root = rng.random(s) + 0.1
    return Grammar(*names, root / root.sum(), rules, rng.dirichlet(np.ones(v), p))


def draw(time=5, v=5, seed=0):
    """Sentences of every length, and masks that hide none, one or all of their words."""
    rng = np.random.default_rng(seed)
    lengths = np.repeat(np.arange(1, time + 1), 3)
    tokens = rng.integers(v, size=(len(lengths), time))
    mask = rng.random(tokens.shape).argsort(1) < np.tile([0, 1, time], time)[:, None]
    return tokens, lengths, mask


def projected(g, reduction, words, hidden):
    """Z, and the marginals of spans and tags, with beta projected after every span of two or more.

    Span by span, on the grammar's own rules: the reduced ones are not used.
    """
    n, inner = len(words), len(g.nonterminals)
    pi = reduction.decode @ reduction.encode
    beta, alpha = np.zeros((2, n, n, len(g.symbols)))
    for t in range(n):
        beta[t, t, inner:] = g.emission.sum(1) if hidden[t] else g.emission[:, words[t]]
    for i, j in sorted(zip(*np.triu_indices(n, 1), strict=True), key=lambda s: s[1] - s[0]):
        parts = (np.outer(beta[i, k], beta[k + 1, j]) for k in range(i, j))
        beta[i, j, :inner] = pi @ np.einsum("abc,bc->a", g.rules, sum(parts))
    z = g.root @ beta[0, -1]
    alpha[0, -1] = g.root
    for i, j in sorted(zip(*np.triu_indices(n, 1), strict=True), key=lambda s: s[0] - s[1]):
        alpha[i, j, :inner] = pi.T @ alpha[i, j, :inner]
        for k in range(i, j):
            asked = np.einsum("abc,a->bc", g.rules, alpha[i, j, :inner])
            alpha[i, k] += asked @ beta[k + 1, j]
            alpha[k + 1, j] += asked.T @ beta[i, k]
    t = np.arange(n)
    both = alpha * beta / z
    return z, both[..., :inner], both[t, t, inner:]


@pytest.fixture(scope="module")
def parts():
    with jax.enable_x64(True):
        c = InsideOutside(random_grammar(0), max_length=5)
        return c, c.low_rank(*draw()[:2], 2)


def test_full_rank_is_exact(parts, x64):
    """In any basis: invertible, orthogonal, and that of the balanced truncation."""
    c, _ = parts
    rng, given = np.random.default_rng(1), draw()
    some = rng.normal(size=(4, 4))
    turn = np.linalg.qr(some)[0]
    exact = c.evaluate(*given)
    bases = (LowRank(some, np.linalg.inv(some)), LowRank(turn, turn.T))
    full = [replace(c, reduction=basis) for basis in bases] + [c.low_rank(*given[:2], 4)]
    for other in full:
        assert other.rank == 4
        found = other.evaluate(*given)
        for name in ("prediction", "span_marginals", "tag_marginals"):
            np.testing.assert_allclose(found[name], exact[name], rtol=1e-12, atol=1e-12)
        own = np.asarray(found["inside"]) @ other.reduction.decode.T
        np.testing.assert_allclose(own, exact["inside"], rtol=1e-9)


def test_marginals_by_projections_of_every_span(parts, x64):
    c, low = parts
    tokens, lengths, mask = draw(seed=2)
    found = low.evaluate(tokens, lengths, mask)
    assert low.rank == 2 and found["inside"].shape[-1] == 2
    off = np.asarray(found["span_marginals"]) - c.evaluate(tokens, lengths, mask)["span_marginals"]
    assert 1e-3 < np.abs(off).max() < 0.5
    for row, n in enumerate(lengths):
        want = projected(c.grammar, low.reduction, tokens[row, :n], mask[row])
        if want[0] > 0:
            np.testing.assert_allclose(found["span_marginals"][row, :n, :n], want[1], atol=1e-12)
            np.testing.assert_allclose(found["tag_marginals"][row, :n], want[2], atol=1e-12)


def test_dense_slotwise_and_algorithm_are_equal(parts, x64):
    _, low = parts
    given = [jnp.asarray(a) for a in draw(seed=3)]
    model = low.compile().model
    read, found, trace = jax.jit(low.read)(model, *given), low.evaluate(*given), low.trace(*given)
    assert set(trace) == {*read, "prediction"}
    for name in ("inside", "outside", "leaves", "around", "span_marginals", "tag_marginals"):
        for other in (found[name], read[name]):
            size = np.abs(trace[name]).max()
            np.testing.assert_allclose(other, trace[name], rtol=1e-11, atol=1e-14 * size)
    for other in (found["prediction"], low.word_posterior(model, *given)):
        np.testing.assert_allclose(other, trace["prediction"], atol=1e-12)


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_z_that_is_not_positive_gives_nothing(sign, x64):
    """A projection that turns the sign of every span has Z < 0 in sentences of two words."""
    c = InsideOutside(
        random_grammar(0), max_length=3, reduction=LowRank(sign * np.eye(4), np.eye(4))
    )
    tokens, lengths = np.array([[0, 1, 2], [3, 0, 0]]), np.array([2, 1])
    with pytest.raises(ValueError, match=r"sentence 0 .* no parse, under the reduction \(its Z"):
        c.tag_marginals(c.compile().model, tokens, lengths)
    found, model = c.evaluate(tokens, lengths, strict=False), c.compile().model
    given = tokens, lengths
    for spans, tags in (
        (found["span_marginals"], found["tag_marginals"]),
        (
            c.span_marginals(model, *given, strict=False),
            c.tag_marginals(model, *given, strict=False),
        ),
    ):
        assert np.isnan(spans[0, 0, 1]).all() and np.isnan(tags[0, :2]).all()
        assert np.asarray(tags[1]).sum() == pytest.approx(1)  # one word has no span
    # where Z is 0 but for rounding, its sign differs from word to word: one is enough
    products = {1: jnp.array([[[1e-9], [-1e-9], [1e-9]]])} | {
        n: jnp.ones((1, 3, 4)) for n in (2, 3)
    }
    for name, found in marginals(products, jnp.array([3]), 3).items():
        assert np.isnan(found[0, 0, 1:] if name == "span_marginals" else found).all()


@pytest.mark.parametrize("n, p, length, rank", [(3, 4, 6, 2), (5, 3, 4, 3), (2, 2, 2, 1)])
def test_counts_are_formulas(n, p, length, rank):
    rng = np.random.default_rng(0)
    reduction = LowRank(rng.normal(size=(rank, n)), rng.normal(size=(n, rank)))
    c = InsideOutside(random_grammar(0, n, p), max_length=length, reduction=reduction)
    found, more = counts(c.program), length - 1
    assert found.layers == 2 * length
    # as at full rank, with `rank` for the nonterminals everywhere but in the products
    assert found.width == (6 * rank + n) * more - 2 * rank + 5 * p + 2
    assert found.heads == (4 * rank + n) * more + 2 * p + 2 * more + 2
    assert found.max_head_rows == max(
        p + rank * (length - 2), 1 + p + rank * (2 * length - 3), 1 + 2 * rank * more
    )
    spans = [layer for layer in c.program.layers if layer.name.startswith("inside")]
    assert {len(layer.single_heads) for layer in spans[1:]} <= {2 * rank + 2}
    model = c.compile().model
    assert model.config.width == found.width
    stacks = [
        layer["heads"]
        for segment in model.arrays()["segments"].values()
        for layer in segment["layers"].values()
    ]
    weights = [a for a in jax.tree.leaves(stacks) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert found.stored == sum(int(np.count_nonzero(a)) for a in weights) - found.heads  # scales


def test_balanced_truncation_keeps_what_is_asked_for(x64):
    """Directions that no context asks for go first and cost nothing."""
    rng = np.random.default_rng(4)
    size, mass = (200, 5), rng.random(200)
    inside, outside = rng.random(size), rng.random(size)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    outside = outside @ basis[:, :3] @ basis[:, :3].T
    for rank, exact in ((3, True), (2, False)):
        r = balanced_truncation(inside, outside, mass, rank)
        np.testing.assert_allclose(r.encode @ r.decode, np.eye(rank), atol=1e-10)
        asked = outside @ r.decode @ r.encode
        assert np.allclose(asked, outside, atol=1e-9) == exact
    # each vector counts by its direction alone
    units = rng.random((2, 200, 1)) + 0.1
    again = balanced_truncation(inside * units[0], outside * units[1], mass, 2)
    same = r.decode @ r.encode
    np.testing.assert_allclose(again.decode @ again.encode, same, atol=1e-9)
    # spans that are no constituents do not count
    more = np.concatenate([inside, rng.random((9, 5))]), np.concatenate([outside, np.ones((9, 5))])
    again = balanced_truncation(*more, np.append(mass, np.zeros(9)), 2)
    np.testing.assert_allclose(again.decode @ again.encode, same, atol=1e-9)


def test_low_rank_looks_at_the_exact_spans(parts, x64):
    """Vectors of the algorithm, masses of the chart; batches, short sentences and order are one."""
    c, _ = parts
    tokens, lengths, _ = draw(seed=5)
    none = np.zeros(tokens.shape, bool)
    trace = c.trace(tokens, lengths, none)
    exact = chart.inside_outside(c.grammar, jnp.asarray(tokens), jnp.asarray(lengths))
    spans = [(b, i, n) for b in range(len(tokens)) for n in range(2, 6) for i in range(6 - n)]
    at = np.array(spans).T
    mass = np.asarray(exact.span_marginals)[at[0], at[1], at[1] + at[2] - 1].sum(-1)
    beta, alpha = (
        np.asarray(trace[name])[at[0], at[1], at[2] - 2] for name in ("inside", "outside")
    )
    want = balanced_truncation(beta, alpha, mass, 2)
    again = [np.tile(a, (5, 1))[: 5 * len(a)] for a in (tokens, lengths[:, None])]
    for given in ((tokens, lengths), (again[0], again[1][:, 0])):  # the second is more than a batch
        found = c.low_rank(*given, 2).reduction
        np.testing.assert_allclose(
            found.decode @ found.encode, want.decode @ want.encode, atol=1e-8
        )
    # a reduced construction is reduced anew, and the first directions are the lower rank's
    more = c.low_rank(tokens, lengths, 3)
    assert more.low_rank(tokens, lengths, 2) == c.low_rank(tokens, lengths, 2)
    first = more.reduction.first(2)
    assert first.rank == 2
    np.testing.assert_allclose(first.decode @ first.encode, want.decode @ want.encode, atol=1e-8)
    with pytest.raises(ValueError, match="rank is 4, must be a whole number from 1 to 3"):
        more.reduction.first(4)


@pytest.mark.parametrize(
    "rank, lengths, message",
    [
        (0, [2], "rank is 0, must be a whole number from 1 to 4"),
        (5, [2], "rank is 5, must be a whole number from 1 to 4"),
        (True, [2], "rank is True"),
        (2, [6], "lengths are 6 to 6, must be 1 to"),
        (2, [1], "no sentence of two words or more that has a parse"),
    ],
)
def test_what_cannot_be_reduced(parts, rank, lengths, message, x64):
    c, _ = parts
    with pytest.raises(ValueError, match=message):
        c.low_rank(np.zeros((1, 5), int), np.array(lengths), rank)


def test_bad_reductions(parts):
    c, low = parts
    eye = np.eye(3).tolist()
    for reduction, message in (
        ("low", "reduction is 'low', must be a LowRank, its JSON form or None"),
        ({"encode": eye}, r"reduction has \['encode'\], must have decode and encode"),
        ({"encode": eye, "decode": eye}, "reduction is of 3 nonterminals, the grammar has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(c, reduction=reduction)
    for encode, decode, message in (
        (np.ones((2, 3)), np.ones((2, 3)), r"decode has shape \(2, 3\), must be \(3, 2\)"),
        (np.ones(3), np.ones((3, 1)), r"encode has shape \(3,\), must be a matrix"),
        (np.ones((1, 3)), np.full((3, 1), np.nan), "decode .* finite"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRank(encode, decode)
    assert low.reduction != LowRank(low.reduction.encode, 2 * low.reduction.decode)


def test_settings_as_plain_data(parts):
    """The settings of a run are JSON: a reduced construction is rebuilt from them."""
    c, low = parts
    data = {"grammar": c.grammar.to_json(), "max_length": 5, "reduction": low.reduction.to_json()}
    data["masking"] = c.masking
    again = construct("inside-outside", plain_settings("inside-outside", data))
    assert again == low and hash(again) == hash(low)
