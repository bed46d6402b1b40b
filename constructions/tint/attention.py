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
from constructions.slots import Slot, concatenate, constant
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
    """Gradients of queries, keys and values; of "value-only" attention, of the last alone.

    Args:
        shape, back: of the decoder, and how it goes back.
        given: q, k, v, dy and m, the last with a number for each head. Where differences are
            taken, in the place of m the queries that some later loss depends on, and 0 for the
            others: what these say to a key cancels, but not to the last bit.
        wanted: dq, dk, dv.
    """
    (q, k, v, dy, mean), (dq, dk, dv) = given, wanted
    scale, step, found = sqrt(shape.heads / shape.width), back.central, []
    for h, rows, where in _heads(shape):
        qh, kh, vh, dyh = q[rows], k[rows], v[rows], dy[rows]

        def forth(query, key, value, to, name, factor=None, h=h):  # type: ignore[no-untyped-def]
            return Head(
                query, key, value, to, "softmax", TEXT, TEXT, CAUSAL, scale=scale, factor=factor,
                name=f"{name} {h}",
            )  # fmt: skip

        def across(query, key, value, to, name, factor=None, h=h):  # type: ignore[no-untyped-def]
            return Head(
                query, key, value, to, "transposed_softmax", TEXT, TEXT, LATER, scale=scale,
                factor=factor, name=f"{name} {h}",
            )  # fmt: skip

        found.append(across(kh, qh, dyh, {dv: where}, "d value"))
        if back.attention == "exact":
            error, value = concatenate(dyh, -mean[h : h + 1]), concatenate(vh, constant(1.0))
            found += [
                forth(qh, kh, kh, {dq: scale * where}, "d query", (error, value)),
                across(kh, qh, qh, {dk: scale * where}, "d key", (value, error)),
            ]
        elif back.attention == "finite-difference":
            for e in (step, -step):
                moved, both = concatenate(qh, (e / scale) * dyh), concatenate(kh, vh)
                write = scale / (2 * e) * where
                found += [
                    forth(moved, both, kh, {dq: write}, "d query"),
                    across(both, moved, mean[rows], {dk: write}, "d key"),
                ]
    return found


def _heads(shape: DecoderShape) -> list[tuple[int, slice, Matrix]]:
    """(number, its rows, what puts them in their place) for every head."""
    d = shape.width // shape.heads
    return [
        (h, slice(h * d, (h + 1) * d), place(h * d, d, shape.width)) for h in range(shape.heads)
    ]
