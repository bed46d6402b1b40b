"""Full-batch minimisation to the last digit, for losses known in closed form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from synthetic.saved import named, unnamed


@dataclass(frozen=True)
class Minimum:
    """Where `minimize` stopped.

    Attributes:
        model: the minimising model.
        loss: its loss.
        gradient_norm: Euclidean norm of the loss' gradient there.
        iterations: L-BFGS iterations taken.
        converged: whether the gradient norm fell below the tolerance.
    """

    model: Any
    loss: float
    gradient_norm: float
    iterations: int
    converged: bool


def minimize(
    model: nnx.Module,
    loss: Callable[[Any], Array],
    *,
    steps: int = 2000,
    tolerance: float = 1e-12,
    memory: int = 20,
) -> Minimum:
    r"""Minimises `loss(model)` over the model's `nnx.Param`s by L-BFGS with a zoom line search.

    Stops at $\|\nabla L\| \le$ `tolerance`, when the parameters stop moving, or after `steps`
    iterations. One jitted loop, deterministic; meant for float64 (`jax.enable_x64`), where it
    reaches gradients of about 1e-12 times the loss' scale. The given model is not changed.

    Args:
        model: where to start.
        loss: a scalar function of a module of the same structure.
        steps: most iterations, at least 1.
        tolerance: bound on the gradient's norm, at least 0.
        memory: pairs of steps and gradient differences kept.

    Raises:
        ValueError: an argument out of range.
        FloatingPointError: the loss or its gradient is not finite at the start or at the end.
    """
    for name, value, low in (
        ("steps", steps, 1),
        ("memory", memory, 1),
        ("tolerance", tolerance, 0),
    ):
        if not value >= low:
            raise ValueError(f"{name}={value}: must be at least {low}")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def at_params(arrays: dict[str, Array], rest: Any) -> Array:
        return loss(nnx.merge(graphdef, unnamed(arrays, params), rest))

    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=40)
    optimizer = optax.lbfgs(memory_size=memory, linesearch=search)

    @jax.jit
    def run(arrays: dict[str, Array], rest: Any) -> tuple[Any, Array, Array, Array]:
        def at(arrays: dict[str, Array]) -> Array:
            return at_params(arrays, rest)

        def unfinished(carry: Any) -> Array:
            _, _, norm, moved, iteration = carry
            return (iteration < steps) & (norm > tolerance) & moved

        def iterate(carry: Any) -> Any:
            arrays, state, _, _, iteration = carry
            # The line search has evaluated the accepted point already.
            here, gradient = optax.value_and_grad_from_state(at)(arrays, state=state)
            updates, state = optimizer.update(
                gradient, state, arrays, value=here, grad=gradient, value_fn=at
            )
            after: Any = optax.apply_updates(arrays, updates)
            moved = jnp.stack([jnp.any(after[name] != arrays[name]) for name in arrays]).any()
            norm = optax.tree.norm(optax.tree.get(state, "grad"))
            return after, state, norm, moved, iteration + 1

        norm = optax.tree.norm(jax.grad(at)(arrays))
        begin = (arrays, optimizer.init(arrays), norm, jnp.array(True), 0)
        arrays, _, _, _, iterations = jax.lax.while_loop(unfinished, iterate, begin)
        # Evaluated afresh: the line search's own values are those it was led by.
        here, gradient = jax.value_and_grad(at)(arrays)
        return arrays, here, optax.tree.norm(gradient), iterations

    arrays, final, norm, iterations = run(named(params), rest)
    if not (np.isfinite(final) and np.isfinite(norm)):
        raise FloatingPointError(f"loss={float(final)}, gradient norm={float(norm)}: not finite")
    return Minimum(
        model=nnx.merge(graphdef, unnamed(arrays, params), rest),
        loss=float(final),
        gradient_norm=float(norm),
        iterations=int(iterations),
        converged=bool(norm <= tolerance),
    )
