"""Held-out linear probes with control tasks: what can be read off features, and how cheaply.

A probe is trained on one part of the sequences, its regularisation is chosen on a second and its
score measured on a third; all tokens of a sequence are in the same part. The control task (Hewitt &
Liang 2019, arXiv 1909.03368) trains the same probe on labels that have nothing to do with the
features; selectivity is the score minus the control's. `probes.linear` probes whole models;
`ridge_probe` and `logistic_probe` take features of any kind, and are for use as a library.

A probe that succeeds says that a value can be read, not that the model uses it (`interchange` asks
that), and a value that is a linear function of the input can be read from every model: compare with
the probe on the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from synthetic.compilation import compile_once

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class RidgeResult:
    """A ridge probe.

    Attributes:
        r2: held-out share of the targets' variance that is explained, pooled over targets; negative
            where the probe does worse than the training mean. NaN for constant targets.
        r2_train: the same on the training part.
        control_r2, control_r2_train: the same probe on targets shuffled over sequences.
        regularization: chosen lambda, in units of the mean variance of a standardised feature.
        weight, bias: the probe, `features @ weight + bias`.
    """

    r2: float
    r2_train: float
    control_r2: float
    control_r2_train: float
    regularization: float
    weight: np.ndarray
    bias: np.ndarray

    @property
    def selectivity(self) -> float:
        """r2 - control_r2."""
        return self.r2 - self.control_r2


@dataclass(frozen=True, eq=False)
class LogisticResult:
    """A multinomial logistic probe.

    Attributes:
        accuracy, cross_entropy: held out; the latter in nats.
        accuracy_train: on the training part.
        majority: held-out accuracy of the training part's most frequent class.
        control_accuracy: of the same probe on the control task.
        regularization: chosen lambda.
        weight, bias: the probe, logits `features @ weight + bias`.
    """

    accuracy: float
    cross_entropy: float
    accuracy_train: float
    majority: float
    control_accuracy: float
    regularization: float
    weight: np.ndarray
    bias: np.ndarray

    @property
    def selectivity(self) -> float:
        """accuracy - control_accuracy."""
        return self.accuracy - self.control_accuracy


class Split(NamedTuple):
    """Indices of the sequences in each part."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split(
    key: Array,
    batch: int,
    groups: Any = None,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
) -> Split:
    """Divide sequences at random into training, validation and test.

    Args:
        key: of the permutation.
        batch: number of sequences.
        groups: `[batch]`, sequences with the same entry stay together (copies of one sequence, or
            sequences that share a document); None: every sequence is its own group.
        fractions: of the groups, in order.

    ValueError if a part would be empty or `groups` does not fit.
    """
    groups = np.arange(batch) if groups is None else np.asarray(groups)
    if groups.shape != (batch,):
        raise ValueError(f"groups has shape {groups.shape}, must be ({batch},)")
    names, member = np.unique(groups, return_inverse=True)
    order = np.asarray(jax.random.permutation(key, len(names)))
    ends = np.round(np.cumsum(fractions)[:2] / sum(fractions) * len(names)).astype(int)
    parts = [np.flatnonzero(np.isin(member, part)) for part in np.split(order, ends)]
    if min(map(len, parts)) == 0:
        sizes = dict(zip(PARTS, map(len, parts), strict=True))
        raise ValueError(f"batch is {batch} with {len(names)} groups, split as {sizes}: too few")
    return Split(*parts)


def ridge_probe(features: Any, targets: Any, *, key: Array, groups: Any = None) -> RidgeResult:
    """Can the targets be read off the features by a linear map?

        minimise  |Y - X W - b|^2 / n + lambda |S W|^2,   S = diag(standard deviations of X)

    in closed form, lambda chosen on the validation part from a geometric grid.

    Misleads where the targets are (almost) linear in the input, where features outnumber the
    training samples (then r2 underestimates), or where two sequences are nearly equal (pass
    `groups`).

    Args:
        features: `[batch, ..., feature]`; the split is made on the first axis.
        targets: `[batch, ..., target]`.
        key: of the split and the control task.
        groups: see `split`.

    ValueError for shapes that do not fit, values that are not finite, or too few sequences.
    """
    x, y = _rows(features, "features"), _rows(targets, "targets")
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"features {np.shape(features)} and targets {np.shape(targets)} must agree in all axes "
            "but the last"
        )
    keys = jax.random.split(key)
    parts, order = split(keys[0], len(x), groups), jax.random.permutation(keys[1], len(x))
    fit = ridge(x[None], jnp.stack([y, y[order]]), parts)
    r2, regularization = np.asarray(fit.r2[0], float), np.asarray(fit.regularization[0], float)
    return RidgeResult(
        r2=float(r2[0, 2]),
        r2_train=float(r2[0, 0]),
        control_r2=float(r2[1, 2]),
        control_r2_train=float(r2[1, 0]),
        regularization=float(regularization[0]),
        weight=np.asarray(fit.weight[0, 0]),
        bias=np.asarray(fit.bias[0, 0]),
    )


