"""Causal language models that differ in one thing, the mixer behind the first layer."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from constructions.blank import blank
from constructions.config import (
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
    TokensConfig,
)
from constructions.program import CAUSAL
from constructions.transformer import Transformer

MIXERS = ("softmax", "linear", "mesa")


def causal_language_model(
    words: int,
    mixer: str | None = "mesa",
    *,
    gates: bool = False,
    length: int = 128,
    layers: int = 1,
    heads: int = 4,
    width: int = 64,
) -> Transformer:
    """A causal transformer with every weight 0, in the manner of the models with mesa layers.

    Every layer is norm, heads, norm, MLP of four times the width (gelu). In the first one head n
    sees the token n places back and no other, which is a convolution of `heads` tokens: it binds
    to each token those before it, as the hybrid models of arXiv 2309.05858 do by a softmax layer
    and those of arXiv 2506.05233 by short convolutions. `layers` with the mixer follow. Order is
    known from the first layer alone, there are no positions.

    Left out of those models, to keep one class: keys and queries are neither normalised nor passed
    through an activation (the norm in front of the heads bounds them), there is no norm behind the
    heads, and the scores of linear heads are divided by `length` instead.

    Args:
        words: size of the vocabulary.
        mixer: of all layers but the first, one of "softmax", "linear", "mesa"; None for MLPs alone,
            which see no further back than the first layer.
        gates: of mesa heads.
        length: of sequences, for the scale of linear heads.
        layers, heads, width: width is a multiple of heads.

    Raises:
        ValueError: the mixer is another, a size is below 1, the heads do not divide the width, or
            gates of other heads.
    """
    if mixer is not None and mixer not in MIXERS:
        raise ValueError(f"mixer is {mixer!r}, must be None or one of {MIXERS}")
    if mixer is None and gates:
        raise ValueError("gates is True and mixer None, must be 'mesa' with gates")
    sizes = {"words": words, "length": length, "layers": layers, "heads": heads, "width": width}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, must be at least 1")
    if width % heads:
        raise ValueError(f"width is {width}, must be a multiple of heads={heads}")
    rows, norm = width // heads, NormConfig(affine=True)

    def segment(row: tuple[HeadsConfig, ...], repeats: int) -> SegmentConfig:
        mlp = MlpConfig(4 * width, "gelu", bias=True)
        return SegmentConfig((LayerConfig(row, mlp, norm, norm),), repeats)

    first = (HeadsConfig("softmax", heads, rows, rows),)
    then = () if mixer is None else (HeadsConfig(mixer, heads, rows, rows, gates=gates),)
    config = Config(
        width,
        (segment(first, 1), segment(then, layers)),
        final_norm=norm,
        tokens=TokensConfig(words, words),
        precision="default",
    )
    arrays = blank(config, CAUSAL).arrays()
    parts = [arrays["segments"][n]["layers"][0]["heads"] for n in range(2)]
    back = -np.arange(1, heads + 1, dtype=np.int32)
    parts[0][0]["window"] = jnp.asarray(np.stack([back, back], -1)[None])
    if mixer == "linear":
        parts[1][0]["scale"] = parts[1][0]["scale"] / length
    return Transformer(config, arrays)


def next_token(
    model: Transformer, tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time word"]:
    """Probabilities of the token behind each, from the tokens up to it."""
    return model.word_probabilities(model(model.embed(tokens)))
