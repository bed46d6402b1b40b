"""Saved models: safetensors files of flat dotted names -> arrays, the exact bits, never pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from synthetic.files import RunError, atomic, free_memory

MODEL_FORMAT = "orrery-model"
MODEL_VERSION = 1
_BITS = (8, 16, 32, 64)
_DTYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in _BITS},
    "BOOL": np.bool_,
}


def named(state: Any) -> dict[str, Any]:
    """The arrays of an `nnx.State` (or of a module) under flat dotted names, "layers.0.kernel".

    Random keys appear as their uint32 data.
    """
    if isinstance(state, nnx.Module):
        state = nnx.state(state)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): _key_data(leaf) for path, leaf in leaves}


def unnamed(arrays: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `named`: a state with the structure of `like` and the arrays given."""

    def one(path: Any, leaf: Any) -> Any:
        array = arrays[_name(path)]
        if _is_key(leaf):
            return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        return array

    return jax.tree_util.tree_map_with_path(one, like)


def check_arrays(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Any) -> None:
    """Compares names, shapes and dtypes.

    Raises:
        RunError: one line with the first difference, led by `where`, and how many there are.
    """
    lines = [f"{name}: missing" for name in wanted if name not in found]
    lines += [f"{name}: not in the model" for name in found if name not in wanted]
    for name in wanted:
        if name not in found:
            continue
        has, needs = found[name], wanted[name]
        if tuple(has.shape) != tuple(needs.shape):
            lines.append(f"{name}: shape {list(has.shape)}, the model has {list(needs.shape)}")
        elif has.dtype != needs.dtype:
            lines.append(f"{name}: dtype {has.dtype}, the model has {needs.dtype}")
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise RunError(f"{where}: {lines[0]}{more}")


def _name(path: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    # A Variable is a pytree node whose only child is its value.
    is_variable = path and isinstance(path[-1], jax.tree_util.GetAttrKey)
    return name.removesuffix(".value") if is_variable else name


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def save_model(
    path: str | os.PathLike[str],
    model: Any,
    config: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes the arrays of a model as safetensors, atomically.

    Args:
        path: the file.
        model: a module, an `nnx.State`, or the flat dict of `named`.
        config: what is needed to rebuild the model; kept as JSON in the file's header.
        overwrite: whether an existing file may be replaced.

    Raises:
        RunError: the file exists and `overwrite` is False.
    """
    from safetensors.numpy import save

    path = Path(path)
    if path.exists() and not overwrite:
        raise RunError(f"{path}: exists; give overwrite=True to replace it")
    flat = model if isinstance(model, Mapping) and _is_flat(model) else named(model)
    arrays = {name: np.asarray(array, order="C") for name, array in flat.items()}
    header = {
        "format": MODEL_FORMAT,
        "version": str(MODEL_VERSION),
        "config": json.dumps(dict(config or {}), sort_keys=True),
    }
    with atomic(path) as partial:
        partial.write_bytes(_in_order(save(arrays, metadata=header)))


def _in_order(data: bytes) -> bytes:
    """The same file with sorted metadata, which safetensors writes in another order each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads `save_model`'s file: its arrays by name, and its config.

    Raises:
        RunError: a missing, truncated or foreign file or one of another version.
    """
    path = Path(path)
    arrays, header = read_safetensors(path)
    if header.get("format") != MODEL_FORMAT:
        raise RunError(f"{path}: format: {header.get('format')!r}, expected {MODEL_FORMAT!r}")
    if header.get("version") != str(MODEL_VERSION):
        raise RunError(f"{path}: version: {header.get('version')!r}, expected '{MODEL_VERSION}'")
    try:
        config = json.loads(header["config"])
    except (KeyError, ValueError) as error:
        raise RunError(f"{path}: config: missing or no JSON") from error
    return arrays, config


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of any safetensors file by name, and the metadata of its header.

    Raises:
        RunError: the file is missing, truncated, foreign, or larger than the memory that is free;
            one line names it.
    """
    from safetensors import SafetensorError

    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            free = free_memory()
            if free is not None and 2 * size > free:  # the file, and the arrays copied out of it
                raise RunError(
                    f"{path}: {size / 2**30:.1f} GiB, and reading takes twice as much: more than "
                    f"the {free / 2**30:.1f} GiB of memory that are free"
                )
            data = file.read()
        arrays = parse_arrays(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    except MemoryError:
        raise RunError(f"{path}: larger than the memory that is free") from None
    except KeyError as error:  # the name of a dtype that has no counterpart
        raise RunError(
            f"{path}: an array of dtype {error}, must be a float of 16 to 64 bits, or integers"
        ) from error
    except RunError:
        raise
    except (SafetensorError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: truncated or no safetensors file: {error}") from error
    for name in arrays:
        if not name.isprintable():  # it would break the line of every message about it
            raise RunError(f"{path}: an array is called {name!r}, must be printable characters")
    return arrays, header


def check_numbers(arrays: Mapping[str, Any], where: Any) -> None:
    """Refuses weights that no fit leaves behind.

    Raises:
        RunError: an array holds NaN or infinite numbers; the line names it.
    """
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            bad = int(np.size(array) - np.isfinite(array).sum())
            raise RunError(
                f"{where}: {name}: {bad} of {np.size(array)} numbers are NaN or infinite"
            )


def load_model(path: str | os.PathLike[str], model: nnx.Module) -> nnx.Module:
    """The model of `save_model`'s file, built on the structure of `model`, which is not changed.

    Raises:
        RunError: as `load_state`, or where a name, shape or dtype differs from the model's, or a
            number is not finite.
    """
    arrays, _ = load_state(path)
    graphdef, state = nnx.split(model)
    check_arrays(arrays, named(state), path)
    check_numbers(arrays, path)
    exact = {name: jnp.asarray(array, array.dtype) for name, array in arrays.items()}
    return nnx.merge(graphdef, unnamed(exact, state))


def parse_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file; unlike safetensors' own numpy reader, bfloat16 too."""
    from safetensors import deserialize

    return {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
        for name, entry in deserialize(data)
    }


def _is_flat(model: Mapping[str, Any]) -> bool:
    return not isinstance(model, nnx.State) and all(hasattr(x, "shape") for x in model.values())
