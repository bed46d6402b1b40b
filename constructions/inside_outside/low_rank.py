"""Fewer heads for the spans of a grammar: a low-rank projection of their inside vectors.

A span of two words or more is known to the rest of its sentence by its inside vector beta [N]
alone, and what the rest asks of it is its outside vector alpha [N]. A projection of rank r,

    Pi = decode encode,        encode [r, N],  decode [N, r],

after every beta lets r numbers pass instead of N. With D = decode for nonterminals and the
identity for pre-terminals, which are untouched, the program runs as before on

    rules'[x, y, z]  =  sum_ABC encode[x, A] rules[A, B, C] D[B, y] D[C, z]
    root'            =  D^T root

whose inside and outside vectors are encode beta and decode^T alpha. Numbers in them may be
negative, and so may Z: such a sentence has no parse.

Which projection: the balanced truncation (Moore 1981) of spans in training sentences. With
m = alpha . beta / Z, the probability that a span is a constituent,

    B = sum m b b^T,     A = sum m a a^T,      b = beta / |beta|,  a = alpha / |alpha|
    encode = U^T B^-1/2,   decode = B^1/2 U,   U the r leading eigenvectors of B^1/2 A B^1/2

The projection is ours; Zhao et al. (arXiv 2303.08117) have low-rank maps of another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Array, Float

#: Training sentences whose spans are looked at in one go.
AT_A_TIME = 64


@dataclass(frozen=True, eq=False)
class LowRank:
    """A projection `decode @ encode` of inside vectors. Equal if its arrays are; hashable.

    Attributes:
        encode: `[rank, nonterminals]`.
        decode: `[nonterminals, rank]`.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
    """

    encode: np.ndarray
    decode: np.ndarray

    def __post_init__(self) -> None:
        for name in ("encode", "decode"):
            array = np.array(getattr(self, name), np.float64)
            if array.ndim != 2 or not array.size or not np.isfinite(array).all():
                raise ValueError(f"{name} has shape {array.shape}, must be a matrix, finite")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.decode.shape != self.encode.shape[::-1]:
            raise ValueError(
                f"decode has shape {self.decode.shape}, must be {self.encode.shape[::-1]}, "
                "that of encode turned"
            )

    @property
    def rank(self) -> int:
        """Numbers that a span passes on."""
        return len(self.encode)

    def first(self, rank: int) -> LowRank:
        """Its first directions alone: of a `balanced_truncation` the one of that rank.

        Raises:
            ValueError: `rank` is not 1 to that of this one.
        """
        _check(rank, self.rank)
        return LowRank(self.encode[:rank], self.decode[:, :rank])

    def root(self, root: np.ndarray) -> np.ndarray:
        """`root'`, `[rank + preterminals]`."""
        return root @ self._children(len(root))

    def rules(self, rules: np.ndarray) -> np.ndarray:
        """`rules'`, `[rank, rank + preterminals, rank + preterminals]`."""
        d = self._children(rules.shape[1])
        return np.einsum("xa,abc,by,cz->xyz", self.encode, rules, d, d, optimize=True)

    def _children(self, symbols: int) -> np.ndarray:
        """D, `[symbols, rank + preterminals]`."""
        labels = len(self.decode)
        children = np.zeros((symbols, symbols - labels + self.rank))
        children[:labels, : self.rank] = self.decode
        children[labels:, self.rank :] = np.eye(symbols - labels)
        return children

    @cached_property
    def products(self) -> np.ndarray:
        """Of every label A the form alpha' -> beta' -> (encode^T alpha')_A (decode beta')_A.

        `[nonterminals, rank, rank]`. Summed over A it is alpha' . beta' if Pi is a projection.
        """
        return np.einsum("xa,ay->axy", self.encode, self.decode)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of nested lists; `from_json` is the inverse."""
        return {"encode": self.encode.tolist(), "decode": self.decode.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LowRank:
        """The inverse of `to_json`; ValueError for other fields."""
        if set(data) != {"encode", "decode"}:
            raise ValueError(f"reduction has {sorted(data)}, must have decode and encode")
        return cls(*(np.array(data[name], float) for name in ("encode", "decode")))

    @classmethod
    def given(cls, reduction: Any, labels: int) -> LowRank:
        """A reduction of so many nonterminals, or its JSON form; ValueError for anything else."""
        if isinstance(reduction, Mapping):
            reduction = cls.from_json(reduction)
        if not isinstance(reduction, LowRank):
            raise ValueError(
                f"reduction is {reduction!r}, must be a LowRank, its JSON form or None"
            )
        if len(reduction.decode) != labels:
            raise ValueError(
                f"reduction is of {len(reduction.decode)} nonterminals, the grammar has {labels}"
            )
        return reduction

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LowRank):
            return NotImplemented
        return np.array_equal(self.encode, other.encode) and np.array_equal(
            self.decode, other.decode
        )

    def __hash__(self) -> int:
        return hash((self.encode.tobytes(), self.decode.tobytes()))