class Ridge(NamedTuple):
    """Ridge probes of several feature sets (layers) for several targets (steps).

    Attributes:
        residual, total: sums of squares `[layer, step, part]` around the probe and around the mean
            of the training part; parts are train, validation, test.
        regularization: `[layer, step]`.
        weight, bias: `[layer, step, feature, target]` and `[layer, step, target]`.
    """

    residual: Array
    total: Array
    regularization: Array
    weight: Array
    bias: Array

    @property
    def r2(self) -> Array:
        """1 - residual / total, `[layer, step, part]`; NaN for constant targets."""
        return jnp.where(self.total > 0, 1 - self.residual / self.total, jnp.nan)


def ridge(features: Any, targets: Any, parts: Split) -> Ridge:
    """Probes for all pairs of `features[layer]` and `targets[step]`, in one compiled call.

    features `[layer, batch, sample, feature]`, targets `[step, batch, sample, target]`.
    """
    return _ridge(features, targets, tuple(map(np.asarray, parts)))


@compile_once(often=True)
def _ridge(features: Array, targets: Array, parts: tuple[ArrayLike, ...]) -> Ridge:
    steps, _, _, size = targets.shape
    flat = jnp.moveaxis(targets, 0, -2)  # [batch, sample, step, target]
    ys = [flat[part].reshape(-1, steps, size) for part in parts]
    centre = ys[0].mean(0)
    ys = [y - centre for y in ys]
    total = jnp.stack([jnp.sum(y**2, (0, 2)) for y in ys], -1)
    # rounding in the mean leaves traces of a constant
    floor = jnp.finfo(targets.dtype).eps ** 2 * jnp.stack(
        [len(y) * jnp.sum(centre**2, -1) for y in ys], -1
    )
    total = jnp.where(total > 100 * floor, total, 0)
    grid = _grid(features.dtype)
    dot = partial(jnp.matmul, precision="highest")

    def layer(x: Array) -> tuple[Array, Array, Array, Array]:
        rows = [x[part].reshape(-1, x.shape[-1]) for part in parts]
        rows, mean, std = standardise(rows)
        n = len(rows[0])
        values, vectors = jnp.linalg.eigh(dot(rows[0].T, rows[0]) / n, symmetrize_input=True)
        values = jnp.maximum(values, 0)
        moments = dot(dot(vectors.T, rows[0].T), ys[0].reshape(n, -1)) / n

        def solve(penalty: Array) -> Array:
            return dot(vectors, moments / (values + penalty)[:, None])

        def score(weight: Array, part: int) -> Array:
            error = ys[part] - dot(rows[part], weight).reshape(-1, steps, size)
            return jnp.sum(error**2, (0, 2))

        unit = jnp.maximum(values.mean(), jnp.finfo(values.dtype).tiny)
        weights = jax.vmap(solve)(grid * unit)  # [grid, feature, step * target]
        best = jnp.argmin(jax.vmap(partial(score, part=1))(weights), 0)  # [step]
        weights = weights.reshape(len(grid), -1, steps, size)
        weight = weights[best, :, jnp.arange(steps)]  # [step, feature, target]
        joined = jnp.moveaxis(weight, 0, 1).reshape(-1, steps * size)
        residual = jnp.stack([score(joined, part) for part in range(3)], -1)
        weight = weight / std[:, None]
        bias = centre - jnp.einsum("f,sft->st", mean, weight, precision="highest")
        return residual, grid[best], weight, bias

    residual, penalty, weight, bias = jax.lax.map(layer, features)
    total = jnp.broadcast_to(total, residual.shape)
    return Ridge(residual, total, penalty, weight, bias)


