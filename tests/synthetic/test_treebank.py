"""Trees and their grammars against nltk's transformations and counts, and by hand."""

import re

import nltk
import numpy as np
import pytest
from nltk.tree import Tree

from synthetic.grammar import treebank
from synthetic.grammar.treebank import TreebankError

TEXT = """
( (S (NP-SBJ-1 (DT the) (JJ old) (NN dog)) (VP (VBD slept) (ADVP=2 (RB well))
     (S (NP (-NONE- *-1)) (VP (TO to) (VP (VB rest))))) (. .)) )
( (S (NP-SBJ (PRP we)) (VP (VBP see) (NP (NP (DT a) (JJ big) (JJ red) (NN sun))
     (PP-LOC (IN in) (NP (NN may)))) (ADVP|PRT (RP up)) (NP-TMP (NNP May))) (. .)) )
( (NP (NP (NN rain)) (PRN (-LRB- -LRB-) (NP (DT the) (NN dog)) (-RRB- -RRB-)) (. !)) )
(TOP (FRAG (NN fog)))
( (S (-NONE- *)) )
"""


@pytest.fixture(scope="module")
def trees():
    cleaned = map(treebank.clean, treebank.parse_brackets(TEXT))
    return [tree for tree in cleaned if tree is not None]


def _as_nltk(tree: Tree, v: int = 1, direction: str = "right") -> Tree:
    """Collapsed and binarised by nltk with h = 0, its names written as ours."""
    tree = Tree("TOP", [tree.copy(deep=True)])  # nltk leaves the root alone
    tree.collapse_unary(collapsePOS=True, collapseRoot=False, joinChar="+")
    tree = tree[0]
    tree.chomsky_normal_form(factor=direction, horzMarkov=0, vertMarkov=v - 1)
    for node in tree.subtrees():
        label = node.label()
        parents = re.findall(r"\^<(.*)>$", label)
        own = re.sub(r"\^<.*>$", "", label)
        if own.endswith("|<>"):
            own = "@" + own.removesuffix("|<>").split("+")[-1]
        ours = [parent.split("+")[-1] for parent in parents[0].split("-")] if parents else []
        node.set_label("^".join([own, *ours]))
    return tree


def test_brackets_are_read_as_nltk_reads_them(tmp_path):
    found = treebank.parse_brackets(TEXT)
    expected = Tree.fromstring(f"(ALL {TEXT})")
    assert found == list(expected)
    (tmp_path / "b.mrg").write_text(TEXT)
    (tmp_path / "a.mrg").write_text("(X (NN one))")
    (tmp_path / "notes.txt").write_text(")")
    assert treebank.read_brackets(tmp_path) == [Tree("X", [Tree("NN", ["one"])]), *found]
    assert treebank.read_brackets(str(tmp_path / "b.mrg"), tmp_path / "a.mrg")[:-1] == found


