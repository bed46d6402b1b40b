"""Affine maps and writes of programs on the stream of the slot-wise evaluator.

Blocks of a matrix that are multiples of the identity become slices: the heads of softmax attention
read and write disjoint slices of a slot by changing its shape. Only dense blocks cost a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.matrices import Block, Matrix
from constructions.slots import Affine, Slot
from constructions.stream import At, Blocks, Stream, join, part

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
