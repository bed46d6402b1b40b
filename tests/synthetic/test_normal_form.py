"""Normal forms against every tree of the grammar they came from, found by plain recursion."""

import warnings
from collections import defaultdict
from itertools import product

import numpy as np
import pytest
from nltk import PCFG, InsideChartParser
from nltk.tree import Tree

from synthetic.grammar.examples import named
from synthetic.grammar.grammar import Grammar, GrammarError, SupercriticalWarning

# Chains of one, two and three, to branches and to words; words in long rules; every kind of split.
MIXED = """
S -> NP VP [0.5] | VP [0.2] | NP 'and' NP VP [0.2] | 'go' [0.1]
NP -> 'dogs' [0.3] | N [0.2] | NP PP [0.2] | 'the' N [0.3]
N -> 'fish' [0.6] | 'dogs' [0.4]
VP -> X [0.3] | V NP [0.4] | V NP PP [0.3]
X -> V [0.5] | V V [0.25] | N [0.25]
V -> 'fish' [0.7] | 'go' [0.3]
PP -> 'of' NP [1.0]
"""


def enumerate_trees(text: str, longest: int) -> dict[tuple[str, ...], list[tuple[Tree, float]]]:
    """All trees of NLTK's reading of a grammar, by sentence, with their probabilities."""
    grammar = PCFG.fromstring(text)
    memory: dict = {}

    def of_symbol(symbol, length, above=()):
        if (symbol, length) not in memory:
            found = []
            for rule in grammar.productions(lhs=symbol):
                for children, p in of_items(rule.rhs(), length):
                    found.append((Tree(symbol.symbol(), list(children)), p * rule.prob()))
            memory[symbol, length] = found
        return memory[symbol, length]

    def of_items(items, length):
        first, rest = items[0], items[1:]
        for own in range(1, length - len(rest) + 1) if rest else [length]:
            if isinstance(first, str):
                firsts = [(first, 1.0)] if own == 1 else []
            else:
                firsts = of_symbol(first, own)
            for child, p in firsts:
                if not rest:
                    yield (child,), p
                else:
                    for more, q in of_items(rest, length - own):
                        yield (child, *more), p * q

    found = defaultdict(list)
    for length in range(1, longest + 1):
        for tree, p in of_symbol(grammar.start(), length):
            found[tuple(tree.leaves())].append((tree, p))
    return found


def tree_probability(grammar: Grammar, tree: Tree) -> float:
    """Of a tree of the normal form, rule by rule."""
    symbol = {name: number for number, name in enumerate(grammar.symbols)}
    n = len(grammar.nonterminals)

    def below(node: Tree) -> float:
        a = symbol[node.label()]
        if isinstance(node[0], str):
            return float(grammar.emission[a - n, grammar.vocabulary.index(node[0])])
        left, right = node
        p = grammar.rules[a, symbol[left.label()], symbol[right.label()]]
        return float(p) * below(left) * below(right)

    return float(grammar.root[symbol[tree.label()]]) * below(tree)


def sentence_probability(grammar: Grammar, words: tuple[str, ...]) -> float:
    """By a textbook chart."""
    n, time = len(grammar.nonterminals), len(words)
    chart = np.zeros((time, time, len(grammar.symbols)))
    for t, word in enumerate(words):
        chart[t, t, n:] = grammar.emission[:, grammar.vocabulary.index(word)]
    for width in range(2, time + 1):
        for i in range(time - width + 1):
            j = i + width - 1
            for k in range(i, j):
                outer = np.outer(chart[i, k], chart[k + 1, j])
                chart[i, j, :n] += (grammar.rules * outer).sum((1, 2))
    return float(chart[0, -1] @ grammar.root)


def random_text(seed: int) -> str:
    """A small grammar with all kinds of rules, unary ones only to later symbols."""
    draw = np.random.default_rng(seed)
    symbols = [f"A{number}" for number in range(3)]
    lines = []
    for number, symbol in enumerate(symbols):
        rights = [f"'{word}'" for word in draw.choice(list("xyz"), 2, replace=False)]
        rights += list(symbols[number + 1 :])  # every later symbol is reached by a chain
        for length in (2, 3):
            pool = [*symbols, "'x'", "'y'"]
            rights.append(" ".join(draw.choice(pool, length)))
        counts = draw.integers(1, 9, len(rights))
        share = np.round(counts / counts.sum(), 4)
        share[0] += 1 - share.sum()
        lines.append(
            f"{symbol} -> "
            + " | ".join(f"{r} [{p:.4f}]" for r, p in zip(rights, share, strict=True))
        )
    return "\n".join(lines)


def from_text(text: str) -> Grammar:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SupercriticalWarning)
        return Grammar.from_text(text)


