"""Rules of probabilistic context-free grammars as they are written, and what is wrong with them.

The notation is NLTK's: a line is `S -> NP VP [0.9] | 'go' [0.1]`, words are quoted, `#` starts
a line of comment, a backslash goes on to the next line, and `%start S` names the start symbol, else
it is the left-hand side of the first rule. Where no rule has a probability, those of one left-hand
side are equally probable.

Symbols and words are strings of one character or more, without NUL; words may hold spaces. Every
rule derives words: `B ->`, which derives nothing, is refused, and so is the word of no letters
`''`, by which some mean the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from synthetic.files import InputError, split_lines

TOLERANCE = 1e-6  # on sums of probabilities, which files give in decimals


class GrammarError(InputError):
    """A grammar that is not one; the message names the symbol, the rule or the line."""


MUST_BE = "must be a string of one character or more, without NUL and lone surrogates"


def is_name(value: object) -> bool:
    """Whether a value may be a word, a symbol or a label.

    That is any string of one character or more that a text file can hold: without NUL, and without
    halves of surrogate pairs. Rules that derive nothing have no counterpart here, so there is no
    word without letters either.
    """
    return isinstance(value, str) and value != "" and not _NO_TEXT.search(value)


def shown(value: object) -> str:
    """A value in a message: itself where that is short, else its type."""
    if isinstance(value, str | bytes | int | float | None):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:50]}.. ({len(text)} characters)"
    return f"of type {type(value).__name__}"


def names(given: object, what: str) -> tuple[str, ...]:
    """Different words or symbols, as a tuple.

    Raises:
        GrammarError: `given` is no collection of names, or one is there twice.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise GrammarError(f"{what} is {shown(given)}, must be different names")
    found = tuple(given)
    for number, name in enumerate(found):
        if not is_name(name):
            raise GrammarError(f"{what}: name {number} is {shown(name)}, {MUST_BE}")
    if repeated := [name for name, count in Counter(found).items() if count > 1]:
        raise GrammarError(f"{what}: {repeated[0]!r} is there twice, must be different names")
    return found


def number(value: object) -> float:
    """A number as a float; ValueError for what is none, or too large for one."""
    if isinstance(value, float):  # at once: the other question takes long
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise ValueError(f"{shown(value)} is no number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{shown(value)} is too large for a float") from None
    except TypeError:
        raise ValueError(f"{shown(value)} is no number") from None


def encoded(sentence: Any, index: Mapping[str, int], name: str = "the sentence") -> list[int]:
    """The numbers of a sentence's words.

    Raises:
        ValueError: it is no list of strings or is empty, or a word is not in the vocabulary.
    """
    is_list = isinstance(sentence, Sequence) and not isinstance(sentence, str | bytes)
    if not is_list and not (isinstance(sentence, np.ndarray) and sentence.ndim == 1):
        raise ValueError(f"{name} is {shown(sentence)}, must be a list of words")
    if not len(sentence):
        raise ValueError(f"{name} is [], must be a list of words, at least one")
    found = []
    for place, word in enumerate(sentence):
        if not isinstance(word, str):
            raise ValueError(f"{name}: word {place} is {shown(word)}, must be a string")
        if word not in index:
            raise ValueError(f"{name}: {shown(word)} is not in the vocabulary")
        found.append(index[word])
    return found


_NO_TEXT = re.compile("[\0\ud800-\udfff]")


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
    """Lines with rules, each with the number of its first; continued ones joined."""
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
    refuse_mark(left)
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
            refuse_mark(symbol)
            right.append(symbol)
        else:
            try:
                probability = float(number)
            except ValueError:
                raise ValueError(f"probability is {number!r}, must be a number") from None
            if not 0 <= probability <= 1:
                raise ValueError(f"probability is {number}, must be from 0 to 1")


def normalised(productions: Iterable[Production], tolerance: float) -> list[Production]:
    """Probabilities of each left-hand side over their sum, where that is nearly 1.

    Sums within `TOLERANCE` stay as they are, and those outside of `tolerance` too: to be refused.
    """
    found = list(productions)
    total: dict[str, float] = {}
    for rule in found:
        total[rule.left] = total.get(rule.left, 0.0) + rule.probability
    return [
        rule._replace(probability=rule.probability / total[rule.left])
        if TOLERANCE < abs(total[rule.left] - 1) <= tolerance
        else rule
        for rule in found
    ]


def refuse_mark(symbol: str) -> None:
    """Raise ValueError for a symbol with a byte-order mark, which files put together may have."""
    if "\ufeff" in symbol:
        raise ValueError(f"{symbol!r} has a byte-order mark, which is for the start of a file")


