"""The second back end: a program run slot by slot, without dense width x width matrices.

    evaluate(program, {name: [batch, token, size]}, groups) -> {name: [batch, token, size]}

The stream is kept as blocks of columns at the tokens of one kind (`constructions.core.stream`), and
a head touches only what it reads and writes. Maps are applied block by block
(`constructions.core.stream`): slices of slots cost no product. Per layer, heads with the same
wiring run as one batch, with what they have in common computed once; a head that looks at one
offset computes one score a token, and scores that do not depend on the query or the key are
computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from constructions.core.compile import check
from constructions.core.layer import ACTIVATIONS, MIXERS, TRANSPOSED
from constructions.core.program import Head, HeadFamily, Layer, Program
from constructions.core.slots import Affine, Slot
from constructions.core.stream import At, Blocks, Stream, affine, index, join, times, write
from constructions.core.weights import check_indices, inside


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class SlotBySlot:
    """A program in the place of the model that it compiles to, where that would be too large.

    A family that takes one runs `evaluate`. It has no weights to train, and is a constant of what
    is jitted.

    Attributes:
        program: what is run.
        dtype: of the values.
    """

    program: Program
    dtype: Any


def evaluate(
    program: Program, values: Mapping[str, Any] | Array | np.ndarray, groups: Any = None
) -> dict[str, Array]:
    """Run a program; equal to the compiled model up to rounding.

    Args:
        program: checked as the compiler checks it.
        values: the slots that the embedding writes, `{name: [batch, token, size]}` (at tokens that
            do not own a slot its value is ignored), or the stream `[batch, token, width]`. The
            batch axis of a slot may be 1: all examples then share its value, and all that is
            computed from such slots alone is computed once.
        groups: kind of every token, `[token]` or `[batch, token]`; a numpy array `[token]` lets
            slots and heads skip the tokens at which they do not live or act. None if there is one
            kind only.

    Returns:
        {name: [batch, token, size]} for every slot that lives to the end; at tokens that do not own
        it the numbers mean nothing.

    Raises:
        ProgramError: what `compile_program` raises.
        ValueError: a slot of the embedding is missing, a shape does not fit, or a token is of a
            kind that does not exist (under `jit` all of its sequence is NaN).
    """
    check(program)
    if groups is None and len(program.token_groups) > 1:
        raise ValueError(f"groups is None, must say which of {program.token_groups} each token is")
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
    elif (
        not isinstance(values, jax.Array | np.ndarray)
        or values.ndim != 3
        or values.shape[-1] != program.slots.width
    ):
        raise ValueError(
            f"values has shape {np.shape(values)}, must be [batch, token, {program.slots.width}]"
        )
    given = list(values.values()) if isinstance(values, Mapping) else [values]
    first = jnp.asarray(given[0])
    groups = np.zeros(first.shape[1], int) if groups is None else groups
    kinds = len(program.token_groups)
    check_indices("groups", groups, kinds, f"one of {program.token_groups}")
    known = groups if isinstance(groups, np.ndarray) and groups.ndim == 1 else None
    batch = max(len(value) for value in given)
    stream = Stream(program, known, first.shape[1], batch, first.dtype)
    machine = _Machine(program, groups, known is not None, stream)
    if isinstance(values, Mapping):
        blocks: Blocks = {}
        for slot in slots:
            at = machine.at(slot.token_groups)
            value = jnp.asarray(values[slot.name])
            value = value[:, index(at.positions, value.shape[1])]
            stream.add(blocks, at, slot.start, machine.only(slot.token_groups, value))
    else:
        blocks = stream.cut(first)
    blocks = machine.run(blocks)
    found = {s.name: stream.whole(blocks, s) for s in program.slots if s.dies is None}
    if not isinstance(groups, Tracer):
        return found
    good = inside(groups, kinds).all(-1)[..., None, None]
    return {name: jnp.where(good, value, jnp.nan) for name, value in found.items()}


@dataclass(frozen=True)
class _Machine:
    program: Program
    groups: Any
    known: bool  # whether the kinds of tokens are known now, and the same in all examples
    stream: Stream

    def member(self, names: Sequence[str] | None, tokens: np.ndarray) -> Any:
        """Whether these tokens are of these kinds, `[(batch,) token]`; None where all are."""
        if names is None:
            return None
        table = np.array([g in names for g in self.program.token_groups])
        if not self.known:
            return jnp.asarray(table)[jnp.asarray(self.groups)[..., tokens]]
        found = table[self.groups[tokens]]
        return None if found.all() else found

    def at(self, names: Sequence[str] | None) -> At:
        """The tokens of these kinds, or all where that is not known."""
        tokens = np.arange(self.groups.shape[-1])
        here = self.member(names, tokens) if self.known else None
        return self.stream.at(self.stream.cell_by_cell(tokens if here is None else tokens[here]))

    def only(self, names: Sequence[str] | None, update: Array) -> Array:
        """`update` at tokens of these kinds, 0 elsewhere; as it is where `at` left those out."""
        if names is None or self.known:
            return update
        here = self.member(names, np.arange(self.groups.shape[-1]))
        return jnp.where(here[..., None], update, 0)

    def run(self, blocks: Blocks) -> Blocks:
        # the same layer several times in a row is scanned, so that depth costs no compile time
        runs = [list(run) for _, run in groupby(self.program.layers, key=id)]

        def once(blocks: Blocks) -> Blocks:
            for layer, *more in runs:
                blocks = self.repeat(partial(self.layer, layer), 1 + len(more), blocks)
            return blocks

        return self.repeat(once, self.program.loops, blocks)

    def repeat(self, step: Callable[[Blocks], Blocks], times: int, blocks: Blocks) -> Blocks:
        if times == 1:
            return step(blocks)
        blocks = self.stream.filled(blocks)
        return jax.lax.scan(lambda b, _: (self.stream.filled(step(b)), None), blocks, length=times)[
            0
        ]

    def layer(self, layer: Layer, blocks: Blocks) -> Blocks:
        if layer.norm is not None:
            at, blocks = self.at(layer.norm.token_groups), dict(blocks)
            v = self.stream.slot(blocks, at, layer.norm.read)
            v = v - v.mean(-1, keepdims=True) if layer.norm.kind == "layer" else v
            v = v * jax.lax.rsqrt(jnp.square(v).mean(-1, keepdims=True) + layer.norm.eps)
            v = self.only(layer.norm.token_groups, v)
            self.stream.add(blocks, at, layer.norm.write.start, v)
        alike: dict[Any, list[Head]] = {}
        single = [head for head in layer.heads if isinstance(head, Head)]
        # erased first, so that what is written into the same columns loses no digits
        for head in sorted(single, key=lambda h: h.erases is None):
            alike.setdefault(_wiring(head), []).append(head)
        after = dict(blocks)
        for heads in alike.values():
            self.attend(heads, blocks, after)
        for part in layer.heads:
            if isinstance(part, HeadFamily):
                self.attend_family(part, blocks, after)
        if layer.mlp is None:
            return after
        mlp, at = layer.mlp, self.at(layer.mlp.token_groups)
        u = ACTIVATIONS[mlp.activation](affine(self.stream, after, at, [mlp.hidden]))
        u = u if mlp.gate is None else u * affine(self.stream, after, at, [mlp.gate])
        u = self.only(mlp.token_groups, u[:, :, 0])[:, :, None]
        blocks, after = after, dict(after)
        for slot, m in mlp.write.items():
            write(self.stream, after, at, slot, u, [m])
        return after

    def pairs(self, head: Head | HeadFamily) -> tuple[At, At, bool]:
        """Tokens that a head may look from and at; one by one (True) if it sees one offset only."""
        low, high = head.window
        single = low is not None and low == high and not head.sinks
        queries = self.at(head.queries).positions
        keys = self.at(None if head.keys is None else (*head.keys, *head.sinks)).positions
        if single:
            queries = queries[np.isin(queries + low, keys)]
            keys = queries + low
        return self.stream.at(queries), self.stream.at(keys), single

    def mask(self, head: Head | HeadFamily, queries: At, keys: At) -> Array | None:
        """Which keys a query sees, `[batch or 1, query or 1, key or 1]`; None: all of them."""
        low, high = head.window
        q, k = queries.positions, keys.positions
        sees = None
        if low is not None and k.min() - q.max() < low:
            sees = k[None, :] - q[:, None] >= jnp.asarray(low)
        if high is not None and k.max() - q.min() > high:
            sees = _both(sees, jnp.asarray(k)[None, :] - jnp.asarray(q)[:, None] <= high)
        sees = _both(sees, _axis(self.member(head.keys, k), -2))
        if head.sinks and sees is not None:
            sinks = _axis(self.member(head.sinks, k), -2)
            sees = None if sinks is None else sees | sinks
        sees = _both(sees, _axis(None if self.known else self.member(head.queries, q), -1))
        return None if sees is None else sees if sees.ndim == 3 else sees[None]

    def attend_family(self, family: HeadFamily, blocks: Blocks, after: Blocks) -> None:
        """Add the outputs of a family, whose products of slots are summed first, to `after`."""
        queries, keys, single = self.pairs(family)
        if not (len(queries) and len(keys)):
            return
        shared: dict[int, list[tuple[Slot, Slot, np.ndarray | Array]]] = {}
        for term in family.terms:
            shared.setdefault(id(term[2]), []).append(term)
        if single:
            visible = _both(*(
                None if self.known else self.member(names, at.positions)
                for names, at in ((family.queries, queries), (family.keys, keys))
            ))  # fmt: skip
        else:
            mask = self.mask(family, queries, keys)
        for terms in shared.values():
            left, right = (
                join([self.stream.slot(blocks, at, slot)[:, :, None] for slot in slots], 2)
                for at, slots in ((queries, [t[0] for t in terms]), (keys, [t[1] for t in terms]))
            )
            if single:
                right = right if visible is None else jnp.where(visible[..., None, None], right, 0)
            elif mask is None:
                right = right.sum(1, keepdims=True)
            else:
                sees = _full(mask, queries, keys).astype(right.dtype)
                right = times("bqt,btky->bqky", sees, right)
            pairs = times("bqkx,bqky->bqxy", left, right)
            update = times("bqxy,nxy->bqn", pairs, terms[0][2])
            self.stream.add(after, queries, family.write.start, update)

    def attend(self, heads: list[Head], blocks: Blocks, after: Blocks) -> None:
        """Add the outputs of heads with equal wiring, which read `blocks`, to `after`."""
        head = heads[0]
        queries, keys, single = self.pairs(head)
        if not (len(queries) and len(keys)):
            return

        def read(at: At, part: Callable[[Head], Affine]) -> Array:
            return affine(self.stream, blocks, at, [part(h) for h in heads])

        q, k = read(queries, lambda h: h.query), read(keys, lambda h: h.key)
        v = read(keys, lambda h: h.value)
        scales = np.array([h.scale for h in heads], float)
        if (scales != 1).any():
            q = q * jnp.asarray(scales[: 1 if (scales == scales[0]).all() else None, None], q.dtype)
        factor = None
        if head.factor is not None:
            factor = tuple(
                read(at, lambda h, n=n: (h.factor or ())[n]) for n, at in enumerate((queries, keys))
            )
        if single:
            mixed = self.mix_one(head, q, k, factor, queries, keys) * v
        else:
            mask = self.mask(head, queries, keys)
            if head.mixer == "mesa":
                q = _precondition(heads, q, k, _full(mask, queries, keys))
            mixed = _mix(head.mixer, q, k, v, factor, mask, len(queries), len(keys))
        for slot in head.write:
            write(self.stream, after, queries, slot, mixed, [h.write[slot] for h in heads])

    def mix_one(
        self, head: Head, q: Array, k: Array, factor: tuple[Array, ...] | None, qs: At, ks: At
    ) -> Array:
        """Weights of the only key that a query sees, `[batch or 1, token or 1, head or 1, 1]`."""
        s = (q * k).sum(-1)[..., None, None]
        visible = None
        if not self.known:
            visible = _both(
                self.member(head.queries, qs.positions), self.member(head.keys, ks.positions)
            )
        if visible is not None:
            visible = (visible if visible.ndim == 2 else visible[None])[..., None, None, None]
            shape = np.broadcast_shapes(s.shape, visible.shape)
            s, visible = jnp.broadcast_to(s, shape), jnp.broadcast_to(visible, shape)
        weights = _weights(head.mixer, s, visible)[..., 0]
        if factor is not None:
            weights = weights * (factor[0] * factor[1]).sum(-1, keepdims=True)
        return weights


def _mix(
    mixer: str,
    q: Array,
    k: Array,
    v: Array,
    factor: tuple[Array, ...] | None,
    mask: Array | None,
    queries: int,
    keys: int,
) -> Array:
    """sum_j a_ij v_j, `[batch or 1, query or 1, head or 1, row]`.

    An axis of 1 in the arguments, and in the result, is one value for all.
    """
    linear = MIXERS[mixer] is MIXERS["linear"]
    if linear and mask is None and factor is None:
        if k.shape[1] == 1:  # a sum over tokens
            v = v.sum(1, keepdims=True) * (keys if v.shape[1] == 1 else 1)
        v = jnp.broadcast_to(v, (v.shape[0], k.shape[1], *v.shape[2:]))
        (n, m), (x, y) = (q.shape[1], k.shape[1]), (q.shape[-1], v.shape[-1])
        if (n + m) * x * y < n * m * (x + y):
            return times("bqnk,bnkv->bqnv", q, times("btnk,btnv->bnkv", k, v))
        return times("bnqt,btnv->bqnv", times("bqnk,btnk->bnqt", q, k), v)
    scores = times("bqnk,btnk->bnqt", q, k)
    if mask is not None:
        mask = mask[:, None]
    if mask is not None or mixer in TRANSPOSED:
        scores = jnp.broadcast_to(scores, (*scores.shape[:2], queries, keys))
    else:
        scores = jnp.broadcast_to(scores, (*scores.shape[:3], keys))
    weights = _weights(mixer, scores, mask)
    if factor is not None:
        weights = weights * times("bqnk,btnk->bnqt", *factor)
    v = jnp.broadcast_to(v, (v.shape[0], keys, *v.shape[2:]))
    return times("bnqt,btnv->bqnv", weights, v)


def _weights(mixer: str, scores: Array, mask: Array | None) -> Array:
    """Attention weights of scores `[..., query, key]`; without a mask all keys are visible."""
    if mask is not None:
        shape = np.broadcast_shapes(scores.shape, mask.shape)
        return MIXERS[mixer](jnp.broadcast_to(scores, shape), jnp.broadcast_to(mask, shape))
    if mixer == "softmax":
        return jax.nn.softmax(scores, -1)
    if mixer == "transposed_softmax":
        return jax.nn.softmax(scores, -2)
    if MIXERS[mixer] is MIXERS["linear"]:
        return scores
    return MIXERS[mixer](scores, jnp.ones(scores.shape, bool))


def _precondition(heads: list[Head], q: Array, k: Array, visible: Array) -> Array:
    """Queries of mesa heads times (sum k k^T + regularization)^-1, each Gram matrix written out."""
    k = jnp.broadcast_to(k, (k.shape[0], visible.shape[2], *k.shape[2:]))
    gram = times("bqt,btnkl->bqnkl", visible.astype(q.dtype), k[..., :, None] * k[..., None, :])
    each = np.array([h.regularization for h in heads], float)[:, None, None]
    gram = gram + jnp.asarray(each * np.eye(k.shape[-1]), q.dtype)
    shape = np.broadcast_shapes(gram.shape[:-1], q.shape)
    gram = jnp.broadcast_to(gram, (*shape, shape[-1]))
    return jnp.linalg.solve(gram, jnp.broadcast_to(q, shape)[..., None])[..., 0]


def _full(mask: Array | None, queries: At, keys: At) -> Array:
    """A mask with all of its axes but that of the batch."""
    mask = jnp.ones((1, 1, 1), bool) if mask is None else mask
    return jnp.broadcast_to(mask, (len(mask), len(queries), len(keys)))


def _both(a: Any, b: Any) -> Any:
    """a & b, where None is True."""
    return b if a is None else a if b is None else a & b


def _axis(visible: Any, axis: int) -> Any:
    return None if visible is None else jnp.expand_dims(jnp.asarray(visible), axis)


def _wiring(head: Head) -> Any:
    """The wiring that heads must share to run as one batch."""
    sizes = (head.key.size, head.value.size, head.factor_dim, tuple(head.write), head.erases)
    return head.mixer, head.queries, head.keys, head.window, head.sinks, sizes
