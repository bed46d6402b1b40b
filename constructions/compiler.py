"""From a program to the weights of a transformer.

    check(program)                     every read finds a value, every write a free place
    shape = config_of(program)         one group of equal heads per (mixer, key rows, value rows)
    weights = fill(program, shape)     each head's affine maps, at the columns of its slots
    Transformer(shape, weights)

A program may also be compiled into a larger `Config` than it needs; the spare heads are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import jax.numpy as jnp
import numpy as np

from constructions.config import (
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
)
from constructions.mixers import MIXERS
from constructions.program import Head, Layer, Mlp, Norm, Program
from constructions.slots import Affine, Slot
from constructions.transformer import ACTIVATIONS, Transformer

FAR = 2**30  # a window bound that no sequence reaches


class ProgramError(ValueError):
    """A program that cannot be compiled; the message names the layer, the head and the slot."""


def compile_program(
    program: Program, dtype: Any = None, config: Config | None = None
) -> Transformer:
    """Compile a program into dense weights of the one `Transformer`.

    Args:
        program: the tableau.
        dtype: of the weights; None takes JAX's default float.
        config: compile into this shape instead of the smallest one.

    Raises:
        ProgramError: a slot is read before it is written, written twice without `accumulates` or
            an erase, read or written where it does not live, or a head does not fit `config`.
    """
    check(program)
    shape = config_of(program) if config is None else config
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype}, must be a floating point type")
    return Transformer(shape, _cast(fill(program, shape), dtype))


def check(program: Program) -> None:
    """Raise `ProgramError` unless every read finds a value and every write finds a free place."""
    written = {slot: 0 for slot in program.slots if slot.born == 0}
    for number, layer in program.unrolled():
        label = f"layer {number}" + (f" ({layer.name})" if layer.name else "")
        if layer.norm is not None:  # acts before the heads, which see what it wrote
            where = f"{label}, norm"
            _check_read(program, layer.norm.read, None, written, number, where)
            _check_writes(program, [(layer.norm.write, where, None)], written, set(), number)
        erased = _erased(program, layer, label)
        for head in layer.heads:
            where = f"{label}, head '{head.name}'"
            if head.mixer not in MIXERS:
                raise ProgramError(
                    f"{where}: unknown mixer '{head.mixer}', must be one of {sorted(MIXERS)}"
                )
            for part, slot, groups in head.reads():
                _check_read(program, slot, groups, written, number, f"{where}, {part}")
        writes = [(slot, f"{label}, head '{h.name}'", h) for h in layer.heads for slot in h.write]
        _check_writes(program, writes, written, erased, number)
        if layer.mlp is not None:
            where = f"{label}, mlp '{layer.mlp.name}'"
            if layer.mlp.activation not in ACTIVATIONS:
                raise ProgramError(
                    f"{where}: unknown activation '{layer.mlp.activation}', "
                    f"must be one of {sorted(ACTIVATIONS)}"
                )
            parts = [layer.mlp.hidden] + ([layer.mlp.gate] if layer.mlp.gate is not None else [])
            for slot in {slot: None for part in parts for slot in part.terms}:
                _check_read(program, slot, None, written, number, where)
            _check_writes(
                program, [(slot, where, None) for slot in layer.mlp.write], written, set(), number
            )


def _erased(program: Program, layer: Layer, label: str) -> set[Slot]:
    """Slots that the heads of a layer clear at all of their tokens."""
    seen: set[Slot] = set()
    whole: set[Slot] = set()
    for head in layer.heads:
        slot = head.erases
        if slot is None:
            continue
        if slot in seen:
            raise ProgramError(f"{label}, head '{head.name}': {slot} is erased twice")
        seen.add(slot)
        if {*(slot.tokens or program.token_groups)} <= {*(head.queries or program.token_groups)}:
            whole.add(slot)
    return whole


def _check_read(
    program: Program,
    slot: Slot,
    groups: Sequence[str] | None,
    written: dict[Slot, int],
    layer: int,
    where: str,
) -> None:
    _check_declared(program, slot, groups, where)
    if slot not in written:
        raise ProgramError(f"{where}: {slot} is read before it is written")
    if slot.dies is not None and layer > slot.dies:
        raise ProgramError(f"{where}: {slot} died at layer {slot.dies}")
    if slot.tokens is not None and not {*(groups or program.token_groups)} <= {*slot.tokens}:
        raise ProgramError(
            f"{where}: {slot} is read at tokens {groups or program.token_groups}, "
            f"it lives on {slot.tokens}"
        )


def _check_writes(
    program: Program,
    writes: Sequence[tuple[Slot, str, Head | None]],
    written: dict[Slot, int],
    erased: set[Slot],
    layer: int,
) -> None:
    """Writes of heads that act at the same time; then marks them as written."""
    for slot in erased:
        written.pop(slot, None)
    fresh: dict[Slot, str] = {}
    for slot, where, head in writes:
        groups = None if head is None else head.queries
        _check_declared(program, slot, groups, where)
        if head is not None and head.erases == slot:
            continue
        if slot.tokens is not None and not {*(groups or program.token_groups)} <= {*slot.tokens}:
            raise ProgramError(
                f"{where}: writes outside {slot}, which lives on tokens {slot.tokens} only"
            )
        if layer < slot.born or (slot.dies is not None and layer > slot.dies):
            raise ProgramError(
                f"{where}: writes {slot} at layer {layer}; it is alive from {slot.born} "
                f"to {'the end' if slot.dies is None else slot.dies}"
            )
        if slot in written and not slot.accumulates:
            raise ProgramError(
                f"{where}: overwrites {slot}, written at layer {written[slot]}; erase it first or "
                "declare it with accumulates=True"
            )
        for other in (*written, *fresh):
            columns = max(slot.start, other.start) < min(
                slot.start + slot.size, other.start + other.size
            )
            if other != slot and columns and _meet(slot, other):
                raise ProgramError(
                    f"{where}: {slot} takes the columns of {other}, which was not erased"
                    + (" (both are written here)" if other in fresh else "")
                )
        fresh[slot] = where
    written.update(dict.fromkeys(fresh, layer))


def _check_declared(program: Program, slot: Slot, groups: Sequence[str] | None, where: str) -> None:
    if slot not in program.slots:
        raise ProgramError(f"{where}: {slot} is not a slot of this program")
    for group in (*(groups or ()), *(slot.tokens or ())):
        if group not in program.token_groups:
            raise ProgramError(
                f"{where}: unknown token group '{group}', must be one of {program.token_groups}"
            )


def _meet(a: Slot, b: Slot) -> bool:
    return a.tokens is None or b.tokens is None or bool({*a.tokens} & {*b.tokens})


def config_of(program: Program) -> Config:
    """The smallest shape that holds the program; equal layers in a row are scanned."""
    layers = [_layer_config(layer) for layer in program.layers]
    if program.loops > 1:
        segments = [SegmentConfig(tuple(layers), program.loops, tied=True)]
    else:
        segments = [SegmentConfig((layer,), len(list(run))) for layer, run in groupby(layers)]
    return Config(program.slots.width, tuple(segments), program.token_groups)


def _layer_config(layer: Layer) -> LayerConfig:
    groups: dict[tuple[str, int, int], list[Head]] = {}
    for head in layer.heads:
        groups.setdefault((head.mixer, head.key.size, head.value.size), []).append(head)
    return LayerConfig(
        heads=tuple(
            HeadsConfig(mixer, len(heads), k, v, bias=any(map(_has_bias, heads)))
            for (mixer, k, v), heads in groups.items()
        ),
        mlp=None if layer.mlp is None else _mlp_config(layer.mlp),
        norm=None if layer.norm is None else _norm_config(layer.norm),
    )


def _has_bias(head: Head) -> bool:
    return any(e.constant.any() for e in (head.query, head.key, head.value))


def _mlp_config(mlp: Mlp) -> MlpConfig:
    parts = [mlp.hidden] + ([mlp.gate] if mlp.gate is not None else [])
    bias = any(part.constant.any() for part in parts)
    return MlpConfig(mlp.hidden.size, mlp.activation, mlp.gate is not None, bias)


def _norm_config(norm: Norm) -> NormConfig:
    read, write = ((s.start, s.start + s.size) for s in (norm.read, norm.write))
    return NormConfig(norm.kind, norm.eps, affine=False, read=read, write=write)


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
    layers = iter(enumerate(program.layers, start=1))
    for s, segment in enumerate(config.segments):
        for r in range(segment.stacked):
            for p, shape in enumerate(segment.pattern):
                number, layer = next(layers)
                _fill_layer(
                    layer, shape, arrays["segments"][s]["layers"][p], r, config, f"layer {number}"
                )
    return arrays


def _fill_layer(
    layer: Layer, shape: LayerConfig, arrays: Any, r: int, config: Config, where: str
) -> None:
    used = [0] * len(shape.heads)
    for head in layer.heads:
        place = _place_head(head, shape.heads, used)
        if place is None:
            raise ProgramError(
                f"{where}, head '{head.name}' (mixer {head.mixer}, {head.key.size} key rows, "
                f"{head.value.size} value rows) does not fit into the heads {shape.heads}"
            )
        _fill_head(head, arrays["heads"][place], (r, used[place]), config)
        used[place] += 1
    if layer.mlp is not None:
        if shape.mlp is None or not _fits(_mlp_config(layer.mlp), shape.mlp):
            raise ProgramError(f"{where}, mlp '{layer.mlp.name}' does not fit into {shape.mlp}")
        _fill_mlp(layer.mlp, arrays["mlp"], r, config)
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


def _place_head(head: Head, groups: Sequence[HeadsConfig], used: list[int]) -> int | None:
    """The smallest group of heads with room for this one."""
    fits = [
        (group.key_dim + group.value_dim, n)
        for n, group in enumerate(groups)
        if group.mixer == head.mixer
        and group.key_dim >= head.key.size
        and group.value_dim >= head.value.size
        and (group.bias or not _has_bias(head))
        and used[n] < group.heads
    ]
    return min(fits)[1] if fits else None


def _fits(small: MlpConfig, large: MlpConfig) -> bool:
    return (
        small.hidden <= large.hidden
        and (small.activation, small.gated) == (large.activation, large.gated)
        and small.bias <= large.bias
    )


def _fill_head(head: Head, arrays: Any, at: tuple[int, int], config: Config) -> None:
    for name, expr in (("query", head.query), ("key", head.key), ("value", head.value)):
        _fill_affine(arrays, name, at, expr, config.width)
    for slot, m in head.write.items():
        arrays["output"][at][slot.columns, : head.value.size] += m
    arrays["scale"][at] = head.scale
    low, high = head.window
    arrays["window"][at] = (-FAR if low is None else low, FAR if high is None else high)
    for name, groups in (("query_groups", head.queries), ("key_groups", head.keys)):
        arrays[name][at] = [groups is None or g in groups for g in config.token_groups]


def _fill_affine(
    arrays: Any, name: str, at: int | tuple[int, ...], expr: Affine, width: int
) -> None:
    arrays[name][at][: expr.size] = expr.matrix(width)
    if f"{name}_bias" in arrays:
        arrays[f"{name}_bias"][at][: expr.size] = expr.constant


def _fill_mlp(mlp: Mlp, arrays: Any, r: int, config: Config) -> None:
    _fill_affine(arrays, "hidden", r, mlp.hidden, config.width)
    if mlp.gate is not None:
        _fill_affine(arrays, "gate", r, mlp.gate, config.width)
    for slot, m in mlp.write.items():
        arrays["output"][r][slot.columns, : mlp.hidden.size] += m


def _map(function: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    if isinstance(tree, dict):
        return {key: _map(function, value, str(key)) for key, value in tree.items()}
    return function(name, tree)


def _zeros(shapes: Any) -> Any:
    kinds = {"window": np.int32, "query_groups": bool, "key_groups": bool}
    return _map(lambda name, shape: np.zeros(shape, kinds.get(name, np.float64)), shapes)


def _cast(arrays: Any, dtype: Any) -> Any:
    def cast(name: str, a: np.ndarray) -> Any:
        return jnp.asarray(a.astype(dtype) if a.dtype == np.float64 else a)

    return _map(cast, arrays)
