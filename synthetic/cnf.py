"""Chomsky normal form: its rules, and trees of a grammar to and from trees of its normal form.

A probabilistic context-free grammar without empty rules and without cycles of unary rules becomes

    root X,   A -> B C,   T -> w

such that derivations of the two are in bijection and have the same probabilities. Four marks name
the symbols that come in, so that trees are read back by their labels alone:

    A+B+C     a chain of unary rules A -> B -> C, and what C does with its other rules
    NP/lex    the words of a symbol that has both words and branches; `NP` is left the branches
    @B&C&=w   the rest of a longer rule A -> X B C 'w', binarised to the right
    =w        the word w inside a rule of two or more symbols

A symbol A on a right-hand side, or at the root, becomes each chain that starts with A:

    A  ~>  A+..+C        with probability  P(A -> .. -> C) b(C),   b(C) = sum of C's branching rules
    A  ~>  A+..+C/lex    with probability  P(A -> .. -> C) l(C),   l(C) = sum of C's words

and the rules of `A+..+C` are those branching rules of C over b(C), of `A+..+C/lex` its words over
l(C); `/lex` is left out where b(C) = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

from nltk.tree import Tree

from synthetic.productions import (
    GrammarError,
    Production,
    Right,
    Rules,
    Word,
    collect,
    refuse,
    refuse_cycles,
    used_symbols,
    within,
)

CHAIN, LEXICAL, REST, JOIN, WORD = "+", "/lex", "@", "&", "="
ROOT = "@root"  # a start symbol that only spells out a distribution over the symbols at the root


@dataclass
class NormalForm:
    """Rules in Chomsky normal form with their probabilities, by name.

    Attributes:
        root: of each symbol that a tree may start with.
        rules: of each pair of children, by nonterminal.
        emission: of each word, by pre-terminal.
    """

    root: dict[str, float] = field(default_factory=dict)
    rules: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)
    emission: dict[str, dict[str, float]] = field(default_factory=dict)


def convert(
    start: str, productions: Iterable[Production], *, clean: bool = False, name: str = "grammar"
) -> NormalForm:
    """The normal form, symbols in the order of the first rule of the chain's first symbol.

    Args:
        start: the symbol at the root. If it is called `@root` its rules, all unary, are only the
            distribution of the root, and trees do not show it.
        productions: rules; the same rule twice adds up.
        clean: remove symbols that are not reached from `start` or derive no words, and rescale
            the rules that are left so that those of each symbol sum to 1.
        name: what messages call the grammar.

    Raises:
        GrammarError: an empty rule; a probability that is negative or not finite; a symbol
            without rules, that is not reached or derives no words; probabilities of a symbol that
            do not sum to 1 within 1e-6; a cycle of unary rules; a name that bears a mark of the
            conversion where the conversion would set that mark.
    """
    rules, places = collect(productions, name)
    if start not in rules:
        raise GrammarError(f"{name}: the start symbol {start!r} has no rules")
    used = used_symbols(start, rules)
    if clean:
        if start not in used:
            raise GrammarError(f"{name}: the start symbol {start!r} derives no words")
        kept = {
            a: {r: p for r, p in rules[a].items() if within(r, used)} for a in rules if a in used
        }
        rules = {a: {r: p / sum(rs.values()) for r, p in rs.items()} for a, rs in kept.items()}
    else:
        refuse(rules, places, used, name)
    refuse_cycles(rules, places, name)
    return _Conversion(start, rules, name).form


class _Conversion:
    """The work list of `convert`: every symbol of the normal form is made when first met."""

    def __init__(self, start: str, rules: Rules, name: str) -> None:
        self.name, self.given, self.form = name, rules, NormalForm()
        self.branching = {a: _mass(own, lambda right: len(right) > 1) for a, own in rules.items()}
        self.lexical = {a: _mass(own, _is_word) for a, own in rules.items()}
        self.chains = cache(self._chains)
        self.rests: dict[str, Right] = {}
        self.waiting: list[tuple[str, Right, float]] = []  # name -> right with a probability
        starts: Mapping[Right, float] = rules[ROOT] if start == ROOT else {(start,): 1.0}
        for right, probability in starts.items():
            if len(right) != 1 or isinstance(right[0], Word):
                raise GrammarError(f"{name}: rules of {ROOT} must be of one symbol each")
            for x, p in self.options(right[0]).items():
                self.form.root[x] = self.form.root.get(x, 0.0) + probability * p
        while self.waiting:
            self.branch(*self.waiting.pop(0))
        rank = {symbol: number for number, symbol in enumerate(rules)}

        def order(symbol: str) -> int:  # the sort is stable: ties stay in the order of discovery
            first = symbol.split(CHAIN)[0].removesuffix(LEXICAL)
            return rank.get(symbol, rank.get(first, len(rank)))

        self.form.rules = {a: self.form.rules[a] for a in sorted(self.form.rules, key=order)}
        emission = self.form.emission
        self.form.emission = {a: emission[a] for a in sorted(emission, key=order)}

    def _chains(self, symbol: str) -> list[tuple[tuple[str, ...], float]]:
        found: list[tuple[tuple[str, ...], float]] = [((symbol,), 1.0)]
        for right, p in self.given[symbol].items():
            if len(right) == 1 and isinstance(right[0], str):
                found += [((symbol, *chain), p * q) for chain, q in self.chains(right[0])]
        return found

    def options(self, item: str | Word) -> dict[str, float]:
        """What a child of the grammar may be in the normal form, with probabilities."""
        if isinstance(item, Word):
            name = WORD + item.text
            if name not in self.form.emission:
                self.reserve(name, WORD, self.given)
                self.form.emission[name] = {item.text: 1.0}
            return {name: 1.0}
        found: dict[str, float] = {}
        for chain, p in self.chains(item):
            bottom, name = chain[-1], CHAIN.join(chain)
            if len(chain) > 1:
                self.reserve(name, CHAIN, chain)
            branching, lexical = self.branching[bottom], self.lexical[bottom]
            if branching > 0:
                found[name] = p * branching
                if name not in self.form.rules:
                    self.form.rules[name] = {}
                    rules = self.given[bottom].items()
                    self.waiting += [(name, r, q / branching) for r, q in rules if len(r) > 1]
                name += LEXICAL
            if lexical > 0:
                if branching > 0:
                    self.reserve(name, LEXICAL, chain)
                found[name] = p * lexical
                if name not in self.form.emission:
                    self.form.emission[name] = {
                        x.text: q / lexical
                        for (x, *more), q in self.given[bottom].items()
                        if isinstance(x, Word) and not more
                    }
        return found

    def branch(self, name: str, right: Right, probability: float) -> None:
        """Add `name -> right`, the second child standing for all but the first of `right`."""
        seconds = self.options(right[1]) if len(right) == 2 else {self.rest(right[1:]): 1.0}
        into = self.form.rules[name]
        for b, p in self.options(right[0]).items():
            for c, q in seconds.items():
                into[b, c] = into.get((b, c), 0.0) + probability * p * q

    def rest(self, right: Right) -> str:
        """The symbol that stands for `right`, two symbols or more."""
        name = _rest(right)
        if name not in self.rests:
            self.reserve(name, REST, self.given)
            self.rests[name] = right
            self.form.rules[name] = {}
            self.waiting.append((name, right, 1.0))
        if self.rests[name] != right:
            raise GrammarError(f"{self.name}: two ends of rules would both be called {name!r}")
        return name

    def reserve(self, name: str, mark: str, symbols: Iterable[str]) -> None:
        """Refuse to set a mark that a symbol of the grammar already bears."""
        for symbol in symbols:
            bears = symbol.startswith(mark) if mark in (REST, WORD) else mark in symbol
            if (bears and symbol != ROOT) or name in self.given:
                symbol = name if name in self.given else symbol
                raise GrammarError(
                    f"{self.name}: rename the symbol {symbol!r}, {mark!r} marks symbols such as "
                    f"{name!r} of the normal form"
                )


def normalise(tree: Tree, preterminals: Collection[str]) -> Tree:
    """The tree of the normal form, from one of the grammar; `preterminals` of the normal form."""
    chain: list[str] = []
    while True:
        chain.append(tree.label())
        if len(tree) != 1 or not isinstance(tree[0], Tree):
            break
        tree = cast(Tree, tree[0])
    label = CHAIN.join(chain[1:] if chain[0] == ROOT else chain)
    if len(tree) == 1:
        return Tree(label + LEXICAL if label + LEXICAL in preterminals else label, list(tree))
    items = tuple(x.label() if isinstance(x, Tree) else Word(x) for x in tree)
    children = [
        normalise(x, preterminals) if isinstance(x, Tree) else Tree(WORD + x, [x]) for x in tree
    ]
    node = children[-1]
    for position in range(len(children) - 2, 0, -1):
        node = Tree(_rest(items[position:]), [children[position], node])
    return Tree(label, [children[0], node])


def restore(tree: Tree) -> Tree:
    """The tree of the grammar, from one of its normal form: `restore(normalise(t)) == t`."""
    chain = tree.label().removesuffix(LEXICAL).split(CHAIN)
    if not all(chain):  # a symbol such as + itself
        chain = [tree.label()]
    restored = Tree(chain.pop(), [piece for child in tree for piece in _pieces(child)])
    while chain:
        restored = Tree(chain.pop(), [restored])
    return restored


def _pieces(node: Any) -> Iterator[Any]:
    """What stands for `node` in its parent: a rest is its children, `=w` the word itself."""
    if isinstance(node, str):
        yield node
    elif node.label().startswith(REST) and len(node) == 2:
        for child in node:
            yield from _pieces(child)
    elif len(node) == 1 and node.label() == f"{WORD}{node[0]}":
        yield node[0]
    else:
        yield restore(node)


def _rest(right: Sequence[str | Word]) -> str:
    return REST + JOIN.join(WORD + x.text if isinstance(x, Word) else x for x in right)


def _mass(own: Mapping[Right, float], kind: Callable[[Right], bool]) -> float:
    """Of the rules of a kind; exactly 1 if all are, so that normal forms come back as they are."""
    of_kind = [p for right, p in own.items() if kind(right)]
    return 1.0 if len(of_kind) == len(own) else sum(of_kind, 0.0)


def _is_word(right: Right) -> bool:
    return len(right) == 1 and isinstance(right[0], Word)
