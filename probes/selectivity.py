"""Does a unit answer to one class alone, and does it matter whether it does?

The class selectivity index of a unit (Leavitt and Morcos 2020, arXiv 2003.01262), with mu_c its
mean activation over the examples of class c, is

    SI  =  (mu_max - mu_rest) / (mu_max + mu_rest + eps),

mu_max the largest of them and mu_rest the mean of the others: 0 for a unit that answers to all
classes alike, 1 for one that answers to a single class. It is for activations that are never
negative, those behind a ReLU. The largest of several noisy means exceeds the rest by chance, all
the more where a class has few examples; so the index stands beside that of labels exchanged between
the same examples, which keeps the sizes of the classes.

It sees single units: a class that is written in a direction across many of them is not found. And
to find a selective unit is not to find that the model needs it; `SelectiveTask` asks that, by a fit
that makes units selective, or keeps them from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from constructions.core.transformer import Transformer
from constructions.family import Construction
from constructions.imported import random_model
from constructions.runs import Run
from probes.probe import NotApplicable, Probe, Result, seed_names, table
from synthetic.tasks.masked_language import MaskedLanguageTask
from synthetic.tasks.task import Batch, Task, outcome

EPS = 1e-7
#: Sentences, or sets of examples, that the probe looks at.
SENTENCES = 512


def class_means(
    activations: Float[Array, "example unit"], classes: Int[Array, " example"], count: int
) -> tuple[Float[Array, "class unit"], Float[Array, " class"]]:
    """mu_c of every unit, and how many examples each class has; examples of class -1 are left out.

    Classes without examples have mean 0.
    """
    kind = jax.nn.one_hot(classes, count, dtype=activations.dtype)
    sizes = kind.sum(0)
    sums = jnp.einsum("ec,eu->cu", kind, activations, precision="highest")
    return sums / jnp.maximum(sizes, 1)[:, None], sizes


def selectivity_index(
    means: Float[Array, "class unit"], there: Any = None
) -> Float[Array, " unit"]:
    """SI of every unit, the module's equation; differentiable. Units that are always 0 have 0.

    Args:
        means: of `class_means`, none negative.
        there: `[class]` bool, the classes that count; at least two. None: all.
    """
    there = jnp.ones(len(means), bool) if there is None else jnp.asarray(there)
    highest = jnp.where(there[:, None], means, -jnp.inf).max(0)
    total = jnp.where(there[:, None], means, 0).sum(0)
    rest = (total - highest) / jnp.maximum(there.sum() - 1, 1)
    return (highest - rest) / (highest + rest + EPS)


@dataclass(frozen=True, eq=False)
class Selectivity:
    """The index of every unit beside what exchanged labels give.

    Attributes:
        index: `[unit]`.
        null: `[shuffle, unit]`, the same for labels exchanged at random.
        preferred: `[unit]`, the class with the largest mean.
        dead: `[unit]` bool, units that are 0 at all examples; they are in no average.
        sizes: `[class]`, examples of the classes that were used, 0 for the others.
    """

    index: np.ndarray
    null: np.ndarray
    preferred: np.ndarray
    dead: np.ndarray
    sizes: np.ndarray

    @property
    def mean(self) -> float:
        """Mean index of the units that are not dead; NaN where all are."""
        return float(self.index[~self.dead].mean()) if not self.dead.all() else float("nan")

    @property
    def chance(self) -> float:
        """The same of exchanged labels."""
        return float(self.null[:, ~self.dead].mean()) if not self.dead.all() else float("nan")

    @property
    def above(self) -> float:
        """Share of the units whose index is above every shuffle's; 1 / (1 + shuffles) by chance."""
        found = (self.index > self.null.max(0))[~self.dead]
        return float(found.mean()) if len(found) else float("nan")


