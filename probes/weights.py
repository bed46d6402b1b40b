"""Are the weights the construction's? Compared in what no symmetry of them changes.

Slices of the canonical tensor of the first layer (`constructions.core.canonical`), or, where a
model is more than linear attention, the products of its heads' matrices, summed over heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from constructions.claims import masks
from constructions.core.canonical import canonical, head_products, obstacle
from constructions.family import Construction
from constructions.runs import Run
from probes.probe import Probe, Result, compiled_like, seed_names, table
from probes.style import Picture, in_style, percent, png, span, ticks

#: Beyond this width the canonical tensor, of width^4 entries, is not drawn.
WIDEST = 48
#: Beyond this width products of heads are not drawn either.
WIDEST_PRODUCT = 128


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


def measure(run: Run, seed: int) -> Result:
    """Distances of gauge-fixed matrices of the first layer to the construction's."""
    del seed  # nothing is drawn
    shown = _slices(run) if _has_tensor(run) else _products(run)
    rows = [panel.title for panel in shown]
    return table(
        "relative distance of gauge-fixed weights to the construction's",
        seed_names(run),
        rows,
        [panel.distance for panel in shown],
        data=shown,
        picture=partial(figure, shown),
    )


def _has_tensor(run: Run) -> bool:
    """Whether all models have one canonical tensor a layer, small enough to draw."""
    reference = compiled_like(run.construction, run.models[0])
    return reference.config.width <= WIDEST and all(
        not obstacle(model.config) and all(len(own) <= 1 for own in masks(model))
        for model in (reference, *run.models)
    )


def needs_drawable_weights(run: Run) -> str:
    """A stream of the construction's width, and weights that symmetries leave comparable."""
    config = compiled_like(run.construction, run.models[0]).config
    if any(model.config.width != config.width for model in run.models):
        return "the trained model's stream is of another width"
    if _has_tensor(run):
        return ""
    if config.width > WIDEST_PRODUCT:
        return f"the stream has {config.width} columns, too many to draw"
    if any(heads.mixer == "mesa" for layer in config.layers() for heads in layer.heads):
        return "products of mesa heads share sign and scale with the regularisation"
    if any(model.config.depth != config.depth for model in run.models):
        return "the trained model has another number of layers"
    return ""


def _slices(run: Run) -> list[Weights]:
    """The slices of the canonical tensor with the most weight in them."""
    names, gauge = _columns(run.construction), run.construction.gauge()
    reference = compiled_like(run.construction, run.models[0])
    built, *trained = (np.asarray(canonical(m, gauge)[0]) for m in (reference, *run.models))
    norms = np.linalg.norm(built, axis=(2, 3)), np.linalg.norm(built, axis=(0, 1))
    (o, a), (b, c) = (np.unravel_index(n.argmax(), n.shape) for n in norms)
    eye, single = np.eye(reference.config.width), reference.config.depth == 1
    out, into = (
        # a name for every row: that of its largest column
        [names[int(np.abs(row).argmax())] for row in (rows if single else eye)]
        for rows in (gauge.read, gauge.query.T)
    )
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


def _products(run: Run) -> list[Weights]:
    """Products of the heads of the first layer that has any in the construction."""
    names = _columns(run.construction)
    reference = compiled_like(run.construction, run.models[0])
    built, *trained = (head_products(model) for model in (reference, *run.models))
    written = np.abs(np.asarray(built.output_value)).sum((1, 2, 3)) > 0
    layer = int(written.argmax())
    return [
        _weights(
            f"{title} of layer {layer + 1}, summed over heads",
            (names, names),
            np.asarray(getattr(built, part)[layer].sum(0)),
            [np.asarray(getattr(t, part)[layer].sum(0)) for t in trained],
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


@in_style
def figure(panels: list[Weights]) -> Picture:
    """Construction, trained and difference, a row a matrix."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9.2, sum(_height(p) for p in panels)), layout="constrained")
    heights = [_height(p) for p in panels]
    grid = drawing.subplots(len(panels), 3, squeeze=False, height_ratios=heights)
    for row, panel in zip(grid, panels, strict=True):
        built, trained = np.asarray(panel.construction), np.asarray(panel.trained)
        limit = float(max(np.abs(built).max(), np.abs(trained).max())) or 1.0
        image: Any = None
        shown = (("construction", built), ("trained", trained), ("difference", trained - built))
        for axis, (title, matrix) in zip(row, shown, strict=True):
            image = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="equal")
            axis.set_title(f"{panel.title}\n{title}" if title == "construction" else f"\n{title}")
            ticks(axis.xaxis, panel.columns, rotation=90)
            ticks(axis.yaxis, panel.rows)
            axis.tick_params(length=0, labelsize=7)
            for side in axis.spines.values():
                side.set_visible(False)
        drawing.colorbar(image, ax=list(row), shrink=0.85, aspect=14, pad=0.02)
    text = "; ".join(f"{p.title}: {span(p.distance, percent)}" for p in panels)
    seeds = len(panels[0].distance)
    caption = (
        "Gauge-fixed weights of the first layer with heads, named by slots of the stream: they do "
        "not depend on the basis or scale that a fit happens to choose. Relative distance of "
        f"trained and construction over {seeds} seed{'s' if seeds > 1 else ''}: {text}. The first "
        "seed is shown; all three maps share one scale."
    )
    alt = (
        "Heat maps of weight products in the construction, the trained model, and their difference."
    )
    return Picture("weights", "Are the weights the construction's?", caption, alt, png(drawing))


def _height(panel: Weights) -> float:
    return 0.9 + min(2.4, 2.5 * len(panel.rows) / max(len(panel.columns), 1))


WEIGHTS = Probe(
    "weights",
    "are the weights the construction's, up to their symmetries?",
    "another algorithm, or the same in other layers, has other weights and the same predictions; "
    "of models beyond linear attention only products of matrices are compared",
    measure,
    needs_drawable_weights,
)
