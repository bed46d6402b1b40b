"""The weights of a `Transformer`, by name: as they are stored, part by part, and head by head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flax import nnx
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
