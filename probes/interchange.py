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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.family import Construction
from constructions.transformer import Edit, Transformer
from probes.sites import Edited, Inputs, place_mask, site_axes


@dataclass(frozen=True, eq=False)
class Sweep:
    """Effects of single patches.

    Attributes:
        axes: names of the axes of the maps, "layer" first. For the site "residual" layer l is the
            stream after l layers, so there are depth + 1 of them.
        effect: see the module's equation.
        off_axis: norm of the movement orthogonal to p(source) - p(base), in units of its norm.
    """

    axes: tuple[str, ...]
    effect: np.ndarray
    off_axis: np.ndarray


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
    model: Transformer,
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
        ValueError: shapes of `base` and `source` differ, unknown site, `where` does not fit.
    """
    base, source = _pair(base, source)
    return _interchange(
        model, base, source, jnp.asarray(where), construction=construction, site=site
    )


def sweep(
    construction: Construction,
    model: Transformer,
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
        ValueError: base and source do not differ in shape only, unknown site or axis, or equal
            predictions on both, which leave no effect to measure.
    """
    base, source = _pair(base, source)
    axes = _axes(construction, model, base, site, over)
    effect, off_axis, gap = _sweep(
        model, base, source, construction=construction, site=site, axes=axes, chunk=chunk
    )
    _differ(gap)
    return Sweep(axes, np.asarray(effect), np.asarray(off_axis))


def interchange_agreement(
    construction: Construction,
    model: Transformer,
    reference: Transformer,
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
    base, source = _pair(base, source)
    axes = _axes(construction, model, base, site, over)
    sizes = [site_axes(m.config, 1, site) for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"site '{site}' has sizes {sizes[0]} in model, {sizes[1]} in reference")
    (ours, off, gap), (theirs, their_off, their_gap), apart = _agreement(
        model, reference, base, source, construction=construction, site=site, axes=axes, chunk=chunk
    )
    _differ(gap)
    _differ(their_gap)
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
    construction: Construction, model: Transformer, base: Inputs, source: Inputs, name: str
) -> dict[int, float]:
    """Effect of exchanging one variable of the algorithm: {layers applied: effect}.

    Patches the columns in which the compiled construction keeps `name`, at all tokens that own a
    part of it. On a trained model this asks whether it uses the construction's own columns for the
    variable; a model may hold it elsewhere, which `sweep` over whole tokens would show.

    ValueError as for `sweep`, and for a name without a place.
    """
    base, source = _pair(base, source)
    tokens = _tokens(construction, model, base)
    masks = place_mask(construction, model.config, tokens, base, name)
    stacked = jnp.asarray(np.stack(list(masks.values())))
    effect, _, gap = _exchange(model, base, source, stacked, construction=construction)
    _differ(gap)
    return dict(zip(masks, np.asarray(effect, float).tolist(), strict=True))


def attribution(
    construction: Construction,
    model: Transformer,
    base: Inputs,
    source: Inputs,
    *,
    site: str = "residual",
    over: str | tuple[str, ...] = "token",
) -> Sweep:
    """First-order estimate of `sweep`: gradient on the base input times the difference of values.

    Costs one gradient a layer instead of one run a patch. Exact where the prediction is linear in
    the site (the last residual, in a model without final norm), right to first order for inputs
    that are close, and wrong where softmax or MLPs saturate in between. `off_axis` is NaN.

    Arguments and errors as in `sweep`.
    """
    base, source = _pair(base, source)
    axes = _axes(construction, model, base, site, over)
    effect, gap = _attribution(model, base, source, construction=construction, site=site, axes=axes)
    _differ(gap)
    return Sweep(axes, np.asarray(effect), np.full(effect.shape, np.nan))


def path_patch(
    construction: Construction, model: Transformer, base: Inputs, source: Inputs, *, chunk: int = 8
) -> np.ndarray:
    """Effects of the direct paths from every head to the heads of every later layer.

    The stream that enters layer r is changed by what head n of layer l would have added on the
    source input; the heads of layer r react, everything else up to there stays as on the base
    input. Answers "which head talks to which layer?". First-order paths only: two heads that talk
    through a third one show nothing here.

    Returns:
        `[sender layer, sender head, receiver]`, receivers 0..depth-1 being layers and the last one
        the output itself. Zero where the receiver does not come after the sender.

    ValueError as for `sweep`.
    """
    base, source = _pair(base, source)
    effect, gap = _path_patch(model, base, source, construction=construction, chunk=chunk)
    _differ(gap)
    return np.asarray(effect)


