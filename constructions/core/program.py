"""A construction as a tableau: plain data on what each head reads and writes.

A `Program` is to the `Transformer` what a Butcher tableau is to a Runge-Kutta integrator. A
gradient-descent layer, for example, is

    Head(query=x, key=x, value=W0 @ x - y, write={y: step_size / num_examples}, keys="context")

Layers are numbered from 1; layer 0 stands for the embedding. In one layer every head reads the
stream as it was before the layer, then the MLP reads the stream with all heads' outputs added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array

from constructions.core.matrices import Matrix
from constructions.core.slots import Affine, Slot, Slots, concatenate, constant

if TYPE_CHECKING:
    from constructions.core import picture

Window = tuple[int | None, int | None]

EVERYWHERE: Window = (None, None)
CAUSAL: Window = (None, 0)
SELF: Window = (0, 0)


def _matrices(write: Mapping[Affine, Any], size: int, who: str) -> dict[Slot, Matrix]:
    """Scalars become multiples of the identity; every matrix is checked to be [slot, size]."""
    result: dict[Slot, Matrix] = {}
    for place, m in write.items():
        slot, first = _place(place, who)
        if not isinstance(m, Matrix) and np.ndim(m) == 0:
            if place.size != size:
                raise ValueError(
                    f"{who} writes {size} rows into {place}, which has {place.size} columns; "
                    "a scalar needs them equal"
                )
            m = Matrix.identity(size, float(m))
        m = m if isinstance(m, Matrix) else np.asarray(m, float)
        if m.shape != (place.size, size):
            raise ValueError(
                f"{who} writes into {place} with a matrix of shape {m.shape}, "
                f"must be ({place.size}, {size})"
            )
        m = Matrix.of(m).placed(slot.size, first)
        result[slot] = result[slot] + m if slot in result else m
    return result


def _place(place: Any, who: str) -> tuple[Slot, int]:
    """The slot that is written, and its first row that is."""
    if isinstance(place, Slot):
        return place, 0
    if isinstance(place, Affine) and len(place.terms) == 1 and not place.constant.any():
        ((slot, m),) = place.terms.items()
        block = m.blocks[0] if len(m.blocks) == 1 else None
        whole = block is not None and not block.is_dense and block.shape[0] == place.size
        if block is not None and whole and block.content == 1:
            return slot, block.column
    raise TypeError(f"{who} must write into slots or slices of slots, got {place!r}")


def token_names(groups: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Token groups as a tuple; None stays None and means all of them."""
    if groups is not None and not len(groups):
        raise ValueError("token groups must not be empty; None means all tokens")
    return (groups,) if isinstance(groups, str) else None if groups is None else tuple(groups)


