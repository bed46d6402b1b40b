"""The residual stream of the slot-wise evaluator, stored sparsely, and affine maps on it.

The compiled model has a dense stream `[batch, token, width]`. Most of it is zero: a slot belongs to
some token groups only. Here the stream is a dictionary of blocks. A *cell* is all tokens of one
group (all tokens, where the groups are known only when the program runs). The columns of each cell
are cut wherever a slot of that group begins or ends, and a block is one such range of columns at
one cell. Slots that share columns therefore see the same numbers as in the compiled model, and a
slot takes memory at its own groups only. A block that is not in the dictionary is zero.

Affine maps read and write these blocks. A block of a matrix that is a multiple of the identity is a
slice of the stream; only dense blocks cost a product.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

from constructions.core.matrices import Block, Matrix
from constructions.core.program import Program
from constructions.core.slots import Affine, Slot

#: (cell, first column, last column + 1) -> [batch or 1, token of the cell, column]. A batch axis
#: of 1 is a value that all examples have in common.
Blocks = dict[tuple[int, int, int], Array]


@dataclass(frozen=True)
class At:
    """Positions of a sequence, and where the blocks of a `Stream` hold them.

    Values are gathered one cell after the other, then put into the order of `positions`.

    Attributes:
        positions: in the sequence, in the order in which values are wanted.
        parts: for each cell that has some of them: (the cell, which of its tokens they are, the
            slice that they fill when the cells' tokens are concatenated).
        order: `concatenated[order]` is in the order of `positions`; None where it already is.
    """

    positions: np.ndarray
    parts: tuple[tuple[int, Any, slice], ...]
    order: np.ndarray | None

    def __len__(self) -> int:
        return len(self.positions)


class Stream:
    """The index of a program's stream: which block holds which columns of which tokens.

    Holds no values: its methods read and write the `Blocks` that they are given, all of one batch
    and one dtype.

    Args:
        program: its slots.
        groups: the token group of every position, as numbers in `program.token_groups`; None where
            they are not known before the program runs.
        num_tokens: of a sequence.
        batch, dtype: of the values.
    """

    def __init__(
        self,
        program: Program,
        groups: np.ndarray | None,
        num_tokens: int,
        batch: int,
        dtype: DTypeLike,
    ) -> None:
        self.batch, self.dtype = batch, dtype
        kinds = np.zeros(num_tokens, int) if groups is None else groups
        found, firsts = np.unique(kinds, return_index=True)
        found = found[np.argsort(firsts)]  # consecutive groups then cover the tokens in order
        self.cells = [np.flatnonzero(kinds == kind) for kind in found]
        self._cell, self._rank = np.zeros(num_tokens, int), np.zeros(num_tokens, int)
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

    def at(self, positions: np.ndarray) -> At:
        """Where the tokens at these positions are."""
        cells, ranks = self._cell[positions], self._rank[positions]
        order = np.argsort(cells, kind="stable")
        parts, start = [], 0
        for cell in np.unique(cells).tolist():
            inside = ranks[cells == cell]
            where = slice(start, start + len(inside))
            parts.append((cell, index(inside, len(self.cells[cell])), where))
            start = where.stop
        same = (order == np.arange(len(order))).all()
        return At(positions, tuple(parts), None if same else np.argsort(order))

    def cell_by_cell(self, positions: np.ndarray) -> np.ndarray:
        """The same positions sorted by cell, the order in which `add` takes them."""
        return positions[np.argsort(self._cell[positions], kind="stable")]

    def read(self, blocks: Blocks, at: At, start: int, stop: int) -> Array:
        """Columns start to stop of these tokens, `[batch or 1, token, column]`."""
        if not at.parts:  # of a token group that the inputs lack
            return jnp.zeros((1, 0, stop - start), self.dtype)
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
    return slot.token_groups is None or name is None or name in slot.token_groups


def index(tokens: np.ndarray, size: int) -> Any:
    """A slice where the tokens are consecutive, which costs no gather; all of them is `[:]`."""
    if len(tokens) and (np.diff(tokens) == 1).all():
        first, last = int(tokens[0]), int(tokens[-1]) + 1
        return slice(None) if (first, last) == (0, size) else slice(first, last)
    return tokens


#: (first row, `[batch or 1, token or 1, head or 1, row]`): a summand of some rows.
Piece = tuple[int, Array]


def affine(stream: Stream, blocks: Blocks, at: At, parts: Sequence[Affine]) -> Array:
    """The maps of several heads, `[batch or 1, token or 1, head or 1, row]`.

    The token axis is 1 where no slot is read, and the head axis where all maps are the same.
    """
    if all(_same(parts[0], p) for p in parts[1:]):
        parts = parts[:1]
    rows = parts[0].size
    pieces: list[Piece] = []
    for slot in dict.fromkeys(slot for p in parts for slot in p.terms):
        maps = _common([p.terms.get(slot, Matrix((rows, slot.size))) for p in parts])
        heads = _aligned(maps)
        if heads is None and not any(b.is_dense for m in maps for b in m.blocks):
            return join([affine(stream, blocks, at, [p]) for p in parts], 2)
        if heads is None:
            value = stream.slot(blocks, at, slot)
            dense = np.stack([np.asarray(m) for m in maps])
            pieces.append((0, times("bts,nks->btnk", value, dense)))
            continue
        for group in heads:
            if len({b.row for b in group}) > 1:
                return join([affine(stream, blocks, at, [p]) for p in parts], 2)
            pieces.append((group[0].row, _read(stream, blocks, at, slot, group)))
    constants = np.stack([p.constant for p in parts])
    runs = _sums(pieces, rows, constants, stream)
    return join([run for _, run in runs], -1)


def write(
    stream: Stream, blocks: Blocks, at: At, slot: Slot, mixed: Array, maps: Sequence[Matrix]
) -> None:
    """Add sum_n maps[n] mixed[.., n, :] to a slot at these tokens, in the dictionary."""
    heads = len(maps)
    maps = _common(maps)
    if len(maps) == 1 and heads > 1:  # linear: the sum first
        mixed = mixed.sum(2, keepdims=True) * (heads if mixed.shape[2] == 1 else 1)
    mixed = jnp.broadcast_to(mixed, (*mixed.shape[:2], len(maps), mixed.shape[3]))
    groups, pieces = _aligned(maps), []
    if groups is not None:
        for group in groups:
            pieces += _written(mixed, group)
    elif not any(b.is_dense for m in maps for b in m.blocks):
        for n, m in enumerate(maps):
            for block in m.blocks:
                pieces += _written(mixed[:, :, n : n + 1], [block])
    else:
        dense = np.stack([np.asarray(m) for m in maps])
        pieces.append((0, times("bqnv,nsv->bqns", mixed, dense).sum(2, keepdims=True)))
    for start, run in _sums(pieces, slot.size, None, stream):
        stream.add(blocks, at, slot.start + start, run[:, :, 0])


def times(equation: str, a: Array, b: Array | np.ndarray) -> Array:
    """An einsum in the type of the first; an axis of 1 meets any other."""
    return jnp.einsum(equation, a, jnp.asarray(b, a.dtype), precision="highest")


def _read(stream: Stream, blocks: Blocks, at: At, slot: Slot, group: Sequence[Block]) -> Array:
    """One block of each head times the slot, `[batch or 1, token, head or 1, row]`."""

    def columns(start: int, stop: int) -> Array:
        return stream.read(blocks, at, slot.start + start, slot.start + stop)

    first, size = group[0], group[0].shape[1]
    if first.is_dense:
        value = columns(first.column, first.column + size)
        return times("bts,nks->btnk", value, np.stack([b.content for b in group]))
    starts = [b.column for b in group]
    if len(set(starts)) == 1:
        value = columns(starts[0], starts[0] + size)[:, :, None]
    elif _go_on(starts, size):
        value = columns(starts[0], starts[-1] + size)
        value = value.reshape(*value.shape[:2], len(group), size)
    else:
        value = join([columns(start, start + size)[:, :, None] for start in starts], 2)
    return _scaled(value, group)


def _written(mixed: Array, group: Sequence[Block]) -> list[Piece]:
    """One block of each head times its row of `mixed`, summed over heads."""
    first = group[0]
    if not first.is_dense and len({b.column for b in group}) > 1:
        return [
            piece
            for n, block in enumerate(group)
            for piece in _written(mixed[:, :, n : n + 1], [block])
        ]
    value = part(mixed, first.column, first.column + first.shape[1])
    if first.is_dense:
        dense = np.stack([b.content for b in group])
        return [(first.row, times("bqnv,nsv->bqs", value, dense)[:, :, None])]
    value, starts = _scaled(value, group), [b.row for b in group]
    if len(set(starts)) == 1:
        return [(first.row, value.sum(2, keepdims=True) if len(group) > 1 else value)]
    if _go_on(starts, first.shape[0]):
        return [(first.row, value.reshape(*value.shape[:2], 1, -1))]
    return [(start, value[:, :, n : n + 1]) for n, start in enumerate(starts)]


def _scaled(value: Array, group: Sequence[Block]) -> Array:
    factors = np.array([b.content for b in group], float)
    if (factors == 1).all():
        return value
    return value * jnp.asarray(factors[:, None], value.dtype)


def _sums(
    pieces: Sequence[Piece], rows: int, constants: np.ndarray | None, stream: Stream
) -> list[Piece]:
    """Summands by rows, as sums that lie end to end; without constants rows may be left out.

    Constants, `[head or 1, row]`, are added where one of them is not 0.
    """
    spans = [(start, start + piece.shape[-1], piece) for start, piece in pieces]
    edges = sorted({0, rows, *(edge for a, b, _ in spans for edge in (a, b))})
    runs: list[tuple[int, list[Array]]] = []
    last = -1
    for a, b in pairwise(edges):
        inside = [part(p, a - start, b - start) for start, stop, p in spans if start <= a < stop]
        if constants is not None:
            own = constants[:, a:b]
            if own.any() or not inside:
                own = own if own.any() else own[:1]
                inside.append(jnp.asarray(own, stream.dtype)[None, None])
        if not inside:
            continue
        total = inside[0]
        for more in inside[1:]:
            total = total + more
        if last == a:
            runs[-1][1].append(total)
        else:
            runs.append((a, [total]))
        last = b
    return [(start, join(run, -1)) for start, run in runs]


def _aligned(maps: Sequence[Matrix]) -> list[list[Block]] | None:
    """The first blocks of all maps, the second ones, ...; None where they are not of one shape.

    Dense ones must have the same place, multiples of the identity only the same size.
    """
    if len({len(m.blocks) for m in maps}) > 1:
        return None
    groups = [list(group) for group in zip(*(m.blocks for m in maps), strict=True)]
    for group in groups:
        places = {b.place if b.is_dense else (b.shape, False) for b in group}
        if len(places) > 1:
            return None
    return groups


def _common(maps: Sequence[Matrix]) -> Sequence[Matrix]:
    """One of them where all are equal."""
    return maps[:1] if all(maps[0].equals(m) for m in maps[1:]) else maps


def _same(a: Affine, b: Affine) -> bool:
    if a is b:
        return True
    terms, others = a.terms, b.terms
    return (
        terms.keys() == others.keys()
        and all(m.equals(others[slot]) for slot, m in terms.items())
        and np.array_equal(a.constant, b.constant)
    )


def _go_on(starts: Sequence[int], size: int) -> bool:
    """Whether each begins where the one before ends."""
    return all(b - a == size for a, b in pairwise(starts))
