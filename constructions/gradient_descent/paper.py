"""What von Oswald et al. 2022 state of one trained layer, as claims that a number decides."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from constructions.claims import Claim, Evidence, masks_alike
from constructions.core.canonical import layer_tensors
from constructions.core.transformer import Transformer
from synthetic.compilation import compile_once
from synthetic.theory.one_layer import optimal_step_size

#: A setting may be so far from the one that a claim is about, relatively.
NEAR = 0.01


@compile_once(static_argnums=0)
def _forms(construction: Any, model: Transformer) -> tuple[Array, Array]:
    """(canonical tensor, exact excess) of a one-layer model."""
    return layer_tensors(model, construction.gauge())[0], construction.population_excess(model)


def step_size_error(e: Evidence) -> float:
    """|eta' / eta - 1|, eta' the multiple of the construction's step nearest the model's."""
    ours, theirs = (_forms(e.construction, m)[0] for m in (e.model, e.reference))
    return abs(float(jnp.vdot(theirs, ours) / jnp.vdot(theirs, theirs)) - 1)


def optimality_gap(e: Evidence) -> float:
    """Exact population loss over the least that one layer can reach, less 1."""
    return float(_forms(e.construction, e.model)[1]) / e.construction.optimal_loss


def best_step_size(e: Evidence) -> str:
    """The construction's step size is the best one for a single step."""
    given, best = float(e.construction.step_sizes[0]), optimal_step_size(e.construction.task)
    if abs(given / best - 1) <= NEAR:
        return ""
    return f"step_size is {given:.4g}, the claim is about the best one, {best:.4g}"


def added_loss(e: Evidence) -> float:
    """Loss of the model over the loss of the construction, less 1; negative for a better model."""
    return e.loss(e.prediction) / e.loss(e.expected) - 1


def published_curvature(e: Evidence) -> str:
    """The construction's curvature is the one that the paper's training found, or near it."""
    given = float(e.construction.curvatures[0])
    if abs(given / 0.179 - 1) <= PUBLISHED_CURVATURE.threshold:
        return ""
    return f"curvature is {given:.4g}, the claim is about one near 0.179"


def input_scale_gap(e: Evidence) -> float:
    """Largest |loss / loss of the construction - 1| on inputs scaled by 0.5 and by 2."""
    gaps = []
    for factor in (0.5, 2.0):
        examples = e.construction.task.scaled_inputs(factor).sample(e.key, e.size)
        scaled = replace(e, examples=examples)
        gaps.append(abs(scaled.loss(scaled.prediction) / scaled.loss(scaled.expected) - 1))
    return max(gaps)


@compile_once(static_argnums=0, often=True)
def _coefficients(construction: Any, model: Transformer, parts: Any) -> Array:
    """Least-squares coefficients of the first layer's canonical tensor in those of `parts`."""
    ours, *units = (layer_tensors(m, construction.gauge())[0] for m in (model, *parts))
    return jnp.stack([jnp.vdot(unit, ours) / jnp.vdot(unit, unit) for unit in units])


def coefficients(e: Evidence) -> tuple[float, float]:
    """(eta, gamma) of GD++ nearest to a model's first layer, in the canonical tensor."""
    parts = [
        replace(e.construction, step_size=step, curvature=gamma).reference
        for step, gamma in ((1.0, 0.0), (0.0, 1.0))
    ]
    eta, gamma = _coefficients(e.construction, e.model, parts)
    return float(eta), float(gamma)


def rate_error(e: Evidence) -> float:
    """|eta' / eta - 1| of the first layer."""
    return abs(coefficients(e)[0] / float(e.construction.step_sizes[0]) - 1)


def curvature_error(e: Evidence) -> float:
    """|gamma' / gamma - 1| of the first layer."""
    return abs(coefficients(e)[1] / float(e.construction.curvatures[0]) - 1)


def curvature(e: Evidence) -> float:
    """|gamma' / 0.179 - 1|, against the value that the paper trained."""
    return abs(coefficients(e)[1] / 0.179 - 1)


def published_gap(e: Evidence) -> float:
    """|loss - 0.2|, 0.2 being read off the axis of the figure."""
    return abs(e.loss(e.prediction) - 0.2)


_STEPS = ("step size + 10 %", "step size - 10 %", "wrong N")
_RIVALS = ("least squares", "kernel smoother")
_FUNCTIONS = ("one step too many", "centred attention", "query among the keys, W_0 != 0", *_RIVALS)
_PAPER = "von Oswald et al. 2022, arXiv 2212.07677"

