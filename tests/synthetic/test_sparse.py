"""Parsing by a list of rules: against the dense charts, and at lengths that underflow."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.grammar import brackets, chart, sparse, treebank
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sparse import RuleList


def random_grammar(seed, n=4, p=5, v=6, kept=0.12):
    """Few of its rules are left, in no order of their parents; improper."""
    rng = np.random.default_rng(seed)
    s = n + p
    rules = rng.dirichlet(np.ones(s * s), n).reshape(n, s, s) * (rng.random((n, s, s)) < kept)
    emission = rng.dirichlet(np.ones(v), p) * (rng.random((p, v)) < 0.5)
    emission[:, -1] = 0  # no tree has the last word
    sizes = zip("NPw", (n, p, v), strict=True)
    names = (tuple(f"{letter}{k}" for k in range(size)) for letter, size in sizes)
    g = Grammar(*names, rng.dirichlet(np.ones(s)), rules, emission)
    rules = RuleList.of(g)
    order = rng.permutation(len(rules.parent))
    mixed = {name: getattr(rules, name)[order] for name in RuleList._fields[4:8]}
    return g, rules._replace(**mixed)


def draw(seed, v=6):
    rng = np.random.default_rng(seed)
    lengths = np.tile(np.arange(1, 10), 3)
    return rng.integers(v, size=(len(lengths), 9)), lengths


@pytest.mark.parametrize("seed", range(3))
def test_marginals_are_those_of_the_dense_chart(seed, x64):
    g, rules = random_grammar(seed)
    tokens, lengths = draw(seed)
    exact = chart.inside_outside(g, jnp.asarray(tokens), jnp.asarray(lengths), strict=False)
    assert 5 < np.isfinite(exact.log_z).sum() < len(lengths)
    for row, n in enumerate(lengths):
        found = sparse.inside_outside(rules, tokens[row, :n], strict=False)
        np.testing.assert_allclose(found.log_z, exact.log_z[row], rtol=1e-13)
        close = {"rtol": 1e-12, "atol": 1e-300}
        np.testing.assert_allclose(found.spans, exact.span_marginals[row, :n, :n], **close)
        np.testing.assert_allclose(found.tags, exact.tag_marginals[row, :n], **close)
        if found.log_z == -np.inf:
            assert np.isnan(found.tags).all()
            with pytest.raises(ValueError, match=r"the sentence \('w.*\) has no parse"):
                sparse.inside_outside(rules, tokens[row, :n])


@pytest.mark.parametrize("seed", range(3))
def test_trees_are_as_probable_as_those_of_the_dense_chart(seed, x64):
    g, rules = random_grammar(seed)
    tokens, lengths = draw(seed)
    exact = chart.viterbi(g, jnp.asarray(tokens), jnp.asarray(lengths))
    symbol, word = (
        {name: n for n, name in enumerate(names)} for names in (g.symbols, g.vocabulary)
    )
    some = 0
    for row, n in enumerate(lengths):
        log_prob, tree = sparse.viterbi(rules, tokens[row, :n])
        np.testing.assert_allclose(log_prob, exact.log_prob[row], rtol=1e-13)
        if tree is None:
            assert log_prob == -np.inf
            continue
        some += 1
        assert tree.leaves() == [g.vocabulary[t] for t in tokens[row, :n]]
        # trees of the same rules in another order are as probable: compare their probability
        own = g.root[symbol[tree.label()]]
        for node in tree.subtrees():
            a, below = symbol[node.label()], [c if isinstance(c, str) else c.label() for c in node]
            tag = treebank.is_tag(node)
            own *= g.emission[a - 4, word[below[0]]] if tag else g.rules[a][*map(symbol.get, below)]
        np.testing.assert_allclose(np.log(own), log_prob, rtol=1e-12)
    assert 5 < some < len(lengths)


def test_no_sentence_is_too_long(x64):
    """At 60 words that cost some 12 nats each, probabilities are below 1e-308 by far."""
    g, _ = random_grammar(0, kept=1.0)
    rare = replace(g, emission=g.emission * 1e-5)
    words = np.random.default_rng(1).integers(5, size=60)
    found = sparse.inside_outside(RuleList.of(rare), words)
    assert found.log_z < -745
    exact = chart.inside_outside(rare, jnp.asarray(words[None]), jnp.asarray([60]))
    np.testing.assert_allclose(found.log_z, exact.log_z[0], rtol=1e-12)
    np.testing.assert_allclose(found.spans, exact.span_marginals[0], rtol=1e-9, atol=1e-15)
    assert found.spans.sum() == pytest.approx(59, rel=1e-12)
    log_prob, tree = sparse.viterbi(RuleList.of(rare), words)
    assert log_prob < found.log_z and len(tree.leaves()) == 60


def test_rules_there_and_back():
    g, rules = random_grammar(3)
    assert rules.grammar() == RuleList.of(g).grammar() == g
    assert len(rules.parent) == np.count_nonzero(g.rules)


def test_words_by_name():
    _, rules = random_grammar(4)
    assert rules.encode(["w2", "w0"]) == [2, 0]
    with pytest.raises(ValueError, match="'w6' is not in the vocabulary"):
        rules.encode(["w0", "w6"])
    with pytest.raises(ValueError, match="the sentence is empty"):
        rules.encode([])


TOY = """
(S (NP (D the) (N cat)) (VP (V saw) (NP (D a) (J big) (J red) (N bird))) (. .))
(S (NP (P we)) (VP (V slept)) (. .))
(S (NP (P we)) (VP (V saw) (NP (NP (D a) (N cat)) (PP (I in) (NP (N may))))) (. .))
(X (UH oh))
"""


@pytest.mark.parametrize("decode", [brackets.symbol_recall, brackets.label_recall])
def test_brackets_parse_by_rules_as_by_the_chart(decode):
    """Improper, with a sentence that has no parse, and one of a single word."""
    trees = treebank.parse_brackets(TOY)
    induced = treebank.induce(trees, h=0)
    for grammar in (induced, treebank.restrict(induced, 5, 6)):
        sentences = [treebank.tagged(tree) for tree in trees] + [[("may", "N"), ("the", "D")]]
        dense = brackets.parse(grammar.grammar, sentences, decode)
        assert brackets.parse(grammar.rule_list, sentences, decode) == dense
        assert 4 in dense.unparsed
    with pytest.raises(ValueError, match="'Q' is not in the vocabulary"):
        brackets.parse(induced.rule_list, [[("what", "Q")]])
