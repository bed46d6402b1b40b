"""The layers of TinT: a decoder's forward pass, its backward pass and its update, as heads.

`Prefix` has the heads of a matrix, `Words` embeddings and the readout, `constructions.tint.parts`
attention and LayerNorms; `Tableau` puts them together. Panigrahi, Malladi, Xia, Arora 2023
(arXiv 2307.01189) stop at the gradient of attention's values and take finite differences of
LayerNorm and activation; `Backward` chooses for each part. The paper overwrites its slots,
behind gates, and carries weights past modules by skips; here every value has a slot of its own,
nothing is erased and one pass from layer to layer is all.

Matrices. Three linear heads for each row that a prefix token holds. With token k holding row k of
[W b] and the one-hot number e_k,

    y   =  sum_k <[w_k b_k], (x, 1)> e_k          the text looks at the matrix    W x + b
    dx  =  sum_k <e_k, dy> w_k                    the text looks at the matrix    W^T dy
    [w_k b_k]  -=  eta sum_t <e_k, dy_t> (x_t, 1) the matrix looks at the text    dy x^T

Panigrahi et al. 2023 (arXiv 2307.01189), sections on linear layers; their stacking is the rows of
a token, their sharding the parts into which a row is cut.

Words and positions are looked up, scored and, where they are trained, changed. With p_t(v) the
probability of word v behind position t, m_t the mask and h_t the last hidden state,

    d h_t  =  m_t (sum_v p_t(v) E_v - E_x(t+1)),
    d E_v  =  sum_t m_t (p_t(v) - [v follows t]) h_t  +  sum_(t with word v) d (E_v + P_t).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from constructions.core.matrices import Matrix, beside
from constructions.core.program import SELF, Head, Layer, Mlp, Program
from constructions.core.slots import Affine, Slot, concatenate
from constructions.interchange.decoder import DecoderShape
from constructions.tint.algorithm import Backward
from constructions.tint.layout import TEXT, WORDS, Layout, StoredMatrix, Tape
from constructions.tint.parts import (
    ONE,
    LayerNorms,
    attend,
    direction,
    itself,
    score_backward,
    score_differences,
    times,
    value_backward,
)


class Prefix(NamedTuple):
    """A matrix, the learning rate of its descent, and the number of parts of a row."""

    weights: StoredMatrix
    rate: float
    shards: int

    def apply(self, x: Affine, y: Slot) -> list[Head]:
        """y += W x + b."""
        w, augmented = self.weights, concatenate(x, ONE)
        return [
            Head(
                query=augmented[part],
                key=w.now(row)[part],
                value=w.number,
                write={y[w.part(row)]: 1.0},
                queries=TEXT,
                keys=w.group,
                name=f"{w.group}, row {row}",
            )
            for row in range(len(w.rows))
            for part in self._parts(augmented.size)
        ]

    def transpose(self, dy: Slot, dx: Slot) -> list[Head]:
        """dx += W^T dy."""
        w = self.weights
        return [
            Head(
                query=dy[w.part(row)],
                key=w.number,
                value=w.now(row)[part],
                write={dx[part]: 1.0},
                queries=TEXT,
                keys=w.group,
                name=f"{w.group} transposed, row {row}",
            )
            for row in range(len(w.rows))
            for part in self._parts(dx.size)
        ]

    def descend(self, dy: Slot, x: Slot) -> list[Head]:
        """[W b] -= eta sum_t dy_t (x_t, 1)^T."""
        w, augmented = self.weights, concatenate(x, ONE)
        return [
            Head(
                query=w.number,
                key=dy[w.part(row)],
                value=augmented[part],
                write={change[part]: -self.rate},
                queries=w.group,
                keys=TEXT,
                name=f"{w.group} descends, row {row}",
            )
            for row, change in enumerate(w.changes)
            for part in self._parts(augmented.size)
        ]

    def _parts(self, size: int) -> list[slice]:
        cuts = np.linspace(0, size, self.shards + 1).astype(int).tolist()
        return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


NEXT = (1, 1)


@dataclass(frozen=True)
class Words:
    """The heads between tokens of words and the text.

    Attributes:
        layout: slots of embeddings and positions.
        rate: eta, of their descent.
        trained: whether they are.
    """

    layout: Layout
    rate: float
    trained: bool

    @property
    def now(self) -> Affine:
        """Embeddings at the tokens of words, with what was changed."""
        if not self.trained:
            return self.layout.embedding
        return self.layout.embedding + self.layout.trainable["embedding change"]

    def enter(self, tape: Tape, stream: Slot) -> list[Head]:
        """stream = embedding + position; those of now are looked up where they are trained."""
        embedding, position = self.layout.embedding, self.layout.position
        if not self.trained:
            return [itself(embedding + position, stream, "enter")]
        own = self.layout.trainable
        current, word = tape("embedding", embedding.size), own["word"]
        following = tape("next word", word.size)
        return [
            itself(position + own["position change"], stream, "position"),
            Head(
                word, word, self.now, {stream: 1.0, current: 1.0}, queries=TEXT, keys=WORDS,
                name="look up",
            ),
            Head(
                ONE, ONE, word, {following: 1.0}, queries=TEXT, keys=TEXT, window=NEXT,
                name="next word",
            ),
        ]  # fmt: skip

    def readout_backward(self, tape: Tape, final: Slot, guess: Slot) -> list[Head]:
        """guess_t += sum_v p_t(v) E_v - E_x(t+1), and the descent of the readout."""
        layout = self.layout
        current = tape("embedding", layout.embedding.size) if self.trained else layout.embedding
        heads = [
            Head(
                final, self.now, self.now, {guess: 1.0}, "softmax", TEXT, WORDS,
                name="expected embedding",
            ),
            Head(
                ONE, ONE, current, {guess: -1.0}, queries=TEXT, keys=TEXT, window=NEXT,
                name="next embedding",
            ),
        ]  # fmt: skip
        if not self.trained:
            return heads
        change, word = layout.trainable["embedding change"], layout.trainable["word"]
        wiring = {"queries": WORDS, "keys": TEXT, "factor": (ONE, layout.train)}
        heads += [
            Head(
                self.now, final, final, {change: -self.rate}, "transposed_softmax",
                name="readout descends", **wiring,
            ),
            Head(
                word, tape("next word", word.size), final, {change: self.rate},
                name="readout ascends", **wiring,
            ),
        ]  # fmt: skip
        return heads

    def enter_backward(self, down: Slot) -> list[Head]:
        """Embeddings and positions descend as inputs, whose gradient is `down`."""
        own = self.layout.trainable
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


@dataclass(frozen=True)
class Tableau:
    """Makes the program.

    Attributes:
        layout: slots of weights.
        backward: how each part of the decoder is differentiated.
        steps: of gradient descent.
        rate: eta, on the summed loss.
        shards: parts into which the columns of a matrix are cut, one head for each.
        embeddings: whether words and positions are trained.
    """

    layout: Layout
    backward: Backward
    steps: int
    rate: float
    shards: int = 1
    embeddings: bool = False
    tapes: list[Tape] = field(default_factory=list)

    @property
    def shape(self) -> DecoderShape:
        """The shape of the auxiliary model."""
        return self.layout.shape

    @cached_property
    def norms(self) -> LayerNorms:
        """Its LayerNorms: numbers 2 n and 2 n + 1 in layer n, then the final one."""
        return LayerNorms(self.layout, self.backward, self.rate, self.embeddings)

    @cached_property
    def words(self) -> Words:
        """Its embeddings and positions."""
        return Words(self.layout, self.rate, self.embeddings)

    def matrix(self, layer: int) -> dict[str, Prefix]:
        """The matrices of a layer by name."""
        return {
            name: Prefix(w, self.rate, self.shards)
            for (name, n), w in self.layout.matrices.items()
            if n == layer
        }

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
                layers += self.backward_layers(self.tapes[-1])
        return Program(fixed.slots, layers, token_groups=fixed.groups, name="tint")

    def forward(self, tape: Tape) -> Iterator[Layer]:
        """One pass of the auxiliary model; its last hidden state is the last "normed"."""
        d = self.shape.width
        stream = tape("stream", d)
        yield Layer(self.words.enter(tape, stream), self.norms.keep(tape, 0), name="enter")
        for layer in range(self.shape.layers):
            q, k, v, y = (tape(n, d, layer) for n in ("query", "key", "value", "mixed"))
            matrix = self.matrix(layer)
            yield self.norms.normalise(tape, 2 * layer)
            read = tape("normed", d, 2 * layer)
            heads = [
                head
                for name, slot in (("query", q), ("key", k), ("value", v))
                for head in matrix[name].apply(read, slot)
            ]
            yield Layer(heads, name=f"queries, keys, values {layer}")
            yield Layer(attend(self.shape, q, k, v, y), name=f"attention {layer}")
            heads = matrix["output"].apply(y, stream)
            yield Layer(heads, self.norms.keep(tape, 2 * layer + 1), name=f"output {layer}")
            yield self.norms.normalise(tape, 2 * layer + 1)
            read = tape("normed", d, 2 * layer + 1)
            hidden, active = (tape(n, self.shape.hidden, layer) for n in ("hidden", "active"))
            act = Mlp(hidden, {active: 1.0}, activation=self.shape.activation, token_groups=TEXT)
            heads = matrix["hidden"].apply(read, hidden)
            yield Layer(heads, act, name=f"hidden {layer}")
            heads = matrix["back"].apply(active, stream)
            yield Layer(heads, self.norms.keep(tape, 2 * layer + 2), name=f"back {layer}")
        yield self.norms.normalise(tape, 2 * self.shape.layers)

    def backward_layers(self, tape: Tape) -> Iterator[Layer]:
        """The gradient of the summed loss, and the changes of all weights."""
        d = self.shape.width
        final, last = tape("normed", d, 2 * self.shape.layers), 2 * self.shape.layers
        guess, error = tape("expected - next embedding", d), tape("d normed", d, last)
        chosen = times(guess, np.ones((d, 1)) @ self.layout.train, {error: 1.0}, "train mask")
        yield Layer(self.words.readout_backward(tape, final, guess), chosen, name="loss")
        heads, act = self.norms.prepare(tape, last), self.norms.gain_backward(tape, last)
        yield Layer(heads, act, name="final gain, backward")
        yield from self.norms.norm_backward(tape, last)
        for layer in reversed(range(self.shape.layers)):
            yield from self.mlp_backward(tape, layer)
            yield from self.attention_backward(tape, layer)
        if self.embeddings:
            yield Layer(self.words.enter_backward(tape("d stream", d)), name="embeddings, backward")

    def mlp_backward(self, tape: Tape, layer: int) -> Iterator[Layer]:
        """Backward pass through norm, hidden layer and activation."""
        d, size, norm = self.shape.width, self.shape.hidden, 2 * layer + 1
        matrix, down = self.matrix(layer), tape("d stream", d)
        hidden, active = (tape(n, size, layer) for n in ("hidden", "active"))
        d_hidden, d_active = (tape(f"d {n}", size, layer) for n in ("hidden", "active"))
        heads = matrix["back"].transpose(down, d_active)
        heads += matrix["back"].descend(down, active)
        if self.backward.activation == "exact":
            kind = f"{self.shape.activation}_derivative"
            act = Mlp(hidden, {d_hidden: 1.0}, d_active, kind, TEXT, "activation, backward")
        else:
            moved = concatenate(hidden + self.backward.step * d_active, hidden)
            both = Matrix.identity(size, 1 / self.backward.step)
            write = beside(both, -1.0 * both)
            act = Mlp(moved, {d_hidden: write}, None, self.shape.activation, TEXT, "difference")
        yield Layer(heads, act, name=f"back {layer}, backward")
        heads = matrix["hidden"].transpose(d_hidden, tape("d normed", d, norm))
        heads += matrix["hidden"].descend(d_hidden, tape("normed", d, norm))
        heads += self.norms.prepare(tape, norm)
        yield Layer(heads, self.norms.gain_backward(tape, norm), name=f"hidden {layer}, backward")
        yield from self.norms.norm_backward(tape, norm)

    def attention_backward(self, tape: Tape, layer: int) -> Iterator[Layer]:
        """Backward pass through norm, projections and attention."""
        d, norm = self.shape.width, 2 * layer
        matrix, down = self.matrix(layer), tape("d stream", d)
        names = ("value",) if self.backward.attention == "value-only" else ("query", "key", "value")
        errors = {name: tape(f"d {name}", d, layer) for name in names}
        y, dy = tape("mixed", d, layer), tape("d mixed", d, layer)
        heads = matrix["output"].transpose(down, dy) + matrix["output"].descend(down, y)
        products = None
        if self.backward.attention == "exact":
            mean = tape("<dy, y>", self.shape.heads, layer)
            each = np.kron(np.eye(self.shape.heads), np.ones((1, d // self.shape.heads)))
            products = times(dy, y, {mean: each}, "<dy, y>")
        yield Layer(heads, products, name=f"output {layer}, backward")
        yield from self.mixing_backward(tape, layer)
        read, d_read = tape("normed", d, norm), tape("d normed", d, norm)
        heads = []
        for name, slot in errors.items():
            heads += matrix[name].transpose(slot, d_read)
            heads += matrix[name].descend(slot, read)
        heads += self.norms.prepare(tape, norm)
        name = f"queries, keys, values {layer}, backward"
        yield Layer(heads, self.norms.gain_backward(tape, norm), name=name)
        yield from self.norms.norm_backward(tape, norm)

    def mixing_backward(self, tape: Tape, layer: int) -> Iterator[Layer]:
        """Backward pass from attention's output to values, queries and keys."""
        d, shape, name = self.shape.width, self.shape, f"attention {layer}, backward"
        q, k, v = (tape(n, d, layer) for n in ("query", "key", "value"))
        dy, dv = (tape(n, d, layer) for n in ("d mixed", "d value"))
        heads = value_backward(shape, q, k, dy, dv)
        if self.backward.attention == "value-only":
            yield Layer(heads, name=name)
            return
        dq, dk = (tape(n, d, layer) for n in ("d query", "d key"))
        if self.backward.attention == "exact":
            mean = tape("<dy, y>", shape.heads, layer)
            yield Layer(heads + score_backward(shape, (q, k, v, dy, mean), (dq, dk)), name=name)
            return
        # along directions of unit size, then times the sizes
        along, size = tape("direction of d mixed", d, layer), tape("size of d mixed", 1, layer)
        sized, unsized = (tape(f"{n}, sized", d, layer) for n in ("query", "d query over"))
        measure = Head(
            along, dy, ONE, {size: 1 / d}, queries=TEXT, keys=TEXT, window=SELF, name="size"
        )
        sizes = np.ones((d, 1)) @ size
        scale = times(q, sizes, {sized: 1.0}, "sized queries")
        yield Layer([measure], scale, direction(dy, along), name=name)
        given = (q, k, v, along, sized)
        heads += score_differences(shape, self.backward.central, given, (unsized, dk))
        yield Layer(heads, times(unsized, sizes, {dq: 1.0}, "sized"), name=name)
