r"""The degree of a prediction in the examples of its context, by the Walsh-Hadamard transform.

With x in {0, 1}^N saying which examples are there, and f(x) the prediction for fixed queries,

    f = sum_S f^(S) chi_S,    chi_S(x) = prod_{i in S} (1 - 2 x_i),    B_k = sum_{|S| = k} f^(S)^2,

so that B_1, B_2, ... are the shares of degrees in the variance of f over all subsets. Degree 1 is
the best linear datamodel, the rest is what it leaves (Saunshi et al. 2022, arXiv 2210.01072, with
examples of a context in place of those of a training set). The highest degree reads off the
algorithm:

    one step of gradient descent with 1/N fixed, from weights that are no function of the context
        is a sum over examples: degree 1, exactly;
    k such steps have degree k at most: every step adds a sum over examples that is linear in W;
    L layers of linear attention have degree (3^L - 1) / 2 at most: a layer multiplies three tokens
        and sums over examples, d -> 3 d + 1. GD++ with two layers is of degree 4.

Softmax attention, 1 / |S| in place of 1/N, and ridge regression have all degrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from constructions.family import Construction
from probes.subsets import all_subsets

#: Most examples that are left out in all ways: 4096 predictions.
PLAYERS = 12
#: A share counts as present above this many squared roundings.
ROUNDING = 1e5


@dataclass(frozen=True)
class Spectrum:
    """The degrees of a prediction.

    Attributes:
        weights: B_0, ..., B_N, `[degree]`: mean over inputs and entries of the answers.
        epsilon: rounding unit of the model.
    """

    weights: np.ndarray
    epsilon: float

    @property
    def variance(self) -> float:
        """B_1 + ... + B_N, the variance over all subsets."""
        return float(self.weights[1:].sum())

    @property
    def shares(self) -> np.ndarray:
        """B_k over the variance, `[degree]`, from degree 0, which is given as 0.

        NaN where the prediction does not depend on the examples.
        """
        shares = self.weights / self.variance if self.variance else self.weights * np.nan
        return np.concatenate([[0.0], shares[1:]])

    def above(self, degree: int) -> float:
        """Share of the degrees above this one; that above 1 is what a linear datamodel leaves."""
        return float(self.shares[degree + 1 :].sum())

    @property
    def degree(self) -> int:
        """The highest degree that is there by more than rounding; 0 for a constant."""
        power = self.weights.sum()
        there = self.weights > ROUNDING * self.epsilon**2 * power
        return int(np.flatnonzero(there).max(initial=0))


def walsh_hadamard(values: Float[np.ndarray, "subset ..."]) -> Float[np.ndarray, "subset ..."]:
    """Coefficients f^(S) of functions of subsets; bits of the first index are the elements.

    Raises:
        ValueError: the length of the first axis is no power of 2.
    """
    size = len(values)
    if size < 1 or size & (size - 1):
        raise ValueError(f"values has {size} subsets, must be a power of 2")
    found = np.asarray(values, float)
    for step in 2 ** np.arange(size.bit_length() - 1):
        pairs = found.reshape(-1, 2, step, *values.shape[1:])
        found = np.stack([pairs.sum(1), pairs[:, 0] - pairs[:, 1]], 1).reshape(values.shape) / 2
    return found


def degree_weights(values: Float[np.ndarray, "subset ..."]) -> Float[np.ndarray, " degree"]:
    """B_0, ..., B_N of functions of subsets, mean over the functions."""
    power = walsh_hadamard(values) ** 2
    power = power.reshape(len(power), -1).mean(1)
    degrees = np.array([int(s).bit_count() for s in range(len(power))])
    return np.bincount(degrees, power)


def spectrum(
    construction: Construction,
    model: Any,
    inputs: tuple[Any, ...],
    players: int | None = None,
) -> Spectrum:
    """The degree spectrum of a model's answers, exact up to rounding.

    Args:
        construction: gives inputs their meaning.
        model: of its class.
        inputs: as `construction.sample` gives them.
        players: examples that are left out in all ways, the first; the others stay. None: all of
            them, at most `PLAYERS`.

    Raises:
        ValueError: no examples that can be left out, fewer than `players`, or more than `PLAYERS`.
    """
    size = construction.context_size(*inputs)
    players = min(size, PLAYERS) if players is None else players
    if players > PLAYERS:
        raise ValueError(f"players is {players}, must be at most {PLAYERS}: all subsets are run")
    values = all_subsets(construction, model, inputs, players)
    return Spectrum(degree_weights(values), float(np.finfo(values.dtype).eps))


def degree_bound(layers: int) -> int:
    """(3^L - 1) / 2, the highest degree that L layers of linear attention can have."""
    return (3**layers - 1) // 2
