r"""Learning from a teacher first: its predictions take the place of the targets.

    loss = loss(prediction, teacher(inputs))      while the share of a fit's steps is below `share`,
           loss(prediction, target)               from there on

(Blakeney et al. 2022, arXiv 2211.00683, who distil a part of the training only). A target is noise
around what can be known of it: a teacher that returns E[target | inputs], as an exact posterior
does, leaves the expected gradient as it is and takes the noise away. Any other teacher is a bias,
which the second part of the fit has to undo.

Agents may teach one another, on inputs that all of them see, what each has learnt from data of its
own (Zhmoginov et al. 2022, arXiv 2211.15774). Where they are linear, `agents` says what comes of
it: their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from synthetic.tasks.task import Batch, Curriculum, Outcome, Task, outcome


class Taught(NamedTuple):
    """A target and the teacher's prediction in its place.

    Attributes:
        own: the task's target.
        taught: the teacher's prediction.
        counts: whether the teacher's is what counts, `[batch]`.
    """

    own: Any
    taught: Array
    counts: Array


@dataclass(frozen=True)
class Distilled:
    """A `Curriculum`: a task whose first targets are a teacher's predictions.

    `sample` draws from the task itself, so that losses along a fit stay comparable.

    Attributes:
        task: any task; a curriculum keeps its own.
        teacher: inputs to a prediction, pure: a construction, or an exact posterior.
        share: of a fit's steps, 0 to 1.

    Raises:
        ValueError: `share` is out of range.
    """

    task: Any
    teacher: Callable[..., Array]
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}, must be 0 to 1")

    @property
    def outcome(self) -> Outcome:
        """The loss of the task, with the teacher's predictions as targets."""
        return outcome(self.task)

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw from the task; nothing is taught."""
        return self.task.sample(key, batch)

    def sample_during(self, key: Array, batch: int, progress: Array) -> Batch:
        """As `sample`; the teacher's predictions count while `progress` is below the share."""
        if isinstance(self.task, Curriculum):
            drawn = self.task.sample_during(key, batch, progress)
        else:
            drawn = self.task.sample(key, batch)
        counts = jnp.asarray((progress < self.share) | (self.share == 1))
        like = jax.eval_shape(self.teacher, *drawn.inputs)
        # half of a fit without a teacher should not pay for one
        taught = jax.lax.cond(
            counts,
            lambda: jax.lax.stop_gradient(self.teacher(*drawn.inputs)),
            lambda: jnp.zeros(like.shape, like.dtype),
        )
        return Batch(drawn.inputs, Taught(drawn.target, taught, jnp.broadcast_to(counts, batch)))

    def loss(self, prediction: Array, batch: Batch) -> Array:
        """The task's loss, or that against the teacher; `[batch]`."""
        if not isinstance(batch.target, Taught):
            return self.task.loss(prediction, batch)
        own, taught, counts = batch.target
        plain = Batch(batch.inputs, own)
        against = teacher_loss(self.task, prediction, taught, plain)
        return jnp.where(counts, against, self.task.loss(prediction, plain))


def teacher_loss(task: Task, prediction: Array, taught: Array, batch: Batch) -> Array:
    """The task's loss with a teacher's prediction for the target, `[batch]`.

    Of values, the loss with `taught` as the target, or as its `value` where that has several
    fields. Of distributions, the mean of the loss over targets from the teacher's: cross-entropy,
    where the task has targets and with its weights.

    Args:
        task: its loss is -sum w log p(target) where its predictions are distributions.
        prediction: of the model.
        taught: the prediction of the teacher; the same shape, and probabilities for logits too.
        batch: of the task.
    """
    kind = outcome(task)
    if kind == "values":
        target = batch.target
        target = target._replace(value=taught) if hasattr(target, "_replace") else taught
        return task.loss(prediction, Batch(batch.inputs, target))
    weight = _weights(task, prediction, batch)
    if kind == "logits":
        logs = jax.nn.log_softmax(prediction)
    else:
        logs = jnp.log(jnp.maximum(prediction, jnp.finfo(prediction.dtype).tiny))
    nats = -weight * jnp.where(taught > 0, taught * logs, 0).sum(-1)
    return nats.reshape(len(nats), -1).sum(1)


def agents(weights: ArrayLike, inputs: ArrayLike, step: float, steps: int) -> Array:
    """Linear agents W_m after steps of gradient descent on what their mean predicts.

    Each descends 1/2 E |W_m x - V x|^2 on public inputs, V the mean of all of them at the time,
    which stays what it is:

        W_m(t)  =  V + (W_m - V) (I - step C)^t,    C = E[x x^T].

    On the span of the inputs all become V, the ensemble: of M independent errors its excess loss
    has 1 / M. What the public inputs do not reach each agent keeps.

    Args:
        weights: `[agent, out, in]`.
        inputs: `[point, in]`.
        step, steps: of gradient descent; each is taken by all agents at once.

    Raises:
        ValueError: the step is not in (0, 2 / largest eigenvalue of C), where agents diverge.
    """
    weights, inputs = jnp.asarray(weights), jnp.asarray(inputs)
    values, vectors = jnp.linalg.eigh(inputs.T @ inputs / len(inputs))
    if not 0 < step * float(values[-1]) < 2:
        raise ValueError(f"step is {step}, must be in (0, {2 / float(values[-1]):.4g})")
    mean, shrink = weights.mean(0), (1 - step * values) ** steps
    apart = jnp.einsum("moi,ik,k,jk->moj", weights - mean, vectors, shrink, vectors,
                       precision="highest")  # fmt: skip
    return mean + apart


def _weights(task: Task, prediction: Array, batch: Batch) -> Array:
    """w of every place in -sum w log p(target), from how the loss changes with the prediction.

    d/dp (-w log p(target)) is -w / p at the target and 0 elsewhere; at p = 1 its sum over outcomes
    is -w. With logits p = softmax(0), the derivative is w (1 / C - [target]), and its absolute
    values sum to 2 w (1 - 1 / C).
    """
    logits, outcomes = outcome(task) == "logits", prediction.shape[-1]
    start = jnp.zeros_like(prediction) if logits else jnp.ones_like(prediction)
    slope = jax.grad(lambda p: task.loss(p, batch).sum())(jax.lax.stop_gradient(start))
    if not logits:
        return -slope.sum(-1)
    return jnp.abs(slope).sum(-1) / (2 * (1 - 1 / outcomes))
