"""What examples without labels are worth beside one labelled example of each class."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from constructions.claims import predict
from constructions.hyper_transformer.prototypes import HyperPrototypes
from constructions.measurement import Measurement, Remark

_PAPER = "after Zhmoginov et al. 2022, arXiv 2201.04182"
_SIZES: dict[str, Any] = {"dim": 20, "classes": 5, "shots": 1, "queries": 20, "spread": 0.7}
#: Sharpness, similarity, scale and shrinkage with the least loss, by the number without labels.
_TUNED: dict[int, dict[str, Any]] = {
    20: {"sharpness": 2.71, "similarity": 0.333, "scale": 0.685, "shrinkage": 0.858},
    100: {"sharpness": 3.11, "similarity": 0.447, "scale": 0.891, "shrinkage": 1.173},
}


def accuracies(unlabelled: int, seed: int, tasks: int) -> dict[str, np.ndarray]:
    """Accuracy in every task, `[task]`, of the construction and of models that know less.

    "posterior" is the best that labelled examples allow; "ablated" is the construction without the
    layer that guesses labels.
    """
    c = HyperPrototypes(**_SIZES, unlabelled=unlabelled, **_TUNED[unlabelled])
    episodes = c.task.sample(jax.random.key(seed), tasks)
    found = {
        "construction": predict(c, c.reference, *episodes.inputs),
        "ablated": predict(c, c.near_misses()["no guesses"].model, *episodes.inputs),
        "posterior": c.task.posterior(*episodes.inputs),
    }
    return {name: np.asarray(c.task.accuracy(p, episodes)) for name, p in found.items()}


def measure(quick: bool = False, seed: int = 0, tasks: int = 300) -> Iterator[Measurement | Remark]:
    """Accuracies, and gains in pairs over the exact posterior of the labelled examples."""
    del quick  # seconds either way

    def row(name: str, statement: str, values: np.ndarray, **bounds: Any) -> Measurement | Remark:
        number, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(tasks))
        if not bounds:
            return Remark(name, statement, _PAPER, number, error)
        return Measurement(name, statement, _PAPER, None, number, error, **bounds)

    for unlabelled in _TUNED:
        found = accuracies(unlabelled, seed, tasks)
        if unlabelled == 20:
            yield row(
                "accuracy of labelled examples",
                "The exact posterior of one example of each of five classes, in 20 dimensions.",
                found["posterior"],
            )
        yield row(
            f"accuracy with {unlabelled} more",
            f"Prototypes with guessed labels of {unlabelled} examples that have none.",
            found["construction"],
        )
        yield row(
            f"gain from {unlabelled} more",
            "Examples without labels help: the difference of the two, task by task, is above 0.",
            found["construction"] - found["posterior"],
            at_least=0.0,
        )
        yield row(
            f"the same without guesses, {unlabelled} more",
            "It is the guesses that help: without the layer that makes them less than half of the "
            "gain is left.",
            found["ablated"] - found["posterior"],
            at_most=float((found["construction"] - found["posterior"]).mean() / 2),
        )
