"""Interchange interventions: run one input with a value taken from another, see what moves.

Write p(base) and p(source) for the predictions on two inputs and p(patched) for the prediction on
the base input while a site holds what it holds on the source input. The effect of the patch is

    effect  =  <p(patched) - p(base), p(source) - p(base)> / |p(source) - p(base)|^2,

with inner products over batch and outputs: 0 if nothing moves, 1 if the prediction becomes the
source's. What moves in other directions is `off_axis`, in the same unit. Effects may exceed 1 or be
negative: parts of a computation can overshoot or cancel.

Patches at all layers and positions are arrays, so that a whole sweep is one compiled function. One
patch (`interchange`), or one variable of the algorithm (`exchange`), is for use as a library.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.core.transformer import Edit, Transformer
from constructions.family import Construction
from constructions.runs import Run
from probes.foreign import no_edits
from probes.patching import (
    ByHand,
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
from probes.probe import Probe, Result, compiled_like, table
from probes.style import Picture, figure_of, in_style, number, percent, png, span, ticks
from probes.subject import Inputs, Readable, place_mask, site_axes, too_large
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
    model: Readable,
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
        where: booleans that broadcast to `[layer, batch, *axes]`, see `probes.subject.where`.

    Raises:
        ValueError: shapes of `base` and `source` differ, unknown site, `where` does not fit, or the
            model is a function.
    """
    base, source = pair_of(base, source)
    if not isinstance(model, Transformer):
        return ByHand.of(model, base, source, site).patched(where)
    return _interchange(
        model, base, source, jnp.asarray(where), construction=construction, site=site
    )


