"""Tuning on the labels of demonstrations, in the forward pass: classification in context.

Panigrahi et al. 2023 (arXiv 2307.01189, section 4) let TinT train on the labels of demonstrations
alone and then answer with them in sight. The auxiliary model has seen text of the kind, in which
one assignment of labels is the usual one, and is asked where none is.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from constructions.tint import algorithm
from constructions.tint.auxiliary import EPS, DecoderShape, decoder, logits
from constructions.tint.construction import Tint, simulate
from constructions.tint.measurements import descended
from constructions.tint.weights import Weights
from constructions.transformer import Transformer, randomise
from synthetic.task import Batch
from synthetic.train import Recipe, fit
from synthetic.word_labels import WordLabels

RECIPE = Recipe(steps=1500, batch=64, learning_rate=1e-2, schedule="cosine", warmup=20, clip=1.0)


def fitted(
    task: WordLabels,
    *,
    layers: int = 2,
    heads: int = 4,
    width: int = 16,
    recipe: Recipe = RECIPE,
    seed: int = 0,
) -> Transformer:
    """A decoder fitted to the next token of labelled words."""
    shape = DecoderShape(task.vocabulary, task.length, layers, heads, width, 4 * width, "gelu", EPS)
    blank = decoder(**asdict(shape))
    return fit(
        lambda key: randomise(blank, key, width**-0.5 / 2),
        task,
        recipe,
        predict=lambda model, tokens: jax.nn.softmax(logits(model, tokens)),
        seed=seed,
    ).model


def answers(
    c: Tint,
    task: WordLabels,
    batch: Batch,
    weights: Weights | None = None,
    everywhere: bool = False,
) -> dict[str, Float[np.ndarray, " sequence"]]:
    """Whether the right label has the highest probability of all labels, 1 or 0.

    Args:
        c: the simulator.
        task: what the batch is of; its `usual` share is what the posterior assumes.
        batch: sequences.
        weights: of the auxiliary model, in the place of those of `c` and of their shapes.
        everywhere: train on every next token that is seen, not on labels alone.

    Returns:
        "query alone": without demonstrations; "in context"; "descent", "simulated": in context,
        after steps on the demonstrations, by autograd and by the simulator; "posterior": the best
        that can be done.
    """
    weights = c.weights if weights is None else weights
    (tokens,), wanted = batch.inputs, batch.target[:, -1] - task.labels.start
    train = jnp.ones(tokens.shape, bool) if everywhere else task.before_labels(tokens)
    found = simulate(c, weights, tokens, train)
    tuned = descended(weights, tokens, train, c.learning_rate, c.shape, c.steps, c.trained)
    alone = _decode(weights, tokens[:, -1:], c.shape)

    def right(scores: Array) -> np.ndarray:
        return np.asarray(scores.argmax(-1) == wanted, np.float64)

    says = {
        "query alone": alone,
        "in context": found["logits_before"],
        "descent": tuned,
        "simulated": found["logits_after"],
    }
    right_of = {name: right(scores[:, -1, task.labels]) for name, scores in says.items()}
    return right_of | {"posterior": right(task.posterior(tokens))}


@partial(jax.jit, static_argnames="shape")
def _decode(
    weights: Weights, tokens: Int[Array, "batch time"], shape: DecoderShape
) -> Float[Array, "batch time word"]:
    return jax.vmap(partial(algorithm.decode, weights, shape=shape))(tokens)
