"""Weights side by side and patching maps, as plain data.

Every function takes what any family offers, and raises `NotApplicable` where a family lacks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from constructions.core.canonical import canonical, head_products
from constructions.core.transformer import Transformer
from constructions.family import Construction
from probes import interchange
from probes.sites import Subject
from probes.table import ProbeTable, probe_table

#: Beyond this width the canonical tensor, of width^4 entries, is not drawn.
WIDEST = 48
#: Beyond this width products of heads are not drawn either.
WIDEST_PRODUCT = 128
#: Numbers in the stream of one input, over all layers and tokens, beyond which a report neither
#: probes nor patches everywhere.
LARGEST = 250_000


class NotApplicable(ValueError):
    """A section that this family does not have; the message says why."""


@dataclass(frozen=True)
class Weights:
    """One gauge-fixed matrix of a layer, in the construction and in the first trained model.

    Attributes:
        title: the matrix, as an equation.
        rows, columns: what the entries of either axis belong to, one label each.
        construction, trained: the matrices.
        distance: |trained - construction| / |construction| of this matrix, for every seed.
    """

    title: str
    rows: list[str]
    columns: list[str]
    construction: list[list[float]]
    trained: list[list[float]]
    distance: list[float]


@dataclass(frozen=True)
class Patches:
    """Effect of exchanging one token's stream after one layer, `[layer, token]`; see interchange.

    Attributes:
        construction, trained: effects, the trained one the mean over seeds.
        correlation: between the two maps, for every seed.
        relative_error: |trained - construction| / |construction|, for every seed.
    """

    construction: list[list[float]]
    trained: list[list[float]]
    correlation: list[float]
    relative_error: list[float]


def weights(
    construction: Construction, models: Sequence[Transformer], reference: Transformer
) -> list[Weights]:
    """Slices of the canonical tensor of the first layer; products of heads where there is none."""
    width = reference.config.width
    if any(model.config.width != width for model in models):
        raise NotApplicable("the trained model's stream is of another width")
    names = _columns(construction)
    gauge = construction.gauge()
    try:
        if width > WIDEST:
            raise TypeError(f"the stream has {width} columns")
        built, *trained = (np.asarray(canonical(m, gauge)[0]) for m in (reference, *models))
    except TypeError:
        return _products(models, reference, names)
    # the slices with the most weight in them
    norms = np.linalg.norm(built, axis=(2, 3)), np.linalg.norm(built, axis=(0, 1))
    (o, a), (b, c) = (np.unravel_index(n.argmax(), n.shape) for n in norms)
    out = _labels(names, gauge.read if reference.config.depth == 1 else np.eye(width))
    into = _labels(names, gauge.query.T if reference.config.depth == 1 else np.eye(width))
    return [
        _weights(
            f"T[{out[o]}, {names[a]}, b, c]",
            (names, into),
            built[o, a],
            [t[o, a] for t in trained],
        ),
        _weights(
            f"T[o, a, {names[b]}, {into[c]}]",
            (out, names),
            built[:, :, b, c],
            [t[:, :, b, c] for t in trained],
        ),
    ]


def _products(
    models: Sequence[Transformer], reference: Transformer, names: list[str]
) -> list[Weights]:
    config = reference.config
    if config.width > WIDEST_PRODUCT:
        raise NotApplicable(f"the stream has {config.width} columns, too many to draw")
    if any(heads.mixer == "mesa" for layer in config.layers() for heads in layer.heads):
        raise NotApplicable("products of mesa heads share sign and scale with the regularisation")
    built, *trained = (head_products(model) for model in (reference, *models))
    if any(len(t.key_query) != len(built.key_query) for t in trained):
        raise NotApplicable("the trained model has another number of layers")
    return [
        _weights(
            f"{title} of layer 1, summed over heads",
            (names, names),
            np.asarray(getattr(built, part)[0].sum(0)),
            [np.asarray(getattr(t, part)[0].sum(0)) for t in trained],
        )
        for part, title in (("key_query", "W_K^T W_Q"), ("output_value", "P W_V"))
    ]


def _weights(
    title: str, labels: tuple[list[str], list[str]], built: np.ndarray, trained: list[np.ndarray]
) -> Weights:
    scale = float(np.linalg.norm(built)) or 1.0
    distance = [float(np.linalg.norm(t - built)) / scale for t in trained]
    return Weights(title, *labels, built.tolist(), trained[0].tolist(), distance)


def _columns(construction: Construction) -> list[str]:
    """A name for every column of the stream: its slot, with an index where it has several."""
    slots = construction.program.slots
    names = [""] * slots.width
    for slot in slots:
        for index in range(slot.size):
            label = slot.name if slot.size == 1 else f"{slot.name}{index + 1}"
            column = slot.start + index
            names[column] = f"{names[column]}/{label}" if names[column] else label
    return names


def _labels(names: list[str], rows: np.ndarray) -> list[str]:
    """A name for every row: that of its largest column."""
    return [names[int(np.abs(row).argmax())] for row in rows]


def patches(
    construction: Construction, models: Sequence[Transformer], reference: Transformer, seed: int
) -> Patches:
    """Effect of exchanging one token's stream between two inputs, at every layer and token."""
    check_size(construction, reference)
    base, source = (construction.sample(key, 64) for key in jax.random.split(jax.random.key(seed)))
    try:
        found = [
            interchange.interchange_agreement(construction, model, reference, base, source)
            for model in models
        ]
    except ValueError as error:
        raise NotApplicable(str(error)) from error
    return Patches(
        construction=found[0].reference.effect.tolist(),
        trained=np.mean([f.model.effect for f in found], axis=0).tolist(),
        correlation=[f.correlation for f in found],
        relative_error=[f.relative_error for f in found],
    )


def probes(construction: Construction, models: Mapping[str, Subject], seed: int) -> ProbeTable:
    """The probe table of the values that the construction keeps in its stream."""
    check_size(construction, construction.reference)
    inputs = construction.sample(jax.random.key(0), 2)
    names = tuple(construction.places(construction.program.depth, *inputs))
    return probe_table(construction, models, jax.random.key(seed), names=names)


def check_size(construction: Construction, model: Transformer) -> int:
    """Numbers in the stream of an input; NotApplicable where they are more than `LARGEST`."""
    inputs = construction.sample(jax.random.key(0), 1)
    tokens = jax.eval_shape(lambda *i: construction.stream(model, *i).values, *inputs).shape[1]
    numbers = (model.config.depth + 1) * tokens * model.config.width
    if numbers > LARGEST:
        raise NotApplicable(
            f"{numbers} numbers in the stream of an input, too many to look at everywhere"
        )
    return numbers
