"""Rules of probabilistic context-free grammars as they are written, and what is wrong with them.

The notation is NLTK's: a line is `S -> NP VP [0.9] | 'go' [0.1]`, words are quoted, `#` starts
a line of comment, a backslash goes on to the next line, and `%start S` names the start symbol, else
it is the left-hand side of the first rule. Where no rule has a probability, those of one left-hand
side are equally probable.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from synthetic.text_files import split_lines

TOLERANCE = 1e-6  # on sums of probabilities, which files give in decimals


class GrammarError(ValueError):
    """A grammar that is not one; the message names the symbol, the rule or the line."""


class Word(NamedTuple):
    """A word on a right-hand side, where a plain string is a symbol."""

    text: str


class Production(NamedTuple):
    """A rule `left -> right`; `place` is where it stands, for messages."""

    left: str
    right: tuple[str | Word, ...]
    probability: float
    place: str = ""

    def __str__(self) -> str:
        right = " ".join(repr(x.text) if isinstance(x, Word) else x for x in self.right)
        return f"{self.place}{self.left} -> {right}"


Right = tuple[str | Word, ...]
Rules = Mapping[str, Mapping[Right, float]]


_TOKEN = re.compile(r"""\s*(?:('[^']*'|"[^"]*")|\[([^]]*)]|(->|\|)|([^\s'"\[\]|]+))""")


