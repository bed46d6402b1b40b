"""A model without a construction: the shape alone, every head wired alike, to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.compiler import FAR
from constructions.config import Config, HeadsConfig
from constructions.program import EVERYWHERE, Window
from constructions.transformer import Transformer


def blank(
    config: Config, window: Window = EVERYWHERE, keys: Sequence[str] | None = None
) -> Transformer:
    """A transformer of this shape with every weight 0; `randomise` draws them.

    Scores of softmax heads are divided by sqrt(key_dim), others are left alone.

    Args:
        config: the shape.
        window: of every head; `constructions.program.CAUSAL` for a model of sequences.
        keys: kinds of tokens that heads attend to, at least one; all of `config.token_groups` if
            None.

    Raises:
        ValueError: `keys` is empty, or has a kind of token that the config does not have.
    """
    groups = config.token_groups
    if keys is not None and not keys:
        raise ValueError(f"keys is {keys!r}, must be None or some of {groups}")
    for name in keys or ():
        if name not in groups:
            raise ValueError(f"keys holds {name!r}, must be some of {groups}")
    low, high = window
    bounds = [-FAR if low is None else low, FAR if high is None else high]
    seen = [keys is None or group in keys for group in groups]

    def wired(heads: HeadsConfig, shapes: Any) -> dict[str, Array]:
        wiring = {
            "scale": heads.key_dim**-0.5 if heads.mixer == "softmax" else 1.0,
            "window": np.asarray(bounds, np.int32),
            "query_groups": True,
            "key_groups": np.asarray(seen),
            "sink_groups": False,
        }
        return {
            name: jnp.zeros(shape) if name not in wiring else jnp.full(shape, wiring[name])
            for name, shape in shapes.items()
        }

    def zeros(shapes: Any) -> Any:
        if isinstance(shapes, tuple):
            return jnp.zeros(shapes)
        return {name: zeros(shape) for name, shape in shapes.items()}

    shapes = config.shapes()
    arrays = zeros(shapes)
    for s, segment in enumerate(config.segments):
        for p, layer in enumerate(segment.pattern):
            heads = shapes["segments"][s]["layers"][p]["heads"]
            found = {n: wired(group, heads[n]) for n, group in enumerate(layer.heads)}
            arrays["segments"][s]["layers"][p]["heads"] = found
    return Transformer(config, arrays)
