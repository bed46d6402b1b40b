"""Where TinT keeps things: kinds of tokens, weights in prefix tokens, activations in slots.

The tokens are, in this order,

    a group of K = width / stack tokens for each matrix [W b] of the auxiliary model: token k holds
        the rows k, K + k, 2 K + k, ... of it, one slot a row, and its number k as a one-hot vector;
    one token for each LayerNorm, with its gain and its offset;
    one token for each word of the vocabulary, with its embedding;
    the text: a token for each position, the only ones that carry activations.

Beside every weight there is a slot for its change, which is zero at first: the layers of a forward
pass read the sum of the two, so that a small step is not lost in the rounding of a large weight.

`contents` are the values that the tokens start with, `places` where the results are at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.core.slots import Affine, Slot, Slots
from constructions.core.weights import take_rows
from constructions.family import Place, Tokens
from constructions.interchange.decoder import MATRICES, DecoderShape, Weights

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

    def positions(self, group: str, time: int) -> range:
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
            "number", self.per_matrix, token_groups=(*owners.values(),), meaning="e_k at token k"
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
                        token_groups=tokens,
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
                name, self.shape.width, token_groups=self.norms, accumulates="change" in name
            )
            for name in ("gain", "offset", "gain change", "offset change")
        }

    @cached_property
    def embedding(self) -> Slot:
        """The slot of a word's embedding, at the word's own token and in the text."""
        return self.slots.add("embedding", self.shape.width, token_groups=(WORDS, TEXT))

    @cached_property
    def position(self) -> Slot:
        """The slot of the position embedding."""
        return self.slots.add("position", self.shape.width, token_groups=TEXT)

    @cached_property
    def trainable(self) -> Mapping[str, Slot]:
        """For training embeddings: their changes, and words as one-hot vectors."""
        d, both = self.shape.width, (WORDS, TEXT)
        return {
            "embedding change": self.slots.add(
                "embedding change", d, token_groups=WORDS, accumulates=True
            ),
            "position change": self.slots.add(
                "position change", d, token_groups=TEXT, accumulates=True
            ),
            "word": self.slots.add("word", self.shape.words, token_groups=both, meaning="one-hot"),
        }

    @cached_property
    def train(self) -> Slot:
        """1 where the auxiliary model is trained on the next word, else 0."""
        return self.slots.add("train", 1, token_groups=TEXT)

    def tape(self, name: str, size: int) -> Slot:
        """A new slot for an activation at the tokens of the text, kept to the end."""
        return self.slots.add(name, size, token_groups=TEXT, born=1, accumulates=True)


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


#: The last hidden states of the first pass and of the last.
Finals = tuple[Slot, Slot]


def contents(at: Layout, weights: Weights, tokens: Array, train_mask: Array) -> dict[str, Array]:
    """The values that the tokens start with, `{slot: [batch or 1, token, size]}`.

    The batch axis is 1 where all sequences hold the same; entries are 0 at tokens that do not own
    the slot. The mask of the last position counts as 0.
    """
    time, embedding = tokens.shape[1], weights["embedding"]
    held: dict[str, dict[str, Array]] = {s.name: {} for s in at.slots if not s.born}
    for (name, layer), matrix in at.matrices.items():
        for n, row in enumerate(matrix.rows):
            held[row.name][matrix.group] = weights[name][layer, matrix.part(n)]
        held[matrix.number.name][matrix.group] = jnp.eye(matrix.number.size, dtype=embedding.dtype)
    for name in ("gain", "offset"):
        held[name] = {group: weights[name][n, None] for n, group in enumerate(at.norms)}
    held["embedding"] = {WORDS: embedding, TEXT: take_rows(embedding, tokens)}
    held["position"] = {TEXT: weights["position"][:time]}
    if "word" in held:
        one_hot = jnp.eye(at.shape.words, dtype=embedding.dtype)
        held["word"] = {WORDS: one_hot, TEXT: take_rows(one_hot, tokens)}
    trained = jnp.where(jnp.arange(time) == time - 1, 0, train_mask).astype(embedding.dtype)
    held["train"] = {TEXT: trained[..., None]}
    dtype = embedding.dtype
    return {
        name: _along(at, time, pieces, at.slots[name].size, dtype) for name, pieces in held.items()
    }


def _along(at: Layout, time: int, pieces: Mapping[str, Array], size: int, dtype: Any) -> Array:
    """Put together what the kinds of tokens hold, `[(batch,) token, size]` each."""
    parts = []
    for group in at.groups:
        part = pieces.get(group, jnp.zeros((at.count(group, time), size), dtype))
        parts.append(part if part.ndim == 3 else part[None])
    most = max(map(len, parts))
    return jnp.concatenate([jnp.broadcast_to(p, (most, *p.shape[1:])) for p in parts], 1)


def token_groups(at: Layout, held: Mapping[str, Array], words: Array) -> list[Tokens]:
    """What `contents` found, one group of tokens after another; the text is read."""
    time, found = words.shape[1], []
    for group in at.groups:
        there = at.positions(group, time)
        own = {
            name: value[:, there.start : there.stop]
            for name, value in held.items()
            if group in (at.slots[name].token_groups or at.groups)
        }
        found.append(Tokens(group, own, read=group == TEXT))
    return found


def places(at: Layout, time: int, finals: Finals, scale: float, depth: int) -> dict[str, Place]:
    """Changes of the weights, times `scale`, in their prefix tokens, and the last hidden states."""
    found, layer = {}, np.asarray(depth)
    for name in MATRICES:
        matrices = [at.matrices[name, layer] for layer in range(at.shape.layers)]
        first = np.array([at.positions(m.group, time).start for m in matrices])
        rows, per = np.arange(matrices[0].size), matrices[0].number.size
        slots = np.array([slot.name for slot in matrices[0].changes], object)[rows // per]
        found[name] = Place(slots, first[:, None] + rows % per, layer, scale)
    norms = np.array([at.positions(group, time).start for group in at.norms])
    for name in ("gain", "offset"):
        found[name] = Place(at.norm[f"{name} change"].name, norms, layer, scale)
    for name, slot, tokens in _loose(at, time):
        found[name] = Place.of(slot.name, tokens, depth, scale)
    for name, slot in zip(("before", "after"), finals, strict=True):
        found[f"final_{name}"] = Place.of(slot.name, at.positions(TEXT, time), depth)
    return found


def collect(
    at: Layout, out: Mapping[str, Array], time: int, finals: Finals, scale: float
) -> dict[str, Array]:
    """The same values from the slots that the slot-wise evaluator gives."""

    def cut(slot: Slot, tokens: range) -> Array:
        return out[slot.name][:, tokens.start : tokens.stop]

    found = {}
    for name in MATRICES:
        matrices = [at.matrices[name, layer] for layer in range(at.shape.layers)]
        rows = [[cut(slot, at.positions(m.group, time)) for slot in m.changes] for m in matrices]
        found[name] = scale * jnp.stack([jnp.concatenate(parts, 1) for parts in rows], 1)
    norms = range(at.positions(at.norms[0], time).start, at.positions(at.norms[-1], time).stop)
    for name in ("gain", "offset"):
        found[name] = scale * cut(at.norm[f"{name} change"], norms)
    for name, slot, tokens in _loose(at, time):
        found[name] = scale * cut(slot, tokens)
    for name, slot in zip(("before", "after"), finals, strict=True):
        found[f"final_{name}"] = cut(slot, at.positions(TEXT, time))
    return found


def _loose(at: Layout, time: int) -> list[tuple[str, Slot, range]]:
    """(name, its change, tokens) of words and positions where they are trained."""
    if all(slot.name != "word" for slot in at.slots):
        return []
    tokens = {"embedding": at.positions(WORDS, time), "position": at.positions(TEXT, time)}
    return [(name, at.trainable[f"{name} change"], own) for name, own in tokens.items()]