#: At the paper's sizes, N = d = 10, only.
PUBLISHED_LOSS = Claim(
    "published loss",
    "That loss is the 0.2 of the paper's figures.",
    published_gap,
    0.015,
    "<=",
    f"{_PAPER}, fig. 3a",
    catches=("query among the keys, W_0 != 0", "one step too many", *_RIVALS),
    published=0.2,
    needs=(best_step_size,),
    note="The statistic is the distance from it, to either side, as least squares has no loss at "
    "all. The optimum is 0.2062 on U(-1/2, 1/2), as the public code draws inputs; on U(-1, 1), as "
    "the text says, it is 0.8249. A loss cannot see a step size off by 10 %.",
)

ONE_STEP_CLAIMS = (
    Claim(
        "equal loss",
        "A trained layer of linear attention has the loss of one step of gradient descent.",
        "excess_loss",
        0.005,
        "<=",
        f"{_PAPER}, fig. 2",
        catches=(*_STEPS, *_FUNCTIONS),
    ),
    Claim(
        "optimal loss",
        "It is the least loss that one layer of linear attention can have.",
        optimality_gap,
        0.001,
        "<=",
        "synthetic.theory.one_layer.optimal_one_layer; Ahn et al. 2023, Theorem 1",
        catches=_STEPS,
        gauge="invariant: a function of the canonical tensor",
        needs=(best_step_size, masks_alike),
    ),
    Claim(
        "equal predictions",
        "Its predictions are those of the gradient step.",
        "prediction_distance",
        0.07,
        "<=",
        f"{_PAPER}, fig. 2 (preds diff)",
        catches=(*_STEPS, *_FUNCTIONS, "clipped stream"),
        note="Of one layer this is nearly 'equal weights' and 'every subset' again. Controls tell "
        "them apart: the clipped stream has equal weights, and the query among the keys does the "
        "same with examples left out.",
    ),
    Claim(
        "aligned sensitivities",
        "Its sensitivity to the query points where the gradient step's does.",
        "sensitivity_cosine",
        0.99,
        ">=",
        f"{_PAPER}, fig. 2 (model cos)",
        catches=("centred attention", "query among the keys, W_0 != 0", *_RIVALS),
        published=1.0,
        note="A cosine cannot see a scale: a step size off by 10 % passes.",
    ),
    Claim(
        "equal step size",
        "Its step size is the gradient step's.",
        step_size_error,
        0.05,
        "<=",
        f"{_PAPER}, section 3",
        catches=_STEPS,
        gauge="invariant: read off the canonical tensor",
        needs=(masks_alike,),
    ),
    Claim(
        "equal weights",
        "Its weights are the construction's, modulo their symmetries.",
        "weight_distance",
        0.05,
        "<=",
        f"{_PAPER}, section 3",
        catches=_STEPS,
        gauge="invariant: a distance of canonical tensors",
    ),
    Claim(
        "interpolation",
        "Weights between the two lose nothing.",
        "interpolation_gap",
        0.005,
        "<=",
        f"{_PAPER}, fig. 2 (interpolated)",
        catches=_STEPS,
        gauge="invariant: canonical tensors are interpolated, not weights",
        note="The loss of one layer is convex along this line, so that only its ends can fail it.",
    ),
    Claim(
        "roll-out",
        "Applied again and again, damped by 0.75, it descends as gradient descent does.",
        "roll_out_gap",
        0.05,
        "<=",
        f"{_PAPER}, figs. 1 and 10",
        catches=_STEPS,
        gauge="invariant: inert weights are removed",
        note="Losses are medians over contexts here, and means in the figure. Undamped, the best "
        "step size for one step is too large for some contexts, and both diverge. As trained, a "
        "layer also diverges when damped: training leaves what it writes into the context as it "
        "was initialised.",
    ),
    Claim(
        "every subset",
        "With any of its examples left out, it does what the gradient step does with the others.",
        "subset_distance",
        0.07,
        "<=",
        "the additive part is Saunshi et al. 2022, arXiv 2210.01072; here it is all of it",
        catches=(*_STEPS, "one step too many", "centred attention", *_RIVALS, "step on the mean"),
        note="Both are sums over examples, exactly (probes.context), as every linear layer is. "
        "What no example has a part in, such as W_0, is left out. The step on the mean of what "
        "examples there are has equal predictions on whole contexts, and fails here.",
    ),
    Claim(
        "input scale",
        "It fails on inputs of another scale exactly as gradient descent does.",
        input_scale_gap,
        0.10,
        "<=",
        f"{_PAPER}, fig. 2 and appendix A.9",
        catches=(*_STEPS, *_FUNCTIONS),
    ),
)

