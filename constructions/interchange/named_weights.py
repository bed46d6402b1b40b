"""The weights of a `Transformer` under documented names, and a model made of arrays so named.

Matrices map rows: y = x @ matrix, the first axis being what goes in. Layers are counted from 0, as
they are stored (a layer that is applied several times is stored once), heads from 0 in their layer.

    layers.0.heads.1.query, key, value          [width, rows]
    layers.0.heads.1.output                     [rows, width]
    layers.0.heads.1.scale                      (), the factor of its scores
    layers.0.heads.1.query_bias, key_bias, ...  [rows]
    layers.0.output_bias                        [width], of all heads together
    layers.0.mlp.hidden, gate                   [width, units]
    layers.0.mlp.output                         [units, width]
    layers.0.mlp.hidden_bias, output_bias       [units], [width]
    layers.0.norm.gain, offset; mlp_norm; final_norm.gain, offset    [width]
    tokens.embedding, position, readout         [words, width], [positions, width]

A head has further ones where its kind has: log_regularization (), input_gate, forget_gate [width]
and their biases (), factor_query, factor_key [width, rows]. Which tokens a head sees is no weight:
it is the family's, and where a file says it (window, query_groups, ...) it must be that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from constructions.core.config import WIRING, Config, LayerConfig
from constructions.core.transformer import Transformer

#: Wiring that no file holds: the windows and kinds of tokens of a head.
_SEEN = tuple(name for name in WIRING if name != "scale")
_HEAD = re.compile(r"layers\.(\d+)\.heads\.(\d+)\.(\w+)")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
#: Arrays of one row a word or position, which stay as they are.
_TABLES = "tokens."


def _stored(config: Config) -> Iterator[tuple[int, int, int]]:
    """(segment, position in its pattern, repeat) of every stored layer, in their order."""
    for s, segment in enumerate(config.segments):
        for r in range(segment.stacked):
            for p in range(len(segment.pattern)):
                yield s, p, r


def _places(config: Config) -> dict[str, tuple[Any, ...]]:
    """Name of every array -> where it is in `Config.shapes`: keys, then indices of an array.

    `layers.0.output_bias` stands for all rows of heads of a layer, of which the first has it.
    """
    found: dict[str, tuple[Any, ...]] = {}
    shapes = config.shapes()
    for number, (s, p, r) in enumerate(_stored(config)):
        layer, at = shapes["segments"][s]["layers"][p], ("segments", s, "layers", p)
        count = 0
        for row, heads in layer["heads"].items():
            for name, shape in heads.items():
                where = (*at, "heads", row, name)
                if name == "output_bias":
                    found.setdefault(f"layers.{number}.{name}", (where, (r,)))
                elif name not in _SEEN:
                    for n in range(shape[1]):
                        found[f"layers.{number}.heads.{count + n}.{name}"] = (where, (r, n))
            count += heads["query"][1]
        for part in ("norm", "mlp_norm", "mlp"):
            for name in layer.get(part, {}):
                found[f"layers.{number}.{part}.{name}"] = ((*at, part, name), (r,))
    for part in ("final_norm", "tokens"):
        for name in shapes.get(part, {}):
            found[f"{part}.{name}"] = ((part, name), ())
    return found


def mixers(layer: LayerConfig) -> Iterator[str]:
    """What every head of a layer does with its scores, in their order."""
    for row in layer.heads:
        yield from (row.mixer for _ in range(row.heads))


def _at(tree: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def named_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Documented name -> shape, of every array of a model of this shape."""
    shapes, found = config.shapes(), {}
    for name, (where, index) in _places(config).items():
        shape = _at(shapes, where)[len(index) :]
        found[name] = shape if name.startswith(_TABLES) else shape[::-1]
    return found


def named_weights(model: Transformer) -> dict[str, np.ndarray]:
    """The weights of a model by their documented names."""
    arrays, found = model.arrays(), {}
    for name, (where, index) in _places(model.config).items():
        own = np.asarray(_at(arrays, where))[index]
        if name.endswith(".output_bias") and where[-3] == "heads":  # of all rows together
            rows = _at(arrays, where[:-2]).values()
            each = [np.asarray(w["output_bias"])[index] for w in rows if "output_bias" in w]
            own = np.sum(each, axis=0)
        found[name] = np.array(own if name.startswith(_TABLES) else own.T)
    return found


