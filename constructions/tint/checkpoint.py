"""Decoders out of local folders of weights in Hugging Face format, and into them.

A folder has `config.json` and `model.safetensors`, or `model.safetensors.index.json` and the files
that it lists. Two formats are read, and written:

    gpt2   linear maps are stored [in, out]; queries, keys and values are one of them
    opt    linear maps are stored [out, in]; two rows precede the positions and mean nothing

In both a block is what `auxiliary` has; any setting that makes it another is refused by name.
Nothing is downloaded and nothing unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from constructions.tint.auxiliary import DecoderShape, check_auxiliary, decoder, with_parameters
from constructions.tint.formats import FORMATS, Format
from constructions.transformer import Transformer
from synthetic.files import RunError, atomic
from synthetic.saved import check_numbers, read_safetensors
from synthetic.text_files import parse_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"

Tensors = dict[str, tuple[Path, np.ndarray]]


def load_auxiliary(path: str | PathLike[str], dtype: DTypeLike | None = None) -> Transformer:
    """The decoder in a folder, every array in one dtype.

    `transformer.`, `model.` and `decoder.` in front of names may be missing. Buffers of masks, and
    an `lm_head.weight` that equals the embedding, are passed over, and so is dropout, which is of
    training alone.

    Args:
        path: the folder.
        dtype: a float; JAX's default float if None.

    Raises:
        RunError: a file is missing or damaged, a setting is not simulated, or an array is missing,
            unknown, of another shape or no float, or holds NaN or infinite numbers, or numbers
            beyond the dtype; one line names file and field.
        ValueError: the dtype is no float, or float64 without JAX's x64.
    """
    kind = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(f"dtype is {kind}, must be a float")
    if kind == jnp.float64 and jnp.zeros((), int).dtype != jnp.int64:
        raise ValueError(f"dtype is {kind}, which JAX has in its x64 mode alone")
    folder = Path(path)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; weights are never downloaded")
    format, shape = _format(folder / CONFIG)
    found = _weights(folder, format, shape)
    limit = float(jnp.finfo(kind).max)
    for name, (file, array) in found.items():
        if (largest := float(np.abs(array).max())) > limit:
            raise RunError(f"{file}: {name}: holds {largest:g}, beyond {kind} ({limit:g})")
    arrays = format.arrays(shape, {name: array for name, (_, array) in found.items()})
    return with_parameters(decoder(**vars(shape)), arrays, kind)


def save_auxiliary(model: Transformer, path: str | PathLike[str], kind: str = "gpt2") -> None:
    """Writes a decoder as a new folder that `load_auxiliary`, and others, can read.

    Args:
        model: as `check_auxiliary` wants it.
        path: the folder.
        kind: "gpt2", or "opt", whose norms all have eps 1e-5.

    Raises:
        ValueError: the kind is another, or the model is no decoder, or none of that kind.
        RunError: the path exists.
    """
    from safetensors.numpy import save

    if kind not in FORMATS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(FORMATS)}")
    shape, format, folder = check_auxiliary(model), FORMATS[kind], Path(path)
    tensors = format.tensors(shape, model.arrays())
    fields = format.fields(shape) | {
        "architectures": [format.architecture],
        "model_type": kind,
        "torch_dtype": str(next(iter(tensors.values())).dtype),
        **{f"{name}_token_id": None for name in ("bos", "eos", "pad")},
    }
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made: {error.strerror}") from error
    named = {"".join(format.prefix) + name: array for name, array in tensors.items()}
    with atomic(folder / WEIGHTS) as partial:
        partial.write_bytes(save(named, metadata={"format": "pt"}))
    with atomic(folder / CONFIG) as partial:
        partial.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _format(file: Path) -> tuple[Format, DecoderShape]:
    """What a config says; RunError where it cannot be simulated."""
    fields = _json(file)
    name = fields.get("model_type")
    if name not in list(FORMATS):  # which compares, where a dictionary would hash
        raise RunError(f"{file}: model_type: {name!r}, must be one of {', '.join(FORMATS)}")
    try:
        return FORMATS[name], FORMATS[name].shape(fields)
    except ValueError as error:
        raise RunError(f"{file}: {error}") from error


def _weights(folder: Path, format: Format, shape: DecoderShape) -> Tensors:
    """The arrays that a decoder is made of, each with its file; RunError where one does not fit."""
    found: Tensors = {}
    for name, (file, array) in _stored(folder).items():
        short = name
        for prefix in format.prefix:
            short = short.removeprefix(prefix)
        if short in found:
            raise RunError(f"{file}: {name}: stored twice")
        if not re.fullmatch(format.buffers, short):
            found[short] = (file, array)
    head = found.pop(HEAD, None)
    if shape.layers > len(found):  # before as many names are made
        raise RunError(f"{folder}: {len(found)} arrays, too few for {shape.layers} layers")
    wanted = format.names(shape)
    for name, size in wanted.items():
        if name not in found:
            raise RunError(f"{folder}: {name}: missing")
        file, array = found[name]
        if array.shape != size:
            raise RunError(f"{file}: {name}: shape {list(array.shape)}, {CONFIG} has {list(size)}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise RunError(f"{file}: {name}: dtype {array.dtype}, must be a float")
    if head is not None and not np.array_equal(head[1], found[format.tables[0]][1]):
        raise RunError(f"{head[0]}: {HEAD}: differs from the embedding; heads must be tied")
    for name, (file, _) in found.items():
        if name not in wanted:
            raise RunError(f"{file}: {name}: no array of a decoder, or of one with more layers")
        check_numbers({name: found[name][1]}, file)
    return found


def _stored(folder: Path) -> Tensors:
    """All arrays of a folder's files, each with its file."""
    if (folder / WEIGHTS).exists():
        return dict(_read(folder / WEIGHTS))
    index = folder / INDEX
    if not index.exists():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        more = f", only {pickled[0]}, which is pickled; save it as safetensors" if pickled else ""
        raise RunError(f"{folder}: neither {WEIGHTS} nor {INDEX}{more}")
    listed = _json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise RunError(f"{index}: weight_map: missing or not a map from arrays to files")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise RunError(f"{index}: weight_map: {name}: {file!r}, must be a file of the folder")
    found: Tensors = {}
    for file in sorted(set(listed.values())):
        for name, entry in _read(folder / file):
            if name in found:
                raise RunError(f"{folder / file}: {name}: stored twice")
            found[name] = entry
    for name, file in listed.items():
        if name not in found or found[name][0].name != file:
            raise RunError(f"{folder / file}: {name}: missing, though {INDEX} lists it")
    return found


def _read(file: Path) -> Iterator[tuple[str, tuple[Path, np.ndarray]]]:
    """The arrays of a safetensors file."""
    arrays, _ = read_safetensors(file)
    yield from ((name, (file, array)) for name, array in arrays.items())


def _json(file: Path) -> dict[str, Any]:
    """An object in a JSON file."""
    try:
        data = parse_json(file.read_bytes())
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{file}: no JSON: {error}") from error
    if not isinstance(data, dict):
        raise RunError(f"{file}: must be a JSON object")
    return data
