"""Decoders read from local folders of weights in Hugging Face's format, and written to them.

A folder has `config.json` and `model.safetensors`, or `model.safetensors.index.json` and the files
that it lists. Two formats are read, and written:

    gpt2   linear maps are stored [in, out]; queries, keys and values are one of them
    opt    linear maps are stored [out, in]; two rows precede the positions and mean nothing

A `Format` maps names and settings of a folder to the matrices and norms of
`constructions.interchange.decoder`. A setting that makes a block another one is refused by name.
Nothing is downloaded and nothing unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from constructions.core.transformer import Transformer
from constructions.interchange.decoder import (
    CHANGED,
    EPS,
    NORMS,
    DecoderShape,
    check_auxiliary,
    decoder,
    from_arrays,
    to_arrays,
    with_parameters,
)
from synthetic.files import RunError, atomic, json_object
from synthetic.fitting.weights_file import check_numbers, read_safetensors

#: What both formats call our activations; their "gelu" is another, with the error function.
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        architecture: the class that reads it.
        sizes: name in `DecoderShape` -> (setting, what it stands for where it is absent or null, as
            the class has it); a hidden size of None is four times the width.
        activation: what an absent or null `activation_function` stands for.
        aliases: other name of a setting -> setting.
        fixed: setting -> (the only value that is simulated, also its default; what another means).
        eps: the setting of the norms' eps, None where it is always 1e-5.
        prefix: in front of all names, in parts each of which may be missing.
        tables: arrays of the embedding and the positions.
        offset: rows in front of the positions.
        block: what the names of a block's arrays begin with.
        modules: name -> parts of a block that it holds, one above the other.
        final: the last norm.
        transposed: matrices are [in, out].
        buffers: names, a regular expression, of arrays that are no weights.
    """

    architecture: str
    sizes: Mapping[str, tuple[str, int | None]]
    activation: str
    aliases: Mapping[str, str]
    fixed: Mapping[str, tuple[bool, str]]
    eps: str | None
    prefix: tuple[str, ...]
    tables: tuple[str, str]
    offset: int
    block: str
    modules: Mapping[str, tuple[str, ...]]
    final: str
    transposed: bool
    buffers: str

    def names(self, shape: DecoderShape) -> dict[str, tuple[int, ...]]:
        """Names of all arrays, without the prefix, and their shapes."""
        d, rows = shape.width, shape.positions + self.offset
        names = {self.tables[0]: (shape.words, d), self.tables[1]: (rows, d)}
        for start, parts in self._modules(shape):
            size = sum(shape.hidden if part == "hidden" else d for part in parts)
            matrix = (size, shape.hidden if "back" in parts else d)
            weight = (d,) if parts[0] in NORMS else matrix[:: -1 if self.transposed else 1]
            names |= {f"{start}.weight": weight, f"{start}.bias": (size,)}
        return names | {f"{self.final}.weight": (d,), f"{self.final}.bias": (d,)}

    def arrays(self, shape: DecoderShape, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """A decoder's parameters, nested as `Config.shapes`, from arrays named as in `names`."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in CHANGED}
        for start, parts in self._modules(shape):
            weight, bias = tensors[f"{start}.weight"], tensors[f"{start}.bias"]
            if parts[0] in NORMS:
                found["gain"].append(weight)
                found["offset"].append(bias)
                continue
            weight = weight.T if self.transposed else weight
            rows = np.split(np.concatenate([weight, bias[:, None]], 1), len(parts))
            for part, own in zip(parts, rows, strict=True):
                found[part].append(own)
        for name, kind in (("gain", "weight"), ("offset", "bias")):
            found[name].append(tensors[f"{self.final}.{kind}"])
        weights = {name: np.stack(each) for name, each in found.items()}
        weights["embedding"], position = (tensors[name] for name in self.tables)
        return to_arrays(weights | {"position": position[self.offset :]}, shape.heads)

    def tensors(self, shape: DecoderShape, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The inverse of `arrays`; rows in front of the positions are 0."""
        w = from_arrays(jax.tree.map(np.asarray, arrays))
        position = np.pad(w["position"], ((self.offset, 0), (0, 0)))
        tensors = dict(zip(self.tables, (w["embedding"], position), strict=True))
        for n, (start, parts) in enumerate(self._modules(shape)):
            layer = n // len(self.modules)
            if parts[0] in NORMS:
                norm = 2 * layer + NORMS.index(parts[0])
                weight, bias = w["gain"][norm], w["offset"][norm]
            else:
                rows = np.concatenate([w[part][layer] for part in parts])
                weight, bias = rows[:, :-1], rows[:, -1]
                weight = weight.T if self.transposed else weight
            tensors |= {f"{start}.weight": weight, f"{start}.bias": bias}
        tensors |= {f"{self.final}.weight": w["gain"][-1], f"{self.final}.bias": w["offset"][-1]}
        return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}

    def _modules(self, shape: DecoderShape) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(what the names of its arrays begin with, its parts) of all modules, layer by layer."""
        for layer in range(shape.layers):
            for module, parts in self.modules.items():
                yield self.block.format(layer) + module, parts

    def shape(self, fields: Mapping[str, Any]) -> DecoderShape:
        """The decoder of a config's fields; ValueError names one that is not simulated."""
        fields = self._by_one_name(fields)
        for name, (wanted, meaning) in {**_FIXED, **self.fixed}.items():
            # null is no, as for the class
            if (False if (value := fields.get(name, wanted)) is None else value) is not wanted:
                raise ValueError(f"{name}: {fields[name]!r}, must be {wanted}: {meaning}")
        if fields.get("quantization_config") is not None:
            raise ValueError("quantization_config: present, quantised weights are not read")
        width = self._size(fields, "width")
        free = self._setting(fields, *self.sizes["hidden"]) is None
        sizes = {name: self._size(fields, name) for name in self.sizes if name != "hidden"}
        if width % sizes["heads"]:
            raise ValueError(
                f"{self.sizes['heads'][0]}: {sizes['heads']}, must divide "
                f"{self.sizes['width'][0]}={width}"
            )
        narrow = fields.get("word_embed_proj_dim")
        if narrow not in (None, width):
            raise ValueError(
                f"word_embed_proj_dim: {narrow!r}, must be {width}, as the stream: project_in and "
                "project_out (as in OPT-350m) are not simulated"
            )
        return DecoderShape(
            **sizes,
            hidden=4 * width if free else self._size(fields, "hidden"),
            activation=self._activation(fields),
            eps=self._eps(fields),
        )

    def fields(self, shape: DecoderShape) -> dict[str, Any]:
        """The inverse of `shape`; ValueError where the format has another eps."""
        if self.eps is None and shape.eps != EPS:
            raise ValueError(f"eps is {shape.eps}, must be {EPS} in this format")
        fields: dict[str, Any] = {field: getattr(shape, n) for n, (field, _) in self.sizes.items()}
        fields |= {name: wanted for name, (wanted, _) in {**_FIXED, **self.fixed}.items()}
        fields |= {} if self.eps is None else {self.eps: shape.eps}
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return fields | {"activation_function": names[shape.activation]}

    def _by_one_name(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields, with every setting under its first name."""
        for other, name in self.aliases.items():
            if other in fields and fields.get(name, fields[other]) != fields[other]:
                raise ValueError(f"{other}: {fields[other]!r}, must be {name}={fields[name]!r}")
        return dict(fields) | {name: fields[o] for o, name in self.aliases.items() if o in fields}

    def _setting(self, fields: Mapping[str, Any], name: str, default: Any) -> Any:
        return default if (found := fields.get(name)) is None else found

    def _size(self, fields: Mapping[str, Any], name: str) -> int:
        field, default = self.sizes[name]
        size = self._setting(fields, field, default)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{field}: {size!r}, must be an integer above 0")
        return size

    def _activation(self, fields: Mapping[str, Any]) -> str:
        name = self._setting(fields, "activation_function", self.activation)
        if name not in list(ACTIVATIONS):
            note = ", which has the error function" if name == "gelu" else ""
            raise ValueError(
                f"activation_function: {name!r}{note}, must be one of {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    def _eps(self, fields: Mapping[str, Any]) -> float:
        found = None if self.eps is None else fields.get(self.eps)
        eps = EPS if found is None else found
        if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 < eps < 1:
            raise ValueError(f"{self.eps}: {eps!r}, must be between 0 and 1")
        return float(eps)


_FIXED = {
    "tie_word_embeddings": (True, "a head of its own is not simulated"),
    "add_cross_attention": (False, "attention to another sequence is not simulated"),
}

FORMATS = {
    "gpt2": Format(
        architecture="GPT2LMHeadModel",
        sizes={
            "words": ("vocab_size", 50257),
            "positions": ("n_positions", 1024),
            "layers": ("n_layer", 12),
            "heads": ("n_head", 12),
            "width": ("n_embd", 768),
            "hidden": ("n_inner", None),
        },
        activation="gelu_new",
        aliases={
            "max_position_embeddings": "n_positions",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "hidden_size": "n_embd",
        },
        fixed={
            "scale_attn_weights": (True, "scores are divided by sqrt d"),
            "scale_attn_by_inverse_layer_idx": (False, "scores have one scale in all layers"),
            "reorder_and_upcast_attn": (False, "attention has one order of products"),
        },
        eps="layer_norm_epsilon",
        prefix=("transformer.",),
        tables=("wte.weight", "wpe.weight"),
        offset=0,
        block="h.{}.",
        modules={
            "ln_1": ("norm",),
            "attn.c_attn": ("query", "key", "value"),
            "attn.c_proj": ("output",),
            "ln_2": ("mlp_norm",),
            "mlp.c_fc": ("hidden",),
            "mlp.c_proj": ("back",),
        },
        final="ln_f",
        transposed=True,
        buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "opt": Format(
        architecture="OPTForCausalLM",
        sizes={
            "words": ("vocab_size", 50272),
            "positions": ("max_position_embeddings", 2048),
            "layers": ("num_hidden_layers", 12),
            "heads": ("num_attention_heads", 12),
            "width": ("hidden_size", 768),
            "hidden": ("ffn_dim", 3072),
        },
        activation="relu",
        aliases={},
        fixed={
            "do_layer_norm_before": (True, "norms behind each part (OPT-350m) are not simulated"),
            "enable_bias": (True, "linear maps have biases"),
            "layer_norm_elementwise_affine": (True, "norms have gains and offsets"),
            "_remove_final_layer_norm": (False, "a norm stands before the head"),
        },
        eps=None,
        prefix=("model.", "decoder."),
        tables=("embed_tokens.weight", "embed_positions.weight"),
        offset=2,
        block="layers.{}.",
        modules={
            "self_attn_layer_norm": ("norm",),
            "self_attn.q_proj": ("query",),
            "self_attn.k_proj": ("key",),
            "self_attn.v_proj": ("value",),
            "self_attn.out_proj": ("output",),
            "final_layer_norm": ("mlp_norm",),
            "fc1": ("hidden",),
            "fc2": ("back",),
        },
        final="final_layer_norm",
        transposed=False,
        buffers=r"(?!)",
    ),
}


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
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
    """Format and shape of a `config.json`; RunError where it cannot be simulated."""
    fields = json_object(file)
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
        return _read(folder / WEIGHTS)
    index = folder / INDEX
    if not index.exists():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        more = f", only {pickled[0]}, which is pickled; save it as safetensors" if pickled else ""
        raise RunError(f"{folder}: neither {WEIGHTS} nor {INDEX}{more}")
    listed = json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise RunError(f"{index}: weight_map: missing or not a map from arrays to files")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
            raise RunError(f"{index}: weight_map: {name!r}: {file!r}, must be a file of the folder")
    found: Tensors = {}
    for file in sorted(set(listed.values())):
        for name, entry in _read(folder / file).items():
            if name in found:
                raise RunError(f"{folder / file}: {name}: stored twice")
            found[name] = entry
    for name, file in listed.items():
        if name not in found or found[name][0].name != file:
            raise RunError(f"{folder / file}: {name}: missing, though {INDEX} lists it")
    return found


def _read(file: Path) -> Tensors:
    """The arrays of a safetensors file."""
    return {name: (file, array) for name, array in read_safetensors(file)[0].items()}
