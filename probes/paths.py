"""Between which slots of the stream does each head carry, and how much of it?

A head's scores are x_i^T Q^T K x_j and what it writes is O V x_j, so that its matrices mean
something in pairs only: (A Q, A^-T K) is the same head for every invertible A. With column c of the
stream at its root mean square r_c on the task, the products

    scores  =  diag(r) Q^T K diag(r)  =  U S W^T,        values  =  O V diag(r)  =  Y T Z^T

have singular values that no basis changes, and slot s has the share

    query  sum_k S_k |U_sk|^2 / sum_k S_k,   key the same of W,   write of Y and value of Z with T.

Shares of a role add up to 1. A head of the construction that reads one slot as query has 1 there.
Of linear attention alone, weights without effect are removed first (`without_inert`), but not of a
layer that is applied again and again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from constructions.claims import masks
from constructions.core.canonical import obstacle, without_inert
from constructions.core.transformer import Transformer
from constructions.runs import Run
from probes.probe import Probe, Result, compiled_like, no_weights, seed_names, table
from probes.style import (
    CONSTRUCTION,
    GREY,
    TRAINED,
    Picture,
    figure_of,
    in_style,
    percent,
    png,
    span,
)
from probes.subject import read_sites

ROLES = ("query", "key", "value", "write")
#: More lanes, or more heads in all layers, than a table or a picture can show.
MOST_LANES, MOST_HEADS = 24, 32
#: Shares below this are not drawn.
FAINT = 0.02


@dataclass(frozen=True)
class Path:
    """One head: its layer and number, and role -> lane -> share, "" being columns of no slot.

    Attributes:
        size: product of the norms of its scores and its values, over that of the layer's heads
            together; of the values alone where no head of the layer has scores of the stream, but
            looks by biases.
    """

    layer: int
    head: int
    shares: dict[str, dict[str, float]]
    size: float


@dataclass(frozen=True)
class Paths:
    """The heads of the construction, of a model with random weights, and of every trained model."""

    lanes: list[str]
    construction: list[Path]
    random: list[Path]
    trained: list[list[Path]]


def lanes_of(construction: Any) -> dict[str, np.ndarray]:
    """Names of slots -> their columns; slots of different tokens that share columns are one."""
    slots = construction.program.slots
    names: dict[int, list[str]] = {}
    for slot in slots:
        for column in range(slot.start, slot.start + slot.size):
            names.setdefault(column, []).append(slot.name)
    found: dict[str, list[int]] = {}
    for column, owners in sorted(names.items()):
        found.setdefault(" | ".join(owners), []).append(column)
    return {name: np.array(columns) for name, columns in found.items()}


def shares(
    vectors: np.ndarray, sizes: np.ndarray, lanes: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Lane -> share of singular vectors `[column, k]` that count by their sizes `[k]`."""
    columns = (vectors**2 @ sizes) / max(sizes.sum(), np.finfo(float).tiny)
    found = {name: float(columns[own].sum()) for name, own in lanes.items()}
    rest = float(columns.sum()) - sum(found.values())
    return found | ({"": rest} if rest > FAINT / 2 else {})


def head_shares(
    head: Any, deviation: np.ndarray, lanes: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, float]], float, float]:
    """Role -> lane -> share of one head, and the norms of its scores and of its values."""
    query, key, value = (np.asarray(getattr(head, n), float) for n in ("query", "key", "value"))
    output = np.asarray(head.output, float)
    scores = (query * deviation).T @ (key * deviation)
    values = output @ (value * deviation)
    u, s, w = np.linalg.svd(scores)
    y, t, z = np.linalg.svd(values)
    parts = ((u, s), (w.T, s), (z.T, t), (y, t))
    found = {role: shares(*part, lanes) for role, part in zip(ROLES, parts, strict=True)}
    return found, float(np.linalg.norm(s)), float(np.linalg.norm(t))


def paths(construction: Any, model: Transformer, inputs: Sequence[Any]) -> list[Path]:
    """Every head of a model, layer by layer; the shares of the module's docstring.

    Args:
        construction: whose slots the stream has.
        model: of the construction's width.
        inputs: of the construction's task, on which the stream's columns are measured.
    """
    lanes, found = lanes_of(construction), []
    last = model.config.segments[-1]
    again = last.tied and last.repeats > 1  # stored once for all, and only the last has inert parts
    if not again and not obstacle(model.config) and all(len(own) == 1 for own in masks(model)):
        model = without_inert(model, construction.gauge())
    stream = np.asarray(read_sites(construction, model, tuple(inputs))["residual"], float)
    for layer in range(1, model.config.depth + 1):
        deviation = np.sqrt((stream[layer - 1] ** 2).mean(axis=(0, 1)))
        heads = [head_shares(head, deviation, lanes) for head in model.layer(layer).heads]
        sizes = np.array([scores * values for _, scores, values in heads])
        if not sizes.any():
            sizes = np.array([values for *_, values in heads])
        sizes = sizes / (sizes.sum() or 1.0)
        found += [Path(layer, n, head[0], float(sizes[n])) for n, head in enumerate(heads)]
    return found


