"""Trees thousands of levels deep, which `nltk.Tree` cannot compare or print, and odd labels."""

import inspect
import sys
from typing import Any

import numpy as np
import pytest
from nltk.tree import Tree

from probes.syntax.constituents import tree_spans
from synthetic.grammar import brackets, decode, sparse, treebank, trees
from synthetic.grammar import normal_form as cnf
from synthetic.grammar.grammar import Grammar, GrammarError
from synthetic.grammar.treebank import TreebankError

DEEP, LESS = 5000, 1100
RIGHT = "(S (A a) " * DEEP + "(A b)" + ")" * DEEP
LEFT = "(S " * LESS + "(A b)" + "(A a))" * LESS
CHAIN = "(S (A a) " + "(X (Y " * LESS + "(B b)" + "))" * LESS + ")"


def written(tree: Any) -> str:
    """A tree as brackets, by a stack."""
    out, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Tree):
            out.append(f"({node.label()}")
            waiting += [")", *reversed(node)]
        else:
            out.append(str(node))
    return " ".join(out)


def read(text: str) -> Tree:
    (tree,) = treebank.parse_brackets(text)
    return tree


def plain(text: str) -> str:
    return " ".join(text.replace("(", " ( ").replace(")", " ) ").split()).replace("( ", "(")


@pytest.mark.parametrize("text", [RIGHT, LEFT, CHAIN], ids=["right", "left", "chain"])
def test_deep_trees_go_there_and_back(text: str):
    tree, same = read(text), plain(text)
    assert written(tree) == same
    assert written(treebank.clean(tree)) == same
    collapsed = treebank.collapse(tree)
    assert written(treebank.expand(collapsed)) == same
    for direction in ("right", "left"):
        binary = treebank.binarise(collapsed, 1, 3, direction)
        assert written(treebank.unbinarise(binary)) == written(collapsed)
    assert written(cnf.restore(cnf.normalise(tree, ()))) == same
    words = [word for _, word in sorted((n, w) for n, w in enumerate(same.split()) if w in "ab")]
    assert [word for word, _ in treebank.tagged(tree)] == words


def test_flat_trees_are_as_deep_in_normal_form():
    flat = Tree("S", [Tree("A", ["a"]) for _ in range(1500)])
    binary = treebank.binarise(flat)
    assert len([*trees.node_spans(binary)]) == 1499 + 1500
    assert written(treebank.unbinarise(binary)) == written(flat)
    assert written(cnf.restore(cnf.normalise(flat, ()))) == written(flat)


def test_deep_trees_are_counted_and_scored():
    n = LESS
    right, left, chain = read("(S (A a) " * n + "(A b)" + ")" * n), read(LEFT), read(CHAIN)
    found = treebank.induce([right, left])
    assert found.rules == {("S", "A", "S"): n - 1, ("S", "S", "A"): n - 1, ("S", "A", "A"): 2}
    assert found.counts == {"S": 2 * n, "A": 2 * n + 2}
    assert brackets.brackets(right) == ([("S", k, n + 1) for k in reversed(range(n))], n + 1)
    scores = brackets.score([right, chain], [left, chain])
    assert scores.labelled == brackets.Agreement(2 + 2 * n, 3 * n + 1, 3 * n + 1)
    assert tree_spans(right) == {(k, n) for k in range(n)}
    assert tree_spans(chain) == {(0, 1)}


def test_trees_of_long_sentences():
    """Pointers of n words whose most probable tree is right- or left-branching."""
    grammar = Grammar.from_text("S -> A S [0.25] | S A [0.25] | A A [0.5]\nA -> 'a' [1]")
    for text, n in ((RIGHT, DEEP + 1), (LEFT, LESS + 1)):
        i, j = np.arange(n)[:, None], np.arange(n)
        split = i if text is RIGHT else j - 1
        # A child of one word is A, number 1, and S, number 0, otherwise.
        left, right, splits = (
            np.broadcast_to(a, (n, n))[None, ..., None] for a in (split == i, split == j - 1, split)
        )
        words = np.zeros((1, n), int)
        found = decode.Viterbi(np.zeros(1), np.zeros(1, int), left, right, splits, words[..., None])
        (tree,) = decode.viterbi_trees(grammar, found, np.array([n]))
        assert written(tree) == plain(text.replace("b", "a"))
        none = np.broadcast_to(-1, (1, n, n))
        labels = decode.LabelledRecall(np.zeros(1), none + 1, splits[..., 0], words)
        (tree,) = decode.labelled_recall_trees(grammar, labels, words, np.array([n]))
        assert written(tree) == plain(text.replace("b", "a"))
        (tree,) = decode.labelled_recall_trees(
            grammar, labels._replace(label=none), words, np.array([n])
        )
        assert tree.label() == "" and len(tree) == n


def test_decoders_call_nothing_as_deep_as_their_trees(monkeypatch: pytest.MonkeyPatch):
    n = 160
    grammar = Grammar.from_text("S -> A S [0.5] | A A [0.5]\nA -> 'a' [1]")
    rules = sparse.RuleList.of(grammar)
    expected = plain("(S (A a) " * (n - 1) + "(A a)" + ")" * (n - 1))
    spans, tags = np.zeros((1, n, n, 1)), np.ones((1, n, 1))
    spans[0, np.arange(n - 1), n - 1] = 1
    sentence = [("a", "A")] * n
    splits = np.broadcast_to(np.arange(n)[:, None], (1, n, n))
    few = len(inspect.stack()) + 120
    monkeypatch.setattr(brackets, "best_splits", lambda scores: splits)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(few)
    try:
        _, tree = sparse.viterbi(rules, [0] * n)
        (decoded,) = brackets.symbol_recall(rules, spans, tags, [sentence])
    finally:
        sys.setrecursionlimit(before)
    assert written(tree) == expected
    assert written(decoded) == expected


