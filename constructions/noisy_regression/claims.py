"""What Vladymyrov et al. 2024 say of trained linear transformers, as claims."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.claims import Claim, Evidence
from synthetic.ridge import ridge

_PAPER = "Vladymyrov et al. 2024, arXiv 2402.14180"


@jax.jit
def _ridges(
    inputs: tuple[Array, Array, Array], noise: Array, constant: Array
) -> tuple[Array, Array]:
    """Predictions of ridge regression that knows the noise, and of one that has one strength."""
    oracle = ridge(*inputs, noise**2)
    return oracle, ridge(*inputs, jnp.full_like(noise, constant))


def _given(e: Evidence) -> tuple[Array, Array, Array]:
    x, y, x_query = e.examples.inputs
    return x, y, x_query


def _beyond_oracle(e: Evidence, prediction: Array) -> float:
    """The adjusted loss: mean loss less that of the ridge that knows the noise, same examples."""
    oracle, _ = _ridges(_given(e), e.examples.target.noise, jnp.zeros(()))
    return e.loss(prediction) - e.loss(oracle)


def adjusted_loss(e: Evidence) -> float:
    """Mean loss less that of ridge regression with the true noise, on the same examples."""
    return _beyond_oracle(e, e.prediction)


def against_constant_ridge(e: Evidence) -> float:
    """Adjusted loss over that of ridge regression with E sigma^2, the limit of GD++."""
    constant = jnp.asarray(e.construction.task.mean_square_noise)
    _, fixed = _ridges(_given(e), e.examples.target.noise, constant)
    return _beyond_oracle(e, e.prediction) / _beyond_oracle(e, fixed)


def shrinkage(e: Evidence) -> float:
    """Slope of predictions on targets at high noise over that at low noise (above, below E sigma).

    1 for every method that is linear in the labels.
    """
    noise, target = (np.asarray(a) for a in (e.examples.target.noise, e.examples.target.value))
    product = (np.asarray(e.prediction) * target).reshape(len(noise), -1).mean(1)
    square = np.square(target).reshape(len(noise), -1).mean(1)
    high = noise > noise.mean()
    slopes = [product[part].mean() / square[part].mean() for part in (high, ~high)]
    return float(slopes[0] / slopes[1])


_PARTS = ("no rescaling", "no momentum")

#: Of two layers and more, where the noise changes from context to context.
CLAIMS = (
    Claim(
        "equal loss",
        "Full matrices P and Q have the loss of the best four numbers a layer.",
        "excess_loss",
        0.01,
        "<=",
        f"{_PAPER}, Table 1 (DIAG and FULL)",
        catches=(*_PARTS, "centred attention"),
        note="Of the whole loss, whose larger part no one can avoid, here and in what follows.",
    ),
    Claim(
        "equal predictions",
        "Its predictions are those of these four numbers a layer.",
        "prediction_distance",
        0.1,
        "<=",
        f"{_PAPER}, section 6",
        catches=(*_PARTS, "step size + 10 %", "step size - 10 %", "centred attention"),
    ),
    Claim(
        "better than any constant ridge",
        "It is nearer to the ridge that knows the noise than a ridge of constant strength is, "
        "which bounds GD++ of any depth.",
        against_constant_ridge,
        1.0,
        "<=",
        f"{_PAPER}, Table 1 (ConstRR)",
        catches=_PARTS,
    ),
    Claim(
        "adapts to the noise",
        "It shrinks its predictions more where the context is noisier.",
        shrinkage,
        0.9,
        "<=",
        f"{_PAPER}, Theorem 5.2 and section 6",
        catches=("GD++ part",),
        note="Exactly 1 in expectation for all that is linear in the labels, GD++ and a constant "
        "ridge among them.",
    ),
)

#: Of two layers, N = 20, d = 10 and sigma in {1, 3} only.
PUBLISHED = Claim(
    "published loss",
    "Its adjusted loss is that of the paper's two layers, or lower.",
    adjusted_loss,
    1.1 * 0.202,
    "<=",
    f"{_PAPER}, Table 1 (FULL, 2 layers, sigma in {{1, 3}})",
    catches=_PARTS,
    published=0.202,
)


def claims_of(construction: Any) -> tuple[Claim, ...]:
    """The claims that the paper makes at these settings."""
    task, depth = construction.task, len(construction.layers)
    changes = task.max_noise > 0 or len({*task.noise_levels}) > 1
    if depth < 2 or not changes or not all(w[1] or w[3] for w in construction.layers):
        return ()
    sizes = (construction.dim_x, construction.num_examples, depth, task.noise_levels)
    return (*CLAIMS, *([PUBLISHED] if sizes == (10, 20, 2, (1.0, 3.0)) else []))
