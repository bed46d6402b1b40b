"""What a program uses: a walk from its end to its beginning, through slots, heads and edges.

A slot is used if a part that is used reads it, a part is used if it writes a slot that is used
behind it. The walk does not look at numbers, so "not used" is certain, and "used" says that there
is a path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slot

Live = set[tuple[Slot, int]]
#: Of an edge's end: (layer from 0, head in the order of the program), `MLP` or `READ_OUT`.
End = tuple[int, int]
MLP, READ_OUT = -1, -2


class Reach(NamedTuple):
    """Tokens at which a head acts and somebody uses it, and those that it looks at from there."""

    queries: list[int]
    keys: list[int]


class Walk(NamedTuple):
    """What is used.

    Attributes:
        states: for 0..depth layers applied, the (slot, token) that are used from there on.
        heads: for every layer and each of its `single_heads`, where it is used; None: nowhere.
        mlps: for every layer, the tokens at which its MLP is used.
    """

    states: list[Live]
    heads: list[list[Reach | None]]
    mlps: list[list[int]]


def _of(kinds: Sequence[str], names: Sequence[str] | None) -> list[int]:
    """Tokens of these kinds; None: all."""
    return [t for t, kind in enumerate(kinds) if names is None or kind in names]


def liveness(program: Program, kinds: Sequence[str], read: Iterable[tuple[Slot, int]]) -> Walk:
    """What is used, from the program's end to its beginning.

    Args:
        program: its layers, once each.
        kinds: the kind of every token.
        read: (slot, token) that the read-out looks at.
    """
    found = Walk([set(read)], [], [])
    for number in range(len(program.layers), 0, -1):
        layer, after = program.layers[number - 1], found.states[0]
        middle, acting = set(after), []
        if layer.mlp is not None:
            written = [s for s, m in layer.mlp.write.items() if m.any()]
            tokens = _of(kinds, layer.mlp.token_groups)
            acting = [t for t in tokens if any((s, t) in after for s in written)]
            for part in (layer.mlp.hidden, layer.mlp.gate):
                middle |= {(s, t) for s, m in _terms(part) if m.any() for t in acting}
        before, used = set(middle), []
        for head in layer.single_heads:
            if head.erases is not None:
                before -= {(head.erases, t) for t in _of(kinds, head.queries)}
        for head in layer.single_heads:
            reach = _reach(head, number, kinds, middle)
            used.append(reach)
            if reach is None or head.erases is not None:
                continue  # an erased slot cancels: what was in it is not used
            for part, slot, _ in head.reads():
                at = reach.queries if "query" in part else reach.keys
                before |= {(slot, t) for t in at}
        norm = layer.norm
        if norm is not None:
            tokens = _of(kinds, norm.token_groups)
            before |= {(norm.read, t) for t in tokens if (norm.write, t) in before}
        found.states.insert(0, before)
        found.heads.insert(0, used)
        found.mlps.insert(0, acting)
    return found


def _reach(head: Head, number: int, kinds: Sequence[str], middle: Live) -> Reach | None:
    written = [s for s, m in head.write.items() if m.any()]
    queries = [t for t in _of(kinds, head.queries) if any((s, t) in middle for s in written)]
    low = -np.inf if head.window[0] is None else head.window[0]
    high = np.inf if head.window[1] is None else head.window[1]
    sinks = _of(kinds, head.sinks) if head.sinks and queries else []
    near = {t for q in queries for t in _of(kinds, head.keys) if low <= t - q <= high}
    keys = sorted(near | set(sinks))
    # what is not written before this layer is zero
    silent = not head.value.constant.any() and all(s.born >= number for s in head.value.terms)
    return Reach(queries, keys) if queries and keys and not silent else None


def _terms(part: Any) -> Iterable[tuple[Slot, Any]]:
    return () if part is None else part.terms.items()


def paths(
    program: Program, kinds: Sequence[str], walk: Walk, read: Iterable[tuple[Slot, int]]
) -> set[tuple[End, End]]:
    """(head, receiver) where a receiver that is used reads a column that the head writes.

    The path is the residual stream itself: a head in between that erases the column has a path of
    its own, by which it takes away what this one brings. A receiver is a head, the `MLP` of a layer
    or the `READ_OUT`, which has the number of the last layer.
    """
    needs: dict[End, set[tuple[int, int]]] = {}
    for number, layer in enumerate(program.layers):
        for n, (head, reach) in enumerate(zip(layer.single_heads, walk.heads[number], strict=True)):
            if reach is not None:
                needs[number, n] = _read(head, reach)
        if layer.mlp is not None:
            needs[number, MLP] = {
                (column, t)
                for part in (layer.mlp.hidden, layer.mlp.gate)
                for slot, m in _terms(part)
                for column in _columns(slot, np.asarray(m).any(0))
                for t in walk.mlps[number]
            }
    last = len(program.layers) - 1
    every = np.ones
    needs[last, READ_OUT] = {(c, t) for s, t in read for c in _columns(s, every(s.size))}
    found = set()
    for number, layer in enumerate(program.layers):
        for n, head in enumerate(layer.single_heads):
            brought = {
                (column, t)
                for slot, m in head.write.items()
                for column in _columns(slot, np.asarray(m).any(1))
                for t in _of(kinds, head.queries)
            }
            found |= {
                ((number, n), end)
                for end, needed in needs.items()
                if (end[0] > number or (end[0] == number and end[1] < 0)) and needed & brought
            }
    return found


def _columns(slot: Slot, chosen: Any) -> list[int]:
    return [slot.start + int(c) for c in np.flatnonzero(chosen)]


def _read(head: Head, reach: Reach) -> set[tuple[int, int]]:
    """(column, token) that a head reads where it is used."""
    at_query, at_key = [head.query], [head.key, head.value]
    if head.factor is not None:
        at_query.append(head.factor[0])
        at_key.append(head.factor[1])
    return {
        (column, t)
        for parts, tokens in ((at_query, reach.queries), (at_key, reach.keys))
        for part in parts
        for slot, m in part.terms.items()
        for column in _columns(slot, np.asarray(m).any(0))
        for t in tokens
    }


def first_head(layer: Layer) -> Head | None:
    """The first head of a layer that erases nothing."""
    return next((h for h in layer.single_heads if h.erases is None), None)