def sweep(
    construction: Construction,
    model: Readable,
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
    base, source = pair_of(base, source)
    if not isinstance(model, Transformer):
        hand = ByHand.of(model, base, source, site)
        pair, positions = CleanRuns(construction, model, base, source), hand.positions(over)
        must_differ(pair.gap)
        found = {i: pair.effect(hand.patched(mask)) for i, mask in hand.masks(positions)}
        axes = ("layer", *((over,) if isinstance(over, str) else over))
        return _sweep_of(axes, found)
    axes = axes_of(construction, model, base, site, over)
    effect, off_axis, gap = _sweep(
        model, base, source, construction=construction, site=site, axes=axes, chunk=chunk
    )
    must_differ(gap)
    return Sweep(axes, np.asarray(effect), np.asarray(off_axis))


def interchange_agreement(
    construction: Construction,
    model: Readable,
    reference: Readable,
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
    reference = with_sites(reference)
    base, source = pair_of(base, source)
    if not isinstance(model, Transformer):
        return _agreement_by_hand(construction, model, reference, base, source, site, over)
    axes = axes_of(construction, model, base, site, over)
    sizes = [site_axes(m.config, 1, site) for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"site '{site}' has sizes {sizes[0]} in model, {sizes[1]} in reference")
    (ours, off, gap), (theirs, their_off, their_gap), apart = _agreement(
        model, reference, base, source, construction=construction, site=site, axes=axes, chunk=chunk
    )
    must_differ(gap)
    must_differ(their_gap)
    return _agreed(
        np.asarray(apart),
        Sweep(axes, np.asarray(ours), np.asarray(off)),
        Sweep(axes, np.asarray(theirs), np.asarray(their_off)),
    )


def _agreed(apart: np.ndarray, ours: Sweep, theirs: Sweep) -> Agreement:
    """The agreement of two sweeps."""
    a, b = np.asarray(ours.effect, float), np.asarray(theirs.effect, float)
    spread = a.std() * b.std()
    correlation = np.mean((a - a.mean()) * (b - b.mean())) / spread if spread > 0 else np.nan
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return Agreement(float(correlation), error, apart, ours, theirs)


def _sweep_of(axes: tuple[str, ...], found: dict[tuple[int, ...], tuple[Any, Any]]) -> Sweep:
    """A sweep of (effect, off_axis) by index."""
    shape = tuple(np.max([*found], axis=0) + 1)
    both = np.array([found[i] for i in np.ndindex(*shape)], float).reshape(*shape, 2)
    return Sweep(axes, both[..., 0], both[..., 1])


def _agreement_by_hand(
    construction: Construction,
    model: Any,
    reference: Transformer,
    base: Any,
    source: Any,
    site: str,
    over: str | tuple[str, ...],
) -> Agreement:
    """`interchange_agreement` of a `Subject`, patch by patch."""
    hand = ByHand.of(model, base, source, site)
    positions = hand.positions(over)
    theirs = _values(reference, source, construction=construction, site=site)
    sizes = [[a.shape[p] for p in positions] for a in (hand.values, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"site '{site}' has sizes {sizes[0]} in model, {sizes[1]} in reference")
    pairs = [CleanRuns(construction, m, base, source) for m in (model, reference)]
    for pair in pairs:
        must_differ(pair.gap)
    found: list[dict[tuple[int, ...], Any]] = [{}, {}]
    apart = np.zeros(sizes[0])
    for index, mask in hand.masks(positions):
        # beyond the axes that are patched, the two have sizes of their own
        whole = mask.any(tuple(set(range(4)) - set(positions)), keepdims=True)
        own = _interchange(
            reference, base, source, jnp.asarray(whole), construction=construction, site=site
        )
        both = hand.patched(mask), own
        for one, pair, prediction in zip(found, pairs, both, strict=True):
            one[index] = pair.effect(prediction)
        apart[index] = jnp.sqrt(jnp.sum((both[0] - both[1]) ** 2) / pairs[1].gap)
    axes = ("layer", *((over,) if isinstance(over, str) else over))
    return _agreed(apart, *(_sweep_of(axes, one) for one in found))


@compile_once(static_argnames=("construction", "site"))
def _values(model: Transformer, inputs: Any, *, construction: Any, site: str) -> Array:
    return site_values(construction, model, inputs, site)


def exchange(
    construction: Construction, model: Readable, base: Inputs, source: Inputs, name: str
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


@dataclass(frozen=True)
class Patches:
    """Effect of exchanging one token's stream after one layer, `[layer, token]`; see interchange.

    Attributes:
        construction, trained: effects, the trained one the mean over seeds.
        correlation: between the two maps, for every seed.
        relative_error: |trained - construction| / |construction|, for every seed.
    """

    construction: list[list[float]]
    trained: list[list[float]]
    correlation: list[float]
    relative_error: list[float]


def measure(run: Run, seed: int) -> Result:
    """Effect of exchanging one token's stream between two inputs, at every layer and token."""
    construction = run.construction
    reference = compiled_like(construction, run.models[0])
    base, source = (construction.sample(key, 64) for key in jax.random.split(jax.random.key(seed)))
    found = [
        interchange_agreement(construction, model, reference, base, source) for model in run.models
    ]
    patches = Patches(
        construction=found[0].reference.effect.tolist(),
        trained=np.mean([f.model.effect for f in found], axis=0).tolist(),
        correlation=[f.correlation for f in found],
        relative_error=[f.relative_error for f in found],
    )
    rows, values = [], []
    for name in ("construction", "trained"):
        effect = getattr(patches, name)
        rows += [f"{name}, {layer} layers applied" for layer in range(len(effect))]
        values += effect
    return table(
        "effect of interchanging a token's stream",
        [f"token {n + 1}" for n in range(len(values[0]))],
        rows,
        values,
        data=patches,
        picture=partial(figure, patches),
    )


def needs_equal_sites(run: Run) -> str:
    """Models with sites, of the construction's sizes, and a stream that is not too large."""
    if missing := too_large(run.construction):
        return missing
    reference = compiled_like(run.construction, run.models[0])
    for model in run.models:
        if not isinstance(model, Transformer):
            if missing := no_edits(run.construction, model):
                return missing
            inputs = run.construction.sample(jax.random.key(0), 1)
            layers, wanted = len(model.read(*inputs)["residual"]), reference.config.depth + 1
            if layers != wanted:
                return f"site 'residual' has {layers} layers in model, {wanted} in reference"
            continue
        sizes = [site_axes(m.config, 1, "residual") for m in (model, reference)]
        if sizes[0] != sizes[1]:
            return f"site 'residual' has sizes {sizes[0]} in model, {sizes[1]} in reference"
    return ""


@in_style
def figure(patches: Patches) -> Picture:
    """The two maps side by side."""
    built, trained = np.asarray(patches.construction), np.asarray(patches.trained)
    limit = float(max(np.abs(built).max(), np.abs(trained).max())) or 1.0
    drawing, axes = figure_of(9.2, 1.5 + 0.28 * len(built), 2, sharey=True)
    image: Any = None
    for axis, title, effect in zip(
        axes, ("construction", "trained"), (built, trained), strict=True
    ):
        image = axis.imshow(effect, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set(title=title, xlabel="token")
        ticks(axis.xaxis, [str(n + 1) for n in range(built.shape[1])])
        ticks(axis.yaxis, [str(n) for n in range(len(built))])
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel("layers applied")
    drawing.colorbar(image, ax=list(axes), label="effect", shrink=0.9, pad=0.02)
    layer, token = np.unravel_index(np.abs(built).argmax(), built.shape)
    caption = (
        "Effect on the prediction of giving one token, after so many layers, the stream that it "
        "has on another input (1: the prediction becomes the other input's). The maps correlate at "
        f"{span(patches.correlation)} and differ by {span(patches.relative_error, percent)}; the "
        f"largest effect, {number(float(built[layer, token]))} in the construction and "
        f"{number(float(trained[layer, token]))} when trained, is at token {token + 1} after "
        f"{layer} layer{'s' if layer != 1 else ''}."
    )
    alt = "Two maps of patching effects, layers by tokens, construction and trained."
    title = "Is the same information used in the same places?"
    return Picture("patches", title, caption, alt, png(drawing))


INTERCHANGE = Probe(
    "interchange",
    "which token's stream does the prediction use, after which layer?",
    "two tokens carry the same, and each makes up for the other",
    measure,
    needs_equal_sites,
    functions=True,
)