@pytest.mark.parametrize("mark, encoding", [("", "utf-8"), ("\ufeff", "utf-8"), ("", "utf-16")])
def test_words_are_those_of_the_file(tmp_path, mark, encoding):
    """A no-break space and what other readers take for line ends are parts of words."""
    path = tmp_path / "a.mrg"
    words = ["né", "10\xa0000", "a\x85b", "a\u2028b"]
    text = "(S\r\n" + " ".join(f"(X {word})" for word in words) + ")\r(S (X"
    path.write_bytes((mark + text).encode(encoding))
    with pytest.raises(TreebankError, match=r"a\.mrg:3: a bracket that is never closed"):
        treebank.read_brackets(path)
    path.write_bytes((mark + text + " y))").encode(encoding))
    assert [tree.leaves() for tree in treebank.read_brackets(path)] == [words, ["y"]]
    path.write_bytes("(S (X né) (X ne))".encode("latin-1"))
    with pytest.raises(TreebankError, match=r"a\.mrg: .* byte 7 is not UTF-8"):
        treebank.read_brackets(path)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("(S (NN a))\n(S (NN b)", 2, "never closed"),
        ("(S (NN a)))\n", 1, "outside"),
        ("(S (NN a))\n\nword", 3, "outside"),
        ("(S\n (NN a b))", 2, "of its own"),
        ("(S (NN a)\n stray)", 2, "of its own"),
        ("(S\n (NP ) (NN a))", 2, "empty"),
        ("( (S\n ((NN a))))", 2, "without a label"),
        ("(S (NN a\n (NN b)))", 2, "holds word and bracket"),
        ("()", 1, "empty"),
    ],
)
def test_malformed_brackets_name_file_and_line(tmp_path, text, line, said):
    path = tmp_path / "bad.mrg"
    path.write_text(text)
    with pytest.raises(TreebankError, match=said) as caught:
        treebank.read_brackets(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_a_folder_without_trees_is_an_error(tmp_path):
    with pytest.raises(TreebankError, match="holds no file"):
        treebank.read_brackets(tmp_path)
    with pytest.raises(FileNotFoundError):
        treebank.read_brackets(tmp_path / "missing.mrg")


def test_clean_by_hand(trees):
    assert [" ".join(str(tree).split()) for tree in trees] == [
        "(S (NP (DT the) (JJ old) (NN dog)) (VP (VBD slept) (ADVP (RB well)) "
        "(S (VP (TO to) (VP (VB rest))))) (. .))",
        "(S (NP (PRP we)) (VP (VBP see) (NP (NP (DT a) (JJ big) (JJ red) (NN sun)) "
        "(PP (IN in) (NP (NN may)))) (ADVP|PRT (RP up)) (NP (NNP May))) (. .))",
        "(NP (NP (NN rain)) (PRN (-LRB- -LRB-) (NP (DT the) (NN dog)) (-RRB- -RRB-)) (. !))",
        "(FRAG (NN fog))",
    ]
    (chained,) = treebank.parse_brackets("(ROOT (NP-A (NP (NP=1 (NN x)) (X (-NONE- *)))))")
    assert treebank.clean(chained) == Tree("NP", [Tree("NN", ["x"])])
    (two,) = treebank.parse_brackets("( (NP (NN x)) (. .))")
    assert treebank.clean(two) == Tree("TOP", [Tree("NP", [Tree("NN", ["x"])]), Tree(".", ["."])])


def test_collapse_is_nltks_and_is_undone(trees):
    for tree in trees:
        found = treebank.collapse(tree)
        expected = Tree("TOP", [tree.copy(deep=True)])
        expected.collapse_unary(collapsePOS=True, joinChar="+")
        assert found == expected[0]
        assert treebank.expand(found) == tree
        assert treebank.tagged(found) == treebank.tagged(tree) == tree.pos()
    assert treebank.collapse(trees[3]) == Tree("FRAG+NN", ["fog"])


@pytest.mark.parametrize("label", ["A+B", "A^B", "@A"])
def test_labels_with_our_marks_are_refused(label):
    for tree in (Tree(label, [Tree("T", ["w"])]), Tree("S", [Tree(label, ["w"])])):
        with pytest.raises(TreebankError, match=re.escape(repr(label))):
            treebank.collapse(tree)


@pytest.mark.parametrize("direction", ["right", "left"])
@pytest.mark.parametrize("v", [1, 2, 3])
def test_binarise_without_siblings_is_nltks(trees, v, direction):
    for tree in trees:
        found = treebank.binarise(treebank.collapse(tree), 0, v, direction)
        assert found == _as_nltk(tree, v, direction)


@pytest.mark.parametrize("direction", ["right", "left"])
@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize("h", [0, 1, 2, None])
def test_binarise_is_undone(trees, h, v, direction):
    for tree in trees:
        collapsed = treebank.collapse(tree)
        before = collapsed.copy(deep=True)
        binary = treebank.binarise(collapsed, h, v, direction)
        assert {len(node) for node in binary.subtrees() if not treebank.is_tag(node)} <= {2}
        assert binary.leaves() == tree.leaves()
        assert treebank.unbinarise(binary) == collapsed == before


def test_binarise_remembers_siblings_by_hand():
    (tree,) = treebank.parse_brackets("(S (A a) (B b) (C c) (X+VP (D d) (E e) (F f)))")

    def labels(*settings):
        nodes = treebank.binarise(tree, *settings).subtrees(lambda t: not treebank.is_tag(t))
        return [node.label() for node in nodes]

    assert labels(0, 1) == ["S", "@S", "@S", "X+VP", "@VP"]
    assert labels(1, 1) == ["S", "@S|A", "@S|B", "X+VP", "@VP|D"]
    assert labels(2, 1) == ["S", "@S|A", "@S|A_B", "X+VP", "@VP|D"]
    assert labels(1, 2) == ["S", "@S|A", "@S|B", "X+VP^S", "@VP^S|D"]
    assert labels(1, 1, "left") == ["S", "@S|X+VP", "@S|C", "X+VP", "@VP|F"]
    assert labels(None, 1, "left")[2] == "@S|X+VP_C"
    (tree,) = treebank.parse_brackets("(S (A a) (X+VP (D d) (Y+NP (E e) (F f))))")
    assert labels(0, 2) == ["S", "X+VP^S", "Y+NP^VP"]
    assert labels(0, 4) == ["S", "X+VP^S", "Y+NP^VP^S"]


def test_binarise_refuses_what_it_cannot_do(trees):
    for settings in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="must be h >= 0"):
            treebank.binarise(trees[0], *settings)
    with pytest.raises(TreebankError, match="collapse"):
        treebank.binarise(trees[0])


