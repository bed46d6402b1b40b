"""Vectors that carry a power of two apart, so that no product of many probabilities underflows.

    v = mantissa * 2^exponent,     1/2 <= max(mantissa) < 1

Scaling by powers of two is exact: float32 charts differ from float64 ones by the rounding of sums
and products alone. A vector of zeros has the exponent `NOTHING`.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

#: Exponent of a vector of zeros: far below any other, and sums of a few of it are still int32.
NOTHING = -(2**24)


def power_of_two(exponent: Array, dtype: Any) -> Array:
    """2^exponent, exactly, from its bits; 0 below the smallest normal number."""
    integer, info = _layout(dtype)
    bias = 1 - int(info.minexp)
    biased = jnp.clip(exponent + bias, 0, 2 * bias).astype(integer)
    return lax.bitcast_convert_type(biased << info.nmant, jnp.dtype(dtype))


def normalise(values: Array, exponent: Array) -> tuple[Array, Array]:
    """values * 2^exponent with the largest of the last axis in [1/2, 1); one exponent for it.

    Gradients take the exponents as constants, which is exact: they cancel wherever they are used.
    """
    integer, info = _layout(values.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(values).max(-1), integer) >> info.nmant
    shift = bits.astype(jnp.int32) + int(info.minexp)
    values = values * power_of_two(-shift, values.dtype)[..., None]
    return values, jnp.where(bits > 0, exponent + shift, NOTHING)


def log_of(value: Array, exponent: Array) -> Array:
    """log(value * 2^exponent): -inf, with gradient 0, where the value is 0."""
    some = value > 0
    log = jnp.log(jnp.where(some, value, 1))
    return jnp.where(some, log + exponent.astype(value.dtype) * math.log(2), -jnp.inf)


def _layout(dtype: Any) -> tuple[Any, Any]:
    """The integer as wide as a float, and what `jnp.finfo` knows of the float."""
    info = jnp.finfo(dtype)
    return (jnp.int32 if info.bits == 32 else jnp.int64), info
