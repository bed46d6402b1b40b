r"""What a prediction makes of the examples in its context: their degrees, and maps of them.

Examples are removed from the context, not set to 0, which is the same for linear attention only,
and predictions compared. What the examples are, and which part of a prediction is outside the
context, the construction says (`Construction.context_size`, `subset`, `outside_context`): pairs of
a regression, states of a sequence, visible words of a sentence, words that are trained on.

The degree of a prediction in the examples of its context, by the Walsh-Hadamard transform.

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

Saliency maps of a context as certificates: completeness, and soundness.

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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from constructions.claims import predict
from constructions.core.transformer import cast
from constructions.family import Construction
from constructions.runs import Run
from probes.foreign import functions, lacking, no_fewer_examples
from probes.probe import Probe, Result, compiled_like, seed_names, table, too_many_weights
from synthetic.tasks.task import outcome

#: Inputs that are run at once: always this many, so that few shapes are compiled.
AT_ONCE = 256


def _in_blocks(construction: Construction, model: Any, inputs: list[np.ndarray]) -> np.ndarray:
    """`construction.apply` of any number of inputs, in blocks of one shape."""
    rows, found = len(inputs[0]), []
    for start in range(0, rows, AT_ONCE):
        block = np.minimum(np.arange(start, start + AT_ONCE), rows - 1)
        found.append(np.asarray(predict(construction, model, *(a[block] for a in inputs))))
    return np.concatenate(found)[:rows]


def subset_predictions(
    construction: Construction,
    model: Any,
    inputs: Sequence[tuple[Any, ...]],
    kept: Sequence[Sequence[int] | np.ndarray],
) -> np.ndarray:
    """Predictions for each of some inputs with only some of its examples.

    One compilation for every shape that inputs of `subset` have.

    Args:
        construction: gives inputs their meaning.
        model: of its class, or a function from inputs to predictions.
        inputs: as `construction.sample` gives them, all of one batch size and length.
        kept: for each of them, the examples that stay, ascending.

    Returns:
        `[input, batch, ...]`, the construction's `outside_context`.

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
        predictions = np.split(_in_blocks(construction, model, rows), len(numbers))
        for n, prediction in zip(numbers, predictions, strict=True):
            found[n] = np.asarray(construction.outside_context(prediction, kept[n], *inputs[n]))
    return np.stack([found[n] for n in range(len(found))])


def all_subsets(
    construction: Construction, model: Any, inputs: tuple[Any, ...], examples: int
) -> np.ndarray:
    """`subset_predictions` for every subset of the first examples; the others always stay.

    Args:
        examples: how many examples are left out in all ways.

    Returns:
        `[2^examples, batch, ...]`; the bits of the first index, lowest first, say which are there.

    Raises:
        ValueError: the context has fewer examples, or none that can be left out.
    """
    size = construction.context_size(*inputs)
    if not 1 <= examples <= size:
        raise ValueError(f"examples is {examples}, must be 1 to {size}, those of the context")
    present = np.arange(2**examples)[:, None] >> np.arange(examples) & 1
    rest = np.arange(examples, size)
    kept = [np.concatenate([np.flatnonzero(p), rest]) for p in present]
    numbers = tuple(np.asarray(a) for a in inputs)
    return subset_predictions(construction, model, [numbers] * len(kept), kept)


#: Most examples that are left out in all ways: 4096 predictions.
MOST = 12
#: A share counts as present above this many squared roundings.
ROUNDING = 1e5


