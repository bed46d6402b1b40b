"""Claims as plain data, and the evidence that decides them; `probes.ledger` does the deciding.

A `Claim` is about trained models of one construction. A `Measurement` is a published number that
theory or a fit of its own reproduces, beside ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike

from constructions.transformer import Transformer
from synthetic.task import Batch


@partial(jax.jit, static_argnums=0)
def _apply(construction: Any, model: Any, *inputs: ArrayLike) -> Array:
    return construction.apply(model, *inputs)


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
        statistic: a name in `probes.ledger.STATISTICS`, or a function of the `Evidence`.
        threshold, direction: the claim holds if the statistic is "<=" or ">=" the threshold.
        source: paper, figure or equation.
        catches: near-misses (names in `Construction.near_misses`) on which the claim must fail.
        published: the paper's value, None where it gives none.
        gauge: what the statistic does under the symmetries of the weights.
        note: what a reader of the published value should know.
        needs: what the statistic assumes of a model and of the settings, besides what a statistic
            of `STATISTICS` assumes anyway: functions that say in one phrase what is missing, "" for
            nothing. See `constructions.needs`.

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
        return float(self.construction.task.loss(prediction, self.examples).mean())


@dataclass(frozen=True)
class Measurement:
    """A published number beside ours, on a task of its own.

    Attributes:
        name: short and unique within a family.
        statement: what the number is, one sentence.
        source: paper, figure or table.
        published: the paper's value, None where it gives none.
        measured: ours.
        error: one standard error of `measured`, 0 where it is exact.
        tolerance: relative; how far from the published value still counts as reproduced.
        better: "<=" where a lower value than the published one is as good (a loss), else "".
        note: where paper and code differ, which was used; what a reader should know.
    """

    name: str
    statement: str
    source: str
    published: float | None
    measured: float
    error: float = 0.0
    tolerance: float = 0.03
    better: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.better not in ("", "<="):
            raise ValueError(f"better is {self.better!r}, must be '' or '<='")

    @property
    def verdict(self) -> str:
        """ "reproduced", "better", "differs", or "measured" where nothing was published.

        Two standard errors are granted on top of the tolerance.
        """
        if self.published is None:
            return "measured"
        slack = self.tolerance * abs(self.published) + 2 * self.error
        if abs(self.measured - self.published) <= slack:
            return "reproduced"
        return "better" if self.better and self.measured < self.published else "differs"

    def to_json(self) -> dict[str, Any]:
        """As plain data, with the verdict."""
        return asdict(self) | {"verdict": self.verdict}
