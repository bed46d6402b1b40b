"""Sentence probes: what can be read off the stream at words, with the controls that it is read by.

One row is a place in a sentence (a word, a pair of words); all rows of a sentence are in one of the
parts train, validation and test, as sentences differ in length and rows of one are alike. A probe
is fitted at every layer of several models, and beside the models stand columns that say how little
a good score may mean:

    embedding      layer 0 of the first model: the words, before they see each other
    place          no model: one-hot positions (and width, and the sentence's length)
    control task   the first model, on targets that were exchanged between sentences of one length

A model at random initialisation is a model like others; pass it as one.

Probes are linear (`probes.regression`) or have one hidden layer,

    found(x)  =  b + W relu(c + V s(x)),        s standardises by the training rows,

fitted to the least squared error by Adam on batches of rows; of all the weights on the way those
are kept that are best on validation rows (early stopping). W and b start at 0, so that a probe that
finds nothing predicts the training mean. A hidden layer finds more than is there for the model to
use: compare with the same probe on the embedding and on control targets, and with the linear one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from probes.regression import Split, ridge, split, standardise
from synthetic.display import ShowsMarkdown, aligned
from synthetic.guards import number


@dataclass(frozen=True)
class ProbeRecipe:
    """How a probe is fitted.

    Attributes:
        hidden: units of the hidden layer.
        steps: of Adam; the learning rate falls to 0 along a cosine.
        batch: rows in a step.
        learning_rate: at the start.
        checks: how often, at equal distances, the validation rows are looked at.
    """

    hidden: int = 64
    steps: int = 1500
    batch: int = 256
    learning_rate: float = 3e-3
    checks: int = 30

    def __post_init__(self) -> None:
        for name in ("hidden", "steps", "batch", "checks"):
            number(name, getattr(self, name), whole=True, least=1)
        number("learning_rate", self.learning_rate, above=0)
        if self.steps % self.checks:
            raise ValueError(f"checks is {self.checks}, must divide steps, {self.steps}")


class TwoLayer(NamedTuple):
    """Probes of several feature sets (layers) for several targets (steps).

    Attributes:
        hidden_weight: V, `[layer, step, feature, hidden]`, of features as they were given.
        hidden_bias: c, `[layer, step, hidden]`.
        weight, bias: W and b, `[layer, step, hidden, target]` and `[layer, step, target]`.
        stopped: steps of Adam after which these were the weights, `[layer, step]`.
    """

    hidden_weight: Array
    hidden_bias: Array
    weight: Array
    bias: Array
    stopped: Array

    def __call__(self, features: Any) -> np.ndarray:
        """Predictions `[step, layer, row, target]` from features `[layer, row, feature]`."""
        found = []
        for layer, x in enumerate(np.asarray(features, np.float32)):
            v, c, w, b = (np.asarray(a[layer]) for a in self[:4])
            hidden = np.maximum(x @ v + c[:, None], 0)
            found.append(hidden @ w + b[:, None])
        return np.stack(found, 1)


def two_layer(
    features: Any, targets: Any, parts: Split, key: Array, recipe: ProbeRecipe | None = None
) -> TwoLayer:
    """Probes for all pairs of `features[layer]` and `targets[step]`, in one compiled call.

    Args:
        features: `[layer, row, feature]`.
        targets: `[step, row, target]`.
        parts: rows of the training, validation and test parts; the latter is not looked at.
        key: of the weights at the start and the order of the rows, the same for all pairs.
        recipe: None: `ProbeRecipe()`.

    Raises:
        ValueError: rows of features and targets are not as many.
    """
    features, targets = jnp.asarray(features), jnp.asarray(targets)
    if features.ndim != 3 or targets.ndim != 3 or features.shape[1] != targets.shape[1]:
        raise ValueError(
            f"features has shape {features.shape} and targets {targets.shape}, must be [layer, row,"
            " feature] and [step, row, target] with the same rows"
        )
    seen = tuple(map(jnp.asarray, parts[:2]))
    return _two_layer(features, targets, seen, key, recipe=recipe or ProbeRecipe())


@partial(jax.jit, static_argnames="recipe")
def _two_layer(
    features: Array, targets: Array, parts: tuple[Array, ...], key: Array, *, recipe: ProbeRecipe
) -> TwoLayer:
    dtype, size = features.dtype, targets.shape[-1]
    start_key, order_key = jax.random.split(key)
    every = recipe.steps // recipe.checks
    decay = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
    optimizer = optax.adam(decay)
    dot = partial(jnp.matmul, precision="highest")

    def predict(w: Any, x: Array) -> Array:
        return dot(jax.nn.relu(dot(x, w[0]) + w[1]), w[2]) + w[3]

    def loss(w: Any, x: Array, y: Array) -> Array:
        return jnp.sum((predict(w, x) - y) ** 2, -1).mean()

    def probe(rows: list[Array], y: Array) -> tuple[Any, Array]:
        fan = rows[0].shape[1]
        v = jax.random.normal(start_key, (fan, recipe.hidden), dtype) * (2 / fan) ** 0.5
        zeros = (jnp.zeros(recipe.hidden, dtype), jnp.zeros((recipe.hidden, size), dtype))
        start = (v, *zeros, jnp.zeros(size, dtype))
        wanted = [y[part] for part in parts]

        def step(carry: Any, number: Array) -> tuple[Any, None]:
            w, state = carry
            own = jax.random.fold_in(order_key, number)
            drawn = jax.random.randint(own, (recipe.batch,), 0, len(rows[0]))
            gradient = jax.grad(loss)(w, rows[0][drawn], wanted[0][drawn])
            update, state = optimizer.update(gradient, state, w)
            return (optax.apply_updates(w, update), state), None

        def check(carry: Any, number: Array) -> tuple[Any, None]:
            running, best, least, stopped = carry
            running, _ = jax.lax.scan(step, running, number * every + jnp.arange(every))
            missed = loss(running[0], rows[1], wanted[1])
            # NaN is not less: a fit that diverges keeps what it had
            better = missed < least
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), running[0], best)
            stopped = jnp.where(better, (number + 1) * every, stopped)
            return (running, best, jnp.where(better, missed, least), stopped), None

        first = (start, start, loss(start, rows[1], wanted[1]), jnp.zeros((), int))
        carry = ((start, optimizer.init(start)), *first[1:])
        (_, best, _, stopped), _ = jax.lax.scan(check, carry, jnp.arange(recipe.checks))
        return best, stopped

    def layer(x: Array) -> TwoLayer:
        rows, mean, std = standardise([x[part] for part in parts])

        def task(y: Array) -> TwoLayer:
            centre = y[parts[0]].mean(0)
            # one unit for all targets: the error that is least is that of the pooled R^2
            unit = jnp.sqrt(jnp.mean((y[parts[0]] - centre) ** 2))
            unit = jnp.where(unit > 10 * jnp.finfo(dtype).eps * jnp.abs(centre).max(), unit, 1)
            (v, c, w, b), stopped = probe(rows, (y - centre) / unit)
            v = v / std[:, None]
            return TwoLayer(v, c - dot(mean, v), w * unit, b * unit + centre, stopped)

        return jax.lax.map(task, targets)

    return jax.lax.map(layer, features)


PROBES = ("linear", "two-layer")
EMBEDDING, PLACE, CONTROL = COLUMNS = ("embedding", "place", "control task")

#: From predictions `[row, target]` and the sentences whose targets they are for, `[sentence]`, to
#: misses and units, `[sentence]` each: see `LayerScores`.
Judge = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Rows(NamedTuple):
    """What is probed for: one row a place in a sentence.

    Attributes:
        sentence: `[row]`, its number; ascending.
        place: `[row, coordinate]`, where it is, the length of the sentence last.
        sentences: how many there are.
    """

    sentence: np.ndarray
    place: np.ndarray
    sentences: int


@dataclass(frozen=True, eq=False)
class LayerScores(ShowsMarkdown):
    """Held-out scores of one probe at every layer of several models.

    A score is 1 - sum(misses) / sum(units) over the sentences of a part. For R^2 these are sums of
    squares, around the prediction and around the mean; for F1 they are 1 - F1 and 1.

    Attributes:
        score: what it is, "R^2" or "F1".
        by_layer: column -> `[layer]`, on test sentences.
        layers: column -> the layer with the best score on validation sentences.
        correlation: column -> Pearson's, of targets and predictions on test sentences at that
            layer; pooled over centred targets. NaN for constant ones.
        misses: column -> `[2, sentence]`, misses and units of the test sentences at that layer.
    """

    score: str
    by_layer: Mapping[str, np.ndarray]
    layers: Mapping[str, int]
    correlation: Mapping[str, float]
    misses: Mapping[str, np.ndarray]

    def __getitem__(self, column: str) -> float:
        """The score on test sentences, at the layer that is best on validation sentences."""
        return float(self.by_layer[column][self.layers[column]])

    def sensitivity(self, column: str) -> float:
        """The score at the best layer less that at layer 0 (the word of Zhao et al. 2023).

        How much of what the probe finds is the model's and not the embedding's or the probe's.
        """
        return self[column] - float(self.by_layer[column][0])

    def gain(self, column: str, over: str, seed: int = 0) -> tuple[float, float, float]:
        """How much better one column is than another, and a 95 % interval.

        The interval is that of 2000 resamples of the test sentences: it covers the choice of these,
        not the training of the model nor of the probe.
        """
        rng = np.random.default_rng(seed)
        size = self.misses[column].shape[1]
        counts = np.concatenate(
            [np.ones((1, size)), rng.multinomial(size, np.full(size, 1 / size), 2000)]
        )
        sums = {name: self.misses[name] @ counts.T for name in (column, over)}
        values = {name: 1 - misses / units for name, (misses, units) in sums.items()}
        differences = values[column] - values[over]
        low, high = np.quantile(differences[1:], (0.025, 0.975))
        return float(differences[0]), float(low), float(high)

    def markdown(self) -> str:
        """The table as text: columns down, layers across, the chosen layer marked."""
        depth = max(map(len, self.by_layer.values()))
        layers = [f"layer {n}" for n in range(depth)]
        lines = [[self.score, *layers, "correlation", "sensitivity"]]
        for column, values in self.by_layer.items():
            shown = [f"{v:.3f}" + "*" * (n == self.layers[column]) for n, v in enumerate(values)]
            r = self.correlation[column]
            shown += [""] * (depth - len(values)) + ["" if np.isnan(r) else f"{r:.3f}"]
            shown += [f"{self.sensitivity(column):.3f}" if len(values) > 1 else ""]
            lines.append([column, *shown])
        return aligned(lines)


def squares(found: np.ndarray, targets: np.ndarray, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Sums of squares of each sentence, around the prediction and around 0."""

    def by_sentence(values: np.ndarray) -> np.ndarray:
        return np.bincount(rows.sentence, (values**2).sum(1), rows.sentences)

    return by_sentence(targets - found), by_sentence(targets)