@pytest.mark.parametrize("length", [900, 3000])
def test_long_chains_of_unary_rules(length: int):
    chain = "\n".join(f"A{n} -> A{n + 1}" for n in range(length))
    grammar = Grammar.from_text(f"S -> A0 A0\n{chain}\nA{length} -> 'a' | 'b'")
    assert grammar.symbols == ("S", "+".join(f"A{n}" for n in range(length + 1)))
    np.testing.assert_array_equal(grammar.rules, [[[0, 0], [0, 1]]])
    np.testing.assert_array_equal(grammar.emission, [[0.5, 0.5]])
    with pytest.raises(GrammarError, match="unary rules in a cycle, A0 -> A1 -> .* -> A0"):
        Grammar.from_text(f"S -> A0 A0\n{chain}\nA{length} -> A0 | 'b'")


def test_each_link_of_a_chain_may_have_words_and_branches():
    """Probabilities of the chains are 2^-k, those of the root the product of what is on the way."""
    n = 60
    links = [f"A{k} -> A{k + 1} [0.5] | 'a' [0.25] | 'a' 'b' [0.25]" for k in range(n)]
    grammar = Grammar.from_text("\n".join([*links, f"A{n} -> 'a' [0.5] | 'a' 'b' [0.5]"]))
    chains = ["+".join(f"A{k}" for k in range(m + 1)) for m in range(n + 1)]
    assert grammar.nonterminals == tuple(chains)
    assert grammar.preterminals[: n + 1] == tuple(f"{chain}/lex" for chain in chains)
    p = np.append(0.25 * 0.5 ** np.arange(n), 0.5 ** (n + 1))
    np.testing.assert_array_equal(grammar.root[: 2 * n + 2], np.concatenate([p, p]))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            Tree("S", [Tree("A", ["a"]), Tree("A", ["\0"])]),
            r"word 2 is '.x00', must be a string of",
        ),
        (Tree("S", [Tree("A", ["a"]), Tree("A", ["b\0"])]), r"word 2 is 'b.x00', must be a string"),
        (Tree("S", [Tree("A", [""]), Tree("A", ["b"])]), "word 1 is '', must be a string of one"),
        (Tree("S", [Tree("A", [3]), Tree("A", ["b"])]), "word 1 is 3, must be a string"),
        (Tree("S", [Tree("A", ["\ud800"]), Tree("A", ["b"])]), "word 1 is '.ud800', must be"),
        (Tree("S", [Tree("A", ["a"]), Tree("", ["b"])]), "a label in front of word 2 is '', must"),
        (Tree("S", [Tree("", [Tree("A", ["a"])])]), "a label in front of word 1 is '', must"),
        (Tree("S", [Tree("A\0", ["a"])]), "a label in front of word 1 is 'A.x00', must"),
        (Tree("S", [Tree(None, ["a"])]), "a label in front of word 1 is None, must"),
        (Tree("", ["a"]), "a label in front of word 1 is '', must"),
        (
            Tree("S", [Tree("A", ["a"]), Tree("B", [])]),
            "'B' in front of word 2 is empty, must hold",
        ),
        (Tree("S", []), "'S' in front of word 1 is empty"),
        (Tree("", []), "(a label in front of word 1 is '', must|'' .* is empty)"),
    ],
)
def test_what_labels_and_words_may_be(tree: Tree, said: str):
    of_words = [treebank.clean, treebank.collapse, treebank.expand, treebank.binarise]
    of_words += [treebank.unbinarise, treebank.tagged, brackets.brackets]
    of_words += [cnf.restore, lambda tree: cnf.normalise(tree, ())]
    for function in of_words:
        with pytest.raises(TreebankError, match=f"tree: .*{said}") as caught:
            function(tree)
        assert "\n" not in str(caught.value)
    good = Tree("S", [Tree("A", ["a"]), Tree("B", ["b"])])
    with pytest.raises(TreebankError, match=f"tree 1: .*{said}"):
        treebank.induce([good, tree])
    with pytest.raises(TreebankError, match=f"tree 1 of gold: .*{said}"):
        brackets.score([good, tree], [good, good])


def test_what_is_no_list_of_trees():
    good = Tree("S", [Tree("A", ["a"]), Tree("B", ["b"])])
    for wrong, said in (
        ([None], "tree 0 is None, must be a Tree"),
        ([good, []], "tree 1 is of type list, must be a Tree"),
        ([[good]], "tree 0 is of type list, must be a Tree"),
        (["(S (A a))"], r"tree 0 is '\(S \(A a\)\)', must be a Tree"),
        (good, "trees is one Tree, must be a list of them"),
        ([Tree("S", ["a", Tree("B", ["b"])])], "'S' in front of word 1 holds a word beside others"),
        ([Tree("S", ["a", "b"])], "'S' in front of word 1 holds a word beside others"),
    ):
        with pytest.raises(TreebankError, match=said):
            treebank.induce(wrong)
