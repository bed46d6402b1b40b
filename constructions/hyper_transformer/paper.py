"""What trained models of few-shot classification are, as claims that a number decides.

A number that is added to the logits of all classes changes no probability. Logits are therefore
compared with their mean over classes taken away; the constructions differ in what they have of it.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from constructions.claims import Claim, Evidence, same_width
from constructions.core.transformer import Transformer
from synthetic.compilation import compile_once
from synthetic.tasks.classes import GaussianClasses, Labels, Logits, Queries, Support

#: Episodes from which class tokens are read, half of them to fit the map and half to judge it.
EPISODES = 2048


def centred(logits: Array) -> Array:
    """Logits less their mean over classes, which no probability depends on."""
    return logits - logits.mean(-1, keepdims=True)


def logit_distance(e: Evidence) -> float:
    """Root mean square difference of centred logits, over that of the construction's."""
    ours, theirs = centred(e.prediction), centred(e.expected)
    return float(jnp.sqrt(jnp.mean((ours - theirs) ** 2) / jnp.mean(theirs**2)))


def scale_error(e: Evidence) -> float:
    """|r - 1|, r the multiple of the construction's logits that is nearest the model's."""
    ours, theirs = centred(e.prediction), centred(e.expected)
    return abs(float(jnp.vdot(theirs, ours) / jnp.vdot(theirs, theirs)) - 1)


def accuracy_gap(e: Evidence) -> float:
    """|accuracy - accuracy of the construction|, on the same queries."""
    found = (e.construction.task.accuracy(p, e.examples).mean() for p in (e.prediction, e.expected))
    return abs(float(next(found)) - float(next(found)))


def above_posterior(e: Evidence) -> float:
    """Cross-entropy over that of the exact posterior of the labelled examples, less 1."""
    exact = e.once("posterior", lambda: e.construction.task.posterior(*e.examples.inputs))
    return e.loss(e.prediction) / e.loss(exact) - 1


def input_scale_gap(e: Evidence) -> float:
    """Largest |loss / loss of the construction - 1| on features scaled by 0.5 and by 1.5."""

    def gap(factor: float) -> float:
        task, size = e.construction.task.scaled_inputs(factor), min(e.size, 2**13)
        examples = e.once(f"scaled by {factor}", lambda: task.sample(e.key, size))
        scaled = replace(e, examples=examples)
        least = scaled.once("expected loss", lambda: scaled.loss(scaled.expected))
        return abs(scaled.loss(scaled.prediction) / least - 1)

    return max(gap(0.5), gap(1.5))


@compile_once(static_argnums=0, often=True)
def _held(construction: Any, model: Transformer, *inputs: Array) -> tuple[Array, Array]:
    """What the class tokens hold before the last layer, and the weights of the algorithm."""
    stream, groups, _ = construction.stream(model, *inputs)
    found = model.run(stream, groups, sites=("residual",))[1]["residual"][-2]
    classes = construction.positions(inputs[0], inputs[2])[0]
    weight = construction.trace(*inputs)["weight"]
    weight = weight[:, -1] if weight.ndim == 4 else weight  # the last step's
    return found[:, classes.start : classes.stop], weight


def _explained(e: Evidence, together: bool) -> float:
    """Held-out R^2 of the best linear map, of every class token or of all in an episode."""
    inputs = jax.tree.map(lambda a: a[:EPISODES], e.examples.inputs)
    arrays = [np.asarray(a, float) for a in _held(e.construction, e.model, *inputs)]
    if together:
        arrays = [a.reshape(len(a), 1, -1) for a in arrays]
    half = len(arrays[0]) // 2
    held, weight = arrays[0], arrays[1]
    held = np.concatenate([held, np.ones_like(held[..., :1])], -1)
    x, y, x_new, y_new = (
        a.reshape(-1, a.shape[-1]) for a in (held[:half], weight[:half], held[half:], weight[half:])
    )
    # relative to the largest direction: what rounding leaves of a column counts as nothing
    error = y_new - x_new @ np.linalg.lstsq(x, y, rcond=1e-5)[0]
    return float(1 - (error**2).sum() / ((y_new - y_new.mean(0)) ** 2).sum())


def own_weights(e: Evidence) -> float:
    """Held-out R^2 of a linear map, one for all classes, from class tokens to their weights."""
    return _explained(e, together=False)


def held_weights(e: Evidence) -> float:
    """Held-out R^2 of a linear map from all class tokens of an episode to all its weights."""
    return _explained(e, together=True)


def best_step_size(e: Evidence) -> str:
    """The construction's step size is the best one for a single step."""
    given, best = e.construction.step_size, e.construction.task.step_size()
    if abs(given / best - 1) <= 0.01:
        return ""
    return f"step_size is {given:.4g}, the claim is about the best one, {best:.4g}"