@dataclass(frozen=True, eq=False)
class Head:
    """One attention head: slot_w += M_w sum_j a_ij value(e_j), over the slots w that it writes.

    The weights a_ij come from the scores scale * query(e_i) . key(e_j) through the mixer: the
    scores themselves for `linear`, their softmax over j for `softmax` (no hidden 1/sqrt(d)). For
    `mesa` they are linear in the query (sum_{j <= i} k_j k_j^T + regularization)^-1 q_i, so that
    the head is ridge regression from keys to values so far, at the query; its window is causal.
    For `transposed_softmax` the softmax is over i: see `constructions.core.layer`. With a factor
    they are multiplied, behind the mixer, by `factor[0](e_i) . factor[1](e_j)`.

    Attributes:
        query, key, value: affine maps of the slots; query and key have equally many rows.
        write: {slot: matrix [slot.size, value rows] or a scalar times the identity}; a slice of
            a slot may stand for a slot.
        mixer: a name in `constructions.core.layer.MIXERS`.
        queries, keys: token groups at which the head acts and which it attends to; None: all.
        window: bounds on the offset j - i, inclusive; None is unbounded. `CAUSAL` is (None, 0),
            a head that looks at the next token has (1, 1).
        sinks: token groups that are attended to at any offset, in `keys` or not.
        scale: factor on the scores.
        regularization: of a mesa head, above 0; None for other mixers.
        factor: (at the query, at the key), two affine maps with equally many rows, or None.
        erases: a slot that this head clears (see `erase`).
        name: for messages and figures.
    """

    query: Affine
    key: Affine
    value: Affine
    write: Mapping[Any, Any]
    mixer: str = "linear"
    queries: str | Sequence[str] | None = None
    keys: str | Sequence[str] | None = None
    window: Window = EVERYWHERE
    sinks: Sequence[str] = ()
    scale: float = 1.0
    regularization: float | None = None
    factor: tuple[Affine, Affine] | None = None
    erases: Slot | None = None
    name: str = "head"

    def __post_init__(self) -> None:
        if self.query.size != self.key.size:
            raise ValueError(
                f"{self.name}: query has {self.query.size} rows and key {self.key.size}"
            )
        object.__setattr__(self, "write", _matrices(self.write, self.value.size, self.name))
        object.__setattr__(self, "queries", token_names(self.queries))
        object.__setattr__(self, "keys", token_names(self.keys))
        object.__setattr__(self, "sinks", token_names(self.sinks) if self.sinks else ())
        low, high = self.window
        if low is not None and high is not None and low > high:
            raise ValueError(f"{self.name}: window {self.window} is empty")
        if self.factor is not None and (
            self.factor[0].size != self.factor[1].size or self.mixer == "mesa"
        ):
            raise ValueError(
                f"{self.name}: factor has {self.factor[0].size} rows at the query and "
                f"{self.factor[1].size} at the key, must be equal, and no mesa head has one"
            )
        ridge = self.regularization
        if self.mixer != "mesa":
            if ridge is not None:
                raise ValueError(
                    f"{self.name}: regularization is {ridge}, but its mixer is no mesa"
                )
        elif ridge is None or not 0 < ridge < np.inf:
            raise ValueError(f"{self.name}: regularization is {ridge}, must be finite and above 0")
        elif self.window != CAUSAL or self.sinks:
            raise ValueError(f"{self.name}: a mesa head has window {CAUSAL} and no sinks")

    def reads(self) -> Iterator[tuple[str, Slot, tuple[str, ...] | None]]:
        """Every (part, slot, token groups at which it is read)."""
        keys = None if self.keys is None else (*self.keys, *self.sinks)
        parts = [
            ("query", self.query, self.queries),
            ("key", self.key, keys),
            ("value", self.value, keys),
        ]
        if self.factor is not None:
            parts += [
                ("factor at the query", self.factor[0], self.queries),
                ("factor at the key", self.factor[1], keys),
            ]
        for part, expr, groups in parts:
            for slot, matrix in expr.terms.items():
                if matrix.any():  # W_0 = 0 reads nothing
                    yield part, slot, token_names(groups)

    def writes(self) -> tuple[Slot, ...]:
        """The slots that it writes."""
        return tuple(self.write)

    @property
    def factor_dim(self) -> int:
        """Rows of the factor, 0 without one."""
        return 0 if self.factor is None else self.factor[0].size


@dataclass(frozen=True, eq=False)
class HeadFamily:
    """One head for each column n of a slot, whose scores are sums of bilinear forms of slots:

        write[n] at i  +=  sum_j s_n(i, j),
        s_n(i, j)  =  sum_k left_k(i)^T tensor_k[n] right_k(j).

    The same as `heads()`, one `Head` each with value 1; the tensors are stored once.

    Attributes:
        terms: (left, right, tensor `[heads, left.size, right.size]`), left at the query.
        write: a slot with as many columns as there are heads.
        queries, keys, window, name: as in `Head`.
    """

    terms: Sequence[tuple[Slot, Slot, np.ndarray | Array]]
    write: Slot
    queries: str | Sequence[str] | None = None
    keys: str | Sequence[str] | None = None
    window: Window = EVERYWHERE
    name: str = "family"

    mixer, sinks, erases = "linear", (), None

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        object.__setattr__(self, "queries", token_names(self.queries))
        object.__setattr__(self, "keys", token_names(self.keys))
        for left, right, tensor in self.terms:
            if tensor.shape != (self.write.size, left.size, right.size):
                raise ValueError(
                    f"{self.name}: tensor of {left} and {right} has shape {tensor.shape}, "
                    f"must be {(self.write.size, left.size, right.size)}"
                )

    def reads(self) -> Iterator[tuple[str, Slot, tuple[str, ...] | None]]:
        """Every (part, slot, token groups at which it is read)."""
        for left, right, _ in self.terms:
            yield "query", left, token_names(self.queries)
            yield "key", right, token_names(self.keys)

    def writes(self) -> tuple[Slot, ...]:
        """The slot that it writes."""
        return (self.write,)

    @property
    def rows(self) -> int:
        """Key rows of every head."""
        return sum(left.size for left, _, _ in self.terms)

    def heads(self) -> Iterator[Head]:
        """The heads, one for each column of `write`."""
        query = concatenate(*(left for left, _, _ in self.terms))
        for n in range(self.write.size):
            yield Head(
                query=query,
                key=concatenate(*(tensor[n] @ right for _, right, tensor in self.terms)),
                value=constant(1.0),
                write={self.write: np.eye(self.write.size)[:, n : n + 1]},
                queries=self.queries,
                keys=self.keys,
                window=self.window,
                name=f"{self.name} {n}",
            )


