"""The trained counterpart: a masked language model in the shape of BERT, of the one class.

Models that are almost the construction: what its claims must tell from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array

from constructions.claims import NearMiss
from constructions.core.compile import blank
from constructions.core.config import (
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
    TokensConfig,
)
from constructions.core.program import Head, HeadFamily
from constructions.core.transformer import Transformer, randomise
from constructions.family import Counterpart
from constructions.inside_outside.paper import divergence
from constructions.inside_outside.tableau import GROUPS
from synthetic.fitting.train import Recipe
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar


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


def counterpart(c: Any) -> Counterpart:
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


def near_misses(c: Any) -> dict[str, NearMiss]:
    """Parses by a grammar that is off, or with half of the outside pass."""
    g = c.grammar

    def with_grammar(**changes: Any) -> NearMiss:
        parts = {"root": g.root, "rules": g.rules, "emission": g.emission} | changes
        names = (g.nonterminals, g.preterminals, g.vocabulary)
        other = replace(c, grammar=Grammar(*names, **parts))
        return c.near_miss(other)

    alike = (g.rules > 0) / np.maximum((g.rules > 0).sum((1, 2), keepdims=True), 1)
    words = 0.7 * g.emission + 0.3 * g.emission.sum(1, keepdims=True) / g.emission.shape[1]
    before = [*c.layout.before.values()]

    def left(part: Head | HeadFamily) -> Head | HeadFamily:
        if isinstance(part, Head):
            return part
        kept = [t for t in part.terms if t[0] not in before and t[1] not in before]
        return replace(part, terms=kept)

    layers = [replace(la, heads=[left(h) for h in la.heads]) for la in c.program.layers]
    return {
        "every rule alike": with_grammar(rules=alike),
        "uniform words": with_grammar(emission=words),
        "left children only": c.near_miss(replace(c.program, layers=layers)),
    }
