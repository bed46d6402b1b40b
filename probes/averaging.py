r"""Averages of checkpoints, and what they can be expected to gain.

Near a minimum the loss is quadratic. Along a direction of curvature lambda, SGD with step size eta
multiplies the distance to the minimum by rho = 1 - eta lambda a step and adds noise, so that two
iterates k steps apart have correlation rho^k, and their mean has

    (1 + (1 - eta lambda)^k) / 2

of the excess loss of one of them (Sandler et al. 2023, arXiv 2301.02312): close iterates are the
same point and gain nothing, distant ones halve it. In general sum_ab w_a w_b rho^|t_a - t_b|. Where
averages do worse than their members, these are not around one minimum.

The averages here are of checkpoints. `synthetic.fitting.recipe.Recipe` averages while it fits, over
every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float


def latest(count: int, window: int) -> Float[np.ndarray, " checkpoint"]:
    """LAWA: equal weights on the last `window` of `count` checkpoints, 0 on the others.

    Raises:
        ValueError: `window` is out of range.
    """
    if not 1 <= window <= count:
        raise ValueError(f"window is {window}, must be from 1 to {count}, the checkpoints")
    return np.where(np.arange(count) >= count - window, 1 / window, 0.0)


def exponential(count: int, decay: float) -> Float[np.ndarray, " checkpoint"]:
    """EMA without bias: weights in proportion to decay^(checkpoints since).

    Raises:
        ValueError: `decay` is not above 0 and below 1.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay is {decay}, must be above 0 and below 1")
    weights = decay ** np.arange(count - 1, -1, -1.0)
    return weights / weights.sum()


def average(
    thetas: Float[Array, "checkpoint weight"], weights: Float[np.ndarray, " checkpoint"]
) -> Float[Array, " weight"]:
    """sum_t w_t theta_t."""
    return (np.asarray(weights, thetas.dtype)[:, None] * thetas).sum(0)


def excess_factor(
    weights: Float[np.ndarray, " checkpoint"], steps: Sequence[int], contraction: float
) -> float:
    """Excess loss of an average over that of one iterate, of stationary SGD on a quadratic.

    Args:
        weights: of the checkpoints, with sum 1.
        steps: at which they were taken.
        contraction: rho = 1 - eta lambda, above -1 and below 1.

    Raises:
        ValueError: `contraction` out of range: SGD does not come to rest.
    """
    if not -1 < contraction < 1:
        raise ValueError(f"contraction is {contraction}, must be above -1 and below 1")
    lags = np.abs(np.subtract.outer(steps, steps))
    return float(weights @ contraction**lags @ weights)


def measured_factor(average_excess: float, member_excesses: Sequence[float]) -> float:
    """Excess loss of an average over the mean excess of its members.

    1/2 for two independent iterates around one minimum, 1 where they are one point, above 1 where
    they belong to different minima or bases. NaN where the members have no excess.
    """
    excess = float(np.mean(member_excesses))
    return average_excess / excess if excess > 0 else float("nan")
