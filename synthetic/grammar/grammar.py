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

import jax.numpy as jnp
import nltk.grammar as nltk
import numpy as np
from jaxtyping import Array, Float
from nltk.tree import Tree

from synthetic.files import TextError, read_text
from synthetic.grammar import normal_form as cnf
from synthetic.grammar.parts import (
    MAX_BYTES,
    by_name,
    from_json,
    parts_of,
    productions_of,
    random_parts,
    to_nltk,
)
from synthetic.grammar.productions import (
    TOLERANCE,
    GrammarError,
    Production,
    encoded,
    names,
    read,
    shown,
)

MOST_OPERATIONS = 3e11  # of `length_probabilities`: minutes


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
        nonterminals, preterminals, vocabulary: names, each unique, at least one each; the first
            two are disjoint.
        root: `[symbols]`, symbols being nonterminals, then pre-terminals.
        rules: `[nonterminals, symbols, symbols]`.
        emission: `[preterminals, vocabulary]`.

    Raises:
        GrammarError: names repeat or are none (`productions.is_name`), or an array has another
            shape or a negative or non-finite entry.
    """

    nonterminals: tuple[str, ...]
    preterminals: tuple[str, ...]
    vocabulary: tuple[str, ...]
    root: np.ndarray
    rules: np.ndarray
    emission: np.ndarray

    def __post_init__(self) -> None:
        for name in ("nonterminals", "preterminals", "vocabulary"):
            object.__setattr__(self, name, names(getattr(self, name), name))
            if name == "nonterminals" and not self.nonterminals:
                raise GrammarError(
                    "nonterminals is (), must be at least one: without a rule of two symbols every "
                    "sentence is a single word, and there is nothing to parse"
                )
            if not getattr(self, name):
                raise GrammarError(f"{name} is (), must be different names, at least one")
        both = {*self.nonterminals} & {*self.preterminals}
        if both:
            raise GrammarError(f"{sorted(both)} are both nonterminals and pre-terminals")
        n, p, v = len(self.nonterminals), len(self.preterminals), len(self.vocabulary)
        shapes = {"root": (n + p,), "rules": (n, n + p, n + p), "emission": (p, v)}
        for name, shape in shapes.items():
            given = getattr(self, name)
            if np.iscomplexobj(given):
                raise GrammarError(f"{name} is complex, must be real")
            try:
                array = np.array(given, np.float64)
            except (TypeError, ValueError, OverflowError) as error:
                raise GrammarError(f"{name} must be an array of numbers: {error}") from None
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

    def encode(self, sentences: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Words as numbers: tokens `[batch, time]` int32, padded with 0, and lengths `[batch]`.

        Args:
            sentences: lists of words.

        Raises:
            ValueError: a sentence is no list of strings or is empty, or has a word that is not in
                the vocabulary.
        """
        index = {word: n for n, word in enumerate(self.vocabulary)}
        rows = [encoded(s, index, f"sentence {row}") for row, s in enumerate(sentences)]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), max(lengths, default=0)), np.int32)
        for n, row in enumerate(rows):
            tokens[n, : len(row)] = row
        return tokens, lengths

    def decode(self, tokens: np.ndarray | Array, lengths: np.ndarray | Array) -> list[list[str]]:
        """The words of tokens `[batch, time]` up to `lengths` `[batch]`; undoes `encode`.

        Raises:
            ValueError: a length is not in 0..time, or a token within is no number of a word.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        time, size = tokens.shape[1], len(self.vocabulary)
        if len(lengths) != len(tokens) or not ((lengths >= 0) & (lengths <= time)).all():
            raise ValueError(f"lengths must be {len(tokens)} integers in 0..{time}")
        rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        for n, row in enumerate(rows):
            if not ((row >= 0) & (row < size)).all():
                raise ValueError(f"tokens of sentence {n} must be in 0..{size - 1}")
        return [[self.vocabulary[word] for word in row] for row in rows]

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
        return cls(*parts_of(root, rules, emission, vocabulary))

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
        """The normal form (`synthetic.grammar.normal_form`) of any rules, checked.

        Args:
            longest: leave out rules of more symbols and words, before `clean`, where the normal
                form of all has too many symbols.
            clean: remove symbols that are not reached from the start or derive no words, and
                rescale the rules left; else such symbols are errors. Probabilities as given must
                sum to 1 all the same.
            name: what messages call the grammar.

        Raises:
            GrammarError: as `cnf.convert` and `from_rules` do.
        """
        form = cnf.convert(start, productions, clean=clean, longest=longest, name=name)
        try:
            grammar = cls.from_rules(form.root, form.rules, form.emission)
        except GrammarError as error:
            raise GrammarError(f"{name}: {error}") from None
        grammar.check()
        return grammar

    @classmethod
    def from_nltk(cls, grammar: nltk.CFG, *, clean: bool = False) -> Grammar:
        """From NLTK's, any without empty rules and unary cycles; `to_nltk` of it and back is equal.

        NLTK takes probabilities that sum to 1 within 0.01, such as .333 three times; they are
        divided by their sum, where that is further from 1 than 1e-6.

        Args:
            grammar: an `nltk.PCFG`.
            clean: as in `from_productions`.

        Raises:
            GrammarError: the grammar has no probabilities; as `from_productions` does.
        """
        start, productions = productions_of(grammar)
        return cls.from_productions(start, productions, clean=clean)

    @classmethod
    def from_text(
        cls, text: str, *, clean: bool = False, longest: int | None = None, name: str = "grammar"
    ) -> Grammar:
        """From NLTK's notation (`synthetic.grammar.productions`), with probabilities or, uniform,
        without.

        Raises:
            GrammarError: the text is not in the notation, with its line; as `from_productions`.
        """
        start, productions = read(text, name)
        return cls.from_productions(start, productions, clean=clean, longest=longest, name=name)

    @classmethod
    def from_file(
        cls, path: str | Path, *, clean: bool = False, longest: int | None = None
    ) -> Grammar:
        """`from_text` of a file in UTF-8 or UTF-16 (`text_files.decode`); messages name the file.

        Raises:
            OSError: the file cannot be read.
            GrammarError: the file is no text; as `from_text` does.
        """
        try:
            text = read_text(path)
        except TextError as error:
            raise GrammarError(str(error)) from None
        return cls.from_text(text, clean=clean, longest=longest, name=str(path))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Grammar:
        """From what `to_json` gave.

        Raises:
            GrammarError: a field is missing or is not as `to_json` writes it; as `from_rules`.
        """
        return cls.from_rules(*from_json(data))

    def to_json(self) -> dict[str, Any]:
        """Probabilities by name, exactly: `vocabulary` is a list of words and

        `root {symbol: p}`, `rules {A: [[B, C, p], ..]}`, `emission {T: {word: p}}`; zeros left out.
        """
        form = by_name(self)
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
        return to_nltk(by_name(self), self.symbols)

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
            ValueError: `max_length` is no integer or below 1, or so large that it takes more than
                3e11 operations, (max_length symbols)^2 or so.
        """
        if isinstance(max_length, bool) or not isinstance(max_length, int | np.integer):
            raise ValueError(f"max_length is {shown(max_length)}, must be an integer")
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, must be at least 1")
        n, s = len(self.nonterminals), len(self.symbols)
        operations = float(max_length) ** 2 * s * s + 2.0 * max_length * n * s * s
        if n and (operations > MOST_OPERATIONS or 8 * s * max_length > MAX_BYTES):
            raise ValueError(
                f"max_length is {max_length}: the lengths of {self} up to it take "
                f"{operations:.2g} operations, must take at most {MOST_OPERATIONS:.2g}"
            )
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
            GrammarError: arrays above 4 GiB.
            ValueError: a count below 1, `subcritical` or `density` outside of (0, 1], or
                `concentration` not positive.
        """
        return cls(
            *random_parts(
                key, nonterminals, preterminals, vocabulary, subcritical, density, concentration
            )
        )

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
