"""Gradients in place of patches, and patches of single paths between heads.

Effects are those of `probes.interchange`: movement of the prediction from the base input's towards
the source input's, 1 being all the way.
"""

from __future__ import annotations

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
    map_grid,
    mask_at,
    must_differ,
    pair_of,
    patched_prediction,
    positions_of,
    site_values,
    with_sites,
)
from probes.sites import Edited, Inputs, Subject
from synthetic.compilation import compile_once


def attribution(
    construction: Construction,
    model: Subject,
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
    model = with_sites(model)
    base, source = pair_of(base, source)
    axes = axes_of(construction, model, base, site, over)
    effect, gap = _attribution(model, base, source, construction=construction, site=site, axes=axes)
    must_differ(gap)
    return Sweep(axes, np.asarray(effect), np.full(effect.shape, np.nan))


def path_patch(
    construction: Construction, model: Subject, base: Inputs, source: Inputs, *, chunk: int = 8
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
    model = with_sites(model)
    base, source = pair_of(base, source)
    effect, gap = _path_patch(model, base, source, construction=construction, chunk=chunk)
    must_differ(gap)
    return np.asarray(effect)


@compile_once(static_argnames=("construction", "site", "axes"), often=True)
def _attribution(
    model: Transformer, base: Any, source: Any, *, construction: Any, site: str, axes: Any
) -> tuple[Array, Array]:
    here, there = (site_values(construction, model, inputs, site) for inputs in (base, source))
    pair = CleanRuns(construction, model, base, source)
    keep = positions_of(model, site, axes)[1:]

    def at_layer(layer: Array) -> Array:
        mask = mask_at(here.shape, (0,), layer[None])

        def along(value: Array) -> Array:
            # one layer is set to its own value, so that its gradient sees all layers behind it
            patched = patched_prediction(construction, model, base, site, Edit(mask, value[None]))
            return pair.along(patched - pair.start)

        gradient = jax.grad(along)(here[layer]) * (there[layer] - here[layer])
        rest = tuple(axis for axis in range(gradient.ndim) if axis + 1 not in keep)
        kept = sorted(keep)
        return jnp.transpose(gradient.sum(rest), [kept.index(axis) for axis in keep])

    return jax.lax.map(at_layer, jnp.arange(len(here))), pair.gap


@compile_once(static_argnames=("construction", "chunk"), often=True)
def _path_patch(
    model: Transformer, base: Any, source: Any, *, construction: Any, chunk: int
) -> tuple[Array, Array]:
    stream, groups, _ = construction.stream(model, *base)
    sites = model.run(stream, groups, sites=("residual", "head_output"))[1]
    change = site_values(construction, model, source, "head_output") - sites["head_output"]
    pair = CleanRuns(construction, model, base, source)
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

    return map_grid(patched, (depth, heads, depth + 1), chunk), pair.gap
