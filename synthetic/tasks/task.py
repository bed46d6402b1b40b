"""What a task is: a sampler of batches and a loss, nothing else."""

from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax.numpy as jnp
from jax import Array


class Batch(NamedTuple):
    """A batch of examples of a task.

    Attributes:
        inputs: what a model is given, a tuple of arrays with leading axis `batch`.
        target: what its prediction is compared with, a pytree with leading axis `batch`.
    """

    inputs: tuple[Array, ...]
    target: Any


@runtime_checkable
class Task(Protocol):
    """A distribution over batches and a loss on predictions."""

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw `batch` independent examples; pure in `key`, usable inside `jit`."""
        ...

    def loss(self, prediction: Any, batch: Batch) -> Array:
        """Loss of every example, `[batch]`; its mean is what `fit` minimises."""
        ...


def checked(task: Any, batch: Any) -> Batch:
    """What `task.sample` gave; ValueError unless it is a `Batch` whose inputs are a tuple."""
    who = f"{type(task).__name__}.sample"
    if not (hasattr(batch, "inputs") and hasattr(batch, "target")):
        kind = type(batch).__name__
        raise ValueError(
            f"{who} gives a {kind}, must give synthetic.tasks.task.Batch(inputs, target)"
        )
    if not isinstance(batch.inputs, tuple):
        kind = type(batch.inputs).__name__
        raise ValueError(f"{who}: inputs is a {kind}, must be a tuple of arrays, such as (x,)")
    return batch


def half_squared_error(prediction: Array, target: Array) -> Array:
    """Half the squared error, summed over outputs, mean over queries, for every context.

    Both are `[batch, queries, dim_y]`; ValueError where their shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction must have shape {target.shape}, got {prediction.shape}")
    return 0.5 * jnp.sum((prediction - target) ** 2, -1).mean(-1)


@runtime_checkable
class Curriculum(Task, Protocol):
    """A task whose batches change in the course of a fit."""

    def sample_during(self, key: Array, batch: int, progress: Array) -> Batch:
        """As `sample`, at the share `progress` of a fit's steps, 0 (first) to 1 (last)."""
        ...


#: What a prediction is: numbers beside a target, probabilities of outcomes, or their logits.
Outcome = Literal["values", "probabilities", "logits"]


def outcome(task: Task) -> Outcome:
    """What the predictions of a task are; declared in a task's attribute `outcome`.

    "values" have Gaussian likelihood, of variance 1; the others have a last axis of outcomes.

    Raises:
        ValueError: the attribute is something else.
    """
    found: Any = getattr(task, "outcome", "values")
    if found not in get_args(Outcome):
        allowed = ", ".join(get_args(Outcome))
        raise ValueError(f"{type(task).__name__}.outcome is {found!r}, must be one of {allowed}")
    return found
