import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.core.transformer import Edit, randomise
from constructions.inside_outside.paper import language_model
from probes.interchange import interchange
from probes.patching import patched_prediction, site_values
from probes.syntax.span_interchange import SpanEffects, inside_places, span_interchange
from probes.syntax.span_pairs import Text, span_pairs
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import sample

KEY = jax.random.key(0)
# one tree for each length, in which a verb agrees with its subject and its object
SURE = Grammar.from_text("""
%start S
S   -> NPs VPs [0.4] | NPp VPp [0.4] | A S1 [0.2]
S1  -> NPs VPs [0.5] | NPp VPp [0.5]
NPs -> D Ns [0.8] | D W [0.2]
NPp -> D Np [0.7] | D W [0.3]
VPs -> Vs NPs [0.6] | Us NPp [0.4]
VPp -> Vp NPs [0.3] | Up NPp [0.7]
A   -> 'now' [0.5] | 'often' [0.5]
D   -> 'the' [0.9] | 'her' [0.1]
Ns  -> 'dog' [0.7] | 'cat' [0.3]
Np  -> 'dogs' [0.4] | 'cats' [0.6]
W   -> 'sheep' [0.3] | 'fish' [0.7]
Vs  -> 'sees' [0.8] | 'likes' [0.2]
Us  -> 'counts' [0.9] | 'herds' [0.1]
Vp  -> 'see' [0.8] | 'like' [0.2]
Up  -> 'count' [0.3] | 'herd' [0.7]
""")
UNSURE = Grammar.from_text("""
%start S
S -> X Y [0.5] | Y X [0.5]
X -> P Q [0.5] | P X [0.3] | X Q [0.2]
Y -> Q P [0.5] | Y P [0.3] | Q Q [0.2]
P -> 'a' [0.7] | 'b' [0.3]
Q -> 'b' [0.6] | 'c' [0.4]
""")
OF = CATALOGUE["inside-outside"](grammar=SURE, max_length=6)


def hidden(construction, batch, rate, seed=1):
    drawn = sample(construction.grammar, jax.random.key(seed), batch, construction.max_length)
    mask = np.random.default_rng(seed).random(drawn.tokens.shape) < rate
    return np.asarray(drawn.tokens), np.asarray(drawn.lengths), mask


def model_of(c, std=0.3):
    return randomise(language_model(len(c.grammar.vocabulary), c.max_length, 2, 2, 16), KEY, std)


@pytest.fixture(scope="module")
def text():
    return hidden(OF, 1200, 0.3)


@pytest.fixture(scope="module")
def pairs(text):
    return span_pairs(OF, *text, KEY, gap=0.01, most=24)


def test_the_inside_values_are_all_that_is_seen_of_a_sure_constituent(x64):
    # where subject and verb are hidden the object tells of the subject, through the verb's phrase
    pairs = span_pairs(OF, *hidden(OF, 800, 0.5), KEY, sure=1 - 1e-9, gap=0.01)
    assert set(pairs.base.lengths) == {5, 6} and len(pairs.first) > 30
    spans = set(zip(pairs.base.lengths, pairs.first, pairs.last, strict=True))
    assert spans >= {(5, 0, 1), (5, 2, 4), (5, 3, 4), (6, 1, 2), (6, 3, 5)}
    found = span_interchange(OF, {}, pairs)
    gap = pairs.gap
    inside = found.along["construction"]["inside"][0]
    np.testing.assert_allclose(inside, gap, rtol=1e-6)
    assert found.nats["construction"]["inside"].max() < 1e-9
    np.testing.assert_allclose(found.effect("construction", "inside"), 1, atol=1e-6)
    for kind in ("nothing", "crossing"):
        np.testing.assert_allclose(found.along["construction"][kind], 0, atol=1e-12)
    assert (found.divergence("construction", "crossing")[:, 1] > 0.1).all()
    assert found.gap is not None and (found.words == pairs.hidden.sum(1)).all()


