"""What Zhao et al. 2023 say of masked language models on text of a grammar, as claims."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from constructions.claims import Claim, Evidence
from synthetic.compilation import compile_once
from synthetic.grammar import chart

_PAPER = "Zhao et al. 2023, arXiv 2303.08117"


def divergence(
    exact: Float[Array, "batch time word"],
    found: Float[Array, "batch time word"],
    mask: Bool[Array, "batch time"],
) -> Float[Array, ""]:
    """Mean KL(exact || found) at hidden words, in nats."""
    tiny = jnp.finfo(found.dtype).tiny
    logs = jnp.log(jnp.maximum(exact, tiny)) - jnp.log(jnp.maximum(found, tiny))
    nats = jnp.where(mask, (exact * logs).sum(-1), 0)
    return nats.sum() / jnp.maximum(mask.sum(), 1)


def _posterior(e: Evidence) -> Array:
    """The exact one, by the chart."""
    return e.once(
        "posterior",
        lambda: chart.inside_outside(e.construction.grammar, *e.examples.inputs).word_posterior,
    )


def from_posterior(e: Evidence) -> float:
    """Mean KL divergence of the exact posterior from the model, at hidden words, in nats."""
    return float(compile_once(divergence)(_posterior(e), e.prediction, e.examples.inputs[2]))


def beyond_bayes(e: Evidence) -> float:
    """Cross-entropy at hidden words less that of the exact posterior, in nats, same words."""
    return e.loss(e.prediction) - e.loss(_posterior(e))


def same_word(e: Evidence) -> float:
    """Share of the hidden words where model and posterior hold the same word most likely."""
    mask = e.examples.inputs[2]
    equal = (e.prediction.argmax(-1) == _posterior(e).argmax(-1)) & mask
    return float(equal.sum() / mask.sum())


CLAIMS = (
    Claim(
        "the posterior",
        "At hidden words the model is within 0.1 nats of what inside-outside says.",
        from_posterior,
        0.1,
        "<=",
        f"{_PAPER}, section 3 (the posterior is the optimum of masked language modelling)",
        catches=("left children only", "uniform words"),
        note="The least loss has this predictor alone; what computes it is another question. On a "
        "grammar as small as the example's, rules of equal probability do as well.",
    ),
    Claim(
        "the least loss",
        "Its cross-entropy is within 0.1 nats of the least that any model has.",
        beyond_bayes,
        0.1,
        "<=",
        f"{_PAPER}, section 3",
        catches=("left children only", "uniform words"),
    ),
    Claim(
        "the same word",
        "Five times in six it holds the same word most likely.",
        same_word,
        5 / 6,
        ">=",
        f"{_PAPER}, section 3",
        catches=("left children only",),
    ),
)
