"""Interchange interventions: run one input with a value taken from another, see what moves.

Write p(base) and p(source) for the predictions on two inputs and p(patched) for the prediction on
the base input while a site holds what it holds on the source input. The effect of the patch is

    effect  =  <p(patched) - p(base), p(source) - p(base)> / |p(source) - p(base)|^2,

with inner products over batch and outputs: 0 if nothing moves, 1 if the prediction becomes the
source's. What moves in other directions is `off_axis`, in the same unit. Effects may exceed 1 or be
negative: parts of a computation can overshoot or cancel.

Patches at all layers and positions are arrays, so that a whole sweep is one compiled function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.core.transformer import Edit, Transformer
from constructions.family import Construction
from probes.patching import (
    CleanRuns,
    Sweep,
    axes_of,
    count_tokens,
    map_grid,
    mask_at,
    must_differ,
    pair_of,
    patched_prediction,
    positions_of,
    site_values,
    with_sites,
)
from probes.sites import Inputs, Subject, place_mask, site_axes
from synthetic.compilation import compile_once


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far the same patches do the same thing in two models.

    Attributes:
        correlation: of the two effect maps, over all their entries.
        relative_error: |effect(model) - effect(reference)| / |effect(reference)|.
        prediction_error: for every patch, the distance of the two patched predictions over
            |p(source) - p(base)| of the reference. It sees what projections hide.
        model, reference: the two sweeps.
    """

    correlation: float
    relative_error: float
    prediction_error: np.ndarray
    model: Sweep
    reference: Sweep


def interchange(
    construction: Construction,
    model: Subject,
    base: Inputs,
    source: Inputs,
    *,
    site: str = "residual",
    where: Any,
) -> Array:
    """Predictions on `base` with the values that `site` holds on `source` put in at `where`.

    Answers "does this part of the model carry the information by which the two inputs differ?".
    It misleads if the two inputs differ in much else, and where several places carry the same
    information: patching one of them then shows nothing.

    Args:
        base, source: inputs of equal shapes.
        site: a name in `SITES`.
        where: booleans that broadcast to `[layer, batch, *axes]`, see `sites.where`.

    Raises:
        ValueError: shapes of `base` and `source` differ, unknown site, `where` does not fit, or the
            model is a function.
    """
    model = with_sites(model)
    base, source = pair_of(base, source)
    return _interchange(
        model, base, source, jnp.asarray(where), construction=construction, site=site
    )


def sweep(
    construction: Construction,
    model: Subject,
    base: Inputs,
    source: Inputs,
    *,
    site: str = "residual",
    over: str | tuple[str, ...] = "token",
    chunk: int = 8,
) -> Sweep:
    """Effect of every single patch of a site: all layers times all positions, in one compile.

    Answers "where, and until which layer, is the difference between two inputs kept?". A position
    without an effect may still be used jointly with others, as copies of one value are.

    Args:
        base, source: inputs of equal shapes; effects are pooled over their batch.
        site: a name in `SITES`.
        over: axes of the site that are patched one index at a time, besides the layers: "token",
            "head", ("token", "head"), ...; other axes are patched whole.
        chunk: patched runs that are computed side by side; bounds the memory.

    Raises:
        ValueError: base and source do not differ in shape only, unknown site or axis, equal
            predictions on both, which leave no effect to measure, or a function as the model.
    """
    model = with_sites(model)
    base, source = pair_of(base, source)
    axes = axes_of(construction, model, base, site, over)
    effect, off_axis, gap = _sweep(
        model, base, source, construction=construction, site=site, axes=axes, chunk=chunk
    )
    must_differ(gap)
    return Sweep(axes, np.asarray(effect), np.asarray(off_axis))