def erase(slot: Slot, *, queries: str | Sequence[str] | None = None) -> Head:
    """A head that subtracts a slot from itself: attention of every token to itself, value -slot.

    What another head writes into the slot in the same layer is rounded at the size of the value
    that is erased, since the stream adds both at once.
    """
    one = constant(1.0)
    return Head(
        query=one,
        key=one,
        value=-slot,
        write={slot: 1.0},
        window=SELF,
        queries=queries if queries is not None else slot.token_groups,
        keys=slot.token_groups,
        erases=slot,
        name=f"erase {slot.name}",
    )


@dataclass(frozen=True, eq=False)
class Mlp:
    """slot_w += M_w act(hidden(e_i)) * gate(e_i); without a gate that factor is 1.

    Attributes:
        hidden, gate: affine maps of the slots, with equally many rows.
        write: {slot: matrix [slot.size, rows] or a scalar times the identity}; slices as in `Head`.
        activation: a name in `constructions.core.layer.ACTIVATIONS`; "identity" with a gate is a
            bilinear layer.
        token_groups: those at which it acts; None: all.
        name: for messages.
    """

    hidden: Affine
    write: Mapping[Any, Any]
    gate: Affine | None = None
    activation: str = "relu"
    token_groups: str | Sequence[str] | None = None
    name: str = "mlp"

    def __post_init__(self) -> None:
        if self.gate is not None and self.gate.size != self.hidden.size:
            raise ValueError(
                f"{self.name}: hidden has {self.hidden.size} rows, gate {self.gate.size}"
            )
        object.__setattr__(self, "write", _matrices(self.write, self.hidden.size, self.name))
        object.__setattr__(self, "token_groups", token_names(self.token_groups))


@dataclass(frozen=True)
class Norm:
    """slot `write` += normalised slot `read`, before the heads of the layer read the stream.

    kind "layer": (v - mean v) / sqrt(var v + eps); kind "rms": v / sqrt(mean v^2 + eps). It acts at
    `token_groups`, at all where that is None.
    """

    read: Slot
    write: Slot
    kind: str = "layer"
    eps: float = 1e-5
    token_groups: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_groups", token_names(self.token_groups))
        if self.read.size != self.write.size:
            raise ValueError(
                f"norm reads {self.read} ({self.read.size}) and writes {self.write} "
                f"({self.write.size}); sizes must be equal"
            )


@dataclass(frozen=True)
class Layer:
    """A norm (optional), a row of heads that act in parallel, then an MLP (optional).

    `heads` holds single heads and families of them; `single_heads` is all of them one by one.
    """

    heads: Sequence[Head | HeadFamily] = ()
    mlp: Mlp | None = None
    norm: Norm | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))

    @cached_property
    def single_heads(self) -> tuple[Head, ...]:
        """The heads, families written out."""
        found: list[Head] = []
        for part in self.heads:
            found += [part] if isinstance(part, Head) else part.heads()
        return tuple(found)