def read(text: str, name: str = "grammar") -> tuple[str, list[Production]]:
    """The start symbol and the rules of a text.

    Raises:
        GrammarError: what is wrong, with `name` and the number of the line.
    """
    start, found, bare = "", [], None
    for number, line in _lines(text):
        place = f"line {number}: "
        if line.startswith("%"):
            directive, *arguments = line.split()
            if directive != "%start" or len(arguments) != 1:
                raise GrammarError(f"{name}: {place}{line!r} is not '%start SYMBOL'")
            start = arguments[0]
            continue
        try:
            for production, has_probability in _read_line(line, place):
                if not has_probability:
                    bare = bare or production
                found.append(production)
        except ValueError as error:
            raise GrammarError(f"{name}: {place}{error}") from None
    if not found:
        raise GrammarError(f"{name}: has no rules")
    if all(p.probability < 0 for p in found):
        found = list({(p.left, p.right): p for p in found}.values())
        counts = Counter(p.left for p in found)
        found = [p._replace(probability=1 / counts[p.left]) for p in found]
    elif bare is not None:
        raise GrammarError(f"{name}: {bare} has no probability, others have")
    return start or found[0].left, found


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that say something, with the number of their first; continued ones joined."""
    joined, first = "", 0
    for number, line in enumerate(split_lines(text), 1):
        line = line.strip()
        if not joined:
            first = number
        if not line or (line.startswith("#") and not joined):
            continue
        if line.endswith("\\"):
            joined += line[:-1] + " "
            continue
        yield first, joined + line
        joined = ""
    if joined:
        yield first, joined


def _read_line(line: str, place: str) -> Iterator[tuple[Production, bool]]:
    """The rules of one line and whether they came with a probability (-1 if they did not)."""
    left, arrow, rest = line.partition("->")
    left = left.strip()
    if not arrow or not left or len(left.split()) > 1 or left[0] in "'\"":
        raise ValueError(f"{line!r} is not 'SYMBOL -> ...'")
    right: list[str | Word] = []
    probability: float | None = None
    position = 0
    rest = rest.strip() + "|"
    while position < len(rest):
        match = _TOKEN.match(rest, position)
        if match is None:
            raise ValueError(f"cannot read {rest[position:-1].strip()!r}")
        position = match.end()
        word, number, mark, symbol = match.groups()
        if mark == "|":
            yield (
                Production(left, tuple(right), -1.0 if probability is None else probability, place),
                probability is not None,
            )
            right, probability = [], None
        elif mark or (probability is not None):
            raise ValueError(f"{(word or number or mark or symbol)!r} is out of place")
        elif word is not None:
            right.append(Word(word[1:-1]))
        elif symbol is not None:
            right.append(symbol)
        else:
            try:
                probability = float(number)
            except ValueError:
                raise ValueError(f"probability is {number!r}, must be a number") from None
            if not 0 <= probability <= 1:
                raise ValueError(f"probability is {number}, must be from 0 to 1")


def within(right: Right, symbols: Collection[str]) -> bool:
    """Whether a right-hand side has only words and some of the symbols."""
    return all(isinstance(x, Word) or x in symbols for x in right)


def collect(
    productions: Iterable[Production], name: str
) -> tuple[dict[str, dict[Right, float]], dict[tuple[str, Right], str]]:
    """Rules by left-hand side without those of probability 0, equal ones added; and their places.

    Raises:
        GrammarError: an empty rule, a probability that is negative or not finite.
    """
    rules: dict[str, dict[Right, float]] = {}
    places: dict[tuple[str, Right], str] = {}
    for production in productions:
        left, right, p, place = production
        if not right:
            raise GrammarError(f"{name}: {place}{left!r} has an empty rule, rules must be of words")
        if not 0 <= p < float("inf"):
            raise GrammarError(f"{name}: {production} has probability {p}, must be from 0 to 1")
        into = rules.setdefault(left, {})
        if p > 0:
            into[right] = into.get(right, 0.0) + p
            places.setdefault((left, right), place)
    return rules, places


def used_symbols(start: str, rules: Rules) -> set[str]:
    """Symbols that derive words and are reached from `start` through symbols that do."""
    productive: set[str] = set()
    while found := {
        symbol
        for symbol, own in rules.items()
        if symbol not in productive and any(within(right, productive) for right in own)
    }:
        productive |= found
    reached, waiting = {start}, [start]
    while waiting:
        for right in rules[waiting.pop()]:
            if within(right, productive):
                new = {x for x in right if isinstance(x, str)} - reached
                reached |= new
                waiting += new
    return reached & productive


def refuse(
    rules: Rules, places: Mapping[tuple[str, Right], str], used: Collection[str], name: str
) -> None:
    """Raise GrammarError where probabilities do not sum to 1, or symbols lack rules or use."""
    for left, own in rules.items():
        total = sum(own.values())
        if abs(total - 1) > TOLERANCE:
            place = places.get((left, next(iter(own), ())), "")
            raise GrammarError(
                f"{name}: {place}probabilities of {left!r} sum to {total:.9g}, must sum to 1"
            )
        for right in own:
            if missing := [x for x in right if isinstance(x, str) and x not in rules]:
                raise GrammarError(
                    f"{name}: {Production(left, right, 0.0, places[left, right])}: {missing[0]!r} "
                    "has no rules (words are quoted)"
                )
    if unused := [symbol for symbol in rules if symbol not in used]:
        place = places[unused[0], next(iter(rules[unused[0]]))]
        shown = ", ".join(map(repr, unused[:10])) + (" .." if len(unused) > 10 else "")
        raise GrammarError(
            f"{name}: {place}{len(unused)} symbols are not reached from the start or derive no "
            f"words: {shown}; clean=True removes them"
        )


def refuse_cycles(rules: Rules, places: Mapping[tuple[str, Right], str], name: str) -> None:
    """Raise GrammarError where unary rules form a cycle: a sentence would have endless trees."""
    unary = {
        left: [r[0] for r in own if len(r) == 1 and isinstance(r[0], str)]
        for left, own in rules.items()
    }
    done: set[str] = set()
    for symbol in rules:
        path: list[str] = []
        waiting = [(symbol, 0)]
        while waiting:
            a, depth = waiting.pop()
            del path[depth:]
            if a in path:
                cycle = [*path[path.index(a) :], a]
                place = places[a, (cycle[1],)]
                raise GrammarError(f"{name}: {place}unary rules in a cycle, {' -> '.join(cycle)}")
            if a not in done:
                path.append(a)
                done.add(a)
                waiting += [(b, depth + 1) for b in unary[a]]
