"""Named columns of the residual stream, and affine maps written on names.

A `Slot` is a value that tokens carry: a name, a number of columns, the tokens that own it and the
layers between which it is alive. An `Expr` is what a head may read at one token,

    e  =  sum_s M_s slot_s + constant,

written as it stands in a paper: `W0 @ x - y`. Nothing here knows about indices; the compiler asks
`Slot.columns` once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from constructions.core.matrices import Matrix, stack


class Affine:
    """What a head may read: the arithmetic of slots and expressions; every result is an `Expr`.

    `terms` maps each slot that is read to its matrix `[size, slot.size]`; `constant` is a vector
    `[size]`.
    """

    __array_ufunc__ = None  # lets numpy arrays defer `matrix @ slot` and `scalar * slot` to us

    size: int

    @property
    def terms(self) -> dict[Slot, Matrix]:
        """{slot: matrix `[size, slot.size]`}."""
        raise NotImplementedError

    @property
    def constant(self) -> np.ndarray:
        """The part that no slot contributes, `[size]`."""
        raise NotImplementedError

    def matrix(self, width: int) -> np.ndarray:
        """The linear part as a dense `[size, width]` matrix on the residual stream."""
        dense = np.zeros((self.size, width))
        for slot, m in self.terms.items():
            m.add_to(dense[:, slot.columns])
        return dense

    def __rmatmul__(self, matrix: Any) -> Expr:
        matrix = np.asarray(matrix, float)
        if matrix.ndim != 2 or matrix.shape[1] != self.size:
            raise ValueError(
                f"matrix of shape {matrix.shape} cannot act on {self}, which has {self.size} rows"
            )
        terms = {slot: matrix @ m for slot, m in self.terms.items()}
        return Expr(terms, matrix @ self.constant)

    def __add__(self, other: Any) -> Expr:
        if not isinstance(other, Affine):
            other = Expr({}, np.broadcast_to(np.asarray(other, float), (self.size,)))
        if self.size != other.size:
            raise ValueError(
                f"cannot add {self} ({self.size} rows) and {other} ({other.size} rows)"
            )
        terms = dict(self.terms)
        for slot, m in other.terms.items():
            terms[slot] = terms[slot] + m if slot in terms else m
        return Expr(terms, self.constant + other.constant)

    def __mul__(self, scalar: Any) -> Expr:
        if np.ndim(scalar) != 0:
            raise ValueError(f"use matrix @ slot for matrices; * takes a scalar, got {scalar!r}")
        return Expr({slot: scalar * m for slot, m in self.terms.items()}, scalar * self.constant)

    def __getitem__(self, rows: slice) -> Expr:
        return Expr({slot: m[rows] for slot, m in self.terms.items()}, self.constant[rows])

    def __iter__(self) -> Iterator[Expr]:
        raise TypeError("a slot expression cannot be iterated over; take rows with [start:stop]")

    def __neg__(self) -> Expr:
        return self * -1.0

    def __sub__(self, other: Any) -> Expr:
        return self + -1.0 * other

    def __rsub__(self, other: Any) -> Expr:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__


@dataclass(frozen=True)
class Slot(Affine):
    """Named columns of the residual stream.

    Attributes:
        name: unique within a program.
        size: number of columns, at least 1.
        start: first column.
        token_groups: names of those that own the value; None means every token. Slots of
            disjoint token groups may share columns (weights in prefix tokens, say).
        born: 0 if the embedding writes it, else the first layer (counted from 1) that does.
        dies: the last layer that reads it, where erasing is reading; None: it lives to the end.
        accumulates: whether several layers may add to it.
        meaning: what it holds, in the words of the paper.
    """

    name: str
    size: int
    start: int
    token_groups: tuple[str, ...] | None = None
    born: int = 0
    dies: int | None = None
    accumulates: bool = False
    meaning: str = field(default="", compare=False)

    @property
    def terms(self) -> dict[Slot, Matrix]:
        """The slot itself."""
        return {self: Matrix.identity(self.size)}

    @property
    def constant(self) -> np.ndarray:
        """The affine map's constant part, `[size]`: zeros, as a slot is read as it stands."""
        return _nothing(self.size)

    @property
    def columns(self) -> slice:
        """The columns of the stream that hold the value."""
        return slice(self.start, self.start + self.size)

    def lives_with(self, other: Slot) -> bool:
        """Whether some token needs both values at the same layer."""
        end, other_end = (np.inf if s.dies is None else s.dies for s in (self, other))
        # born together they are written together, even if one is only read by the MLP behind
        together = self.born == other.born
        return (together or (self.born < other_end and other.born < end)) and self.meets(other)

    def meets(self, other: Slot) -> bool:
        """Whether some token owns both."""
        if self.token_groups is None or other.token_groups is None:
            return True
        return not set(self.token_groups).isdisjoint(other.token_groups)

    def __str__(self) -> str:
        return f"slot '{self.name}'"