def within(right: Right, symbols: Collection[str]) -> bool:
    """Whether a right-hand side has only words and some of the symbols."""
    return all(isinstance(x, Word) or x in symbols for x in right)


def collect(
    productions: Iterable[Production], name: str
) -> tuple[dict[str, dict[Right, float]], dict[tuple[str, Right], str]]:
    """Rules by left-hand side without those of probability 0, equal ones added; and their places.

    Raises:
        GrammarError: an empty rule, a symbol or word that is none (`is_name`), a probability that
            is negative or not finite.
    """
    rules: dict[str, dict[Right, float]] = {}
    places: dict[tuple[str, Right], str] = {}
    for production in productions:
        left, right, p, place = production
        if not right:
            raise GrammarError(f"{name}: {place}{left!r} has an empty rule, rules must be of words")
        for x in (left, *right):
            if not is_name(x.text if isinstance(x, Word) else x):
                kind, value = ("word", x.text) if isinstance(x, Word) else ("symbol", x)
                raise GrammarError(
                    f"{name}: {place}{left!r} has a rule with the {kind} {value!r}, {MUST_BE}"
                    + " (rules that derive nothing are not taken)" * (value == "")
                )
        if not 0 <= p < float("inf"):
            raise GrammarError(f"{name}: {production} has probability {p}, must be from 0 to 1")
        into = rules.setdefault(left, {})
        if p > 0:
            into[right] = into.get(right, 0.0) + p
            places.setdefault((left, right), place)
    return rules, places


def is_unary(right: Right) -> bool:
    """Whether a right-hand side is one symbol."""
    return len(right) == 1 and isinstance(right[0], str)


def used_symbols(start: str, rules: Rules) -> set[str]:
    """Symbols that derive words and are reached from `start` through symbols that do."""
    # Each rule counts the symbols of its right-hand side of which it is not yet known; when none
    # is left, its own symbol derives words.
    unknown: list[int] = []
    owner: list[str] = []
    users: dict[str, list[int]] = {}
    waiting: list[str] = []
    for symbol, own in rules.items():
        for right in own:
            for x in (symbols := {x for x in right if isinstance(x, str)}):
                users.setdefault(x, []).append(len(owner))
            if not symbols:
                waiting.append(symbol)
            unknown.append(len(symbols))
            owner.append(symbol)
    productive: set[str] = set()
    while waiting:
        symbol = waiting.pop()
        if symbol not in productive:
            productive.add(symbol)
            for rule in users.get(symbol, ()):
                unknown[rule] -= 1
                if not unknown[rule]:
                    waiting.append(owner[rule])
    reached, waiting = {start}, [start]
    while waiting:
        for right in rules[waiting.pop()]:
            if within(right, productive):
                new = {x for x in right if isinstance(x, str)} - reached
                reached |= new
                waiting += new
    return reached & productive


def refuse_sums(
    rules: Rules, places: Mapping[tuple[str, Right], str], symbols: Iterable[str], name: str
) -> None:
    """Raise GrammarError where the probabilities of one of the symbols do not sum to 1."""
    for left in symbols:
        own = rules[left]
        total = sum(own.values())
        if abs(total - 1) > TOLERANCE:
            place = places.get((left, next(iter(own), ())), "")
            raise GrammarError(
                f"{name}: {place}probabilities of {left!r} sum to {total:.9g}, must sum to 1"
            )


def refuse(
    rules: Rules, places: Mapping[tuple[str, Right], str], used: Collection[str], name: str
) -> None:
    """Raise GrammarError where probabilities do not sum to 1, or symbols lack rules or use."""
    refuse_sums(rules, places, rules, name)
    for left, own in rules.items():
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


def unary_order(rules: Rules, places: Mapping[tuple[str, Right], str], name: str) -> list[str]:
    """The symbols, each behind those that its unary rules lead to.

    Raises:
        GrammarError: unary rules form a cycle: a sentence would have endless trees.
    """
    done: dict[str, None] = {}
    for symbol in rules:
        path: dict[str, None] = {}  # in order, and looked up at once
        waiting = [(symbol, False)]
        while waiting:
            a, leaving = waiting.pop()
            if leaving:
                path.popitem()
                done[a] = None
            elif a in path:
                above = list(path)
                cycle = [*above[above.index(a) :], a]
                place = places.get((a, (cycle[1],)), "")
                raise GrammarError(f"{name}: {place}unary rules in a cycle, {' -> '.join(cycle)}")
            elif a not in done:
                path[a] = None
                waiting.append((a, True))
                waiting += [(str(r[0]), False) for r in reversed([*rules[a]]) if is_unary(r)]
    return list(done)
