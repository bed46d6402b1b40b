"""What the constructions on few-shot classification share: support, labels, queries in, logits out.

Tokens are the examples with labels, those without, one for each class, then the queries. A class
token begins with the code of its class, and attention writes the class's weights into it; a last
layer applies them to the queries,

    query features,  key weights,  value code,  from class tokens, written to the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from constructions.compiler import compile_program, config_of
from constructions.family import Construction, Counterpart
from constructions.regression import at_least_one, finite_number
from constructions.slots import Slot
from constructions.transformer import Transformer, randomise
from synthetic.classes import GaussianClasses, Labels, Logits, Queries, Support
from synthetic.recipe import Recipe

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
        at_least_one(self, "dim", "classes", "shots", "queries")
        for name in ("spread", "noise"):
            object.__setattr__(self, name, finite_number(name, getattr(self, name)))
        _ = self.task  # which has checks of its own

    @property
    def task(self) -> GaussianClasses:
        """Gaussian classes around Gaussian means."""
        names = ("dim", "classes", "shots", "queries", "unlabelled", "spread", "noise")
        return GaussianClasses(**{name: getattr(self, name) for name in names})

    def predict(
        self, model: Transformer, support: ArrayLike, labels: ArrayLike, queries: ArrayLike
    ) -> Logits:
        """Logits of the queries as the model computes them.

        Args:
            model: the compiled construction or a model of the same class.
            support: `[batch, example, dim]`; computed in the widest of its and the model's types.
            labels: integers in 0..classes - 1 of the first examples, `[batch, labelled]`.
            queries: `[batch, query, dim]`.

        Raises:
            ValueError: for shapes that do not fit or, on concrete arrays, features that are not
                finite or labels out of range.
        """
        return self.apply(model, *self.typed(weight_dtype(model), support, labels, queries))

    def check(self, *inputs: Any) -> None:
        """Shapes, and where they are concrete finite features and labels that exist.

        Raises:
            ValueError: naming the argument.
        """
        if len(inputs) != 3:
            raise ValueError(f"expected support, labels and queries, got {len(inputs)} arrays")
        support, labels, queries = inputs
        shape = jnp.shape(support)
        if len(shape) != 3 or shape[2] != self.dim:
            raise ValueError(f"support has shape {shape}, must be [batch, example, {self.dim}]")
        wanted = (shape[0], self.dim)
        found = jnp.shape(queries)
        if len(found) != 3 or (found[0], found[2]) != wanted or not found[1]:
            raise ValueError(f"queries has shape {found}, must be [{shape[0]}, query, {self.dim}]")
        found = jnp.shape(labels)
        if len(found) != 2 or found[0] != shape[0] or found[1] > shape[1]:
            raise ValueError(
                f"labels has shape {found}, must be [{shape[0]}, labelled] with at most one for "
                f"each of the {shape[1]} examples"
            )
        if not jnp.issubdtype(jnp.asarray(labels).dtype, jnp.integer):
            raise ValueError(f"labels are {jnp.asarray(labels).dtype}, must be integers")
        for name, array in (("support", support), ("queries", queries)):
            if not isinstance(array, Tracer) and not np.isfinite(np.asarray(array)).all():
                raise ValueError(f"{name} holds NaN or infinite values, must be finite")
        if not isinstance(labels, Tracer):
            known = np.asarray(labels)
            wrong = known[(known < 0) | (known >= self.classes)]
            if wrong.size:
                raise ValueError(f"labels holds {wrong[0]}, must be 0 to {self.classes - 1}")

    def typed(self, like: Any, *inputs: ArrayLike) -> tuple[Array, Array, Array]:
        """Checked inputs, features in one floating point type, `like`'s or a wider one."""
        support, labels, queries = (jnp.asarray(a) for a in inputs)
        self.check(support, labels, queries)
        dtype = jnp.result_type(like, support, queries)
        return support.astype(dtype), labels, queries.astype(dtype)

    def one_hot(self, labels: Labels, like: Array) -> Array:
        """y_ic, `[batch, labelled, class]`."""
        return jax.nn.one_hot(labels, self.classes, dtype=like.dtype)

    def codes(self, like: Array) -> Array:
        """1_c of the class tokens, `[batch, class, class]`."""
        one = jnp.eye(self.classes, dtype=like.dtype)
        return jnp.broadcast_to(one, (len(like), *one.shape))

    def groups(self, support: Support, labels: Labels, queries: Queries) -> Array:
        """The kind of every token, an index into `GROUPS`, `[token]`."""
        known, examples = labels.shape[1], support.shape[1]
        sizes = known, examples - known, self.classes, queries.shape[1]
        return jnp.asarray(np.repeat(np.arange(len(GROUPS)), sizes))

    def tokens(self, support: Support, queries: Queries) -> tuple[range, range]:
        """Which tokens are the classes', which are the queries'."""
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
        shape = config_of(self.program)
        base = compile_program(self.program, config=shape.with_heads(shape.width, shape.width))
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


def rows(width: int, values: Mapping[Slot, Array]) -> Array:
    """Tokens `[batch, token, width]` that hold these values in their slots, and 0 elsewhere."""
    shape = jnp.broadcast_shapes(*(v.shape[:2] for v in values.values()))
    parts, end = [], 0
    for slot, value in sorted(values.items(), key=lambda item: item[0].start):
        parts.append(jnp.zeros((*shape, slot.start - end), value.dtype))
        parts.append(jnp.broadcast_to(value, (*shape, slot.size)))
        end = slot.start + slot.size
    tokens = jnp.concatenate(parts, -1)
    return jnp.pad(tokens, [(0, 0), (0, 0), (0, width - end)])


def aligned(model: Transformer, key: Array, std: float) -> Transformer:
    """Weights N(0, std^2) whose keys are the queries, and whose outputs the values, transposed.

    Every head then starts positive semidefinite, in what it compares and in what it moves. With
    independent weights one seed in three stays where a direction of the features, or of the codes,
    has the wrong sign: it would have to pass through 0.
    """
    arrays = randomise(model, key, std).arrays()
    for segment in arrays["segments"].values():
        for layer in segment["layers"].values():
            for heads in layer["heads"].values():
                heads["key"] = heads["query"]
                heads["output"] = jnp.swapaxes(heads["value"], -1, -2)
    return Transformer(model.config, arrays)


def weight_dtype(model: Transformer) -> Any:
    """The floating point type of a model's weights."""
    return jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype
