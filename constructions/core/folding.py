"""A program with what repeats shown once, for people: as text and, in `picture`, drawn.

Parts of one layer that differ in numbers only are one item, and neighbouring layers that do are one
stage. Of a program of more than `MOST_LANES` slots, slots whose names differ in numbers only are
one lane, and layers are put together by their names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from constructions.core.equations import Part, merged, parts_of, short, skeleton
from constructions.core.slots import Slot

MOST_LANES = 16


@dataclass
class Lane:
    """A slot, or slots whose names differ in numbers only.

    Attributes:
        slots: in the order of the stream.
        first: the stage that writes it first, None where the embedding does.
    """

    slots: list[Slot]
    first: int | None = None

    @property
    def name(self) -> str:
        """As in equations."""
        return merged([short(slot.name) for slot in self.slots])

    @property
    def prefix(self) -> str:
        """What stands in front of a colon in the names."""
        return merged([slot.name for slot in self.slots]).rpartition(": ")[0]

    @property
    def size(self) -> str:
        """Columns, as text."""
        sizes = sorted({slot.size for slot in self.slots})
        shown = "…".join(dict.fromkeys(map(str, (sizes[0], sizes[-1]))))
        count = f"{len(self.slots)} slots of " if len(self.slots) > 1 else ""
        return f"{count}{shown} column{'' if sizes == [1] else 's'}"

    @property
    def groups(self) -> str:
        """The tokens that own it."""
        if any(slot.token_groups is None for slot in self.slots):
            return "all tokens"
        names = dict.fromkeys(g for slot in self.slots for g in slot.token_groups or ())
        return ", ".join(alike(names))

    @property
    def meaning(self) -> str:
        """What it holds."""
        said = [slot.meaning for slot in self.slots]
        return merged(said) if len({skeleton(text) for text in said}) == 1 else ""


def alike(names: Iterable[str]) -> list[str]:
    """Names, those that differ in numbers only as one."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(skeleton(name), []).append(name)
    return [merged(same) for same in found.values()]


@dataclass
class Item:
    """Parts that are shown as one."""

    kind: str
    parts: list[Part]
    number: int = 0

    @property
    def name(self) -> str:
        """Of all of them."""
        return merged([part.name for part in self.parts])

    @property
    def equations(self) -> list[str]:
        """Of those with the most to say."""
        longest = max(self.parts, key=lambda part: len("".join(map(skeleton, part.equations))))
        key = list(map(skeleton, longest.equations))
        same = [p.equations for p in self.parts if list(map(skeleton, p.equations)) == key]
        found = [merged(lines) for lines in zip(*same, strict=True)]
        for n, line in enumerate(found):  # parts with less to say write as well
            place, _, value = line.partition(" += ")
            places = [p.equations[n].partition(" += ")[0] for p in self.parts if p.equations[n:]]
            same_place = [other for other in places if skeleton(other) == skeleton(place)]
            found[n] = f"{merged(same_place or [place])} += {value}"
        return found

    @property
    def where(self) -> str:
        """Which tokens i and j are."""
        return "; ".join(alike(dict.fromkeys(part.where for part in self.parts)))

    @property
    def heads(self) -> int:
        """How many heads they are together."""
        return sum(part.heads for part in self.parts)


@dataclass
class Stage:
    """Layers that are shown as one.

    Attributes:
        layers: their numbers, from 1.
        names: of those that have one.
        items: what they consist of.
    """

    layers: list[int]
    names: list[str]
    items: list[Item] = field(default_factory=list)

    @property
    def title(self) -> str:
        """ "layers 1…3, inside 2…4"."""
        name, n = merged(self.names) if self.names else "", self.layers
        if len(n) == 1:
            numbers = f"layer {n[0]}"
        elif n[-1] - n[0] == len(n) - 1:
            numbers = f"layers {n[0]}…{n[-1]}"
        elif len(n) < 4:
            numbers = f"layers {', '.join(map(str, n))}"
        else:
            numbers = f"{len(n)} layers, {n[0]}…{n[-1]}"
        return f"{numbers}: {name}" if name else numbers