def measure(run: Run, seed: int, batch: int = 256) -> Result:
    """Shares of every head, of construction and trained models, on `batch` inputs."""
    construction = run.construction
    reference = compiled_like(construction, run.models[0])
    key, random_key = jax.random.split(jax.random.key(seed))
    inputs = construction.sample(key, batch)
    random = construction.random_weights(1.0, run.models[0])(random_key)
    models = (reference, random, *run.models)
    built, unfitted, *trained = (paths(construction, m, inputs) for m in models)
    lanes = list(lanes_of(construction))
    found = Paths(lanes, built, unfitted, trained)
    rows, values = [], []
    names = ("construction", "random init", *seed_names(run))
    for who, heads in zip(names, (built, unfitted, *trained), strict=True):
        for head in heads:
            for role in ROLES:
                rows.append(f"{who}, layer {head.layer}, head {head.head + 1}: {role}")
                values.append([head.shares[role].get(lane, 0.0) for lane in lanes])
    return table(
        "share of every slot in what heads read and write",
        lanes,
        rows,
        values,
        "biases, MLPs and norms are left out",
        data=found,
        picture=partial(figure, found),
    )


def agreement(found: Paths, models: Sequence[Sequence[Path]]) -> list[float]:
    """Of every model's heads: the share that lies in slots where the construction has some.

    The mean over layers and roles in which the construction has any, heads by their size.
    """

    def of(heads: Sequence[Path], layer: int, role: str) -> dict[str, float]:
        own = [head for head in heads if head.layer == layer]
        lanes = {lane for head in own for lane in head.shares[role]}
        return {
            lane: sum(head.size * head.shares[role].get(lane, 0.0) for head in own)
            for lane in lanes
        }

    layers = sorted({head.layer for head in found.construction})
    result = []
    for heads in models:
        each = []
        for layer in layers:
            for role in ROLES:
                used = {n for n, v in of(found.construction, layer, role).items() if v > FAINT}
                if used:
                    each.append(sum(v for n, v in of(heads, layer, role).items() if n in used))
        result.append(float(np.mean(each)))
    return result


@in_style
def figure(found: Paths) -> Picture:
    """Lanes and heads, construction beside the first trained model; lines as wide as the share."""
    lanes = found.lanes
    heads = max(len(found.construction), len(found.trained[0]))
    high = 1.0 + 0.34 * len(lanes)
    drawing, axes = figure_of(min(4.0 + 1.7 * heads, 14.0), high, 2)
    pairs = (
        ("construction", found.construction, CONSTRUCTION),
        ("trained", found.trained[0], TRAINED),
    )
    for axis, (title, own, colour) in zip(axes, pairs, strict=True):
        _draw(axis, lanes, own, colour)
        axis.set_title(title)
    axes[1].set_yticklabels([])
    (chance,), close = agreement(found, [found.random]), agreement(found, found.trained)
    caption = (
        "What every head reads as query (q), key (k) and value (v), and where it writes: a line is "
        "as wide as the slot's share in the head's products, and shares below "
        f"{percent(FAINT)} are left out. Circles are as large as the head's part in its layer. Of "
        f"the trained models' shares {span(close, percent)} lie where the construction has some, "
        f"of a model with random weights {percent(chance)}."
    )
    alt = "Slots as lanes, heads as circles, lines between them; construction and trained model."
    title = "Do heads read and write the same slots?"
    return Picture("paths", title, caption, alt, png(drawing))


def _draw(axis: Any, lanes: Sequence[str], heads: Sequence[Path], colour: str) -> None:
    place = {lane: -n for n, lane in enumerate(lanes)}
    for row in place.values():
        axis.axhline(row, color=GREY, lw=0.4, alpha=0.5, zorder=0)
    for n, head in enumerate(heads):
        x, y = n + 0.5, -(len(lanes) - 1) / 2 + 0.17
        for role in ROLES:
            for lane, share in head.shares[role].items():
                if lane not in place or share < FAINT:
                    continue
                at = {"query": -0.36, "key": -0.28, "value": -0.2, "write": 0.3}[role]
                axis.plot(
                    [x + at, x], [place[lane], y], color=colour, lw=0.3 + 4 * share, alpha=0.7
                )
                if role == "write":
                    axis.plot(x + at, place[lane], ">", color=colour, ms=4 + 3 * share)
                else:
                    axis.text(x + at, place[lane] + 0.12, role[0], fontsize=8, ha="center")
        axis.plot(x, y, "o", color=colour, ms=6 + 8 * head.size, mec="white", zorder=4)
        axis.text(x, 0.75, f"layer {head.layer}\nhead {head.head + 1}", fontsize=7, ha="center")
    axis.set(xlim=(0, max(len(heads), 1)), ylim=(-len(lanes) + 0.4, 1.5), xticks=[])
    axis.set_yticks(list(place.values()), lanes, fontsize=8)
    for side in axis.spines.values():
        side.set_visible(False)


def needs_slots(run: Run) -> str:
    """A stream with the construction's slots, few enough to be shown."""
    model, construction = run.models[0], run.construction
    if missing := no_weights(model):
        return missing
    width = construction.program.slots.width
    if model.config.width != width:
        return f"its stream has {model.config.width} columns, the construction's slots have {width}"
    lanes = len(lanes_of(construction))
    if lanes > MOST_LANES:
        return f"the construction has {lanes} slots, paths shows at most {MOST_LANES}"
    heads = sum(len(model.layer(n + 1).heads) for n in range(model.config.depth))
    if heads > MOST_HEADS:
        return f"the model has {heads} heads, paths shows at most {MOST_HEADS}"
    return "" if heads else "the model has no heads"


PATHS = Probe(
    "paths",
    "do heads read and write the slots that the construction's do?",
    "a slot is large and has no effect: shares are of weights and of what stands in the stream, "
    "not of what is used",
    measure,
    needs_slots,
)
