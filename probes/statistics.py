"""The statistics that claims name, each with what it needs of a model.

A statistic maps the `Evidence` to a number. What it assumes beyond predictions is declared in
`NEEDS` and asked first (see `constructions.claims`); what goes wrong inside it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from constructions import claims as needs
from constructions.claims import Claim, Evidence
from constructions.core.canonical import without_inert
from constructions.core.transformer import Transformer
from constructions.family import Construction
from probes import interpolation, similarity
from probes.context import all_subsets, degree_weights, no_examples
from probes.foreign import no_fewer_examples
from probes.interpolation import between
from probes.roll_out import no_single_layer, roll_out
from probes.similarity import compared
from synthetic.compilation import compile_once
from synthetic.tasks.task import Batch, outcome


def _first(size: int, inputs: Any) -> Any:
    """So many inputs, or all; cut by numpy, which compiles nothing."""
    return jax.tree.map(lambda a: jax.device_put(np.asarray(a)[:size]), inputs)


def excess_loss(e: Evidence) -> float:
    """|loss of the model / loss of the construction - 1|, on the same examples."""
    least = e.once("expected loss", lambda: e.loss(e.expected))
    return abs(e.loss(e.prediction) / least - 1)


def prediction_distance(e: Evidence) -> float:
    """Root mean square difference of the predictions, over that of the construction's.

    Logits are compared up to a number common to all outcomes, which no probability depends on.
    """
    ours, theirs = (compared(e.construction, p) for p in (e.prediction, e.expected))
    models = (lambda *_: ours), (lambda *_: theirs)
    return float(similarity.prediction_distance(*models, e.examples.inputs).relative)


def _log_probabilities(e: Evidence, prediction: Array) -> Array:
    if outcome(e.construction.task) == "logits":
        return jax.nn.log_softmax(prediction)
    return jnp.log(jnp.maximum(prediction, jnp.finfo(prediction.dtype).tiny))


def _counted(e: Evidence) -> Bool[Array, " batch *place"]:
    """Which distributions of a prediction the task's loss looks at."""

    def loss(prediction: Array) -> Array:
        return e.construction.task.loss(prediction, e.examples).sum()

    # at equal probabilities, so that none that is 0 or 1 hides where the loss looks
    flat = jax.nn.softmax(jnp.zeros_like(e.expected))
    return (jax.grad(loss)(flat) != 0).any(-1)


def divergence(e: Evidence) -> float:
    """Mean KL(construction || model) of the predicted distributions, in nats.

    Over the places that the task's loss looks at. Probabilities of 0 count as the smallest positive
    number of their type.
    """
    ours, theirs = (_log_probabilities(e, p) for p in (e.prediction, e.expected))
    nats = (jnp.exp(theirs) * (theirs - ours)).sum(-1)
    counted = e.once("counted", lambda: _counted(e))
    return float(jnp.where(counted, nats, 0).sum() / counted.sum())


def same_outcome(e: Evidence) -> float:
    """Share of the distributions in which model and construction find the same outcome likeliest.

    Over the places that the task's loss looks at.
    """
    equal = e.prediction.argmax(-1) == e.expected.argmax(-1)
    counted = e.once("counted", lambda: _counted(e))
    return float((equal & counted).sum() / counted.sum())


def sensitivity_cosine(e: Evidence) -> float:
    """Mean cosine between d prediction / d query of model and construction; blind to scale."""
    inputs = _first(1024, e.examples.inputs)
    return similarity.cosine_of(e.construction, e.model, e.reference, inputs)


def weight_distance(e: Evidence) -> float:
    """|T - T*| / |T*| of the canonical tensors: weights compared modulo their symmetries."""
    return float(needs.weight_distance(e.construction, e.model, e.reference))


def interpolation_gap(e: Evidence) -> float:
    """Largest loss on the line between model and construction, over the smaller end, less 1."""
    losses = between(e.construction, e.model, e.reference, _first(4096, e.examples))
    return interpolation.interpolation_gap(losses)


@compile_once(static_argnums=0, often=True)
def _rolled(construction: Construction, model: Transformer, examples: Batch) -> Array:
    predictions = roll_out(construction, model, *examples.inputs, depth=20, damping=0.75)
    # the median: in the mean, the few contexts that are nearly unstable drown all others
    return jax.vmap(lambda p: jnp.median(construction.task.loss(p, examples)))(predictions)


def roll_out_gap(e: Evidence) -> float:
    """Largest |log(loss / loss of the construction)| over 20 applications, damped by 0.75.

    Losses are medians over the examples. Inert weights are removed first, as are masks that differ
    without effect: see `constructions.core.canonical.without_inert`.
    """
    examples = _first(4096, e.examples)
    gauge = e.construction.gauge()

    def rolled(model: Transformer) -> Array:
        bare = without_inert(needs.with_masks_of(model, e.reference), gauge)
        return _rolled(e.construction, bare, examples)

    theirs = e.once("roll-out", lambda: rolled(e.reference))
    return float(np.abs(np.log(np.asarray(rolled(e.model)) / np.asarray(theirs))).max())


