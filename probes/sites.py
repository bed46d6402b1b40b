"""Run a model and read or edit its named sites; edits are arrays, not closures.

A site is a value named in `constructions.core.transformer.SITES`, `[layer, batch, *axes]` with the
axes given there. Reading it asks "what does the model hold here?"; editing it asks "what would the
model have said, had it held something else here?". Both take a construction, which knows how its
inputs become a residual stream, and any model of the same class; a model trained elsewhere takes
part as `Activations`, a function from inputs to named arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from constructions.core.config import Config
from constructions.core.transformer import SITES, Edit, Transformer
from constructions.family import Construction
from synthetic.compilation import compile_once

__all__ = [
    "Activations",
    "Edit",
    "Edited",
    "Inputs",
    "Subject",
    "ablation",
    "activations",
    "place_mask",
    "read_sites",
    "site_axes",
    "variables",
    "where",
]

Inputs = Sequence[Array]

#: From the construction's inputs to named arrays `[layer, batch, token, feature]`, where the layers
#: are whatever that model calls layers and the tokens are those of the construction, in its order.
Activations = Callable[..., Mapping[str, Array]]

Subject = Transformer | Activations


class Edited(Transformer):
    """A model with some of its sites replaced; whatever takes a model takes it.

    It answers counterfactual questions through every public function: `construction.predict(
    Edited(model, edits), *inputs)` is the prediction under the edits, `construction.read` what the
    algorithm's variables have become. Weights are shared with `model`, not copied. The edits are
    tied to the number of tokens (and, where their batch axis is not 1, of examples) that they were
    made for.

    It misleads where an edit takes the model to states that no input produces; interchange with
    another input's values stays closer to what the model meets than zeros do.
    """

    def __init__(self, model: Transformer, edits: Mapping[str, Edit]) -> None:
        self.config = model.config
        self.segments = model.segments
        if model.config.final_norm is not None:
            self.final_norm = model.final_norm
        if model.config.tokens is not None:
            self.tokens = model.tokens
        older = model.edits if isinstance(model, Edited) else {}
        self.edits = nnx.data(_join(older, edits))

    def _run(
        self,
        stream: Array,
        groups: Array | None,
        read: slice | None = None,
        sites: tuple[str, ...] = (),
        edits: Mapping[str, Edit] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        # an edit may concern a token that only the last layer's shortened run would drop
        edits = _join(self.edits, edits or {})
        stream, values = super()._run(stream, groups, None, sites, edits)
        return stream[:, slice(None) if read is None else read], values


def _join(older: Mapping[str, Edit], newer: Mapping[str, Edit]) -> dict[str, Edit]:
    for site in newer:
        if site in older:
            raise ValueError(f"site '{site}' is edited already; join the two edits into one")
    return {**older, **newer}


@compile_once(static_argnames=("construction", "sites"))
def _read(
    model: Transformer, inputs: tuple[Array, ...], *, construction: Any, sites: tuple[str, ...]
) -> dict[str, Array]:
    stream, groups, _ = construction.stream(model, *inputs)
    return model.run(stream, groups, sites=sites)[1]


def read_sites(
    construction: Construction,
    model: Transformer,
    inputs: Inputs,
    sites: Sequence[str] = ("residual",),
) -> dict[str, Array]:
    """What a model holds at named sites: `{site: [layer, batch, token, ...]}`, see `SITES`.

    Answers "what is there", not "what is used": a value that can be read may have no effect.
    ValueError for an unknown site.
    """
    return _read(model, tuple(inputs), construction=construction, sites=tuple(sites))


def activations(
    construction: Construction, subject: Subject, sites: Sequence[str] = ("residual",)
) -> Activations:
    """A function from inputs to named arrays, for our models and for functions of that kind alike.

    TypeError if `subject` is neither.
    """
    if isinstance(subject, Transformer):
        return lambda *inputs: read_sites(construction, subject, inputs, sites)
    if not callable(subject):
        raise TypeError(f"subject is {subject!r}, must be a Transformer or a function of inputs")
    return subject


def site_axes(config: Config, tokens: int, site: str) -> dict[str, int]:
    """The axes of a site and their sizes, without batch: {"layer": ..., "token": ..., ...}."""
    if site not in SITES:
        raise ValueError(f"unknown site '{site}', must be one of {sorted(SITES)}")
    sizes = {"head": config.max_heads, "width": config.width, "hidden": config.max_hidden}
    axes = {"layer": config.depth + (site == "residual")}
    return axes | {axis: sizes.get(axis, tokens) for axis in SITES[site][1].split()}


def where(config: Config, tokens: int, site: str, **index: Any) -> np.ndarray:
    """The mask of an `Edit` from coordinates: `where(config, 11, "residual", layer=2, token=10)`.

    Args:
        config: of the model.
        tokens: length of its stream.
        site: a name in `SITES`.
        **index: for each axis of the site (`layer`, `token`, `head`, `width`, ...) a number, a
            list of numbers or a slice; an axis left out is taken whole.

    Returns:
        Booleans `[layer, batch, *axes]`; axes taken whole and the batch have size 1.

    Raises:
        ValueError: the site has no such axis, or a number lies outside it.
    """
    axes = site_axes(config, tokens, site)
    unknown = set(index) - set(axes)
    if unknown:
        raise ValueError(f"site '{site}' has axes {list(axes)}, not {sorted(unknown)}")
    result = np.ones((1,) * (len(axes) + 1), bool)
    for number, (name, size) in enumerate(axes.items()):
        if index.get(name) is None:
            continue
        mask = np.zeros(size, bool)
        try:
            mask[index[name]] = True
        except IndexError:
            raise ValueError(
                f"{name} is {index[name]}, must be within 0..{size - 1} at site '{site}'"
            ) from None
        # the batch axis stands behind the layers
        axis = number + (number > 0)
        result = result & mask.reshape([-1 if a == axis else 1 for a in range(result.ndim)])
    return result


def ablation(kind: str, values: Array, key: Array | None = None) -> Array:
    """What an ablated site holds instead of `values` `[layer, batch, ...]`.

    "zero" asks what the model does without the value, and is the least natural; "mean" (over the
    batch) removes what varies between inputs; "resample" gives every example the value of another
    one, which keeps the distribution of each value but breaks its relation to the rest.

    Raises:
        ValueError: another kind; "resample" without a key or with fewer than two examples.
    """
    if kind == "zero":
        return jnp.zeros_like(values)
    if kind == "mean":
        return jnp.broadcast_to(values.mean(1, keepdims=True), values.shape)
    if kind != "resample":
        raise ValueError(f"kind is {kind!r}, must be 'zero', 'mean' or 'resample'")
    batch = values.shape[1]
    if key is None or batch < 2:
        raise ValueError(f"'resample' needs a key and two examples, got {key} and {batch}")
    # one random cycle through all examples: nobody keeps its own value
    cycle = jax.random.permutation(key, batch)
    donor = jnp.zeros(batch, int).at[cycle].set(jnp.roll(cycle, 1))
    return values[:, donor]


def variables(
    construction: Construction, depth: int, inputs: Inputs
) -> dict[str, tuple[np.ndarray, ...]]:
    """Name -> (layer, token, column) of every entry, each of the value's own shape."""
    slots = construction.program.slots
    return {
        name: tuple(
            np.broadcast_arrays(
                place.layer[..., None], place.token[..., None], place.columns(slots)
            )
        )
        for name, place in construction.places(depth, *inputs).items()
    }


def place_mask(
    construction: Construction, config: Config, tokens: int, inputs: Inputs, name: str
) -> dict[int, np.ndarray]:
    """Masks of the residual stream that cover one variable: {layers applied: mask}.

    The mask `[layer, 1, token, width]` marks the columns in which the compiled construction keeps
    variable `name` after that many layers, at every token that owns a part of it. In a trained
    model the same columns need not hold the same variable.

    ValueError for a name that has no place.
    """
    placed = variables(construction, config.depth, inputs)
    if name not in placed:
        raise ValueError(f"'{name}' has no place in the stream, must be one of {sorted(placed)}")
    layer, token, column = placed[name]
    masks = {}
    for number in np.unique(layer):
        chosen = layer == number
        mask = np.zeros((config.depth + 1, 1, tokens, config.width), bool)
        mask[number, 0, token[chosen], column[chosen]] = True
        masks[int(number)] = mask
    return masks
