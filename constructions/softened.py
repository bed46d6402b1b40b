"""A construction whose linear heads are made of softmax heads, with the error that this costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from constructions.family import Construction, Embedded, Place
from constructions.program import Program
from constructions.soften import soften, with_null
from constructions.transformer import Transformer
from synthetic.task import Task


@dataclass(frozen=True)
class Softened(Construction):
    """`construction`, run by softmax heads and a null token; `verify` gives the certificate.

    The error of a layer, relative to what it computes, is about

        (eps S)^2 / 6  +  2 T e^-c  +  16 precision / eps

    with S the largest score and T the largest number of keys on the task: the odd remainder of
    the exponential, what the other keys add to the normaliser, and rounding. The tolerance of the
    certificate is the sum over the layers, times the ratio R of the largest entry to the root mean
    square, since a certificate sets the largest error against the latter. S, T and R are measured
    on inputs of the task, S and T on the linear construction and R on the algorithm.

    Attributes:
        construction: its program has linear heads only.
        scale, null_score: eps and c of `constructions.compiler.soften`.
    """

    construction: Construction
    scale: float | int = 1e-4
    null_score: float | int = 25.0

    def __post_init__(self) -> None:
        _ = self.program  # refuses what cannot be softened

    @property
    def program(self) -> Program:
        """The construction's program with softmax heads."""
        return soften(self.construction.program, scale=self.scale, null_score=self.null_score)

    @property
    def task(self) -> Task:
        """The construction's task."""
        return self.construction.task

    def trace(self, *inputs: Array) -> dict[str, Array]:
        """The construction's algorithm."""
        return self.construction.trace(*inputs)

    def embed(self, model: Transformer, *inputs: Array) -> Embedded:
        """The construction's tokens, then the null token."""
        stream, groups, read = self.construction.embed(model, *inputs)
        return Embedded(*with_null(stream, groups, model.config), read)

    def places(self, depth: int, *inputs: Array) -> dict[str, Place]:
        """Where the construction keeps them."""
        return self.construction.places(depth, *inputs)

    def context_size(self, *inputs: Any) -> int:
        """The construction's."""
        return self.construction.context_size(*inputs)

    def subset(self, kept: Sequence[int] | np.ndarray, *inputs: Any) -> tuple[Any, ...]:
        """The construction's."""
        return self.construction.subset(kept, *inputs)

    def answers(self, prediction: Any, kept: Sequence[int] | np.ndarray, *inputs: Any) -> Any:
        """The construction's."""
        return self.construction.answers(prediction, kept, *inputs)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The construction's."""
        return self.construction.arguments

    def check(self, *inputs: Any) -> None:
        """The construction's checks."""
        self.construction.check(*inputs)

    def domain(self, *inputs: Array) -> dict[str, float | str]:
        """The construction's domain, and the scores and keys that the bound is made for."""
        score, keys, _ = self.largest
        return self.construction.domain(*inputs) | {
            "largest score on the task": score,
            "largest number of keys on the task": float(keys),
        }

    @cached_property
    def largest(self) -> tuple[float, int, float]:
        """S, T and R of the class, on 256 inputs of the task."""
        model = self.construction.compile().model
        inputs = self.construction.sample(jax.random.key(1), 256)

        @jax.jit
        def measure(model: Transformer, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
            stream, groups, _ = self.construction.embed(model, *inputs)
            scores = model.run(stream, groups, sites=("attention",))[1]["attention"]
            named = self.construction.trace(*inputs).values()
            ratios = [jnp.abs(v).max() / jnp.sqrt(jnp.square(v).mean()) for v in named]
            return jnp.abs(scores).max(), (scores != 0).sum(-1).max(), jnp.stack(ratios).max()

        score, keys, ratio = measure(model, inputs)
        return float(score), int(keys), float(ratio)

    def tolerance(self, dtype: str) -> float:
        """The bound of the class, for all layers."""
        score, keys, ratio = self.largest
        rounding = 16 * float(np.finfo(dtype).eps) / self.scale
        layer = (self.scale * score) ** 2 / 6 + 2 * keys * math.exp(-self.null_score) + rounding
        return self.program.depth * ratio * layer