def test_pairs_are_what_they_are_said_to_be(text, pairs):
    assert len(pairs.first) == 24
    rows = {(*t[:n].tolist(), *m[:n].tolist()) for t, n, m in zip(*text, strict=True)}
    marginals = chart.inside_outside(SURE, *pairs.chimera).span_marginals.sum(-1)
    for n in range(24):
        base, source, chimera = (Text(*(a[n] for a in t)) for t in pairs[:3])
        size, i, j = int(base.lengths), int(pairs.first[n]), int(pairs.last[n])
        assert size == source.lengths == chimera.lengths and 1 <= j - i < size - 1
        for own in (base, source):
            assert (*own.tokens[:size].tolist(), *own.mask[:size].tolist()) in rows
        for own, b, s in zip(chimera[::2], base[::2], source[::2], strict=True):
            assert own.tolist() == [*b[:i], *s[i : j + 1], *b[j + 1 :]]
        places = np.flatnonzero(pairs.hidden[n])
        assert places.size and base.mask[places].all()
        assert all(t < size and not i <= t <= j for t in places)
        start, end = pairs.crossing[n].tolist()
        assert start >= 0 and end < size and (start < i <= end < j or i < start <= j < end)
        assert not base.mask[start if start < i else end]
        assert pairs.marginals[n, 2] == pytest.approx(float(marginals[n, i, j]), abs=1e-5)
        exact = chart.inside_outside(SURE, *(a[None] for a in chimera)).word_posterior[0]
        np.testing.assert_allclose(pairs.after[n], exact, atol=1e-5)
        exact = chart.inside_outside(SURE, *(a[None] for a in base)).word_posterior[0]
        np.testing.assert_allclose(pairs.before[n], exact, atol=1e-5)
    assert pairs.gap.min() >= 0.01 and pairs.marginals.min() >= 0.9


def test_where_a_constituent_is_not_sure_the_rest_is_the_bases(x64):
    c = CATALOGUE["inside-outside"](grammar=UNSURE, max_length=6)
    pairs = span_pairs(c, *hidden(c, 1000, 0.3), KEY, sure=0.2, gap=0.005, most=100)
    base, source = (jax.tree.map(jnp.asarray, text) for text in (pairs.base, pairs.source))
    first, last = jnp.asarray(pairs.first), jnp.asarray(pairs.last)

    @jax.jit
    def run(compiled):
        values = site_values(c, compiled, source, "residual")
        layers, _, tokens, width = values.shape
        where = inside_places(c.layout, tokens - 2, layers, width, first, last)
        edits = {"residual": Edit(where, values)}
        stream, groups, _ = c.stream(compiled, *base)
        final = compiled.run(stream, groups, sites=("residual",), edits=edits)[1]["residual"][-1]
        return patched_prediction(c, compiled, base, "residual", edits["residual"]), final

    patched, final = (np.asarray(a) for a in run(c.compile().model))
    apart = np.where(pairs.hidden, np.abs(patched - pairs.after).sum(-1) / 2, 0)
    bound = 1 - pairs.marginals[:, 2:].min(1)
    assert (apart <= bound[:, None] + 1e-9).all()
    assert bound.max() > 0.3 and apart.max() > 0.1
    # what the span weighs in the patched model, as its products have it
    row = np.arange(len(first))
    span = np.zeros(len(first))
    for n, slot in c.layout.products.items():
        inside = final[row, pairs.first + 1, slot.start : slot.start + slot.size].sum(-1)
        span = np.where(pairs.last - pairs.first + 1 == n, inside, span)
    word = c.layout.products[1]
    z = final[:, 1:-1, word.start : word.start + word.size].sum(-1)
    outside = pairs.hidden.argmax(1)
    np.testing.assert_allclose(span / z[row, outside], pairs.marginals[:, 3], rtol=1e-8)