def selectivity(
    activations: Any, classes: Any, key: Array, *, shuffles: int = 19, fewest: int = 20
) -> Selectivity:
    """The index of every unit, and its null.

    Args:
        activations: `[example, unit]`, not negative.
        classes: `[example]` integers from 0; examples of class -1 are left out.
        key: of the shuffles.
        shuffles: how often labels are exchanged.
        fewest: classes with fewer examples are left out, since their means are mostly noise.

    Raises:
        ValueError: shapes that do not fit, a negative activation, fewer than two classes.
    """
    activations, classes = np.asarray(activations), np.asarray(classes)
    if activations.ndim != 2 or classes.shape != activations.shape[:1]:
        raise ValueError(
            f"activations has shape {activations.shape} and classes {classes.shape}, must be "
            "[example, unit] and [example]"
        )
    if activations.size and activations.min() < 0:
        raise ValueError(
            f"activations are down to {activations.min():.3g}, must not be negative: the index is "
            "for units behind a ReLU"
        )
    sizes = np.bincount(classes[classes >= 0]) if (classes >= 0).any() else np.zeros(1, int)
    there = sizes >= max(fewest, 1)
    if there.sum() < 2:
        raise ValueError(f"{there.sum()} classes have {fewest} examples, must be at least 2")
    used = (classes >= 0) & there[np.maximum(classes, 0)]
    given, labels = jnp.asarray(activations[used]), jnp.asarray(classes[used])
    index, preferred, null = _with_null(given, labels, jnp.asarray(there), key, shuffles)
    dead = ~(activations[used] > 0).any(0)
    return Selectivity(
        np.asarray(index), np.asarray(null), np.asarray(preferred), dead, np.where(there, sizes, 0)
    )


def _with_null(
    activations: Array, classes: Array, there: Array, key: Array, shuffles: int
) -> tuple[Array, Array, Array]:
    count = len(there)

    @jax.jit
    def run(activations: Array, classes: Array, key: Array) -> tuple[Array, Array, Array]:
        def of(labels: Array) -> tuple[Array, Array]:
            means, _ = class_means(activations, labels, count)
            best = jnp.where(there[:, None], means, -jnp.inf).argmax(0)
            return selectivity_index(means, there), best

        index, preferred = of(classes)
        # one shuffle at a time: activations may be large
        null = jax.lax.map(
            lambda k: of(jax.random.permutation(k, classes))[0], jax.random.split(key, shuffles)
        )
        return index, preferred, null

    return run(activations, classes, key)


def no_units(model: Any) -> str:
    """Why a model has no units behind a plain ReLU, in one phrase; "" where all its MLPs do."""
    if not isinstance(model, Transformer):
        return f"model is a {type(model).__name__}, must be a Transformer"
    mlps = [layer.mlp for layer in model.config.layers() if layer.mlp is not None]
    if not mlps:
        return "the model has no MLP; class selectivity is of units behind a ReLU"
    for mlp in mlps:
        if mlp.activation != "relu" or mlp.gated:
            kind = f"gated {mlp.activation}" if mlp.gated else mlp.activation
            return (
                f"the model's MLPs are {kind}, whose units may be negative; class selectivity is "
                "of units behind a plain ReLU"
            )
    return ""


def with_units(construction: Construction) -> Callable[..., tuple[Array, Array]]:
    """`predict(model, *inputs)`: the prediction, and the units of every MLP at the tokens read.

    For `synthetic.fitting.train.fit` on a `SelectiveTask`, and for reading. Units are `[layer,
    batch, token, unit]`. The model is run twice.

    ValueError for a model whose units are not behind a ReLU.
    """

    def predict(model: Transformer, *inputs: Array) -> tuple[Array, Array]:
        if missing := no_units(model):
            raise ValueError(missing)
        stream, groups, read = construction.stream(model, *inputs)
        units = model.run(stream, groups, sites=("mlp_hidden",))[1]["mlp_hidden"]
        return construction.apply(model, *inputs), units[:, :, read]

    return predict


@dataclass(frozen=True)
class SelectiveTask:
    """A task with a term for selectivity, L - weight * mean SI over layers and units.

    Above 0 the weight makes units selective, below 0 it keeps them from it (Leavitt and Morcos
    2020, eq. 2). Predictions are those of `with_units`.

    Attributes:
        task: what L is of.
        classes: from a batch to the class of every token read, `[batch, token]`, -1 for none.
        count: how many classes there are.
        weight: alpha.
    """

    task: Task
    classes: Callable[[Batch], Array]
    count: int
    weight: float

    def sample(self, key: Array, batch: int) -> Batch:
        """As the task does."""
        return self.task.sample(key, batch)

    def loss(self, prediction: tuple[Array, Array], batch: Batch) -> Float[Array, " batch"]:
        """L of every example, less what the whole batch has of selectivity."""
        found, units = prediction
        classes = self.classes(batch).reshape(-1)

        def index(units: Array) -> Array:
            means, sizes = class_means(units.reshape(-1, units.shape[-1]), classes, self.count)
            return selectivity_index(means, sizes > 0).mean()

        return self.task.loss(found, batch) - self.weight * jax.vmap(index)(units).mean()


