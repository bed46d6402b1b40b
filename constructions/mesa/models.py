"""Models of next states of any layers, to be trained and compared with the constructions.

`Construction.counterpart` trains the layers of a construction. The models here share with it only
how states enter and predictions leave: `construction.apply` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import jax
from jax import Array

from constructions.blank import blank
from constructions.config import Config, HeadsConfig, LayerConfig, SegmentConfig
from constructions.mesa.blocks import BlockScalars
from constructions.mesa.tokens import CLIP, STATE, NextState
from constructions.program import CAUSAL
from constructions.transformer import Transformer
from synthetic.dynamics import States

_MIXERS = ("linear", "softmax", "mesa")


def sequence_model(
    construction: NextState,
    mixers: Sequence[str],
    heads: int = 4,
    rows: int = 20,
    clip: float | None = None,
) -> Transformer:
    """Causal layers of heads and nothing else, every weight 0; `randomise` draws them.

    Args:
        construction: whose tokens the model reads; its stream is as wide.
        mixers: of the layers: "linear", "softmax" or "mesa" each.
        heads, rows: of every layer, and of their keys and values.
        clip: of the `Config`; `CLIP` for deep linear attention.

    Raises:
        ValueError: no mixer or one that is none of these, or a size below 1.
    """
    if isinstance(mixers, str) or not mixers or not set(mixers) <= set(_MIXERS):
        raise ValueError(f"mixers is {mixers!r}, must be a row of {_MIXERS}")
    if heads < 1 or rows < 1:
        raise ValueError(f"heads is {heads}, rows {rows}, both must be at least 1")
    layers = [LayerConfig((HeadsConfig(mixer, heads, rows, rows),)) for mixer in mixers]
    segments = [SegmentConfig((layer,), len(list(run))) for layer, run in groupby(layers)]
    program = construction.program
    config = Config(program.slots.width, tuple(segments), program.token_groups, clip=clip)
    # the first state has to find BOS where it looks for the state before
    keys = None if construction.tokens == "raw" else [STATE]
    return blank(config, CAUSAL, keys)


def drawn_scalars(
    key: Array, layers: int, heads: int = 2, channels: int = 4, std: float = 0.01
) -> BlockScalars:
    """Block scalars drawn from N(0, std^2)."""
    shape = (layers, heads, channels, channels)
    return BlockScalars(*(std * jax.random.normal(k, shape) for k in jax.random.split(key)))


def scalar_predictions(construction: NextState) -> Callable[[BlockScalars, States], States]:
    """What block scalars predict as a model of the construction's tokens, for `fit`; clipped."""

    def predict(scalars: BlockScalars, states: States) -> States:
        return construction.apply(scalars.expanded(construction.dim, CLIP), states)

    return predict