def fit(
    features: Mapping[str, np.ndarray],
    targets: np.ndarray,
    rows: Rows,
    key: Array,
    *,
    probe: str = "linear",
    whole: bool = True,
    judge: Judge | None = None,
    score: str = "R^2",
    fixed: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> LayerScores:
    """Probes for all columns and layers.

    Args:
        features: column -> `[layer, row, feature]`.
        targets: `[row, target]`.
        rows: where they are.
        key: of the split, the control task and, for "two-layer", the probe's start.
        probe: "linear" is ridge regression (`probes.regression`), "two-layer" has a hidden layer
            (`probes.syntax.sentence_probes`).
        whole: sentences of one length have the same places, so that the control task exchanges
            their targets as a whole. False: it exchanges rows between sentences, of one place.
        judge: what is missed in each sentence; None: squares of what is left of the targets less
            their mean on training sentences, so that the score is R^2.
        score: its name.
        fixed: further columns without a probe, as `judge` returns them.

    Raises:
        ValueError: another probe, no column, or too few sentences for three parts.
    """
    if probe not in PROBES:
        raise ValueError(f"probe is {probe!r}, must be one of {', '.join(PROBES)}")
    cut, shuffle = jax.random.split(key)
    parts = split(cut, len(targets), rows.sentence)
    _, validation, test = (np.unique(rows.sentence[part]) for part in parts)
    seed = np.asarray(jax.random.bits(shuffle, (4,)))
    own = other = np.arange(rows.sentences)
    if whole:
        begin = np.searchsorted(rows.sentence, own)
        lengths = np.zeros((rows.sentences, 1), int)
        lengths[rows.sentence, 0] = rows.place[:, -1]
        other = _exchange(lengths, seed)
        order = np.arange(len(targets)) + (begin[other] - begin)[rows.sentence]
    else:
        order = _exchange(rows.place[:, :-1], seed)
    both = np.stack([targets, targets[order]]).astype(np.float32)[:, :, None]
    by_layer, layers, correlation, misses = {}, {}, {}, {}

    def summed(sums: list[tuple[np.ndarray, np.ndarray]], column: str) -> None:
        totals = np.array(sums)  # [layer, 2, sentence]
        scores = [1 - np.divide(*totals[:, :, part].sum(-1).T) for part in (validation, test)]
        layers[column] = int(np.argmax(scores[0]))
        by_layer[column] = scores[1]
        misses[column] = totals[layers[column]][:, test]

    def judged(column: str, found: np.ndarray, wanted: np.ndarray, whose: np.ndarray) -> None:
        if judge is None:
            centre = wanted[parts.train].mean(0)
            summed([squares(f - centre, wanted - centre, rows) for f in found], column)
        else:
            summed([judge(f, whose) for f in found], column)
        chosen = [a[parts.test] - a[parts.test].mean(0) for a in (found[layers[column]], wanted)]
        norms = np.prod([np.sqrt((a**2).sum()) for a in chosen])
        correlation[column] = float((chosen[0] * chosen[1]).sum() / norms) if norms else np.nan

    start = jax.random.fold_in(key, 1)

    def predictions(x: np.ndarray, controlled: bool = False) -> np.ndarray:
        """Of the targets and, if wanted, of the exchanged ones, `[2 or 1, layer, row, target]`."""
        if probe == "two-layer":
            wanted = both[: 1 + controlled, :, 0]
            return two_layer(jnp.asarray(x, jnp.float32), wanted, parts, start)(x)
        probes = ridge(jnp.asarray(x, jnp.float32)[:, :, None], jnp.asarray(both), parts)
        weight, bias = np.asarray(probes.weight, float), np.asarray(probes.bias, float)
        found = np.einsum("lrf,lsft->slrt", x, weight, optimize=True)
        return found + bias.swapaxes(0, 1)[:, :, None]

    embedded = None
    for column, x in features.items():
        found = predictions(x, embedded is None)
        judged(column, found[0], targets, own)
        if embedded is None:
            embedded = found[0, :1]
            judged(CONTROL, found[1], targets[order], other)
    if embedded is None:
        raise ValueError("features has no column, must have one at least")
    judged(EMBEDDING, embedded, targets, own)
    judged(PLACE, predictions(_one_hot(rows.place)[None])[0], targets, own)
    for column, sums in (fixed or {}).items():
        summed([sums], column)
        correlation[column] = np.nan
    return LayerScores(score, by_layer, layers, correlation, misses)


def _exchange(place: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """A random permutation of rows among those of the same place; one of its kind stays."""
    rng = np.random.default_rng(seed)
    _, kind = np.unique(place, axis=0, return_inverse=True)
    kind = kind.ravel()
    order = np.empty(len(kind), int)
    order[np.lexsort((rng.random(len(kind)), kind))] = np.lexsort((rng.random(len(kind)), kind))
    return order


def _one_hot(place: np.ndarray) -> np.ndarray:
    """Each coordinate by itself, `[row, feature]`."""
    return np.concatenate([c[:, None] == np.unique(c) for c in place.T], 1).astype(np.float32)


def arrays(models: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Columns and activations."""
    return [(name, np.asarray(h)) for name, h in models.items()]


def batch_and_time(models: Mapping[str, Any]) -> tuple[int, int]:
    """Those that all models agree on; ValueError where they do not."""
    if not models or set(models) & set(COLUMNS):
        raise ValueError(f"models are named {list(models)}, must be some, and none of {COLUMNS}")
    shapes = {name: np.shape(h) for name, h in models.items()}
    first = next(iter(shapes.values()))
    for name, shape in shapes.items():
        if len(shape) != 4 or shape[1:3] != first[1:3]:
            raise ValueError(
                f"models['{name}'] has shape {shape}, must be [layer, batch, time, feature] with "
                "one batch and time for all"
            )
    return first[1], first[2]


def checked_lengths(lengths: np.ndarray, batch: int, time: int) -> np.ndarray:
    """ValueError unless there is one for each sentence, in 1..time."""
    if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > time:
        raise ValueError(f"lengths must be {batch} numbers in 1..{time}, got {lengths}")
    return lengths
