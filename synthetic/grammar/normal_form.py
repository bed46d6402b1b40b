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

import math
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from nltk.tree import Tree

from synthetic.grammar.parts import MAX_BYTES, ROOT, NormalForm
from synthetic.grammar.productions import (
    GrammarError,
    Production,
    Right,
    Rules,
    Word,
    collect,
    is_unary,
    refuse,
    refuse_sums,
    unary_order,
    used_symbols,
    within,
)
from synthetic.grammar.trees import check, unfold

CHAIN, LEXICAL, REST, JOIN, WORD = "+", "/lex", "@", "&", "="
# Of n nonterminals the rules alone take 8 n (n + 1)^2 bytes or more.
MOST_NONTERMINALS, MOST_CHAINS = 1000, 2**15
SMALLEST = sys.float_info.min  # smaller ones lose digits, and then all of them


def convert(
    start: str,
    productions: Iterable[Production],
    *,
    clean: bool = False,
    longest: int | None = None,
    name: str = "grammar",
) -> NormalForm:
    """The normal form, symbols in the order of the first rule of the chain's first symbol.

    Args:
        start: the symbol at the root. If it is called `@root` its rules, all unary, are only the
            distribution of the root, and trees do not show it.
        productions: rules; the same rule twice adds up.
        clean: remove symbols that are not reached from `start` or derive no words, and rescale
            the rules that are left so that those of each symbol sum to 1. Those that are given,
            of each symbol that is left, must do so too.
        longest: leave out rules of more symbols and words, before `clean`.
        name: what messages call the grammar.

    Raises:
        GrammarError: an empty rule; a probability that is negative or not finite, or that is below
            2.3e-308 in the normal form, where several multiply; a symbol
            without rules, that is not reached or derives no words; probabilities of a symbol that
            do not sum to 1 within 1e-6; a cycle of unary rules; a name that bears a mark of the
            conversion where the conversion would set that mark; more than 1000 nonterminals, or
            2^15 chains of unary rules from one symbol.
    """
    rules, places = collect(productions, name)
    if start not in rules:
        raise GrammarError(f"{name}: the start symbol {start!r} has no rules")
    given = rules
    if longest is not None:
        rules = {a: {r: p for r, p in own.items() if len(r) <= longest} for a, own in rules.items()}
    used = used_symbols(start, rules)
    if clean:
        if start not in used:
            raise GrammarError(f"{name}: the start symbol {start!r} derives no words")
        refuse_sums(given, places, (a for a in given if a in used), name)
        kept = {
            a: {r: p for r, p in rules[a].items() if within(r, used)} for a in rules if a in used
        }
        rules = {a: {r: p / sum(rs.values()) for r, p in rs.items()} for a, rs in kept.items()}
    else:
        refuse(rules, places, used, name)
    order = unary_order(rules, places, name)
    return _Conversion(start, rules, order, name).form


