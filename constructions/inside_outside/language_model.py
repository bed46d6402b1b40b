"""The trained counterpart: a masked language model in the shape of BERT, of the one class."""

from __future__ import annotations

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
from constructions.inside_outside.tableau import GROUPS
from constructions.transformer import Transformer


def language_model(
    words: int,
    max_length: int,
    layers: int = 3,
    heads: int = 4,
    width: int = 64,
    activation: str = "gelu",
) -> Transformer:
    """A softmax transformer with learned positions and every weight 0.

    Every layer is norm, heads, norm, MLP of four times the width; scores are divided by the
    square root of a head's rows; nothing attends to padding.

    Args:
        words: size of the vocabulary; MASK, BOS, EOS and PAD come on top.
        max_length: words of the longest sentence.
        layers, heads, width: width is a multiple of heads.
        activation: of the MLPs.

    Raises:
        ValueError: a size below 1, or a width that its heads do not divide.
    """
    for name, value in (("layers", layers), ("heads", heads), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    if width % heads:
        raise ValueError(f"width is {width}, must be a multiple of heads={heads}")
    rows, norm = width // heads, NormConfig(affine=True)
    layer = LayerConfig(
        heads=(HeadsConfig("softmax", heads, rows, rows),),
        mlp=MlpConfig(4 * width, activation, bias=True),
        norm=norm,
        mlp_norm=norm,
    )
    config = Config(
        width,
        (SegmentConfig((layer,), layers),),
        GROUPS,
        final_norm=norm,
        tokens=TokensConfig(words + 4, words, max_length + 2),
        precision="default",
    )
    return blank(config, keys=[group for group in GROUPS if group != "pad"])
