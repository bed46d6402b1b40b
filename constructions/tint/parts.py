"""Attention and LayerNorms of a decoder and their backward passes, as heads, norms and gated MLPs.

Attention. With c_ij = <dy_i, v_j> and m_i = <dy_i, y_i> = sum_j a_ij c_ij, the gradients of a head
are

    dv_j = sum_i a_ij dy_i,      dq_i = sum_j a_ij (c_ij - m_i) k_j / sqrt d,
    dk_j = sum_i a_ij (c_ij - m_i) q_i / sqrt d:

heads with the forward pass's weights a, or their transpose, times a factor linear in both tokens.
The same without factors is a derivative along the scores, which differences of softmax heads take:

    dq_i = (d / de) sum_j softmax_j(<q_i, k_j> / sqrt d + e c_ij) k_j / sqrt d  at e = 0.

LayerNorm is the transformer's own. Its Jacobian is symmetric,

    (I - 1 1^T / D - x x^T / D) / sigma,      x the normalised vector,

so that the backward pass takes linear heads from a token to itself, and gated MLPs for 1 / sigma
and the gain. Panigrahi et al. 2023 (arXiv 2307.01189) take one-sided differences of the norm
instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from constructions.core.matrices import Matrix, beside
from constructions.core.program import CAUSAL, SELF, Head, Layer, Mlp, Norm, Window
from constructions.core.slots import Affine, Slot, concatenate, constant
from constructions.interchange.decoder import DecoderShape
from constructions.tint.algorithm import Backward
from constructions.tint.layout import TEXT, Layout, Tape

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
    return Norm(read, write, "rms", 1e-24, token_groups=TEXT)


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


def value_backward(shape: DecoderShape, q: Slot, k: Slot, dy: Slot, dv: Slot) -> list[Head]:
    """Gradients of values: the whole backward pass of "value-only" attention."""
    return [
        _head(ACROSS, k[rows], q[rows], dy[rows], {dv[rows]: 1.0}, shape, f"d value {h}")
        for h, rows in _heads(shape)
    ]


def score_backward(
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


@dataclass(frozen=True)
class LayerNorms:
    """The layers and parts of layers of every LayerNorm; number n is that of `layout.norms`.

    Attributes:
        layout: slots of gains and offsets.
        backward: exactly, or by which differences, norms are differentiated.
        rate: eta, the learning rate of gains and offsets.
        first: whether the gradient is passed on through the first norm as well, which it must be
            where embeddings are trained.
    """

    layout: Layout
    backward: Backward
    rate: float
    first: bool

    @property
    def width(self) -> int:
        """D, of what is normalised."""
        return self.layout.shape.width

    @property
    def eps(self) -> float:
        """eps of the auxiliary model's norms."""
        return self.layout.shape.eps

    @property
    def ratio(self) -> float:
        """The norm of D + 1 numbers over that of D."""
        return sqrt((self.width + 1) / self.width)

    @property
    def known(self) -> float:
        """The constant beside the stream that an exact LayerNorm divides as well."""
        return sqrt(self.width * self.eps / 2)

    def keep(self, tape: Tape, norm: int) -> Mlp:
        """The input x of a LayerNorm, kept for the backward pass.

        For exact derivatives (x - mean x, c) is kept, with c^2 = D eps / 2 and the rest of eps in
        the simulator's norm. That norm then divides by LayerNorm's own sigma, so that the last
        entry of its output is c / sigma up to a known factor.
        """
        stream, d = tape("stream", self.width), self.width
        if self.backward.norm != "exact":
            kept = tape("before", d, norm)
            return Mlp(stream, {kept: 1.0}, None, "identity", TEXT, "keep")
        kept = tape("before", d + 1, norm)
        mean = np.full((1, d), 1 / d) @ stream
        hidden = concatenate(stream, mean, constant(self.known))
        centred = beside(Matrix.identity(d), Matrix.of(-np.ones((d, 1))), Matrix((d, 1)))
        known = beside(Matrix((1, d + 1)), Matrix.identity(1))
        write = {kept[:d]: centred, kept[d:]: known}
        return Mlp(hidden, write, None, "identity", TEXT, "centre")

    def normal(self, tape: Tape, norm: int) -> Affine:
        """The normalised stream, before gain and offset."""
        d = self.width
        if self.backward.norm != "exact":
            return tape("normal", d, norm)
        return (1 / self.ratio) * tape("normal", d + 1, norm)[:d]

    def normalise(self, tape: Tape, norm: int) -> Layer:
        """normed = gain * normal + offset."""
        d, layout = self.width, self.layout
        before = tape("before", d + (self.backward.norm == "exact"), norm)
        kind = ("layer", self.eps)
        if self.backward.norm == "exact":
            kind = ("rms", self.eps * d / (2 * (d + 1)))
        act = Norm(before, tape("normal", before.size, norm), *kind, token_groups=TEXT)
        gain, normed = tape("gain", d, norm), tape("normed", d, norm)
        group = self.layout.norms[norm]
        heads = [
            Head(
                ONE, ONE, layout.norm[name] + layout.norm[f"{name} change"], {slot: 1.0},
                queries=TEXT, keys=group, name=f"{name} of {group}",
            )
            for name, slot in (("gain", gain), ("offset", normed))
        ]  # fmt: skip
        scale = times(self.normal(tape, norm), gain, {normed: 1.0}, "gain")
        return Layer(heads, scale, act, name=group)

    def prepare(self, tape: Tape, norm: int) -> list[Head]:
        """Of one-sided differences: what was normalised, to be moved along the gradient."""
        if self.backward.norm != "finite-difference":
            return []
        before, moved = (tape(n, self.width, norm) for n in ("before", "moved"))
        return [itself(before, moved, "move")]

    def gain_backward(self, tape: Tape, norm: int) -> Mlp:
        """The gradient through the gain, and each token's part of the gain's own gradient."""
        d = self.width
        gain, error = tape("gain", d, norm), tape("d normed", d, norm)
        d_normal = tape("d normal", d, norm)
        one, none = Matrix.identity(d), Matrix((d, d))
        write = {d_normal: one}
        if self.backward.norm == "finite-difference":
            write[tape("moved", d, norm)] = self.backward.step * one
        if not self.backward.gains:
            return times(gain, error, write, "gain, backward")
        write = {slot: beside(m, none) for slot, m in write.items()}
        write[tape("d gain", d, norm)] = beside(none, one)
        both = concatenate(gain, self.normal(tape, norm))
        return times(both, concatenate(error, error), write, "gain, backward")

    def norm_backward(self, tape: Tape, norm: int) -> Iterator[Layer]:
        """Adds the gradient through the normalisation to d stream; updates gain and offset."""
        d, group = self.width, self.layout.norms[norm]
        down, error = tape("d stream", d), tape("d normed", d, norm)
        gradients = [("offset", error)]
        if self.backward.gains:
            gradients.append(("gain", tape("d gain", d, norm)))
        heads = [
            Head(
                ONE, ONE, value, {self.layout.norm[f"{name} change"]: -self.rate},
                queries=group, keys=TEXT, name=f"{name} of {group} descends",
            )
            for name, value in gradients
        ]  # fmt: skip
        name = f"{group}, backward"
        if norm == 0 and not self.first:  # what is below is not trained
            yield Layer(heads, name=name)
            return
        normal, d_normal = self.normal(tape, norm), tape("d normal", d, norm)
        if self.backward.norm == "finite-difference":
            moved, after = (tape(n, d, norm) for n in ("moved", "normal, moved"))
            act = Norm(moved, after, "layer", self.eps, token_groups=TEXT)
            heads.append(itself((1 / self.backward.step) * (after - normal), down, "difference"))
            yield Layer(heads, norm=act, name=name)
            return
        if self.backward.norm == "central":
            yield from self.central(tape, norm, heads, name)
            return
        # (I - 1 1^T / D - x x^T / D) d normal, then times 1 / sigma
        flat = tape("d normal, projected", d, norm)
        ones = np.ones((d, 1)) @ ONE
        heads += [
            itself(d_normal, flat, "as it is"),
            Head(
                d_normal, ones, ones, {flat: -1 / d}, queries=TEXT, keys=TEXT, window=SELF,
                name="less its mean",
            ),
            Head(
                d_normal, normal, normal, {flat: -1 / d}, queries=TEXT, keys=TEXT, window=SELF,
                name="less its part along the normalised",
            ),
        ]  # fmt: skip
        inverse = 1 / (self.ratio * self.known) * tape("normal", d + 1, norm)[d:]
        act = times(flat, np.ones((d, 1)) @ inverse, {down: 1.0}, "1 / sigma")
        yield Layer(heads, act, name=name)

    def central(self, tape: Tape, norm: int, heads: list[Head], name: str) -> Iterator[Layer]:
        """The same by a difference along the gradient's direction u, times its size <u, g> / D."""
        d, step = self.width, self.backward.central / 10
        before, d_normal = tape("before", d, norm), tape("d normal", d, norm)
        along = tape("direction", d, norm)
        moved = [tape(n, d, norm) for n in ("moved", "moved back")]
        after = [tape(f"normal, {n}", d, norm) for n in ("moved", "moved back")]
        heads = heads + [
            itself(before + sign * step * along, slot, "move")
            for sign, slot in zip((1, -1), moved, strict=True)
        ]
        yield Layer(heads, norm=direction(d_normal, along), name=name)
        first, second = (
            Norm(slot, found, "layer", self.eps, token_groups=TEXT)
            for slot, found in zip(moved, after, strict=True)
        )
        yield Layer(norm=first, name=name)
        difference = Head(
            along, d_normal, (0.5 / step) * (after[0] - after[1]), {tape("d stream", d): 1 / d},
            queries=TEXT, keys=TEXT, window=SELF, name="difference",
        )  # fmt: skip
        yield Layer([difference], norm=second, name=name)
