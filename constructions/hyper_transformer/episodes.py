"""What the constructions on few-shot classification share: support, labels, queries in, logits out.

Tokens are the examples with labels, those without, one for each class, then the queries. A class
token begins with the code of its class, and attention writes the class's weights into it; a last
layer applies them to the queries,

    query features,  key weights,  value code,  from class tokens, written to the logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from constructions.core.transformer import Transformer, randomise
from constructions.core.weights import Part, or_nan
from constructions.family import Construction, Counterpart
from constructions.inputs import INTEGERS, Input
from synthetic.fitting.recipe import Recipe
from synthetic.tasks.classes import GaussianClasses, Labels, Queries, Support

GROUPS = ("labelled", "unlabelled", "class", "query")


class FewShot(Construction):
    """A construction whose inputs are support, labels and queries.

    The labels are those of the first examples of the support; the others have none.
    """

    dim: int
    classes: int
    shots: int
    queries: int
    unlabelled: int
    spread: float
    noise: float

    def _check_sizes(self) -> None:
        """ValueError for sizes that no episode has, or scales that are not finite."""
        self.whole("dim", "classes", "shots", "queries")
        self.finite("spread", "noise")
        _ = self.task  # which has checks of its own

    @property
    def task(self) -> GaussianClasses:
        """Gaussian classes around Gaussian means."""
        names = ("dim", "classes", "shots", "queries", "unlabelled", "spread", "noise")
        return GaussianClasses(**{name: getattr(self, name) for name in names})

    @property
    def arguments(self) -> tuple[Input, ...]:
        """Support `[batch, example, dim]`, labels of its first examples, queries.

        Labels are integers from 0 to classes - 1, `[batch, labelled]`, queries
        `[batch, query, dim]`. Predictions are the logits of the queries, `[batch, query, class]`.
        """
        return (
            Input("support", ("batch", "example", self.dim), least=0),
            Input("labels", ("batch", "labelled"), INTEGERS, self.classes, least=0),
            Input("queries", ("batch", "query", self.dim)),
        )

    def check(self, *inputs: Any) -> None:
        """As the base class has it; there are no more labels than examples.

        Raises:
            ValueError: naming the argument.
        """
        super().check(*inputs)
        examples, labels = jnp.shape(inputs[0])[1], jnp.shape(inputs[1])
        if labels[1] > examples:
            raise ValueError(
                f"labels has shape {labels}, must be [{labels[0]}, labelled] with at most one for "
                f"each of the {examples} examples"
            )

    def one_hot(self, labels: Labels, like: Array) -> Array:
        """y_ic, `[batch, labelled, class]`; NaN, where labels are traced, for one out of range."""
        shown = jax.nn.one_hot(labels, self.classes, dtype=like.dtype)
        return or_nan(shown, labels, self.classes) if isinstance(labels, Tracer) else shown

    def codes(self, like: Array) -> Array:
        """1_c of the class tokens, `[batch, class, class]`."""
        one = jnp.eye(self.classes, dtype=like.dtype)
        return jnp.broadcast_to(one, (len(like), *one.shape))

    def positions(self, support: Support, queries: Queries) -> tuple[range, range]:
        """Positions of the class tokens, and of the queries."""
        first = support.shape[1]
        last = first + self.classes
        return range(first, last), range(last, last + queries.shape[1])

    def context_size(self, *inputs: Any) -> int:
        """Examples of the support."""
        return inputs[0].shape[1]

    def subset(self, kept: Any, *inputs: Any) -> tuple[Any, ...]:
        """The inputs with these examples of the support only; see `Construction.subset`."""
        support, labels, queries = inputs
        chosen = np.asarray(kept, int)
        return support[:, chosen], labels[:, chosen[chosen < labels.shape[1]]], queries

    def counterpart(self) -> Counterpart:
        """Heads as wide as the stream, trained with Adam from `aligned` weights."""
        base = self.in_trained_shape()
        recipe = Recipe(
            steps=3000, batch=256, learning_rate=1e-2, schedule="cosine", warmup=50, clip=1.0,
            b2=0.99, average_tail=0.1,
        )  # fmt: skip
        return Counterpart(
            lambda key: aligned(base, key, 0.1),
            self.task,
            recipe,
            quick=replace(recipe, steps=1200, batch=64),
        )

    def domain(self, *inputs: Array) -> dict[str, float | str]:
        """The task, and how good a classifier of its labelled examples can be."""
        exact = replace(self.task, unlabelled=0)
        return {"task": repr(self.task), "shrinkage of the exact posterior": exact.shrinkage}


def aligned(model: Transformer, key: Array, std: float) -> Transformer:
    """Weights N(0, std^2) whose keys are the queries, and whose outputs the values, transposed.

    Every head then starts positive semidefinite, in what it compares and in what it moves. With
    independent weights one seed in three stays where a direction of the features, or of the codes,
    has the wrong sign: it would have to pass through 0.
    """

    def align(part: Part) -> dict[str, Array]:
        w = part.weights
        if part.kind != "heads":
            return w
        return w | {"key": w["query"], "output": jnp.swapaxes(w["value"], -1, -2)}

    return randomise(model, key, std).map_parts(align)
