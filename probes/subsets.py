"""A model's answers when examples of the context are left out.

What a construction's inputs are made of, and what of a prediction answers no example itself, the
construction says (`Construction.context_size`, `subset`, `answers`): pairs of a regression, states
of a sequence, visible words of a sentence, words that are trained on. Examples are removed, not set
to 0, which is the same for linear attention only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from constructions.claims import predict
from constructions.family import Construction

#: Inputs that are run at once: always this many, so that few shapes are compiled.
AT_ONCE = 256


def _predict(construction: Construction, model: Any, inputs: list[np.ndarray]) -> np.ndarray:
    """`construction.apply` of any number of inputs, in blocks of one shape."""
    rows, found = len(inputs[0]), []
    for start in range(0, rows, AT_ONCE):
        block = np.minimum(np.arange(start, start + AT_ONCE), rows - 1)
        found.append(np.asarray(predict(construction, model, *(a[block] for a in inputs))))
    return np.concatenate(found)[:rows]


def answers(
    construction: Construction,
    model: Any,
    inputs: Sequence[tuple[Any, ...]],
    kept: Sequence[Sequence[int] | np.ndarray],
) -> np.ndarray:
    """What the model answers to each of some inputs with only some of its examples.

    One compilation for every shape that inputs of `subset` have.

    Args:
        construction: gives inputs their meaning.
        model: of its class, or a function from inputs to predictions.
        inputs: as `construction.sample` gives them, all of one batch size and length.
        kept: for each of them, the examples that stay, ascending.

    Returns:
        `[input, batch, ...]`, the construction's `answers`.

    Raises:
        ValueError: the construction has no examples to leave out.
    """
    alike: dict[Any, list[int]] = {}
    cut = []
    for number, (given, chosen) in enumerate(zip(inputs, kept, strict=True)):
        cut.append([np.asarray(a) for a in construction.subset(chosen, *given)])
        alike.setdefault(tuple(a.shape for a in cut[-1]), []).append(number)
    found: dict[int, np.ndarray] = {}
    for numbers in alike.values():
        rows = [np.concatenate(arrays) for arrays in zip(*(cut[n] for n in numbers), strict=True)]
        predictions = np.split(_predict(construction, model, rows), len(numbers))
        for n, prediction in zip(numbers, predictions, strict=True):
            found[n] = np.asarray(construction.outside_context(prediction, kept[n], *inputs[n]))
    return np.stack([found[n] for n in range(len(found))])


def all_subsets(
    construction: Construction, model: Any, inputs: tuple[Any, ...], players: int
) -> np.ndarray:
    """The answers for every subset of the first examples; the other examples always stay.

    Args:
        players: how many examples are left out in all ways.

    Returns:
        `[2^players, batch, ...]`; the bits of the first index, lowest first, say which are there.

    Raises:
        ValueError: the context has fewer examples, or none that can be left out.
    """
    size = construction.context_size(*inputs)
    if not 1 <= players <= size:
        raise ValueError(f"players is {players}, must be 1 to {size}, the examples of the context")
    present = np.arange(2**players)[:, None] >> np.arange(players) & 1
    rest = np.arange(players, size)
    kept = [np.concatenate([np.flatnonzero(p), rest]) for p in present]
    numbers = tuple(np.asarray(a) for a in inputs)
    return answers(construction, model, [numbers] * len(kept), kept)
