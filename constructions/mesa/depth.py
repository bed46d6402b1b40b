"""How far polynomials of gradient descent are from ridge regression, by the number of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from constructions.mesa.polynomial import (
    best_coefficients,
    chebyshev,
    grams,
    neumann,
    predictions,
)
from constructions.mesa.ridge import ridge_predictions
from constructions.mesa.tokens import shifted
from synthetic.dynamics import LinearDynamics, States

#: Below this the Chebyshev polynomials here do not try to invert.
LOWEST = 0.5


def distances(
    task: LinearDynamics,
    depths: Sequence[int],
    regularization: float,
    key: jax.Array,
    batch: int = 2**11,
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Distances of G_t p(H_t) s_t from ridge regression, for polynomials of several kinds.

    "Neumann" is the series with step 1 / h, "Chebyshev" the polynomial for eigenvalues from
    `LOWEST` to h, where h is the largest eigenvalue among the sequences; "best" has the least mean
    loss on other sequences. All serve every time and every sequence, as fixed weights must.

    Args:
        task: where states come from.
        depths: numbers of layers, one more than the polynomials' degrees.
        regularization: rho of the ridge regression.
        key: of the sequences.
        batch: how many.

    Yields:
        The kind, the number of layers, and medians over the sequences of |prediction - ridge| over
        |ridge|, `[length]`; float64 where that is enabled.
    """
    fit_key, key = jax.random.split(key)
    states = task.sample(key, batch).inputs[0]
    target = ridge_predictions(states, shifted(states), states, regularization)
    highest = largest_eigenvalue(states)
    for depth in depths:
        kinds = {
            "Neumann": neumann(depth - 1, 1 / highest),
            "Chebyshev": chebyshev(depth - 1, LOWEST, highest),
            "best": best_coefficients(task, depth - 1, fit_key, batch),
        }
        for kind, coefficients in kinds.items():
            off = jnp.linalg.norm(predictions(coefficients, states) - target, axis=-1)
            # the first prediction is 0 for all of them
            relative = off[:, 1:] / jnp.linalg.norm(target, axis=-1)[:, 1:]
            yield kind, depth, np.append(0.0, np.median(relative, axis=0))


def largest_eigenvalue(states: States) -> float:
    """Of H at the end of any of the sequences."""
    return float(jnp.linalg.eigvalsh(grams(states)[0][:, -1])[:, -1].max())