def exact_posterior(e: Evidence) -> str:
    """The construction's scale and shrinkage are those of the exact posterior."""
    c = e.construction
    wanted = {"scale": c.task.shrinkage / c.task.predictive_variance, "shrinkage": c.task.shrinkage}
    for name, exact in wanted.items():
        given = getattr(c, name)
        if abs(given / exact - 1) > 0.01:
            return f"{name} is {given:.4g}, the claim is about the posterior's, {exact:.4g}"
    return ""


# Rivals: classifiers that need no construction


def _sums(
    classes: int, support: Support, labels: Labels
) -> tuple[Float[Array, "batch class dim"], Float[Array, "batch class"]]:
    """Sums of the labelled examples of every class, and how many they are."""
    code = jax.nn.one_hot(labels, classes, dtype=support.dtype)
    total = jnp.einsum("bnc,bnd->bcd", code, support[:, : labels.shape[1]], precision="highest")
    return total, code.sum(1)


def nearest_mean(
    task: GaussianClasses, support: Support, labels: Labels, queries: Queries
) -> Logits:
    """Logits -|q - mean of the class|^2 / 2: prototypes without a step, a scale or a shrinkage."""
    total, count = _sums(task.classes, support, labels)
    means = total / jnp.maximum(count, 1)[..., None]
    return -jnp.square(queries[:, :, None] - means[:, None]).sum(-1) / 2


def mixture_of_examples(
    task: GaussianClasses, support: Support, labels: Labels, queries: Queries
) -> Logits:
    """Log mean over a class's examples of what each of them, alone, predicts: no class means."""
    one = replace(task, shots=1, unlabelled=0)
    code = jax.nn.one_hot(labels, task.classes, dtype=support.dtype)
    shown = one.shrinkage * support[:, None, : labels.shape[1]]
    score = -jnp.square(queries[:, :, None] - shown).sum(-1) / (2 * one.predictive_variance)
    score = score[:, :, None] + jnp.log(jnp.swapaxes(code, 1, 2))[:, None]
    return jax.nn.logsumexp(score, -1) - jnp.log(jnp.maximum(code.sum(1), 1))[:, None]


def gradient_step(
    task: GaussianClasses, support: Support, labels: Labels, queries: Queries
) -> Logits:
    """The best single step of gradient descent on cross-entropy from zero, with a bias."""
    total, count = _sums(task.classes, support, labels)
    weight = jnp.concatenate([total, count[..., None]], -1)
    weight = task.step_size() / labels.shape[1] * (weight - weight.mean(1, keepdims=True))
    found = jnp.einsum("bcd,bqd->bqc", weight[..., :-1], queries, precision="highest")
    return found + weight[:, None, :, -1]


def posterior_guesses(
    task: GaussianClasses, support: Support, labels: Labels, queries: Queries
) -> Logits:
    """The posterior with guessed labels: those of the posterior of the labelled examples.

    A step of expectation maximisation: unlabelled examples count for each class by its probability.
    """
    known = labels.shape[1]
    guess = jax.nn.softmax(task.posterior(support, labels, support[:, known:]))
    total, count = _sums(task.classes, support, labels)
    total += jnp.einsum("buc,bud->bcd", guess, support[:, known:], precision="highest")
    weight = (count + guess.sum(1)) * task.spread**2 + task.noise**2
    mean = task.spread**2 * total / weight[..., None]
    variance = task.noise**2 * (1 + task.spread**2 / weight)[:, None]
    distance = jnp.square(queries[:, :, None] - mean[:, None]).sum(-1)
    return -distance / (2 * variance) - task.dim / 2 * jnp.log(variance)


_STEPS = ("step size + 10 %", "step size - 10 %")
#: What classifies well, or by class means, without the step.
_RIVALS = ("exact posterior", "nearest class mean")
_PAPER = "Zhmoginov et al. 2022, arXiv 2201.04182"
_GAUGE = "invariant: centred logits"
_LINEAR = "invariant under linear maps of the stream"

