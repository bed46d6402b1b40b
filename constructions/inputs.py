"""What may enter a model: named arrays and indices, checked once and refused in one line.

A family lists its inputs (`Construction.arguments`); `Construction.predict` takes lists, numbers
and arrays of any library that numpy reads, checks them here and runs `apply`, which is pure.
Values are looked at where they are concrete. Under `jit` only what is static can be refused; an
index without a row then gives NaN, see `constructions.core.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array

from constructions.core.transformer import Transformer
from constructions.core.weights import check_indices

NUMBERS, INTEGERS, FLAGS = "real numbers", "integers", "flags"


@dataclass(frozen=True)
class Input:
    """One input of a construction.

    Attributes:
        name: as callers know it.
        axes: of its shape, sizes or names. One name is one size in all inputs.
        holds: `NUMBERS`, which become floats; `INTEGERS`; or `FLAGS`, bool.
        count: of integers: they must be 0 to count - 1; None if that is not known.
        least: the smallest size of a named axis behind the first, which is the batch.
    """

    name: str
    axes: tuple[str | int, ...]
    holds: str = NUMBERS
    count: int | None = None
    least: int = 1


def as_arrays(inputs: Sequence[Input], given: Sequence[Any]) -> list[Any]:
    """What was given as arrays of numpy or JAX; arrays stay what they are.

    Without `inputs` to go by everything is taken that numpy makes an array of.

    ValueError for another number of inputs, or what is no array of the kind.
    """
    if not inputs:
        return [a if isinstance(a, jax.Array) else np.asarray(a) for a in given]
    if len(given) != len(inputs):
        names = [i.name for i in inputs]
        wanted = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        raise ValueError(f"expected {wanted}, got {len(given)} arrays")
    return [_array(i, value) for i, value in zip(inputs, given, strict=True)]


def check_inputs(inputs: Sequence[Input], given: Sequence[Any]) -> None:
    """ValueError unless these are such inputs.

    Number, kinds and shapes are looked at always. Where values are concrete NaN, infinity, numbers
    whose squares overflow, and integers out of range are refused as well.
    """
    if not inputs:
        return
    arrays = as_arrays(inputs, given)
    sizes: dict[str, int] = {}
    for i, array in zip(inputs, arrays, strict=True):
        _check_shape(i, array.shape, sizes)
    dtype = float_type(inputs, arrays)
    for i, array in zip(inputs, arrays, strict=True):
        if i.count is not None:
            check_indices(i.name, array, i.count)
        if i.holds is NUMBERS and not isinstance(array, Tracer):
            _check_range(i.name, array, dtype)


def float_type(inputs: Sequence[Input], arrays: Sequence[Any], like: Any = 0.0) -> Any:
    """The floating point type that numbers are computed in: `like`'s or a wider one of theirs."""
    numbers = [a for i, a in zip(inputs, arrays, strict=True) if i.holds is NUMBERS]
    return jnp.result_type(like, *numbers)


def converted(inputs: Sequence[Input], arrays: Sequence[Any], like: Any) -> tuple[Array, ...]:
    """Checked arrays as JAX's, all numbers in the type of `float_type`."""
    if not inputs:
        return tuple(jnp.asarray(a) for a in arrays)
    dtype = float_type(inputs, arrays, like)
    return tuple(
        jnp.asarray(a, dtype if i.holds is NUMBERS else None)
        for i, a in zip(inputs, arrays, strict=True)
    )


def model_type(model: Any, width: int | None = None) -> Any:
    """The floating point type of a model's weights.

    Args:
        model: a `Transformer`, or a program in the place of one.
        width: that its stream must have, a softened model's null column left out; of models that
            embed words themselves any will do.

    Raises:
        ValueError: it is something else, or of another width.
    """
    if not isinstance(model, Transformer):
        from constructions.core.evaluate import SlotBySlot  # what large programs have for a model

        if isinstance(model, SlotBySlot):
            return model.dtype
        shown = "None" if model is None else f"a {type(model).__name__}"
        hint = ", here its attribute .model" if hasattr(model, "certificate") else ""
        raise ValueError(
            f"model is {shown}, must be a Transformer: the compiled one or a trained one{hint}"
        )
    config = model.config
    if width not in (None, config.width) and config.tokens is None:
        raise ValueError(
            f"model has width {config.width}, must be {width}, that of the construction's slots "
            "(one with a null token is read through `constructions.softened.Softened`)"
        )
    weights = jax.tree.leaves(nnx.state(model, nnx.Param))
    return jnp.result_type(*weights) if weights else jnp.result_type(float)


