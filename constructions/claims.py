"""Claims as plain data, and the evidence that decides them; `probes.ledger` does the deciding.

A `Claim` is about trained models of one construction. A `Measurement` is a number of ours, from
theory or a fit of its own, beside a published one or the bounds that a statement sets. A `Remark`
is a number that nothing decides.

What a claim needs of a model and of its settings is asked before anything is measured. A need is a
function of the `Evidence` that returns one phrase naming what is missing, else "". A claim on a
model that lacks something is not applicable to it, which is no verdict on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike

from constructions.core.transformer import Transformer
from synthetic.compilation import compile_once
from synthetic.tasks.task import Batch


def _many(construction: Any, model: Any, *inputs: ArrayLike) -> bool:
    """Whether running takes longer than compiling well."""
    return not inputs or np.ndim(inputs[0]) == 0 or np.shape(inputs[0])[0] > 256


@compile_once(static_argnums=0, often=_many)
def _apply(construction: Any, model: Any, *inputs: ArrayLike) -> Array:
    return construction.apply(model, *inputs)


@compile_once(static_argnums=0)
def mean_loss(construction: Any, prediction: Array, batch: Batch) -> Array:
    """Mean loss of predictions on a batch of the construction's task, jitted."""
    return construction.task.loss(prediction, batch).mean()


def is_function(model: Any) -> bool:
    """Whether a model is a black box: a function from inputs to predictions."""
    return callable(model) and not isinstance(model, nnx.Module)


def predict(construction: Any, model: Any, *inputs: ArrayLike) -> Array:
    """`construction.apply`, jitted: one compilation for all models of a shape.

    A function in the place of a model is called as it is.
    """
    if is_function(model):
        return jnp.asarray(model(*inputs))
    return _apply(construction, model, *inputs)


@dataclass(frozen=True, eq=False)
class NearMiss:
    """A model that is almost a construction, and the construction that it is almost.

    Raises:
        ValueError: one of the two is the other, or a compiled construction is in the place of its
            model.
    """

    model: Any
    construction: Any

    def __post_init__(self) -> None:
        base, kind = self.construction, type(self.model).__name__
        if callable(getattr(self.model, "trace", None)) or hasattr(self.model, "certificate"):
            raise ValueError(
                f"model is a {kind}, must be a transformer, such as construction.compile().model"
            )
        if not all(callable(getattr(base, name, None)) for name in ("trace", "apply")):
            kind = type(base).__name__
            raise ValueError(f"construction is a {kind}, must be a Construction")

    def __iter__(self) -> Iterator[Any]:
        """Model and construction, so that both can be unpacked."""
        return iter((self.model, self.construction))