def balanced_truncation(
    inside: Float[np.ndarray, "spans nonterminals"],
    outside: Float[np.ndarray, "spans nonterminals"],
    mass: Float[np.ndarray, " spans"],
    rank: int,
) -> LowRank:
    """The projection of the equations above.

    Args:
        inside, outside: beta and alpha of every span, each in any unit of its own.
        mass: probability that the span is a constituent; 0 leaves it out.
        rank: 1 to the number of nonterminals.

    Raises:
        ValueError: `rank` is out of range, or no mass is positive.
    """
    size = inside.shape[1]
    _check(rank, size)
    if not (mass > 0).any():
        raise ValueError("mass is 0 everywhere, must be positive for some span")

    def moment(vectors: np.ndarray) -> np.ndarray:
        norm = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = np.divide(vectors, norm, out=np.zeros_like(vectors), where=norm > 0)
        return (unit * mass[:, None]).T @ unit

    values, vectors = np.linalg.eigh(moment(inside))
    values = np.maximum(values, values[-1] * 1e-12)  # directions that no span has
    half = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    leading = np.linalg.eigh(half @ moment(outside) @ half)[1][:, ::-1][:, :rank]
    return LowRank(leading.T @ inverse, half @ leading)


def _check(rank: int, most: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, Integral) or not 1 <= rank <= most:
        raise ValueError(f"rank is {rank}, must be a whole number from 1 to {most}")


def low_rank(
    evaluate: Callable[[np.ndarray, np.ndarray], Mapping[str, Array]],
    tokens: np.ndarray,
    lengths: np.ndarray,
    rank: int,
) -> LowRank:
    """The balanced truncation of the spans of two words or more in some sentences.

    Args:
        evaluate: of an exact construction, from tokens and lengths.
        tokens, lengths: `[batch, time]` and `[batch]`; sentences without a parse are ignored.
        rank: 1 to the number of nonterminals.

    Raises:
        ValueError: `rank` is out of range, or no sentence has a parse with a span.
    """
    spans = []
    for start in range(0, len(tokens), AT_A_TIME):
        # The last batch is filled up with its first sentence, so that all have one shape.
        rows = np.arange(start, start + AT_A_TIME)
        rows = np.where(rows < len(tokens), rows, start)
        found = evaluate(tokens[rows], lengths[rows])
        own = {n: np.asarray(a, float)[: len(tokens) - start] for n, a in found.items()}
        beta, alpha = own["inside"], own["outside"]
        z = (own["leaves"] * own["around"]).sum(-1)[:, 0, None, None]
        mass = (beta * alpha).sum(-1) / np.where(z > 0, z, np.inf)
        spans.append((beta[mass > 0], alpha[mass > 0], mass[mass > 0]))
    if not sum(len(mass) for *_, mass in spans):
        raise ValueError("tokens holds no sentence of two words or more that has a parse")
    inside, outside, mass = (np.concatenate(parts) for parts in zip(*spans, strict=True))
    return balanced_truncation(inside, outside, mass, rank)
