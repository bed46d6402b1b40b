"""From a program to the weights of a transformer.

    check(program)                     every read finds a value, every write a free place
    shape = config_of(program)         one group of equal heads per (mixer, key rows, value rows)
    weights = fill(program, shape)     each head's affine maps, at the columns of its slots
    Transformer(shape, weights)

A program may also be compiled into a larger `Config` than it needs; the spare heads are zero.
`constructions.core.softmax.soften` rewrites a program of linear heads into one of softmax heads.

`untrained` makes a model without a program: a shape with every head wired alike, to be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.core.checks import ProgramError, check
from constructions.core.config import (
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
    TokensConfig,
)
from constructions.core.program import (
    EVERYWHERE,
    Head,
    HeadFamily,
    Layer,
    Mlp,
    Norm,
    Program,
    Window,
    token_names,
)
from constructions.core.slots import Affine
from constructions.core.transformer import Transformer

__all__ = ["ProgramError", "compile_program", "config_of", "fill", "untrained"]

FAR = 2**30  # a window bound that no sequence reaches


def compile_program(
    program: Program, dtype: Any = None, config: Config | None = None
) -> Transformer:
    """Compile a program into dense weights of the one `Transformer`.

    Args:
        program: the tableau.
        dtype: of the weights; None takes JAX's default float.
        config: compile into this shape instead of the smallest one.

    Raises:
        ValueError: dtype is not a float, or is float64 where x64 is off.
        ProgramError: a slot is read before it is written, written twice without `accumulates` or
            an erase, read or written where it does not live, a head does not fit `config`, or
            `config` has what no program has (gates, a final norm).
    """
    check(program)
    shape = config_of(program) if config is None else config
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype}, must be a floating point type")
    if dtype == jnp.float64 and jnp.result_type(float) != jnp.float64:
        raise ValueError(
            "dtype is float64, which JAX has only where x64 is on: jax.enable_x64(True)"
        )
    return Transformer(shape, _cast(fill(program, shape), dtype))


def config_of(program: Program) -> Config:
    """The smallest shape that holds the program; equal layers in a row are scanned."""
    layers = [_layer_config(layer) for layer in program.layers]
    if program.loops > 1:
        segments = [SegmentConfig(tuple(layers), program.loops, tied=True)]
    else:
        segments = [SegmentConfig((layer,), len(list(run))) for layer, run in groupby(layers)]
    tables = [next(iter(t.values())) for t in (program.embedding, program.readout) if t]
    tokens = TokensConfig(*map(len, tables), probabilities="shares") if tables else None
    return Config(program.slots.width, tuple(segments), program.token_groups, tokens=tokens)


def _layer_config(layer: Layer) -> LayerConfig:
    groups: dict[tuple[str, int, int, int], list[tuple[int, bool]]] = {}
    for part in layer.heads:
        if isinstance(part, HeadFamily):  # sizes are known without writing its heads out
            groups.setdefault(("linear", part.rows, 1, 0), []).append((part.write.size, True))
        else:
            sizes = (part.mixer, part.key.size, part.value.size, part.factor_dim)
            groups.setdefault(sizes, []).append((1, _has_bias(part)))
    return LayerConfig(
        heads=tuple(
            HeadsConfig(
                mixer, sum(n for n, _ in parts), k, v, bias=any(b for _, b in parts), factor_dim=f
            )
            for (mixer, k, v, f), parts in groups.items()
        ),
        mlp=None if layer.mlp is None else _mlp_config(layer.mlp),
        norm=None if layer.norm is None else _norm_config(layer.norm),
    )


def _has_bias(head: Head) -> bool:
    return any(e.constant.any() for e in (head.query, head.key, head.value, *(head.factor or ())))


def _mlp_config(mlp: Mlp) -> MlpConfig:
    parts = [mlp.hidden] + ([mlp.gate] if mlp.gate is not None else [])
    bias = any(part.constant.any() for part in parts)
    return MlpConfig(
        mlp.hidden.size, mlp.activation, mlp.gate is not None, bias, token_names(mlp.token_groups)
    )


def _norm_config(norm: Norm) -> NormConfig:
    read, write = ((s.start, s.start + s.size) for s in (norm.read, norm.write))
    return NormConfig(norm.kind, norm.eps, False, read, write, token_names(norm.token_groups))


def fill(program: Program, config: Config) -> dict[str, Any]:
    """Weights for `config`, nested as `config.shapes()`, in float64."""
    arrays = _zeros(config.shapes())
    depth = sum(len(s.pattern) * s.stacked for s in config.segments)
    if depth != len(program.layers) or config.width < program.slots.width:
        raise ProgramError(
            f"program '{program.name}' has {len(program.layers)} layers of width "
            f"{program.slots.width}; the config has {depth} of width {config.width}"
        )
    if _order(config) != list(range(depth)) * program.loops:
        raise ProgramError(
            f"program '{program.name}' runs {program.loops} loops of {depth} layers; the config "
            f"applies its stored layers in the order {_order(config)}"
        )
    if config.token_groups[: len(program.token_groups)] != program.token_groups:
        raise ProgramError(
            f"token groups of the config are {config.token_groups}, must begin with "
            f"{program.token_groups}"
        )
    if config.final_norm is not None:
        raise ProgramError(f"the config ends in {config.final_norm}, which no program has")
    for number, layer in enumerate(config.layers(), start=1):
        if any(heads.gates for heads in layer.heads):
            raise ProgramError(f"layer {number} of the config has gates, which no program has")
    layers = iter(enumerate(program.layers, start=1))
    for s, segment in enumerate(config.segments):
        for r in range(segment.stacked):
            for p, shape in enumerate(segment.pattern):
                number, layer = next(layers)
                _fill_layer(
                    layer, shape, arrays["segments"][s]["layers"][p], r, config, f"layer {number}"
                )
    for name in ("embedding", "readout"):
        for slot, m in getattr(program, name).items():
            table = arrays.get("tokens", {}).get(name)
            if table is None or len(table) < len(m):
                raise ProgramError(f"the {name} has {len(m)} rows, the config {config.tokens}")
            table[: len(m), slot.columns] = m
    return arrays


def _fill_layer(
    layer: Layer, shape: LayerConfig, arrays: Any, r: int, config: Config, where: str
) -> None:
    for head, row, n in placed_heads(layer, shape, where):
        _fill_head(head, arrays["heads"][row], (r, n), config)
    if layer.mlp is not None:
        if shape.mlp is None or not _fits(_mlp_config(layer.mlp), shape.mlp):
            raise ProgramError(f"{where}, mlp '{layer.mlp.name}' does not fit into {shape.mlp}")
        _fill_mlp(layer.mlp, arrays["mlp"], r)
    norm = None if layer.norm is None else _norm_config(layer.norm)
    if shape.norm != norm or shape.mlp_norm is not None:
        raise ProgramError(
            f"{where}: needs norm {norm} and no norm before the MLP, the config has {shape.norm} "
            f"and {shape.mlp_norm}"
        )


def _order(config: Config) -> list[int]:
    """Which stored layer is applied at each place of the depth."""
    order, first = [], 0
    for segment in config.segments:
        size = len(segment.pattern)
        for repeat in range(segment.repeats):
            start = first if segment.tied else first + repeat * size
            order += range(start, start + size)
        first += segment.stacked * size
    return order


def placed_heads(layer: Layer, shape: LayerConfig, where: str) -> Iterator[tuple[Head, int, int]]:
    """Every head of a layer, the row of equal heads that it goes to, and its place there.

    ProgramError where one does not fit.
    """
    used = [0] * len(shape.heads)
    for head in layer.single_heads:
        row = _place_head(head, shape.heads, used)
        if row is None:
            raise ProgramError(
                f"{where}, head '{head.name}' (mixer {head.mixer}, {head.key.size} key rows, "
                f"{head.value.size} value rows) does not fit into the heads {shape.heads}"
            )
        yield head, row, used[row]
        used[row] += 1


def _place_head(head: Head, groups: Sequence[HeadsConfig], used: list[int]) -> int | None:
    """The smallest group of heads with room for this one."""
    fits = [
        (group.key_dim + group.value_dim, n)
        for n, group in enumerate(groups)
        if group.mixer == head.mixer
        and group.key_dim >= head.key.size
        and group.value_dim >= head.value.size
        and group.factor_dim >= head.factor_dim
        and bool(group.factor_dim) == bool(head.factor_dim)
        and (group.bias or not _has_bias(head))
        and used[n] < group.heads
    ]
    return min(fits)[1] if fits else None


def _fits(small: MlpConfig, large: MlpConfig) -> bool:
    return (
        small.hidden <= large.hidden
        and (small.activation, small.gated, small.tokens)
        == (large.activation, large.gated, large.tokens)
        and small.bias <= large.bias
    )


def _fill_head(head: Head, arrays: Any, at: tuple[int, int], config: Config) -> None:
    for name, expr in (("query", head.query), ("key", head.key), ("value", head.value)):
        _fill_affine(arrays, name, at, expr)
    for name, expr in zip(("factor_query", "factor_key"), head.factor or (), strict=False):
        _fill_affine(arrays, name, at, expr)
    for slot, m in head.write.items():
        m.add_to(arrays["output"][at][slot.columns, : head.value.size])
    arrays["scale"][at] = head.scale
    if head.regularization is not None:
        arrays["log_regularization"][at] = np.log(head.regularization)
    low, high = head.window
    arrays["window"][at] = (-FAR if low is None else low, FAR if high is None else high)
    for name, groups in (("query_groups", head.queries), ("key_groups", head.keys)):
        arrays[name][at] = [groups is None or g in groups for g in config.token_groups]
    arrays["sink_groups"][at] = [g in head.sinks for g in config.token_groups]


def _fill_affine(arrays: Any, name: str, at: int | tuple[int, ...], expr: Affine) -> None:
    for slot, m in expr.terms.items():
        m.add_to(arrays[name][at][: expr.size, slot.columns])
    if f"{name}_bias" in arrays:
        arrays[f"{name}_bias"][at][: expr.size] = expr.constant


def _fill_mlp(mlp: Mlp, arrays: Any, r: int) -> None:
    _fill_affine(arrays, "hidden", r, mlp.hidden)
    if mlp.gate is not None:
        _fill_affine(arrays, "gate", r, mlp.gate)
    for slot, m in mlp.write.items():
        m.add_to(arrays["output"][r][slot.columns, : mlp.hidden.size])


def _map(function: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    if isinstance(tree, dict):
        return {key: _map(function, value, str(key)) for key, value in tree.items()}
    return function(name, tree)


def _zeros(shapes: Any) -> Any:
    kinds = {"window": np.int32, "query_groups": bool, "key_groups": bool, "sink_groups": bool}
    return _map(lambda name, shape: np.zeros(shape, kinds.get(name, np.float64)), shapes)


def _cast(arrays: Any, dtype: Any) -> Any:
    # device_put moves an array; jnp.asarray would compile a program for each shape
    return _map(
        lambda _, a: jax.device_put(a.astype(dtype) if a.dtype == np.float64 else a), arrays
    )


def untrained(
    config: Config, window: Window = EVERYWHERE, keys: Sequence[str] | None = None
) -> Transformer:
    """An untrained transformer of this shape: every weight is 0, `randomise` draws them.

    Scores of softmax heads are divided by sqrt(key_dim), others are left alone.

    Args:
        config: the shape.
        window: of every head; `constructions.core.program.CAUSAL` for a model of sequences.
        keys: kinds of tokens that heads attend to, at least one; all of `config.token_groups` if
            None.

    Raises:
        ValueError: `keys` is empty, or has a kind of token that the config does not have.
    """
    groups = config.token_groups
    if keys is not None and not keys:
        raise ValueError(f"keys is {keys!r}, must be None or some of {groups}")
    for name in keys or ():
        if name not in groups:
            raise ValueError(f"keys holds {name!r}, must be some of {groups}")
    low, high = window
    bounds = [-FAR if low is None else low, FAR if high is None else high]
    visible = [keys is None or group in keys for group in groups]

    def filled(shape: tuple[int, ...], value: Any) -> Array:
        # by numpy: nothing is compiled for it
        return jax.device_put(np.full(shape, value))

    def wired(heads: HeadsConfig, shapes: Any) -> dict[str, Array]:
        wiring = {
            "scale": heads.key_dim**-0.5 if heads.mixer == "softmax" else 1.0,
            "window": np.asarray(bounds, np.int32),
            "query_groups": True,
            "key_groups": np.asarray(visible),
            "sink_groups": False,
        }
        return {name: filled(shape, wiring.get(name, 0.0)) for name, shape in shapes.items()}

    def zeros(shapes: Any) -> Any:
        if isinstance(shapes, tuple):
            return filled(shapes, 0.0)
        return {name: zeros(shape) for name, shape in shapes.items()}

    shapes = config.shapes()
    arrays = zeros(shapes)
    for s, segment in enumerate(config.segments):
        for p, layer in enumerate(segment.pattern):
            heads = shapes["segments"][s]["layers"][p]["heads"]
            found = {n: wired(group, heads[n]) for n, group in enumerate(layer.heads)}
            arrays["segments"][s]["layers"][p]["heads"] = found
    return Transformer(config, arrays)