@dataclass
class Folded:
    """A program as `equations` and `picture` show it."""

    lanes: dict[str, Lane]
    stages: list[Stage]
    folds: bool

    def lane(self, slot: Slot) -> str:
        """The key of a slot's lane."""
        return skeleton(slot.name) if self.folds else slot.name

    @property
    def items(self) -> list[Item]:
        """Of all stages, numbered from 1."""
        return [item for stage in self.stages for item in stage.items]


def folded(program: Any) -> Folded:
    """The program with what repeats shown once."""
    slots = list(program.slots)
    found = Folded({}, [], len(slots) > MOST_LANES)
    for slot in slots:
        found.lanes.setdefault(found.lane(slot), Lane([])).slots.append(slot)
    layers = [(n, layer, parts_of(layer)) for n, layer in enumerate(program.layers, start=1)]
    by_key: dict[Any, Stage] = {}
    last = None
    for n, layer, parts in layers:
        if found.folds:
            key: Any = skeleton(layer.name) or n
        else:
            key = [(p.kind, skeleton(p.name), list(map(skeleton, p.equations))) for p in parts]
            key = repr((skeleton(layer.name), key))
            if key != last:
                by_key.pop(key, None)  # only neighbours are put together
            last = key
        if key not in by_key:
            by_key[key] = Stage([], [])
            found.stages.append(by_key[key])
        stage = by_key[key]
        stage.layers.append(n)
        stage.names += [layer.name] if layer.name else []
        for part in parts:
            writes = sorted({found.lane(slot) for slot in part.writes})
            same = [
                item
                for item in stage.items
                if item.kind == part.kind
                and skeleton(item.parts[0].name) == skeleton(part.name)
                and sorted({found.lane(slot) for slot in item.parts[0].writes}) == writes
            ]
            if same:
                same[0].parts.append(part)
            else:
                stage.items.append(Item(part.kind, [part]))
    for number, item in enumerate(found.items, start=1):
        item.number = number
    for lane in found.lanes.values():
        if all(slot.born for slot in lane.slots):
            born = min(slot.born for slot in lane.slots)
            holds = [n for n, stage in enumerate(found.stages) if born in stage.layers]
            lane.first = holds[0] if holds else None
    return found


def headline(program: Any, name: str = "") -> str:
    """Name and sizes of a program."""
    heads = sum(len(layer.single_heads) for layer in program.layers)
    counts = ((program.depth, "layer"), (heads, "head"), (program.slots.width, "column"))
    sizes = ", ".join(f"{n} {what}{'' if n == 1 else 's'}" for n, what in counts)
    looped = f"; {program.loops} times the same weights" if program.loops > 1 else ""
    return f"{name or program.name}: {sizes}{looped}"


def text(program: Any, name: str = "") -> str:
    """The slots, then what every layer adds to them."""
    found = folded(program)
    lines = [headline(program, name)]
    lines += [f"tokens: {', '.join(alike(program.token_groups))}", "", "slots"]
    names = {key: lane.name for key, lane in found.lanes.items()}
    width = min(max(map(len, names.values())), 32)
    for key, lane in found.lanes.items():
        facts = [lane.size, lane.groups, lane.prefix, lane.meaning]
        lines.append(f"  {names[key]:<{width}}  {'; '.join(filter(None, facts))}")
    for stage in found.stages:
        lines += ["", stage.title]
        for item in stage.items:
            heads = f"{item.heads} heads, " if item.heads > 1 else ""
            kind = item.kind if item.kind in ("MLP", "norm") else f"{item.kind} attention"
            lines.append(f"  {item.name} ({heads}{kind})")
            lines += [f"    {line}" for line in item.equations]
            lines += [f"      {item.where}"] if item.where else []
    return "\n".join(lines)
