"""What von Oswald et al. 2022 state of sine waves (fig. 4), as claims that a number decides."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from constructions.claims import Claim, Evidence, same_width
from constructions.core.transformer import Transformer
from synthetic.compilation import compile_once
from synthetic.tasks.sine import optimal_smoother, optimal_step, sine_and_cosine

_PAPER = "von Oswald et al. 2022, arXiv 2212.07677, fig. 4"
_THEORY = "synthetic.tasks.sine.optimal_smoother"


def mean_loss(e: Evidence) -> float:
    """Mean loss on the task."""
    return e.loss(e.prediction)


def best_step_size(e: Evidence) -> str:
    """The construction's step size is the best one for a single step."""
    c = e.construction
    given, best = c.step_size, optimal_step(c.task, c.feature_map, c.kinks, c.initial[0]).size
    if abs(given / best - 1) <= 0.01:
        return ""
    return f"step_size is {given:.4g}, the claim is about the best one, {best:.4g}"


def published_amplitudes(e: Evidence) -> str:
    """The waves are as large as the paper's."""
    found = tuple(e.construction.amplitudes)
    if found == (0.1, 0.5):
        return ""
    return f"amplitudes are {found}, the claim is about (0.1, 0.5)"


def mean_difference(e: Evidence) -> float:
    """Mean |prediction - prediction of the construction|, in units of y."""
    return float(jnp.abs(e.prediction - e.expected).mean())


def optimality_ratio(e: Evidence) -> float:
    """Loss over the least that a smoother on sine and cosine reaches from the same W_0.

    Measured beside the construction on the same examples, whose own ratio is known exactly.
    """
    c = e.construction
    start = c.initial[0]
    exact = optimal_step(c.task, c.feature_map, c.kinks, start).loss
    best = optimal_smoother(c.task, start=start).loss
    return e.loss(e.prediction) / e.loss(e.expected) * exact / best


@compile_once(static_argnums=0, often=True)
def _after_mlp(construction: Any, model: Transformer, *inputs: Array) -> Array:
    """The stream behind layer 1, `[batch, token, width]`."""
    stream, groups, _ = construction.stream(model, *inputs)
    return model.run(stream, groups, sites=("residual",))[1]["residual"][1]


def smoother_residual(e: Evidence) -> float:
    """How far the model is from a gradient step on its own features, in units of its prediction.

    Its features z(x) are what layer 1 leaves of a token with y = 0, its start the column of y in
    them. The prediction is regressed on sum_i v_i u_i z_c(x_query), u_i among the features of
    example i and v_i among these and y_i: a gradient step from any start, in any basis. Only a
    square of y_i is left out. The coefficients come from one half of the examples, the root mean
    square of what they miss from the other.
    """
    c, count = e.construction, min(e.size, 4096)
    x, y, x_query = (a[:count] for a in e.examples.inputs)
    n = x.shape[1]
    z = np.asarray(_after_mlp(c, e.model, x, jnp.zeros_like(y), x_query), np.float64)
    column = c.program.slots["y"].start
    examples, query = z[:, :n].copy(), z[:, n]
    examples[..., column] += np.asarray(y)[..., 0]
    pairs = np.einsum("bna,bnc->bac", examples, examples)
    upper = [p for p in zip(*np.triu_indices(z.shape[-1]), strict=True) if p != (column, column)]
    sums = np.stack([pairs[:, a, b] for a, b in upper], axis=1)
    terms = (sums[:, :, None] * query[:, None]).reshape(count, -1)
    target = np.asarray(e.prediction, np.float64)[:count, 0, 0] + query[:, column]
    half = count // 2
    scale = np.linalg.norm(terms[:half], axis=0)
    terms = terms / np.where(scale > 0, scale, 1)
    found = np.linalg.lstsq(terms[:half], target[:half], rcond=1e-10)[0]
    missed = (target - terms @ found)[half:]
    return float(np.sqrt(np.mean(missed**2) / np.var(np.asarray(e.prediction, np.float64))))


def waves_by_least_squares(x: ArrayLike, y: ArrayLike, x_query: ArrayLike) -> np.ndarray:
    """The rival that takes no step: least squares on sine and cosine, exact without noise."""
    m, m_query = (sine_and_cosine(np.asarray(a, np.float64)[..., 0]) for a in (x, x_query))
    gram = np.swapaxes(m, 1, 2) @ m + 1e-9 * np.eye(2)
    return m_query @ np.linalg.solve(gram, np.swapaxes(m, 1, 2) @ np.asarray(y, np.float64))


_STEPS = ("step size + 10 %", "step size - 10 %")
_FUNCTIONS = ("4 knots", "centred attention", "shifted features", "keys that read y")
_PRIOR = (
    "The phase covers half a turn, so that the coefficients of the waves have a mean, and trained "
    "models start from it. They go on to leave that step behind, 0.04 away after 1500 steps of "
    "training and 0.06 after 6000: the least loss of predictions affine in y is 0.00125."
)

SHARED_CLAIMS = (
    Claim(
        "published loss",
        "A trained MLP and one layer of linear attention reach a loss of 0.006.",
        mean_loss,
        0.006,
        "<=",
        _PAPER,
        catches=("4 knots",),
        published=0.006,
        needs=(published_amplitudes, best_step_size),
        note="Amplitudes are U(0.1, 0.5), as the public code draws them. One step from zero then "
        "has a loss of at least 0.00235 and one from the prior mean of 0.00146; with U(0.1, 5), "
        "as the text says, these are 0.193 and 0.130, and 0.006 is out of reach.",
    ),
    Claim(
        "as good as one step",
        "Its loss is at most that of the best gradient step on sine and cosine.",
        optimality_ratio,
        1.05,
        "<=",
        f"{_PAPER}; {_THEORY}",
        catches=(*_STEPS, *_FUNCTIONS),
        needs=(best_step_size,),
        note="To one side: whatever predicts better, such as least squares, passes.",
    ),
    Claim(
        "published difference of predictions",
        "Its predictions differ by at most 0.08 from those of the gradient step.",
        mean_difference,
        0.08,
        "<=",
        _PAPER,
        catches=("4 knots",),
        published=0.08,
        needs=(published_amplitudes,),
        note="In units of y, whose root mean square is 0.23: a step size off by 10 % passes, and "
        "least squares on sine and cosine does. It tells nothing of gradient descent.",
    ),
    Claim(
        "a step on its own features",
        "It is a gradient step on the features that its MLP computes.",
        smoother_residual,
        0.07,
        "<=",
        "von Oswald et al. 2022, arXiv 2212.07677, Prop. 2",
        catches=("one step too many", "centred attention", "keys that read y"),
        gauge="invariant: features enter through their span, heads through the prediction",
        needs=(same_width,),
        note="From any start and with any preconditioner: a step size off by 10 % passes.",
    ),
)


def _same_predictions(start: str, other: str, note: str) -> Claim:
    return Claim(
        "equal predictions",
        f"Its predictions are those of the gradient step from {start}.",
        "prediction_distance",
        0.075,
        "<=",
        _PAPER,
        catches=(*_STEPS, "one step too many", f"W_0 = {other}", *_FUNCTIONS, "least squares"),
        note=note,
    )


FROM_ZERO_CLAIMS = (
    *SHARED_CLAIMS,
    _same_predictions(
        "W_0 = 0", "prior mean", f"{_PRIOR} With init_weight='prior mean' the claim holds."
    ),
)

FROM_PRIOR_MEAN_CLAIMS = (*SHARED_CLAIMS, _same_predictions("the prior mean", "0", _PRIOR))