def check_prediction(
    found: Any, model: Any, inputs: Sequence[Input], arrays: Sequence[Array]
) -> None:
    """ValueError for a concrete prediction that is not finite, with what may have made it so."""
    if isinstance(found, Tracer) or np.isfinite(np.asarray(found)).all():
        return
    for weight in jax.tree.leaves(nnx.state(model)) if isinstance(model, nnx.Module) else ():
        if jnp.issubdtype(weight.dtype, jnp.floating) and not bool(jnp.isfinite(weight).all()):
            raise ValueError("model holds NaN or infinite weights, must be finite")
    sizes = {
        i.name: float(jnp.abs(a).max())
        for i, a in zip(inputs, arrays, strict=bool(inputs))
        if i.holds is NUMBERS and not isinstance(a, Tracer) and a.size
    }
    name = max(sizes, key=lambda n: sizes[n], default="")
    largest = f": {name} holds {sizes[name]:.3g} in size, must be smaller" if name else ""
    raise ValueError(f"the prediction overflows {np.asarray(found).dtype}{largest}")


def _array(i: Input, value: Any) -> Any:
    """The value as an array of numpy or JAX, of a type that fits."""
    must = f"must be an array of {i.holds}"
    if not isinstance(value, jax.Array | np.ndarray):
        try:
            array = np.asarray(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            kind = type(value).__name__
            raise ValueError(f"{i.name} is a {kind} that numpy makes no array of, {must}") from None
        if array.dtype == object and array.ndim == 0:
            shown = "None" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"{i.name} is {shown}, {must}")
        # an empty list has no type of its own
        value = array if array.size or i.holds is NUMBERS else array.astype(np.int32)
    dtype = value.dtype
    real, flags = jnp.issubdtype(dtype, np.floating), jnp.issubdtype(dtype, np.bool_)
    # numpy counts a length of time as an integer
    whole = jnp.issubdtype(dtype, np.integer) and not jnp.issubdtype(dtype, np.timedelta64)
    fits = {NUMBERS: real or whole or flags, INTEGERS: whole, FLAGS: flags}
    if not fits[i.holds]:
        shown = f"has dtype {dtype}" if i.holds is NUMBERS else f"are {dtype}"
        raise ValueError(f"{i.name} {shown}, must be {i.holds}")
    if real and dtype.itemsize > 8:  # wider than any of JAX's
        with np.errstate(over="ignore"):
            value = value.astype(np.float64)
    return value


def _check_shape(i: Input, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Sizes against those of the inputs before, which new ones join."""
    wanted = [axis if isinstance(axis, int) else sizes.get(axis) for axis in i.axes]
    if len(shape) != len(wanted) or any(
        w not in (None, s) for w, s in zip(wanted, shape, strict=True)
    ):
        known = [a if w is None else w for a, w in zip(i.axes, wanted, strict=True)]
        must = f"[{', '.join(map(str, known))}]" if None in wanted else str(tuple(known))
        raise ValueError(f"{i.name} has shape {shape}, must be {must}")
    for n, axis in enumerate(i.axes):
        if isinstance(axis, str):
            sizes[axis] = shape[n]
            if n and shape[n] < i.least:
                raise ValueError(f"{i.name} has shape {shape}, must hold at least one token")


def _check_range(name: str, array: Any, dtype: Any) -> None:
    """ValueError unless all numbers are finite and their squares are, in this type."""
    values = np.asarray(array)
    if values.dtype not in (np.float32, np.float64):
        with np.errstate(over="ignore"):
            values = values.astype(np.float64)
    largest = float(np.max(np.abs(values), initial=0.0))
    if not np.isfinite(largest):
        raise ValueError(f"{name} holds NaN or infinite values, must be finite")
    most = float(np.sqrt(float(jnp.finfo(dtype).max)))
    if largest > most:
        raise ValueError(
            f"{name} holds {largest:.3g} in size, must be at most {most:.2g}: squares overflow "
            f"{jnp.dtype(dtype)}"
        )
