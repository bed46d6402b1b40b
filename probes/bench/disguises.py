"""Disguises: what is done to a construction so that its mechanism is harder to find.

Distractors, shared jobs, backups and sharp attention are written into the program, before it is
compiled; another basis of the stream, fewer dimensions, noise and training change the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from probes.bench.truth import first_head
from synthetic.compilation import compile_once

#: Name -> what is done to the construction.
DISGUISES: dict[str, str] = {
    "bare": "the construction, in a shape with room to spare: spare heads are zero",
    "basis": "the stream in a random orthogonal basis, keys and values of each head in random ones",
    "distractors": "values that nobody uses, a correlated copy of an input among them; in every "
    "layer a shadow of a head that writes where nobody reads, and a head that looks at noise",
    "shared": "every head's job is done by two heads, each writing half",
    "backup": "one head has a backup that steps in, entry by entry, where the first is silent",
    "sharp": "scores of softmax heads 8 times as large, so that attention saturates",
    "superposed": "with distractors, the stream pressed into the fewest dimensions at which "
    "predictions are off by at most 5% of the distance between those of two inputs",
    "trained": "the job's heads trained from random weights until they match the construction's up "
    "to its symmetries, among spare heads that are zero",
    "noise": "every weight with Gaussian noise, 0.2% of the root mean square of its array",
    "all": "distractors, in a random basis, with noisy weights",
}

NOISE = 0.002
#: A backup head steps in where the first one's output is below this in size.
SILENT = 1e-6
#: Factor on the scores of softmax heads that saturates them.
SHARP = 8.0
#: What a superposed stream may lose, and weights of a column that nobody uses beside one of use.
LOSS, ASIDE = 0.05, (0.3, 0.1, 0.03, 0.01)
#: A trained model further than this from the construction is no subject.
FAR = 0.1


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
    firsts = [first_head(layer) for layer in program.layers]
    rows = [0 if first is None else first.value.size for first in firsts]
    wide = max(rows)
    shadow = Slot("shadow", wide, scratch.start + 3, None, 1, None, True) if wide else None
    layers = []
    for layer, size in zip(program.layers, rows, strict=True):
        first = first_head(layer)
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
        first = first_head(layer)
        if first is None or layer.mlp is not None:
            continue
        others = {
            s for h in layer.single_heads if h is not first and h.erases is None for s in h.write
        }
        if any(slot in others and not slot.accumulates for slot in first.write):
            continue
        size, start = first.value.size, program.slots.width
        groups = token_names(first.queries)
        one = Slot("first output", size, start, groups, number, number)
        two = Slot("second output", size, start + size, groups, number, number)
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


def with_sharp_heads(program: Program) -> Program | None:
    """Scores of every softmax head times `SHARP`; None where there is no such head."""
    layers = [
        replace(
            layer,
            heads=tuple(
                replace(h, scale=SHARP * h.scale) if h.mixer == "softmax" else h
                for h in layer.single_heads
            ),
        )
        for layer in program.layers
    ]
    soft = any(h.mixer == "softmax" for layer in layers for h in layer.single_heads)
    return replace(program, layers=tuple(layers)) if soft else None


def backed(program: Program) -> tuple[Program, int]:
    """`with_backup`, of a program that can have one."""
    found = with_backup(program)
    assert found is not None, "asked before"
    return found


#: Arrays that read the stream, by their last axis.
_READING = ("query", "key", "value", "factor_query", "factor_key", "hidden", "gate")


def rotate(model: Transformer, q: Any, back: Any = None) -> Transformer:
    """The model in another basis of the stream: it maps `q @ h` to `q @ output`.

    Args:
        model: one without norms, which see the basis: ValueError otherwise.
        q: orthogonal, or any map whose inverse is given.
        back: what is read is `back @ stream`; None is q^T.
    """
    back = q.T if back is None else back

    def turned(part: Part) -> dict[str, Array]:
        if part.kind in ("norm", "mlp_norm"):
            raise ValueError(f"the model has a {part.kind}, which sees the basis of the stream")
        new = dict(part.weights)
        for name, a in part.weights.items():
            if name in _READING:
                new[name] = a @ back
            elif name == "output_bias":
                new[name] = a @ q.T
            elif name == "output":
                new[name] = q @ a
        return new

    return model.map_parts(turned)


def pressed(
    values: np.ndarray, used: np.ndarray, seed: int, loss: Callable[[np.ndarray, np.ndarray], float]
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """The projection of a stream to the fewest dimensions that it bears, and the way back.

    With S the diagonal of 1 / (root mean square of a column), times one of `ASIDE` where nobody
    uses it, and U the k leading eigenvectors of the second moment of S h, the stream becomes
    U^T S h, which stands in a random subspace of as many columns as before (so that nothing is
    compiled anew), and S^-1 U is read: no other k dimensions hold S h with less squared error.
    The first of `ASIDE` is taken at which a quarter of the dimensions go, or where most go.

    Args:
        values: the stream from which it is learnt, `[..., width]`.
        used: whether somebody uses a column, `[width]`.
        seed: of the subspace.
        loss: (projection, way back) -> what it costs.

    Returns:
        Both maps `[width, width]`, and what is to be stated: "dimensions", "of", "loss".
    """
    h = values.reshape(-1, values.shape[-1])
    size = np.sqrt(np.mean(h**2, 0))
    there = size > 1e-9
    everything = np.linalg.svd(h[:, there] / size[there], compute_uv=False)
    of = int((everything > 1e-6 * everything.max()).sum())
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(size), len(size))))[0]
    found: list[tuple[int, Any, Any]] = []
    for aside in ASIDE:
        scale = np.where(there, np.where(used, 1.0, aside) / np.where(there, size, 1), 0)
        strength, u = np.linalg.eigh((h * scale).T @ (h * scale) / len(h))
        rank = int((strength > 1e-12 * strength.max()).sum())
        to, back = u[:, ::-1].T * scale, np.divide(u[:, ::-1].T, scale, where=there, out=0 * u).T
        low, high = 0, rank  # too few, and enough
        while high - low > 1:
            k = (low + high) // 2
            enough = loss(q[:, :k] @ to[:k], back[:, :k] @ q[:, :k].T) <= LOSS
            low, high = (low, k) if enough else (k, high)
        found.append((high, q[:, :high] @ to[:high], back[:, :high] @ q[:, :high].T))
        if high <= 0.75 * of:
            break
    least, to, back = min(found, key=lambda f: f[0])
    return to, back, {"dimensions": float(least), "of": float(of), "loss": loss(to, back)}


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