def with_named(
    base: Transformer, arrays: Mapping[str, np.ndarray], where: str = "weights"
) -> Transformer:
    """A model like `base` with the weights named; its heads may be of another number or size.

    Args:
        base: gives the layers, their kinds and what heads see.
        arrays: by documented names. `scale` may be left out of heads whose scores need none: of all
            but softmax heads, which divide by the root of their rows more often than not.
        where: what an error message begins with, such as the name of a file.

    Raises:
        ValueError: a name that is missing or unknown, or a shape that does not fit, in one line
            with the likely cause.
    """
    said = {name: a for name, a in arrays.items() if name.rpartition(".")[2] in _SEEN}
    arrays = {name: a for name, a in arrays.items() if name not in said}
    config = _fitted(base.config, arrays, where)
    places, shapes = _places(config), named_shapes(config)
    given = {**_scales(base, config, shapes, arrays, where), **arrays}
    _check(given, shapes, config, where)
    kinds = np.result_type(np.float32, *(a.dtype for a in arrays.values()))
    filled = _wired(base, config, kinds, where)
    _check_seen(said, filled, places, where)
    for name, (keys, index) in places.items():
        own = np.asarray(given[name])
        _at(filled, keys)[index] = own if name.startswith(_TABLES) else own.T

    def on_device(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: on_device(value) for key, value in tree.items()}
        return jnp.asarray(tree)

    return Transformer(config, on_device(filled))


def _fitted(config: Config, arrays: Mapping[str, np.ndarray], where: str) -> Config:
    """The shape of `config` with heads and MLPs of the sizes that the arrays have."""
    layers = {int(m[1]) for name in arrays if (m := _LAYER.fullmatch(name))}
    stored = [*_stored(config)]
    if layers != set(range(len(stored))):
        there = f"layers {', '.join(map(str, sorted(layers)))}" if layers else "no layers"
        loops = f", applied {config.depth} times" if config.depth > len(stored) else ""
        raise ValueError(
            f"{where}: holds {there}, the model of these settings stores {len(stored)}{loops}, "
            "counted from 0: another number needs other settings (steps, recurrent, layers), or a "
            "name is misspelt"
        )
    made: dict[tuple[int, int], tuple[int, LayerConfig]] = {}
    for number, (s, p, _) in enumerate(stored):
        layer = _fitted_layer(config, config.segments[s].pattern[p], number, arrays, where)
        first, other = made.setdefault((s, p), (number, layer))
        if other != layer:
            raise ValueError(
                f"{where}: layers {first} and {number} differ in their heads or units, and the "
                "model of these settings has them alike"
            )
    segments = tuple(
        replace(seg, pattern=tuple(made[s, p][1] for p in range(len(seg.pattern))))
        for s, seg in enumerate(config.segments)
    )
    return replace(config, segments=segments)


def _fitted_layer(
    config: Config, layer: LayerConfig, number: int, arrays: Mapping[str, np.ndarray], where: str
) -> LayerConfig:
    numbers = {int(m[2]) for n in arrays if (m := _HEAD.fullmatch(n)) and int(m[1]) == number}
    wanted = sum(row.heads for row in layer.heads)
    if numbers != set(range(len(numbers))) or (len(numbers) != wanted and len(layer.heads) != 1):
        raise ValueError(
            f"{where}: layer {number} has the heads {sorted(numbers)}, must have "
            f"{wanted if len(layer.heads) != 1 else 'all'} of them, counted from 0"
        )

    def size(name: str, axis: int) -> int:
        name = f"layers.{number}.{name}"
        if name not in arrays:
            raise ValueError(f"{where}: {name}: missing")
        shape = np.shape(arrays[name])
        if len(shape) != 2 or shape[axis] != config.width:
            raise ValueError(_misfit(where, name, shape, axis, config.width))
        return shape[1 - axis]

    rows, first = [], 0
    for row in layer.heads:
        count = row.heads if len(layer.heads) > 1 else len(numbers)
        key_dim, value_dim = size(f"heads.{first}.query", 0), size(f"heads.{first}.value", 0)
        bias = row.bias or f"layers.{number}.heads.{first}.query_bias" in arrays
        rows.append(replace(row, heads=count, key_dim=key_dim, value_dim=value_dim, bias=bias))
        first += count
    mlp = layer.mlp
    if mlp is not None:
        bias = mlp.bias or f"layers.{number}.mlp.hidden_bias" in arrays
        mlp = replace(mlp, hidden=size("mlp.hidden", 0), bias=bias)
    return replace(layer, heads=tuple(rows), mlp=mlp)


