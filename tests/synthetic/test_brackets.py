"""Scores counted by hand, decoders against all trees, and the treebank sample if there is one."""

from functools import cache

import numpy as np
import pytest
from nltk.tree import Tree

from synthetic.grammar import brackets, treebank
from synthetic.grammar.brackets import NO_LABEL, Agreement, score
from synthetic.grammar.grammar import Grammar


def _tree(text: str) -> Tree:
    (tree,) = treebank.parse_brackets(text)
    return tree


GOLD = _tree("(TOP (S (`` ``) (NP (DT the) (NN dog)) (VP (V ran) (PRT (RP off))) (. .)))")


def test_brackets_of_a_tree_by_hand():
    found, words = brackets.brackets(GOLD)
    assert words == 4
    assert found == [("NP", 0, 2), ("ADVP", 3, 4), ("VP", 2, 4), ("S", 0, 4)]
    only_punctuation = _tree("(S (X (, ,) (: --)) (Y (Z (NN a) (. .))))")
    assert brackets.brackets(only_punctuation) == ([("Z", 0, 1), ("Y", 0, 1), ("S", 0, 1)], 1)
    symbols = _tree("(S ($ $) (# #) (-LRB- -LRB-) (-RRB- -RRB-))")
    assert brackets.brackets(symbols) == ([("S", 0, 4)], 4)


def test_scores_by_hand():
    guess = _tree("(S (`` ``) (NP (DT the)) (VP (X (NN dog) (V ran)) (ADVP (RP off))) (. .))")
    found = score([GOLD], [guess])
    # Gold: NP 0-2, ADVP 3-4, VP 2-4, S 0-4. Guess: NP 0-1, X 1-3, ADVP 3-4, VP 1-4, S 0-4.
    assert found.labelled == found.unlabelled == Agreement(2, 4, 5)
    assert found.labelled.precision == 2 / 5
    assert found.labelled.recall == 2 / 4
    assert found.labelled.f1 == pytest.approx(4 / 9)
    # Without trivial spans gold has 0-2 and 2-4, and the guess 1-3 and 1-4.
    assert found.sentence_f1 == 0.0
    other = _tree("(S (`` ``) (X (DT the) (NN dog)) (NP (V ran) (RP off)) (. .))")
    found = score([GOLD, GOLD], [other, guess])
    assert found.labelled == Agreement(1 + 2, 8, 3 + 5)
    assert found.unlabelled == Agreement(3 + 2, 8, 3 + 5)
    assert found.sentence_f1 == 0.5
    assert found.sentences == 2
    assert score([GOLD], [GOLD]).labelled == Agreement(4, 4, 4)


def test_brackets_match_as_multisets():
    gold = _tree("(S (S (NN a) (NN b)) (. .))")
    once = _tree("(S (NN a) (NN b) (. .))")
    thrice = _tree("(S (S (S (NN a) (NN b))) (. .))")
    assert score([gold], [once]).labelled == Agreement(1, 2, 1)
    assert score([gold], [thrice]).labelled == Agreement(2, 2, 3)
    assert score([gold], [thrice]).sentence_f1 == 1.0  # no inner span on either side
    with_np = _tree("(S (NP (NN a) (NN b)) (. .))")
    assert score([gold], [with_np]).labelled == Agreement(1, 2, 2)
    assert score([gold], [with_np]).unlabelled == Agreement(2, 2, 2)


def test_what_is_not_comparable_is_refused():
    with pytest.raises(ValueError, match="0 trees guessed, must be 1"):
        score([GOLD], [])
    with pytest.raises(ValueError, match="tree 0 has 1 words, must have 4"):
        score([GOLD], [_tree("(S (NN a))")])
    empty = score([], [])
    assert empty.labelled == Agreement(0, 0, 0)
    assert empty.labelled.f1 == empty.labelled.precision == empty.labelled.recall == 1.0


def test_right_branching_by_hand():
    tags = ["``", "A", ",", "B", "C", "''", "."]
    tree = brackets.right_branching([(tag.lower(), tag) for tag in tags])
    inner = "(_ (B b) (C c) ('' '') (. .))"
    assert tree == _tree(f"(S (`` ``) (A a) (, ,) {inner})")
    found = score([GOLD], [brackets.right_branching(GOLD.pos())])
    assert found.labelled == Agreement(1, 4, 1)
    assert found.unlabelled == Agreement(2, 4, 3)
    for sentence in ([("a", "A")], [(".", "."), (",", ",")]):
        tree = brackets.right_branching(sentence)
        assert tree.pos() == sentence
        assert tree.height() == 3


