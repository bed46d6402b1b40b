"""Published numbers of von Oswald et al. 2023 that theory alone gives, beside ours.

The published ones are read from the result files that come with the paper's code: half the squared
distance, its mean over 50 positions, s_1 uniform in [-1, 1), noise .01.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from constructions.claims import Measurement
from constructions.mesa.polynomial import best_coefficients, predictions
from constructions.mesa.ridge import ridge_predictions
from constructions.mesa.tokens import shifted
from synthetic.dynamics import LinearDynamics, States

_PAPER = "von Oswald et al. 2023, arXiv 2309.05858, fig. 2, results of the public code"
_REGULARIZATION = 1e-3
_STEP = 0.032
_LAYERS = (1, 2, 3, 4, 6, 8)


def measure(quick: bool = False, seed: int = 0) -> Iterator[Measurement]:
    """Measures losses of ridge regression, aligned and not, and of polynomials by depth.

    Args:
        quick: fewer sequences, and polynomials of 1, 2 and 4 layers only.
        seed: of the sequences.
    """
    with jax.enable_x64(True):
        rows = list(_rows(LinearDynamics(10, 50, 0.01), quick, seed))
    yield from rows


def _rows(task: LinearDynamics, quick: bool, seed: int) -> Iterator[Measurement]:
    size = 2**10 if quick else 2**13
    key, fit_key = jax.random.split(jax.random.key(seed))
    batch = task.sample(key, size)
    states = batch.inputs[0]

    def loss(prediction: jax.Array) -> dict[str, Any]:
        each = np.asarray(task.loss(prediction, batch))
        return {"measured": float(each.mean()), "error": float(each.std() / np.sqrt(size))}

    yield Measurement(
        "loss of one gradient step",
        f"One step of size {_STEP} on all pairs so far.",
        _PAPER,
        0.9004,
        **loss(predictions((_STEP,), states)),
    )
    late = without_newest(states, _REGULARIZATION)
    yield Measurement(
        "loss of ridge regression without the newest pair",
        "Least squares, as the paper plots it.",
        _PAPER,
        0.2108,
        **loss(late),
        note="The public code fits on the states before the current one, so that the fit which "
        "predicts from s_t leaves out the pair (s_{t-1}, s_t).",
    )
    found = ridge_predictions(states, shifted(states), states, _REGULARIZATION)
    yield Measurement(
        "loss of ridge regression",
        "Least squares on all pairs that the model has seen, the yardstick of our claims.",
        _PAPER,
        None,
        **loss(found),
        note="No published number is aligned like this; it is below all of the trained models'.",
    )
    last = np.asarray(task.loss_by_position(found, batch))[:, -1]
    yield Measurement(
        "loss of ridge regression after 50 states",
        "The same, of the last prediction alone.",
        _PAPER,
        0.0006,
        float(last.mean()),
        error=float(last.std() / np.sqrt(size)),
        tolerance=0.1,
        note=f"The noise itself makes {task.noise_floor:.4f}.",
    )
    for layers in (1, 2, 4) if quick else _LAYERS:
        best = best_coefficients(task, layers - 1, fit_key, size)
        yield Measurement(
            f"loss of the best polynomial, {layers} layers",
            "The best that linear attention of this construction can do, the same at every time.",
            _PAPER,
            None,
            **loss(predictions(best, states)),
            note="The paper plots 7 layers at .232, with matrices over their norm at every time "
            "(no fixed weights do that) and without the newest pair."
            if layers == 8
            else "",
        )


def without_newest(states: States, regularization: float) -> States:
    """Ridge regression where the fit at time t ends with the pair (s_{t-2}, s_{t-1})."""
    late = jnp.pad(states, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return ridge_predictions(states, shifted(late), late, regularization)
