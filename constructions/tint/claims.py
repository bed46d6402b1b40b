"""Whether a transformer that once trained another by gradient descent still does, as claims.

Nobody has published what becomes of such a construction when it is trained; these thresholds say
what "still a simulator of gradient descent" would mean.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from jaxtyping import Array

from constructions.claims import Claim, Evidence
from constructions.tint.layout import MATRICES

_SOURCE = "construction of Panigrahi et al. 2023, arXiv 2307.01189; trained further here"
#: What a simulation changes, in the order of `flat`.
CHANGED = (*MATRICES, "gain", "offset")


def flat(values: dict[str, Array]) -> np.ndarray:
    """All changes of all weights of every sequence, `[batch, number]`."""
    return np.concatenate([np.asarray(values[n]).reshape(len(values[n]), -1) for n in CHANGED], 1)


@partial(jax.jit, static_argnums=0)
def _read(construction, model, *inputs):  # type: ignore[no-untyped-def]
    return construction.read(model, *inputs)


def _changes(e: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """What the model wrote, and what gradient descent does."""
    inputs = e.examples.inputs
    wanted = e.once("changes", lambda: flat(jax.jit(e.construction.trace)(*inputs)))
    return flat(_read(e.construction, e.model, *inputs)), wanted


def cosine(e: Evidence) -> float:
    """Median over sequences of the cosine between the written change and gradient descent's."""
    found, wanted = _changes(e)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(np.median((found * wanted).sum(1) / np.maximum(lengths, 1e-30)))


def relative(e: Evidence) -> float:
    """Median over sequences of |written change - gradient descent's| / |the latter|."""
    found, wanted = _changes(e)
    return float(np.median(np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)))


def gain(e: Evidence) -> float:
    """Loss of the construction less that of the model, in nats a word: what training adds."""
    return e.loss(e.expected) - e.loss(e.prediction)


CLAIMS = (
    Claim(
        "along the gradient",
        "Trained further, it still changes the weights along the gradient.",
        cosine,
        0.9,
        ">=",
        _SOURCE,
        catches=("up the gradient", "attention does not go back"),
        gauge="none: prefix tokens are read where the construction keeps the weights",
    ),
    Claim(
        "the step itself",
        "What it writes is the step of gradient descent, to a tenth of its length.",
        relative,
        0.1,
        "<=",
        _SOURCE,
        catches=(
            "up the gradient",
            "attention does not go back",
            "value-only attention",
            "half the step",
        ),
        gauge="none: prefix tokens are read where the construction keeps the weights",
    ),
    Claim(
        "predictions after one step",
        "It predicts what the auxiliary model does after that step.",
        "prediction_distance",
        0.1,
        "<=",
        _SOURCE,
        catches=("up the gradient",),
    ),
)
