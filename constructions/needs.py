"""What claims need of a model and of their settings: asked before anything is measured.

A need is a function of the `Evidence` that says in one phrase what is missing, "" where nothing is.
A claim on a model that lacks something is not applicable to it, which is no verdict on the model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.canonical import canonical_distance, head_products, obstacle, unlike
from constructions.claims import Evidence, is_function
from constructions.transformer import Transformer

#: A mask that differs may change the canonical tensor by so much of itself: rounding in float32.
ROUNDING = 1e-5


@partial(jax.jit, static_argnums=0)
def weight_distance(construction: Any, model: Transformer, reference: Transformer) -> Array:
    """`canonical_distance` under the construction's gauge, jitted."""
    return canonical_distance(model, reference, construction.gauge())


def known_weights(e: Evidence) -> str:
    """The model is no black box."""
    return "the model is a function, whose weights are not known" if is_function(e.model) else ""


def same_width(e: Evidence) -> str:
    """A stream as wide as the construction's."""
    if missing := known_weights(e):
        return missing
    ours, theirs = e.model.config.width, e.reference.config.width
    return "" if ours == theirs else f"width of the model is {ours}, of the construction {theirs}"


def linear_attention(e: Evidence) -> str:
    """Linear attention alone, in the sizes of the construction."""
    if missing := known_weights(e):
        return missing
    for model, whose in ((e.model, "the model"), (e.reference, "the construction")):
        if found := obstacle(model.config):
            return f"{whose} is more than linear attention: {found}"
    return unlike(e.model.config, e.reference.config)


def comparable_weights(e: Evidence) -> str:
    """Weights between which `canonical_distance` is one: linear attention through equal windows."""
    if missing := linear_attention(e):
        return missing
    pair = zip(masks(e.model), masks(e.reference), strict=True)
    for number, rows in enumerate(pair, start=1):
        ours, theirs = ([*dict.fromkeys(tuple(r[:2].tolist()) for r in own)] for own in rows)
        if ours and theirs and ours != theirs:
            return (
                f"layer {number} looks through the windows {ours}, the construction's through "
                f"{theirs}"
            )
    return ""


def masks_alike(e: Evidence) -> str:
    """Comparable weights, behind the construction's masks or masks that differ without effect."""
    if missing := comparable_weights(e):
        return missing
    ours, theirs = masks(e.model), masks(e.reference)
    if any(len(own) > 1 for own in theirs):
        return "the construction has heads with different masks in a layer"
    if all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        return ""
    if _plan(e.model) != _plan(e.reference):
        return "its heads see other tokens than the construction's"
    moved = with_masks_of(e.model, e.reference)
    change = float(weight_distance(e.construction, moved, e.model))
    if change <= ROUNDING:
        return ""
    return (
        "its heads see other tokens than the construction's, and what they see there counts: "
        f"{change:.2g} of the canonical tensor"
    )


def masks(model: Transformer) -> list[np.ndarray]:
    """The different masks of every layer's heads, `[mask, entry]`; see `HeadProducts.wiring`."""
    wiring = np.asarray(head_products(model).wiring)
    heads = [sum(group.heads for group in layer.heads) for layer in model.config.layers()]
    return [np.unique(own[:n], axis=0) for own, n in zip(wiring, heads, strict=True)]


def with_masks_of(model: Transformer, reference: Transformer) -> Transformer:
    """The model with the masks of a reference that has one mask a layer and the same segments.

    The same function if `masks_alike` says so. ValueError for another reference.
    """
    theirs = masks(reference)
    if _plan(model) != _plan(reference) or any(len(own) != 1 for own in theirs):
        raise ValueError("the reference must have one mask a layer, and the model's segments")
    arrays, layer, kinds = model.arrays(), 0, len(model.config.token_groups)
    names = ("window", "query_groups", "key_groups", "sink_groups")
    for s, segment in enumerate(model.config.segments):
        pattern = len(segment.pattern)
        for p in range(pattern):
            rows = np.stack([theirs[layer + p + r * pattern][0] for r in range(segment.stacked)])
            for w in arrays["segments"][s]["layers"][p]["heads"].values():
                every = np.repeat(rows[:, None], w["scale"].shape[1], axis=1)
                parts = np.split(every, [2, 2 + kinds, 2 + 2 * kinds], axis=-1)
                for name, part in zip(names, parts, strict=True):
                    w[name] = jnp.asarray(part, w[name].dtype)
        layer += segment.repeats * pattern
    return Transformer(model.config, arrays)


def _plan(model: Transformer) -> list[tuple[int, bool, int]]:
    return [(s.repeats, s.tied, len(s.pattern)) for s in model.config.segments]
