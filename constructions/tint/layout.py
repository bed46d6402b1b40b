"""Where TinT keeps things: kinds of tokens, weights in prefix tokens, activations in slots.

The tokens are, in this order,

    a group of K = width / stack tokens for each matrix [W b] of the auxiliary model: token k holds
        the rows k, K + k, 2 K + k, ... of it, one slot a row, and its number k as a one-hot vector;
    one token for each LayerNorm, with its gain and its offset;
    one token for each word of the vocabulary, with its embedding;
    the text: a token for each position, the only ones that carry activations.

Beside every weight there is a slot for its change, which is zero at first: the layers of a forward
pass read the sum of the two, so that a small step is not lost in the rounding of a large weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from constructions.slots import Affine, Slot, Slots
from constructions.tint.auxiliary import DecoderShape
from constructions.tint.weights import MATRICES

TEXT, WORDS = "text", "words"


class StoredMatrix(NamedTuple):
    """A matrix [W b] in prefix tokens; slot s at token k of the group has row s K + k.

    Attributes:
        group: its kind of tokens.
        rows, changes: one slot each for every row that a token holds, `[columns + 1]`.
        number: the slot with the token's number as a one-hot vector, `[K]`.
    """

    group: str
    rows: tuple[Slot, ...]
    changes: tuple[Slot, ...]
    number: Slot

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return len(self.rows) * self.number.size

    def now(self, row: int) -> Affine:
        """The rows of slot `row` with what was changed."""
        return self.rows[row] + self.changes[row]

    def part(self, row: int) -> slice:
        """Which rows of the matrix slot `row` holds, over the tokens."""
        return slice(row * self.number.size, (row + 1) * self.number.size)


@dataclass(frozen=True)
class Layout:
    """The slots that do not depend on the pass; activations are added by `tape`.

    Attributes:
        shape: of the auxiliary model.
        stack: rows of a square matrix that one prefix token holds, a divisor of the width.
    """

    shape: DecoderShape
    stack: int = 1

    def sizes(self, matrix: str) -> tuple[int, int]:
        """(rows, columns) of one of the `MATRICES`, without its bias."""
        rows = self.shape.hidden if matrix == "hidden" else self.shape.width
        return rows, self.shape.hidden if matrix == "back" else self.shape.width

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """The groups of the tokens with LayerNorms: two a layer, then the final one."""
        return tuple(f"norm {n}" for n in range(2 * self.shape.layers + 1))

    @cached_property
    def slots(self) -> Slots:
        """All slots so far."""
        return Slots()

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Kinds of tokens, in the order in which the tokens stand."""
        matrices = (
            self.group(name, layer) for layer in range(self.shape.layers) for name in MATRICES
        )
        return (*matrices, *self.norms, WORDS, TEXT)

    @staticmethod
    def group(matrix: str, layer: int) -> str:
        """The kind of token that holds a matrix."""
        return f"{matrix} {layer}"

    @property
    def per_matrix(self) -> int:
        """K, tokens of one matrix."""
        return self.shape.width // self.stack

    def count(self, group: str, time: int) -> int:
        """How many tokens of a kind there are, for texts of `time` tokens."""
        if group in self.norms:
            return 1
        return {WORDS: self.shape.words, TEXT: time}.get(group, self.per_matrix)

    def kinds(self, time: int) -> np.ndarray:
        """The kind of every token, `[token]`."""
        counts = [self.count(group, time) for group in self.groups]
        return np.repeat(np.arange(len(counts)), counts)

    def tokens(self, group: str, time: int) -> range:
        """The tokens of a kind."""
        counts = [self.count(g, time) for g in self.groups]
        n = self.groups.index(group)
        return range(sum(counts[:n]), sum(counts[: n + 1]))

    @cached_property
    def matrices(self) -> Mapping[tuple[str, int], StoredMatrix]:
        """Every matrix of the auxiliary model, by name and layer."""
        owners = {
            (name, layer): self.group(name, layer)
            for layer in range(self.shape.layers)
            for name in MATRICES
        }
        number = self.slots.add(
            "number", self.per_matrix, tokens=(*owners.values(),), meaning="e_k at token k"
        )
        rows: dict[tuple[str, int], Slot] = {}

        def slots_of(kind: str, name: str) -> tuple[Slot, ...]:
            height, width = self.sizes(name)
            found = []
            for n in range(height // self.per_matrix):
                # matrices of a shape have their slots in common: their tokens are others
                key = (f"{kind} of {width}", n)
                if key not in rows:
                    tokens = tuple(
                        group
                        for (other, _), group in owners.items()
                        if self.sizes(other)[1] == width
                        and self.sizes(other)[0] // self.per_matrix > n
                    )
                    rows[key] = self.slots.add(
                        f"{kind} {n} of {width}",
                        width + 1,
                        tokens=tokens,
                        accumulates=kind == "change",
                        meaning=f"row {n} K + k of [W b] at token k"
                        + (", how much it was changed" if kind == "change" else ""),
                    )
                found.append(rows[key])
            return tuple(found)

        return {
            m: StoredMatrix(group, slots_of("row", m[0]), slots_of("change", m[0]), number)
            for m, group in owners.items()
        }

    @cached_property
    def norm(self) -> Mapping[str, Slot]:
        """gain, offset and their changes, at the tokens of the LayerNorms."""
        return {
            name: self.slots.add(
                name, self.shape.width, tokens=self.norms, accumulates="change" in name
            )
            for name in ("gain", "offset", "gain change", "offset change")
        }

    @cached_property
    def embedding(self) -> Slot:
        """Of a word, at its token and wherever it stands in the text."""
        return self.slots.add("embedding", self.shape.width, tokens=(WORDS, TEXT))

    @cached_property
    def position(self) -> Slot:
        """Of a place in the text."""
        return self.slots.add("position", self.shape.width, tokens=TEXT)

    @cached_property
    def trainable(self) -> Mapping[str, Slot]:
        """For training embeddings: their changes, and words as one-hot vectors."""
        d, both = self.shape.width, (WORDS, TEXT)
        return {
            "embedding change": self.slots.add(
                "embedding change", d, tokens=WORDS, accumulates=True
            ),
            "position change": self.slots.add("position change", d, tokens=TEXT, accumulates=True),
            "word": self.slots.add("word", self.shape.words, tokens=both, meaning="one-hot"),
        }

    @cached_property
    def train(self) -> Slot:
        """Whether the auxiliary model is trained on what it says here of the next word: 1 or 0."""
        return self.slots.add("train", 1, tokens=TEXT)

    def tape(self, name: str, size: int) -> Slot:
        """A new slot for an activation at the tokens of the text, kept to the end."""
        return self.slots.add(name, size, tokens=TEXT, born=1, accumulates=True)


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
