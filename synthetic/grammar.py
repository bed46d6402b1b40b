"""Probabilistic context-free grammars in Chomsky normal form, as arrays with named symbols.

    A -> B C   with probability rules[A, B, C],        A a nonterminal, B and C any symbols
    T -> w     with probability emission[T, w],        T a pre-terminal
    a tree's top symbol is X with probability root[X]

Symbols are the nonterminals, which only branch, then the pre-terminals, which only emit words.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nltk.grammar as nltk
import numpy as np
from jaxtyping import Array, Float
from nltk.tree import Tree

from synthetic import cnf
from synthetic.productions import TOLERANCE, GrammarError, Production, Word, read

# Arrays of a larger grammar are refused by name before they fill the memory.
MAX_BYTES = 4 * 2**30


class SupercriticalWarning(UserWarning):
    """A grammar loses probability to endless trees; charts are right, sampling is refused."""


class Weights(NamedTuple):
    """A grammar as arrays of one dtype, what functions of charts differentiate in.

    Attributes:
        root: `[symbols]`, nonterminals then pre-terminals (trees of one word).
        rules: `[nonterminals, symbols, symbols]`.
        emission: `[preterminals, vocabulary]`.
    """

    root: Float[Array, " symbols"]
    rules: Float[Array, "nonterminals symbols symbols"]
    emission: Float[Array, "preterminals vocabulary"]


@dataclass(frozen=True, eq=False)
class Grammar:
    """A grammar in Chomsky normal form. Equal if all its parts are; hashable.

    Attributes:
        nonterminals, preterminals, vocabulary: names, each unique; the first two are disjoint.
        root: `[symbols]`, symbols being nonterminals, then pre-terminals.
        rules: `[nonterminals, symbols, symbols]`.
        emission: `[preterminals, vocabulary]`.

    Raises:
        GrammarError: names repeat, or an array has another shape or a negative or non-finite entry.
    """

    nonterminals: tuple[str, ...]
    preterminals: tuple[str, ...]
    vocabulary: tuple[str, ...]
    root: np.ndarray
    rules: np.ndarray
    emission: np.ndarray

    def __post_init__(self) -> None:
        for name in ("nonterminals", "preterminals", "vocabulary"):
            names = tuple(getattr(self, name))
            if name == "nonterminals" and not names:
                raise GrammarError(
                    "nonterminals is (), must be at least one: without a rule of two symbols every "
                    "sentence is a single word, and there is nothing to parse"
                )
            if not names or len({*names}) < len(names):
                raise GrammarError(f"{name} is {names!r}, must be different names, at least one")
            object.__setattr__(self, name, names)
        both = {*self.nonterminals} & {*self.preterminals}
        if both:
            raise GrammarError(f"{sorted(both)} are both nonterminals and pre-terminals")
        n, p, v = len(self.nonterminals), len(self.preterminals), len(self.vocabulary)
        for name, shape in (
            ("root", (n + p,)),
            ("rules", (n, n + p, n + p)),
            ("emission", (p, v)),
        ):
            array = np.array(getattr(self, name), np.float64)
            if array.shape != shape:
                raise GrammarError(f"{name} has shape {array.shape}, must be {shape}")
            if not (array >= 0).all() or not np.isfinite(array).all():
                raise GrammarError(f"{name} must be finite and not negative")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Nonterminals, then pre-terminals: the order of `root` and of the children in `rules`."""
        return self.nonterminals + self.preterminals

    def weights(self, dtype: Any = None) -> Weights:
        """The arrays on the device, in JAX's default float unless said otherwise."""
        dtype = jnp.result_type(float) if dtype is None else dtype
        return Weights(*(jnp.asarray(a, dtype) for a in (self.root, self.rules, self.emission)))

    def encode(self, sentences: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Words as numbers: tokens `[batch, time]` int32, padded with 0, and lengths `[batch]`.

        Raises:
            ValueError: a sentence is empty, or has a word that is not in the vocabulary.
        """
        index = {word: n for n, word in enumerate(self.vocabulary)}
        lengths = np.array([len(s) for s in sentences], np.int32)
        tokens = np.zeros((len(sentences), max(lengths, default=0)), np.int32)
        for row, sentence in enumerate(sentences):
            if isinstance(sentence, str) or not len(sentence):
                raise ValueError(f"sentence {row} is {sentence!r}, must be a list of words")
            for column, word in enumerate(sentence):
                if word not in index:
                    raise ValueError(f"sentence {row}: {word!r} is not in the vocabulary")
                tokens[row, column] = index[word]
        return tokens, lengths

    def decode(self, tokens: np.ndarray | Array, lengths: np.ndarray | Array) -> list[list[str]]:
        """The words of tokens `[batch, time]` up to `lengths` `[batch]`; undoes `encode`."""
        rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
        return [[self.vocabulary[word] for word in row[:length]] for row, length in rows]

    @classmethod
    def from_rules(
        cls,
        root: Mapping[str, float],
        rules: Mapping[str, Mapping[tuple[str, str], float]],
        emission: Mapping[str, Mapping[str, float]],
        vocabulary: Sequence[str] | None = None,
    ) -> Grammar:
        """From probabilities by name; symbols in the order of `rules` and `emission`.

        Args:
            vocabulary: in this order; else the words of `emission`, sorted.

        Raises:
            GrammarError: no rules or no words, a name that is not there, arrays above 4 GiB.
        """
        if vocabulary is None:
            vocabulary = sorted({word for own in emission.values() for word in own})
        symbol = {name: number for number, name in enumerate([*rules, *emission])}
        word = {name: number for number, name in enumerate(vocabulary)}
        n, s = len(rules), len(symbol)
        if 8 * n * s * s > MAX_BYTES:
            raise GrammarError(
                f"{n} nonterminals and {len(emission)} pre-terminals take "
                f"{8 * n * s * s / 2**30:.3g} GiB as an array of rules, "
                f"must take at most {MAX_BYTES / 2**30:.3g} GiB (clean=True, longest=2 keeps short "
                "rules alone)"
            )
        arrays = np.zeros(s), np.zeros((n, s, s)), np.zeros((len(emission), len(word)))
        try:
            for a, p in root.items():
                arrays[0][symbol[a]] = p
            for number, own in enumerate(rules.values()):
                for (b, c), p in own.items():
                    arrays[1][number, symbol[b], symbol[c]] = p
            for number, own in enumerate(emission.values()):
                for w, p in own.items():
                    arrays[2][number, word[w]] = p
        except KeyError as error:
            raise GrammarError(f"{error.args[0]!r} is in a rule but is no symbol or word") from None
        return cls(tuple(rules), tuple(emission), tuple(vocabulary), *arrays)

    @classmethod
    def from_productions(
        cls,
        start: str,
        productions: Iterable[Production],
        *,
        clean: bool = False,
        longest: int | None = None,
        name: str = "grammar",
    ) -> Grammar:
        """The normal form (`synthetic.cnf`) of any rules, checked.

        Args:
            longest: leave out rules of more symbols and words, before `clean`, where the normal
                form of all has too many symbols.
            clean: remove symbols that are not reached from the start or derive no words, and
                rescale the rules left; else such symbols are errors.
            name: what messages call the grammar.

        Raises:
            GrammarError: as `cnf.convert` and `from_rules` do.
        """
        if longest is not None:
            productions = [rule for rule in productions if len(rule.right) <= longest]
        form = cnf.convert(start, productions, clean=clean, name=name)
        try:
            grammar = cls.from_rules(form.root, form.rules, form.emission)
        except GrammarError as error:
            raise GrammarError(f"{name}: {error}") from None
        grammar.check()
        return grammar

    @classmethod
    def from_nltk(cls, grammar: nltk.PCFG, *, clean: bool = False) -> Grammar:
        """From NLTK's, any without empty rules and unary cycles; `to_nltk` of it and back is equal.

        Raises:
            GrammarError: as `from_productions` does.
        """
        productions = [
            Production(
                str(rule.lhs().symbol()),
                tuple(str(x.symbol()) if nltk.is_nonterminal(x) else Word(x) for x in rule.rhs()),
                rule.prob(),
            )
            for rule in grammar.productions()
        ]
        return cls.from_productions(str(grammar.start().symbol()), productions, clean=clean)

    @classmethod
    def from_text(
        cls, text: str, *, clean: bool = False, longest: int | None = None, name: str = "grammar"
    ) -> Grammar:
        """From NLTK's notation (`synthetic.productions`), with probabilities or, uniform, without.

        Raises:
            GrammarError: the text is not in the notation, with its line; as `from_productions`.
        """
        start, productions = read(text, name)
        return cls.from_productions(start, productions, clean=clean, longest=longest, name=name)

    @classmethod
    def from_file(
        cls, path: str | Path, *, clean: bool = False, longest: int | None = None
    ) -> Grammar:
        """`from_text` of a file in UTF-8 or else Latin-1; messages name the file.

        Raises:
            OSError: the file cannot be read.
            GrammarError: as `from_text` does.
        """
        data = Path(path).read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        return cls.from_text(text, clean=clean, longest=longest, name=str(path))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Grammar:
        """From what `to_json` gave.

        Raises:
            GrammarError: a field is missing or is not as `to_json` writes it.
        """
        field = ""
        try:
            field = "vocabulary"
            vocabulary = [str(word) for word in data[field]]
            field = "root"
            root = {a: float(p) for a, p in data[field].items()}
            field = "rules"
            rules = {a: {(b, c): float(p) for b, c, p in own} for a, own in data[field].items()}
            field = "emission"
            emission = {t: {w: float(p) for w, p in own.items()} for t, own in data[field].items()}
        except KeyError:
            raise GrammarError(f"JSON of a grammar lacks {field!r}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise GrammarError(f"JSON of a grammar: {field!r} cannot be read: {error}") from None
        return cls.from_rules(root, rules, emission, vocabulary)

    def to_json(self) -> dict[str, Any]:
        """Probabilities by name, exactly: `vocabulary` is a list of words and

        `root {symbol: p}`, `rules {A: [[B, C, p], ..]}`, `emission {T: {word: p}}`; zeros left out.
        """
        form = self._by_name()
        return {
            "vocabulary": list(self.vocabulary),
            "root": form.root,
            "rules": {a: [[b, c, p] for (b, c), p in own.items()] for a, own in form.rules.items()},
            "emission": form.emission,
        }

    def to_nltk(self) -> nltk.PCFG:
        """For NLTK. Unless one symbol has all of `root`, a start symbol `@root` spells it out.

        Raises:
            GrammarError: probabilities do not sum to 1.
        """
        self.refuse_improper()
        form = self._by_name()
        symbol = {name: nltk.Nonterminal(name) for name in (*self.symbols, cnf.ROOT)}
        found: list[tuple[str, tuple[Any, ...], float]] = []
        start = next(iter(form.root))
        if len(form.root) > 1:
            start = cnf.ROOT
            found += [(start, (symbol[a],), p) for a, p in form.root.items()]
        for a, own in form.rules.items():
            found += [(a, (symbol[b], symbol[c]), p) for (b, c), p in own.items()]
        for t, own in form.emission.items():
            found += [(t, (w,), p) for w, p in own.items()]
        rules = [nltk.ProbabilisticProduction(symbol[a], r, prob=p) for a, r, p in found]
        return nltk.PCFG(symbol[start], rules)

    @property
    def splits(self) -> tuple[str, ...]:
        """Symbols that had words and branches, and now have the words in their `NAME/lex`."""
        both = (t.removesuffix(cnf.LEXICAL) for t in self.preterminals if t.endswith(cnf.LEXICAL))
        return tuple(name for name in both if name in self.nonterminals)

    def normalise(self, tree: Tree) -> Tree:
        """A tree of the grammar that this one was converted from, as a tree of this one."""
        return cnf.normalise(tree, self.preterminals)

    def restore(self, tree: Tree) -> Tree:
        """A tree of this grammar as a tree of the one it was converted from."""
        return cnf.restore(tree)

    def check(self) -> None:
        """Warn where sentences have no distribution, raise where the grammar is no grammar.

        Raises:
            GrammarError: probabilities of the root or of a symbol do not sum to 1 within 1e-6; a
                symbol is not reached from the root, or derives no words.

        Warns:
            SupercriticalWarning: `spectral_radius` is above 1.
        """
        self.refuse_improper()
        children = self.rules.sum(2) + self.rules.sum(1) > 0
        reached = self.root > 0
        for _ in self.nonterminals:
            reached = reached | reached[: len(self.nonterminals)] @ children
        productive = np.isfinite(self._shortest())
        for fine, what in ((reached, "not reached from the root"), (productive, "without words")):
            if not fine.all():
                names = [name for name, good in zip(self.symbols, fine, strict=True) if not good]
                raise GrammarError(f"symbols {what}: {', '.join(map(repr, names))}")
        if self.spectral_radius > 1 + TOLERANCE:
            warnings.warn(
                f"the matrix of expected children has spectral radius {self.spectral_radius:.4g} "
                "> 1: some derivations never end, so sentences have probability below 1 in all",
                SupercriticalWarning,
                stacklevel=2,
            )

    def refuse_improper(self) -> None:
        """Raise GrammarError where probabilities of the root or a symbol do not sum to 1."""
        rows = np.concatenate([[self.root.sum()], self.rules.sum((1, 2)), self.emission.sum(1)])
        for name, total in zip(("the root", *self.symbols), rows, strict=True):
            if abs(total - 1) > TOLERANCE:
                raise GrammarError(f"probabilities of {name} sum to {total:.9g}, must sum to 1")

    def _shortest(self) -> np.ndarray:
        """Words of the shortest string of each symbol, inf if there is none."""
        best = np.full(len(self.symbols), np.inf)
        best[len(self.nonterminals) :][self.emission.any(1)] = 1
        a, b, c = self.rules.nonzero()
        for _ in self.nonterminals:
            before = best.copy()
            np.minimum.at(best, a, before[b] + before[c])
            if (best == before).all():
                break
        return best

    @cached_property
    def expected_children(self) -> np.ndarray:
        """`M[A, X] = sum_C rules[A, X, C] + rules[A, C, X]`, `[nonterminals, symbols]`."""
        return self.rules.sum(2) + self.rules.sum(1)

    @cached_property
    def spectral_radius(self) -> float:
        """Of `M` among nonterminals: below 1 lengths have a mean, above 1 some trees never end."""
        n = len(self.nonterminals)
        return float(np.abs(np.linalg.eigvals(self.expected_children[:, :n])).max())

    @cached_property
    def expected_length(self) -> float:
        """Mean words of a sentence, `root . (e, 1)`, `(I - M_NN) e = M_NP 1`; inf if critical."""
        if self.spectral_radius >= 1:
            return float("inf")
        n = len(self.nonterminals)
        m = self.expected_children
        e = np.linalg.solve(np.eye(n) - m[:, :n], m[:, n:].sum(1))
        return float(self.root @ np.concatenate([e, np.ones(len(self.preterminals))]))

    def length_probabilities(self, max_length: int) -> np.ndarray:
        """`P(length = n)` at index n, `[max_length + 1]` float64.

            f_A(n) = sum_{m, B, C} rules[A, B, C] f_B(m) f_C(n - m),   f_T(1) = sum_w emission[T, w]

        Raises:
            ValueError: `max_length` is below 1.
        """
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, must be at least 1")
        n, s = len(self.nonterminals), len(self.symbols)
        f = np.zeros((max_length + 1, s))
        f[1, n:] = self.emission.sum(1)
        flat = self.rules.reshape(n, s * s)
        for length in range(2, max_length + 1):
            f[length, :n] = flat @ (f[1:length].T @ f[length - 1 : 0 : -1]).ravel()
        return f @ self.root

    @classmethod
    def random(
        cls,
        key: Array | int,
        nonterminals: int,
        preterminals: int,
        vocabulary: int,
        *,
        subcritical: float | int | None = 0.9,
        density: float | int = 1.0,
        concentration: float | int = 1.0,
    ) -> Grammar:
        """Rules of each symbol from a symmetric Dirichlet distribution; the root a nonterminal.

        Args:
            key: a key of JAX, or a seed.
            nonterminals, preterminals, vocabulary: how many of each.
            subcritical: rules with k nonterminal children are scaled by theta^k, theta such that
                `spectral_radius` is this; `None` leaves them as drawn, which is mostly above 1.
            density: share of the possible rules and emissions that are kept, besides a few that
                make every symbol and word reachable and every symbol derive words.
            concentration: of the Dirichlet distribution; small ones give a few probable rules.

        Raises:
            ValueError: a count below 1, `subcritical` or `density` outside of (0, 1], or
                `concentration` not positive.
        """
        for name in ("nonterminals", "preterminals", "vocabulary"):
            if (count := locals()[name]) < 1:
                raise ValueError(f"{name} is {count}, must be at least 1")
        for name in ("subcritical", "density"):
            if (share := locals()[name]) is not None and not 0 < share <= 1:
                raise ValueError(f"{name} is {share}, must be above 0 and at most 1")
        if not concentration > 0:
            raise ValueError(f"concentration is {concentration}, must be positive")
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
        grammar = cls(
            _numbered("N", n),
            _numbered("P", p),
            _numbered("w", v),
            np.concatenate([root / root.sum(), np.zeros(p)]),
            rules / rules.sum((1, 2), keepdims=True),
            emission / emission.sum(1, keepdims=True),
        )
        return grammar

    def _by_name(self) -> cnf.NormalForm:
        form = cnf.NormalForm(
            {self.symbols[x]: float(self.root[x]) for x in self.root.nonzero()[0]}
        )
        form.rules = {a: {} for a in self.nonterminals}
        for a, b, c in np.argwhere(self.rules):
            pair = self.symbols[b], self.symbols[c]
            form.rules[self.nonterminals[a]][pair] = float(self.rules[a, b, c])
        form.emission = {t: {} for t in self.preterminals}
        for t, w in np.argwhere(self.emission):
            p = float(self.emission[t, w])
            form.emission[self.preterminals[t]][self.vocabulary[w]] = p
        return form

    @cached_property
    def _digest(self) -> bytes:
        names = repr((self.nonterminals, self.preterminals, self.vocabulary)).encode()
        arrays = (a.tobytes() for a in (self.root, self.rules, self.emission))
        return sha256(b"".join((names, *arrays))).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grammar) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return (
            f"Grammar({len(self.nonterminals)} nonterminals, {len(self.preterminals)} "
            f"pre-terminals, {len(self.vocabulary)} words)"
        )


def _numbered(letter: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letter}{number:0{len(str(count - 1))}}" for number in range(count))


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
