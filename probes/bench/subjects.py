"""Transformers whose mechanism is known, disguised, each with its ground truth as data.

A subject is a compiled construction in one of the `DISGUISES`, inputs of its task, and answers that
are computed from the program, never from a method:

    heads   which heads have a job: what they write reaches the read-out along reads and writes
    sites   after which layers, at tokens of which kind and in which columns a named value is held,
            and whether it is used from there on
    edges   which heads another head, an MLP or the read-out reads through the stream

Use is a walk through the program from its end to its beginning (`probes.bench.truth`). Where a path
carries nothing on any input (a head that erases a slot which holds zeros), neither removing nor
exchanging its beginning moves the undisguised program, and the part is left out of all scores: its
role is "nil".
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from constructions.core.compile import compile_program, config_of, placed_heads
from constructions.core.config import Config
from constructions.core.program import Program
from constructions.core.slots import Slot
from constructions.core.transformer import Transformer
from probes.bench.disguises import (
    DISGUISES,
    NOISE,
    add_noise,
    backed,
    distract,
    in_random_basis,
    pressed,
    rotate,
    with_distractors,
    with_shared_heads,
    with_sharp_heads,
)
from probes.bench.families import FAMILIES, base_of, supports, trained
from probes.bench.patches import Arguments, patch_heads, patch_paths, patch_sites, run_sites
from probes.bench.truth import MLP, READ_OUT, End, Walk, liveness, paths

#: Edges that are not used, beside those that are, in a subject at most.
MOST_EDGES = 200
#: Changes below this share of the largest prediction are rounding.
NIL = 1e-10


@dataclass(frozen=True, eq=False)
class Site:
    """A named value after so many layers, at tokens of one kind.

    Attributes:
        layer: layers applied, 0 is the embedding.
        slot, kind: the value's name and the token group.
        used: whether it is used from there on.
        tokens: positions of the tokens of this kind.
        basis: `[width, size]`, orthonormal: the stream holds `basis @ value`.
        twin: of a correlated copy, the slot that it is a copy of; else "".
    """

    layer: int
    slot: str
    kind: str
    used: bool
    tokens: np.ndarray
    basis: np.ndarray
    twin: str = ""

    @property
    def name(self) -> str:
        """For messages and files."""
        return f"{self.slot} at {self.kind} after {self.layer}"


class Edge(NamedTuple):
    """A head and what may read it: whether it does is `used`.

    `layer`, `head` are those of `Subject.roles`; the receiver has `to_layer`, from 0, and
    `to_head`, which is `MLP` or `READ_OUT` where it is no head. It `distracts` where one end does.
    """

    layer: int
    head: int
    to_layer: int
    to_head: int
    used: bool
    distracts: bool

    @property
    def name(self) -> str:
        """For messages and files."""
        to = {MLP: f"MLP {self.to_layer + 1}", READ_OUT: "read-out"}.get(self.to_head)
        to = to or f"head {self.to_layer + 1}.{self.to_head}"
        return f"head {self.layer + 1}.{self.head} to {to}"


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, inputs, and what is true of it.

    Attributes:
        family, disguise, seed: which one it is.
        model: the disguised transformer.
        stream, groups: inputs as it takes them, `[batch, token, width]` and `[token]`.
        read_tokens, read_matrix: the prediction is `output[:, read_tokens] @ read_matrix`.
        roles: `[layer, head]`, "used", "backup", "unused" or "nil"; heads in the order of the site
            "head_output".
        distractor: `[layer, head]`, whether it was put there to distract.
        sites: the values.
        values: `[layer + 1, batch, token, width]`, the stream of the undisguised program, whose
            columns hold the values as they are named; `columns` says where.
        columns: slot -> its columns in `values`.
        clean: the undisguised model, on whose stream `values` is; it answers counterfactuals.
        clean_read: its read-out.
        edges: pairs of parts, all that are used and others, `MOST_EDGES` at most beside these.
        stated: numbers of the disguise: how far the weights are, how many dimensions are left.
    """

    family: str
    disguise: str
    seed: int
    model: Transformer
    stream: Array
    groups: Array
    read_tokens: np.ndarray
    read_matrix: Array
    roles: np.ndarray
    distractor: np.ndarray
    sites: tuple[Site, ...]
    values: np.ndarray
    columns: dict[str, slice]
    clean: Transformer
    clean_read: Array
    edges: tuple[Edge, ...] = ()
    stated: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For files: family, disguise and seed."""
        return f"{self.family}.{self.disguise}.{self.seed}"

    @property
    def undisguised(self) -> Arguments:
        """Arguments of the functions in `probes.bench.patches`, of the undisguised model."""
        stream, tokens = jax.device_put(self.values[0]), jax.device_put(self.read_tokens)
        return self.clean, stream, self.groups, tokens, self.clean_read

    def exchanged(self, sites: Sequence[Site]) -> np.ndarray:
        """The algorithm's counterfactual: each value from the next example, `[site, batch, ...]`.

        The predictions of the undisguised program, `[site, batch, token, entry]`.
        """
        unit = np.eye(self.values.shape[-1])
        bases = [unit[:, self.columns[site.slot]] for site in sites]
        residual = self.values, np.roll(self.values, -1, 1)
        where = [(site.layer, site.tokens) for site in sites]
        return patch_sites(self.undisguised, residual, where, bases)

    def value(self, site: Site) -> np.ndarray:
        """What the value is, `[batch, token, size]`."""
        return self.values[site.layer][:, site.tokens, self.columns[site.slot]]


def _confirmed(subject: Subject) -> Subject:
    """The subject without what no exchange can show; see the module.

    AssertionError where a part that the walk calls unused changes the prediction of the undisguised
    program: the walk would be wrong.
    """
    output, sites = run_sites(*subject.undisguised[:3])
    before = np.asarray(output)[:, subject.read_tokens] @ np.asarray(subject.clean_read)
    scale = float(np.abs(before).max())
    here = np.asarray(sites["head_output"])
    moved = np.zeros(subject.roles.size)
    for value in (np.zeros_like(here), np.roll(here, -1, 1)):
        found = np.asarray(patch_heads(*subject.undisguised, jax.device_put(value)))
        moved = np.maximum(moved, np.abs(found - before).max((1, 2, 3)) / scale)
    moved, roles = moved.reshape(subject.roles.shape), subject.roles.copy()
    assert (moved[roles == "unused"] <= NIL).all(), f"{subject.name}: an unused head is used"
    roles[(roles == "used") & (moved <= NIL)] = "nil"
    found = subject.exchanged(subject.sites)
    moved = np.abs(found - before).max((1, 2, 3)) / scale
    used = np.array([site.used for site in subject.sites], bool)
    assert (moved[~used] <= NIL).all(), f"{subject.name}: an unused value is used"
    kept = [s for s, m in zip(subject.sites, moved, strict=True) if not s.used or m > NIL]
    moved = np.abs(patch_paths(subject.undisguised, subject.edges)).max((1, 2, 3)) / scale
    used = np.array([edge.used for edge in subject.edges], bool)
    assert (moved[~used] <= NIL).all(), f"{subject.name}: an unused edge is used"
    edges = [e for e, m in zip(subject.edges, moved, strict=True) if not e.used or m > NIL]
    return replace(subject, roles=roles, sites=tuple(kept), edges=tuple(edges))


def make_subject(family: str, disguise: str, seed: int, batch: int = 64) -> Subject:
    """The subject; the same seed gives the same inputs to all disguises of a family.

    Raises:
        ValueError: an unknown family or disguise, or one that the family cannot take; JAX has no
            float64, in which the truth is confirmed.
    """
    if not jax.config.read("jax_enable_x64"):
        raise ValueError("jax_enable_x64 is off, must be on: jax.enable_x64(True)")
    if disguise not in DISGUISES:
        raise ValueError(f"disguise is {disguise!r}, must be one of {', '.join(DISGUISES)}")
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, must be one of {', '.join(FAMILIES)}")
    if why := supports(family, disguise):
        raise ValueError(f"{family} has no disguise {disguise!r}: {why}")
    base = base_of(family, disguise == "trained")
    program, config, backup = base.program, base.config, 0
    if disguise in ("distractors", "superposed", "all"):
        program = with_distractors(program, base.main)
    elif disguise == "shared":
        program = with_shared_heads(program)
    elif disguise == "sharp":
        program = with_sharp_heads(program) or program
    elif disguise == "backup":
        program, backup = backed(program)
        config = config_of(backed(with_distractors(base.program, base.main))[0])
    clean = compile_program(program, config=config)
    keys = jax.random.split(
        jax.random.fold_in(jax.random.key(seed), zlib.crc32(family.encode())), 3
    )
    inputs = base.inputs(keys[0], batch)
    entered = base.construction.stream(clean, *inputs)
    stream, groups = entered.values, entered.groups
    if groups.ndim != 1:
        assert (groups == groups[:1]).all(), f"{family}: tokens change their kind"
        groups = groups[0]
    kinds = np.asarray(program.token_groups)[np.asarray(groups)]
    named = {slot.name: slot for slot in program.slots}
    if "copy" in named and "noise" in named:
        stream = distract(stream, named, base.main, kinds, seed)
    place = base.place(*inputs)
    read_tokens = np.unique(np.atleast_1d(place.token))
    columns = place.columns(program.slots)
    clean_read = jax.device_put(place.scale * np.eye(clean.config.width)[:, columns])
    read = {(named[str(place.slot)], t) for t in read_tokens.tolist()}
    walk = liveness(program, kinds.tolist(), read)
    values = np.asarray(run_sites(clean, stream, groups)[1]["residual"])
    model, q, stated = clean, np.eye(clean.config.width), {}
    if disguise in ("basis", "all"):
        q = np.linalg.qr(np.random.default_rng(seed).normal(size=q.shape))[0]
        model = in_random_basis(clean, jax.device_put(q), keys[2])
    if disguise in ("noise", "all"):
        model = add_noise(model, seed, NOISE)
    if disguise == "trained":
        model, stated = trained(base, seed)
    matrix = q @ np.asarray(clean_read)
    if disguise == "superposed":
        q, back, stated = _pressed(clean, values, groups, walk, read_tokens, clean_read, seed)
        model, matrix = rotate(clean, jax.device_put(q), jax.device_put(back)), back.T @ clean_read
    heads = _places_of_heads(program, clean.config)
    roles, distractor = _roles(program, clean.config, walk, heads, backup)
    used = paths(program, kinds.tolist(), walk, read)
    edges = _edges(clean.config, program, heads, used, distractor, seed)
    sites = _sites(program, walk.states, kinds, values, q, base.main)
    turned = jax.device_put(np.asarray(stream) @ q.T)
    named_columns = {name: slot.columns for name, slot in named.items()}
    subject = Subject(
        family, disguise, seed, model, turned, groups, read_tokens, jax.device_put(matrix), roles,
        distractor, sites, values, named_columns, clean, clean_read, edges, stated,
    )  # fmt: skip
    return _confirmed(subject)


def _pressed(
    clean: Transformer, values: np.ndarray, groups: Array, walk: Walk, tokens: np.ndarray,
    read: Array, seed: int,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:  # fmt: skip
    """`pressed`, with what it costs: root mean square change, in units of two inputs' distance."""
    expected = values[-1][:, tokens] @ np.asarray(read)
    apart = np.sum((np.roll(expected, -1, 0) - expected) ** 2)

    def loss(q: np.ndarray, back: np.ndarray) -> float:
        model = rotate(clean, jax.device_put(q), jax.device_put(back))
        output, _ = run_sites(model, jax.device_put(values[0] @ q.T), groups)
        found = np.asarray(output)[:, tokens] @ back.T @ np.asarray(read)
        return float(np.sqrt(np.sum((found - expected) ** 2) / apart))

    used = np.zeros(values.shape[-1], bool)
    for state in walk.states:
        for slot, _ in state:
            used[slot.columns] = True
    return pressed(values, used, seed, loss)