def _on_subsets(e: Evidence, model: Any) -> np.ndarray:
    """Predictions for every subset of four examples, `[subset, batch, ...]`, less their mean."""
    inputs = _first(512, e.examples.inputs)
    examples = min(4, e.construction.context_size(*inputs))
    found = all_subsets(e.construction, model, inputs, examples)
    return found - found.mean(0)


def subset_distance(e: Evidence) -> float:
    """Root mean square difference of what examples change, over all subsets of four of them."""
    theirs = e.once("subsets", lambda: _on_subsets(e, e.reference))
    return float(np.linalg.norm(_on_subsets(e, e.model) - theirs) / np.linalg.norm(theirs))


def degree_distance(e: Evidence) -> float:
    """|log of the share of degree 2 and above over the construction's|, in four examples.

    See `probes.context`; the share is what no linear datamodel has.
    """
    theirs = e.once("subsets", lambda: _on_subsets(e, e.reference))
    ours, theirs = (degree_weights(v) for v in (_on_subsets(e, e.model), theirs))
    return abs(float(np.log(ours[2:].sum() / ours.sum()) - np.log(theirs[2:].sum() / theirs.sum())))


def a_loss(e: Evidence) -> str:
    """The construction has a loss, of which an excess can be a share."""
    least = e.once("expected loss", lambda: e.loss(e.expected))
    return "" if least else "the construction's loss is 0, so that no excess is a share of it"


def distributions(e: Evidence) -> str:
    """Predictions are probabilities or logits."""
    task = e.construction.task
    if outcome(task) == "values":
        return f"{type(task).__name__}: its predictions are no distributions"
    return ""


def differentiable(e: Evidence) -> str:
    """Predictions have derivatives by the last input, token by token."""
    if needs.known_weights(e):
        inputs = _first(64, e.examples.inputs)
        return similarity.insensitive(e.construction, e.model, inputs)
    inputs = _first(2, e.examples.inputs)
    apply = partial(e.construction.apply, e.model)
    # of models of one shape, the same is true
    shape = f"differentiable {e.model.config!r}"
    return e.once(shape, lambda: similarity.obstacle(apply, inputs))


def blendable(e: Evidence) -> str:
    """Attention alone, with as many layers and loops as the construction's."""
    missing = needs.known_weights(e)
    return missing or interpolation.obstacle(e.model.config, e.reference.config)


def rolled_alike(e: Evidence) -> str:
    """One layer of linear attention may be applied again and again, and the prediction read."""
    if missing := needs.masks_alike(e):
        return missing
    return no_single_layer(e.construction, e.examples.inputs)


def examples_to_leave_out(e: Evidence) -> str:
    """The construction says what the examples of its inputs are, and the model takes fewer."""
    return no_examples(e.construction) or no_fewer_examples(e.construction, e.model)


Statistic = Callable[[Evidence], float]

STATISTICS: dict[str, Statistic] = {
    "excess_loss": excess_loss,
    "prediction_distance": prediction_distance,
    "divergence": divergence,
    "same_outcome": same_outcome,
    "sensitivity_cosine": sensitivity_cosine,
    "weight_distance": weight_distance,
    "interpolation_gap": interpolation_gap,
    "roll_out_gap": roll_out_gap,
    "subset_distance": subset_distance,
    "degree_distance": degree_distance,
}

#: What each statistic needs, besides what the claim itself does; nothing where it is not named.
NEEDS: dict[str, tuple[Callable[[Evidence], str], ...]] = {
    "excess_loss": (a_loss,),
    "divergence": (distributions,),
    "same_outcome": (distributions,),
    "sensitivity_cosine": (differentiable,),
    "weight_distance": (needs.comparable_weights,),
    "interpolation_gap": (blendable,),
    "roll_out_gap": (rolled_alike,),
    "subset_distance": (examples_to_leave_out,),
    "degree_distance": (examples_to_leave_out,),
}


def lacks(claim: Claim, evidence: Evidence) -> str:
    """What a claim or its statistic needs and the evidence lacks, in one phrase; "" for nothing."""
    own = NEEDS.get(claim.statistic, ()) if isinstance(claim.statistic, str) else ()
    return next((missing for need in (*claim.needs, *own) if (missing := need(evidence))), "")


def statistic_of(claim: Claim) -> Statistic:
    """The function that a claim names; ValueError lists the known ones."""
    statistic = claim.statistic
    if callable(statistic):
        return statistic
    if not isinstance(statistic, str) or statistic not in STATISTICS:
        raise ValueError(
            f"claim {claim.name!r}: statistic is {statistic!r}, must be a function of the evidence "
            f"or one of {', '.join(STATISTICS)}"
        )
    return STATISTICS[statistic]


def value_of(claim: Claim, evidence: Evidence) -> float:
    """The claim's statistic, of evidence that lacks nothing.

    Raises:
        ValueError: the claim names no statistic, or it does not give one number.
        Exception: whatever the statistic raises, with the claim's name added.
    """
    function = statistic_of(claim)
    try:
        found = np.asarray(function(evidence))
    except Exception as error:
        error.add_note(f"in the statistic of the claim {claim.name!r}")
        raise
    if found.shape != () or found.dtype.kind not in "biuf" and found.dtype.name != "bfloat16":
        raise ValueError(
            f"claim {claim.name!r}: its statistic gives an array of shape {found.shape} and dtype "
            f"{found.dtype}, must give one number"
        )
    return float(found)