@dataclass(frozen=True)
class Spectrum:
    """The degrees of a prediction.

    Attributes:
        weights: B_0, ..., B_N, `[degree]`: mean over inputs and entries of the predictions.
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
    examples: int | None = None,
) -> Spectrum:
    """The degree spectrum of a model's predictions, exact up to rounding.

    Args:
        construction: gives inputs their meaning.
        model: of its class.
        inputs: as `construction.sample` gives them.
        examples: examples that are left out in all ways, the first; the others stay. None: all of
            them, at most `MOST`.

    Raises:
        ValueError: no examples that can be left out, fewer than `examples`, or more than `MOST`.
    """
    size = construction.context_size(*inputs)
    examples = min(size, MOST) if examples is None else examples
    if examples > MOST:
        raise ValueError(f"examples is {examples}, must be at most {MOST}: all subsets are run")
    values = all_subsets(construction, model, inputs, examples)
    return Spectrum(degree_weights(values), float(np.finfo(values.dtype).eps))


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


@jax.jit
def _scores(prediction: Array) -> Array:
    tiny = jnp.finfo(prediction.dtype).tiny
    return jnp.log(jnp.maximum(prediction, tiny))


def _questions(construction: Construction, whole: np.ndarray) -> np.ndarray:
    """Which row of the predictions is the question: the first distribution; -1 for none."""
    rows = whole.reshape(len(whole), -1, whole.shape[-1])
    if outcome(construction.task) == "logits":
        return np.zeros(len(whole), int)
    there = rows.sum(-1) > 0.5
    return np.where(there.any(1), there.argmax(1), -1)


def no_labels(task: Any) -> str:
    """Why a task has no labels to explain, in one phrase; "" where it has."""
    if outcome(task) == "values":
        return f"{type(task).__name__} predicts numbers, saliency needs labels with probabilities"
    return ""


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
    if missing := no_labels(construction.task):
        raise ValueError(missing)
    kind = outcome(construction.task)
    size = construction.context_size(*inputs)
    singles = [tuple(np.asarray(a)[n : n + 1] for a in inputs) for n in range(len(inputs[0]))]

    def log_probabilities(which: list[int], kept: list[np.ndarray]) -> np.ndarray:
        found = subset_predictions(construction, model, [singles[n] for n in which], kept)
        rows = found.reshape(len(found), -1, found.shape[-1])
        rows = rows[np.arange(len(which)), asked[which]]
        return np.asarray(jax.nn.log_softmax(rows) if kind == "logits" else _scores(rows))

    everything = np.arange(size)
    whole = subset_predictions(construction, model, singles, [everything] * len(singles))
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


#: Examples that are left out in all ways, contexts (fewer of large models), and contexts that
#: maps are made for.
LEFT_OUT, CONTEXTS, MAPPED = 8, 16, 8


def measure_degrees(run: Run, seed: int) -> Result:
    """Shares of the degrees, in examples of the context, of construction and trained models."""
    with jax.enable_x64(True):
        construction = run.construction
        large = bool(too_many_weights(run, "")) and not functions(run)
        inputs = construction.sample(jax.random.key(seed), CONTEXTS // 4 if large else CONTEXTS)
        examples = min(LEFT_OUT, construction.context_size(*inputs))
        rows = []
        for model in (compiled_like(construction, run.models[0]), *run.models):
            if hasattr(model, "arrays"):
                model = cast(model, "float64")
            found = spectrum(construction, model, inputs, examples)
            shares = np.append(found.shares, np.zeros(5))
            rows.append([found.degree, *shares[1:5], found.above(4)])
    names = ("construction", *seed_names(run))
    columns = ("highest degree", "1", "2", "3", "4", "above 4")
    return table(
        f"degree of the prediction in {examples} examples of the context, shares of the variance",
        columns,
        names,
        rows,
        "degree 1 is a sum over examples; k steps of gradient descent have degree k at most",
    )


def measure_maps(run: Run, seed: int) -> Result:
    """Completeness and soundness of leave-one-out maps, beside random maps."""
    construction = run.construction
    inputs = construction.sample(jax.random.key(seed), MAPPED)
    models = dict(zip(seed_names(run), run.models, strict=True))
    models = {"construction": compiled_like(construction, run.models[0]), **models}
    rows, names = [], []
    for name, model in models.items():
        for kind, key in (("", None), (", random map", jax.random.key(seed + 1))):
            found = saliency(construction, model, inputs, shuffle=key)
            rows.append(
                [
                    found.probability[:, 0].mean(),
                    found.completeness.mean(),
                    found.auc[:, 1:].max(1).mean(),
                    found.soundness.min(1).mean(),
                ]
            )
            names.append(name + kind)
    columns = ("probability of its label", "completeness", "best AUC of a wrong label",
               "worst soundness")  # fmt: skip
    return table("saliency maps of the context as certificates", columns, names, rows)


def needs_examples(run: Run) -> str:
    """Inputs with examples that can be left out, and models that take fewer of them."""
    return no_examples(run.construction) or lacking(run, no_fewer_examples)


def no_examples(construction: Construction) -> str:
    """Why inputs have no examples to leave out, in one phrase; "" where they have."""
    if type(construction).context_size is Construction.context_size:
        return f"{type(construction).__name__}: its inputs have no examples to leave out"
    return ""


def needs_labels(run: Run) -> str:
    """The same, and predictions that are distributions."""
    return no_labels(run.construction.task) or needs_examples(run)


DEGREES = Probe(
    "degrees",
    "is the prediction a sum over the examples of the context, and if not, of which degree?",
    "a model divides by the number of examples it sees, or is read in float32: small shares are "
    "rounding",
    measure_degrees,
    needs_examples,
    functions=True,
)

SALIENCY = Probe(
    "saliency",
    "are there maps for what the model says, and none for what it does not?",
    "completeness is looked at alone: a sum over examples lets any label be explained",
    measure_maps,
    needs_labels,
    functions=True,
)
