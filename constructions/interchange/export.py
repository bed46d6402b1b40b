"""Constructions and trained models as model folders of Hugging Face's format.

    config.json            the shape, the slots, and where every named value lives
    model.safetensors      the weights, by names such as `layers.0.heads.1.query`, `[rows, width]`
    modeling_orrery.py     the model in torch: one file, that needs torch and transformers only
    example.safetensors    inputs of the task with the outputs that our model gives for them
    README.md              the model card: what is known of the model

`AutoModel.from_pretrained(folder, trust_remote_code=True)` gives the model's outputs. Every model
of the class `Transformer` can be written; a program that is run slot by slot, as it would be too
large in dense weights, cannot. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from constructions.certificate import Certificate, check_settings, verify
from constructions.core.compile import compile_program, config_of, placed_heads
from constructions.core.config import Config, LayerConfig
from constructions.core.evaluate import SlotBySlot
from constructions.core.inventory import counts
from constructions.core.program import Program
from constructions.core.transformer import Transformer
from constructions.family import Compiled, Construction, Place
from constructions.interchange.card import card
from synthetic.compilation import compile_once
from synthetic.files import claim_folder, json_object, remove
from synthetic.fitting.weights_file import check_numbers

CONFIG, WEIGHTS, EXAMPLE, CARD = (
    "config.json",
    "model.safetensors",
    "example.safetensors",
    "README.md",
)
MODELING = "modeling_orrery.py"
KIND = "orrery"


def export(
    model: Any,
    construction: Construction | None,
    out: str | PathLike[str],
    *,
    facts: Mapping[str, str] | None = None,
    certificate: Certificate | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as a folder that `AutoModel.from_pretrained` reads; returns its path.

    Args:
        model: a `Transformer`, or what `Construction.compile` gives, with weights in float32 or
            float64, which is what is written.
        construction: whose task it solves. If the weights are the construction's own, the card says
            what every head does and has the certificate. None for a model of another origin.
        out: the folder, which is made.
        facts: further lines of the card, {title: text}, such as where the model comes from.
        certificate: of the construction; computed where it is None and needed.
        overwrite: replace an earlier export.

    Raises:
        ValueError: the model is no `Transformer`, is too large to be dense, has weights of another
            type or that are not finite, or does not fit the construction; a setting of that is not
            hashable.
        RunError: the folder exists, or is none of ours where it is to be replaced.
    """
    folder = claim_export(out, overwrite=overwrite)
    compiled, model = (model, model.model) if isinstance(model, Compiled) else (None, model)
    dtype = check_exportable(model)
    if construction is not None:
        check_settings(construction)
    with jax.enable_x64(dtype == "float64"):
        own = construction is not None and is_own(model, construction)
        program = None if construction is None else construction.program
        if program is not None and model.config.width < program.slots.width:
            program = None  # a language model with columns of its own
        example, places = _example(model, construction)
    if own and certificate is None:
        known = compiled is not None and compiled.construction is construction
        certificate = compiled.certificate if compiled and known else verify(construction)
    shapes, tensors = _stored(model, program if own else None)
    config = _config(model.config, shapes, program, places, dtype)
    text = card(
        config,
        model.config,
        construction,
        {name: list(array.shape) for name, array in example.items()},
        dict(facts or {}),
        certificate if own else None,
        own,
    )
    _write(folder, config, tensors, example, text)
    return folder


def claim_export(out: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Where an export may be written: nothing is there, or an earlier export to be replaced.

    Raises:
        RunError: it exists, or cannot be written.
    """
    out = Path(out)
    claim_folder(out, "export", _is_export, overwrite=overwrite)
    return out


def _is_export(folder: Path) -> bool:
    config = folder / CONFIG
    return (
        not folder.is_symlink()
        and config.is_file()
        and json_object(config).get("model_type") == KIND
    )


def check_exportable(model: Any) -> str:
    """The name of the model's floating point type; ValueError where it cannot be exported."""
    if isinstance(model, SlotBySlot):
        dense = counts(model.program).dense
        raise ValueError(
            f"model is program '{model.program.name}' slot by slot: its {dense:,} weights are too "
            "many to be made dense, and only dense weights can be exported"
        )
    if not isinstance(model, Transformer):
        raise ValueError(f"model is a {type(model).__name__}, must be a Transformer to be exported")
    arrays = jax.tree.leaves(model.arrays())
    found = {str(a.dtype) for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)}
    if not found:  # a norm without gains, say
        found = {str(jnp.result_type(float))}
    if len(found) > 1 or not found <= {"float32", "float64"}:
        raise ValueError(
            f"model has weights in {', '.join(sorted(found))}, must be float32 or float64 "
            "throughout to be exported"
        )
    check_numbers(stored_arrays(model), "model")
    return found.pop()


