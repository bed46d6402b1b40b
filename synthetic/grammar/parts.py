"""The names and arrays of a `Grammar`, from probabilities by name, from JSON or NLTK, or at random.

`Grammar` has the methods; here are the conversions behind them, there and in the other direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import nltk.grammar as nltk
import numpy as np
from jaxtyping import Array

from synthetic.grammar.productions import (
    GrammarError,
    Production,
    Word,
    names,
    normalised,
    number,
    shown,
)

MAX_BYTES = 4 * 2**30
"""Arrays of a larger grammar are refused by name before they fill the memory."""

ROOT = "@root"  # a start symbol that only spells out a distribution over the symbols at the root

#: Names of nonterminals, pre-terminals and words, then the arrays root, rules and emission.
Parts = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], np.ndarray, np.ndarray, np.ndarray]


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


def parts_of(
    root: Mapping[str, float],
    rules: Mapping[str, Mapping[tuple[str, str], float]],
    emission: Mapping[str, Mapping[str, float]],
    vocabulary: Sequence[str] | None = None,
) -> Parts:
    """The fields of a `Grammar` from probabilities by name; see `Grammar.from_rules`."""
    if vocabulary is None:
        words = dict.fromkeys(word for own in emission.values() for word in own)
        vocabulary = sorted(names(words.keys(), "vocabulary"))
    index = {name: n for n, name in enumerate(names([*rules, *emission], "symbols"))}
    word = {name: n for n, name in enumerate(names(vocabulary, "vocabulary"))}
    n, s = len(rules), len(index)
    refuse_size(n, len(emission), len(word))
    arrays = np.zeros(s), np.zeros((n, s, s)), np.zeros((len(emission), len(word)))
    entry: tuple[str, ...] = ()
    try:
        for a, p in root.items():
            entry = ("root", a)
            arrays[0][index[a]] = number(p)
        for a, own in rules.items():
            for (b, c), p in own.items():
                entry = (a, b, c)
                arrays[1][index[a], index[b], index[c]] = number(p)
        for t, own in emission.items():
            for w, p in own.items():
                entry = (t, w)
                arrays[2][index[t] - n, word[w]] = number(p)
    except KeyError as error:
        raise GrammarError(f"{error.args[0]!r} is in a rule but is no symbol or word") from None
    except ValueError as error:
        raise GrammarError(f"the probability of {entry}: {error}") from None
    return tuple(rules), tuple(emission), tuple(vocabulary), *arrays


def refuse_size(nonterminals: int, preterminals: int, vocabulary: int) -> None:
    """Raise GrammarError for arrays of a grammar that would fill the memory."""
    symbols = nonterminals + preterminals
    size = 8 * (nonterminals * symbols**2 + preterminals * vocabulary)
    if size > MAX_BYTES:
        raise GrammarError(
            f"{nonterminals} nonterminals and {preterminals} pre-terminals take "
            f"{size / 2**30:.3g} GiB as arrays of rules and of {vocabulary} words, must take at "
            f"most {MAX_BYTES / 2**30:.3g} GiB (clean=True, longest=2 keeps short rules alone)"
        )


def from_json(data: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """What `Grammar.to_json` gave as arguments of `Grammar.from_rules`, which has the errors."""
    field = ""

    def items(value: Any, must: str) -> Any:
        if not isinstance(value, Mapping):
            raise GrammarError(f"{field!r} has a value {shown(value)}, must be {must}")
        return value.items()

    def name(symbol: Any) -> str:
        if not isinstance(symbol, str):
            raise ValueError(f"{shown(symbol)} is no name of a symbol")
        return symbol

    try:
        field = "vocabulary"
        vocabulary = names(data[field], field)
        field = "root"
        root = {a: number(p) for a, p in items(data[field], "{symbol: probability}")}
        field, triples = "rules", "{symbol: [[first, second, probability], ..]}"
        rules = {
            a: {(name(b), name(c)): number(p) for b, c, p in own}
            for a, own in items(data[field], triples)
        }
        for a, own in rules.items():
            if len(own) < len(data[field][a]):
                raise ValueError(f"a rule of {a!r} is there twice")
        field = "emission"
        words = "{symbol: {word: probability}}"
        emission = {
            t: {w: number(p) for w, p in items(own, words)} for t, own in items(data[field], words)
        }
    except KeyError:
        raise GrammarError(f"JSON of a grammar lacks {field!r}") from None
    except GrammarError as error:
        raise GrammarError(f"JSON of a grammar: {error}") from None
    except (TypeError, ValueError) as error:
        raise GrammarError(f"JSON of a grammar: {field!r} cannot be read: {error}") from None
    return root, rules, emission, vocabulary


def productions_of(grammar: nltk.CFG) -> tuple[str, list[Production]]:
    """Start symbol and rules of a grammar of NLTK; see `Grammar.from_nltk`."""
    if not isinstance(grammar, nltk.PCFG):
        raise GrammarError(
            f"grammar is a {type(grammar).__name__}, must be an nltk.PCFG (`from_text` takes "
            "rules without probabilities, as equally probable)"
        )
    productions = [
        Production(
            str(rule.lhs().symbol()),
            tuple(str(x.symbol()) if nltk.is_nonterminal(x) else Word(x) for x in rule.rhs()),
            rule.prob(),
        )
        for rule in grammar.productions()
    ]
    productions = normalised(productions, nltk.PCFG.EPSILON)
    return str(grammar.start().symbol()), productions


def to_nltk(form: NormalForm, symbols: Sequence[str]) -> nltk.PCFG:
    """A grammar of NLTK with these rules; see `Grammar.to_nltk`."""
    symbol = {name: nltk.Nonterminal(name) for name in (*symbols, ROOT)}
    found: list[tuple[str, tuple[Any, ...], float]] = []
    start = next(iter(form.root))
    if len(form.root) > 1:
        start = ROOT
        found += [(start, (symbol[a],), p) for a, p in form.root.items()]
    for a, own in form.rules.items():
        found += [(a, (symbol[b], symbol[c]), p) for (b, c), p in own.items()]
    for t, own in form.emission.items():
        found += [(t, (w,), p) for w, p in own.items()]
    rules = [nltk.ProbabilisticProduction(symbol[a], r, prob=p) for a, r, p in found]
    return nltk.PCFG(symbol[start], rules)


def by_name(grammar: Any) -> NormalForm:
    """The probabilities of a `Grammar` by name; zeros are left out."""
    form = NormalForm(
        {grammar.symbols[x]: float(grammar.root[x]) for x in grammar.root.nonzero()[0]}
    )
    form.rules = {a: {} for a in grammar.nonterminals}
    for a, b, c in np.argwhere(grammar.rules):
        pair = grammar.symbols[b], grammar.symbols[c]
        form.rules[grammar.nonterminals[a]][pair] = float(grammar.rules[a, b, c])
    form.emission = {t: {} for t in grammar.preterminals}
    for t, w in np.argwhere(grammar.emission):
        p = float(grammar.emission[t, w])
        form.emission[grammar.preterminals[t]][grammar.vocabulary[w]] = p
    return form


def random_parts(
    key: Array | int,
    nonterminals: int,
    preterminals: int,
    vocabulary: int,
    subcritical: float | int | None,
    density: float | int,
    concentration: float | int,
) -> Parts:
    """The fields of a random grammar; see `Grammar.random`."""
    for name in ("nonterminals", "preterminals", "vocabulary"):
        count = locals()[name]
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            raise ValueError(f"{name} is {shown(count)}, must be an integer")
        if count < 1:
            raise ValueError(f"{name} is {count}, must be at least 1")
    for name in ("subcritical", "density"):
        if (share := locals()[name]) is not None and not 0 < share <= 1:
            raise ValueError(f"{name} is {share}, must be above 0 and at most 1")
    if not concentration > 0:
        raise ValueError(f"concentration is {concentration}, must be positive")
    refuse_size(nonterminals, preterminals, vocabulary)
    seed = key if isinstance(key, int) else np.asarray(jax.random.bits(key, (4,))).tolist()
    draw = np.random.default_rng(seed)
    n, p, v = nonterminals, preterminals, vocabulary
    s = n + p
    keep = draw.random((n, s, s)) < density
    keep[range(n), draw.integers(n, s, n), draw.integers(n, s, n)] = True
    for child in range(1, s):  # each symbol has a parent that comes before it
        keep[draw.integers(min(child, n)), child, draw.integers(n, s)] = True
    emits = draw.random((p, v)) < density
    emits[range(p), draw.integers(v, size=p)] = True
    emits[draw.integers(p, size=v), range(v)] = True
    root = draw.gamma(concentration, size=n) + 1e-3
    rules = keep * (draw.gamma(concentration, size=(n, s, s)) + 1e-12)
    emission = emits * (draw.gamma(concentration, size=(p, v)) + 1e-12)
    if subcritical is not None:
        rules = _scaled_to(rules, subcritical)
    return (
        _numbered("N", n),
        _numbered("P", p),
        _numbered("w", v),
        np.concatenate([root / root.sum(), np.zeros(p)]),
        rules / rules.sum((1, 2), keepdims=True),
        emission / emission.sum(1, keepdims=True),
    )


def _scaled_to(rules: np.ndarray, radius: float) -> np.ndarray:
    """Rules with `theta^k` on those of k nonterminal children, theta found by bisection."""
    n, s, _ = rules.shape
    branches = (np.arange(s) < n).astype(int)
    k = branches[:, None] + branches
    low, high = -60.0, 60.0  # of log theta

    def scaled(log_theta: float) -> np.ndarray:
        tilted = rules * np.exp(k * log_theta)
        return tilted / tilted.sum((1, 2), keepdims=True)

    for _ in range(60):
        middle = (low + high) / 2
        q = scaled(middle)
        m = (q.sum(2) + q.sum(1))[:, :n]
        if np.abs(np.linalg.eigvals(m)).max() < radius:
            low = middle
        else:
            high = middle
    return scaled(low)


def _numbered(letter: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letter}{number:0{len(str(count - 1))}}" for number in range(count))
