r"""How a model is optimised, as data: a `Recipe` and the optax objects that it stands for.

`square_root_scaled` changes the batch size of Adam and keeps the path of training, by the
square-root rule (Malladi et al. 2022, arXiv 2205.10287): with kappa times as many examples in a
batch,

    learning rate * sqrt(kappa),    1 - b_i times kappa,    eps / sqrt(kappa),    steps / kappa,

because a gradient that is mostly noise has a size of its own that falls as 1 / sqrt(kappa), and
Adam divides by that size. (Of gradient descent the linear rule is right.) Decoupled weight decay
takes sqrt(kappa) too, so that rate * decay * steps, by which it shrinks the weights, stays. It
misleads where the gradient is not mostly noise: there Adam's step does not depend on the batch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax import Array

OptimizerName = Literal["adam", "adamw", "sgd", "lion", "custom"]
ScheduleName = Literal["constant", "cosine", "linear"]

#: Fields in which fits may differ that share one compiled program; see `varied`.
NUMBERS = ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip")


def varied(given: Any, numbers: Mapping[str, Any]) -> Any:
    """A copy of a recipe, or of a task, with other numbers, which may be traced.

    Nothing is checked: a number that is traced has no value yet. Whoever calls has checked those
    that will be put in its place.
    """
    found = copy.copy(given)
    for name, value in numbers.items():
        object.__setattr__(found, name, value)
    return found


@dataclass(frozen=True)
class Recipe:
    """Settings of a stochastic fit. Step `t` counts from 0.

    The learning rate of step `t` is `learning_rate * min(1, (t + 1) / warmup) * d(s)` with
    `s = (t - warmup) / (steps - warmup)` clipped to [0, 1] and `d(s) = 1` (constant),
    `1 - s` (linear) or `(1 + cos(pi s)) / 2` (cosine).

    The averaged parameters follow `a <- a + w_t (theta_t - a)`: with `ema`,
    `w_t = (1 - ema) / (1 - ema^(t+1))` (the bias-corrected moving average); with `average_tail`,
    `w_t = 1 / (t + 1 - start)` from `start = steps - round(average_tail * steps)` on and 1 before
    (the plain mean of the last iterates).

    Attributes:
        steps: number of optimiser steps, at least 1.
        batch: examples in a step.
        optimizer: "adam", "adamw", "sgd" (momentum `b1`) or "lion"; "custom" records that an
            optax transformation was given to `fit` itself.
        learning_rate: peak learning rate.
        schedule: "constant", "linear" or "cosine".
        warmup: steps of linear warm-up.
        clip: bound on the global norm of the gradient, or None.
        weight_decay: decoupled decay, for "adamw" and "lion".
        b1, b2, eps: moments of the optimiser and Adam's denominator.
        ema: decay of the moving average of the parameters, in (0, 1), or None.
        average_tail: fraction of the steps whose iterates are averaged, in (0, 1], or None.
        chunk: steps in one jitted call; the host sees one record per chunk. A chunk is never
            longer than `checkpoint_every`.
        checkpoint_every: a checkpoint is written at least this often, in steps.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    steps: int = 1000
    batch: int = 2048
    optimizer: OptimizerName = "adam"
    learning_rate: float = 1e-3
    schedule: ScheduleName = "constant"
    warmup: int = 0
    clip: float | None = None
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    ema: float | None = None
    average_tail: float | None = None
    chunk: int = 100
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "chunk", "checkpoint_every"):
            _need(self, field, _is_int(getattr(self, field)), "an integer of at least 1", low=1)
        _need(self, "warmup", _is_int(self.warmup), "an integer of at least 0", low=0)
        for field, names in (("optimizer", OptimizerName), ("schedule", ScheduleName)):
            allowed = typing.get_args(names)
            _need(self, field, getattr(self, field) in allowed, f"one of {', '.join(allowed)}")
        rate = self.learning_rate
        _need(self, "learning_rate", _is_number(rate) and rate > 0, "a finite number above 0")
        _need(self, "clip", self.clip is None or _above_zero(self.clip), "None or above 0")
        for field in ("b1", "b2"):
            value = getattr(self, field)
            _need(self, field, _is_number(value) and 0 <= value < 1, "in [0, 1)")
        _need(self, "eps", _is_number(self.eps) and self.eps >= 0, "at least 0")
        decays = self.optimizer in ("adamw", "lion")
        _need(
            self,
            "weight_decay",
            self.weight_decay == 0 or (decays and _above_zero(self.weight_decay)),
            "0, or above 0 with optimizer adamw or lion",
        )
        ema, tail = self.ema, self.average_tail
        _need(self, "ema", ema is None or (_above_zero(ema) and ema < 1), "None or in (0, 1)")
        _need(
            self,
            "average_tail",
            tail is None or (_above_zero(tail) and tail <= 1 and ema is None),
            "None or in (0, 1], and None where ema is set",
        )

    @property
    def averages(self) -> bool:
        """Whether the fit keeps averaged parameters."""
        return self.ema is not None or self.average_tail is not None

    def rate(self, step: int | Array) -> Array:
        """Learning rate of step `step`, a scalar."""
        step = jnp.asarray(step)
        ramp = jnp.minimum(1.0, (step + 1) / max(self.warmup, 1))
        s = jnp.clip((step - self.warmup) / max(self.steps - self.warmup, 1), 0.0, 1.0)
        decay = {
            "constant": jnp.ones_like(s),
            "linear": 1 - s,
            "cosine": (1 + jnp.cos(math.pi * s)) / 2,
        }[self.schedule]
        return self.learning_rate * ramp * decay

    def average_weight(self, step: Array) -> Array:
        """Weight `w_t` of the iterate that step `step` produced in the averaged parameters."""
        if self.ema is not None:
            # expm1 keeps the first weights right in float32, where 1 - ema^t cancels.
            return (self.ema - 1) / jnp.expm1((step + 1) * math.log(self.ema))
        if self.average_tail is None:
            return jnp.ones(())
        start = self.steps - max(round(self.average_tail * self.steps), 1)
        return 1 / jnp.maximum(step + 1 - start, 1)

    def transformation(self) -> optax.GradientTransformation:
        """The optax chain: clipping, then the optimiser with its schedule."""
        # A constant rate stays a Python number: optax then keeps no counter in its state.
        plain = self.schedule == "constant" and self.warmup == 0
        rate: Any = self.learning_rate if plain else self.rate
        makers: dict[str, Callable[[], optax.GradientTransformation]] = {
            "adam": lambda: optax.adam(rate, self.b1, self.b2, self.eps),
            "adamw": lambda: optax.adamw(
                rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay
            ),
            "sgd": lambda: optax.sgd(rate, momentum=self.b1 or None),
            "lion": lambda: optax.lion(rate, self.b1, self.b2, weight_decay=self.weight_decay),
        }
        if self.optimizer not in makers:
            raise ValueError(
                "optimizer='custom' stands for an optax transformation: give it to fit(optimizer=)"
            )
        optimizer = makers[self.optimizer]()
        if self.clip is None:
            return optimizer
        return optax.chain(optax.clip_by_global_norm(self.clip), optimizer)

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict that `json` can write; `Recipe.from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Recipe:
        """A recipe from `to_json`'s dict; ValueError names an unknown field."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"{name}: no field of a recipe; the fields are {', '.join(known)}")
        return cls(**fields)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _above_zero(value: Any) -> bool:
    return _is_number(value) and value > 0


def _need(recipe: Recipe, field: str, ok: bool, allowed: str, low: int | None = None) -> None:
    value = getattr(recipe, field)
    if not ok or (low is not None and value < low):
        raise ValueError(f"{field}={value!r}: must be {allowed}")


def square_root_scaled(recipe: Recipe, kappa: float | int) -> Recipe:
    """The recipe with kappa times its batch, by the square-root rule.

    What is counted in steps (steps, warm-up, chunks, the memory of `ema`) is counted in examples
    from then on: there are kappa times fewer. Rounded, to at least 1 where it was.

    Args:
        recipe: of "adam" or "adamw".
        kappa: above 0; such that the batch is a whole number.

    Raises:
        ValueError: another optimiser, a kappa that is not allowed, or one so large that
            kappa (1 - b) >= 1 for one of b1, b2 and `ema`.
    """
    if recipe.optimizer not in ("adam", "adamw"):
        raise ValueError(f"optimizer is {recipe.optimizer!r}, must be 'adam' or 'adamw'")
    if not (math.isfinite(kappa) and kappa > 0):
        raise ValueError(f"kappa is {kappa}, must be finite and above 0")
    batch = round(kappa * recipe.batch)
    if batch < 1 or not math.isclose(batch, kappa * recipe.batch, rel_tol=1e-9):
        many = kappa * recipe.batch
        raise ValueError(f"kappa is {kappa}: {many:g} examples in a batch, must be a whole number")

    def memory(name: str, decay: float) -> float:
        after = kappa * (1 - decay)
        if after > 1 - 1e-9:  # 10 (1 - 0.9) is 1
            raise ValueError(
                f"kappa is {kappa}, must be below {1 / (1 - decay):.4g} with {name}={decay}"
            )
        return 1 - after

    def counted(steps: int) -> int:
        return max(round(steps / kappa), min(steps, 1))

    return replace(
        recipe,
        batch=batch,
        learning_rate=recipe.learning_rate * math.sqrt(kappa),
        b1=memory("b1", recipe.b1),
        b2=memory("b2", recipe.b2),
        eps=recipe.eps / math.sqrt(kappa),
        weight_decay=recipe.weight_decay * math.sqrt(kappa),
        steps=counted(recipe.steps),
        warmup=counted(recipe.warmup),
        chunk=counted(recipe.chunk),
        checkpoint_every=counted(recipe.checkpoint_every),
        ema=None if recipe.ema is None else memory("ema", recipe.ema),
    )