def interchange_agreement(
    construction: Construction,
    model: Subject,
    reference: Subject,
    base: Inputs,
    source: Inputs,
    *,
    site: str = "residual",
    over: str | tuple[str, ...] = "token",
    chunk: int = 8,
) -> Agreement:
    """Do the same patches move a model as they move the construction?

    Answers "does the model carry the algorithm's intermediate results in the same place, at the
    same layer?" without reference to any basis of the stream, as whole tokens are exchanged. A
    model that does the same computation in other layers disagrees, rightly so; a model that agrees
    may still hold the values in another code.

    ValueError as for `sweep`, and if the two models differ in depth, heads or width.
    """
    model, reference = with_sites(model), with_sites(reference)
    base, source = pair_of(base, source)
    axes = axes_of(construction, model, base, site, over)
    sizes = [site_axes(m.config, 1, site) for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"site '{site}' has sizes {sizes[0]} in model, {sizes[1]} in reference")
    (ours, off, gap), (theirs, their_off, their_gap), apart = _agreement(
        model, reference, base, source, construction=construction, site=site, axes=axes, chunk=chunk
    )
    must_differ(gap)
    must_differ(their_gap)
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    spread = a.std() * b.std()
    correlation = np.mean((a - a.mean()) * (b - b.mean())) / spread if spread > 0 else np.nan
    return Agreement(
        float(correlation),
        float(np.linalg.norm(a - b) / np.linalg.norm(b)),
        np.asarray(apart),
        Sweep(axes, np.asarray(ours), np.asarray(off)),
        Sweep(axes, np.asarray(theirs), np.asarray(their_off)),
    )


def exchange(
    construction: Construction, model: Subject, base: Inputs, source: Inputs, name: str
) -> dict[int, float]:
    """Effect of exchanging one variable of the algorithm: {layers applied: effect}.

    Patches the columns in which the compiled construction keeps `name`, at all tokens that own a
    part of it. On a trained model this asks whether it uses the construction's own columns for the
    variable; a model may hold it elsewhere, which `sweep` over whole tokens would show.

    ValueError as for `sweep`, and for a name without a place.
    """
    model = with_sites(model)
    base, source = pair_of(base, source)
    tokens = count_tokens(construction, model, base)
    masks = place_mask(construction, model.config, tokens, base, name)
    stacked = jnp.asarray(np.stack(list(masks.values())))
    effect, _, gap = _exchange(model, base, source, stacked, construction=construction)
    must_differ(gap)
    return dict(zip(masks, np.asarray(effect, float).tolist(), strict=True))


@compile_once(static_argnames=("construction", "site"), often=True)
def _interchange(
    model: Transformer, base: Any, source: Any, where: Array, *, construction: Any, site: str
) -> Array:
    edit = Edit(where, site_values(construction, model, source, site))
    return patched_prediction(construction, model, base, site, edit)


@compile_once(static_argnames=("construction", "site", "axes", "chunk"), often=True)
def _sweep(
    model: Transformer,
    base: Any,
    source: Any,
    *,
    construction: Any,
    site: str,
    axes: Any,
    chunk: int,
) -> tuple[Array, Array, Array]:
    values = site_values(construction, model, source, site)
    pair = CleanRuns(construction, model, base, source)
    positions = positions_of(model, site, axes)

    def patched(index: Array) -> tuple[Array, Array]:
        edit = Edit(mask_at(values.shape, positions, index), values)
        return pair.effect(patched_prediction(construction, model, base, site, edit))

    sizes = tuple(values.shape[p] for p in positions)
    return (*map_grid(patched, sizes, chunk), pair.gap)


@compile_once(static_argnames=("construction", "site", "axes", "chunk"))
def _agreement(
    model: Transformer,
    reference: Transformer,
    base: Any,
    source: Any,
    *,
    construction: Any,
    site: str,
    axes: Any,
    chunk: int,
) -> Any:
    models = (model, reference)
    values = [site_values(construction, m, source, site) for m in models]
    pairs = [CleanRuns(construction, m, base, source) for m in models]
    positions = positions_of(model, site, axes)

    def patched(index: Array) -> Any:
        mask = mask_at(values[0].shape, positions, index)
        found = [
            patched_prediction(construction, m, base, site, Edit(mask, v))
            for m, v in zip(models, values, strict=True)
        ]
        apart = jnp.sqrt(jnp.sum((found[0] - found[1]) ** 2) / pairs[1].gap)
        return [pair.effect(p) for pair, p in zip(pairs, found, strict=True)], apart

    sizes = tuple(values[0].shape[p] for p in positions)
    effects, apart = map_grid(patched, sizes, chunk)
    return (*[(*e, pair.gap) for e, pair in zip(effects, pairs, strict=True)], apart)


@compile_once(static_argnames=("construction",), often=True)
def _exchange(
    model: Transformer, base: Any, source: Any, masks: Array, *, construction: Any
) -> tuple[Array, Array, Array]:
    values = site_values(construction, model, source, "residual")
    pair = CleanRuns(construction, model, base, source)

    def patched(mask: Array) -> tuple[Array, Array]:
        return pair.effect(
            patched_prediction(construction, model, base, "residual", Edit(mask, values))
        )

    return (*jax.lax.map(patched, masks), pair.gap)
