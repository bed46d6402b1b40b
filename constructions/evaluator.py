"""The second back end: a program run slot by slot, without dense width x width matrices.

    evaluate(program, {name: [batch, token, size]}, groups) -> {name: [batch, token, size]}
    counts(program)                                         -> sizes, without building a model

The stream is kept as blocks of columns, cut where some slot begins or ends, so that slots that
share columns see the same numbers as in the compiled model, and a head touches only what it reads
and writes. Per layer, heads with the same wiring run as one batch, with the matrices that they
have in common stored once; a head that looks at one offset computes one score a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.compiler import check, config_of
from constructions.config import WIRING
from constructions.layer import ACTIVATIONS
from constructions.mixers import MIXERS
from constructions.program import Head, HeadFamily, Layer, Program
from constructions.slots import Affine, Slot

Blocks = dict[tuple[int, int], Array]  # columns (start, stop) -> [batch, token, stop - start]


@dataclass(frozen=True)
class Counts:
    """Sizes of a program.

    Attributes:
        width, layers: of the compiled model; layers counts those that are applied.
        heads, max_heads, max_head_rows: in all stored layers, in one layer, and the most key or
            value rows of a head.
        stored: nonzero entries of all affine maps and writes; a looped layer counts once.
        dense: trainable entries of the compiled model.
    """

    width: int
    layers: int
    heads: int
    max_heads: int
    max_head_rows: int
    stored: int
    dense: int


def counts(program: Program) -> Counts:
    """Sizes of a program and of the model that it compiles to, which is not built."""
    parts = [part for layer in program.layers for part in layer.heads]
    heads = [part for part in parts if isinstance(part, Head)]
    families = [part for part in parts if isinstance(part, HeadFamily)]
    mlps = [layer.mlp for layer in program.layers if layer.mlp is not None]
    maps = [e for h in heads for e in (h.query, h.key, h.value)]
    maps += [e for m in mlps for e in (m.hidden, m.gate) if e is not None]
    stored = sum(np.count_nonzero(a) for e in maps for a in (*e.terms.values(), e.constant))
    stored += sum(np.count_nonzero(m) for part in (*heads, *mlps) for m in part.write.values())
    # of each head of a family: the ones in its query, its value and its write, and its keys
    stored += sum(f.write.size * (f.rows + 2) for f in families)
    stored += sum(np.count_nonzero(tensor) for f in families for *_, tensor in f.terms)
    rows = [max(h.key.size, h.value.size) for h in heads] + [f.rows for f in families]
    return Counts(
        width=program.slots.width,
        layers=program.depth,
        heads=sum(map(_heads_in, parts)),
        max_heads=max(sum(map(_heads_in, layer.heads)) for layer in program.layers),
        max_head_rows=max(rows, default=0),
        stored=int(stored),
        dense=_entries(config_of(program).shapes()),
    )


def _heads_in(part: Head | HeadFamily) -> int:
    return part.write.size if isinstance(part, HeadFamily) else 1


def _entries(shapes: Any) -> int:
    if isinstance(shapes, tuple):
        return prod(shapes)
    return sum(_entries(value) for name, value in shapes.items() if name not in WIRING)


def evaluate(
    program: Program, values: Mapping[str, Any] | Array | np.ndarray, groups: Any = None
) -> dict[str, Array]:
    """Run a program; equal to the compiled model up to rounding.

    Args:
        program: checked as the compiler checks it.
        values: the slots that the embedding writes, `{name: [batch, token, size]}` (at tokens that
            do not own a slot its value is ignored), or the stream `[batch, token, width]`.
        groups: kind of every token, `[token]` or `[batch, token]`; a numpy array `[token]` lets
            heads skip the tokens at which they do not act. None if there is one kind only.

    Returns:
        {name: [batch, token, size]} for every slot that lives to the end.

    Raises:
        ProgramError: what `compile_program` raises.
        ValueError: a slot of the embedding is missing, or a shape does not fit.
    """
    check(program)
    if groups is None and len(program.token_groups) > 1:
        raise ValueError(f"groups is None, must say which of {program.token_groups} each token is")
    stream = values if isinstance(values, jax.Array | np.ndarray) else None
    slots = [s for s in program.slots if s.born == 0]
    if isinstance(values, Mapping):
        if set(values) != {s.name for s in slots}:
            raise ValueError(
                f"values are named {sorted(values)}, must be {sorted(s.name for s in slots)}"
            )
        for slot in slots:
            if values[slot.name].ndim != 3 or values[slot.name].shape[-1] != slot.size:
                raise ValueError(
                    f"value of {slot} has shape {values[slot.name].shape}, must be "
                    f"[batch, token, {slot.size}]"
                )
    elif stream is None or stream.ndim != 3 or stream.shape[-1] != program.slots.width:
        raise ValueError(
            f"values has shape {np.shape(values)}, must be [batch, token, {program.slots.width}]"
        )
    first = jnp.asarray(next(iter(values.values())) if isinstance(values, Mapping) else values)
    groups = np.zeros(first.shape[1], int) if groups is None else groups
    machine = _Machine(program, groups)
    cuts = sorted({0, *(c for s in program.slots for c in (s.start, s.start + s.size))})
    columns = list(zip(cuts, cuts[1:], strict=False))
    if stream is not None:
        blocks = {(a, b): first[..., a:b] for a, b in columns}
    else:
        blocks = {(a, b): jnp.zeros((*first.shape[:2], b - a), first.dtype) for a, b in columns}
        for slot in slots:
            owned = machine.member(slot.tokens, slice(None))
            blocks = _add(blocks, slot, jnp.where(owned[..., None], values[slot.name], 0))
    blocks = machine.run(blocks)
    return {s.name: _read(blocks, s) for s in program.slots if s.dies is None}


def _read(blocks: Blocks, slot: Slot) -> Array:
    start, stop = slot.start, slot.start + slot.size
    parts = [block for (a, b), block in blocks.items() if start <= a and b <= stop]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)


def _add(blocks: Blocks, slot: Slot, update: Array, at: Any = slice(None)) -> Blocks:
    """Blocks after slot += update at the tokens `at`."""
    blocks, start = dict(blocks), slot.start
    for a, b in [c for c in blocks if start <= c[0] and c[1] <= start + slot.size]:
        blocks[a, b] = blocks[a, b].at[:, at].add(update[..., a - start : b - start])
    return blocks


def _index(tokens: np.ndarray) -> Any:
    """A slice where the tokens are consecutive, which costs no gather."""
    if len(tokens) and (np.diff(tokens) == 1).all():
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return tokens


@dataclass(frozen=True)
class _Machine:
    program: Program
    groups: Any

    def member(self, names: Sequence[str] | None, at: Any) -> Any:
        """Whether the tokens `at` are of these kinds, `[(batch,) token]`."""
        table = np.array([names is None or g in names for g in self.program.token_groups])
        known = isinstance(self.groups, np.ndarray)
        return (table if known else jnp.asarray(table))[self.groups[..., at]]

    def run(self, blocks: Blocks) -> Blocks:
        # the same layer several times in a row is scanned, so that depth costs no compile time
        runs = [list(run) for _, run in groupby(self.program.layers, key=id)]

        def once(blocks: Blocks) -> Blocks:
            for layer, *more in runs:
                step = partial(self.layer, layer)
                blocks = _repeat(step, 1 + len(more), blocks)
            return blocks

        return _repeat(once, self.program.loops, blocks)

    def layer(self, layer: Layer, blocks: Blocks) -> Blocks:
        if layer.norm is not None:
            v = _read(blocks, layer.norm.read)
            v = v - v.mean(-1, keepdims=True) if layer.norm.kind == "layer" else v
            v = v * jax.lax.rsqrt(jnp.square(v).mean(-1, keepdims=True) + layer.norm.eps)
            blocks = _add(blocks, layer.norm.write, self.only(layer.norm.tokens, v))
        alike: dict[Any, list[Head]] = {}
        single = [head for head in layer.heads if isinstance(head, Head)]
        # erased first, so that what is written into the same columns loses no digits
        for head in sorted(single, key=lambda h: h.erases is None):
            alike.setdefault(_wiring(head), []).append(head)
        after = blocks
        for heads in alike.values():
            after = self.attend(heads, blocks, after)
        for part in layer.heads:
            if isinstance(part, HeadFamily):
                after = self.attend_family(part, blocks, after)
        if layer.mlp is None:
            return after
        blocks, mlp = after, layer.mlp
        u = ACTIVATIONS[mlp.activation](_affine([mlp.hidden], blocks)[:, :, 0])
        u = u if mlp.gate is None else u * _affine([mlp.gate], blocks)[:, :, 0]
        for slot, m in mlp.write.items():
            after = _add(after, slot, self.only(mlp.tokens, _times("btu,su->bts", u, m)))
        return after

    def only(self, tokens: Any, update: Array) -> Array:
        """`update` at tokens of these kinds, 0 elsewhere."""
        if tokens is None:
            return update
        return jnp.where(self.member(tokens, slice(None))[..., None], update, 0)

    def pairs(self, head: Head | HeadFamily) -> tuple[np.ndarray, np.ndarray, bool]:
        """Tokens that a head may look from and at; one by one (True) if it sees one offset only."""
        tokens = np.arange(self.groups.shape[-1])
        low, high = head.window
        single = low is not None and low == high and not head.sinks
        queries, keys = tokens, tokens
        known = isinstance(self.groups, np.ndarray) and self.groups.ndim == 1
        if known:
            queries = tokens[self.member(head.queries, slice(None))]
            keys = tokens[
                self.member(head.keys, slice(None)) | self.member(head.sinks, slice(None))
            ]
        if single and low is not None:
            queries = queries[np.isin(queries + low, keys)]
            keys = queries + low
        return queries, keys, single

    def attend_family(self, family: HeadFamily, blocks: Blocks, after: Blocks) -> Blocks:
        """`after` plus the outputs of a family, whose products of slots are summed first."""
        queries, keys, single = self.pairs(family)
        if not (len(queries) and len(keys)):
            return after
        qs, ks = _index(queries), _index(keys)
        acts, seen = self.member(family.queries, qs), self.member(family.keys, ks)
        shared: dict[int, list[tuple[Slot, Slot, np.ndarray]]] = {}
        for term in family.terms:
            shared.setdefault(id(term[2]), []).append(term)
        for terms in shared.values():
            left = jnp.stack([_read(blocks, term[0])[:, qs] for term in terms], 2)
            right = jnp.stack([_read(blocks, term[1])[:, ks] for term in terms], 2)
            if single:
                right = jnp.where(jnp.asarray(acts & seen)[..., None, None], right, 0)
                pairs = _times("bqkx,bqky->bqxy", left, right)
            else:
                low, high = family.window
                offset = keys[None, :] - queries[:, None]
                near = (low is None or offset >= low) & (high is None or offset <= high)
                mask = jnp.asarray(acts[..., :, None] & near & seen[..., None, :])
                mask = jnp.broadcast_to(mask, (len(left), *mask.shape[-2:])).astype(left.dtype)
                pairs = _times("bqkx,bqky->bqxy", left, _times("bqt,btky->bqky", mask, right))
            update = _times("bqxy,nxy->bqn", pairs, terms[0][2])
            after = _add(after, family.write, update, qs)
        return after

    def attend(self, heads: list[Head], blocks: Blocks, after: Blocks) -> Blocks:
        """`after` plus the outputs of heads with equal wiring, which read `blocks`."""
        head, tokens = heads[0], np.arange(self.groups.shape[-1])
        low, high = head.window
        queries, keys, single = self.pairs(head)
        if not (len(queries) and len(keys)):
            return after
        qs, ks = _index(queries), _index(keys)
        q = _affine([h.query for h in heads], blocks, qs)
        k = _affine([h.key for h in heads], blocks, ks)
        v = _affine([h.value for h in heads], blocks, ks)
        scale = jnp.asarray([h.scale for h in heads], q.dtype)
        acts, seen = self.member(head.queries, qs), self.member(head.keys, ks)
        mix = MIXERS[head.mixer]
        if head.mixer == "mesa":
            q = _precondition(heads, q, k, (keys <= queries[:, None]) & seen[..., None, :])
        if single:
            s = _times("bqnk,bqnk->bqn", q, k) * scale
            mask = jnp.broadcast_to((acts & seen)[..., None], s.shape)
            mixed = mix(s[..., None, None], mask[..., None, None])[..., 0] * v
        else:
            offset = keys[None, :] - queries[:, None]
            near = (offset >= (low if low is not None else -len(tokens))) & (
                offset <= (high if high is not None else len(tokens))
            )
            sinks = self.member(head.sinks, ks)[..., None, :]
            mask = jnp.asarray(acts[..., :, None] & (near & seen[..., None, :] | sinks))
            mask = mask[..., None, :, :] if mask.ndim == 3 else mask
            s = _times("bqnk,btnk->bnqt", q, k) * scale[:, None, None]
            mask = jnp.broadcast_to(mask, (len(s), len(heads), *s.shape[2:]))
            v = jnp.broadcast_to(v, (*v.shape[:2], len(heads), v.shape[-1]))
            mixed = _times("bnqt,btnv->bqnv", mix(_all(s, len(heads)), mask), v)
        for slot in head.write:
            m = np.stack([np.asarray(h.write[slot]) for h in heads])
            mixed = jnp.broadcast_to(mixed, (*mixed.shape[:2], len(heads), mixed.shape[-1]))
            after = _add(after, slot, _times("bqnv,nsv->bqs", mixed, m), qs)
        return after


def _precondition(heads: list[Head], q: Array, k: Array, seen: Array | np.ndarray) -> Array:
    """Queries of mesa heads times (sum k k^T + regularization)^-1, each Gram matrix written out."""
    mask = jnp.broadcast_to(jnp.asarray(seen), (len(q), *seen.shape[-2:])).astype(q.dtype)
    gram = _times("bqt,btnkl->bqnkl", mask, k[..., :, None] * k[..., None, :])
    each = np.array([h.regularization for h in heads], float)[:, None, None]
    ridge = jnp.asarray(each * np.eye(k.shape[-1]), q.dtype)
    q = jnp.broadcast_to(q, (*q.shape[:2], len(heads), q.shape[-1]))
    return jnp.linalg.solve(gram + ridge, q[..., None])[..., 0]


def _repeat(function: Callable[[Blocks], Blocks], times: int, blocks: Blocks) -> Blocks:
    if times == 1:
        return function(blocks)
    return jax.lax.scan(lambda b, _: (function(b), None), blocks, length=times)[0]


def _all(s: Array, heads: int) -> Array:
    return jnp.broadcast_to(s, (len(s), heads, *s.shape[2:]))


def _wiring(head: Head) -> Any:
    """What heads that run as one batch have in common."""
    sizes = (head.key.size, head.value.size, tuple(head.write), head.erases)
    return head.mixer, head.queries, head.keys, head.window, head.sinks, sizes


def _affine(parts: Sequence[Affine], blocks: Blocks, at: Any = slice(None)) -> Array:
    """The maps of several heads, `[batch, token, head, rows]`; one head if all are equal."""
    slots = dict.fromkeys(slot for part in parts for slot in part.terms)
    zeros = {slot: np.zeros((parts[0].size, slot.size)) for slot in slots}
    constants = _stack([part.constant for part in parts])
    some = next(iter(blocks.values()))[:, at]
    out = jnp.broadcast_to(jnp.asarray(constants, some.dtype), (*some.shape[:2], *constants.shape))
    for slot in slots:
        m = _stack([part.terms.get(slot, zeros[slot]) for part in parts])
        rows = np.flatnonzero(m.any((0, 2)))  # a long query reads most slots in a few rows each
        value, used = _read(blocks, slot)[:, at], _index(rows)
        if len(rows) == slot.size and len(m) == 1 and (m[0, rows] == np.eye(slot.size)).all():
            update = value[:, :, None]
        else:
            update = _times("bts,nks->btnk", value, m[:, used])
        heads = max(out.shape[2], update.shape[2])
        out = jnp.broadcast_to(out, (*out.shape[:2], heads, out.shape[3]))
        out = out.at[..., used].add(update)
    return out


def _stack(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """`[head, ...]`, or `[1, ...]` where all heads have the same matrix."""
    same = all(m is matrices[0] or np.array_equal(m, matrices[0]) for m in matrices[1:])
    return np.stack(matrices[:1] if same else matrices)


def _times(equation: str, a: Array, b: Array | np.ndarray) -> Array:
    return jnp.einsum(equation, a, jnp.asarray(b, a.dtype), precision="highest")