class Labelled(NamedTuple):
    """Inputs with a class for each token that a model reads out.

    Attributes:
        inputs: of the construction.
        classes: `[batch, token]`, -1 for none.
        what: the classes are of.
    """

    inputs: tuple[Array, ...]
    classes: Array
    what: str


def labelled(construction: Construction, key: Array, batch: int) -> Labelled:
    """Inputs of a construction's task with classes: tags of words, or labels that are asked for.

    ValueError, in one line, for tasks that have neither.
    """
    task = construction.task
    if isinstance(task, MaskedLanguageTask):
        drawn, hidden = task.draw(key, batch, jnp.asarray(1.0))
        return Labelled((drawn.tokens, drawn.lengths, hidden), drawn.tags, "tags of words")
    if missing := no_classes(task):
        raise ValueError(missing)
    drawn = task.sample(key, batch)
    return Labelled(drawn.inputs, drawn.target.reshape(batch, -1), "labels")


def no_classes(task: Any) -> str:
    """Why a task has no classes for what a model reads out, in one phrase; "" where it has."""
    if isinstance(task, MaskedLanguageTask):
        return ""
    if outcome(task) == "values":
        return (
            f"{type(task).__name__} is regression, which has no classes: 'selectivity' needs "
            "words or labels"
        )
    target = jax.eval_shape(lambda key: task.sample(key, 1), jax.random.key(0)).target
    if not (hasattr(target, "ndim") and jnp.issubdtype(target.dtype, jnp.integer)):
        return f"{type(task).__name__}: its target is no array of class labels"
    return ""


def measure(run: Run, seed: int) -> Result:
    """Class selectivity of the units of every MLP, beside exchanged labels and random weights."""
    given = labelled(run.construction, jax.random.key(seed), SENTENCES)
    predict = jax.jit(lambda model, *inputs: with_units(run.construction)(model, *inputs)[1])
    rows, values, sizes = [], [], np.zeros(0)
    models = [*run.models, random_model(run)]
    names = [*(f"trained, {name}" for name in seed_names(run)), "random weights"]
    for name, model in zip(names, models, strict=True):
        found = np.asarray(predict(model, *given.inputs))
        if found.shape[1:3] != given.classes.shape:
            raise NotApplicable(
                f"labels are {given.classes.shape}, must be one for each of the "
                f"{found.shape[1:3]} tokens that are read"
            )
        for layer, own in enumerate(found):
            result = selectivity(
                own.reshape(-1, own.shape[-1]),
                np.asarray(given.classes).reshape(-1),
                jax.random.key(seed + 1),
            )
            rows.append(f"{name}, layer {layer + 1}")
            gain = result.mean - result.chance
            values.append([result.mean, result.chance, gain, result.above, result.dead.mean()])
            sizes = result.sizes[result.sizes > 0]
    columns = ["mean index", "exchanged labels", "difference", "above all shuffles", "dead units"]
    note = (
        f"classes: {len(sizes)} {given.what}, of {sizes.min()} to {sizes.max()} examples; 0.05 of "
        "the units are above all 19 shuffles by chance"
    )
    return table("class selectivity of units", columns, rows, values, note)


def needs_units_and_classes(run: Run) -> str:
    """Units behind a plain ReLU, and a class for each token that is read."""
    lacking = (missing for model in run.models if (missing := no_units(model)))
    return next(lacking, "") or no_classes(run.construction.task)


SELECTIVITY = Probe(
    "selectivity",
    "do single ReLU units answer to one class? (`fit inside-outside --set activation=relu`)",
    "classes lie off the axes; classes are small or unequal, and the exchanged labels are not "
    "looked at",
    measure,
    needs_units_and_classes,
)
