"""Normal forms, charts and the construction against all derivations of random grammars."""

import math
import warnings
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz.fuzzing import fuzz
from fuzz.grammars import TIME, Case, cases, log_of, marginals, posterior
from fuzz.numpy_jaxpr import run
from hypothesis import assume, event
from nltk.tree import Tree

from constructions.core.compile import compile_program
from constructions.inside_outside.construction import InsideOutside
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar, SupercriticalWarning, Weights
from synthetic.grammar.productions import GrammarError

SIZES = (16, 20, 4)  # nonterminals, pre-terminals and words, to which grammars are padded
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def grammar(case: Case) -> Grammar:
    """Read from text; single words alone, and probabilities below 1e-308, may be refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SupercriticalWarning)
            return Grammar.from_text(case.text())
    except GrammarError:
        assume(any(len(right) > 1 for _, right in case.rules))
        assume(not case.tiny)
        raise


def padded(g: Grammar) -> Weights:
    """The weights with symbols that nothing reaches: all grammars then share what is compiled."""
    n, p, v = len(g.nonterminals), len(g.preterminals), len(g.vocabulary)
    assume(n <= SIZES[0] and p <= SIZES[1])
    place = np.r_[:n, SIZES[0] : SIZES[0] + p]
    root, emission = np.zeros(sum(SIZES[:2])), np.zeros(SIZES[1:])
    rules = np.zeros((SIZES[0], len(root), len(root)))
    root[place] = g.root
    rules[np.ix_(np.arange(n), place, place)] = g.rules
    emission[:p, :v] = g.emission
    return Weights(*(jnp.asarray(a) for a in (root, rules, emission)))


def encoded(g: Grammar, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, lengths and mask, padded to `TIME` words."""
    length = len(case.words)
    tokens, mask = np.zeros((1, TIME), np.int32), np.zeros((1, TIME), bool)
    tokens[0, :length] = [g.vocabulary.index(w) for w in case.words]
    mask[0, :length] = case.hidden
    return tokens, np.array([length], np.int32), mask


def chain(symbol: str) -> list[str]:
    """The symbols of the grammar that a symbol of the normal form stands for."""
    if symbol[0] in "@=":
        return []
    return symbol.removesuffix("/lex").split("+")


def constituents(g: Grammar, spans: np.ndarray, tags: np.ndarray) -> dict:
    """{(first, last, symbol of the grammar): marginal} from those of the normal form."""
    found: dict[tuple[int, int, str], float] = {}
    for names, table in ((g.nonterminals, spans), (g.preterminals, tags)):
        for number, name in enumerate(names):
            for place in zip(*np.nonzero(table[..., number]), strict=True):
                for symbol in chain(name):
                    key = (place[0], place[-1], symbol)
                    found[key] = found.get(key, 0.0) + table[(*place, number)]
    return found


def probability(case: Case, tree: Tree) -> Fraction:
    """Of a tree of the grammar, rule by rule."""
    right = tuple(x.label() if isinstance(x, Tree) else (x,) for x in tree)
    p = Fraction(case.rules[tree.label(), right])
    return math.prod((probability(case, x) for x in tree if isinstance(x, Tree)), start=p)


def assert_posterior(case: Case, g: Grammar, found: np.ndarray) -> None:
    for place in range(len(case.words)):
        wanted = posterior(case, place, g.vocabulary)
        if not np.isnan(wanted).any():
            np.testing.assert_allclose(found[place, : len(wanted)], wanted, **CLOSE)


@fuzz(quick=15, share=0.25, case=cases())
def test_charts(case: Case) -> None:
    g = grammar(case)
    derivations = case.derivations()
    with jax.enable_x64(True):
        weights, given = padded(g), encoded(g, case)
        try:
            found = jax.tree.map(np.asarray, chart.inside_outside(weights, *given))
        except ValueError as error:  # where nothing follows from any of its words
            assert "no parse" in str(error)
            places = range(len(case.words))
            assert all(np.isnan(posterior(case, t, g.vocabulary)).all() for t in places)
            return
        best = chart.viterbi(weights, *given)
        alone = chart.log_z(weights, *given)
    z = sum((d.probability for d in derivations), Fraction(0))
    event("no parse" if not z else "parsed")
    np.testing.assert_allclose(found.log_z[0], log_of(z), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(alone[0], log_of(z), rtol=1e-10, atol=1e-10)
    highest = max((d.probability for d in derivations), default=Fraction(0))
    np.testing.assert_allclose(best.log_prob[0], log_of(highest), rtol=1e-10, atol=1e-10)
    assert_posterior(case, g, found.word_posterior[0])
    if not z:
        for table in (found.span_marginals, found.tag_marginals):
            assert not np.nan_to_num(table).any()
        return
    wanted = marginals(derivations)
    spans = constituents(g, found.span_marginals[0], found.tag_marginals[0])
    for key in {*wanted, *spans}:
        assert spans.get(key, 0.0) == pytest.approx(wanted.get(key, 0.0), rel=1e-9, abs=1e-12), key


@fuzz(quick=15, share=0.25, case=cases())
def test_most_probable_trees(case: Case) -> None:
    """Their probability, rule by rule of the grammar itself, is the highest."""
    g = grammar(case)
    given = encoded(g, case)
    with jax.enable_x64(True):
        weights = padded(g)
        best = jax.tree.map(np.asarray, chart.viterbi(weights, *given))
    n = len(g.nonterminals)

    def moved(symbols: np.ndarray) -> np.ndarray:
        return np.where(symbols >= SIZES[0], symbols - SIZES[0] + n, symbols)

    best = best._replace(top=moved(best.top), left=moved(best.left), right=moved(best.right))
    (tree,) = chart.viterbi_trees(g, best, given[1])
    derivations = case.derivations()
    if not derivations:
        assert tree is None
        return
    assert tree is not None
    highest = log_of(max(d.probability for d in derivations))
    assert log_of(probability(case, g.restore(tree))) == pytest.approx(
        highest, rel=1e-10, abs=1e-10
    )
    assert g.normalise(g.restore(tree)) == tree


@fuzz(quick=1, share=0.025, case=cases(tiny=False))
def test_construction(case: Case) -> None:
    """The same posterior and marginals by the program, slot by slot and compiled."""
    g = grammar(case)
    c = InsideOutside(grammar=g, max_length=TIME)
    given = encoded(g, case)
    derivations = case.derivations()
    with jax.enable_x64(True):
        found = run(c.evaluate, *given)
        model = compile_program(c.program, "float64")
        dense = run(lambda m, *given: c.apply(m, *given), model, *given)
    assert_posterior(case, g, found["prediction"][0])
    assert_posterior(case, g, dense[0])
    wanted = marginals(derivations)
    spans = constituents(g, found["span_marginals"][0], found["tag_marginals"][0])
    if derivations:
        for key in {*wanted, *spans}:
            assert spans.get(key, 0.0) == pytest.approx(wanted.get(key, 0.0), rel=1e-7, abs=1e-9)