def _misfit(where: str, name: str, shape: tuple[int, ...], axis: int, width: int) -> str:
    must = f"[{width}, rows]" if axis == 0 else f"[rows, {width}]"
    said = f"{where}: {name}: shape {list(shape)}, must be {must}: the stream has {width} columns"
    if len(shape) == 2 and shape[1 - axis] == width:
        return f"{said}; it looks transposed, as torch's Linear keeps it: give --transposed"
    return f"{said}, of tokens as the family makes them"


def _scales(
    base: Transformer,
    config: Config,
    shapes: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    where: str,
) -> dict[str, np.ndarray]:
    """The scales that the arrays leave out: those of the base, which softmax heads have not."""
    missing = [n for n in shapes if n.endswith(".scale") and n not in arrays]
    if not missing:
        return {}
    own, soft = named_weights(base), set[str]()
    for number, (s, p, _) in enumerate(_stored(config)):
        for n, mixer in enumerate(mixers(config.segments[s].pattern[p])):
            if "softmax" in mixer:
                soft.add(f"layers.{number}.heads.{n}.scale")
    found = {}
    for name in missing:
        if name in soft:
            raise ValueError(
                f"{where}: {name}: missing; softmax heads need it, or --scores: plain (query . key)"
                " or scaled (divided by the root of their rows)"
            )
        first = re.sub(r"heads\.\d+", "heads.0", name)
        found[name] = own.get(name, own[first])
    return found


def _check(
    given: Mapping[str, np.ndarray], shapes: Mapping[str, Any], config: Config, where: str
) -> None:
    """ValueError, in one line, for names and shapes that are not those of the model."""
    lines = [f"{name}: missing" for name in shapes if name not in given]
    for name in given:
        if name in shapes:
            continue
        part = name.rpartition(".")[0]
        known = sorted(n.rpartition(".")[2] for n in shapes if n.rpartition(".")[0] == part)
        has = f"{part} has {', '.join(known)}" if known else f"the model has no {part or 'such'}"
        lines.append(f"{name}: not in the model of these settings: {has}")
    for name, shape in shapes.items():
        found = np.shape(given[name]) if name in given else shape
        if found == shape:
            continue
        said = f"{name}: shape {list(found)}, must be {list(shape)}"
        if found == shape[::-1]:
            said += "; it looks transposed, as torch's Linear keeps it: give --transposed"
        lines.append(said)
    for name, array in given.items():
        if name in shapes and not jnp.issubdtype(np.asarray(array).dtype, jnp.floating):
            lines.append(f"{name}: dtype {np.asarray(array).dtype}, must be a float")
        elif not np.isfinite(np.asarray(array, np.float64)).all():
            lines.append(f"{name}: holds NaN or infinite numbers")
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ValueError(f"{where}: {lines[0]}{more}")


def _check_seen(
    said: Mapping[str, np.ndarray], filled: Any, places: Mapping[str, Any], where: str
) -> None:
    """ValueError where a file says that a head sees other tokens than the family has it."""
    for name, array in said.items():
        head, _, kind = name.rpartition(".")
        if f"{head}.query" not in places:
            raise ValueError(f"{where}: {name}: the model of these settings has no such head")
        keys, index = places[f"{head}.query"]
        own = _at(filled, keys[:-1])[kind][index]
        if np.shape(array) != own.shape or not np.array_equal(array, own):
            raise ValueError(
                f"{where}: {name}: {np.asarray(array).tolist()}, a head of these settings has "
                f"{own.tolist()}: it sees other tokens"
            )


def _wired(base: Transformer, config: Config, dtype: Any, where: str) -> dict[str, Any]:
    """Arrays of 0 of that shape, with what heads of `base` see."""

    def zeros(shapes: Any) -> Any:
        if isinstance(shapes, tuple):
            return np.zeros(shapes, dtype)
        return {name: zeros(shape) for name, shape in shapes.items()}

    filled, theirs = zeros(config.shapes()), base.arrays()
    for s, segment in enumerate(config.segments):
        for p in range(len(segment.pattern)):
            old = theirs["segments"][s]["layers"][p].get("heads", {})
            for row, w in filled["segments"][s]["layers"][p].get("heads", {}).items():
                for name in _SEEN:
                    seen = np.asarray(old[row][name])
                    if seen.shape != w[name].shape:
                        if (seen != seen[:, :1]).any():
                            raise ValueError(
                                f"{where}: the heads of a layer of these settings see different "
                                f"tokens, so there must be {seen.shape[1]} of them"
                            )
                        seen = np.repeat(seen[:, :1], w[name].shape[1], axis=1)
                    w[name] = np.array(seen)
    return filled
