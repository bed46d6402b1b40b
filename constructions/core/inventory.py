"""The size of a program and of its compiled model, and the components that GPT-2 does not have.

`counts` gives sizes without building the model. `components` lists the heads, MLPs and norms of a
program and which of them are non-standard. Standard components are those of GPT-2: causal softmax
heads, MLPs with one activation and no gate, and norms in front of heads, MLP or readout. Everything
else is one of `NON_STANDARD`, norms included that write into a slot of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from constructions.core.compile import config_of
from constructions.core.config import WIRING
from constructions.core.program import SELF, Head, HeadFamily, Layer, Program
from synthetic.display import ShowsMarkdown


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


#: Components that no standard transformer has: name -> what it is.
NON_STANDARD = {
    "linear attention": "scores without a softmax, between different tokens",
    "self-attention of a token": "a linear or bilinear map of one token, as a head",
    "looks ahead": "a head that sees tokens behind its own, by its window or by kinds of tokens",
    "transposed softmax": "weights that sum to one over queries, not over keys",
    "factor": "weights that are multiplied by a second product of two tokens",
    "mesa": "a head that solves least squares",
    "gated MLP": "a product of two linear maps of a token",
    "derivative": "the derivative of an activation as an activation",
    "linear MLP": "an MLP without an activation",
    "norm into a slot": "a norm whose output is kept in the stream",
}


@dataclass(frozen=True)
class Part:
    """Layers whose names differ only in numbers.

    Attributes:
        name: of the layers, without numbers.
        layers, heads: how many.
        plain_heads: how many of the heads are standard ones.
        non_standard: {name in `NON_STANDARD`: how many heads, MLPs or norms}.
    """

    name: str
    layers: int
    heads: int
    plain_heads: int
    non_standard: dict[str, int]


@dataclass(frozen=True)
class Components(ShowsMarkdown):
    """What a program is made of: its parts, in the order of their first layers."""

    parts: tuple[Part, ...]

    @property
    def non_standard(self) -> dict[str, int]:
        """Non-standard components of all parts: {name in `NON_STANDARD`: how many}."""
        total: dict[str, int] = {}
        for part in self.parts:
            for name, count in part.non_standard.items():
                total[name] = total.get(name, 0) + count
        return total

    @property
    def plain(self) -> float:
        """The share of the heads that are standard ones."""
        heads = sum(part.heads for part in self.parts)
        return sum(part.plain_heads for part in self.parts) / heads if heads else 1.0

    def markdown(self) -> str:
        """The table as text."""
        lines = [
            "| part | layers | heads | plain | non-standard components |",
            "|---|---|---|---|---|",
        ]
        for p in self.parts:
            extras = ", ".join(f"{name} ({count})" for name, count in p.non_standard.items())
            lines.append(f"| {p.name} | {p.layers} | {p.heads} | {p.plain_heads} | {extras} |")
        return "\n".join(lines)


def components(program: Program) -> Components:
    """Heads, MLPs and norms of a program, part by part; a looped layer counts once."""
    found: dict[str, list[Layer]] = {}
    for layer in program.layers:
        found.setdefault(re.sub(r"\s*\d+", "", layer.name) or "layer", []).append(layer)
    parts = []
    for name, layers in found.items():
        extras: dict[str, int] = {}
        heads = plain = 0
        for layer in layers:
            for head in layer.heads:
                number = head.write.size if isinstance(head, HeadFamily) else 1
                beyond = list(_beyond(program, head))
                heads += number
                plain += number * (not beyond)
                for extra in beyond:
                    extras[extra] = extras.get(extra, 0) + number
            for extra in _around(layer):
                extras[extra] = extras.get(extra, 0) + 1
        parts.append(Part(name, len(layers), heads, plain, extras))
    return Components(tuple(parts))


def _beyond(program: Program, head: Head | HeadFamily) -> Iterator[str]:
    if head.mixer == "transposed_softmax":
        yield "transposed softmax"
    elif head.mixer == "mesa":
        yield "mesa"
    elif head.mixer != "softmax":
        yield "self-attention of a token" if head.window == SELF else "linear attention"
    if isinstance(head, Head) and head.factor is not None:
        yield "factor"
    if head.window[1] is None:
        order = program.token_groups
        queries = [order.index(group) for group in head.queries or order]
        visible = [order.index(group) for group in head.keys or order]
        ahead = max(visible) >= min(queries)
    else:
        ahead = head.window[1] > 0
    if ahead:
        yield "looks ahead"


def _around(layer: Layer) -> Iterator[str]:
    if layer.norm is not None:
        yield "norm into a slot"
    if layer.mlp is not None:
        if layer.mlp.gate is not None:
            yield "gated MLP"
        elif layer.mlp.activation == "identity":
            yield "linear MLP"
        if layer.mlp.activation.endswith("_derivative"):
            yield "derivative"
