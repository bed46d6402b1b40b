"""What von Oswald et al. 2022 state of two layers trained on separate tokens, as claims."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from constructions.claims import Claim, Evidence, known_weights
from constructions.core.transformer import Transformer
from synthetic.compilation import compile_once


def loss_ratio(e: Evidence) -> float:
    """Loss of the model over the loss of the construction, on the same examples."""
    return e.loss(e.prediction) / e.loss(e.expected)


@compile_once(static_argnums=0, often=True)
def _found(construction: Any, model: Transformer, *inputs: Array) -> Array:
    stream, groups, _ = construction.stream(model, *inputs)
    attention = model.run(stream, groups, sites=("attention",))[1]["attention"][0]
    favourite = attention.mean(0).argmax(-1)  # [head, token]
    x = jnp.arange(0, 2 * construction.num_examples, 2)
    found = (favourite[:, x] == x + 1) | (favourite[:, x + 1] == x)
    return found.any(0).mean()


def pairing(e: Evidence) -> float:
    """Share of pairs of which one half, in some head of the first layer, looks at the other most.

    Of attention averaged over inputs; x_i may look at y_i or y_i at x_i.
    """
    inputs = jax.tree.map(lambda a: a[:1024], e.examples.inputs)
    return float(_found(e.construction, e.model, *inputs))


def softmax_first(e: Evidence) -> str:
    """The first layer has softmax heads, whose attention is a share of 1."""
    if missing := known_weights(e):
        return missing
    first = next(iter(e.model.config.layers()))
    others = [heads.mixer for heads in first.heads if heads.mixer != "softmax"]
    return f"layer 1 has {others[0]} heads, whose attention is no share of 1" if others else ""


_STEPS = ("step size + 10 %", "step size - 10 %")
_WIRING = ("centred attention", "copy from the previous token")
#: What predicts well, or looks like the step, without pairs that are found and descended on.
_RIVALS = ("least squares", "kernel smoother")
_SOFTMAX = ("no dump token", "score scale 5")
_PAPER = "von Oswald et al. 2022, arXiv 2212.07677, fig. 5"


def claims(mixer: str, attends: str) -> tuple[Claim, ...]:
    """The claims on two layers, of the first layer's mixer and of what it may look for."""
    wrong = (*_WIRING, *(_SOFTMAX if mixer == "softmax" else ()))
    equal_loss = Claim(
        "equal loss",
        "Two layers trained on separate tokens have the loss of one step of gradient descent.",
        "excess_loss",
        0.01,
        "<=",
        _PAPER,
        catches=("one step too many", *wrong, *_RIVALS),
        published=0.0,
        note="The first layer of the counterpart attends by position alone. The paper's, which "
        "also sees contents, is attends='anything': it goes below one step.",
    )
    if attends == "anything":
        rows = (
            replace(equal_loss, note="Refuted from below: see 'one step or better'."),
            Claim(
                "one step or better",
                "They have at most the loss of one step of gradient descent.",
                loss_ratio,
                1.005,
                "<=",
                _PAPER,
                catches=(*_STEPS, *wrong, "kernel smoother"),
                published=1.0,
                note="To one side: whatever predicts better, such as least squares, passes.",
            ),
        )
    else:
        rows = (
            equal_loss,
            Claim(
                "equal predictions",
                "Their predictions are those of the gradient step.",
                "prediction_distance",
                0.07,
                "<=",
                _PAPER,
                catches=(*_STEPS, "one step too many", *wrong, *_RIVALS),
            ),
            Claim(
                "aligned sensitivities",
                "Their sensitivity to the query points where the gradient step's does.",
                "sensitivity_cosine",
                0.997,
                ">=",
                _PAPER,
                catches=("one step too many", *_WIRING, *_RIVALS),
                note="A cosine cannot see a scale: a step size off by 10 % passes.",
            ),
        )
    if mixer == "linear":  # whose attention is no share of 1
        return rows
    found = Claim(
        "pairs found",
        "In the first layer one half of every pair looks at the other more than at all else.",
        pairing,
        0.9,
        ">=",
        _PAPER,
        catches=("copy from the previous token",),
        published=1.0,
        gauge="invariant: attention weights; whichever head and direction",
        note="Heads that look so and copy nothing would pass: what is done with the pairs is for "
        "the claims on predictions to say.",
        needs=(softmax_first,),
    )
    return (*rows, found)