@dataclass(frozen=True, repr=False)
class Program:
    """Layers over slots.

    Attributes:
        slots: the layout of the stream.
        layers: run in order.
        loops: how often the whole list of layers is run, with the same weights (a recurrent, or
            looped, transformer). `depth` counts the layers that are applied.
        token_groups: names of the kinds of tokens; the model is told each token's kind.
        embedding: of a language model: {slot: matrix [token numbers, slot.size]}.
        readout: the rows whose products with slots score words: {slot: matrix [words, slot.size]}.
    """

    slots: Slots
    layers: Sequence[Layer]
    loops: int = 1
    token_groups: tuple[str, ...] = ("token",)
    name: str = field(default="program", compare=False)
    embedding: Mapping[Slot, np.ndarray | Array] = field(default_factory=dict, compare=False)
    readout: Mapping[Slot, np.ndarray | Array] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "token_groups", tuple(self.token_groups))
        if not self.layers:
            raise ValueError("layers of a program must not be empty")
        if self.loops < 1:
            raise ValueError(f"loops is {self.loops}, must be at least 1")
        for name in ("embedding", "readout"):
            table: Mapping[Slot, np.ndarray | Array] = getattr(self, name)
            if len({len(m) for m in table.values()}) > 1:
                raise ValueError(f"matrices of the {name} have different numbers of rows")
            for slot, m in table.items():
                if m.shape[1:] != (slot.size,):
                    raise ValueError(
                        f"{name} of {slot} has shape {m.shape}, must be [rows, {slot.size}]"
                    )
        if bool(self.embedding) != bool(self.readout):
            raise ValueError("a program has an embedding and a readout, or neither")

    @property
    def depth(self) -> int:
        """Number of layers applied."""
        return self.loops * len(self.layers)

    def unrolled(self) -> Iterator[tuple[int, Layer]]:
        """(number from 1, layer) for every layer applied."""
        for number in range(self.depth):
            yield number + 1, self.layers[number % len(self.layers)]

    def draw(self, out: str | PathLike[str] | None = None, *, name: str = "") -> picture.Drawing:
        """A picture: slots as lanes, layers from left to right, heads between the lanes.

        Args:
            out: a file that it is written to, .svg or .png; ValueError for another suffix.
            name: in its title, in the place of the program's.
        """
        from constructions.core import picture

        if out is not None:
            picture.check_suffix(out)
        drawing = picture.draw(self, name)
        if out is not None:
            drawing.save(out)
        return drawing

    def equations(self, name: str = "") -> str:
        """The slots, and what every layer adds to them, as equations (`core.equations`)."""
        from constructions.core import folding

        return folding.text(self, name)

    def _repr_html_(self) -> str:
        from synthetic.display import Image, shown

        drawing = self.draw()
        return shown("", Image(drawing.png, drawing.alt))

    def __repr__(self) -> str:
        heads = sum(len(layer.single_heads) for layer in self.layers)
        return (
            f"<Program '{self.name}': {self.depth} layers, {heads} heads, {self.slots.width} "
            "columns>"
        )

    def __str__(self) -> str:
        """The slots, then each layer's parts with what they read and write."""
        lines = [repr(self)[1:-1], f"  columns: {repr(self.slots)[7:-1]}"]
        for number, layer in enumerate(self.layers, start=1):
            lines.append(f"  layer {number}" + (f" ({layer.name})" if layer.name else ""))
            if layer.norm is not None:
                norm = layer.norm
                lines.append(f"    {norm.kind} norm: {norm.read.name} -> {norm.write.name}")
            for head in layer.heads:
                read = dict.fromkeys(slot.name for _, slot, _ in head.reads())
                lines.append(_arrow(f"{head.mixer} head '{head.name}'", read, head.writes()))
            if layer.mlp is not None:
                mlp = layer.mlp
                parts = [mlp.hidden] + ([mlp.gate] if mlp.gate is not None else [])
                read = dict.fromkeys(slot.name for part in parts for slot in part.terms)
                lines.append(_arrow(f"{mlp.activation} mlp '{mlp.name}'", read, mlp.write))
        return "\n".join(lines)


def _arrow(part: str, read: Iterable[str], write: Iterable[Slot]) -> str:
    return f"    {part}: {', '.join(read) or 'constants'} -> {', '.join(s.name for s in write)}"