def test_trained_models_are_patched_at_words_after_layers(pairs):
    model = model_of(OF)
    found = span_interchange(OF, {"m": model}, pairs)
    runs = [np.asarray(OF.word_posterior(model, *text)) for text in (pairs.base, pairs.chimera)]

    def judged(patched):
        move = (patched - runs[0]) * (pairs.after - pairs.before)
        exact = np.where(pairs.after > 0, pairs.after, 1)
        logs = np.where(pairs.after > 0, pairs.after * np.log(exact / patched.clip(1e-30)), 0)
        return [np.where(pairs.hidden, a.sum(-1), 0).sum(1) for a in (move, logs)]

    def same(kind, layer, patched):
        along, nats = judged(patched)
        np.testing.assert_allclose(found.along["m"][kind][layer], along, atol=1e-5)
        np.testing.assert_allclose(found.nats["m"][kind][layer], nats, rtol=1e-3, atol=1e-4)

    same("span", 0, runs[1])  # all words of the span exchanged is to read the chimera
    for kind in ("nothing", "ends", "span", "crossing"):
        same(kind, 2, runs[0])  # after the last layer no word looks at another
    for layer in range(3):
        same("nothing", layer, runs[0])
    assert np.abs(found.along["m"]["ends"][1]).max() > 1e-3
    ends = pairs.first, pairs.last
    for kind, words in (("ends", ends), ("crossing", pairs.crossing.T)):
        where = np.zeros((3, 24, 8, 1), bool)
        for t in words:
            where[1, np.arange(24), t + 1] = True
        base, source = (tuple(map(jnp.asarray, t)) for t in (pairs.base, pairs.source))
        same(kind, 1, np.asarray(interchange(OF, model, base, source, where=where)))
    assert "m | ends" in found.markdown() and "m | ends" in found.markdown("divergence")


def test_intervals_are_those_of_a_ratio_of_sums():
    rng = np.random.default_rng(0)
    words = rng.integers(1, 4, 400).astype(float)
    sums = 0.5 * words + rng.normal(size=400)
    found = SpanEffects({"m": {"k": sums[None]}}, {"m": {"k": sums[None]}}, words, words)
    value, low, high = found.effect("m", "k")[0]
    assert value == pytest.approx(sums.sum() / words.sum())
    error = np.std(sums - value * words) / np.sqrt(400) / words.mean()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert low < value < high and found.divergence("m", "k")[0, 0] == value


def test_bad_input(pairs):
    text = hidden(OF, 60, 0.3)
    with pytest.raises(TypeError, match="must be an InsideOutside"):
        span_pairs(CATALOGUE["gradient-descent"](), *text, KEY)
    with pytest.raises(ValueError, match="sure is 1.0, gap 0.05 and most 256"):
        span_pairs(OF, *text, KEY, sure=1.0)
    with pytest.raises(ValueError, match="gap 0.0 and most"):
        span_pairs(OF, *text, KEY, gap=0.0)
    with pytest.raises(ValueError, match=r"most 600, must be .* in 1\.\.512"):
        span_pairs(OF, *text, KEY, most=600)
    with pytest.raises(ValueError, match="no two of 60 sentences have a constituent"):
        span_pairs(OF, text[0], text[1], np.zeros(text[2].shape, bool), KEY)
    with pytest.raises(ValueError, match="no two of 60 sentences have a constituent"):
        span_pairs(OF, *text, KEY, gap=90.0)
    with pytest.raises(ValueError, match="lengths are 5 to 60"):
        span_pairs(OF, text[0], np.where(text[1] == 6, 60, 5), text[2], KEY)
    with pytest.raises(ValueError, match="must not be 'construction'"):
        span_interchange(OF, {"construction": model_of(OF)}, pairs)
    many = jax.tree.map(lambda a: np.concatenate([a] * 22)[:513], pairs)
    with pytest.raises(ValueError, match="there are 513 pairs, must be at most 512"):
        span_interchange(OF, {}, many)
    with pytest.raises(ValueError, match="what is 'size', must be 'effect' or 'divergence'"):
        SpanEffects({}, {}, np.ones(1), np.ones(1)).markdown("size")
