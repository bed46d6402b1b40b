"""What a program must satisfy: every read finds a value, and every write a free place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from constructions.core.layer import ACTIVATIONS, MIXERS
from constructions.core.program import SELF, HeadFamily, Layer, Program
from constructions.core.slots import Slot

Groups = Sequence[str] | None


class ProgramError(ValueError):
    """A program that cannot be compiled; the message names the layer, the head and the slot."""


def check(program: Program) -> None:
    """Raise `ProgramError` unless every read finds a value and every write finds a free place."""
    checker = _Checker(program)
    for number, layer in program.unrolled():
        label = f"layer {number}" + (f" ({layer.name})" if layer.name else "")
        if layer.norm is not None:  # acts before the heads, which see what it wrote
            where = f"{label}, norm"
            groups = layer.norm.token_groups
            checker.read(layer.norm.read, groups, number, where)
            checker.write([(layer.norm.write, where, groups)], set(), number)
        erased = checker.erased(layer, label)
        for head in layer.heads:
            where = f"{label}, head '{head.name}'"
            if head.mixer not in MIXERS:
                raise ProgramError(
                    f"{where}: unknown mixer '{head.mixer}', must be one of {sorted(MIXERS)}"
                )
            for part, slot, groups in head.reads():
                checker.read(slot, groups, number, f"{where}, {part}")
        writes = [
            (slot, f"{label}, head '{head.name}'", head.queries)
            for head in layer.heads
            for slot in head.writes()
            if slot != head.erases
        ]
        checker.write(writes, erased, number)
        if layer.mlp is not None:
            where = f"{label}, mlp '{layer.mlp.name}'"
            if layer.mlp.activation not in ACTIVATIONS:
                raise ProgramError(
                    f"{where}: unknown activation '{layer.mlp.activation}', "
                    f"must be one of {sorted(ACTIVATIONS)}"
                )
            parts = [layer.mlp.hidden] + ([layer.mlp.gate] if layer.mlp.gate is not None else [])
            for slot in {slot: None for part in parts for slot in part.terms}:
                checker.read(slot, layer.mlp.token_groups, number, where)
            writes = [(slot, where, layer.mlp.token_groups) for slot in layer.mlp.write]
            checker.write(writes, set(), number)


class _Checker:
    """What has been written so far, and at which layer."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.groups = frozenset(program.token_groups)
        self.written = {slot: 0 for slot in program.slots if slot.born == 0}
        self.rivals = _rivals(program)

    def erased(self, layer: Layer, label: str) -> set[Slot]:
        """Slots that the heads of a layer clear at all of their tokens."""
        seen: set[Slot] = set()
        whole: set[Slot] = set()
        for head in layer.heads:
            if isinstance(head, HeadFamily) or head.erases is None:
                continue
            slot, where = head.erases, f"{label}, head '{head.name}'"
            self.declared(slot, head.queries, where)
            if slot in seen:
                raise ProgramError(f"{where}: {slot} is erased twice")
            left = head.value + slot
            if head.window != SELF or any(m.any() for m in left.terms.values()):
                raise ProgramError(f"{where} erases nothing; see `program.erase`")
            seen.add(slot)
            if set(slot.token_groups or self.groups).issubset(head.queries or self.groups):
                whole.add(slot)
        return whole

    def read(self, slot: Slot, groups: Groups, layer: int, where: str) -> None:
        """A read of a slot at tokens of these kinds."""
        self.declared(slot, groups, where)
        if slot not in self.written:
            raise ProgramError(f"{where}: {slot} is read before it is written")
        if slot.dies is not None and layer > slot.dies:
            raise ProgramError(f"{where}: {slot} died at layer {slot.dies}")
        if self.outside(slot, groups):
            raise ProgramError(
                f"{where}: {slot} is read at tokens {groups or self.program.token_groups}, "
                f"it lives on {slot.token_groups}"
            )

    def write(
        self, writes: Iterable[tuple[Slot, str, Groups]], erased: set[Slot], layer: int
    ) -> None:
        """Writes (slot, by whom, at which tokens) that happen at once; marks them as written."""
        written = self.written
        for slot in erased:
            written.pop(slot, None)
        fresh: dict[Slot, str] = {}
        for slot, where, groups in writes:
            self.declared(slot, groups, where)
            if self.outside(slot, groups):
                raise ProgramError(
                    f"{where}: writes outside {slot}, which lives on token groups "
                    f"{slot.token_groups} only"
                )
            if layer < slot.born or (slot.dies is not None and layer > slot.dies):
                raise ProgramError(
                    f"{where}: writes {slot} at layer {layer}; it is alive from {slot.born} "
                    f"to {'the end' if slot.dies is None else slot.dies}"
                )
            if slot in written and not slot.accumulates:
                raise ProgramError(
                    f"{where}: overwrites {slot}, written at layer {written[slot]}; erase it "
                    "first or declare it with accumulates=True"
                )
            other = next((s for s in self.rivals[slot] if s in written or s in fresh), None)
            if other is not None:
                raise ProgramError(
                    f"{where}: {slot} takes the columns of {other}, which was not erased"
                    + (" (both are written here)" if other in fresh else "")
                )
            fresh[slot] = where
        written.update(dict.fromkeys(fresh, layer))

    def outside(self, slot: Slot, groups: Groups) -> bool:
        """Whether some token of these kinds does not own the slot."""
        return slot.token_groups is not None and not set(slot.token_groups).issuperset(
            groups or self.groups
        )

    def declared(self, slot: Slot, groups: Groups, where: str) -> None:
        """A slot of this program, at kinds of tokens that it has."""
        if slot not in self.program.slots:
            raise ProgramError(f"{where}: {slot} is not a slot of this program")
        for group in (*(groups or ()), *(slot.token_groups or ())):
            if group not in self.groups:
                raise ProgramError(
                    f"{where}: unknown token group '{group}', must be one of "
                    f"{self.program.token_groups}"
                )


def _rivals(program: Program) -> Mapping[Slot, list[Slot]]:
    """{slot: the others that share a column with it at some token}."""
    slots = list(program.slots)
    starts = np.array([s.start for s in slots])
    stops = np.array([s.start + s.size for s in slots])
    result = {}
    for n, slot in enumerate(slots):
        near = np.flatnonzero((starts < stops[n]) & (stops > starts[n]))
        result[slot] = [slots[m] for m in near.tolist() if m != n and slots[m].meets(slot)]
    return result