@dataclass(frozen=True)
class Claim:
    """A statement about a model that a number decides.

    Attributes:
        name: short and unique within a family.
        statement: one sentence.
        statistic: a name in `probes.statistics.STATISTICS`, or a function of the `Evidence`.
        threshold, direction: the claim holds if the statistic is "<=" or ">=" the threshold.
        source: paper, figure or equation.
        catches: near-misses (names in `Construction.near_misses`) on which the claim must fail.
        published: the paper's value, None where it gives none.
        gauge: what the statistic does under the symmetries of the weights.
        note: what a reader of the published value should know.
        needs: what the statistic assumes of a model and of the settings, besides what a statistic
            of `STATISTICS` assumes anyway: functions that name what is missing in one phrase, ""
            for nothing. See `constructions.claims`.

    Raises:
        ValueError: one of these is something else, named.
    """

    name: str
    statement: str
    statistic: str | Callable[[Evidence], float]
    threshold: float
    direction: str
    source: str
    catches: Sequence[str] = ()
    published: float | str | None = None
    gauge: str = "invariant: a function of the model's outputs"
    note: str = ""
    needs: tuple[Callable[[Evidence], str], ...] = ()

    def _repr_html_(self) -> str:
        from synthetic.display import Table, Text, shown

        rows = [("holds if", f"{self.direction} {self.threshold:.4g}"), ("source", self.source)]
        rows += [("published", self.published)] if self.published is not None else []
        rows += [("must reject", ", ".join(("random init", *self.catches)))]
        return shown(self.name, Text(self.statement), Table((), rows), Text(self.note))

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name of a claim is {self.name!r}, must be a string of some letters")
        who = f"claim {self.name!r}"
        if self.direction not in ("<=", ">="):
            raise ValueError(f"{who}: direction is {self.direction!r}, must be '<=' or '>='")
        if not (callable(self.statistic) or isinstance(self.statistic, str)):
            raise ValueError(
                f"{who}: statistic is {self.statistic!r}, must be a name or a function of Evidence"
            )
        number = isinstance(self.threshold, int | float | np.number)
        if not number or isinstance(self.threshold, bool) or not np.isfinite(self.threshold):
            raise ValueError(f"{who}: threshold is {self.threshold!r}, must be a finite number")
        catches = self.catches
        listed = isinstance(catches, tuple | list)
        if not listed or not all(isinstance(name, str) for name in catches):
            raise ValueError(
                f"{who}: catches is {catches!r}, must be a tuple of names of near-misses, such as "
                "('no momentum',)"
            )
        object.__setattr__(self, "catches", tuple(catches))

    def holds(self, value: float) -> bool:
        """Whether a value of the statistic satisfies the claim; NaN does not."""
        return bool(value <= self.threshold if self.direction == "<=" else value >= self.threshold)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a claim's statistic is computed from.

    Attributes:
        construction: whose claim it is.
        model: the subject: a trained counterpart, a near-miss, a random model, the construction;
            or a function from inputs to predictions.
        reference: the compiled construction.
        examples: drawn from the task, the same for every subject: comparisons are paired.
        key: source of any further inputs.
        memo: what several subjects with the same reference and examples need once; see `once`.
    """

    construction: Any
    model: Any
    reference: Transformer
    examples: Batch
    key: Array
    memo: dict[tuple[str, int], tuple[Batch, Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(jax.tree.leaves(self.examples)[0])

    @cached_property
    def prediction(self) -> Array:
        """What the model predicts on the examples."""
        return self.apply(*self.examples.inputs)

    def apply(self, *inputs: Array) -> Array:
        """What the model predicts on other inputs."""
        return predict(self.construction, self.model, *inputs)

    @property
    def expected(self) -> Array:
        """What the compiled construction predicts on the examples."""
        inputs = self.examples.inputs
        return self.once("expected", lambda: predict(self.construction, self.reference, *inputs))

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, which must depend on the reference and the examples alone, computed once."""
        # kept with the examples, so that their id stays theirs
        key = (name, id(self.examples))
        if key not in self.memo:
            self.memo[key] = (self.examples, compute())
        return self.memo[key][1]

    def loss(self, prediction: Array) -> float:
        """Mean loss of predictions on the examples."""
        return float(mean_loss(self.construction, prediction, self.examples))


#: A mask that differs may change the canonical tensor by so much of itself: rounding in float32.
ROUNDING = 1e-5


@compile_once(static_argnums=0)
def weight_distance(construction: Any, model: Transformer, reference: Transformer) -> Array:
    """`canonical_distance` under the construction's gauge, jitted."""
    from constructions.core.canonical import canonical_distance  # where weights are compared only

    return canonical_distance(model, reference, construction.gauge())


def known_weights(e: Evidence) -> str:
    """The model is no black box."""
    return "the model is a function, whose weights are not known" if is_function(e.model) else ""


def same_width(e: Evidence) -> str:
    """A stream as wide as the construction's."""
    if missing := known_weights(e):
        return missing
    ours, theirs = e.model.config.width, e.reference.config.width
    return "" if ours == theirs else f"width of the model is {ours}, of the construction {theirs}"


