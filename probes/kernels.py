r"""Does training near some weights do what a kernel says?

With J the Jacobian of a model's outputs in its weights, one step of gradient descent changes the
outputs f by

    -rate K dL/df + O(rate^2),      K = J J^T,

and one step along the sign of the gradient of a single output by -rate J sign(J)^T sign(dL/df):
kernels of gradient descent and of Adam's first steps (Malladi et al. 2022, arXiv 2210.05643). That
much holds of any smooth model. Training is kernel-like only if it stays so: if K does not change
along it, and the model that is linear in its weights, f(theta_0) + J (theta - theta_0), learns the
same. Functions take `f(theta, data)`, of any shape of output. The kernels of signs, the step that
they predict and `kernel_descent` are for use as a library.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from constructions.runs import Run
from probes.descent import MOST, Loss, Theta, descend, no_forward_derivative
from probes.probe import Probe, Result, table, too_many_weights
from probes.sharpness import curved
from synthetic.compilation import compile_once

Function = Callable[[Any, Any], Array]
Jacobian = Float[Array, "output weight"]
Kernel = Float[Array, "left right"]
Rule = Literal["gradient", "sign"]


@compile_once(static_argnums=0, often=True)
def jacobian(f: Function, theta: Theta, data: Any) -> Jacobian:
    """df_i / dtheta_p, for all outputs i in one row after another."""

    def flat(theta: Array) -> Array:
        return f(theta, data).ravel()

    few = jax.eval_shape(flat, theta).size < theta.size
    return (jax.jacrev if few else jax.jacfwd)(flat)(theta)


def gradient_kernel(left: Float[Array, "l weight"], right: Float[Array, "r weight"]) -> Kernel:
    """<grad f_i, grad f_j>: of gradient descent."""
    return jnp.matmul(left, right.T, precision="highest")


def asymmetric_sign_kernel(
    left: Float[Array, "l weight"], right: Float[Array, "r weight"]
) -> Kernel:
    """<grad f_i, sign grad f_j>: what a step along the signs at j does at i."""
    return gradient_kernel(left, jnp.sign(right))


def sign_kernel(left: Float[Array, "l weight"], right: Float[Array, "r weight"]) -> Kernel:
    """<sign grad f_i, sign grad f_j>."""
    return gradient_kernel(jnp.sign(left), jnp.sign(right))


def kernel_change(before: Kernel, after: Kernel) -> Float[Array, ""]:
    """|K_t - K_0| / |K_0|, Frobenius."""
    return jnp.linalg.norm(after - before) / jnp.linalg.norm(before)


def predicted_step(
    jac: Jacobian, pull: Float[Array, " output"], rate: float, rule: Rule = "gradient"
) -> Float[Array, " output"]:
    """The change of the outputs by one step, to first order in the rate.

    -rate J J^T dL/df for "gradient", -rate J sign(J^T dL/df) for "sign".

    Args:
        jac: `jacobian`.
        pull: dL/df, of the loss whose gradient it is.
        rate: of the step.
        rule: which step.
    """
    gradient = jnp.matmul(pull, jac, precision="highest")
    direction = gradient if rule == "gradient" else jnp.sign(gradient)
    return -rate * jnp.matmul(jac, direction, precision="highest")


def one_step_error(
    f: Function, loss: Function, theta: Theta, data: Any, rate: float, rule: Rule = "gradient"
) -> float:
    """|predicted - actual| / |actual| change of the outputs by one step.

    The prediction is that of `predicted_step`, made without the Jacobian. The error is of first
    order in the rate for every smooth model, so that this says whether f and the loss are what they
    are taken for, and at which step sizes a kernel can be right at all.

    Args:
        f: the model's outputs.
        loss: `loss(outputs, data)`, a scalar.
        theta: the weights.
        data: of both.
        rate, rule: of the step.
    """
    predicted, actual = _step(f, loss, rule, theta, data, rate)
    return float(jnp.linalg.norm((predicted - actual).ravel()) / jnp.linalg.norm(actual.ravel()))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(f: Function, loss: Function, rule: Rule, theta: Array, data: Any, rate: Any) -> Any:
    def outputs(theta: Array) -> Array:
        return f(theta, data)

    before, back = jax.vjp(outputs, theta)
    (gradient,) = back(jax.grad(loss)(before, data))
    change = -rate * (gradient if rule == "gradient" else jnp.sign(gradient))
    predicted = jax.jvp(outputs, (theta,), (change,))[1]
    return predicted, outputs(theta + change) - before


def linearised(f: Function) -> Function:
    """The model that is linear in its weights, f(origin) + J (theta - origin).

    Of `(theta, (origin, data))`: the origin is data.
    """

    def first_order(theta: Any, given: Any) -> Array:
        origin, data = given
        value, change = jax.jvp(lambda t: f(t, data), (origin,), (theta - origin,))
        return value + change

    return first_order


def linearised_descent(
    f: Function, loss: Function, theta: Theta, data: Any, rate: float, steps: int
) -> Float[Array, " step"]:
    """Losses along gradient descent of the model linearised where it starts.

    Before every step and at the end, as `descend` has them of the model itself.
    """
    return descend(_straight(f, loss), theta, (theta, data), rate, steps).losses


@lru_cache(maxsize=16)
def _straight(f: Function, loss: Function) -> Loss:
    """One function for one f and loss: compiled once."""
    first_order = linearised(f)

    def composed(theta: Any, given: Any) -> Array:
        return loss(first_order(theta, given), given[1])

    return composed


def kernel_descent(
    kernel: Float[Array, "output output"],
    start: Float[Array, " output"],
    loss: Callable[[Any], Array],
    rate: float,
    steps: int,
) -> Float[Array, "step output"]:
    """Outputs along f <- f - rate K dL/df: linearised training, without weights.

    Args:
        kernel: `gradient_kernel` of the outputs with themselves.
        start: outputs before the first step.
        loss: of the outputs, a scalar.
        rate: of every step.
        steps: how many; the start is the first row.
    """

    def step(outputs: Array, _: None) -> tuple[Array, Array]:
        pull = jax.grad(loss)(outputs)
        after = outputs - rate * jnp.matmul(kernel, pull, precision="highest")
        return after, after

    _, found = jax.lax.scan(step, start, None, steps)
    return jnp.concatenate([start[None], found])


def measure(run: Run, seed: int) -> Result:
    """Is full-batch descent from here what the kernel says, and does the kernel stay?"""
    subjects, left = curved(run, seed)
    notes = {left}
    rows, steps = [], min(given.subject.steps(100, 20) for given in subjects.values())
    for subject, theta, batch, largest in subjects.values():
        few = jax.tree.map(lambda a: a[:16], batch)
        shape = jax.eval_shape(subject.outputs, theta, few).shape
        given = few, jax.random.rademacher(jax.random.key(seed + 1), shape, theta.dtype)
        rate = 1 / largest  # half of what is stable
        path = descend(subject.whole, theta, batch, rate, steps, 10)
        grams = [
            gradient_kernel(j, j)
            for j in (jacobian(subject.sums, path.thetas[n], given) for n in (0, 1, -1))
        ]
        errors, straight = [np.nan, np.nan], [np.nan]
        if lacking := no_forward_derivative(subject.outputs, theta, batch):
            notes.add(f"nothing is linearised: {lacking}")
        else:
            errors = [
                one_step_error(subject.outputs, subject.loss, theta, batch, r)
                for r in (rate / 2, rate / 20)
            ]
            straight = linearised_descent(subject.outputs, subject.loss, theta, batch, rate, steps)
        changes = [kernel_change(grams[0], gram) for gram in grams[1:]]
        losses = path.losses[0], path.losses[-1], straight[-1]
        rows.append([rate, errors[0], np.log10(errors[0] / errors[1]), *changes, *losses])
    columns = ("step size", "error of half a step", "its order", "kernel change, 10 steps",
               f"{steps} steps", "loss before", "after", "after, linearised")  # fmt: skip
    note = "; ".join(sorted(filter(None, notes)))
    return table("gradient descent and its kernel", columns, subjects, rows, note)


KERNEL = Probe(
    "kernel",
    "is full-batch training from here what a fixed kernel says?",
    "little is left to learn, and losses agree although the kernel moves",
    measure,
    needs=lambda run: too_many_weights(run, "'kernel'", MOST),
    invariant=False,
    seeds=2,
)