def _pair(base: Inputs, source: Inputs) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    shapes = [[jnp.shape(a) for a in inputs] for inputs in (base, source)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"base has shapes {shapes[0]} and source {shapes[1]}, must be equal")
    return tuple(map(jnp.asarray, base)), tuple(map(jnp.asarray, source))


def _tokens(construction: Construction, model: Transformer, inputs: Inputs) -> int:
    return jax.eval_shape(lambda *a: construction.embed(model, *a).stream, *inputs).shape[1]


def _axes(
    construction: Construction, model: Transformer, inputs: Inputs, site: str, over: Any
) -> tuple[str, ...]:
    known = site_axes(model.config, _tokens(construction, model, inputs), site)
    axes = ("layer", *((over,) if isinstance(over, str) else over))
    for axis in axes[1:]:
        if axis not in known or axis == "layer":
            raise ValueError(f"over is {over!r}, must name axes of '{site}': {list(known)[1:]}")
    return axes


def _differ(gap: Array) -> None:
    if not float(gap) > 0:
        raise ValueError(
            "base and source have the same predictions (or NaN), so that no effect can be measured"
        )


def _values(construction: Any, model: Transformer, inputs: Any, site: str) -> Array:
    stream, groups, _ = construction.embed(model, *inputs)
    return model.run(stream, groups, sites=(site,))[1][site]


def _predict(construction: Any, model: Transformer, inputs: Any, site: str, edit: Edit) -> Array:
    return construction.apply(Edited(model, {site: edit}), *inputs)


class _Pair:
    """The two clean runs of a model, and the effect of a patched prediction between them."""

    def __init__(self, construction: Any, model: Transformer, base: Any, source: Any) -> None:
        self.start = construction.apply(model, *base)
        self.way = construction.apply(model, *source) - self.start
        self.gap = jnp.sum(self.way**2)

    def along(self, movement: Array) -> Array:
        return jnp.sum(movement * self.way) / self.gap

    def effect(self, patched: Array) -> tuple[Array, Array]:
        movement = patched - self.start
        along = self.along(movement)
        return along, jnp.sqrt(jnp.sum((movement - along * self.way) ** 2) / self.gap)


