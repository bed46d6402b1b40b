"""How named values enter the residual stream, and where they are found in it.

A program refers to slots by name, and so does what surrounds it: a family defines which `Tokens`
its inputs become and where (`Place`) a compiled model keeps the values of the algorithm; columns of
the stream are known here and in the compiler alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from constructions.core.program import Program
from constructions.core.slots import Affine, Slots
from constructions.core.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens that follow one another, and what their slots hold.

    Attributes:
        kind: the token group of all of them, or the number of each one's group, `[token]` or
            `[batch, token]`.
        values: {slot name: `[batch or 1, token or 1, slot.size]`, or one number for all entries};
            other slots are 0.
        words: of a language model, `[batch, token]`: rows of its embedding table.
        read: whether the prediction is read from these tokens.
    """

    kind: str | Array | np.ndarray
    values: Mapping[str, Array | float] = field(default_factory=dict)
    words: Array | None = None
    read: bool = False

    def shape(self) -> tuple[int, int]:
        """(batch, tokens); either is 1 where the values are broadcast along it."""
        shapes = [np.shape(value)[:2] for value in self.values.values()]
        if self.words is not None:
            shapes.append(self.words.shape)
        batch, count = np.broadcast_shapes((1, 1), *shapes)
        return int(batch), int(count)


class Stream(NamedTuple):
    """Inputs as a model takes them.

    Attributes:
        values: the residual stream, `[batch, token, width]`.
        groups: the kind of every token, `[token]` or `[batch, token]`.
        read: the tokens from which the prediction is read.
    """

    values: Array
    groups: Array
    read: slice


def make_stream(program: Program, model: Transformer, tokens: Sequence[Tokens]) -> Stream:
    """The residual stream of these tokens, one after the other, as the model takes it.

    The model's stream may be wider than the program's; columns that no slot takes are 0. With the
    embedding table of a language model a row of it is added at every token that has a word.
    """
    if model.config.token_groups != program.token_groups:
        raise ValueError(
            f"the model's token groups are {model.config.token_groups}, must be those of program "
            f"'{program.name}', {program.token_groups}; a model with a null token is read through "
            "`constructions.softened.Softened`"
        )
    named = any(part.values for part in tokens)  # words come from the model's own table
    if named and model.config.width < program.slots.width:
        raise ValueError(
            f"the model's stream has {model.config.width} columns, program '{program.name}' "
            f"needs {program.slots.width}"
        )
    sizes = [part.shape() for part in tokens]
    (batch,) = np.broadcast_shapes(*((size,) for size, _ in sizes))
    groups = [
        _kinds(program, part.kind, count) for part, (_, count) in zip(tokens, sizes, strict=True)
    ]
    lead = max((g.shape[:-1] for g in groups), key=len)
    held = [value for part in tokens for value in part.values.values()]
    weights = jax.tree.leaves(nnx.state(model, nnx.Param))  # a program without layers has none
    dtype = jnp.result_type(*weights[:1] or (float,), *held)
    parts = [
        _rows(program.slots, part.values, (batch, count, model.config.width), dtype)
        for part, (_, count) in zip(tokens, sizes, strict=True)
    ]
    stream = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    words = [part.words for part in tokens if part.words is not None]
    if words:
        assert len(words) == len(tokens), "either all tokens are words or none is"
        stream = stream + model.embed(jnp.concatenate(words, axis=1))
    kinds = np.concatenate if all(isinstance(g, np.ndarray) for g in groups) else jnp.concatenate
    joined = kinds([jnp.broadcast_to(g, (*lead, g.shape[-1])) if lead else g for g in groups], -1)
    ends = np.cumsum([count for _, count in sizes])
    read = [n for n, part in enumerate(tokens) if part.read]
    first, last = (read[0], read[-1]) if read else (0, len(tokens) - 1)
    start = int(ends[first]) - sizes[first][1]
    return Stream(stream, jnp.asarray(joined), slice(start, int(ends[last])))


def _kinds(program: Program, kind: str | Array | np.ndarray, count: int) -> Array | np.ndarray:
    if not isinstance(kind, str):
        return kind
    if kind not in program.token_groups:
        raise ValueError(f"unknown token group '{kind}', must be one of {program.token_groups}")
    return np.full(count, program.token_groups.index(kind))


