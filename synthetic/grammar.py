"""Probabilistic context-free grammars in Chomsky normal form, as arrays with named symbols.

    A -> B C   with probability rules[A, B, C],        A a nonterminal, B and C any symbols
    T -> w     with probability emission[T, w],        T a pre-terminal
    a tree's top symbol is X with probability root[X]

Symbols are the nonterminals, which only branch, then the pre-terminals, which only emit words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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


class GrammarError(ValueError):
    """A grammar that is not one; the message names the symbol, the rule or the line."""
