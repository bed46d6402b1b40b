"""What a task is: a sampler of batches and a loss, nothing else."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

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


@runtime_checkable
class Curriculum(Task, Protocol):
    """A task whose batches change in the course of a fit."""

    def sample_during(self, key: Array, batch: int, progress: Array) -> Batch:
        """As `sample`, at the share `progress` of a fit's steps, 0 (first) to 1 (last)."""
        ...
