"""Bracketed trees and the grammars that they give, there and back.

    parse_brackets, read_brackets     ( (S (NP-SBJ-1 (PRP I)) (VP (VBP nod) (NP (-NONE- *T*)))) )
    clean                             (S (NP (PRP I)) (VP (VBP nod)))
    collapse      undone by expand    (S (NP+PRP I) (VP+VBP nod))
    binarise      undone by unbinarise
    induce                            relative frequencies of the rules of binarised trees

The terminals of an induced grammar are part-of-speech tags: a pre-terminal is a chain that ends in
a tag, and emits that tag with probability 1 (`NP+PRP` and `PRP` both emit `PRP`). Trees are
`nltk.Tree` of any depth, whose words sit one each under a tag; no function changes the tree it is
given. A label or a word is a string of one character or more, without NUL; the outermost bracket
of a tree that is not `clean` yet may have an empty label.

For use as a library; `benchmarks/treebank.py` is an example.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from nltk.tree import Tree

from synthetic.files import TextError, line_number, read_text
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sparse import RuleList
from synthetic.grammar.trees import TreebankError, check, fold, is_tag, tag_nodes, unfold

Direction = Literal["right", "left"]

TOPS = ("", "TOP", "ROOT", "S1")
"""Labels of the bracket around a whole tree, which is no constituent."""

CHAIN, PARENT, INTERMEDIATE = "+", "^", "@"
"""Marks in the names of symbols: `S+VP` a unary chain, `NP^S` a parent, `@NP|DT` made here."""


def read_brackets(*paths: str | Path) -> list[Tree]:
    """The trees of files, and of all `*.mrg` files in folders by name, in that order.

    Raises:
        TreebankError: the brackets are malformed (the message names file and line), a file is no
            text (`text_files.decode`), or a folder holds no such file.
        OSError: a file cannot be read.
    """
    trees = []
    for path in map(Path, paths):
        files = sorted(path.glob("*.mrg")) if path.is_dir() else [path]
        if not files:
            raise TreebankError(f"{path} holds no file *.mrg")
        for file in files:
            try:
                text = read_text(file)
            except TextError as error:
                raise TreebankError(str(error)) from None
            trees += parse_brackets(text, str(file))
    return trees


def parse_brackets(text: str, source: str = "text") -> list[Tree]:
    """Trees in Penn format; the outermost bracket of each may have an empty label.

    Labels and words end at brackets and at white space of ASCII: a no-break space, U+0085 or
    U+2028 is part of a word.

    Raises:
        TreebankError: the brackets are malformed; the message names `source` and the line.
    """

    def wrong(position: int, what: str) -> TreebankError:
        return TreebankError(f"{source}:{line_number(text, position)}: {what}")

    trees: list[Tree] = []
    still_open: list[tuple[Tree, int]] = []
    label_may_follow = False
    for match in re.finditer(r"(?a)[()]|[^\s()]+", text):
        token, position = match.group(), match.start()
        if token == "(":
            if label_may_follow and len(still_open) > 1:
                raise wrong(position, "a bracket without a label inside a tree")
            if still_open and any(isinstance(child, str) for child in still_open[-1][0]):
                raise wrong(position, f"{still_open[-1][0].label()!r} holds word and bracket")
            still_open.append((Tree("", []), position))
        elif not still_open:
            raise wrong(position, f"{token!r} outside of brackets")
        elif token == ")":
            tree, _ = still_open.pop()
            if not len(tree):
                raise wrong(position, f"the bracket {tree.label()!r} is empty")
            if still_open:
                still_open[-1][0].append(tree)
            else:
                trees.append(tree)
        elif label_may_follow:
            still_open[-1][0].set_label(token)
        elif len(still_open[-1][0]):
            raise wrong(position, f"{token!r}: a word needs a bracket with a tag of its own")
        else:
            still_open[-1][0].append(token)
        label_may_follow = token == "("
    if still_open:
        raise wrong(still_open[-1][1], "a bracket that is never closed")
    return trees


def tagged(tree: Tree) -> list[tuple[str, str]]:
    """The words of a clean tree with their tags; the tag ends the chain in a collapsed tree."""
    check(tree)
    return [(str(node[0]), node.label().rsplit(CHAIN, 1)[-1]) for node in tag_nodes(tree)]


def clean(tree: Tree) -> Tree | None:
    """Without traces, function tags and indices; None if no word is left.

    Nodes `-NONE-` go, and nodes that this empties. Labels are cut at the first `-` or `=` (`NP-SBJ`
    gives `NP`, `-LRB-` stays). A node over one node of its own label goes. The top bracket goes if
    it holds one tree and is called `TOP` otherwise.

    Raises:
        TreebankError: a node below the top has no label, a node is empty or holds words and nodes.
    """
    check(tree, top=True)

    def kept(node: Tree, children: list[Tree | str | None]) -> Tree | None:
        if is_tag(node):
            return None if node.label() == "-NONE-" else Tree(_bare(node.label()), children)
        left = [child for child in children if isinstance(child, Tree)]
        label = "TOP" if node.label() in TOPS else _bare(node.label())
        if len(left) == 1 and label in ("TOP", left[0].label()):
            return left[0]
        return Tree(label, left) if left else None

    return fold(tree, kept)


def _bare(label: str) -> str:
    found = re.match(r"[^-=]+", label)
    return found.group() if found else label


def collapse(tree: Tree) -> Tree:
    """Unary chains as one node each, `S+VP` or, over a tag, `NP+PRP`.

    Raises:
        TreebankError: a label holds `+` or `^`, or starts with `@`.
    """
    check(tree)
    return _collapse(tree)


def _collapse(tree: Tree) -> Tree:
    def one(node: Tree) -> tuple[list[str], list[Tree | str]]:
        labels = [node.label()]
        while len(node) == 1 and isinstance(node[0], Tree):
            node = cast(Tree, node[0])
            labels.append(node.label())
        for label in labels:
            if CHAIN in label or PARENT in label or label.startswith(INTERMEDIATE):
                raise TreebankError(f"label {label!r}: +, ^ and a leading @ are marks of ours")
        return [CHAIN.join(labels)], list(node)

    return unfold(tree, one)[0]


def expand(tree: Tree) -> Tree:
    """The tree that `collapse` was given."""
    check(tree)
    return unfold(tree, lambda node: (node.label().split(CHAIN), node))[0]


def binarise(tree: Tree, h: int | None = 0, v: int = 1, direction: Direction = "right") -> Tree:
    """At most two children a node, with Markov memory, of a collapsed tree.

    To the right, `A -> c1 c2 c3 c4` becomes

        A -> c1 @A|c1      @A|c1 -> c2 @A|c1_c2      @A|c1_c2 -> c3 c4

    with only the last `h` of the siblings behind the bar (None: all; 0 gives `@A`); to the left,
    the same from `c4` on. With `v` > 1 a branching node's name goes on with those of its v - 1
    nearest ancestors, `A^B^C`, and so do the names of the nodes made from it. Of a chain, only
    the label that branches is remembered below it: the children of `S+VP` know it as `VP`.

    Raises:
        ValueError: `h` is negative, `v` is not positive, or `direction` is another.
        TreebankError: a node has one child; `collapse` first.
    """
    _refuse_settings(h, v, direction)
    check(tree)
    return _binarise(tree, h, v, direction)


def _binarise(tree: Tree, h: int | None, v: int, direction: Direction) -> Tree:
    top = Tree(tree.label(), [])
    waiting: list[tuple[Tree, Tree, tuple[str, ...]]] = [(tree, top, ())]
    while waiting:
        node, made, ancestors = waiting.pop()
        if is_tag(node):
            made.append(node[0])
            continue
        if len(node) == 1:
            raise TreebankError(
                f"{node.label()!r} has one child, must have two or more: collapse it"
            )
        label = node.label().rsplit(CHAIN, 1)[-1]
        intermediate = INTERMEDIATE + PARENT.join((label, *ancestors))
        above = (label, *ancestors)[: v - 1]
        children = []
        for child in node:
            name = child.label() if is_tag(child) else PARENT.join((child.label(), *above))
            children.append(Tree(name, []))
            waiting.append((child, children[-1], above))
        siblings = [child.label() for child in node]
        if direction == "left":
            siblings, children = siblings[::-1], children[::-1]
        # From the innermost pair outwards; node n has generated the first n siblings.
        rest = children[-1]
        for n in reversed(range(len(children) - 1)):
            memory = siblings[:n] if h is None else siblings[max(n - h, 0) : n]
            name = intermediate + "|" * bool(memory) + "_".join(memory)
            pair = [children[n], rest]
            rest = Tree(name, []) if n else made
            rest.extend(pair if direction == "right" else pair[::-1])
    return top


def _refuse_settings(h: int | None, v: int, direction: str) -> None:
    if (h is not None and h < 0) or v < 1 or direction not in ("right", "left"):
        raise ValueError(
            f"h={h}, v={v}, direction={direction!r}: must be h >= 0 or None, v >= 1, "
            "'right' or 'left'"
        )


def unbinarise(tree: Tree) -> Tree:
    """The tree that `binarise` was given, for any settings of it."""
    check(tree)

    def one(node: Tree) -> tuple[list[str], Tree]:
        if is_tag(node):
            return [node.label()], node
        made = node is not tree and node.label().startswith(INTERMEDIATE)
        return [] if made else [node.label().split(PARENT)[0]], node

    return unfold(tree, one)[0]


def chain(symbol: str) -> tuple[str, ...]:
    """The labels that a symbol of an induced grammar stands for, the highest first.

    `S+VP^NP` is `("S", "VP")`; an intermediate symbol is none. A pre-terminal's last is its tag.
    """
    if symbol.startswith(INTERMEDIATE):
        return ()
    return tuple(symbol.split(PARENT)[0].split(CHAIN))


@dataclass(frozen=True)
class Induced:
    """Counts of binarised trees, and the grammar of their relative frequencies.

    Attributes:
        nonterminals, preterminals, vocabulary: names, the most frequent first, then by name.
        counts: how often each symbol stands in the trees, those left out by `restrict` too.
        rules: how often each rule `(A, B, C)` among the symbols does.
        roots: how often each symbol is a tree's root; they sum to the number of trees.
        tags: how often each tag, a word of the vocabulary, does.
    """

    nonterminals: tuple[str, ...]
    preterminals: tuple[str, ...]
    vocabulary: tuple[str, ...]
    counts: Mapping[str, int]
    rules: Mapping[tuple[str, str, str], int]
    roots: Mapping[str, int]
    tags: Mapping[str, int]

    @cached_property
    def grammar(self) -> Grammar:
        """Probabilities `rules[A, B, C] / counts[A]`, dense: 8 |N| (|N| + |P|)^2 bytes."""
        return self.rule_list.grammar()

    @cached_property
    def rule_list(self) -> RuleList:
        """The same by its rules, which `charts.sparse` parses with: for any number of symbols."""
        symbols = {s: n for n, s in enumerate(self.nonterminals + self.preterminals)}
        words = {word: n for n, word in enumerate(self.vocabulary)}
        root = np.array([self.roots.get(symbol, 0) for symbol in symbols])
        emission = np.zeros((len(self.preterminals), len(words)))
        for n, symbol in enumerate(self.preterminals):
            emission[n, words[symbol.rsplit(CHAIN, 1)[-1]]] = 1.0
        rules = {r: n for r, n in self.rules.items() if symbols.keys() >= {*r}}
        parent, left, right = (
            np.array([[symbols[x] for x in r] for r in rules], int).reshape(-1, 3).T
        )
        return RuleList(
            self.nonterminals,
            self.preterminals,
            self.vocabulary,
            root / sum(self.roots.values()),
            parent,
            left,
            right,
            np.array([n / self.counts[a] for (a, _, _), n in rules.items()]),
            emission,
        )


def induce(
    trees: Iterable[Any], h: int | None = 0, v: int = 1, direction: Direction = "right"
) -> Induced:
    """The grammar of clean trees: collapsed, binarised, counted; no smoothing.

    Raises:
        ValueError: there is no tree, or none with two words; or as in `binarise`.
        TreebankError: a tree is none (None of `clean`, a node without children, a label or word
            that is empty); as in `collapse`.
    """
    if isinstance(trees, Tree):
        raise TreebankError("trees is one Tree, must be a list of them")
    _refuse_settings(h, v, direction)
    counts, rules, roots, tags = Counter(), Counter(), Counter(), Counter()
    leaves: set[str] = set()
    for number, tree in enumerate(trees):
        check(tree, f"tree {number}")
        nodes = [_binarise(_collapse(tree), h, v, direction)]
        roots[nodes[0].label()] += 1
        while nodes:
            node = nodes.pop()
            counts[node.label()] += 1
            if is_tag(node):
                leaves.add(node.label())
                tags[node.label().rsplit(CHAIN, 1)[-1]] += 1
            else:
                rules[(node.label(), *(child.label() for child in node))] += 1
                nodes.extend(node)
    if not rules:
        raise ValueError(f"{sum(roots.values())} trees, none with two words")

    def order(names: Iterable[str], by: Mapping[str, int]) -> tuple[str, ...]:
        return tuple(sorted(names, key=lambda name: (-by[name], name)))

    return Induced(
        order({a for a, _, _ in rules}, counts),
        order(leaves, counts),
        order(tags, tags),
        counts=counts,
        rules=rules,
        roots=roots,
        tags=tags,
    )


def restrict(
    induced: Induced, nonterminals: int | None = None, preterminals: int | None = None
) -> Induced:
    """Only the most frequent symbols, and the rules among them, at their old probabilities.

    The grammar is improper on purpose: what is lost is the mass of the rules left out, so that
    marginals are still a conditional distribution over the trees that remain. The vocabulary
    stays; a tag may have no pre-terminal left, which gives its sentences probability zero.

    Raises:
        ValueError: a number is not positive, or greater than that of the symbols there are.
    """
    kept = {}
    for name, number in (("nonterminals", nonterminals), ("preterminals", preterminals)):
        have = getattr(induced, name)
        if number is not None and not 1 <= number <= len(have):
            raise ValueError(f"{name} is {number}, must be from 1 to {len(have)}")
        kept[name] = have[:number]
    symbols = {*kept["nonterminals"], *kept["preterminals"]}
    rules = {rule: n for rule, n in induced.rules.items() if symbols.issuperset(rule)}
    return replace(induced, **kept, rules=rules)