def _rows(
    slots: Slots, values: Mapping[str, Array | float], shape: tuple[int, int, int], dtype: Any
) -> Array:
    """Tokens `[batch, token, width]` that hold these values in their slots, and 0 elsewhere."""
    *lead, width = shape
    parts, end = [], 0
    for name, value in sorted(values.items(), key=lambda item: slots[item[0]].start):
        slot = slots[name]
        if np.ndim(value) and np.shape(value)[-1] != slot.size:
            raise ValueError(f"'{name}' has shape {np.shape(value)}, its slot {slot.size} columns")
        if slot.start < end:
            raise ValueError(f"'{name}' shares columns with another slot of the same tokens")
        parts.append(jnp.zeros((*lead, slot.start - end), dtype))
        parts.append(jnp.broadcast_to(jnp.asarray(value, dtype), (*lead, slot.size)))
        end = slot.start + slot.size
    parts.append(jnp.zeros((*lead, width - end), dtype))
    return jnp.concatenate([p for p in parts if p.shape[-1]], axis=-1)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a compiled model keeps a value of the trace.

    Entry `[..., k]` of the value (without its batch axis) is

        scale * stream[layer[...], :, token[...], column k of slot[...]],

    where layer l counts the layers applied (0 is the embedding). The three arrays broadcast against
    each other to the value's shape without its last axis, which runs over the columns of a slot.

    Attributes:
        slot: a name, or an array of names of slots of one size.
        token: numbers of tokens.
        layer: numbers of layers.
        scale: what the model keeps is the value over this.
    """

    slot: str | np.ndarray
    token: np.ndarray
    layer: np.ndarray
    scale: float = 1.0

    @classmethod
    def of(cls, slot: str, tokens: range, layers: Any, scale: float = 1.0) -> Place:
        """One slot at some tokens: a value `[token, size]`, or `[layer, token, size]`.

        Args:
            slot: its name.
            tokens: where it is.
            layers: a number, or several.
            scale: see the class.
        """
        layer = np.asarray(layers)
        return cls(slot, np.asarray(tokens), layer[:, None] if layer.ndim else layer, scale)

    def columns(self, slots: Slots) -> np.ndarray:
        """Columns of the stream, `[..., size]`, with as many axes as `slot`, and the last."""
        names = np.asarray(self.slot, object)
        found = [slots[name] for name in names.ravel()]
        if len({slot.size for slot in found}) != 1:
            raise ValueError(f"slots {found} are of different sizes, one place needs one size")
        starts = np.array([slot.start for slot in found]).reshape(names.shape)
        return starts[..., None] + np.arange(found[0].size)

    def gather(self, residual: Array, slots: Slots) -> Array:
        """The value, `[batch, ...]`, from residuals `[layer, batch, token, width]`."""
        columns = self.columns(slots)
        index = np.broadcast_arrays(self.layer[..., None], self.token[..., None], columns)
        return self.scale * jnp.moveaxis(residual, 1, 0)[:, index[0], index[1], index[2]]

    def from_output(self, model: Transformer, stream: Stream, slots: Slots) -> Array:
        """The value, `[batch, ...]`, of a model's last layer; computes only the tokens it needs."""
        first, last, columns = int(self.token.min()), int(self.token.max()), self.columns(slots)
        out = model(stream.values, stream.groups, read=slice(first, last + 1))
        if columns.ndim == 1 and self.token.shape == (last + 1 - first,):
            # the usual case, a block: a slice is much faster to differentiate than a gather
            return self.scale * out[..., columns[0] : columns[-1] + 1]
        tokens, columns = np.broadcast_arrays((self.token - first)[..., None], columns)
        return self.scale * out[:, tokens, columns]


@dataclass(frozen=True, eq=False)
class Gauge:
    """What the embedding and the readout leave of a model's first and last layer.

    Only `read @ stream` is read from the tokens that are read, `[rows, width]`, and those tokens
    enter the model as `query @ (their free values)`, `[width, values]`. Weights that these two
    maps annihilate have no effect, so comparisons of weights leave them out. `kinds` are the token
    groups of the tokens that are read, None where that is not known; no other token enters through
    `query`, and nobody sees what the last layer writes to tokens of other kinds.
    """

    read: np.ndarray
    query: np.ndarray
    kinds: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        slots: Slots,
        read: Affine,
        query: Mapping[str, Any],
        kinds: tuple[str, ...] | None = None,
    ) -> Gauge:
        """From what is read, an expression of slots, and what the slots of a query hold.

        Args:
            slots: of the program.
            read: rows of the stream.
            query: {slot name: matrix `[slot.size, values]`} on the query's free values.
            kinds: see the class.
        """
        entering = {name: np.asarray(matrix, float) for name, matrix in query.items()}
        free = np.zeros((slots.width, next(iter(entering.values())).shape[1]))
        for name, matrix in entering.items():
            free[slots[name].columns] = matrix
        return cls(read.matrix(slots.width), free, kinds)
