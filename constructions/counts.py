"""How large a program and the model that it compiles to are; nothing is built."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from constructions.compiler import config_of
from constructions.config import WIRING
from constructions.program import Head, HeadFamily, Program


@dataclass(frozen=True)
class Counts:
    """Sizes of a program.

    Attributes:
        width, layers: of the compiled model; layers counts those that are applied.
        heads, max_heads, max_head_rows: in all stored layers, in one layer, and the most key or
            value rows of a head.
        stored: nonzero entries of all affine maps and writes; a looped layer counts once.
        dense: trainable entries of the compiled model.
    """

    width: int
    layers: int
    heads: int
    max_heads: int
    max_head_rows: int
    stored: int
    dense: int


def counts(program: Program) -> Counts:
    """Sizes of a program and of the model that it compiles to, which is not built."""
    parts = [part for layer in program.layers for part in layer.heads]
    heads = [part for part in parts if isinstance(part, Head)]
    families = [part for part in parts if isinstance(part, HeadFamily)]
    mlps = [layer.mlp for layer in program.layers if layer.mlp is not None]
    maps = [e for h in heads for e in (h.query, h.key, h.value, *(h.factor or ()))]
    maps += [e for m in mlps for e in (m.hidden, m.gate) if e is not None]
    stored = sum(m.nonzeros for e in maps for m in e.terms.values())
    stored += sum(np.count_nonzero(e.constant) for e in maps)
    stored += sum(m.nonzeros for part in (*heads, *mlps) for m in part.write.values())
    # of each head of a family: the ones in its query, its value and its write, and its keys
    stored += sum(f.write.size * (f.rows + 2) for f in families)
    stored += sum(np.count_nonzero(tensor) for f in families for *_, tensor in f.terms)
    rows = [max(h.key.size, h.value.size, h.factor_dim) for h in heads]
    rows += [f.rows for f in families]
    return Counts(
        width=program.slots.width,
        layers=program.depth,
        heads=sum(map(_heads_in, parts)),
        max_heads=max(sum(map(_heads_in, layer.heads)) for layer in program.layers),
        max_head_rows=max(rows, default=0),
        stored=int(stored),
        dense=_entries(config_of(program).shapes()),
    )


def _heads_in(part: Head | HeadFamily) -> int:
    return part.write.size if isinstance(part, HeadFamily) else 1


def _entries(shapes: Any) -> int:
    if isinstance(shapes, tuple):
        return prod(shapes)
    return sum(_entries(value) for name, value in shapes.items() if name not in WIRING)
