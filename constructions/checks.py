"""What a program must satisfy: every read finds a value, and every write a free place."""

from __future__ import annotations

from collections.abc import Sequence

from constructions.layer import ACTIVATIONS
from constructions.mixers import MIXERS
from constructions.program import SELF, HeadFamily, Layer, Program
from constructions.slots import Slot


class ProgramError(ValueError):
    """A program that cannot be compiled; the message names the layer, the head and the slot."""


def check(program: Program) -> None:
    """Raise `ProgramError` unless every read finds a value and every write finds a free place."""
    written = {slot: 0 for slot in program.slots if slot.born == 0}
    for number, layer in program.unrolled():
        label = f"layer {number}" + (f" ({layer.name})" if layer.name else "")
        if layer.norm is not None:  # acts before the heads, which see what it wrote
            where = f"{label}, norm"
            groups = layer.norm.tokens
            _check_read(program, layer.norm.read, groups, written, number, where)
            _check_writes(program, [(layer.norm.write, where, groups)], written, set(), number)
        erased = _erased(program, layer, label)
        for head in layer.heads:
            where = f"{label}, head '{head.name}'"
            if head.mixer not in MIXERS:
                raise ProgramError(
                    f"{where}: unknown mixer '{head.mixer}', must be one of {sorted(MIXERS)}"
                )
            for part, slot, groups in head.reads():
                _check_read(program, slot, groups, written, number, f"{where}, {part}")
        writes = [
            (slot, f"{label}, head '{head.name}'", head.queries)
            for head in layer.heads
            for slot in head.writes()
            if slot != head.erases
        ]
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
                _check_read(program, slot, layer.mlp.tokens, written, number, where)
            writes = [(slot, where, layer.mlp.tokens) for slot in layer.mlp.write]
            _check_writes(program, writes, written, set(), number)


def _erased(program: Program, layer: Layer, label: str) -> set[Slot]:
    """Slots that the heads of a layer clear at all of their tokens."""
    seen: set[Slot] = set()
    whole: set[Slot] = set()
    for head in layer.heads:
        if isinstance(head, HeadFamily) or head.erases is None:
            continue
        slot = head.erases
        _check_declared(program, slot, head.queries, f"{label}, head '{head.name}'")
        if slot in seen:
            raise ProgramError(f"{label}, head '{head.name}': {slot} is erased twice")
        if head.window != SELF or (head.value + slot).matrix(program.slots.width).any():
            raise ProgramError(f"{label}, head '{head.name}' erases nothing; see `program.erase`")
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
    writes: Sequence[tuple[Slot, str, Sequence[str] | None]],
    written: dict[Slot, int],
    erased: set[Slot],
    layer: int,
) -> None:
    """Writes (slot, by whom, at which tokens) that happen at once; then marks them as written."""
    for slot in erased:
        written.pop(slot, None)
    fresh: dict[Slot, str] = {}
    for slot, where, groups in writes:
        _check_declared(program, slot, groups, where)
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
