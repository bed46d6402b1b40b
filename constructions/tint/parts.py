"""Small parts of TinT's layers: what a token does with its own values."""

from __future__ import annotations

from typing import Any

from constructions.program import SELF, Head, Mlp, Norm
from constructions.slots import Affine, Slot, constant
from constructions.tint.layout import TEXT

#: The same number at every token.
ONE = constant(1.0)


def itself(value: Affine, slot: Slot, name: str) -> Head:
    """slot += value, at every token of the text."""
    return Head(
        ONE, ONE, value, {slot: 1.0}, queries=TEXT, keys=TEXT, window=SELF, name=name
    )  # fmt: skip


def times(a: Affine, b: Affine, write: dict[Any, Any], name: str) -> Mlp:
    """Products of numbers at a token: a gated MLP without an activation."""
    return Mlp(a, write, b, "identity", TEXT, name)


def direction(read: Slot, write: Slot) -> Norm:
    """A vector over its root mean square; 0 stays 0."""
    return Norm(read, write, "rms", 1e-24, tokens=TEXT)
