"""Whether a transformer that once trained another by gradient descent still does, as claims.

Nobody has published what becomes of such a construction when it is trained; these thresholds say
what "still a simulator of gradient descent" would mean.

Also its counterpart, TinT itself trained further, and near-misses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from constructions.claims import Claim, Evidence, NearMiss, known_weights
from constructions.core.transformer import Transformer, randomise
from constructions.family import Counterpart
from constructions.interchange.decoder import CHANGED
from constructions.tint import algorithm
from synthetic.compilation import compile_once
from synthetic.fitting.train import Recipe

_SOURCE = "construction of Panigrahi et al. 2023, arXiv 2307.01189; trained further here"


class Alignment(NamedTuple):
    """Agreement of an update with gradient descent's, as medians over sequences.

    Attributes:
        cosine: of the change with that of gradient descent, all weights as one vector.
        relative: |change - gradient descent's| / |the latter|.
    """

    cosine: Array
    relative: Array


def alignment(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> Alignment:
    """Compare the changes of all matrices and norms, as `Tint.trace` and `Tint.read` name them."""

    def flat(values: Mapping[str, Array]) -> Array:
        parts = [values[name].reshape(len(values[name]), -1) for name in CHANGED]
        return jnp.concatenate(parts, 1)

    ours, theirs = flat(found), flat(wanted)
    length = jnp.linalg.norm(theirs, axis=1)
    both = jnp.maximum(jnp.linalg.norm(ours, axis=1) * length, jnp.finfo(ours.dtype).tiny)
    return Alignment(
        jnp.median((ours * theirs).sum(1) / both),
        jnp.median(jnp.linalg.norm(ours - theirs, axis=1) / length),
    )


@compile_once(static_argnums=0, often=True)
def _alignment(construction: Any, model: Any, wanted: Mapping[str, Array], *inputs: Array) -> Any:
    return alignment(construction.read(model, *inputs), wanted)


def _aligned(e: Evidence) -> Alignment:
    inputs = e.examples.inputs
    wanted = e.once("changes", lambda: compile_once(e.construction.trace)(*inputs))
    return _alignment(e.construction, e.model, wanted, *inputs)


def cosine(e: Evidence) -> float:
    """Median over sequences of the cosine between the simulated update and gradient descent's."""
    return float(_aligned(e).cosine)


def relative(e: Evidence) -> float:
    """Median over sequences of |simulated update - gradient descent's| / |the latter|."""
    return float(_aligned(e).relative)


CLAIMS = (
    Claim(
        "along the gradient",
        "Trained further, it still changes the weights along the gradient.",
        cosine,
        0.95,
        ">=",
        _SOURCE,
        catches=("up the gradient", "no gradient through attention"),
        note="Value-only attention, a backward pass without the scores, is at .9997 and passes at "
        "this width; 'the step itself' rejects it.",
        gauge="none: prefix tokens are read where the construction keeps the weights",
        needs=(known_weights,),
    ),
    Claim(
        "the step itself",
        "What it writes is the step of gradient descent, to a hundredth of its length.",
        relative,
        0.01,
        "<=",
        _SOURCE,
        catches=(
            "up the gradient",
            "no gradient through attention",
            "value-only attention",
            "half the step",
        ),
        gauge="none: prefix tokens are read where the construction keeps the weights",
        needs=(known_weights,),
    ),
    Claim(
        "predictions after one step",
        "It predicts what the auxiliary model does after that step.",
        "prediction_distance",
        0.05,
        "<=",
        _SOURCE,
        catches=(
            "up the gradient",
            "half the step",
            "no gradient through attention",
            "no step",
            "cache of words",
        ),
        note="A cache of the words seen has less loss than the step, 4.26 against 4.52 nats, and "
        "is .68 from its predictions: what is learnt from the text is no sign of a gradient.",
    ),
)


def untouched(c: Any, tokens: Array, train_mask: Array) -> Array:
    """Predictions of the auxiliary model as it is, `[batch, time, word]`: no step at all."""
    del train_mask
    decode = partial(algorithm.decode, shape=c.shape)
    return jax.nn.softmax(jax.vmap(decode, (None, 0))(c.weights, tokens))


def cache(c: Any, tokens: Array, train_mask: Array, share: float = 0.3) -> Array:
    """The same mixed with how often each word follows the positions that are trained on.

    A unigram cache, without any derivative. Of the example the share is the one that comes nearest
    to the step, .29.
    """
    words = jax.nn.one_hot(tokens[:, 1:], c.shape.words)
    trained = jnp.asarray(train_mask, words.dtype)[:, :-1]
    seen = jnp.einsum("btw,bt->bw", words, trained)
    seen = seen / jnp.maximum(trained.sum(1, keepdims=True), 1)
    return (1 - share) * untouched(c, tokens, train_mask) + share * seen[:, None]


# each entry of a hand-built stack of dozens of layers moves all that is behind it
RECIPE = Recipe(
    steps=600,
    batch=16,
    learning_rate=1e-6,
    schedule="cosine",
    warmup=20,
    clip=1.0,
    chunk=50,
)
QUICK = replace(RECIPE, steps=60, batch=8, chunk=20)


def counterpart(c: Any) -> Counterpart:
    """`Tint.counterpart` where its weights are dense."""
    base = c.reference
    std = base.config.width**-0.5
    inputs = c.task.sample(jax.random.key(2**20), 32).inputs
    wanted = compile_once(c.trace)(*inputs)

    def measure(model: Transformer) -> dict[str, Array]:
        return alignment(c.read(model, *inputs), wanted)._asdict()

    def init(key: Array) -> Transformer:  # arrays of its own: a fit may give its first ones away
        del key
        return Transformer(base.config, jax.tree.map(jnp.copy, base.arrays()))

    return Counterpart(
        init,
        c.task,
        RECIPE,
        metrics=measure,
        quick=QUICK,
        random=lambda key: randomise(base, key, std),
    )


def near_misses(c: Any) -> dict[str, NearMiss]:
    """`Tint.near_misses` where its weights are dense."""

    def other(**changes: Any) -> NearMiss:
        return c.near_miss(replace(c, **changes))

    def without(*names: str) -> NearMiss:
        """Heads whose names begin like this write nothing."""
        layers = [
            replace(
                layer,
                heads=[
                    replace(head, write={slot: 0 * m for slot, m in head.write.items()})
                    if head.name.startswith(names)
                    else head
                    for head in layer.single_heads
                ],
            )
            for layer in c.program.layers
        ]
        return c.near_miss(replace(c.program, layers=layers))

    return {
        "up the gradient": other(learning_rate=-c.learning_rate),
        "half the step": other(learning_rate=c.learning_rate / 2),
        "no gradient through attention": without("d value", "d query", "d key"),
        "value-only attention": without("d query", "d key"),
        "no step": NearMiss(compile_once(partial(untouched, c)), c),
        "cache of words": NearMiss(compile_once(partial(cache, c)), c),
    }
