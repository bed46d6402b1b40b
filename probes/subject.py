"""What is probed: named values of a model, read or edited, and its weights as one vector.

Run a model and read or edit its named sites; edits are arrays, not closures.

A site is a value named in `constructions.core.transformer.SITES`, `[layer, batch, *axes]` with the
axes given there. Reading it asks "what does the model hold here?"; editing it asks "what would the
model have said, had it held something else here?". Both take a construction, which knows how its
inputs become a residual stream, and any model of the same class; a model trained elsewhere takes
part as a `probes.foreign.Subject`, or as `Activations`, a function from inputs to named arrays.

`ParameterVector` is a model as a function of one vector, all its trained weights in one order:
Jacobians, Hessians, masks over the weights and directions in their space all start there.

For use as a library: `where` and `ablation`, the place and the values of an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from constructions.core.config import Config
from constructions.core.transformer import SITES, Edit, Transformer
from constructions.family import Construction
from probes.foreign import Subject
from synthetic.compilation import compile_once
from synthetic.fitting.weights_file import named
from synthetic.tasks.task import Batch, outcome

__all__ = [
    "Activations",
    "Edit",
    "Edited",
    "Inputs",
    "Readable",
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

#: What values can be read off.
Readable = Transformer | Subject | Activations


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
    construction: Construction, subject: Readable, sites: Sequence[str] = ("residual",)
) -> Activations:
    """A function from inputs to named arrays, for our models and for functions of that kind alike.

    TypeError if `subject` is neither; ValueError for a `Subject` without activations.
    """
    if isinstance(subject, Subject):
        return lambda *inputs: {s: jnp.asarray(a) for s, a in subject.read(*inputs).items()}
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


def no_weights(model: Any) -> str:
    """Why a model has no vector of weights, in one phrase; "" where it has one."""
    if isinstance(model, nnx.Module):
        return ""
    return (
        f"model is a {type(model).__name__}, must be a Transformer: this one is too large for "
        "dense weights"
    )


@dataclass(frozen=True, eq=False)
class ParameterVector:
    """The functions of a construction's model, of its weights as a vector `[weight]`.

    Attributes:
        construction: gives inputs their meaning.
        model: whose shape it is.
    """

    construction: Construction
    model: Transformer

    def __post_init__(self) -> None:
        if missing := no_weights(self.model):
            raise ValueError(missing)

    @cached_property
    def _split(self) -> tuple[Any, Any, Any]:
        graphdef, params, rest = nnx.split(self.model, nnx.Param, ...)
        return graphdef, params, rest

    @cached_property
    def _raveled(self) -> tuple[Array, Callable[[Array], Any]]:
        with jax.ensure_compile_time_eval():  # kept beyond a jit that asks first
            return ravel_pytree(self._split[1])

    @property
    def theta(self) -> Float[Array, " weight"]:
        """The model's own weights."""
        return self._raveled[0]

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Which entries are which array, in the order of the vector."""
        sizes = [(name, array.size) for name, array in named(self._split[1]).items()]
        ends = np.cumsum([size for _, size in sizes]).tolist()
        return {name: slice(end - size, end) for (name, size), end in zip(sizes, ends, strict=True)}

    def vector(self, model: Transformer) -> Float[Array, " weight"]:
        """The weights of another model of this shape.

        Raises:
            ValueError: it has another shape.
        """
        if nnx.split(model, nnx.Param, ...)[0] != self._split[0]:
            raise ValueError("the two models have different shapes, must have one")
        return ravel_pytree(nnx.split(model, nnx.Param, ...)[1])[0]

    def merge(self, theta: Float[Array, " weight"]) -> Transformer:
        """The model with these weights; pure."""
        graphdef, _, rest = self._split
        return nnx.merge(graphdef, self._raveled[1](theta), rest)

    def predict(self, theta: Float[Array, " weight"], *inputs: Array) -> Array:
        """`construction.apply`; pure."""
        return self.construction.apply(self.merge(theta), *inputs)

    def losses(self, theta: Float[Array, " weight"], batch: Batch) -> Float[Array, " batch"]:
        """Loss of every example; pure."""
        return self.construction.task.loss(self.predict(theta, *batch.inputs), batch)

    def loss(self, theta: Float[Array, " weight"], batch: Batch) -> Float[Array, ""]:
        """Mean loss; pure."""
        return self.losses(theta, batch).mean()

    def log_probabilities(self, theta: Float[Array, " weight"], *inputs: Array) -> Array:
        """Of the outcomes, on the last axis of the prediction; pure.

        Probabilities of 0 count as the smallest positive number.

        Raises:
            ValueError: the task's predictions are no distributions.
        """
        task = self.construction.task
        kind, found = outcome(task), self.predict(theta, *inputs)
        if kind == "values":
            raise ValueError(f"{type(task).__name__}: its predictions are no distributions")
        if kind == "logits":
            return jax.nn.log_softmax(found)
        return jnp.log(jnp.maximum(found, jnp.finfo(found.dtype).tiny))

    def outcomes(self, batch: Batch) -> int:
        """Numbers in the prediction for one example."""
        shape = jax.eval_shape(self.predict, self.theta, *batch.inputs).shape
        return int(np.prod(shape[1:]))


#: Numbers in the stream of one input, over all layers and tokens, beyond which nothing is probed or
#: patched everywhere.
LARGEST = 250_000


def stream_size(construction: Construction) -> int:
    """Numbers in the compiled model's stream of one input, over all layers and tokens."""
    model = construction.reference
    inputs = construction.sample(jax.random.key(0), 1)
    tokens = jax.eval_shape(lambda *i: construction.stream(model, *i).values, *inputs).shape[1]
    return (model.config.depth + 1) * tokens * model.config.width


def too_large(construction: Construction) -> str:
    """Why a stream is not looked at everywhere, in one phrase; "" where it is."""
    if (numbers := stream_size(construction)) > LARGEST:
        return f"{numbers} numbers in the stream of an input, too many to look at everywhere"
    return ""