def _bracketings(i: int, j: int):
    """All binary trees over tokens i..j, as lists of spans."""
    if i == j:
        yield []
    for k in range(i, j):
        for left in _bracketings(i, k):
            for right in _bracketings(k + 1, j):
                yield [(i, j), *left, *right]


def _spans(tree: Tree) -> list[tuple[str, int, int]]:
    """Label, first and last token of all nodes over more than one word."""
    out = []

    def walk(node, start):
        end = start
        for child in node:
            end = walk(child, end) if isinstance(child, Tree) else end + 1
        if end - start > 1:
            out.append((node.label(), start, end - 1))
        return end

    walk(tree, 0)
    return out


def _random(seed: int, n: int = 6, batch: int = 3):
    """Numbers like marginals: any, as the decoders do not ask for consistent ones."""
    rng = np.random.default_rng(seed)
    names = ("S", "S+VP", "@VP", "VP", "NP"), ("NN", "NP+NN", "X+NP+NN", "V"), ("NN", "V")
    sizes = [len(x) for x in names]
    g = Grammar(
        *names,
        root=np.ones(9),
        rules=np.ones((5, 9, 9)),
        emission=np.ones((sizes[1], sizes[2])),
    )
    spans = rng.uniform(size=(batch, n, n, 5)) ** 2 * 0.6
    tags = rng.uniform(size=(batch, n, 4))
    return g, spans, tags, [[(f"w{t}", "NN") for t in range(n)]] * batch


@pytest.mark.parametrize("seed", range(4))
def test_best_splits_beat_all_trees(seed):
    _, spans, _, _ = _random(seed)
    scores = spans.sum(-1) - 0.5
    splits = brackets.best_splits(scores)
    for n in range(len(scores)):

        @cache
        def found(i, j, n=n):
            if i == j:
                return 0.0
            k = splits[n, i, j]
            return scores[n, i, j] + found(i, k) + found(k + 1, j)

        best = max(sum(scores[n, i, j] for i, j in tree) for tree in _bracketings(0, 5))
        assert found(0, 5) == pytest.approx(best, rel=1e-14)
    assert brackets.best_splits(np.zeros((1, 4, 4)))[0, 0, 3] == 0  # the first in a tie


@pytest.mark.parametrize("seed", range(4))
def test_symbol_recall_is_the_best_tree(seed):
    g, spans, tags, sentences = _random(seed)
    trees = brackets.symbol_recall(g, spans, tags, sentences)
    for n, tree in enumerate(trees):
        best = max(_bracketings(0, 5), key=lambda t: sum(spans[n, i, j].max() for i, j in t))
        expected = []
        for i, j in best:
            name = g.nonterminals[spans[n, i, j].argmax()]
            expected += [(x, i, j) for x in name.split("+") if not name.startswith("@")]
        if not any((i, j) == (0, 5) for _, i, j in expected):
            expected.append(("TOP", 0, 5))
        assert sorted(_spans(tree)) == sorted(expected)
        assert tree.pos() == sentences[n]
        for t, leaf in enumerate(tree.treepositions("leaves")):
            above = [tree[leaf[:k]].label() for k in range(len(leaf))]
            chain = g.preterminals[tags[n, t].argmax()].split("+")[:-1]
            assert above[len(above) - 1 - len(chain) : -1] == chain


@pytest.mark.parametrize("seed", range(4))
def test_label_recall_is_the_best_tree(seed):
    g, spans, tags, sentences = _random(seed)
    trees = brackets.label_recall(g, spans, tags, sentences, threshold=0.3)
    for n, tree in enumerate(trees):
        s = {  # the chain S+VP counts for both of its labels, @VP for none
            "S": spans[n, ..., 0] + spans[n, ..., 1],
            "VP": spans[n, ..., 1] + spans[n, ..., 3],
            "NP": spans[n, ..., 4],
        }
        gain = sum(np.maximum(x - 0.3, 0) for x in s.values())
        best = max(_bracketings(0, 5), key=lambda t: sum(gain[i, j] for i, j in t))
        expected = [(x, i, j) for x in s for i, j in best if s[x][i, j] > 0.3]
        if not any((i, j) == (0, 5) for _, i, j in expected):
            expected.append(("TOP", 0, 5))
        assert sorted(_spans(tree)) == sorted(expected)
        # X+NP+NN: X above NP, wherever both are likely enough.
        x, np_ = tags[n, :, 2] > 0.3, tags[n, :, 1] + tags[n, :, 2] > 0.3
        for t, leaf in enumerate(tree.treepositions("leaves")):
            labels = [tree[leaf[:k]].label() for k in range(len(leaf) - 1)]
            chain = ["X"] * int(x[t]) + ["NP"] * int(np_[t])
            assert labels[len(labels) - len(chain) :] == chain


