"""Random probabilistic grammars and all derivations of short sentences, in exact fractions.

Unary chains, words inside longer rules, symbols with words and branches, sentences of one word,
lengths without a sentence, probabilities down to 1e-20. Nothing here knows of normal forms.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import inf, log
from typing import Any

import numpy as np
from fuzz.fuzzing import built
from hypothesis import assume
from hypothesis import strategies as st

TIME, MOST = 4, 3000
SYMBOLS, WORDS = ("S", "A", "B", "C"), ("w0", "w1", "w2", "w3")
WEIGHTS = (1.0, 1.0, 0.5, 0.1, 1e-3, 1e-9)
TINY = (1e-15, 1e-20)  # more of these than words have no room in float64's range

#: (symbol, right-hand side of symbols and of ("word",)) -> probability
Rules = dict[tuple[str, tuple[Any, ...]], float]


@dataclass(frozen=True)
class Derivation:
    """One way to derive a sentence: its probability, constituents (first, last, symbol), words."""

    probability: Fraction
    spans: tuple[tuple[int, int, str], ...]
    words: tuple[str, ...]


@dataclass
class Case:
    """A grammar, a sentence, and the places whose words are hidden."""

    rules: Rules
    words: tuple[str, ...]
    hidden: tuple[bool, ...]
    tiny: bool

    def text(self) -> str:
        """In the notation of NLTK."""
        lines = []
        for (left, right), p in self.rules.items():
            items = [x if isinstance(x, str) else repr(x[0]) for x in right]
            lines.append(f"{left} -> {' '.join(items)} [{p!r}]")
        return "\n".join(lines)

    def derivations(self, words: Any = None, hidden: Any = None) -> list[Derivation]:
        """All of them, where a hidden word may be any."""
        words = self.words if words is None else words
        return derive(self.rules, words, self.hidden if hidden is None else hidden)

    def __repr__(self) -> str:
        return f"Case({self.words}, hidden={self.hidden},\n{self.text()})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def derive(rules: Rules, words: Any, hidden: Any) -> list[Derivation]:
    """All derivations of a sentence from S."""
    exact = {rule: Fraction(p) for rule, p in rules.items()}

    @cache
    def symbol(name: str, i: int, j: int) -> list[Derivation]:
        found = []
        for (left, right), p in exact.items():
            if left == name and p:
                for rest in row(right, i, j):
                    spans = ((i, j, name), *rest.spans)
                    found.append(Derivation(p * rest.probability, spans, rest.words))
        assume(len(found) <= MOST)
        return found

    @cache
    def row(right: tuple[Any, ...], i: int, j: int) -> list[Derivation]:
        if j - i + 1 < len(right):
            return []
        if len(right) == 1:
            (item,) = right
            if isinstance(item, str):
                return symbol(item, i, j)
            fits = i == j and (hidden[i] or words[i] == item[0])
            return [Derivation(Fraction(1), (), (item[0],))] if fits else []
        found = []
        for k in range(i, j):
            for a in row(right[:1], i, k):
                for b in row(right[1:], k + 1, j):
                    p = a.probability * b.probability
                    found.append(Derivation(p, a.spans + b.spans, a.words + b.words))
        assume(len(found) <= MOST)
        return found

    return symbol("S", 0, len(words) - 1)


def log_of(x: Fraction) -> float:
    """The logarithm, also where x is no float."""
    return log(x.numerator) - log(x.denominator) if x else -inf


@built
def cases(draw: Any, tiny: bool = True) -> Case:
    """Grammars that are proper, without unary cycles, and of which every symbol is used."""
    symbols = SYMBOLS[: draw(st.integers(1, len(SYMBOLS)))]
    words = [(w,) for w in WORDS[: draw(st.integers(1, len(WORDS)))]]
    weights = WEIGHTS + (TINY if tiny else ())
    given: dict[str, dict[tuple[Any, ...], float]] = {}
    for number, left in enumerate(symbols):
        later, right = symbols[number + 1 :], st.sampled_from([*symbols, *words])
        kinds = [st.tuples(st.sampled_from(words)), st.tuples(right, right)]
        kinds += [st.tuples(st.sampled_from(later))] if later else []
        kinds += [st.tuples(right, right, right)]
        rights = draw(st.lists(st.one_of(kinds), min_size=1, max_size=4, unique=True))
        given[left] = {r: draw(st.sampled_from(weights)) for r in rights}
    rules = _used(given)
    assume("S" in rules)
    flat = {}
    for left, own in rules.items():
        total = sum(own.values())
        flat |= {(left, r): p / total for r, p in own.items()}
    assume(len({x for _, right in flat for x in right if not isinstance(x, str)}) > 0)
    length = draw(st.integers(1, TIME))
    known = sorted({x[0] for _, right in flat for x in right if not isinstance(x, str)})
    sentence = tuple(draw(st.lists(st.sampled_from(known), min_size=length, max_size=length)))
    if draw(st.integers(0, 3)):
        possible = derive(flat, sentence, (True,) * length)
        if possible:
            sentence = draw(st.sampled_from(possible)).words
    hidden = draw(st.one_of(st.just([False] * length),
                            st.lists(st.booleans(), min_size=length, max_size=length)))  # fmt: skip
    return Case(flat, sentence, tuple(hidden), any(w in own.values() for w in TINY
                                                   for own in given.values()))  # fmt: skip


def _used(given: dict[str, dict[tuple[Any, ...], float]]) -> dict[str, dict[tuple, float]]:
    """Rules whose symbols derive words and are reached from S."""
    able: set[str] = set()

    def derives(right: tuple[Any, ...]) -> bool:
        return all(not isinstance(x, str) or x in able for x in right)

    for _ in given:
        able |= {a for a, own in given.items() if any(map(derives, own))}
    kept = {
        a: {r: p for r, p in own.items() if derives(r)} for a, own in given.items() if a in able
    }
    reached = {"S"} & able
    for _ in given:
        reached |= {x for a in reached for r in kept[a] for x in r if isinstance(x, str)}
    return {a: own for a, own in kept.items() if a in reached}


def marginals(found: list[Derivation]) -> dict[tuple[int, int, str], float]:
    """P(constituent | sentence) from its derivations."""
    z = sum((d.probability for d in found), Fraction(0))
    total: Counter = Counter()
    for d in found:
        for span in d.spans:
            total[span] += d.probability
    return {span: float(p / z) for span, p in total.items()}


def posterior(case: Case, place: int, vocabulary: tuple[str, ...]) -> np.ndarray:
    """P(word at a place | all other visible words); NaN where those have probability 0."""
    hidden = tuple(h or t == place for t, h in enumerate(case.hidden))
    by_word: Counter = Counter()
    for d in case.derivations(hidden=hidden):
        by_word[d.words[place]] += d.probability
    z = sum(by_word.values(), Fraction(0))
    return np.array([float(by_word[w] / z) if z else np.nan for w in vocabulary])