def logistic_probe(
    features: Any,
    labels: Any,
    *,
    key: Array,
    types: Any = None,
    groups: Any = None,
    steps: int = 100,
) -> LogisticResult:
    """Can the class be read off the features by a linear classifier?

    Multinomial logistic regression with penalty lambda |S W|^2 / 2 (S as in `ridge_probe`), by
    L-BFGS from zero, lambda chosen on the validation part by cross-entropy. Deterministic.

    With `types` the control task gives every type (the word at a token, say) one random label,
    drawn once from the distribution of the labels: a probe that memorises types does well on it.
    Without, labels are shuffled over sequences, and only chance can help. Accuracy misleads where
    one class is frequent: compare with `majority`.

    Args:
        features: `[batch, ..., feature]`.
        labels: `[batch, ...]`, integers from 0.
        key: of the split and the control task.
        types: `[batch, ...]`, integers, or None.
        groups: see `split`.
        steps: L-BFGS iterations, at least 1.

    ValueError for shapes that do not fit, negative labels, or too few sequences.
    """
    x = _rows(features, "features")
    labels = np.asarray(labels)
    if labels.shape != np.shape(features)[:-1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}, must be integers of shape "
            f"{np.shape(features)[:-1]}"
        )
    if labels.min() < 0 or steps < 1:
        raise ValueError(f"labels start at {labels.min()} (at least 0), steps is {steps} (1)")
    classes = int(labels.max()) + 1
    keys = jax.random.split(key)
    parts, labels = split(keys[0], len(x), groups), labels.reshape(x.shape[:2])
    control = labels[np.asarray(jax.random.permutation(keys[1], len(x)))]
    if types is not None:
        _, kind = np.unique(np.asarray(types), return_inverse=True)
        drawn = jax.random.choice(keys[1], labels.ravel(), (int(kind.max()) + 1,))
        control = np.asarray(drawn)[kind.reshape(labels.shape)]
    index = tuple(map(jnp.asarray, parts))
    weight, bias, penalty, right, entropy = _logistic(
        x, jnp.stack([labels, control]), index, classes=classes, steps=steps
    )
    counts = np.bincount(labels[parts.train].ravel(), minlength=classes)
    return LogisticResult(
        accuracy=float(right[0, 2]),
        cross_entropy=float(entropy[0, 2]),
        accuracy_train=float(right[0, 0]),
        majority=float(np.mean(labels[parts.test] == counts.argmax())),
        control_accuracy=float(right[1, 2]),
        regularization=float(penalty[0]),
        weight=np.asarray(weight[0]),
        bias=np.asarray(bias[0]),
    )


@partial(jax.jit, static_argnames=("classes", "steps"))
def _logistic(
    x: Array, labels: Array, parts: tuple[Array, ...], *, classes: int, steps: int
) -> tuple[Array, ...]:
    rows, mean, std = standardise([x[part].reshape(-1, x.shape[-1]) for part in parts])
    grid = jnp.asarray([1e-5, 1e-3, 1e-1], x.dtype)

    def logits(w: tuple[Array, Array], part: int) -> Array:
        return jnp.matmul(rows[part], w[0], precision="highest") + w[1]

    def entropy(w: tuple[Array, Array], ys: list[Array], part: int) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(w, part), ys[part]).mean()

    def fit(ys: list[Array], penalty: Array) -> tuple[Array, Array]:
        def loss(w: tuple[Array, Array]) -> Array:
            return entropy(w, ys, 0) + penalty / 2 * jnp.sum(w[0] ** 2)

        optimizer = optax.lbfgs()
        gradient_of = optax.value_and_grad_from_state(loss)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            w, state = carry
            value, gradient = gradient_of(w, state=state)
            update, state = optimizer.update(
                gradient, state, w, value=value, grad=gradient, value_fn=loss
            )
            return (optax.apply_updates(w, update), state), None

        zero = (jnp.zeros((x.shape[-1], classes), x.dtype), jnp.zeros(classes, x.dtype))
        (w, _), _ = jax.lax.scan(step, (zero, optimizer.init(zero)), length=steps)
        return w

    def task(labels: Array) -> tuple[Array, ...]:
        ys = [labels[part].reshape(-1) for part in parts]
        fits = jax.vmap(lambda penalty: fit(ys, penalty))(grid)
        best = jnp.argmin(jax.vmap(lambda w: entropy(w, ys, 1))(fits))
        w = (fits[0][best], fits[1][best])
        right = jnp.stack([jnp.mean(logits(w, p).argmax(-1) == ys[p]) for p in range(3)])
        weight = w[0] / std[:, None]
        bias = w[1] - jnp.matmul(mean, weight, precision="highest")
        return weight, bias, grid[best], right, jnp.stack([entropy(w, ys, p) for p in range(3)])

    return jax.lax.map(task, labels)


def standardise(rows: list[Array]) -> tuple[list[Array], Array, Array]:
    """All parts with the mean and standard deviation of the first."""
    mean, std = rows[0].mean(0), rows[0].std(0)
    # a column that only rounding errors move must not be blown up into a feature
    eps = jnp.finfo(std.dtype).eps
    floor = 10 * eps * jnp.maximum(jnp.abs(mean), std.max())
    std = jnp.where(std > floor, std, jnp.inf)
    return [(r - mean) / std for r in rows], mean, std


def _grid(dtype: Any) -> Array:
    """Penalties from what rounding allows to ten times the variance of a feature."""
    low = float(np.log10(jnp.finfo(dtype).eps)) * 0.75
    return jnp.logspace(low, 1, 8, dtype=dtype)


def _rows(array: Any, name: str) -> Array:
    """`[batch, sample, feature]`, in floating point."""
    array = jnp.asarray(array)
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}, must be [batch, ..., {name[:-1]}]")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.zeros(0).dtype)
    if not bool(jnp.isfinite(array).all()):
        raise ValueError(f"{name} holds NaN or infinite values, must be finite")
    return array.reshape(len(array), -1, array.shape[-1])
