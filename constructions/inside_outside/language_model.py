"""The trained counterpart: a masked language model in the shape of BERT, of the one class."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
from jax import Array

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
from constructions.family import Counterpart
from constructions.inside_outside.claims import divergence
from constructions.inside_outside.tableau import GROUPS
from constructions.transformer import Transformer, randomise
from synthetic import chart
from synthetic.train import Recipe

if TYPE_CHECKING:
    from constructions.inside_outside.construction import InsideOutside


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


def counterpart(c: InsideOutside) -> Counterpart:
    """The language model of a construction's sizes, its task, recipe and metric."""
    words = len(c.grammar.vocabulary)
    base = language_model(words, c.max_length, c.layers, c.heads, c.width, c.activation)
    batch = c.task.sample(jax.random.key(2**20), 512)
    exact = chart.inside_outside(c.grammar, *batch.inputs).word_posterior
    recipe = Recipe(
        steps=12000,
        batch=64,
        optimizer="adamw",
        learning_rate=4e-3,
        schedule="cosine",
        warmup=200,
        clip=1.0,
        weight_decay=0.01,
    )

    def measure(model: Transformer) -> dict[str, Array]:
        found = c.apply(model, *batch.inputs)
        return {"divergence": divergence(exact, found, batch.inputs[2])}

    # many hidden words teach more than few, and the optimum is the same
    task = replace(c.task, highest=max(0.5, c.masking))
    quick = replace(recipe, steps=500)
    return Counterpart(lambda key: randomise(base, key, 0.05), task, recipe, None, measure, quick)