def test_chains_stand_in_their_order():
    g, spans, tags, sentences = _random(0, n=2, batch=1)
    spans[:] = 0
    spans[0, 0, 1] = [0.1, 0.5, 0.0, 0.4, 0.0]  # S, S+VP, @VP, VP, NP
    tags[:] = [0, 0, 1, 0]
    (tree,) = brackets.label_recall(g, spans, tags, sentences)
    leaves = " ".join(f"(X (NP (NN {word})))" for word, _ in sentences[0])
    assert tree == _tree(f"(S (VP {leaves}))")
    assert brackets.symbol_recall(g, spans, tags, sentences) == [tree]


def test_a_sentence_without_a_parse_branches_to_the_right():
    g, spans, tags, sentences = _random(0)
    spans[1], tags[1] = 0, 0
    for decode in (brackets.symbol_recall, brackets.label_recall):
        trees = decode(g, spans, tags, sentences)
        assert trees[1] == brackets.right_branching(sentences[1])
        assert {node.label() for node in trees[0].subtrees()}.isdisjoint({NO_LABEL})


TOY = """
(S (NP (D the) (N cat)) (VP (V saw) (NP (D a) (J big) (J red) (N bird))) (. .))
(S (NP (P we)) (VP (V slept)) (. .))
(S (NP (P we)) (VP (V saw) (NP (NP (D a) (N cat)) (PP (I in) (NP (N may))))) (. .))
(X (UH oh))
"""


@pytest.mark.parametrize("decode", [brackets.symbol_recall, brackets.label_recall])
def test_parsing_with_an_induced_grammar(decode):
    """Every tree of the toy treebank is the most probable one, and none is lost to the batches."""
    trees = treebank.parse_brackets(TOY)
    g = treebank.induce(trees, h=2).grammar
    sentences = [treebank.tagged(tree) for tree in trees]
    nonsense = [("may", "N"), ("the", "D")]
    found = brackets.parse(g, [*sentences, nonsense], decode, batch=3)
    assert found.trees == [*trees, brackets.right_branching(nonsense)]
    assert found.unparsed == [4]
    with pytest.raises(ValueError, match="'Q' is not in the vocabulary"):
        brackets.parse(g, [[("what", "Q")]])
    assert brackets.parse(g, []) == ([], [])


def test_the_treebank_sample(nltk_data):
    """F1 on sentences of up to 25 tags, files 0150-0169, and what the restricted grammar loses."""
    files = sorted((nltk_data / "corpora" / "treebank" / "combined").glob("wsj_0*.mrg"))
    train, develop = (
        [treebank.clean(tree) for tree in treebank.read_brackets(*part)]
        for part in (files[:149], files[149:169])
    )
    gold = [tree for tree in develop if len(tree.leaves()) <= 25]
    sentences = [treebank.tagged(tree) for tree in gold]
    assert len(gold) == 134
    baseline = score(gold, [brackets.right_branching(s) for s in sentences])
    assert 100 * baseline.unlabelled.f1 == pytest.approx(40.1, abs=0.1)
    assert 100 * baseline.sentence_f1 == pytest.approx(41.1, abs=0.1)

    induced = treebank.induce(train)
    assert (len(induced.nonterminals), len(induced.preterminals)) == (68, 138)
    found = brackets.parse(treebank.restrict(induced, 20, 70).grammar, sentences)
    assert len(found.unparsed) == 1
    f1 = score(gold, found.trees)
    assert 100 * f1.labelled.f1 == pytest.approx(75.5, abs=0.1)
    assert 100 * f1.unlabelled.f1 == pytest.approx(77.4, abs=0.1)
    assert 100 * f1.sentence_f1 == pytest.approx(75.7, abs=0.1)