GRADIENT_CLAIMS = (
    Claim(
        "equal loss",
        "Two trained layers of linear attention have the loss of one step on cross-entropy.",
        "excess_loss",
        0.01,
        "<=",
        _PAPER,
        catches=(
            "one step too many",
            "codes exchanged",
            "softmax for linear",
            "a feature left out",
            *_RIVALS,
        ),
        note="Blind to what shifts all logits, and nearly to a step size off by 10 %.",
    ),
    Claim(
        "equal accuracy",
        "Their accuracy is that of the step.",
        accuracy_gap,
        0.01,
        "<=",
        _PAPER,
        catches=("codes exchanged", *_RIVALS),
        note="Softmax for linear attention passes: with equally many examples of every class it "
        "changes the scale of all logits alike, and adds the same to all of them.",
    ),
    Claim(
        "equal logits",
        "Their logits are those of the step, up to a number common to all classes.",
        logit_distance,
        0.07,
        "<=",
        _PAPER,
        catches=(
            *_STEPS,
            "one step too many",
            "codes exchanged",
            "softmax for linear",
            "a feature left out",
            *_RIVALS,
        ),
        gauge=_GAUGE,
    ),
    Claim(
        "equal step size",
        "Their step size is the best one.",
        scale_error,
        0.05,
        "<=",
        "synthetic.tasks.classes.GaussianClasses.step_size",
        catches=(*_STEPS, "softmax for linear", *_RIVALS),
        needs=(best_step_size,),
        gauge=_GAUGE,
    ),
    Claim(
        "written weights",
        "Their class tokens hold the classifier of the step: a linear map of all reads it off.",
        held_weights,
        0.99,
        ">=",
        _PAPER,
        catches=("a feature left out",),
        gauge=_LINEAR,
        needs=(same_width,),
    ),
    Claim(
        "a class a token",
        "Each of them holds the row of its class: a linear map of one token reads it off.",
        own_weights,
        0.98,
        ">=",
        _PAPER,
        catches=("a feature left out", "1/C left out", "softmax for linear", "classes mixed"),
        gauge=_LINEAR,
        needs=(same_width,),
        note="Refuted: only the sum over class tokens counts. Linear attention leaves the basis of "
        "the classes free, A W in the tokens and the inverse of A at the logits, and training "
        "ends in a mixed one. Softmax attention does not, see hyper-prototypes.",
    ),
    Claim(
        "input scale",
        "They fail on features of another scale exactly as the step does.",
        input_scale_gap,
        0.03,
        "<=",
        "after von Oswald et al. 2022, arXiv 2212.07677, appendix A.9",
        catches=(*_STEPS, "one step too many", "codes exchanged", "softmax for linear", *_RIVALS),
    ),
)

_SCALES = ("scale + 20 %", "scale - 20 %")
_WIRING = ("no norm", "sharpness 1", "codes exchanged", "linear for softmax")
#: What classifies by the examples, and not by shrunk means of the classes.
_CLASSIFIERS = ("nearest class mean", "mixture of examples", "one gradient step")

PROTOTYPE_CLAIMS = (
    Claim(
        "optimal loss",
        "A trained layer of softmax attention with a gated MLP, and one of linear attention, have "
        "the least loss that any classifier of these examples can have.",
        above_posterior,
        0.005,
        "<=",
        "synthetic.tasks.classes.GaussianClasses.posterior",
        catches=(*_SCALES, *_WIRING, *_CLASSIFIERS),
        needs=(exact_posterior,),
        note="Shrunk prototypes are the posterior: no statistic of predictions tells how it is "
        "computed. 'A class a token' looks inside.",
    ),
    Claim(
        "equal logits",
        "Their logits are those of shrunk prototypes, up to a number common to all classes.",
        logit_distance,
        0.10,
        "<=",
        _PAPER,
        catches=(*_SCALES, *_WIRING, *_CLASSIFIERS),
        gauge=_GAUGE,
    ),
    Claim(
        "a class a token",
        "Each class token holds the prototype of its class: a linear map reads it off.",
        own_weights,
        0.98,
        ">=",
        _PAPER,
        catches=("sharpness 1",),
        gauge=_LINEAR,
        needs=(same_width,),
    ),
)

#: What knows the labelled examples alone.
_LABELLED = ("exact posterior", "nearest class mean")

SEMI_SUPERVISED_CLAIMS = (
    Claim(
        "gain from examples without labels",
        "Three trained layers have a lower loss than any classifier of the labelled examples.",
        above_posterior,
        -0.05,
        "<=",
        f"{_PAPER}; synthetic.tasks.classes.GaussianClasses.posterior",
        catches=("no guesses", "sharpness 1", "codes exchanged", "linear for softmax", *_LABELLED),
        note="Whatever uses the examples without labels passes, as the posterior with guesses of "
        "its own does: equal logits tell that apart.",
    ),
    Claim(
        "equal loss",
        "Their loss is that of prototypes with guessed labels.",
        "excess_loss",
        0.02,
        "<=",
        _PAPER,
        catches=("no guesses", *_WIRING, *_LABELLED),
        note="The posterior with guesses of its own is .020 below, at the threshold.",
    ),
    Claim(
        "equal logits",
        "So are their logits, up to a number common to all classes.",
        logit_distance,
        0.15,
        "<=",
        _PAPER,
        catches=("no guesses", *_SCALES, *_WIRING, *_LABELLED, "posterior with guesses"),
        gauge=_GAUGE,
    ),
)
