r"""Paths between models that no symmetry of the weights can bend, and damped roll-outs.

The straight line between two sets of weights depends on the bases that they happen to be written
in. The line between what the layers do does not: with delta_l and delta*_l the updates of layer l,

    h  <-  h + (1 - s) delta_l(h) + s delta*_l(h),

which for linear attention is the line (1 - s) T + s T* between canonical forms (see
`constructions.core.symmetry`). The union of both models' heads, with outputs (1 - s) P and s P*,
has exactly this update, so no factorisation is needed to walk along it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from constructions.core.config import Config, SegmentConfig
from constructions.core.transformer import Transformer
from constructions.family import Construction
from synthetic.tasks.task import Batch


def more_than_attention(*configs: Config) -> str:
    """Why models are no sums of heads, in one phrase; "" where they are."""
    for config in configs:
        if config.final_norm or any(m.mlp or m.norm or m.mlp_norm for m in config.layers()):
            return "models must be attention alone to be blended, got an mlp or a norm"
    return ""


def obstacle(one: Config, other: Config) -> str:
    """Why two models cannot be blended, in one phrase; "" where they can."""
    if found := more_than_attention(one, other):
        return found
    for name in ("width", "token_groups"):
        if getattr(one, name) != getattr(other, name):
            return (
                f"{name} of the model is {getattr(one, name)}, "
                f"of the reference {getattr(other, name)}"
            )
    plans = [[(len(s.pattern), s.repeats, s.tied) for s in c.segments] for c in (one, other)]
    if plans[0] != plans[1]:
        return (
            f"segments (layers, repeats, tied) of the model are {plans[0]}, "
            f"of the reference {plans[1]}"
        )
    return ""


def blend(model: Transformer, reference: Transformer, fraction: ArrayLike) -> Transformer:
    """The model whose layers do (1 - s) of what `model`'s do and s of what `reference`'s do.

    Its canonical forms are (1 - s) T + s T*. Any mixer; `fraction` may be traced and may lie
    outside [0, 1].

    Raises:
        TypeError: a model is more than attention: an mlp or a norm has no such line.
        ValueError: depths, widths, token groups or loops differ.
    """
    one, other = model.config, reference.config
    if found := more_than_attention(one, other):
        raise TypeError(found)
    if found := obstacle(one, other):
        raise ValueError(found)
    stored = [m.arrays()["segments"] for m in (model, reference)]
    segments, arrays = [], {}
    for s, pair in enumerate(zip(one.segments, other.segments, strict=True)):
        pattern, layers = [], {}
        for p, (mine, theirs) in enumerate(zip(*(x.pattern for x in pair), strict=True)):
            pattern.append(replace(mine, heads=mine.heads + theirs.heads))
            own, its = (weights[s]["layers"][p]["heads"] for weights in stored)
            groups = [_scaled(w, 1 - fraction) for w in own.values()]
            groups += [_scaled(w, fraction) for w in its.values()]
            layers[p] = {"heads": dict(enumerate(groups))}
        segments.append(replace(pair[0], pattern=tuple(pattern)))
        arrays[s] = {"layers": layers}
    return Transformer(replace(one, segments=tuple(segments)), {"segments": arrays})


def _scaled(heads: Mapping[str, Array], factor: Any) -> dict[str, Array]:
    outputs = ("output", "output_bias")
    return {n: (a * factor).astype(a.dtype) if n in outputs else a for n, a in heads.items()}


def interpolate(
    construction: Construction,
    model: Transformer,
    reference: Transformer,
    batch: Batch,
    fractions: Float[Array, " fraction"],
) -> Float[Array, " fraction"]:
    """Mean loss on a batch along the line from `model` (fraction 0) to `reference` (fraction 1).

    One compilation and the memory of one model, whatever the number of fractions. Unchanged by
    every symmetry of either model, inert weights included. Errors as in `blend`.
    """

    def loss(fraction: Array) -> Array:
        between = blend(model, reference, fraction)
        return construction.task.loss(construction.apply(between, *batch.inputs), batch).mean()

    return jax.lax.map(loss, jnp.asarray(fractions))


def interpolation_gap(losses: Float[Array, " fraction"]) -> Float[Array, ""]:
    """max_s loss(s) / min(loss(0), loss(1)) - 1: 0 if no point is worse than the better end.

    The first and the last entry are the ends.
    """
    return losses.max() / jnp.minimum(losses[0], losses[-1]) - 1


def roll_out(
    construction: Construction,
    model: Transformer,
    *inputs: Array,
    depth: int,
    damping: ArrayLike = 1.0,
    layer: int = -1,
) -> Float[Array, "step *prediction"]:
    """Predictions along h <- h + damping * delta(h), the same layer over and over.

    For a layer that does one step of gradient descent this is gradient descent with step size
    damping * eta.

    Args:
        construction: says how inputs enter and where the prediction stands.
        model: whose layer is applied.
        inputs: of the construction.
        depth: how often, at least 0.
        damping: lambda; may be traced.
        layer: which of the model's layers, counted as they are applied; the last by default.

    Returns:
        Predictions before the first and after every application, `[depth + 1, *prediction]`.

    Raises:
        ValueError: negative depth, no such layer, or a construction that does not say where the
            prediction stands.
    """
    if depth < 0:
        raise ValueError(f"depth is {depth}, must be at least 0")
    single = _one_layer(model, layer)
    places, slots = construction.places(1, *inputs), construction.program.slots
    if "prediction" not in places:
        raise ValueError(f"{construction} names no place of the prediction in the stream")
    # the place is one of layer 1; the same tokens and columns are read at every depth
    place = replace(places["prediction"], layer=np.zeros_like(places["prediction"].layer))
    stream, groups, _ = construction.stream(single, *inputs)
    factor = jnp.asarray(damping, stream.dtype)

    def step(h: Array, _: None) -> tuple[Array, Array]:
        return h + factor * (single(h, groups) - h), place.gather(h[None], slots)

    last, predictions = jax.lax.scan(step, stream, length=depth)
    return jnp.concatenate([predictions, place.gather(last[None], slots)[None]])


def _one_layer(model: Transformer, layer: int) -> Transformer:
    """One of the applied layers as a model of its own."""
    config = model.config
    if not -config.depth <= layer < config.depth:
        raise ValueError(f"layer is {layer}, the model applies {config.depth}")
    s, p, r = config.stored(layer % config.depth + 1)
    alone = SegmentConfig((config.segments[s].pattern[p],))
    own = model.arrays()["segments"][s]["layers"][p]
    arrays = {"segments": {0: {"layers": {0: jax.tree.map(lambda a: a[r : r + 1], own)}}}}
    return Transformer(replace(config, segments=(alone,), final_norm=None), arrays)
