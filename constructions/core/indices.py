"""Indices into tables: a number without a row is refused, or gives NaN where it is traced.

JAX reads the nearest row in its place, and counts negative numbers from the end: a word that does
not exist would be answered as another one.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array


def check_indices(name: str, indices: Any, count: int, of: str = "") -> None:
    """ValueError names a concrete number that is not 0 to `count` - 1, and its place.

    Args:
        name: of the argument.
        indices: integers; traced ones are not looked at.
        count: how many rows there are.
        of: what the rows are.
    """
    if isinstance(indices, Tracer):
        return
    known = np.asarray(indices)
    wrong = (known < 0) | (known >= count)
    if wrong.any():
        place = [int(n) for n in np.argwhere(wrong)[0]]
        raise ValueError(
            f"{name} holds {known[wrong][0]}, must be 0 to {count - 1}{of and ', ' + of} "
            f"(at {place})"
        )


def inside(indices: Array, count: int) -> Array:
    """Whether each number has a row."""
    return (indices >= 0) & (indices < count)


def take_rows(table: Array, indices: Any) -> Array:
    """`table[indices]`, `[*indices, ...]`; NaN where an index has no row."""
    indices = jnp.asarray(indices)
    beyond = jnp.where(indices < 0, len(table), indices)  # or they would count from the end
    return table.at[beyond].get(mode="fill", fill_value=jnp.nan)


def or_nan(values: Array, indices: Array, count: int) -> Array:
    """`values`, `[*indices, last]`, where the index has a row; NaN elsewhere."""
    return jnp.where(inside(indices, count)[..., None], values, jnp.nan)