def _places_of_heads(program: Program, config: Config) -> list[list[int]]:
    """Layer, and the number of a head in its `single_heads` -> its number in the model."""
    found = []
    for number, (layer, shape) in enumerate(zip(program.layers, config.layers(), strict=True)):
        starts = np.cumsum([0, *(row.heads for row in shape.heads)])
        order = {id(head): n for n, head in enumerate(layer.single_heads)}
        own = [0] * len(order)
        for head, row, n in placed_heads(layer, shape, f"layer {number + 1}"):
            own[order[id(head)]] = int(starts[row]) + n
        found.append(own)
    return found


def _roles(
    program: Program, config: Config, walk: Walk, heads: list[list[int]], backup: int
) -> tuple[np.ndarray, np.ndarray]:
    roles = np.full((config.depth, config.max_heads), "unused", object)
    distractor = np.zeros(roles.shape, bool)
    for number, layer in enumerate(program.layers):
        for n, head in enumerate(layer.single_heads):
            at = number, heads[number][n]
            if number + 1 == backup and head.name == "backup":
                roles[at] = "backup"
            elif walk.heads[number][n] is not None:
                roles[at] = "used"
            distractor[at] = head.name.startswith(("shadow of", "looks at noise"))
    return roles, distractor


def _edges(
    config: Config, program: Program, heads: list[list[int]], used: Any, distractor: np.ndarray,
    seed: int,
) -> tuple[Edge, ...]:  # fmt: skip
    """Those that are used, and others drawn at random where there are more than `MOST_EDGES`."""

    def place(end: End) -> End:
        return end if end[1] < 0 else (end[0], heads[end[0]][end[1]])

    true = {(place(a), place(b)) for a, b in used}
    counts = [sum(row.heads for row in shape.heads) for shape in config.layers()]
    ends = [(layer, n) for layer, count in enumerate(counts) for n in range(count)]
    ends += [(n, MLP) for n, layer in enumerate(program.layers) if layer.mlp is not None]
    ends.append((len(counts) - 1, READ_OUT))
    pairs = [
        (a, b)
        for a in ends
        for b in ends
        if a[1] >= 0 and (b[0] > a[0] or (b[0] == a[0] and b[1] < 0))
    ]
    others = [pair for pair in pairs if pair not in true]
    chosen = np.random.default_rng(seed).permutation(len(others))[:MOST_EDGES]
    kept = sorted(true | {others[n] for n in chosen})

    def planted(end: End) -> bool:
        return end[1] >= 0 and bool(distractor[end])

    return tuple(
        Edge(a[0], a[1], b[0], b[1], (a, b) in true, planted(a) or planted(b)) for a, b in kept
    )


def _sites(
    program: Program, live: Any, kinds: np.ndarray, values: np.ndarray, q: np.ndarray, main: Slot
) -> tuple[Site, ...]:  # fmt: skip
    """Values that live there and vary between inputs."""
    found = []
    for layer in range(len(program.layers) + 1):
        for slot in program.slots:
            alive = slot.born <= layer and (slot.dies is None or layer < slot.dies)
            if not alive or slot.name in ("first output", "second output"):
                continue
            for kind in dict.fromkeys(kinds):
                if slot.token_groups is not None and kind not in slot.token_groups:
                    continue
                tokens = np.flatnonzero(kinds == kind)
                value = values[layer][:, tokens, slot.columns]
                if value.std(0).max() <= 1e-9:
                    continue
                used = any((slot, t) in live[layer] for t in tokens.tolist())
                twin = main.name if slot.name == "copy" else ""
                basis = np.linalg.qr(q[:, slot.columns])[0]
                found.append(Site(layer, slot.name, str(kind), used, tokens, basis, twin))
    return tuple(found)
