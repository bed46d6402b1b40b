"""LayerNorms of a decoder, forward and back, as norms of the transformer and products of numbers.

A LayerNorm is the transformer's own. Its Jacobian is symmetric,

    (I - 1 1^T / D - x x^T / D) / sigma,      x the normalised vector,

so that going back takes linear heads from a token to itself, and gated MLPs for 1 / sigma and the
gain. Panigrahi et al. 2023 (arXiv 2307.01189) take one-sided differences of the norm instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np

from constructions.core.matrices import Matrix, beside
from constructions.core.program import SELF, Head, Layer, Mlp, Norm
from constructions.core.slots import Affine, concatenate, constant
from constructions.tint.algorithm import Backward
from constructions.tint.attention import ONE, direction, itself, times
from constructions.tint.layout import TEXT, Layout, Tape


@dataclass(frozen=True)
class LayerNorms:
    """The layers and parts of layers of every LayerNorm; number n is that of `layout.norms`.

    Attributes:
        layout: slots of gains and offsets.
        back: how to go back.
        rate: eta, of the descent of gains and offsets.
        first: whether the first norm goes back too, to embeddings that are trained.
    """

    layout: Layout
    back: Backward
    rate: float
    first: bool

    @property
    def width(self) -> int:
        """D, of what is normalised."""
        return self.layout.shape.width

    @property
    def eps(self) -> float:
        """What the auxiliary model adds to variances."""
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
        """The stream as a LayerNorm meets it, kept for the way back.

        For the exact way (x - mean x, c): with c^2 = D eps / 2, and the rest of eps in the norm,
        the norm divides it by what LayerNorm divides by, so that its last entry tells 1 / sigma.
        """
        stream, d = tape("stream", self.width), self.width
        if self.back.norm != "exact":
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
        if self.back.norm != "exact":
            return tape("normal", d, norm)
        return (1 / self.ratio) * tape("normal", d + 1, norm)[:d]

    def normalise(self, tape: Tape, norm: int) -> Layer:
        """normed = gain * normal + offset."""
        d, layout = self.width, self.layout
        before = tape("before", d + (self.back.norm == "exact"), norm)
        kind = ("layer", self.eps)
        if self.back.norm == "exact":
            kind = ("rms", self.eps * d / (2 * (d + 1)))
        act = Norm(before, tape("normal", before.size, norm), *kind, tokens=TEXT)
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
        if self.back.norm != "finite-difference":
            return []
        before, moved = (tape(n, self.width, norm) for n in ("before", "moved"))
        return [itself(before, moved, "move")]

    def gain_back(self, tape: Tape, norm: int) -> Mlp:
        """Back through the gain, and what each token says of it where it is trained."""
        d = self.width
        gain, error = tape("gain", d, norm), tape("d normed", d, norm)
        back = tape("d normal", d, norm)
        one, none = Matrix.identity(d), Matrix((d, d))
        write = {back: one}
        if self.back.norm == "finite-difference":
            write[tape("moved", d, norm)] = self.back.step * one
        if not self.back.gains:
            return times(gain, error, write, "gain back")
        write = {slot: beside(m, none) for slot, m in write.items()}
        write[tape("d gain", d, norm)] = beside(none, one)
        both = concatenate(gain, self.normal(tape, norm))
        return times(both, concatenate(error, error), write, "gain back")

    def norm_back(self, tape: Tape, norm: int) -> Iterator[Layer]:
        """d stream += back through the normalisation; gain and offset descend."""
        d, group = self.width, self.layout.norms[norm]
        down, error = tape("d stream", d), tape("d normed", d, norm)
        says = [("offset", error)]
        if self.back.gains:
            says.append(("gain", tape("d gain", d, norm)))
        heads = [
            Head(
                ONE, ONE, value, {self.layout.norm[f"{name} change"]: -self.rate},
                queries=group, keys=TEXT, name=f"{name} of {group} descends",
            )
            for name, value in says
        ]  # fmt: skip
        name = f"{group}, back"
        if norm == 0 and not self.first:  # what is below is not trained
            yield Layer(heads, name=name)
            return
        normal, back = self.normal(tape, norm), tape("d normal", d, norm)
        if self.back.norm == "finite-difference":
            moved, after = (tape(n, d, norm) for n in ("moved", "normal, moved"))
            act = Norm(moved, after, "layer", self.eps, tokens=TEXT)
            heads.append(itself((1 / self.back.step) * (after - normal), down, "difference"))
            yield Layer(heads, norm=act, name=name)
            return
        if self.back.norm == "central":
            yield from self.central(tape, norm, heads, name)
            return
        # (I - 1 1^T / D - x x^T / D) d normal, then times 1 / sigma
        flat = tape("d normal, projected", d, norm)
        ones = np.ones((d, 1)) @ ONE
        heads += [
            itself(back, flat, "as it is"),
            Head(
                back, ones, ones, {flat: -1 / d}, queries=TEXT, keys=TEXT, window=SELF,
                name="less its mean",
            ),
            Head(
                back, normal, normal, {flat: -1 / d}, queries=TEXT, keys=TEXT, window=SELF,
                name="less its part along the normalised",
            ),
        ]  # fmt: skip
        inverse = 1 / (self.ratio * self.known) * tape("normal", d + 1, norm)[d:]
        act = times(flat, np.ones((d, 1)) @ inverse, {down: 1.0}, "1 / sigma")
        yield Layer(heads, act, name=name)

    def central(self, tape: Tape, norm: int, heads: list[Head], name: str) -> Iterator[Layer]:
        """Back by a difference along the gradient's direction u, times its size <u, g> / D."""
        d, step = self.width, self.back.central / 10
        before, back = tape("before", d, norm), tape("d normal", d, norm)
        along = tape("direction", d, norm)
        moved = [tape(n, d, norm) for n in ("moved", "moved back")]
        after = [tape(f"normal, {n}", d, norm) for n in ("moved", "moved back")]
        heads = heads + [
            itself(before + sign * step * along, slot, "move")
            for sign, slot in zip((1, -1), moved, strict=True)
        ]
        yield Layer(heads, norm=direction(back, along), name=name)
        first, second = (
            Norm(slot, found, "layer", self.eps, tokens=TEXT)
            for slot, found in zip(moved, after, strict=True)
        )
        yield Layer(norm=first, name=name)
        difference = Head(
            along, back, (0.5 / step) * (after[0] - after[1]), {tape("d stream", d): 1 / d},
            queries=TEXT, keys=TEXT, window=SELF, name="difference",
        )  # fmt: skip
        yield Layer([difference], norm=second, name=name)
