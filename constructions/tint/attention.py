"""Attention of a decoder and its gradient, as heads on slots of queries, keys and values.

With c_ij = <dy_i, v_j> and m_i = <dy_i, y_i> = sum_j a_ij c_ij, the gradients of one head are

    dv_j = sum_i a_ij dy_i,      dq_i = sum_j a_ij (c_ij - m_i) k_j / sqrt d,
    dk_j = sum_i a_ij (c_ij - m_i) q_i / sqrt d:

heads with the forward pass's weights a, or their transpose, times a factor linear in both tokens.
The same without factors is a derivative along the scores, which differences of softmax heads take:

    dq_i = (d / de) sum_j softmax_j(<q_i, k_j> / sqrt d + e c_ij) k_j / sqrt d  at e = 0.

Small parts of TinT's layers: what a token does with its own values.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from constructions.core.program import CAUSAL, SELF, Head, Mlp, Norm, Window
from constructions.core.slots import Affine, Slot, concatenate, constant
from constructions.interchange.decoder import DecoderShape
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


LATER: Window = (0, None)


def attend(shape: DecoderShape, q: Slot, k: Slot, v: Slot, y: Slot) -> list[Head]:
    """y_i += sum_j softmax_j(<q_i, k_j> / sqrt d) v_j, head by head."""
    return [
        Head(
            q[rows], k[rows], v[rows], {y[rows]: 1.0}, "softmax", TEXT, TEXT, CAUSAL,
            scale=_scale(shape), name=f"attention {h}",
        )
        for h, rows in _heads(shape)
    ]  # fmt: skip


def value_back(shape: DecoderShape, q: Slot, k: Slot, dy: Slot, dv: Slot) -> list[Head]:
    """Gradients of values: all that goes back of "value-only" attention."""
    return [
        _head(ACROSS, k[rows], q[rows], dy[rows], {dv[rows]: 1.0}, shape, f"d value {h}")
        for h, rows in _heads(shape)
    ]


def score_back(
    shape: DecoderShape,
    given: tuple[Slot, Slot, Slot, Slot, Slot],
    wanted: tuple[Slot, Slot],
) -> list[Head]:
    """Gradients of queries and keys.

    Args:
        shape: of the decoder.
        given: q, k, v, dy and m, the last with a number for each head.
        wanted: dq, dk.
    """
    (q, k, v, dy, mean), (dq, dk), found = given, wanted, []
    for h, rows in _heads(shape):
        qh, kh, scale = q[rows], k[rows], _scale(shape)
        error, value = concatenate(dy[rows], -mean[h : h + 1]), concatenate(v[rows], ONE)
        forth, across = (error, value), (value, error)
        found += [
            _head(FORTH, qh, kh, kh, {dq[rows]: scale}, shape, f"d query {h}", forth),
            _head(ACROSS, kh, qh, qh, {dk[rows]: scale}, shape, f"d key {h}", across),
        ]
    return found


def score_differences(
    shape: DecoderShape,
    step: float,
    given: tuple[Slot, Slot, Slot, Slot, Slot],
    wanted: tuple[Slot, Slot],
) -> list[Head]:
    """The same by central differences, along the directions u_i = dy_i / r_i of the gradients.

    One step then suits gradients of any size r_i, which multiplies what comes out; for keys it
    stands at the queries that are summed over.

    Args:
        shape: of the decoder.
        step: of the differences.
        given: q, k, v, u and r q.
        wanted: dq over r, dk.
    """
    (q, k, v, along, sized), (dq, dk), found = given, wanted, []
    for h, rows in _heads(shape):
        kh, both, scale = k[rows], concatenate(k[rows], v[rows]), _scale(shape)
        for e in (step, -step):
            moved, by = concatenate(q[rows], (e / scale) * along[rows]), scale / (2 * e)
            found += [
                _head(FORTH, moved, both, kh, {dq[rows]: by}, shape, f"d query {h}"),
                _head(ACROSS, both, moved, sized[rows], {dk[rows]: by}, shape, f"d key {h}"),
            ]
    return found


FORTH, ACROSS = ("softmax", CAUSAL), ("transposed_softmax", LATER)


def _head(
    way: tuple[str, Window],
    query: Affine,
    key: Affine,
    value: Affine,
    write: dict[Affine, float],
    shape: DecoderShape,
    name: str,
    factor: tuple[Affine, Affine] | None = None,
) -> Head:
    mixer, window = way
    return Head(
        query, key, value, write, mixer, TEXT, TEXT, window,
        scale=_scale(shape), factor=factor, name=name,
    )  # fmt: skip


def _scale(shape: DecoderShape) -> float:
    """1 / sqrt d."""
    return sqrt(shape.heads / shape.width)


def _heads(shape: DecoderShape) -> list[tuple[int, slice]]:
    """(number, its rows) for every head."""
    d = shape.width // shape.heads
    return [(h, slice(h * d, (h + 1) * d)) for h in range(shape.heads)]
