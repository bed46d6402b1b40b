"""Disguises: what is done to a construction so that its mechanism is harder to find.

Distractors, shared jobs and backups are written into the program, before it is compiled; another
basis of the stream and noise are changes of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array

from constructions.core.program import Head, Layer, Mlp, Program, token_names
from constructions.core.slots import Slot, Slots, concatenate, constant
from constructions.core.symmetry import change_key_basis, change_value_basis
from constructions.core.transformer import Transformer
from constructions.core.weights import Part
from synthetic.compilation import compile_once

#: Name -> what is done to the construction.
DISGUISES: dict[str, str] = {
    "bare": "the construction, in a shape with room to spare: spare heads are zero",
    "basis": "the stream in a random orthogonal basis, keys and values of each head in random ones",
    "distractors": "values that nobody uses, a correlated copy of an input among them; in every "
    "layer a shadow of a head that writes where nobody reads, and a head that looks at noise",
    "shared": "every head's job is done by two heads, each writing half",
    "backup": "one head has a backup that steps in, entry by entry, where the first is silent",
    "noise": "every weight with Gaussian noise, 0.2% of the root mean square of its array",
    "all": "distractors, in a random basis, with noisy weights",
}

NOISE = 0.002
#: A backup head steps in where the first one's output is below this in size.
SILENT = 1e-6


def _extended(program: Program, layers: Sequence[Layer], added: Sequence[Slot]) -> Program:
    slots = Slots()
    for slot in (*program.slots, *added):
        slots.keep(slot)
    return replace(program, slots=slots, layers=tuple(layers))


def unrolled(program: Program) -> Program:
    """The same program with every applied layer written out."""
    return replace(program, layers=tuple(layer for _, layer in program.unrolled()), loops=1)


def with_distractors(program: Program, main: Slot) -> Program:
    """Further slots at the end of the stream, and in every layer with heads two heads more.

    Slots: "noise" (random numbers) and "copy" (a correlated copy of `main`), written by the
    embedding; "scratch" and "shadow", written by heads and read by nobody.
    """
    start, depth = program.slots.width, len(program.layers)
    noise = Slot("noise", 3, start)
    copy = Slot("copy", main.size, start + 3, main.token_groups)
    scratch = Slot("scratch", 3, copy.start + copy.size, None, 1, None, True)
    firsts = [_first(layer) for layer in program.layers]
    rows = [0 if first is None else first.value.size for first in firsts]
    wide = max(rows)
    shadow = Slot("shadow", wide, scratch.start + 3, None, 1, None, True) if wide else None
    layers = []
    for layer, size in zip(program.layers, rows, strict=True):
        first = _first(layer)
        if first is None or shadow is None:
            layers.append(layer)
            continue
        twin = replace(first, write={shadow: np.eye(wide, size)}, name=f"shadow of {first.name}")
        idle = Head(
            query=noise, key=noise, value=noise, write={scratch: 1.0}, name="looks at noise",
            scale=1 / depth,
        )  # fmt: skip
        layers.append(replace(layer, heads=(*layer.heads, twin, idle)))
    return _extended(program, layers, [s for s in (noise, copy, scratch, shadow) if s])


def with_shared_heads(program: Program) -> Program:
    """Every head that erases nothing becomes two, each of which writes half."""

    def halves(head: Any) -> tuple[Any, ...]:
        if head.erases is not None:
            return (head,)
        write = {slot: 0.5 * m for slot, m in head.write.items()}
        return tuple(
            replace(head, write=write, name=f"{head.name}, {n} half") for n in ("1st", "2nd")
        )

    layers = [
        replace(layer, heads=tuple(h for one in layer.single_heads for h in halves(one)))
        for layer in program.layers
    ]
    return replace(program, layers=tuple(layers))


def with_backup(program: Program) -> tuple[Program, int] | None:
    """One head gets a backup; the program, and the number of the layer. None where none can.

    The head writes a slot of its own, "first", its double another one, "second", and the MLP

        out  =  first + second * [|first| <= SILENT]        (entry by entry)

    of the same layer passes on what the head wrote before. Two units a row are the indicator:
    [SILENT - first > 0] - [-SILENT - first > 0], the gate is second. On inputs of the task the
    product is 0 to the bit. It needs a layer without an MLP.
    """
    for number, layer in enumerate(program.layers, start=1):
        first = _first(layer)
        if first is None or layer.mlp is not None:
            continue
        others = {
            s for h in layer.single_heads if h is not first and h.erases is None for s in h.write
        }
        if any(slot in others and not slot.accumulates for slot in first.write):
            continue
        size, start = first.value.size, program.slots.width
        groups = token_names(first.queries)
        one = Slot("first", size, start, groups, number, number)
        two = Slot("second", size, start + size, groups, number, number)
        unit = np.eye(size)
        mlp = Mlp(
            hidden=concatenate(SILENT - one, -SILENT - one, constant(*[1.0] * size)),
            gate=concatenate(1.0 * two, 1.0 * two, 1.0 * one),
            write={
                s: np.asarray(m) @ np.hstack([unit, -unit, unit]) for s, m in first.write.items()
            },
            activation="relu_derivative",
            token_groups=groups,
            name="first, or else second",
        )
        heads = [
            h for head in layer.single_heads for h in (
                (replace(first, write={one: 1.0}), replace(first, write={two: 1.0}, name="backup"))
                if head is first else (head,)
            )
        ]  # fmt: skip
        layers = list(program.layers)
        layers[number - 1] = replace(layer, heads=tuple(heads), mlp=mlp)
        return _extended(program, layers, [one, two]), number
    return None


def backed(program: Program) -> tuple[Program, int]:
    """`with_backup`, of a program that can have one."""
    found = with_backup(program)
    assert found is not None, "asked before"
    return found


def _first(layer: Layer) -> Head | None:
    return next((h for h in layer.single_heads if h.erases is None), None)


#: Arrays that read the stream, by their last axis.
_READING = ("query", "key", "value", "factor_query", "factor_key", "hidden", "gate")


def rotate(model: Transformer, q: Any) -> Transformer:
    """The model in another orthogonal basis of the stream: it maps `q @ h` to `q @ output`.

    ValueError for a norm, which sees the basis.
    """

    def turned(part: Part) -> dict[str, Array]:
        if part.kind in ("norm", "mlp_norm"):
            raise ValueError(f"the model has a {part.kind}, which sees the basis of the stream")
        new = dict(part.weights)
        for name, a in part.weights.items():
            if name in _READING or name == "output_bias":
                new[name] = a @ q.T
            elif name == "output":
                new[name] = q @ a
        return new

    return model.map_parts(turned)


@compile_once
def in_random_basis(model: Transformer, q: Array, key: Array) -> Transformer:
    """The stream in the basis `q`; keys and values of every head in random ones of their own."""
    one, two = jax.random.split(key)
    return change_value_basis(change_key_basis(rotate(model, q), one), two)


def add_noise(model: Transformer, seed: int, share: float) -> Transformer:
    """Gaussian noise on every weight, `share` of the root mean square of its array."""
    random = np.random.default_rng(seed)

    def noisy(part: Part) -> dict[str, Array]:
        new = dict(part.weights)
        for name in (*_READING, "output"):
            if name in new:
                a = np.asarray(new[name])
                size = share * np.sqrt(np.mean(a**2))
                new[name] = jax.device_put((a + size * random.normal(size=a.shape)).astype(a.dtype))
        return new

    return model.map_parts(noisy)


def distract(stream: Array, named: Any, main: Slot, kinds: np.ndarray, seed: int) -> Array:
    """The embedding's values of the slots "noise" and "copy", the latter correlated at .95."""
    random, new = np.random.default_rng(seed), np.array(stream)
    noise, copy = named["noise"], named["copy"]
    own = (
        np.ones(len(kinds), bool)
        if copy.token_groups is None
        else np.isin(kinds, copy.token_groups)
    )
    value = new[..., main.columns]
    spread = value.std(0, keepdims=True)
    near = 0.95 * value + np.sqrt(1 - 0.95**2) * spread * random.normal(size=value.shape)
    new[..., copy.columns] = np.where(own[:, None], near, 0)
    new[..., noise.columns] = random.normal(size=(*new.shape[:2], noise.size))
    return jax.device_put(new)