def is_own(model: Transformer, construction: Construction) -> bool:
    """Whether the weights are the construction's, in its own shape or in the trained one."""
    program = construction.program
    small = config_of(program)
    for shape in (small, small.wide):
        if shape == model.config:
            dtype = np.dtype(check_exportable(model))
            wanted = compile_program(program, dtype, config=shape).arrays()
            same = jax.tree.map(np.array_equal, wanted, model.arrays())
            return all(jax.tree.leaves(same))
    return False


def stored_arrays(model: Transformer) -> dict[str, np.ndarray]:
    """The weights by the names of the file, such as `layers.0.heads.1.query`, `[rows, width]`."""
    return _stored(model, None)[1]


def _stored(
    model: Transformer, program: Program | None
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Shapes of the stored layers as `config.json` has them, and all arrays by name."""
    arrays: Any = jax.tree.map(np.asarray, model.arrays())
    shapes: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    for s, segment in enumerate(model.config.segments):
        for r in range(segment.stacked):
            for p, layer in enumerate(segment.pattern):
                number = len(shapes)
                own = jax.tree.map(lambda a, r=r: a[r], arrays["segments"][s]["layers"][p])
                tensors |= {f"layers.{number}.{n}": a for n, a in _layer_arrays(layer, own)}
                shapes.append(_layer_shape(layer, _names(program, number, layer)))
    for part in ("tokens", "final_norm"):
        tensors |= {f"{part}.{name}": array for name, array in arrays.get(part, {}).items()}
    return shapes, tensors


def _layer_arrays(layer: LayerConfig, own: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of one layer, head by head; the heads' biases of the output are one."""
    first, bias = 0, []
    for row, heads in enumerate(layer.heads):
        for name, array in own["heads"][row].items():
            if name == "output_bias":
                bias.append(array)
                continue
            for n in range(heads.heads):
                yield f"heads.{first + n}.{name}", array[n]
        first += heads.heads
    if bias:
        yield "output_bias", np.sum(bias, axis=0)
    for part in ("norm", "mlp_norm", "mlp"):
        for name, array in own.get(part, {}).items():
            yield f"{part}.{name}", array


def _layer_shape(layer: LayerConfig, names: Mapping[int, str]) -> dict[str, Any]:
    heads = []
    for row in layer.heads:
        shape = asdict(row)
        del shape["heads"]
        heads += [{"name": names.get(len(heads) + n, "")} | shape for n in range(row.heads)]
    found = {name: value and asdict(value) for name, value in vars(layer).items()
             if name != "heads"}  # fmt: skip
    return {"heads": heads, "output_bias": any(row.bias for row in layer.heads)} | found


def _names(program: Program | None, number: int, shape: LayerConfig) -> dict[int, str]:
    """{number of a head: its name in the program}."""
    if program is None:
        return {}
    first = np.cumsum([0, *(row.heads for row in shape.heads)])
    placed = placed_heads(program.layers[number], shape, f"layer {number + 1}")
    return {int(first[row]) + n: head.name for head, row, n in placed}


def _config(
    shape: Config,
    layers: list[dict[str, Any]],
    program: Program | None,
    places: Mapping[str, Any],
    dtype: str,
) -> dict[str, Any]:
    """`config.json`: the names that transformers knows, then ours."""
    first = np.cumsum([0, *(s.stacked * len(s.pattern) for s in shape.segments)])
    order = []
    for number in range(1, shape.depth + 1):
        segment, position, repeat = shape.stored(number)
        size = len(shape.segments[segment].pattern)
        order.append(int(first[segment]) + repeat * size + position)
    tables = None if shape.tokens is None else asdict(shape.tokens)
    known = {} if tables is None else {"vocab_size": tables["embedding"]}
    if tables is not None and tables["positions"]:
        known["max_position_embeddings"] = tables["positions"]
    module = MODELING.removesuffix(".py")
    slots = {} if program is None else {
        slot.name: {
            "columns": [slot.start, slot.start + slot.size],
            "token_groups": slot.token_groups,
            "born": slot.born,
            "dies": slot.dies,
            "meaning": slot.meaning,
        }
        for slot in program.slots
    }  # fmt: skip
    return {
        "model_type": KIND,
        "architectures": ["OrreryModel"],
        "auto_map": {
            "AutoConfig": f"{module}.OrreryConfig",
            "AutoModel": f"{module}.OrreryModel",
        },
        "dtype": dtype,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.max_heads,
        **known,
        "token_groups": list(shape.token_groups),
        "layers": layers,
        "order": order,
        "final_norm": shape.final_norm and asdict(shape.final_norm),
        "tables": tables,
        "clip": shape.clip,
        "slots": slots,
        "places": places,
    }


def _example(
    model: Transformer, construction: Construction | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Two inputs with what the model gives for them, and where their named values are."""
    if construction is None:
        kinds = len(model.config.token_groups)
        groups, rng = np.arange(max(4, kinds)) % kinds, np.random.default_rng(0)
        stream = jnp.asarray(rng.normal(size=(2, len(groups), model.config.width)))
        if model.config.tokens is not None:
            count = min(len(groups), model.config.tokens.positions or len(groups))
            groups = groups[:count]
            words = rng.integers(model.config.tokens.embedding, size=(2, count))
            stream = model.embed(words)
            found = {"input_ids": words}
        else:
            found = {}
        out = compile_once(_run)(model, stream, jnp.asarray(groups))
        found |= {"inputs_embeds": stream, "token_type_ids": groups, "last_hidden_state": out}
        return _as_saved(found), {}
    inputs = construction.sample(jax.random.key(0), 2)
    found = _of_construction(construction, model, *inputs)
    slots = construction.program.slots
    if model.config.width < slots.width:  # a language model of another width
        return _as_saved(found), {}
    places = construction.places(model.config.depth, *inputs)
    return _as_saved(found), {name: _place(place, slots) for name, place in places.items()}


def _run(model: Transformer, stream: Any, groups: Any) -> Any:
    return model(stream, groups)


@compile_once(static_argnums=0)
def _of_construction(construction: Construction, model: Transformer, *inputs: Any) -> Any:
    stream = construction.stream(model, *inputs)
    tokens = construction.embed(*inputs)
    found = {"inputs_embeds": stream.values, "token_type_ids": stream.groups}
    if all(part.words is not None and not part.values for part in tokens):
        found["input_ids"] = jnp.concatenate([jnp.asarray(part.words) for part in tokens], 1)
    return found | {"last_hidden_state": model(stream.values, stream.groups)}


def _as_saved(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays as torch takes them: indices are int64."""
    found = {name: np.asarray(array) for name, array in arrays.items()}
    return {n: a if a.dtype.kind == "f" else a.astype(np.int64) for n, a in found.items()}


def _place(place: Place, slots: Any) -> dict[str, Any]:
    """Indices that broadcast to the value without its batch axis, and the slots' names."""
    return {
        "slots": sorted({str(name) for name in np.asarray(place.slot, object).ravel()}),
        "layers": np.asarray(place.layer)[..., None].tolist(),
        "tokens": np.asarray(place.token)[..., None].tolist(),
        "columns": place.columns(slots).tolist(),
        "scale": float(place.scale),
    }


def _write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    example: Mapping[str, np.ndarray],
    text: str,
) -> None:
    """All files, into a folder beside this one that takes its place at the end."""
    from safetensors.numpy import save

    partial = folder.absolute().with_name(f".{folder.name}.partial")
    earlier = partial.with_suffix(".earlier")
    remove(partial)
    try:
        partial.mkdir(parents=True)
        for name, arrays in ((WEIGHTS, tensors), (EXAMPLE, example)):
            held = {key: np.asarray(array, order="C") for key, array in arrays.items()}
            (partial / name).write_bytes(save(held, metadata={"format": "pt"}))
        shown = json.dumps(config, indent=1, allow_nan=False)
        (partial / CONFIG).write_text(shown + "\n", encoding="utf-8")
        (partial / CARD).write_text(text, encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name(MODELING), partial / MODELING)
        remove(earlier)
        if folder.exists():
            os.rename(folder, earlier)  # no rename replaces a folder that holds anything
        os.rename(partial, folder)
        remove(earlier)
    finally:
        if not folder.exists() and earlier.exists():
            os.rename(earlier, folder)
        remove(partial)
