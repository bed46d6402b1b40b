"""The weights of a `Transformer`, by name: as they are stored, part by part, and head by head.

And the rows of its tables: a number without a row is refused, or gives NaN where it is traced. JAX
reads the nearest row in its place, and counts negative numbers from the end: a word that does not
exist would be answered as another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array

from constructions.core.config import WIRING, Config, HeadsConfig, MlpConfig, NormConfig


class Wiring(nnx.Variable):
    """An array that is part of a model and that no optimiser touches: scales and masks."""


class Stored(nnx.Module):
    """Arrays and further `Stored` by name, nested as `Config.shapes`; numbers make a list."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        for name, value in arrays.items():
            if not isinstance(value, Mapping):
                value = Wiring(value) if name in WIRING else nnx.Param(value)
            elif 0 in value:
                value = nnx.List([Stored(part) for part in value.values()])
            else:
                value = Stored(value)
            setattr(self, name, value)


class Part(NamedTuple):
    """Equal heads, an MLP or a norm of a stored layer, with its weights by name.

    Attributes:
        kind: "heads", "mlp", "norm" or "mlp_norm".
        segment, position: of the layer, in `config.segments` and its pattern.
        row: which of the layer's groups of equal heads, else 0.
        config: its shape.
        weights: {name: `[repeat, ...]`}, of heads `[repeat, head, ...]`; names as in
            `Config.shapes`.
    """

    kind: str
    segment: int
    position: int
    row: int
    config: HeadsConfig | MlpConfig | NormConfig
    weights: dict[str, Array]


class Weights:
    """The weights of one head, MLP or norm as attributes, such as `head.query`, `[row, width]`."""

    def __init__(self, where: str, arrays: Mapping[str, Array]) -> None:
        self._where, self._arrays = where, dict(arrays)

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_") or name not in self._arrays:
            raise AttributeError(f"{self._where} has no '{name}', but {sorted(self._arrays)}")
        return self._arrays[name]

    def __dir__(self) -> list[str]:
        return sorted(self._arrays)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(a.shape)}" for name, a in self._arrays.items())
        return f"<{self._where}: {shapes}>"


class LayerWeights(NamedTuple):
    """The weights of one applied layer: its heads in the order of the config, its MLP and norms."""

    heads: tuple[Weights, ...]
    mlp: Weights | None
    norm: Weights | None
    mlp_norm: Weights | None

    def head(self, number: int) -> Weights:
        """A head, counted from 0."""
        if not 0 <= number < len(self.heads):
            raise ValueError(f"head is {number}, the layer has heads 0 to {len(self.heads) - 1}")
        return self.heads[number]


def parts_of(config: Config, arrays: Mapping[str, Any]) -> Iterator[Part]:
    """Heads, MLPs and norms of every stored layer, of arrays nested as `Config.shapes`."""
    for s, segment in enumerate(config.segments):
        for p, layer in enumerate(segment.pattern):
            stored = arrays["segments"][s]["layers"][p]
            if layer.norm is not None:
                yield Part("norm", s, p, 0, layer.norm, stored["norm"])
            for row, heads in enumerate(layer.heads):
                yield Part("heads", s, p, row, heads, stored["heads"][row])
            if layer.mlp_norm is not None:
                yield Part("mlp_norm", s, p, 0, layer.mlp_norm, stored["mlp_norm"])
            if layer.mlp is not None:
                yield Part("mlp", s, p, 0, layer.mlp, stored["mlp"])


def check_indices(name: str, indices: Any, count: int, of: str = "") -> None:
    """ValueError names a concrete number that is not 0 to `count` - 1, and its place.

    Args:
        name: of the argument.
        indices: integers; traced ones are not looked at.
        count: how many rows there are.
        of: what the rows are.
    """
    if isinstance(indices, Tracer):
        return
    known = np.asarray(indices)
    wrong = (known < 0) | (known >= count)
    if wrong.any():
        place = [int(n) for n in np.argwhere(wrong)[0]]
        raise ValueError(
            f"{name} holds {known[wrong][0]}, must be 0 to {count - 1}{of and ', ' + of} "
            f"(at {place})"
        )


def inside(indices: Array, count: int) -> Array:
    """Whether each number has a row."""
    return (indices >= 0) & (indices < count)


def take_rows(table: Array, indices: Any) -> Array:
    """`table[indices]`, `[*indices, ...]`; NaN where an index has no row."""
    indices = jnp.asarray(indices)
    beyond = jnp.where(indices < 0, len(table), indices)  # or they would count from the end
    return table.at[beyond].get(mode="fill", fill_value=jnp.nan)


def or_nan(values: Array, indices: Array, count: int) -> Array:
    """`values`, `[*indices, last]`, where the index has a row; NaN elsewhere."""
    return jnp.where(inside(indices, count)[..., None], values, jnp.nan)