@pytest.mark.parametrize(
    "text, longest", [(MIXED, 4), *((random_text(seed), 3) for seed in range(4))]
)
def test_trees_and_sentences_keep_their_probabilities(text, longest):
    grammar = from_text(text)
    found = enumerate_trees(text, longest)
    assert len(found) > 10 and max(map(len, found.values())) > 3
    by_length = np.zeros(longest + 1)
    for words, parses in found.items():
        total = sum(p for _, p in parses)
        by_length[len(words)] += total
        assert sentence_probability(grammar, words) == pytest.approx(total, rel=1e-12)
        normal = [grammar.normalise(tree) for tree, _ in parses]
        assert len({str(tree) for tree in normal}) == len(parses)
        for (tree, p), image in zip(parses, normal, strict=True):
            assert grammar.restore(image) == tree
            assert tree_probability(grammar, image) == pytest.approx(p, rel=1e-12)
    np.testing.assert_allclose(grammar.length_probabilities(longest), by_length, rtol=1e-12)


def test_words_that_no_sentence_has_are_improbable():
    grammar = Grammar.from_text(MIXED)
    found = enumerate_trees(MIXED, 3)
    for words in product(grammar.vocabulary, repeat=3):
        total = sum(p for _, p in found.get(words, []))
        assert sentence_probability(grammar, words) == pytest.approx(total, rel=1e-12)


def test_against_nltk_on_short_sentences():
    parser = InsideChartParser(PCFG.fromstring(MIXED))
    grammar = Grammar.from_text(MIXED)
    for words in (("fish",), ("dogs", "go"), ("the", "fish", "fish")):
        total = sum(tree.prob() for tree in parser.parse(words))
        assert total > 0
        assert sentence_probability(grammar, words) == pytest.approx(total, rel=1e-9)


def test_names_and_splits():
    grammar = Grammar.from_text(MIXED)
    assert {"S+VP", "S+VP+X", "@=and&NP&VP", "@NP&VP", "@NP&PP"} <= {*grammar.nonterminals}
    assert {"S/lex", "NP/lex", "NP+N", "VP+X+V", "VP+X+N", "=and", "=of"} <= {*grammar.preterminals}
    assert grammar.splits == ("S", "NP")
    assert {"X", "X+V"}.isdisjoint(grammar.symbols)  # X is only met below VP


@pytest.mark.parametrize("name", ["toy", "english"])
def test_a_normal_form_with_splits_stays_as_it_is(name):
    grammar = named(name)
    assert Grammar.from_nltk(grammar.to_nltk()) == grammar


def test_marks_are_refused_only_where_they_would_be_set():
    rules = "{0} -> X X [1.0]\nX -> 'x' [1.0]"
    for symbol in ("A+B", "@A", "A/lex", "=a"):
        assert symbol in Grammar.from_text(rules.format(symbol)).nonterminals
    long, chain = "S -> @A X X [1]\n", "S -> A+B [1]\n"
    split = "S -> A/lex X [0.5] | X X [0.4] | 'x' [0.1]\n"
    for text, symbol in ((long, "@A"), (chain, "A+B")):
        with pytest.raises(GrammarError, match="rename the symbol '" + symbol.replace("+", r"\+")):
            Grammar.from_text(text + rules.format(symbol))
    assert Grammar.from_text(split + rules.format("A/lex")).splits == ("S",)
    with pytest.raises(GrammarError, match="rename the symbol 'S/lex'"):
        Grammar.from_text((split + rules).replace("A/lex", "S/lex").format("S/lex"))
    with pytest.raises(GrammarError, match="two ends of rules would both be called"):
        Grammar.from_text("S -> 'x' 'a&=b' 'c' [0.5] | 'x' 'a' 'b&=c' [0.5]")


def test_trees_of_odd_labels_come_back():
    plus = Tree("S", [Tree("+", ["a"]), Tree("=", ["b"])])
    grammar = Grammar.from_text("S -> + = [1]\n+ -> 'a' [1]\n= -> 'b' [1]")
    assert grammar.restore(grammar.normalise(plus)) == plus


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        ("S -> A [1e-200] | 'b' [1]\nA -> C C [1e-200] | 'a' [1]\nC -> 'c' [1]", "S[+]A"),
        ("S -> A C [1]\nA -> B [1e-160] | 'a' [1]\nB -> C [1e-160] | 'b' [1]\nC -> 'c' [1]", "B"),
    ],
)
def test_probabilities_that_multiply_to_what_no_float_holds(rules, what):
    with pytest.raises(GrammarError, match=f"of {what} multiply to less than 2.23e-308"):
        Grammar.from_text(rules)


def test_long_names_are_not_quoted_whole():
    with pytest.raises(GrammarError) as error:
        Grammar.from_text(f"S -> {'x' * 5000} 'a' [1]")
    said = str(error.value)
    assert len(said) < 450 and said.startswith("grammar: line 1: S -> xxx")
    assert said.endswith("has no rules (words are quoted)") and " characters) .. xxx" in said
