"""What all patching shares: the effect of a patch, masks for a grid of patches, the grid's loop.

Also its first-order estimate by gradients (`attribution`), and patches of single paths between
heads (`path_patch`). An effect is how far the prediction moves from the base input's towards the
source input's, 1 being all the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.core.transformer import Edit, Transformer
from constructions.family import Construction
from probes.foreign import Subject
from probes.probe import NotApplicable
from probes.subject import Edited, Inputs, Readable, site_axes

NO_SITES = (
    "model is a function, must be a Transformer, or a Subject with activations and edit: an "
    "interchange puts values into its named sites. Of a function's activations, probe_table takes "
    "a table"
)


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


def with_sites(model: Readable) -> Transformer:
    """The model itself; ValueError for a function in its place, which has no sites to edit."""
    if isinstance(model, Transformer):
        return model
    raise NotApplicable(NO_SITES)


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
        raise NotApplicable(
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

    def __init__(self, construction: Any, model: Any, base: Any, source: Any) -> None:
        def run(inputs: Any) -> Array:
            if isinstance(model, Subject):
                return model(*inputs)
            return construction.apply(model, *inputs)

        self.start = run(base)
        self.way = run(source) - self.start
        self.gap = jnp.sum(self.way**2)

    def along(self, movement: Array) -> Array:
        """The effect: share of the way from base to source."""
        return jnp.sum(movement * self.way) / self.gap

    def effect(self, patched: Array) -> tuple[Array, Array]:
        """(effect, off_axis) of a patched prediction."""
        movement = patched - self.start
        along = self.along(movement)
        return along, jnp.sqrt(jnp.sum((movement - along * self.way) ** 2) / self.gap)


@dataclass(frozen=True, eq=False)
class ByHand:
    """Patches of a `Subject`, one run after the other.

    Attributes:
        subject: with activations and edits.
        base: the input that is run.
        site: what is patched.
        values: of the site on the source input, `[layer, batch, token, feature]`.
    """

    subject: Subject
    base: tuple[Any, ...]
    site: str
    values: np.ndarray

    @classmethod
    def of(cls, subject: Any, base: Any, source: Any, site: str) -> ByHand:
        """ValueError for a function that is no `Subject`, or one without the site or edits."""
        if not isinstance(subject, Subject) or subject.edit is None:
            raise NotApplicable(NO_SITES)
        found = subject.read(*source)
        if site not in found:
            raise ValueError(f"activations hold {sorted(found)}, must hold '{site}'")
        return cls(subject, base, site, found[site])

    def patched(self, where: Any) -> Array:
        """The prediction with the source's values where the mask, of that shape, is True."""
        shape = self.values.shape
        try:
            where = np.broadcast_to(np.asarray(where, bool), shape)
        except ValueError:
            raise ValueError(f"where has shape {np.shape(where)}, must fit {shape}") from None
        value: Any = self.values
        return self.subject.run({self.site: Edit(where, value)}, *self.base)[0]

    def positions(self, over: str | tuple[str, ...]) -> tuple[int, ...]:
        """Positions of the layers and of the named axes; ValueError for another name."""
        names = {"layer": 0, "token": 2, "width": 3}
        axes = ("layer", *((over,) if isinstance(over, str) else over))
        for axis in axes[1:]:
            if axis not in names or axis == "layer":
                raise ValueError(f"over is {over!r}, must name axes of '{self.site}': token, width")
        return tuple(names[axis] for axis in axes)

    def masks(self, positions: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(index, mask) of every patch of one index on each of these axes."""
        for index in np.ndindex(*(self.values.shape[p] for p in positions)):
            mask = np.zeros(self.values.shape, bool)
            at: list[Any] = [slice(None)] * 4
            for position, number in zip(positions, index, strict=True):
                at[position] = number
            mask[tuple(at)] = True
            yield index, mask


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


def attribution(
    construction: Construction,
    model: Readable,
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
    construction: Construction, model: Readable, base: Inputs, source: Inputs, *, chunk: int = 8
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


@partial(jax.jit, static_argnames=("construction", "site", "axes"))
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


@partial(jax.jit, static_argnames=("construction", "chunk"))
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
