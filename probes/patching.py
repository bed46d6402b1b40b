"""What all patching shares: the effect of a patch, masks for a grid of patches, the grid's loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.core.transformer import Edit, Transformer
from constructions.family import Construction
from probes.sites import Edited, Inputs, Subject, site_axes


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


def pair_of(base: Inputs, source: Inputs) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Both inputs as tuples of arrays; ValueError unless their shapes are equal."""
    shapes = [[jnp.shape(a) for a in inputs] for inputs in (base, source)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"base has shapes {shapes[0]} and source {shapes[1]}, must be equal")
    return tuple(map(jnp.asarray, base)), tuple(map(jnp.asarray, source))


def with_sites(model: Subject) -> Transformer:
    """The model itself; ValueError for a function in its place, which has no sites to edit."""
    if isinstance(model, Transformer):
        return model
    raise ValueError(
        "model is a function, must be a Transformer: an interchange puts values into its named "
        "sites. Of a function's activations, probe_table takes a table"
    )


def count_tokens(construction: Construction, model: Transformer, inputs: Inputs) -> int:
    """Length of the stream that the inputs become."""
    return jax.eval_shape(lambda *a: construction.stream(model, *a).values, *inputs).shape[1]


def axes_of(
    construction: Construction, model: Transformer, inputs: Inputs, site: str, over: Any
) -> tuple[str, ...]:
    """("layer", *over); ValueError for an axis that the site does not have."""
    known = site_axes(model.config, count_tokens(construction, model, inputs), site)
    axes = ("layer", *((over,) if isinstance(over, str) else over))
    for axis in axes[1:]:
        if axis not in known or axis == "layer":
            raise ValueError(f"over is {over!r}, must name axes of '{site}': {list(known)[1:]}")
    return axes


def must_differ(gap: Array) -> None:
    """ValueError unless |p(source) - p(base)|^2 is positive."""
    if not float(gap) > 0:
        raise ValueError(
            "base and source have the same predictions (or NaN), so that no effect can be measured"
        )


def site_values(construction: Any, model: Transformer, inputs: Any, site: str) -> Array:
    """What the site holds on the inputs, `[layer, batch, *axes]`."""
    stream, groups, _ = construction.stream(model, *inputs)
    return model.run(stream, groups, sites=(site,))[1][site]


def patched_prediction(
    construction: Any, model: Transformer, inputs: Any, site: str, edit: Edit
) -> Array:
    """The prediction with one site edited."""
    return construction.apply(Edited(model, {site: edit}), *inputs)


class CleanRuns:
    """The two clean runs of a model, and the effect of a patched prediction between them."""

    def __init__(self, construction: Any, model: Transformer, base: Any, source: Any) -> None:
        self.start = construction.apply(model, *base)
        self.way = construction.apply(model, *source) - self.start
        self.gap = jnp.sum(self.way**2)

    def along(self, movement: Array) -> Array:
        """The effect: share of the way from base to source."""
        return jnp.sum(movement * self.way) / self.gap

    def effect(self, patched: Array) -> tuple[Array, Array]:
        """(effect, off_axis) of a patched prediction."""
        movement = patched - self.start
        along = self.along(movement)
        return along, jnp.sqrt(jnp.sum((movement - along * self.way) ** 2) / self.gap)


def map_grid(function: Callable[[Array], Any], sizes: tuple[int, ...], chunk: int) -> Any:
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


def mask_at(shape: tuple[int, ...], positions: tuple[int, ...], index: Array) -> Array:
    """Where the axes in `positions` have the given index; other axes have size 1."""
    mask = jnp.ones((1,) * len(shape), bool)
    for i, axis in enumerate(positions):
        here = jnp.arange(shape[axis]) == index[i]
        mask &= here.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return mask


def positions_of(model: Transformer, site: str, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Positions of named axes in the site's array."""
    names = list(site_axes(model.config, 1, site))
    return tuple(0 if axis == "layer" else names.index(axis) + 1 for axis in axes)