_CURVATURE = ("curvature + 20 %", "no curvature")

#: Of one layer applied twice, with curvature.
TWO_STEP_CLAIMS = (
    Claim(
        "equal loss",
        "A trained layer, applied twice, has the loss of two steps of GD++.",
        "excess_loss",
        0.01,
        "<=",
        f"{_PAPER}, fig. 3a",
        catches=(*_STEPS, "no curvature", "centred attention", *_RIVALS),
    ),
    Claim(
        "equal predictions",
        "Its predictions are those of GD++.",
        "prediction_distance",
        0.05,
        "<=",
        f"{_PAPER}, fig. 3a",
        catches=(*_STEPS, *_CURVATURE, "one step too many", "centred attention", *_RIVALS),
    ),
    Claim(
        "equal step size",
        "Its step size is that of the best GD++.",
        rate_error,
        0.03,
        "<=",
        f"{_PAPER}, section 3 and appendix A.10",
        catches=_STEPS,
        gauge="invariant: read off the canonical tensor",
        needs=(masks_alike,),
    ),
    Claim(
        "equal curvature",
        "It changes the inputs by the curvature of the best GD++.",
        curvature_error,
        0.03,
        "<=",
        f"{_PAPER}, appendix A.10",
        catches=_CURVATURE,
        gauge="invariant: read off the canonical tensor",
        needs=(masks_alike,),
    ),
    Claim(
        "equal weights",
        "Its weights are those of GD++, modulo their symmetries.",
        "weight_distance",
        0.05,
        "<=",
        f"{_PAPER}, section 3",
        catches=(*_STEPS, *_CURVATURE),
        gauge="invariant: a distance of canonical tensors",
    ),
    Claim(
        "degrees",
        "As much of it as of GD++ is more than a sum over examples: the degrees 2 to 4.",
        "degree_distance",
        0.05,
        "<=",
        "Saunshi et al. 2022, arXiv 2210.01072, on a context; degrees: probes.context",
        catches=(*_STEPS, *_CURVATURE, *_RIVALS),
    ),
)

_SEVERAL = (*_STEPS, "one step too many", "centred attention")
_BETTER = (
    "Trained layers that are free to change their inputs go below plain gradient descent, with "
    "other predictions: they learn GD++ (gd-plus-plus)."
)

#: Of any number of steps, from any W_0: functions alone, as layers may share a step in many ways.
STEPS_CLAIMS = (
    Claim(
        "loss of as many steps",
        "Trained layers of linear attention have at most the loss of as many steps of gradient "
        "descent.",
        added_loss,
        0.002,
        "<=",
        f"{_PAPER}, fig. 3",
        catches=("centred attention",),
        note="A step more, or longer ones where they are short, have less of it and pass.",
    ),
    Claim(
        "equal predictions",
        "Their predictions are those of these steps.",
        "prediction_distance",
        0.02,
        "<=",
        f"{_PAPER}, fig. 3",
        catches=_SEVERAL,
        note=_BETTER,
    ),
    Claim(
        "aligned sensitivities",
        "Their sensitivity to the query points where that of these steps does.",
        "sensitivity_cosine",
        0.985,
        ">=",
        f"{_PAPER}, fig. 3",
        catches=("centred attention",),
        note="A cosine cannot see a scale: a step size off by 10 % passes.",
    ),
    Claim(
        "every subset",
        "With any of the examples left out, they do what these steps do with the others.",
        "subset_distance",
        0.03,
        "<=",
        "probes.context",
        catches=_SEVERAL,
        note=_BETTER,
    ),
)

#: At N = d = 10 only.
PUBLISHED_CURVATURE = Claim(
    "published curvature",
    "That curvature is the one that the paper's training found.",
    curvature,
    0.05,
    "<=",
    f"{_PAPER}, appendix A.10",
    catches=_CURVATURE,
    published=0.179,
    gauge="invariant: read off the canonical tensor",
    needs=(published_curvature, masks_alike),
    note="The statistic is the relative distance. The optimum is 0.176 on U(-1/2, 1/2), as the "
    "public code draws inputs; on U(-1, 1), as the text says, it would be a quarter of that.",
)
