"""Random programs: slots, heads, families of heads, MLPs and norms, several layers, loops.

What is read has been written and what is written is free, as `constructions.core.checks` wants it,
by a bookkeeping of our own: `Case.plain` says that nothing was left to chance, and a program that
is refused all the same is then a fault.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fuzz.fuzzing import built, numbers
from hypothesis import strategies as st

from constructions.core.program import (
    CAUSAL,
    EVERYWHERE,
    SELF,
    Head,
    HeadFamily,
    Layer,
    Mlp,
    Norm,
    Program,
    erase,
)
from constructions.core.slots import Affine, Slot, Slots, concatenate, constant

MIXERS = ("linear", "softmax", "centred", "mesa", "transposed_softmax")
WINDOWS = (EVERYWHERE, CAUSAL, SELF, (1, 1), (-1, -1), (0, None), (-2, 0), (-1, 1), (None, -1),
           (1, None), (3, 3), (-9, 9))  # fmt: skip
ACTIVATIONS = ("relu", "identity", "gelu", "tanh", "square", "gelu_derivative")
seeds = st.integers(0, 2**16)


@dataclass
class Case:
    """A program with inputs.

    Attributes:
        program: what is run.
        values: of the slots that the embedding writes, zero at tokens that do not own them.
        groups: kinds of tokens, `[batch, token]`.
        shared: whether they are the same in all examples.
        plain: whether our bookkeeping holds for all that is written and read.
    """

    program: Program
    values: dict[str, np.ndarray]
    groups: np.ndarray
    shared: bool
    plain: bool

    def __repr__(self) -> str:
        program = self.program
        lines = [f"groups {self.groups.tolist()} of {program.token_groups}, loops {program.loops}"]
        lines += map(repr, program.slots)
        for number, layer in enumerate(program.layers, 1):
            lines += [f"layer {number}: {part}" for part in _said(layer)]
        return "\n".join(["Case(", *(f"    {line}" for line in lines), ")"])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def _said(layer: Layer) -> list[str]:
    parts = [f"{layer.norm}"] if layer.norm is not None else []
    for head in layer.heads:
        if isinstance(head, HeadFamily):
            terms = [(a.name, b.name, t.tolist()) for a, b, t in head.terms]
            parts.append(f"family {terms} into {head.write.name} {_settings(head)}")
            continue
        rows = ", ".join(f"{n}={_affine(getattr(head, n))}" for n in ("query", "key", "value"))
        more = f"{head.mixer} scale={head.scale} ridge={head.regularization} sinks={head.sinks}"
        factor = "" if head.factor is None else f" factor={[_affine(f) for f in head.factor]}"
        erases = "" if head.erases is None else f" erases {head.erases.name}"
        parts.append(f"{rows} {_written(head.write)} {more}{factor}{erases} {_settings(head)}")
    if layer.mlp is not None:
        gate = "" if layer.mlp.gate is None else f" gate={_affine(layer.mlp.gate)}"
        parts.append(
            f"mlp {layer.mlp.activation} {_affine(layer.mlp.hidden)}{gate} "
            f"{_written(layer.mlp.write)} token_groups={layer.mlp.token_groups}"
        )
    return parts


def _settings(head: Any) -> str:
    return f"queries={head.queries} keys={head.keys} window={head.window}"


def _affine(part: Affine) -> str:
    terms = [f"{np.asarray(m).tolist()} {slot.name}" for slot, m in part.terms.items()]
    return " + ".join([*terms, str(part.constant.tolist())])


def _written(write: Any) -> str:
    return "into " + ", ".join(f"{s.name}: {np.asarray(m).tolist()}" for s, m in write.items())


@dataclass
class _Book:
    """What holds a value at this point, as far as the first run of the layers goes."""

    draw: Any
    slots: list[Slot]
    groups: tuple[str, ...]
    written: set[Slot]
    layer: int = 0
    plain: bool = True

    def names(self, own: Sequence[str] | None) -> set[str]:
        return set(self.groups if own is None else own)

    def covers(self, slot: Slot, at: set[str]) -> bool:
        return slot.token_groups is None or at <= set(slot.token_groups)

    def alive(self, slot: Slot) -> bool:
        return slot.dies is None or self.layer <= slot.dies

    def readable(self, at: set[str]) -> list[Slot]:
        return [s for s in self.slots if s in self.written and self.alive(s) and self.covers(s, at)]

    def writable(self, at: set[str], erased: set[Slot], fresh: set[Slot]) -> list[Slot]:
        taken = self.written - erased
        return [
            s
            for s in self.slots
            if s.born <= self.layer and self.alive(s) and self.covers(s, at)
            and (s not in taken or s.accumulates)
            and not any(share(s, other) for other in taken | fresh if other != s)
        ]  # fmt: skip

    def some(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def chance(self, one_in: int) -> bool:
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    def kinds(self) -> tuple[str, ...] | None:
        """Some token groups; None: all."""
        if len(self.groups) == 1 or not self.chance(2):
            return None
        return tuple(self.draw(st.sets(st.sampled_from(self.groups), min_size=1)))

    def affine(self, at: set[str], rows: int) -> Affine:
        """An affine map of up to two slots that can be read at these tokens."""
        found: Affine | None = None
        sources = self.readable(at)
        for _ in range(self.draw(st.integers(0 if not sources else 1, 2)) if sources else 0):
            term = self.term(self.some(sources), rows)
            found = term if found is None else found + term
        if found is None:
            return constant(*(numbers(self.draw(seeds), rows) + 0.25))
        return found + numbers(self.draw(seeds), rows) if self.chance(4) else found

    def term(self, slot: Slot, rows: int) -> Affine:
        ways = ["dense"]
        if slot.size >= rows:
            ways += ["slice", "slice", "multiple"]
        if slot.size < rows:
            ways += ["below"]
        way = self.some(ways)
        if way == "dense":
            return numbers(self.draw(seeds), rows, slot.size) @ slot
        if way == "below":
            rest = constant(*numbers(self.draw(seeds), rows - slot.size))
            return concatenate(*((slot, rest) if self.chance(2) else (rest, slot)))
        start = self.draw(st.integers(0, slot.size - rows))
        part = slot if slot.size == rows else slot[start : start + rows]
        return part if way == "slice" else self.some((-1.0, 0.5, 2.0)) * part

    def targets(self, at: set[str], rows: int, erased: set[Slot], fresh: set[Slot]) -> dict:
        """Where rows are written, and by which matrices; marks the slots in `fresh`."""
        write: dict[Any, Any] = {}
        for _ in range(1 + self.chance(4)):
            choices = self.writable(at, erased, fresh)
            if not choices:
                break
            slot = self.some(choices)
            place: Affine = slot
            if slot.size > 1 and self.chance(3):
                start = self.draw(st.integers(0, slot.size - 1))
                place = slot[start : self.draw(st.integers(start + 1, slot.size))]
            same = place.size == rows and self.chance(2)
            m = self.some((1.0, -0.5)) if same else numbers(self.draw(seeds), place.size, rows)
            write[place] = m
            fresh.add(slot)
        return write

    def head(self, erased: set[Slot], fresh: set[Slot]) -> Head | None:
        queries, keys = self.kinds(), self.kinds()
        mixer = self.some(MIXERS)
        sinks = ()
        if mixer != "mesa" and self.chance(6):
            sinks = tuple(self.draw(st.sets(st.sampled_from(self.groups), min_size=1)))
        here = self.names(queries)
        there = self.names(keys if keys is None else (*keys, *sinks))
        rows, outputs = (self.draw(st.integers(1, 3)) for _ in range(2))
        write = self.targets(here, outputs, erased, fresh)
        if not write:
            return None
        factor = None
        if mixer != "mesa" and self.chance(5):
            size = self.draw(st.integers(1, 2))
            factor = (self.affine(here, size), self.affine(there, size))
        return Head(
            self.affine(here, rows),
            self.affine(there, rows),
            self.affine(there, outputs),
            write,
            mixer,
            queries,
            keys,
            CAUSAL if mixer == "mesa" else self.some(WINDOWS),
            sinks,
            self.some((1.0, 1.0, 0.5, -1.0)),
            self.some((0.25, 1.0)) if mixer == "mesa" else None,
            factor,
        )

    def family(self, erased: set[Slot], fresh: set[Slot]) -> HeadFamily | None:
        queries, keys = self.kinds(), self.kinds()
        here, there = self.names(queries), self.names(keys)
        write = self.writable(here, erased, fresh)
        lefts, rights = self.readable(here), self.readable(there)
        if not (write and lefts and rights):
            return None
        slot, terms = self.some(write), []
        for _ in range(self.draw(st.integers(1, 2))):
            a, b = self.some(lefts), self.some(rights)
            terms.append((a, b, numbers(self.draw(seeds), slot.size, a.size, b.size)))
            if self.chance(3):  # the same tensor once more, which is stored once
                alike = [s for s in lefts if s.size == a.size]
                terms.append((self.some(alike), b, terms[-1][2]))
        fresh.add(slot)
        return HeadFamily(terms, slot, queries, keys, self.some(WINDOWS))

    def once(self) -> Layer:
        """One layer; afterwards the book stands behind it."""
        norm = self.norm() if self.chance(4) else None
        heads: list[Any] = []
        erased: set[Slot] = set()
        if self.chance(3):
            for slot in self.readable(set()):
                if self.chance(2):
                    heads.append(erase(slot))
                    erased.add(slot)
        fresh: set[Slot] = set()
        for _ in range(self.draw(st.integers(0, 3))):
            part = self.family(erased, fresh) if self.chance(6) else self.head(erased, fresh)
            heads += [] if part is None else [part] * (2 if self.chance(8) else 1)
        self.written = (self.written - erased) | fresh
        mlp = self.mlp() if self.chance(3) or not heads else None
        return Layer(self.draw(st.permutations(heads)), mlp, norm)

    def norm(self) -> Norm | None:
        tokens = self.kinds()
        at = self.names(tokens)
        reads, writes = self.readable(at), self.writable(at, set(), set())
        pairs = [(a, b) for a in reads for b in writes if a.size == b.size]
        if not pairs:
            return None
        read, write = self.some(pairs)
        self.written = self.written | {write}
        return Norm(read, write, self.some(("layer", "rms")), self.some((1e-5, 0.5)), tokens)

    def mlp(self) -> Mlp | None:
        tokens, fresh = self.kinds(), set()
        at, rows = self.names(tokens), self.draw(st.integers(1, 4))
        hidden = self.affine(at, rows)
        gate = self.affine(at, rows) if self.chance(2) else None
        write = self.targets(at, rows, set(), fresh)
        self.written = self.written | fresh
        return Mlp(hidden, write, gate, self.some(ACTIVATIONS), tokens) if write else None


def share(a: Slot, b: Slot) -> bool:
    """Whether two slots have a column in common at some token."""
    apart = (
        a.token_groups is not None
        and b.token_groups is not None
        and not {*a.token_groups} & {*b.token_groups}
    )
    return not apart and a.start < b.start + b.size and b.start < a.start + a.size


@built
def cases(draw: Any) -> Case:
    """Programs with their inputs."""
    groups = ("a", "b", "c")[: draw(st.integers(1, 3))]
    count, loops = draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 1, 2, 3)))
    slots, found = Slots(), []
    for number in range(draw(st.integers(1, 6))):
        born = draw(st.integers(0, count)) if number else 0
        dies = draw(st.one_of(st.none(), st.none(), st.integers(max(born, 1), count + 1)))
        tokens = None
        if len(groups) > 1 and draw(st.booleans()):
            tokens = tuple(draw(st.sets(st.sampled_from(groups), min_size=1)))
        many = draw(st.booleans())
        found.append(
            slots.add(f"s{number}", draw(st.integers(1, 4)), token_groups=tokens, born=born,
                      dies=dies, accumulates=many)
        )  # fmt: skip
    book = _Book(draw, found, groups, {s for s in found if s.born == 0})
    layers: list[Layer] = []
    for number in range(count):
        if layers and book.chance(5):
            layers.append(layers[-1])  # the same layer again, which is scanned
            book.plain = False
            continue
        book.layer = number + 1
        layers.append(book.once())
    program = Program(slots, layers, loops, groups)
    batch, tokens = 2, draw(st.integers(1, 5))
    shared = draw(st.booleans())
    kinds = draw(
        st.lists(st.integers(0, len(groups) - 1), min_size=2 * tokens, max_size=2 * tokens)
    )
    kind = np.array(kinds).reshape(2, tokens)
    kind = np.broadcast_to(kind[0], kind.shape) if shared else kind
    rng, values = np.random.default_rng(draw(seeds)), {}
    for slot in found:
        if slot.born == 0:
            owned = np.array([slot.token_groups is None or g in slot.token_groups for g in groups])[
                kind
            ]
            values[slot.name] = rng.normal(size=(batch, tokens, slot.size)) * owned[..., None]
    return Case(program, values, kind, shared, book.plain and loops == 1)
