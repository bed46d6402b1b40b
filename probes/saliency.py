r"""Saliency maps of a context as certificates: completeness, and soundness.

A map orders the examples of a context by how much they speak for a label. It is judged by what the
model itself says when it is given the first examples of that order only (the others are removed,
not set to 0): AUC_c is the mean probability of label c along this insertion path. With p_c the
probability of c with the whole context (Gupta et al. 2022, arXiv 2211.02912),

    completeness of c = min(max(eps, AUC_c) / min(alpha, p_c), 1)    is what it says explained?
    soundness of c    = min(max(beta, p_c) / AUC_c, 1)               and nothing else?

Completeness is asked of the label that the model predicts, soundness of every other one, of which
the worst counts. Either alone misleads: a classifier that sums over its context can be led to any
label by the examples of that label alone, so that maps for wrong labels are as convincing as those
for right ones; a random map is sound, and incomplete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from constructions.family import Construction
from probes.subsets import answers
from synthetic.compilation import compile_once
from synthetic.tasks.task import outcome

ALPHA, BETA, EPSILON = 1.0, 0.1, 0.1
#: Points of the insertion path, and labels of an input that are looked at.
POINTS, LABELS = 11, 5


@dataclass(frozen=True)
class Saliency:
    """Certificates for labels, and what they are worth.

    Attributes:
        labels: those looked at, the most likely first, `[input, label]`.
        probability: of them with the whole context, `[input, label]`.
        maps: how much each example speaks for each, `[input, label, example]`.
        path: probability along the insertion path, from no example to all, `[input, label, point]`.
    """

    labels: np.ndarray
    probability: np.ndarray
    maps: np.ndarray
    path: np.ndarray

    @property
    def auc(self) -> Float[np.ndarray, "input label"]:
        """Mean probability along the path (trapezoids)."""
        return (self.path[..., 1:] + self.path[..., :-1]).mean(-1) / 2

    @property
    def completeness(self) -> Float[np.ndarray, " input"]:
        """Of the label that the model predicts."""
        likely = np.minimum(ALPHA, self.probability[:, 0])
        return np.minimum(np.maximum(EPSILON, self.auc[:, 0]) / likely, 1)

    @property
    def soundness(self) -> Float[np.ndarray, "input wrong"]:
        """Of every other label."""
        return np.minimum(np.maximum(BETA, self.probability[:, 1:]) / self.auc[:, 1:], 1)


@compile_once(often=True)
def _scores(prediction: Array) -> Array:
    tiny = jnp.finfo(prediction.dtype).tiny
    return jnp.log(jnp.maximum(prediction, tiny))


def _questions(construction: Construction, whole: np.ndarray) -> np.ndarray:
    """Which row of the answers to an input is its question: the first distribution; -1 for none."""
    rows = whole.reshape(len(whole), -1, whole.shape[-1])
    if outcome(construction.task) == "logits":
        return np.zeros(len(whole), int)
    there = rows.sum(-1) > 0.5
    return np.where(there.any(1), there.argmax(1), -1)


def saliency(
    construction: Construction,
    model: Any,
    inputs: tuple[Any, ...],
    *,
    labels: int = LABELS,
    shuffle: Array | None = None,
) -> Saliency:
    """Leave-one-out maps for the most likely labels of each input, and their insertion paths.

    An example speaks for a label by how much its log probability falls without it.

    Args:
        construction: gives inputs their meaning; its task predicts distributions.
        model: of its class.
        inputs: as `construction.sample` gives them; of an input with several questions the first
            counts, one with none is left out.
        labels: how many labels of each input, the most likely.
        shuffle: a key; the maps' examples are then exchanged at random, the control.

    Raises:
        ValueError: predictions are numbers, not distributions, or no examples can be left out.
    """
    kind = outcome(construction.task)
    if kind == "values":
        raise ValueError(
            f"{type(construction.task).__name__} predicts numbers, saliency needs labels with "
            "probabilities"
        )
    size = construction.context_size(*inputs)
    singles = [tuple(np.asarray(a)[n : n + 1] for a in inputs) for n in range(len(inputs[0]))]

    def log_probabilities(which: list[int], kept: list[np.ndarray]) -> np.ndarray:
        found = answers(construction, model, [singles[n] for n in which], kept)
        rows = found.reshape(len(found), -1, found.shape[-1])
        rows = rows[np.arange(len(which)), asked[which]]
        return np.asarray(jax.nn.log_softmax(rows) if kind == "logits" else _scores(rows))

    everything = np.arange(size)
    whole = answers(construction, model, singles, [everything] * len(singles))
    asked = _questions(construction, whole)
    if (asked < 0).all():
        raise ValueError("nothing is to be predicted in any input, saliency needs a question")
    singles = [given for given, question in zip(singles, asked, strict=True) if question >= 0]
    asked, count = asked[asked >= 0], range(len(singles))
    full = log_probabilities([*count], [everything] * len(singles))
    chosen = np.argsort(-full, axis=1)[:, :labels]
    without = log_probabilities(
        [n for n in count for _ in everything],
        [np.delete(everything, i) for _ in count for i in everything],
    ).reshape(len(singles), size, -1)
    drops = full[:, None] - without
    maps = np.take_along_axis(drops, chosen[:, None], 2).swapaxes(1, 2)
    if shuffle is not None:
        maps = np.asarray(jax.random.permutation(shuffle, maps, axis=2, independent=True))
    order = np.argsort(-maps, axis=2, kind="stable")
    points = np.unique(np.linspace(0, size, min(POINTS, size + 1)).round().astype(int))
    rows = [(n, k, p) for n in count for k in range(chosen.shape[1]) for p in points]
    found = log_probabilities(
        [n for n, _, _ in rows], [np.sort(order[n, k, :p]) for n, k, p in rows]
    )
    path = np.exp(found[np.arange(len(rows)), [chosen[n, k] for n, k, _ in rows]])
    probability = np.exp(np.take_along_axis(full, chosen, 1))
    return Saliency(chosen, probability, maps, path.reshape(*chosen.shape, len(points)))
