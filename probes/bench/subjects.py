"""Transformers whose mechanism is known, disguised, each with its ground truth as data.

A subject is a compiled construction in one of the `DISGUISES`, inputs of its task, and two answers
that are computed from the program, never from a method:

    heads   which heads have a job: what they write reaches the read-out along reads and writes
    sites   after which layers, at tokens of which kind and in which columns a named value is held,
            and whether it is used from there on

Use is a walk through the program from its end to its beginning (`liveness`): a slot is used if a
part that is used reads it, a part is used if it writes a slot that is used behind it. The walk does
not look at numbers, so "not used" is certain, and "used" says that there is a path. Where a path
carries nothing on any input (a head that erases a slot which holds zeros), neither removing nor
exchanging its beginning moves the undisguised program, and the part is left out of all scores: its
role is "nil".
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import Array

from constructions import CATALOGUE
from constructions.core.compile import compile_program, config_of, placed_heads
from constructions.core.config import Config
from constructions.core.program import Program
from constructions.core.slots import Slot
from constructions.core.transformer import Transformer
from constructions.family import Construction
from probes.bench.disguises import (
    DISGUISES,
    NOISE,
    add_noise,
    backed,
    distract,
    in_random_basis,
    unrolled,
    with_backup,
    with_distractors,
    with_shared_heads,
)
from probes.bench.patches import Arguments, patch_heads, patch_sites, run_sites
from synthetic.compilation import compile_once

#: Family -> settings that are cheap. Those of a language (inside-outside, tint) are too large for
#: hundreds of subjects, and tokens of memory-token change their kind from input to input.
FAMILIES: dict[str, dict[str, Any]] = {
    "gradient-descent": {"dim_x": 3, "dim_y": 1, "num_examples": 6, "steps": 2, "step_size": 0.6},
    "gd-plus-plus": {},
    "hedge": {},
    "separate-tokens": {},
    "kernel-descent": {},
    "noisy-regression": {},
    "mesa-ridge": {"dim": 3, "length": 8, "tokens": "constructed"},
    "mesa-polynomial": {
        "dim": 3, "length": 8, "tokens": "constructed", "coefficients": (0.2, -0.02),
    },
    "hyper-gradient": {},
    "hyper-prototypes": {},
    "hyper-semi-supervised": {},
    "skill-composition": {},
}  # fmt: skip

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
    return replace(subject, roles=roles, sites=tuple(kept))


Live = set[tuple[Slot, int]]


def liveness(
    program: Program, kinds: Sequence[str], read: Iterable[tuple[Slot, int]]
) -> tuple[list[Live], list[list[bool]]]:
    """What is used, from the program's end to its beginning.

    Args:
        program: its layers, once each.
        kinds: the kind of every token.
        read: (slot, token) that the read-out looks at.

    Returns:
        For 0..depth layers applied, the (slot, token) that are used from there on; and for every
        layer which of its `single_heads` are.
    """

    def of(names: Sequence[str] | None) -> list[int]:
        return [t for t, kind in enumerate(kinds) if names is None or kind in names]

    states: list[Live] = [set(read)]
    heads: list[list[bool]] = []
    for number in range(len(program.layers), 0, -1):
        layer, middle = program.layers[number - 1], set(states[0])
        if layer.mlp is not None:
            written = [s for s, m in layer.mlp.write.items() if m.any()]
            live = [
                t for t in of(layer.mlp.token_groups) if any((s, t) in states[0] for s in written)
            ]
            for part in (layer.mlp.hidden, layer.mlp.gate):
                middle |= {(s, t) for s, m in _terms(part) if m.any() for t in live}
        before, used = set(middle), []
        for head in layer.single_heads:
            if head.erases is not None:
                before -= {(head.erases, t) for t in of(head.queries)}
        for head in layer.single_heads:
            written = [s for s, m in head.write.items() if m.any()]
            queries = [t for t in of(head.queries) if any((s, t) in middle for s in written)]
            low, high = (-np.inf if head.window[0] is None else head.window[0],
                         np.inf if head.window[1] is None else head.window[1])  # fmt: skip
            sinks = of(head.sinks) if head.sinks else []
            keys = {
                t for q in queries for t in of(head.keys) if low <= t - q <= high
            } | {t for t in sinks if queries}  # fmt: skip
            # what is not written before this layer is zero
            silent = not head.value.constant.any() and all(
                s.born >= number for s in head.value.terms
            )
            used.append(bool(queries and keys) and not silent)
            if not used[-1] or head.erases is not None:
                continue  # an erased slot cancels: what was in it is not used
            for part, slot, _ in head.reads():
                before |= {(slot, t) for t in (queries if "query" in part else keys)}
        norm = layer.norm
        if norm is not None:
            before |= {(norm.read, t) for t in of(norm.token_groups) if (norm.write, t) in before}
        states.insert(0, before)
        heads.insert(0, used)
    return states, heads


def _terms(part: Any) -> Iterable[tuple[Slot, Any]]:
    return () if part is None else part.terms.items()


@dataclass(frozen=True, eq=False)
class _Base:
    """What all disguises of a family share: its program, and a shape with room for all but one."""

    construction: Construction
    program: Program
    main: Slot
    config: Config


@lru_cache(maxsize=32)
def _base(family: str) -> _Base:
    entry = CATALOGUE.find(family)
    construction = entry(**(entry.example() | FAMILIES.get(family, {})))
    program = unrolled(construction.program)
    inputs = construction.sample(jax.random.key(0), 2)
    slot = construction.places(program.depth, *inputs)["prediction"].slot
    # the input that varies most obviously: the widest slot that the embedding writes
    born = [s for s in program.slots if s.born == 0 and s.name != slot]
    main = max(born or list(program.slots), key=lambda s: (s.name in _INPUTS, s.size))
    return _Base(
        construction, program, main, config_of(with_shared_heads(with_distractors(program, main)))
    )


_INPUTS = ("x", "features", "previous", "value", "content")


def supports(family: str, disguise: str) -> str:
    """Why a family has no subject in this disguise, in one phrase; "" where it has one."""
    if disguise == "backup" and with_backup(_base(family).program) is None:
        return "every layer with heads has an MLP already"
    return ""


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
    base = _base(family)
    program, config, backup = base.program, base.config, 0
    if disguise in ("distractors", "all"):
        program = with_distractors(program, base.main)
    elif disguise == "shared":
        program = with_shared_heads(program)
    elif disguise == "backup":
        program, backup = backed(program)
        config = config_of(backed(with_distractors(base.program, base.main))[0])
    clean = compile_program(program, config=config)
    keys = jax.random.split(
        jax.random.fold_in(jax.random.key(seed), zlib.crc32(family.encode())), 3
    )
    inputs = compile_once(base.construction.sample, static_argnums=1)(keys[0], batch)
    entered = base.construction.stream(clean, *inputs)
    stream, groups = entered.values, entered.groups
    if groups.ndim != 1:
        raise ValueError(f"{family}: tokens change their kind from input to input")
    kinds = np.asarray(program.token_groups)[np.asarray(groups)]
    named = {slot.name: slot for slot in program.slots}
    if "copy" in named and "noise" in named:
        stream = distract(stream, named, base.main, kinds, seed)
    place = base.construction.places(program.depth, *inputs)["prediction"]
    read_tokens = np.atleast_1d(place.token)
    columns = place.columns(program.slots)
    clean_read = jax.device_put(place.scale * np.eye(clean.config.width)[:, columns])
    live, used = liveness(
        program, kinds.tolist(), {(named[str(place.slot)], t) for t in read_tokens.tolist()}
    )
    model, q = clean, np.eye(clean.config.width)
    if disguise in ("basis", "all"):
        q = np.linalg.qr(np.random.default_rng(seed).normal(size=q.shape))[0]
        model = in_random_basis(clean, jax.device_put(q), keys[2])
    if disguise in ("noise", "all"):
        model = add_noise(model, seed, NOISE)
    roles, distractor = _roles(program, clean.config, used, backup)
    values = np.asarray(run_sites(clean, stream, groups)[1]["residual"])
    sites = _sites(program, live, kinds, values, q, base.main)
    turned = jax.device_put(np.asarray(stream) @ q.T)
    columns = {name: slot.columns for name, slot in named.items()}
    matrix = jax.device_put(q @ np.asarray(clean_read))
    subject = Subject(
        family, disguise, seed, model, turned, groups, read_tokens, matrix, roles, distractor,
        sites, values, columns, clean, clean_read,
    )  # fmt: skip
    return _confirmed(subject)


def _roles(
    program: Program, config: Config, used: Any, backup: int
) -> tuple[np.ndarray, np.ndarray]:
    roles = np.full((config.depth, config.max_heads), "unused", object)
    distractor = np.zeros(roles.shape, bool)
    for number, (layer, shape) in enumerate(zip(program.layers, config.layers(), strict=True)):
        starts = np.cumsum([0, *(row.heads for row in shape.heads)])
        order = {id(head): n for n, head in enumerate(layer.single_heads)}
        for head, row, n in placed_heads(layer, shape, f"layer {number + 1}"):
            at = number, int(starts[row]) + n
            if number + 1 == backup and head.name == "backup":
                roles[at] = "backup"
            elif used[number][order[id(head)]]:
                roles[at] = "used"
            distractor[at] = head.name.startswith(("shadow of", "looks at noise"))
    return roles, distractor


def _sites(
    program: Program, live: Any, kinds: np.ndarray, values: np.ndarray, q: np.ndarray, main: Slot
) -> tuple[Site, ...]:  # fmt: skip
    """Values that live there and vary between inputs."""
    found = []
    for layer in range(len(program.layers) + 1):
        for slot in program.slots:
            alive = slot.born <= layer and (slot.dies is None or layer < slot.dies)
            if not alive or slot.name in ("first", "second"):
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
                found.append(
                    Site(layer, slot.name, str(kind), used, tokens, q[:, slot.columns], twin)
                )
    return tuple(found)