class _Conversion:
    """The work list of `convert`: every symbol of the normal form is made when first met."""

    def __init__(self, start: str, rules: Rules, order: Iterable[str], name: str) -> None:
        self.name, self.given, self.form = name, rules, NormalForm()
        self.branching = {a: _mass(own, lambda right: len(right) > 1) for a, own in rules.items()}
        self.lexical = {a: _mass(own, _is_word) for a, own in rules.items()}
        # Of each symbol, how many chains from it on end in words or in branches.
        self.ends: dict[str, int] = {}
        for a in order:
            own = (self.branching[a] > 0) + (self.lexical[a] > 0)
            own += sum(self.ends[str(right[0])] for right in rules[a] if is_unary(right))
            self.ends[a] = min(own, MOST_CHAINS + 1)
        self.known: dict[str, dict[str, float]] = {}
        self.rests: dict[str, Right] = {}
        self.waiting: deque[tuple[str, Right, float]] = deque()  # name -> right, a probability
        starts: Mapping[Right, float] = rules[ROOT] if start == ROOT else {(start,): 1.0}
        for right, probability in starts.items():
            if len(right) != 1 or isinstance(right[0], Word):
                raise GrammarError(f"{name}: rules of {ROOT} must be of one symbol each")
            for x, p in self.options(right[0]).items():
                self.form.root[x] = self.form.root.get(x, 0.0) + self.product(x, probability, p)
        while self.waiting:
            self.branch(*self.waiting.popleft())
        rank = {symbol: number for number, symbol in enumerate(rules)}

        def place(symbol: str) -> int:  # the sort is stable: ties stay in the order of discovery
            first = symbol.split(CHAIN)[0].removesuffix(LEXICAL)
            return rank.get(symbol, rank.get(first, len(rank)))

        self.form.rules = {a: self.form.rules[a] for a in sorted(self.form.rules, key=place)}
        emission = self.form.emission
        self.form.emission = {a: emission[a] for a in sorted(emission, key=place)}

    def options(self, item: str | Word) -> dict[str, float]:
        """What a child of the grammar may be in the normal form, with probabilities."""
        if isinstance(item, Word):
            name = WORD + item.text
            if name not in self.form.emission:
                self.reserve(name, WORD, self.given)
                self.form.emission[name] = {item.text: 1.0}
            return {name: 1.0}
        if item in self.known:
            return self.known[item]
        if self.ends[item] > MOST_CHAINS:
            raise GrammarError(
                f"{self.name}: {item!r} stands for more than {MOST_CHAINS} chains of unary rules, "
                "each of which is a symbol of the normal form"
            )
        found = self.known[item] = {}
        path: list[str] = []
        waiting = [(item, 0, 1.0)]
        while waiting:
            bottom, depth, p = waiting.pop()
            path[depth:] = [bottom]
            for x, q in reversed([*self.given[bottom].items()]):
                if is_unary(x):
                    waiting.append((str(x[0]), depth + 1, self.product(bottom, p, q)))
            branching, lexical = self.branching[bottom], self.lexical[bottom]
            if not branching > 0 and not lexical > 0:
                continue
            name = CHAIN.join(path)
            if len(path) > 1:
                self.reserve(name, CHAIN, path)
            if branching > 0:
                found[name] = self.product(name, p, branching)
                if name not in self.form.rules:
                    self.nonterminal(name)
                    rules = self.given[bottom].items()
                    self.waiting += [(name, r, q / branching) for r, q in rules if len(r) > 1]
                name += LEXICAL
            if lexical > 0:
                if branching > 0:
                    self.reserve(name, LEXICAL, path)
                found[name] = self.product(name, p, lexical)
                if name not in self.form.emission:
                    self.form.emission[name] = {
                        x.text: q / lexical
                        for (x, *more), q in self.given[bottom].items()
                        if isinstance(x, Word) and not more
                    }
        return found

    def product(self, what: str, *probabilities: float) -> float:
        """The probability of several choices; refused where a float would not hold its digits."""
        found = math.prod(probabilities)
        if found < SMALLEST and all(probabilities):
            raise GrammarError(
                f"{self.name}: probabilities {', '.join(f'{p:.3g}' for p in probabilities)} of "
                f"{what} multiply to less than {SMALLEST:.3g}, which float64 cannot hold"
            )
        return found

    def nonterminal(self, name: str) -> None:
        """Begin the rules of a symbol, while an array of all could be held."""
        if len(self.form.rules) >= MOST_NONTERMINALS:
            raise GrammarError(
                f"{self.name}: the normal form has more than {MOST_NONTERMINALS} nonterminals, "
                f"whose rules take more than {MAX_BYTES / 2**30:.3g} GiB as an array (clean=True, "
                "longest=2 keeps short rules alone)"
            )
        self.form.rules[name] = {}

    def branch(self, name: str, right: Right, probability: float) -> None:
        """Add `name -> right`, the second child standing for all but the first of `right`."""
        seconds = self.options(right[1]) if len(right) == 2 else {self.rest(right[1:]): 1.0}
        into = self.form.rules[name]
        for b, p in self.options(right[0]).items():
            for c, q in seconds.items():
                into[b, c] = into.get((b, c), 0.0) + self.product(
                    f"{name} -> {b} {c}", probability, p, q
                )

    def rest(self, right: Right) -> str:
        """The symbol that stands for `right`, two symbols or more."""
        name = _rest(right)
        if name not in self.rests:
            self.reserve(name, REST, self.given)
            self.rests[name] = right
            self.nonterminal(name)
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
    """The tree of the normal form, from one of the grammar; `preterminals` of the normal form.

    Raises:
        TreebankError: a label or word that is none (`productions.is_name`), an empty node.
    """
    check(tree, tagged=False)

    def one(seed: Tree | Word | tuple[Tree | Word, ...]) -> tuple[list[str], list[Any]]:
        """Label and children of a node, of a word in a longer rule, or of a rule's rest."""
        if isinstance(seed, Word):
            return [WORD + seed.text], [seed.text]
        if isinstance(seed, Tree):
            chain = [seed.label()]
            while len(seed) == 1 and isinstance(seed[0], Tree):
                seed = cast(Tree, seed[0])
                chain.append(seed.label())
            label = CHAIN.join(chain[1:] if chain[0] == ROOT and len(chain) > 1 else chain)
            if len(seed) == 1:
                return [label + LEXICAL if label + LEXICAL in preterminals else label], list(seed)
            items = [x if isinstance(x, Tree) else Word(x) for x in seed]
        else:
            items = list(seed)
            label = _rest([x.label() if isinstance(x, Tree) else x for x in items])
        return [label], [items[0], items[1] if len(items) == 2 else tuple(items[1:])]

    return unfold(tree, one)[0]


def restore(tree: Tree) -> Tree:
    """The tree of the grammar, from one of its normal form: `restore(normalise(t)) == t`.

    Raises:
        TreebankError: as `normalise`.
    """
    check(tree, tagged=False)

    def one(node: Tree) -> tuple[list[str], Tree]:
        """A rest stands for its children, `=w` for the word, and other nodes for their chains."""
        label = node.label()
        rest = label.startswith(REST) and len(node) == 2
        word = len(node) == 1 and isinstance(node[0], str) and label == f"{WORD}{node[0]}"
        if node is not tree and (rest or word):
            return [], node
        chain = label.removesuffix(LEXICAL).split(CHAIN)
        return (chain if all(chain) else [label]), node  # a symbol such as + itself

    return unfold(tree, one)[0]


def _rest(right: Sequence[str | Word]) -> str:
    return REST + JOIN.join(WORD + x.text if isinstance(x, Word) else x for x in right)


def _mass(own: Mapping[Right, float], kind: Callable[[Right], bool]) -> float:
    """Of the rules of a kind; exactly 1 if all are, so that normal forms come back as they are."""
    of_kind = [p for right, p in own.items() if kind(right)]
    return 1.0 if len(of_kind) == len(own) else sum(of_kind, 0.0)


def _is_word(right: Right) -> bool:
    return len(right) == 1 and isinstance(right[0], Word)
