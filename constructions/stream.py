"""The residual stream of the slot-wise evaluator: blocks of columns at the tokens of one kind.

A cell is all tokens of one group, where the groups are known before the program runs, else all
tokens. In each cell the columns are cut where a slot that lives there begins or ends, so that slots
that share columns see the same numbers as in the compiled model, and a slot costs memory only
where it lives. A block that nobody has written yet is left out; it is zero.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

from constructions.program import Program
from constructions.slots import Slot

#: (cell, first column, last column + 1) -> [batch or 1, token of the cell, column]. A batch axis
#: of 1 is a value that all examples have in common.
Blocks = dict[tuple[int, int, int], Array]


@dataclass(frozen=True)
class At:
    """Some tokens, found cell by cell.

    Attributes:
        tokens: their places in the sequence, in the order in which values are read.
        parts: (cell, which of its tokens, where they are found cell by cell).
        order: from cell by cell to the order of `tokens`; None where that is the same.
    """

    tokens: np.ndarray
    parts: tuple[tuple[int, Any, slice], ...]
    order: np.ndarray | None

    def __len__(self) -> int:
        return len(self.tokens)


class Stream:
    """Where everything is in the blocks of a program's stream; holds no values itself."""

    def __init__(
        self, program: Program, groups: np.ndarray | None, tokens: int, batch: int, dtype: DTypeLike
    ) -> None:
        self.batch, self.dtype = batch, dtype
        kinds = np.zeros(tokens, int) if groups is None else groups
        found, firsts = np.unique(kinds, return_index=True)
        found = found[np.argsort(firsts)]  # consecutive groups then cover the tokens in order
        self.cells = [np.flatnonzero(kinds == kind) for kind in found]
        self._cell, self._rank = np.zeros(tokens, int), np.zeros(tokens, int)
        for n, cell in enumerate(self.cells):
            self._cell[cell], self._rank[cell] = n, np.arange(len(cell))
        names = [None if groups is None else program.token_groups[kind] for kind in found]
        self._cuts, self._used = [], []
        for name in names:
            slots = [s for s in program.slots if _lives(s, name)]
            edges = {0, program.slots.width, *(s.start for s in slots)}
            cuts = sorted(edges | {s.start + s.size for s in slots})
            held = np.zeros(program.slots.width + 1, int)
            for slot in slots:
                held[slot.start] += 1
                held[slot.start + slot.size] -= 1
            held = np.cumsum(held)
            self._cuts.append(cuts)
            self._used.append([(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if held[a]])
        self._names = names

    def at(self, tokens: np.ndarray) -> At:
        """These tokens, in this order."""
        cells, ranks = self._cell[tokens], self._rank[tokens]
        order = np.argsort(cells, kind="stable")
        parts, start = [], 0
        for cell in np.unique(cells).tolist():
            inside = ranks[cells == cell]
            where = slice(start, start + len(inside))
            parts.append((cell, index(inside, len(self.cells[cell])), where))
            start = where.stop
        same = (order == np.arange(len(order))).all()
        return At(tokens, tuple(parts), None if same else np.argsort(order))

    def cell_by_cell(self, tokens: np.ndarray) -> np.ndarray:
        """These tokens in the order in which they can be written."""
        return tokens[np.argsort(self._cell[tokens], kind="stable")]

    def read(self, blocks: Blocks, at: At, start: int, stop: int) -> Array:
        """Columns start to stop of these tokens, `[batch or 1, token, column]`."""
        parts = []
        for cell, inside, _ in at.parts:
            value = self._columns(blocks, cell, start, stop)
            parts.append(value if _all(inside) else value[:, inside])
        value = join(parts, 1)
        return value if at.order is None else value[:, at.order]

    def slot(self, blocks: Blocks, at: At, slot: Slot) -> Array:
        """The value of a slot at these tokens, `[batch or 1, token, slot.size]`."""
        return self.read(blocks, at, slot.start, slot.start + slot.size)

    def add(self, blocks: Blocks, at: At, start: int, update: Array) -> None:
        """Add `[batch or 1, token or 1, column]` to the columns from `start` on, in the dictionary.

        The tokens must stand cell by cell.
        """
        assert at.order is None
        update = update.astype(self.dtype)
        for cell, inside, where in at.parts:
            own = update if update.shape[1] == 1 else part(update, where.start, where.stop, axis=1)
            size = len(self.cells[cell])
            for a, b, low, high in self._segments(cell, start, start + own.shape[-1]):
                new, old = part(own, low - start, high - start), blocks.get((cell, a, b))
                if _all(inside) and (low, high) == (a, b):
                    shape = (len(new), size, b - a)
                    blocks[cell, a, b] = jnp.broadcast_to(new, shape) if old is None else old + new
                    continue
                old = self._zeros(cell, b - a) if old is None else old
                old = jnp.broadcast_to(old, (max(len(old), len(new)), *old.shape[1:]))
                blocks[cell, a, b] = old.at[:, inside, low - a : high - a].add(new)

    def whole(self, blocks: Blocks, slot: Slot) -> Array:
        """A slot at all tokens, `[batch, token, slot.size]`; zero in the cells that have none."""
        start, stop = slot.start, slot.start + slot.size
        value = join(
            [
                self._columns(blocks, n, start, stop) if _lives(slot, name) else zeros
                for n, name in enumerate(self._names)
                for zeros in [self._zeros(n, slot.size)]
            ],
            1,
        )
        order = np.concatenate(self.cells)
        if (np.diff(order) != 1).any():
            value = value[:, np.argsort(order)]
        return jnp.broadcast_to(value, (self.batch, *value.shape[1:]))

    def cut(self, stream: Array) -> Blocks:
        """The blocks of a stream `[batch, token, width]`."""
        blocks: Blocks = {}
        for n, (cell, used) in enumerate(zip(self.cells, self._used, strict=True)):
            own = stream[:, index(cell, stream.shape[1])]
            blocks |= {(n, a, b): part(own, a, b) for a, b in used}
        return blocks

    def filled(self, blocks: Blocks) -> Blocks:
        """All blocks, each with all examples, so that their shapes never change again."""
        return {
            (n, a, b): jnp.broadcast_to(
                blocks.get((n, a, b), self._zeros(n, b - a)), (self.batch, len(cell), b - a)
            )
            for n, cell in enumerate(self.cells)
            for a, b in self._used[n]
        }

    def _columns(self, blocks: Blocks, cell: int, start: int, stop: int) -> Array:
        parts = []
        for a, b, low, high in self._segments(cell, start, stop):
            block = blocks.get((cell, a, b))
            if block is None:
                parts.append(self._zeros(cell, high - low))
            else:
                parts.append(part(block, low - a, high - a))
        return join(parts, -1)

    def _segments(self, cell: int, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """(first and last column of a block, those of them that are meant)."""
        cuts = self._cuts[cell]
        n, found = bisect_right(cuts, start) - 1, []
        while cuts[n] < stop:
            a, b = cuts[n], cuts[n + 1]
            found.append((a, b, max(a, start), min(b, stop)))
            n += 1
            if n + 1 == len(cuts):
                break
        return found

    def _zeros(self, cell: int, columns: int) -> Array:
        return jnp.zeros((1, len(self.cells[cell]), columns), self.dtype)


def part(value: Array, start: int, stop: int, axis: int = -1) -> Array:
    """A slice along one axis; the value itself where that is all of it."""
    if start == 0 and stop == value.shape[axis]:
        return value
    places = [slice(None)] * value.ndim
    places[axis] = slice(start, stop)
    return value[tuple(places)]


def join(parts: Sequence[Array], axis: int) -> Array:
    """Concatenated along one axis; the others are broadcast."""
    if len(parts) == 1:
        return parts[0]
    axis %= parts[0].ndim
    common = np.broadcast_shapes(*((*p.shape[:axis], 1, *p.shape[axis + 1 :]) for p in parts))
    return jnp.concatenate(
        [jnp.broadcast_to(p, (*common[:axis], p.shape[axis], *common[axis + 1 :])) for p in parts],
        axis,
    )


def _all(inside: Any) -> bool:
    return isinstance(inside, slice) and inside == slice(None)


def _lives(slot: Slot, name: str | None) -> bool:
    return slot.tokens is None or name is None or name in slot.tokens


def index(tokens: np.ndarray, size: int) -> Any:
    """A slice where the tokens are consecutive, which costs no gather; all of them is `[:]`."""
    if len(tokens) and (np.diff(tokens) == 1).all():
        first, last = int(tokens[0]), int(tokens[-1]) + 1
        return slice(None) if (first, last) == (0, size) else slice(first, last)
    return tokens
