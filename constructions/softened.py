"""A construction whose linear heads are made of softmax heads, with the error that this costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.certificate import DTYPES, check_settings
from constructions.core.compile import compile_program
from constructions.core.program import Program
from constructions.core.softmax import NULL, soften
from constructions.core.transformer import Transformer
from constructions.family import Compiled, Construction, Place, Tokens
from synthetic.tasks.task import Task


@dataclass(frozen=True)
class Softened(Construction):
    """`construction`, run by softmax heads and a null token; `verify` gives the certificate.

    The error of a layer, relative to what it computes, is about

        (eps S)^2 / 6  +  2 T e^-c  +  r / eps,

    with S the largest score and T the largest number of keys on the task: the odd remainder of
    the exponential, what the other keys add to the normaliser, and rounding. Scores are rounded
    beside c, so that r is the spacing of floats there, at least 16 times their precision. The
    tolerance of the certificate is the sum over the layers, times the ratio R of the largest entry
    to the root mean square, since a certificate sets the largest error against the latter. S, T
    and R are measured on inputs of the task, S and T on the linear construction and R on the
    algorithm.

    The sum is least where its derivative eps S^2 / 3 - r / eps^2 is 0, at eps = (3 r / S^2)^(1/3):
    about 2e-5 in float64 and 0.02 in float32 for S = 1. It depends on the dtype, and `compile`
    takes the one of its own.

    Attributes:
        construction: its program has linear heads only.
        scale: eps of `constructions.core.softmax.soften`; None for the best one in each dtype.
        null_score: c of the same.
    """

    construction: Construction
    scale: float | int | None = None
    null_score: float | int = 25.0

    def __post_init__(self) -> None:
        # refuses what cannot be softened
        self._soft(1.0 if self.scale is None else self.scale)

    def _soft(self, scale: float | int) -> Program:
        return soften(self.construction.program, scale=scale, null_score=self.null_score)

    @property
    def program(self) -> Program:
        """The construction's program with softmax heads, at the scale of JAX's default dtype."""
        return self._soft(self.scale_in(jnp.result_type(float)))

    def compile(self, dtype: Any = None) -> Compiled:
        """Compile the program at the scale of this dtype."""
        check_settings(self)
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        return Compiled(compile_program(self._soft(self.scale_in(dtype)), dtype), self)

    def scale_in(self, dtype: Any) -> float:
        """eps in a dtype: `scale`, or the best one, at most 1."""
        if self.scale is not None:
            return float(self.scale)
        score, _, _ = self.largest
        return min(1.0, (3 * self._spacing(dtype) / score**2) ** (1 / 3)) if score else 1.0

    def _spacing(self, dtype: Any) -> float:
        """r: the distance between neighbouring floats at c, at least 16 times the precision."""
        kind = np.dtype(dtype)
        return max(16 * float(np.finfo(kind).eps), float(np.spacing(kind.type(self.null_score))))

    @property
    def unplaced(self) -> tuple[str, ...]:
        """Values of the algorithm that the construction keeps nowhere."""
        return self.construction.unplaced

    @property
    def task(self) -> Task:
        """The construction's task."""
        return self.construction.task

    def trace(self, *inputs: Array) -> dict[str, Array]:
        """The construction's algorithm."""
        return self.construction.trace(*inputs)

    def embed(self, *inputs: Array) -> list[Tokens]:
        """The construction's tokens, then the null token."""
        return [*self.construction.embed(*inputs), Tokens(NULL, {NULL: 1.0})]

    def places(self, depth: int, *inputs: Array) -> dict[str, Place]:
        """Where the construction keeps them."""
        return self.construction.places(depth, *inputs)

    def context_size(self, *inputs: Any) -> int:
        """Examples of the construction that can be left out."""
        return self.construction.context_size(*inputs)

    def subset(self, kept: Sequence[int] | np.ndarray, *inputs: Any) -> tuple[Any, ...]:
        """The inputs with some of the examples only, as for the construction."""
        return self.construction.subset(kept, *inputs)

    def outside_context(
        self, prediction: Any, kept: Sequence[int] | np.ndarray, *inputs: Any
    ) -> Any:
        """The part of a prediction outside the context, as for the construction."""
        return self.construction.outside_context(prediction, kept, *inputs)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Inputs of the construction."""
        return self.construction.arguments

    def check(self, *inputs: Any) -> None:
        """The construction's checks."""
        self.construction.check(*inputs)

    def domain(self, *inputs: Array) -> dict[str, float | str]:
        """The construction's domain, and the scores and keys that the bound is made for."""
        score, keys, _ = self.largest
        scales = ", ".join(f"{self.scale_in(d):.2g} in {d}" for d in DTYPES)
        return self.construction.domain(*inputs) | {
            "scale": scales,
            "largest score on the task": score,
            "largest number of keys on the task": float(keys),
        }

    @cached_property
    def largest(self) -> tuple[float, int, float]:
        """S, T and R of the class, on 256 inputs of the task."""
        model = self.construction.reference
        inputs = self.construction.sample(jax.random.key(1), 256)

        @jax.jit
        def measure(model: Transformer, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
            stream, groups, _ = self.construction.stream(model, *inputs)
            scores = model.run(stream, groups, sites=("attention",))[1]["attention"]
            named = self.construction.trace(*inputs).values()
            ratios = [jnp.abs(v).max() / jnp.sqrt(jnp.square(v).mean()) for v in named]
            return jnp.abs(scores).max(), (scores != 0).sum(-1).max(), jnp.stack(ratios).max()

        score, keys, ratio = measure(model, inputs)
        return float(score), int(keys), float(ratio)

    def _parts(self, dtype: str) -> tuple[float, float, float]:
        """The three errors of a layer."""
        score, keys, _ = self.largest
        scale = self.scale_in(dtype)
        if math.exp(self.null_score) / (2 * scale) > float(np.finfo(dtype).max):
            return 0.0, 0.0, math.inf  # a weight that the dtype does not hold
        others = 2 * keys * math.exp(-self.null_score)
        return (scale * score) ** 2 / 6, others, self._spacing(dtype) / scale

    def tolerance(self, dtype: str) -> float:
        """The bound of the class, for all layers."""
        return self.program.depth * self.largest[2] * sum(self._parts(dtype))

    def conditions(self, dtype: str) -> str:
        """The largest of the three errors, and what makes it so large."""
        curved, others, rounding = self._parts(dtype)
        if rounding == math.inf:
            weight = f"a weight is e^c / (2 eps) = {math.exp(self.null_score) / 2:.1g}"
            return f"{weight} / {self.scale_in(dtype):.1g}, beyond {dtype}"
        factor = self.program.depth * self.largest[2]
        best = replace(self, scale=None).scale_in(dtype)
        scale = f"scale {self.scale_in(dtype):.2g}, about {best:.2g} is best"
        reasons = {
            f"the cubic remainder of the exponential at {scale}": curved,
            f"keys beside the null token at null_score {self.null_score:g}": others,
            f"rounding at {scale}": rounding,
        }
        name = max(reasons, key=lambda n: reasons[n])
        return f"{factor * reasons[name]:.2g} of it is {name}"
