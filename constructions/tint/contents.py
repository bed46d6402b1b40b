"""What TinT's tokens hold at first, and where the results stand at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.family import Place
from constructions.indices import take_rows
from constructions.slots import Slot
from constructions.tint.layout import TEXT, WORDS, Layout
from constructions.tint.weights import MATRICES, Weights

#: The last hidden states of the first pass and of the last.
Finals = tuple[Slot, Slot]


def contents(at: Layout, weights: Weights, tokens: Array, train_mask: Array) -> dict[str, Array]:
    """What the tokens hold at first, `{slot: [batch or 1, token, size]}`.

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


def places(at: Layout, time: int, finals: Finals, scale: float, depth: int) -> dict[str, Place]:
    """Changes of the weights, times `scale`, in their prefix tokens, and the last hidden states."""
    found = {}
    for name in MATRICES:
        matrices = [at.matrices[name, layer] for layer in range(at.shape.layers)]
        first = np.array([at.tokens(m.group, time).start for m in matrices])
        rows, per = np.arange(matrices[0].size), matrices[0].number.size
        columns = np.array([slot.start for slot in matrices[0].changes])[rows // per]
        found[name] = Place(
            np.asarray(depth),
            (first[:, None] + rows % per)[..., None],
            columns[:, None] + np.arange(matrices[0].changes[0].size),
            scale,
        )
    norms = np.array([at.tokens(group, time).start for group in at.norms])
    for name in ("gain", "offset"):
        slot = at.norm[f"{name} change"]
        columns = slot.start + np.arange(slot.size)
        found[name] = Place(np.asarray(depth), norms[:, None], columns, scale)
    for name, slot, tokens in _loose(at, time):
        found[name] = Place.of(slot, tokens, depth, scale)
    for name, slot in zip(("before", "after"), finals, strict=True):
        found[f"final_{name}"] = Place.of(slot, at.tokens(TEXT, time), depth)
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
        rows = [[cut(slot, at.tokens(m.group, time)) for slot in m.changes] for m in matrices]
        found[name] = scale * jnp.stack([jnp.concatenate(parts, 1) for parts in rows], 1)
    norms = range(at.tokens(at.norms[0], time).start, at.tokens(at.norms[-1], time).stop)
    for name in ("gain", "offset"):
        found[name] = scale * cut(at.norm[f"{name} change"], norms)
    for name, slot, tokens in _loose(at, time):
        found[name] = scale * cut(slot, tokens)
    for name, slot in zip(("before", "after"), finals, strict=True):
        found[f"final_{name}"] = cut(slot, at.tokens(TEXT, time))
    return found


def _loose(at: Layout, time: int) -> list[tuple[str, Slot, range]]:
    """(name, its change, tokens) of words and positions where they are trained."""
    if all(slot.name != "word" for slot in at.slots):
        return []
    tokens = {"embedding": at.tokens(WORDS, time), "position": at.tokens(TEXT, time)}
    return [(name, at.trainable[f"{name} change"], own) for name, own in tokens.items()]