class Expr(Affine):
    """An affine map of several slots, as arithmetic on slots produces it."""

    def __init__(self, terms: dict[Slot, Matrix], constant: np.ndarray) -> None:
        self.size = len(constant)
        self._terms = terms
        self._constant = constant if constant.any() else _nothing(self.size)

    @property
    def terms(self) -> dict[Slot, Matrix]:
        """{slot: matrix `[size, slot.size]`}."""
        return self._terms

    @property
    def constant(self) -> np.ndarray:
        """The part that no slot contributes, `[size]`."""
        return self._constant

    def __str__(self) -> str:
        return "expression of " + (", ".join(s.name for s in self.terms) or "a constant")

    def __repr__(self) -> str:
        return f"<{self}, {self.size} rows>"


def _nothing(size: int) -> np.ndarray:
    """Zeros that take no memory, and cannot be written to."""
    return np.broadcast_to(np.zeros(()), (size,))


def constant(*values: float) -> Expr:
    """The same vector at every token, for example `constant(1.0)` as the key of a copy head."""
    return Expr({}, np.asarray(values, float))


def concatenate(*parts: Affine) -> Expr:
    """Stack expressions row by row."""
    slots = dict.fromkeys(slot for part in parts for slot in part.terms)
    terms = {
        slot: stack([p.terms.get(slot, Matrix((p.size, slot.size))) for p in parts])
        for slot in slots
    }
    return Expr(terms, np.concatenate([part.constant for part in parts]))


class Slots:
    """The layout of a residual stream: adds slots one by one and places them in columns.

    A slot takes the first columns in which it meets no slot that some token needs at the same
    layer (`Slot.lives_with`), so that lifetimes and token groups are what shares the stream.
    """

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}

    def add(
        self,
        name: str,
        size: int,
        *,
        token_groups: str | tuple[str, ...] | None = None,
        born: int = 0,
        dies: int | None = None,
        accumulates: bool = False,
        meaning: str = "",
    ) -> Slot:
        """Reserve `size` columns for a value and return its slot; see `Slot` for the arguments."""
        if name in self._slots:
            raise ValueError(f"slot '{name}' is declared twice")
        if size < 1:
            raise ValueError(f"size of slot '{name}' is {size}, must be at least 1")
        if born < 0 or (dies is not None and dies < born):
            raise ValueError(f"slot '{name}' is born at layer {born} and dies at layer {dies}")
        groups = (token_groups,) if isinstance(token_groups, str) else token_groups
        slot = Slot(name, size, 0, groups, born, dies, accumulates, meaning)
        taken = sorted((s.start, s.start + s.size) for s in self if slot.lives_with(s))
        start = 0
        for low, high in taken:
            if low - start >= size:
                break
            start = max(start, high)
        slot = Slot(name, size, start, groups, born, dies, accumulates, meaning)
        self._slots[name] = slot
        return slot

    def keep(self, slot: Slot) -> Slot:
        """Add a slot that has its columns already, and return it."""
        if slot.name in self._slots:
            raise ValueError(f"slot '{slot.name}' is declared twice")
        self._slots[slot.name] = slot
        return slot

    def __repr__(self) -> str:
        places = (f"{s.name} {s.start}:{s.start + s.size}" for s in self)
        return f"<Slots {', '.join(places)}>"

    def __getitem__(self, name: str) -> Slot:
        return self._slots[name]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def __contains__(self, slot: object) -> bool:
        return isinstance(slot, Slot) and self._slots.get(slot.name) == slot

    @property
    def width(self) -> int:
        """Number of columns in use."""
        return max((s.start + s.size for s in self), default=0)