def _map(function: Any, sizes: tuple[int, ...], chunk: int) -> Any:
    """`function` of every index of a grid, `chunk` at a time, results shaped like the grid."""
    runs = int(np.prod(sizes))
    rounds = -(-runs // max(1, chunk))
    chunk = -(-runs // max(1, rounds))
    # indices of -1 fill the last round: they match nothing, so they patch nothing
    grid = np.full((rounds * chunk, len(sizes)), -1)
    grid[:runs] = np.indices(sizes).reshape(len(sizes), runs).T
    grid = jnp.asarray(grid.reshape(rounds, chunk, len(sizes)))
    found = jax.lax.map(jax.vmap(function), grid)
    return jax.tree.map(
        lambda a: a.reshape(rounds * chunk, *a.shape[2:])[:runs].reshape(sizes), found
    )


def _mask(shape: tuple[int, ...], positions: tuple[int, ...], index: Array) -> Array:
    """Where the axes in `positions` have the given index; other axes have size 1."""
    mask = jnp.ones((1,) * len(shape), bool)
    for i, axis in enumerate(positions):
        here = jnp.arange(shape[axis]) == index[i]
        mask &= here.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return mask


def _positions(model: Transformer, site: str, axes: tuple[str, ...]) -> tuple[int, ...]:
    names = list(site_axes(model.config, 1, site))
    return tuple(0 if axis == "layer" else names.index(axis) + 1 for axis in axes)


@partial(jax.jit, static_argnames=("construction", "site"))
def _interchange(
    model: Transformer, base: Any, source: Any, where: Array, *, construction: Any, site: str
) -> Array:
    edit = Edit(where, _values(construction, model, source, site))
    return _predict(construction, model, base, site, edit)


@partial(jax.jit, static_argnames=("construction", "site", "axes", "chunk"))
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
    values = _values(construction, model, source, site)
    pair = _Pair(construction, model, base, source)
    positions = _positions(model, site, axes)

    def patched(index: Array) -> tuple[Array, Array]:
        edit = Edit(_mask(values.shape, positions, index), values)
        return pair.effect(_predict(construction, model, base, site, edit))

    sizes = tuple(values.shape[p] for p in positions)
    return (*_map(patched, sizes, chunk), pair.gap)


@partial(jax.jit, static_argnames=("construction", "site", "axes", "chunk"))
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
    values = [_values(construction, m, source, site) for m in models]
    pairs = [_Pair(construction, m, base, source) for m in models]
    positions = _positions(model, site, axes)

    def patched(index: Array) -> Any:
        mask = _mask(values[0].shape, positions, index)
        found = [
            _predict(construction, m, base, site, Edit(mask, v))
            for m, v in zip(models, values, strict=True)
        ]
        apart = jnp.sqrt(jnp.sum((found[0] - found[1]) ** 2) / pairs[1].gap)
        return [pair.effect(p) for pair, p in zip(pairs, found, strict=True)], apart

    sizes = tuple(values[0].shape[p] for p in positions)
    effects, apart = _map(patched, sizes, chunk)
    return (*[(*e, pair.gap) for e, pair in zip(effects, pairs, strict=True)], apart)


@partial(jax.jit, static_argnames=("construction",))
def _exchange(
    model: Transformer, base: Any, source: Any, masks: Array, *, construction: Any
) -> tuple[Array, Array, Array]:
    values = _values(construction, model, source, "residual")
    pair = _Pair(construction, model, base, source)

    def patched(mask: Array) -> tuple[Array, Array]:
        return pair.effect(_predict(construction, model, base, "residual", Edit(mask, values)))

    return (*jax.lax.map(patched, masks), pair.gap)


@partial(jax.jit, static_argnames=("construction", "site", "axes"))
def _attribution(
    model: Transformer, base: Any, source: Any, *, construction: Any, site: str, axes: Any
) -> tuple[Array, Array]:
    here, there = (_values(construction, model, inputs, site) for inputs in (base, source))
    pair = _Pair(construction, model, base, source)
    keep = _positions(model, site, axes)[1:]

    def at_layer(layer: Array) -> Array:
        mask = _mask(here.shape, (0,), layer[None])

        def along(value: Array) -> Array:
            # one layer is set to its own value, so that its gradient sees all layers behind it
            patched = _predict(construction, model, base, site, Edit(mask, value[None]))
            return pair.along(patched - pair.start)

        gradient = jax.grad(along)(here[layer]) * (there[layer] - here[layer])
        rest = tuple(axis for axis in range(gradient.ndim) if axis + 1 not in keep)
        kept = sorted(keep)
        return jnp.transpose(gradient.sum(rest), [kept.index(axis) for axis in keep])

    return jax.lax.map(at_layer, jnp.arange(len(here))), pair.gap


@partial(jax.jit, static_argnames=("construction", "chunk"))
def _path_patch(
    model: Transformer, base: Any, source: Any, *, construction: Any, chunk: int
) -> tuple[Array, Array]:
    stream, groups, _ = construction.embed(model, *base)
    sites = model.run(stream, groups, sites=("residual", "head_output"))[1]
    change = _values(construction, model, source, "head_output") - sites["head_output"]
    pair = _Pair(construction, model, base, source)
    depth, _, _, heads, _ = change.shape

    def patched(index: Array) -> Array:
        sender, head, receiver = index
        arrived = sites["residual"] + change[sender, :, :, head]
        at = (jnp.arange(depth + 1) == receiver) & (sender < receiver)
        into = Edit(at.reshape(-1, 1, 1, 1), arrived)
        reaction = model.run(stream, groups, sites=("head_output",), edits={"residual": into})[1]
        heard = Edit(at[:depth].reshape(-1, 1, 1, 1, 1), reaction["head_output"])
        # at the output there is nobody left to react: the changed stream itself is read
        final = Edit(at.at[:depth].set(False).reshape(-1, 1, 1, 1), arrived)
        subject = Edited(model, {"head_output": heard, "residual": final})
        return pair.along(construction.apply(subject, *base) - pair.start)

    return _map(patched, (depth, heads, depth + 1), chunk), pair.gap
