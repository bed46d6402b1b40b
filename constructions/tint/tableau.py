"""The layers of TinT: a decoder's forward pass, its backward pass and its update, as heads.

`prefix` has the three heads of a matrix, `attention` those of softmax attention and its gradient.
A LayerNorm is the transformer's own. Its Jacobian is symmetric,

    (I - 1 1^T / D - x x^T / D) / sigma,      x the normalised vector,

so that going back takes linear heads from a token to itself, and gated MLPs for 1 / sigma and the
gain. Panigrahi, Malladi, Xia, Arora 2023 (arXiv 2307.01189) stop at the gradient of attention's
values and take finite differences of LayerNorm and activation; `backward` says which way each part
goes. The paper overwrites its slots, behind gates, and carries weights past modules by skips; here
every value has a slot of its own, nothing is erased and one pass from layer to layer is all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np

from constructions.matrices import Matrix, beside
from constructions.program import SELF, Head, Layer, Mlp, Norm, Program
from constructions.slots import Affine, Slot, concatenate, constant
from constructions.tint.attention import attend, attend_back, difference_back
from constructions.tint.auxiliary import DecoderShape
from constructions.tint.backward import Backward
from constructions.tint.layout import TEXT, WORDS, Layout, place
from constructions.tint.prefix import Prefix

ONE = constant(1.0)
NEXT = (1, 1)


class Tape:
    """The slots of one forward pass, which its backward pass reads, by name and layer."""

    def __init__(self, layout: Layout, number: int) -> None:
        self.layout, self.number = layout, number
        self.slots: dict[tuple[str, int | None], Slot] = {}

    def __call__(self, name: str, size: int, layer: int | None = None) -> Slot:
        """The slot of that name, made where it is first asked for."""
        if (name, layer) not in self.slots:
            where = f"pass {self.number}" + ("" if layer is None else f", layer {layer}")
            self.slots[name, layer] = self.layout.tape(f"{where}: {name}", size)
        return self.slots[name, layer]


@dataclass(frozen=True)
class Tableau:
    """Makes the program.

    Attributes:
        layout: slots of weights.
        back: how to go back.
        steps: of gradient descent.
        rate: eta, on the summed loss.
        shards: parts into which the columns of a matrix are cut, one head for each.
        embeddings: whether words and positions are trained.
    """

    layout: Layout
    back: Backward
    steps: int
    rate: float
    shards: int = 1
    embeddings: bool = False
    tapes: list[Tape] = field(default_factory=list)

    @property
    def shape(self) -> DecoderShape:
        """Of the auxiliary model."""
        return self.layout.shape

    def program(self) -> Program:
        """Forward, then `steps` times backward and forward again."""
        layers: list[Layer] = []
        fixed = self.layout
        _ = fixed.matrices, fixed.norm, fixed.embedding, fixed.position, fixed.train
        _ = fixed.trainable if self.embeddings else None
        for number in range(self.steps + 1):
            self.tapes.append(Tape(fixed, number))
            layers += self.forward(self.tapes[-1])
            if number < self.steps:
                layers += self.backward(self.tapes[-1])
        return Program(fixed.slots, layers, token_groups=fixed.groups, name="tint")

    def forward(self, tape: Tape) -> Iterator[Layer]:
        """One pass of the auxiliary model; its last hidden state is the last "normed"."""
        d = self.shape.width
        stream = tape("stream", d)
        yield Layer(self.enter(tape, stream), self.keep(tape, 0), name="enter")
        for layer in range(self.shape.layers):
            q, k, v, y = (tape(n, d, layer) for n in ("query", "key", "value", "mixed"))
            matrix = self.matrix(layer)
            yield self.normalise(tape, 2 * layer)
            read = tape("normed", d, 2 * layer)
            heads = [
                head
                for name, slot in (("query", q), ("key", k), ("value", v))
                for head in matrix[name].apply(read, slot)
            ]
            yield Layer(heads, name=f"queries, keys, values {layer}")
            yield Layer(attend(self.shape, q, k, v, y), name=f"attention {layer}")
            heads = matrix["output"].apply(y, stream)
            yield Layer(heads, self.keep(tape, 2 * layer + 1), name=f"output {layer}")
            yield self.normalise(tape, 2 * layer + 1)
            read = tape("normed", d, 2 * layer + 1)
            hidden, active = (tape(n, self.shape.hidden, layer) for n in ("hidden", "active"))
            act = Mlp(hidden, {active: 1.0}, activation=self.shape.activation, tokens=TEXT)
            heads = matrix["hidden"].apply(read, hidden)
            yield Layer(heads, act, name=f"hidden {layer}")
            heads = matrix["back"].apply(active, stream)
            yield Layer(heads, self.keep(tape, 2 * layer + 2), name=f"back {layer}")
        yield self.normalise(tape, 2 * self.shape.layers)

    def backward(self, tape: Tape) -> Iterator[Layer]:
        """The gradient of the summed loss, and the changes of all weights."""
        d, layout = self.shape.width, self.layout
        final, last = tape("normed", d, 2 * self.shape.layers), 2 * self.shape.layers
        guess, error = tape("expected - next embedding", d), tape("d normed", d, last)
        softmax = Head(
            final, self.words, self.words, {guess: 1.0}, "softmax", TEXT, WORDS,
            name="expected embedding",
        )  # fmt: skip
        seen = tape("embedding", d) if self.embeddings else layout.embedding
        following = Head(
            ONE, ONE, seen, {guess: -1.0}, queries=TEXT, keys=TEXT, window=NEXT,
            name="next embedding",
        )  # fmt: skip
        chosen = self.times(guess, np.ones((d, 1)) @ layout.train, {error: 1.0}, "train mask")
        heads = [softmax, following, *self.readout_back(tape, final)]
        yield Layer(heads, chosen, name="loss")
        yield Layer(self.prepare(tape, last), self.gain(tape, last), name="final gain back")
        yield from self.norm_back(tape, last)
        for layer in reversed(range(self.shape.layers)):
            yield from self.mlp_back(tape, layer)
            yield from self.attention_back(tape, layer)
        if self.embeddings:
            yield Layer(self.enter_back(tape), name="embeddings back")

    def mlp_back(self, tape: Tape, layer: int) -> Iterator[Layer]:
        """Back through norm, hidden layer and activation."""
        d, size, norm = self.shape.width, self.shape.hidden, 2 * layer + 1
        matrix, down = self.matrix(layer), tape("d stream", d)
        hidden, active = (tape(n, size, layer) for n in ("hidden", "active"))
        d_hidden, d_active = (tape(f"d {n}", size, layer) for n in ("hidden", "active"))
        heads = matrix["back"].transpose(down, d_active)
        heads += matrix["back"].descend(down, active)
        if self.back.activation == "exact":
            kind = f"{self.shape.activation}_derivative"
            act = Mlp(hidden, {d_hidden: 1.0}, d_active, kind, TEXT, "activation back")
        else:
            moved = concatenate(hidden + self.back.step * d_active, hidden)
            both = Matrix.identity(size, 1 / self.back.step)
            write = beside(both, -1.0 * both)
            act = Mlp(moved, {d_hidden: write}, None, self.shape.activation, TEXT, "difference")
        yield Layer(heads, act, name=f"back {layer}, back")
        heads = matrix["hidden"].transpose(d_hidden, tape("d normed", d, norm))
        heads += matrix["hidden"].descend(d_hidden, tape("normed", d, norm))
        heads += self.prepare(tape, norm)
        yield Layer(heads, self.gain(tape, norm), name=f"hidden {layer}, back")
        yield from self.norm_back(tape, norm)

    def attention_back(self, tape: Tape, layer: int) -> Iterator[Layer]:
        """Back through norm, projections and attention."""
        d, norm = self.shape.width, 2 * layer
        matrix, down = self.matrix(layer), tape("d stream", d)
        q, k, v, y = (tape(n, d, layer) for n in ("query", "key", "value", "mixed"))
        dq, dk, dv, dy = (tape(f"d {n}", d, layer) for n in ("query", "key", "value", "mixed"))
        heads = matrix["output"].transpose(down, dy)
        heads += matrix["output"].descend(down, y)
        mean, products = tape("<dy, y>", self.shape.heads, layer), None
        if self.back.attention == "exact":
            each = np.kron(np.eye(self.shape.heads), np.ones((1, d // self.shape.heads)))
            products = self.times(dy, y, {mean: each}, "<dy, y>")
        yield Layer(heads, products, name=f"output {layer}, back")
        name = f"attention {layer}, back"
        if self.back.attention == "finite-difference":
            yield from self.differences(tape, layer, name)
        else:
            yield Layer(
                attend_back(self.shape, self.back, (q, k, v, dy, mean), (dq, dk, dv)), name=name
            )
        read, d_read = tape("normed", d, norm), tape("d normed", d, norm)
        heads = []
        for name, slot in (("query", dq), ("key", dk), ("value", dv)):
            if name == "value" or self.back.attention != "value-only":
                heads += matrix[name].transpose(slot, d_read)
                heads += matrix[name].descend(slot, read)
        heads += self.prepare(tape, norm)
        yield Layer(heads, self.gain(tape, norm), name=f"queries, keys, values {layer}, back")
        yield from self.norm_back(tape, norm)

    @staticmethod
    def times(a: Affine, b: Affine, write: dict[Slot, Any], name: str) -> Mlp:
        """Products of numbers at a token: a gated MLP without an activation."""
        return Mlp(a, write, b, "identity", TEXT, name)

    def differences(self, tape: Tape, layer: int, name: str) -> Iterator[Layer]:
        """Attention back by differences along the gradients' directions, times their sizes."""
        d = self.shape.width
        q, k, v, dy = (tape(n, d, layer) for n in ("query", "key", "value", "d mixed"))
        dq, dk, dv = (tape(f"d {n}", d, layer) for n in ("query", "key", "value"))
        along, size = tape("direction of d mixed", d, layer), tape("size of d mixed", 1, layer)
        sized, unsized = (tape(f"{n}, sized", d, layer) for n in ("query", "d query over"))
        measure = Head(
            along, dy, ONE, {size: 1 / d}, queries=TEXT, keys=TEXT, window=SELF, name="size"
        )
        sizes = np.ones((d, 1)) @ size
        scale = self.times(q, sizes, {sized: 1.0}, "sized queries")
        yield Layer([measure], scale, direction(dy, along), name=name)
        given = (q, k, v, dy, along, sized)
        heads = difference_back(self.shape, self.back.central, given, (unsized, dk, dv))
        yield Layer(heads, self.times(unsized, sizes, {dq: 1.0}, "sized"), name=name)

    # Words and positions

    @property
    def words(self) -> Affine:
        """Embeddings at the tokens of words, with what was changed."""
        if not self.embeddings:
            return self.layout.embedding
        return self.layout.embedding + self.layout.trainable["embedding change"]

    def enter(self, tape: Tape, stream: Slot) -> list[Head]:
        """stream = embedding + position; those of now are looked up where they are trained."""
        embedding, position = self.layout.embedding, self.layout.position
        if not self.embeddings:
            return [_self(embedding + position, stream, "enter")]
        own = self.layout.trainable
        seen, word = tape("embedding", self.shape.width), own["word"]
        heads = [
            _self(position + own["position change"], stream, "position"),
            Head(
                word, word, self.words, {stream: 1.0, seen: 1.0}, queries=TEXT, keys=WORDS,
                name="look up",
            ),
        ]  # fmt: skip
        following = tape("next word", self.shape.words)
        heads.append(
            Head(
                ONE, ONE, word, {following: 1.0}, queries=TEXT, keys=TEXT, window=NEXT,
                name="next word",
            )
        )  # fmt: skip
        return heads

    def readout_back(self, tape: Tape, final: Slot) -> list[Head]:
        """E_v -= eta sum_t m_t (p_t(v) - [v follows t]) final_t, where embeddings are trained."""
        if not self.embeddings:
            return []
        own = self.layout.trainable
        change, word = own["embedding change"], own["word"]
        wiring = {"queries": WORDS, "keys": TEXT, "factor": (ONE, self.layout.train)}
        return [
            Head(
                self.words, final, final, {change: -self.rate}, "transposed_softmax",
                name="readout descends", **wiring,
            ),
            Head(
                word, tape("next word", self.shape.words), final, {change: self.rate},
                name="readout ascends", **wiring,
            ),
        ]  # fmt: skip

    def enter_back(self, tape: Tape) -> list[Head]:
        """Embeddings and positions descend as inputs."""
        down, own = tape("d stream", self.shape.width), self.layout.trainable
        return [
            Head(
                own["word"], own["word"], down, {own["embedding change"]: -self.rate},
                queries=WORDS, keys=TEXT, name="embedding descends",
            ),
            Head(
                ONE, ONE, down, {own["position change"]: -self.rate}, queries=TEXT, keys=TEXT,
                window=SELF, name="position descends",
            ),
        ]  # fmt: skip

    # Matrices

    def matrix(self, layer: int) -> dict[str, Prefix]:
        """The matrices of a layer by name."""
        fixed = self.layout
        return {
            name: Prefix(w, self.rate, self.shards)
            for (name, n), w in fixed.matrices.items()
            if n == layer
        }

    # LayerNorm

    @property
    def ratio(self) -> float:
        """The norm of D + 1 numbers over that of D."""
        return sqrt((self.shape.width + 1) / self.shape.width)

    @property
    def known(self) -> float:
        """The constant beside the stream that an exact LayerNorm divides as well."""
        return sqrt(self.shape.width * self.shape.eps / 2)

    def keep(self, tape: Tape, norm: int) -> Mlp:
        """The stream as a LayerNorm meets it, kept for the way back.

        For the exact way (x - mean x, c): with c^2 = D eps / 2, and the rest of eps in the norm,
        the norm divides it by what LayerNorm divides by, so that its last entry tells 1 / sigma.
        """
        stream, d = tape("stream", self.shape.width), self.shape.width
        if self.back.norm != "exact":
            kept = tape("before", d, norm)
            return Mlp(stream, {kept: 1.0}, None, "identity", TEXT, "keep")
        kept = tape("before", d + 1, norm)
        mean = np.full((1, d), 1 / d) @ stream
        write = beside(
            place(0, d, d + 1), Matrix.of(-np.ones((d, 1))).placed(d + 1, 0), place(d, 1, d + 1)
        )
        hidden = concatenate(stream, mean, constant(self.known))
        return Mlp(hidden, {kept: write}, None, "identity", TEXT, "centre")

    def normal(self, tape: Tape, norm: int) -> Affine:
        """The normalised stream, before gain and offset."""
        d = self.shape.width
        if self.back.norm != "exact":
            return tape("normal", d, norm)
        return (1 / self.ratio) * tape("normal", d + 1, norm)[:d]

    def normalise(self, tape: Tape, norm: int) -> Layer:
        """normed = gain * normal + offset."""
        d, layout = self.shape.width, self.layout
        before = tape("before", d + (self.back.norm == "exact"), norm)
        kind = ("layer", self.shape.eps)
        if self.back.norm == "exact":
            kind = ("rms", self.shape.eps * d / (2 * (d + 1)))
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
        scale = self.times(self.normal(tape, norm), gain, {normed: 1.0}, "gain")
        return Layer(heads, scale, act, name=group)

    def prepare(self, tape: Tape, norm: int) -> list[Head]:
        """Of one-sided differences: what was normalised, to be moved along the gradient."""
        if self.back.norm != "finite-difference":
            return []
        before, moved = (tape(n, self.shape.width, norm) for n in ("before", "moved"))
        return [_self(before, moved, "move")]

    def gain(self, tape: Tape, norm: int) -> Mlp:
        """Back through the gain, and what each token says of it."""
        d = self.shape.width
        gain, error = tape("gain", d, norm), tape("d normed", d, norm)
        back, rate = tape("d normal", d, norm), tape("d gain", d, norm)
        one, none = Matrix.identity(d), Matrix((d, d))
        write = {back: one}
        if self.back.norm == "finite-difference":
            write[tape("moved", d, norm)] = self.back.step * one
        if not self.back.gains:
            return self.times(gain, error, write, "gain back")
        write = {slot: beside(m, none) for slot, m in write.items()} | {rate: beside(none, one)}
        both = concatenate(gain, self.normal(tape, norm))
        return self.times(both, concatenate(error, error), write, "gain back")

    def norm_back(self, tape: Tape, norm: int) -> Iterator[Layer]:
        """d stream += back through the normalisation; gain and offset descend."""
        d, group = self.shape.width, self.layout.norms[norm]
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
        if norm == 0 and not self.embeddings:  # what is below is not trained
            yield Layer(heads, name=name)
            return
        normal, back = self.normal(tape, norm), tape("d normal", d, norm)
        if self.back.norm == "finite-difference":
            moved, after = (tape(n, d, norm) for n in ("moved", "normal, moved"))
            act = Norm(moved, after, "layer", self.shape.eps, tokens=TEXT)
            heads.append(_self((1 / self.back.step) * (after - normal), down, "difference"))
            yield Layer(heads, norm=act, name=name)
            return
        if self.back.norm == "central":
            yield from self.central(tape, norm, heads, name)
            return
        # (I - 1 1^T / D - x x^T / D) d normal, then times 1 / sigma
        flat = tape("d normal, projected", d, norm)
        ones = np.ones((d, 1)) @ ONE
        heads += [
            _self(back, flat, "as it is"),
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
        act = self.times(flat, np.ones((d, 1)) @ inverse, {down: 1.0}, "1 / sigma")
        yield Layer(heads, act, name=name)

    def central(self, tape: Tape, norm: int, heads: list[Head], name: str) -> Iterator[Layer]:
        """Back by a difference along the gradient's direction u, times its size <u, g> / D."""
        d, step = self.shape.width, self.back.central / 10
        before, back = tape("before", d, norm), tape("d normal", d, norm)
        along = tape("direction", d, norm)
        moved = [tape(n, d, norm) for n in ("moved", "moved back")]
        after = [tape(f"normal, {n}", d, norm) for n in ("moved", "moved back")]
        heads = heads + [
            _self(before + sign * step * along, slot, "move")
            for sign, slot in zip((1, -1), moved, strict=True)
        ]
        yield Layer(heads, norm=direction(back, along), name=name)
        first, second = (
            Norm(slot, found, "layer", self.shape.eps, tokens=TEXT)
            for slot, found in zip(moved, after, strict=True)
        )
        yield Layer(norm=first, name=name)
        difference = Head(
            along, back, (0.5 / step) * (after[0] - after[1]), {tape("d stream", d): 1 / d},
            queries=TEXT, keys=TEXT, window=SELF, name="difference",
        )  # fmt: skip
        yield Layer([difference], norm=second, name=name)


def direction(read: Slot, write: Slot) -> Norm:
    """A vector over its root mean square; 0 stays 0."""
    return Norm(read, write, "rms", 1e-24, tokens=TEXT)


def _self(value: Affine, slot: Slot, name: str) -> Head:
    """slot += value, at every token of the text."""
    return Head(
        ONE, ONE, value, {slot: 1.0}, queries=TEXT, keys=TEXT, window=SELF, name=name
    )  # fmt: skip
