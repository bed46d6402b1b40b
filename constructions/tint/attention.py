"""Attention of a decoder and its gradient, as heads on slots of queries, keys and values.

With c_ij = <dy_i, v_j> and m_i = <dy_i, y_i> = sum_j a_ij c_ij, the gradients of one head are

    dv_j = sum_i a_ij dy_i,      dq_i = sum_j a_ij (c_ij - m_i) k_j / sqrt d,
    dk_j = sum_i a_ij (c_ij - m_i) q_i / sqrt d:

heads with the forward pass's weights a, or their transpose, times a factor linear in both tokens.
The same without factors is a derivative along the scores, which differences of softmax heads take:

    dq_i = (d / de) sum_j softmax_j(<q_i, k_j> / sqrt d + e c_ij) k_j / sqrt d  at e = 0.
"""

from __future__ import annotations

from math import sqrt

from constructions.matrices import Matrix
from constructions.program import CAUSAL, Head, Window
from constructions.slots import Affine, Slot, concatenate, constant
from constructions.tint.auxiliary import DecoderShape
from constructions.tint.backward import Backward
from constructions.tint.layout import TEXT, place

LATER: Window = (0, None)


def attend(shape: DecoderShape, q: Slot, k: Slot, v: Slot, y: Slot) -> list[Head]:
    """y_i += sum_j softmax_j(<q_i, k_j> / sqrt d) v_j, head by head."""
    return [
        Head(
            q[rows], k[rows], v[rows], {y: where}, "softmax", TEXT, TEXT, CAUSAL,
            scale=sqrt(shape.heads / shape.width), name=f"attention {h}",
        )
        for h, rows, where in _heads(shape)
    ]  # fmt: skip


def attend_back(
    shape: DecoderShape,
    back: Backward,
    given: tuple[Slot, Slot, Slot, Slot, Slot],
    wanted: tuple[Slot, Slot, Slot],
) -> list[Head]:
    """Exact gradients of queries, keys and values; of "value-only" attention, of the last alone.

    Args:
        shape, back: of the decoder, and how it goes back.
        given: q, k, v, dy and m, the last with a number for each head.
        wanted: dq, dk, dv.
    """
    (q, k, v, dy, mean), (dq, dk, dv) = given, wanted
    scale, found = sqrt(shape.heads / shape.width), []
    for h, rows, where in _heads(shape):
        qh, kh, vh, dyh, write = q[rows], k[rows], v[rows], dy[rows], scale * where
        found.append(_head(ACROSS, kh, qh, dyh, {dv: where}, scale, f"d value {h}"))
        if back.attention == "exact":
            error, value = concatenate(dyh, -mean[h : h + 1]), concatenate(vh, constant(1.0))
            found += [
                _head(FORTH, qh, kh, kh, {dq: write}, scale, f"d query {h}", (error, value)),
                _head(ACROSS, kh, qh, qh, {dk: write}, scale, f"d key {h}", (value, error)),
            ]
    return found


def difference_back(
    shape: DecoderShape,
    step: float,
    given: tuple[Slot, Slot, Slot, Slot, Slot, Slot],
    wanted: tuple[Slot, Slot, Slot],
) -> list[Head]:
    """The same by central differences, along the directions u_i = dy_i / r_i of the gradients.

    One step then suits gradients of any size r_i, which multiplies what comes out; for keys it
    stands at the queries that are summed over.

    Args:
        shape: of the decoder.
        step: of the differences.
        given: q, k, v, dy, u and r q.
        wanted: dq over r, dk, dv.
    """
    (q, k, v, dy, along, sized), (dq, dk, dv) = given, wanted
    scale, found = sqrt(shape.heads / shape.width), []
    for h, rows, where in _heads(shape):
        qh, kh, both = q[rows], k[rows], concatenate(k[rows], v[rows])
        found.append(_head(ACROSS, kh, qh, dy[rows], {dv: where}, scale, f"d value {h}"))
        for e in (step, -step):
            moved, write = concatenate(qh, (e / scale) * along[rows]), scale / (2 * e) * where
            found += [
                _head(FORTH, moved, both, kh, {dq: write}, scale, f"d query {h}"),
                _head(ACROSS, both, moved, sized[rows], {dk: write}, scale, f"d key {h}"),
            ]
    return found


FORTH, ACROSS = ("softmax", CAUSAL), ("transposed_softmax", LATER)


def _head(
    way: tuple[str, Window],
    query: Affine,
    key: Affine,
    value: Affine,
    write: dict[Slot, Matrix],
    scale: float,
    name: str,
    factor: tuple[Affine, Affine] | None = None,
) -> Head:
    mixer, window = way
    return Head(
        query, key, value, write, mixer, TEXT, TEXT, window, scale=scale, factor=factor, name=name
    )


def _heads(shape: DecoderShape) -> list[tuple[int, slice, Matrix]]:
    """(number, its rows, what puts them in their place) for every head."""
    d = shape.width // shape.heads
    return [
        (h, slice(h * d, (h + 1) * d), place(h * d, d, shape.width)) for h in range(shape.heads)
    ]