@pytest.mark.parametrize("v", [1, 2])
def test_induced_probabilities_are_those_of_nltk(trees, v):
    induced = treebank.induce(trees, 0, v)
    productions = []
    for tree in trees:
        tree = _as_nltk(tree, v)
        productions.append(
            nltk.Production(nltk.Nonterminal("TOP"), [nltk.Nonterminal(tree.label())])
        )
        for leaf in tree.subtrees(treebank.is_tag):
            leaf[0] = leaf.label().split("+")[-1]
        productions += tree.productions()
    expected = {
        (str(p.lhs()), *map(str, p.rhs())): p.prob()
        for p in nltk.induce_pcfg(nltk.Nonterminal("TOP"), productions).productions()
    }
    g, found = induced.grammar, {}
    for a, b, c in np.argwhere(g.rules):
        found[g.nonterminals[a], g.symbols[b], g.symbols[c]] = g.rules[a, b, c]
    for t, w in np.argwhere(g.emission):
        found[g.preterminals[t], g.vocabulary[w]] = g.emission[t, w]
    for x in np.flatnonzero(g.root):
        found["TOP", g.symbols[x]] = g.root[x]
    assert found == pytest.approx(expected, rel=1e-14)


def test_symbols_are_sorted_and_counted_by_hand(trees):
    induced = treebank.induce(trees)
    assert induced.nonterminals == (
        "NP", "@NP", "@VP", "@S", "S", "VP", "@PRN", "PP", "PRN", "S+VP",
    )  # fmt: skip
    assert [induced.counts[s] for s in induced.nonterminals] == [5, 4, 3, 2, 2, 2, 1, 1, 1, 1]
    assert induced.preterminals[:5] == (".", "DT", "JJ", "NN", "NP+NN")
    assert dict(induced.roots) == {"S": 2, "NP": 1, "FRAG+NN": 1}
    assert induced.vocabulary[:4] == ("NN", ".", "DT", "JJ")
    assert induced.rules["@NP", "JJ", "NN"] == 2
    assert induced.rules["@NP", "JJ", "@NP"] == 1


def test_restricted_grammars_keep_probabilities(trees):
    induced = treebank.induce(trees)
    few = treebank.restrict(induced, 4, 5)
    assert few.nonterminals == induced.nonterminals[:4]
    assert few.preterminals == induced.preterminals[:5]
    assert few.vocabulary == induced.vocabulary
    whole, g = induced.grammar, few.grammar
    kept = [whole.symbols.index(s) for s in g.symbols]
    np.testing.assert_array_equal(g.rules, whole.rules[np.ix_(kept[:4], kept, kept)])
    np.testing.assert_array_equal(g.root, whole.root[kept])
    np.testing.assert_array_equal(g.emission, whole.emission[:5])
    assert g.rules.sum() < 4
    assert treebank.restrict(induced).grammar == whole
    assert treebank.restrict(few, 2).grammar == treebank.restrict(induced, 2, 5).grammar
    for wrong in ({"nonterminals": 0}, {"nonterminals": 11}, {"preterminals": 99}):
        with pytest.raises(ValueError, match="must be from 1 to"):
            treebank.restrict(induced, **wrong)


def test_no_trees_no_grammar():
    with pytest.raises(ValueError, match="0 trees"):
        treebank.induce([])
    with pytest.raises(ValueError, match="1 trees, none with two words"):
        treebank.induce([Tree("NN", ["fog"])])


def test_the_treebank_sample(nltk_data):
    """Sizes for the files to 0149; brackets as nltk reads them; nothing is lost on the way."""
    files = sorted((nltk_data / "corpora" / "treebank" / "combined").glob("wsj_0*.mrg"))[:149]
    raw = treebank.read_brackets(*files)
    read_by_nltk = [t for file in files[:20] for t in Tree.fromstring(f"(ALL {file.read_text()})")]
    assert raw[: len(read_by_nltk)] == read_by_nltk
    trees = [treebank.clean(tree) for tree in raw]
    assert len(trees) == 3253
    found = treebank.induce(trees, 1, 2)
    made = sum(name.startswith("@") for name in found.nonterminals)
    sizes = len(found.nonterminals), made, len(found.preterminals), len(found.rules)
    assert sizes == (1168, 966, 138, 7330)
    assert len(found.vocabulary) == 45
    assert sum(found.tags.values()) == 78375
    assert sum(found.roots.values()) == 3253
    for tree in trees[::50]:
        binary = treebank.binarise(treebank.collapse(tree), 1, 2)
        assert treebank.expand(treebank.unbinarise(binary)) == tree