def linear_attention(e: Evidence) -> str:
    """Linear attention alone, in the sizes of the construction."""
    from constructions.core.canonical import obstacle, unlike

    if missing := known_weights(e):
        return missing
    for model, whose in ((e.model, "the model"), (e.reference, "the construction")):
        if found := obstacle(model.config):
            return f"{whose} is more than linear attention: {found}"
    return unlike(e.model.config, e.reference.config)


def comparable_weights(e: Evidence) -> str:
    """Weights between which `canonical_distance` is one: linear attention through equal windows."""
    if missing := linear_attention(e):
        return missing
    pair = zip(masks(e.model), masks(e.reference), strict=True)
    for number, rows in enumerate(pair, start=1):
        ours, theirs = ([*dict.fromkeys(tuple(r[:2].tolist()) for r in own)] for own in rows)
        if ours and theirs and ours != theirs:
            return (
                f"layer {number} looks through the windows {ours}, the construction's through "
                f"{theirs}"
            )
    return ""


def masks_alike(e: Evidence) -> str:
    """Comparable weights, behind the construction's masks or masks that differ without effect."""
    if missing := comparable_weights(e):
        return missing
    ours, theirs = masks(e.model), masks(e.reference)
    if any(len(own) > 1 for own in theirs):
        return "the construction has heads with different masks in a layer"
    if all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        return ""
    if _plan(e.model) != _plan(e.reference):
        return "its heads see other tokens than the construction's"
    moved = with_masks_of(e.model, e.reference)
    change = float(weight_distance(e.construction, moved, e.model))
    if change <= ROUNDING:
        return ""
    return (
        "its heads see other tokens than the construction's, and what they see there counts: "
        f"{change:.2g} of the canonical tensor"
    )


@compile_once
def _wiring(model: Transformer) -> Array:
    from constructions.core.canonical import head_products

    return head_products(model).wiring


def masks(model: Transformer) -> list[np.ndarray]:
    """The different masks of every layer's heads, `[mask, entry]`; see `HeadProducts.wiring`."""
    wiring = np.asarray(_wiring(model))
    heads = [sum(group.heads for group in layer.heads) for layer in model.config.layers()]
    return [np.unique(own[:n], axis=0) for own, n in zip(wiring, heads, strict=True)]


def one_mask(reference: Transformer, model: Transformer) -> bool:
    """Whether `with_masks_of` can give a model the masks of a reference."""
    return _plan(model) == _plan(reference) and all(len(own) == 1 for own in masks(reference))


def with_masks_of(model: Transformer, reference: Transformer) -> Transformer:
    """The model with the masks of a reference that has one mask a layer and the same segments.

    The same function if `masks_alike` says so. ValueError for another reference.
    """
    theirs = masks(reference)
    if not one_mask(reference, model):
        raise ValueError("the reference must have one mask a layer, and the model's segments")
    arrays, layer, kinds = model.arrays(), 0, len(model.config.token_groups)
    names = ("window", "query_groups", "key_groups", "sink_groups")
    for s, segment in enumerate(model.config.segments):
        pattern = len(segment.pattern)
        for p in range(pattern):
            rows = np.stack([theirs[layer + p + r * pattern][0] for r in range(segment.stacked)])
            for w in arrays["segments"][s]["layers"][p]["heads"].values():
                every = np.repeat(rows[:, None], w["scale"].shape[1], axis=1)
                parts = np.split(every, [2, 2 + kinds, 2 + 2 * kinds], axis=-1)
                for name, part in zip(names, parts, strict=True):
                    w[name] = jax.device_put(part.astype(w[name].dtype))
        layer += segment.repeats * pattern
    return Transformer(model.config, arrays)


def _plan(model: Transformer) -> list[tuple[int, bool, int]]:
    return [(s.repeats, s.tied, len(s.pattern)) for s in model.config.segments]
