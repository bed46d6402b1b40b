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
