"""What a mesa layer may be given, with one line of error for what it may not."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike


def floating(name: str, dtype: DTypeLike) -> None:
    """ValueError unless the dtype is one of real floating numbers."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {jnp.dtype(dtype)}, must be floating")


def _every(name: str, x: Array | None, allowed: Callable, range_: str) -> None:
    """Every entry is allowed; of concrete arrays only, a traced one has no values yet."""
    if x is None or isinstance(x, Tracer):
        return
    values = np.asarray(x, np.float64)
    wrong = ~allowed(values)
    if wrong.any():
        raise ValueError(f"{name} has {values[wrong][0]}, every entry must be {range_}")


def checked(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    regularization: ArrayLike,
    input_gate: ArrayLike | None,
    forget_gate: ArrayLike | None,
    axes: tuple[str, ...],
) -> tuple[Array, Array, Array, Array, Array | None, Array | None]:
    """The arguments as arrays of one floating dtype, float32 or more; ridge `[head, dim]`."""
    given = {"query": query, "key": key, "value": value, "regularization": regularization}
    gates = {"input_gate": input_gate, "forget_gate": forget_gate}
    arrays = {name: jnp.asarray(x) for name, x in (given | gates).items() if x is not None}
    for name, x in arrays.items():
        floating(name, x.dtype)

    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    layout = f"[{', '.join(axes)}, dim]"
    if query.ndim != len(axes) + 1 or 0 in query.shape:
        raise ValueError(f"query has shape {query.shape}, must be {layout}, no axis empty")
    if key.shape != query.shape:
        raise ValueError(f"key has shape {key.shape}, must be that of query, {query.shape}")
    if value.ndim != query.ndim or value.shape[:-1] != query.shape[:-1] or 0 in value.shape:
        raise ValueError(
            f"value has shape {value.shape}, must be {query.shape[:-1]} and a last axis, not empty"
        )
    ridge = ridge_of(arrays["regularization"], *query.shape[-2:])
    for name in gates:
        if name in arrays and arrays[name].shape != query.shape[:-1]:
            raise ValueError(
                f"{name} has shape {arrays[name].shape}, must be [{', '.join(axes)}] = "
                f"{query.shape[:-1]}"
            )
    beta, gamma = arrays.get("input_gate"), arrays.get("forget_gate")
    _every("input_gate", beta, lambda x: (x >= 0) & np.isfinite(x), "at least 0 and finite")
    _every("forget_gate", gamma, lambda x: (x > 0) & (x <= 1), "in (0, 1]")

    dtype = jnp.result_type(jnp.float32, *arrays.values())
    query, key, value, ridge = (x.astype(dtype) for x in (query, key, value, ridge))
    beta, gamma = (None if x is None else x.astype(dtype) for x in (beta, gamma))
    return query, key, value, ridge, beta, gamma


def ridge_of(regularization: Array, heads: int, dim: int) -> Array:
    """The ridge of these heads, `[head, dim]`."""
    shape = regularization.shape
    if shape not in ((heads,), (heads, dim)):
        raise ValueError(
            f"regularization has shape {shape}, must be [head] = {(heads,)} or "
            f"[head, dim] = {(heads, dim)}"
        )
    allowed = "positive and finite"
    _every("regularization", regularization, lambda x: (x > 0) & np.isfinite(x), allowed)
    ridge = regularization if len(shape) == 2 else regularization[:, None]
    return jnp.broadcast_to(ridge, (heads, dim))
