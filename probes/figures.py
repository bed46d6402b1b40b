"""The figures of a report: data in, PNG bytes out; captions state the answer with its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from probes.comparison import Comparison
from probes.losses import Curves, RollOut, ScaleCurve
from probes.sections import Patches, Weights
from probes.style import (
    CONSTRUCTION,
    GREEN,
    GREY,
    MOST_LABELS,
    OPTIMUM,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    TRAINED,
    Picture,
    band,
    figure_of,
    four,
    number,
    percent,
    png,
    span,
)
from probes.table import ProbeTable


def pictures(comparison: Comparison) -> list[Picture]:
    """All figures that the comparison has data for, in the order of the report."""
    makers: list[tuple[Any, Callable[[Any], Picture]]] = [
        (comparison.curves, _loss),
        (comparison.weights, _weights),
        (comparison.probes, _probes),
        (comparison.patches, _patches),
        (comparison.scale_curve, _scale),
        (comparison.roll_out, _roll_out),
    ]
    with matplotlib.rc_context(STYLE):
        return [make(data) for data, make in makers if data is not None]


def _loss(curves: Curves) -> Picture:
    names = {"exact_excess": "exact excess over the optimum"}
    metrics = {n: np.asarray(v, float) for n, v in curves.metrics.items()}
    metrics = {n: v for n, v in metrics.items() if np.isfinite(v).all() and (v > 0).all()}
    figure, axes = figure_of(9.2, 3.3, 2 if metrics else 1)
    left, seeds = axes[0], len(curves.losses)
    who = f"trained, {seeds} seeds (mean, range)" if seeds > 1 else "trained"
    band(left, curves.steps, curves.losses, TRAINED, who)
    left.axhline(curves.construction, color=CONSTRUCTION, ls="--", label="construction")
    if curves.optimum is not None:
        left.axhline(curves.optimum, color=OPTIMUM, ls=":", label="optimum of the class")
    left.set(xlabel="optimiser steps", ylabel="loss", title="Loss", yscale="log")
    left.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
    left.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
    left.legend()
    for (name, values), color in zip(metrics.items(), (GREEN, PURPLE, ORANGE, SKY), strict=False):
        band(axes[1], curves.steps, values, color, names.get(name, name).replace("_", " "))
    if metrics:
        title = "Distance to the optimum"
        axes[1].set(xlabel="optimiser steps", ylabel="fraction", title=title, yscale="log")
        axes[1].legend()
    level = curves.construction
    excess = [loss / level - 1 for loss in curves.trained]
    caption = (
        f"After {curves.steps[-1]} steps the trained loss is {span(curves.trained, four)} on "
        f"fresh inputs, and the construction's {four(level)} (standard error "
        f"{number(curves.standard_error, 2)}); on the same inputs they differ by "
        f"{span(excess, percent)}."
    )
    if curves.optimum is not None:
        caption += f" The optimum of the class is {four(curves.optimum)}."
    for name, values in metrics.items():
        shown = names.get(name, name).replace("_", " ")
        caption += f" Last {shown}: {span(values[:, -1].tolist(), percent)}."
    alt = "Training loss of every seed falls onto the lines of construction and optimum."
    return Picture("loss", "Does training find the construction's loss?", caption, alt, png(figure))


def _weights(panels: list[Weights]) -> Picture:
    figure = Figure(figsize=(9.2, sum(_height(p) for p in panels)), layout="constrained")
    heights = [_height(p) for p in panels]
    grid = figure.subplots(len(panels), 3, squeeze=False, height_ratios=heights)
    for row, panel in zip(grid, panels, strict=True):
        built, trained = np.asarray(panel.construction), np.asarray(panel.trained)
        limit = float(max(np.abs(built).max(), np.abs(trained).max())) or 1.0
        image: Any = None
        shown = (("construction", built), ("trained", trained), ("difference", trained - built))
        for axis, (title, matrix) in zip(row, shown, strict=True):
            image = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="equal")
            axis.set_title(f"{panel.title}\n{title}" if title == "construction" else f"\n{title}")
            _ticks(axis.xaxis, panel.columns, rotation=90)
            _ticks(axis.yaxis, panel.rows)
            axis.tick_params(length=0, labelsize=7)
            for side in axis.spines.values():
                side.set_visible(False)
        figure.colorbar(image, ax=list(row), shrink=0.85, aspect=14, pad=0.02)
    text = "; ".join(f"{p.title}: {span(p.distance, percent)}" for p in panels)
    seeds = len(panels[0].distance)
    caption = (
        f"Gauge-fixed weights of layer 1, with the slots of the stream as labels: they do not "
        f"depend on the basis or scale that a fit happens to choose. Relative distance of trained "
        f"and construction over {seeds} seed{'s' if seeds > 1 else ''}: {text}. The first seed is "
        "shown; all three maps share one scale."
    )
    alt = (
        "Heat maps of weight products in the construction, the trained model, and their difference."
    )
    return Picture("weights", "Are the weights the construction's?", caption, alt, png(figure))


def _height(panel: Weights) -> float:
    return 0.9 + min(2.4, 2.5 * len(panel.rows) / max(len(panel.columns), 1))


def _ticks(axis: Any, labels: list[str], **options: Any) -> None:
    every = -(-len(labels) // MOST_LABELS)
    axis.set_ticks(range(0, len(labels), every), labels[::every], **options)


def _probes(table: ProbeTable) -> Picture:
    shown = np.clip(np.nan_to_num(table.values), 0, 1)
    figure, (axis,) = figure_of(9.2, 0.9 + 0.34 * len(table.names))
    image = axis.imshow(shown, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(table.values):
        color = "white" if shown[i, j] < 0.55 else "black"
        axis.text(
            j,
            i,
            f"{value + 0:.2f}".replace("-0.00", "0.00"),
            ha="center",
            va="center",
            color=color,
            fontsize=8,
        )
    axis.set_xticks(range(len(table.columns)), table.columns)
    axis.set_yticks(range(len(table.names)), table.names)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.colorbar(image, ax=axis, label="held-out R²", shrink=0.9, pad=0.02)
    columns = {name: table.values[:, n] for n, name in enumerate(table.columns)}
    means = ", ".join(f"{name}: {np.nanmean(v):.2f}" for name, v in columns.items())
    caption = (
        f"Held-out R² of ridge probes for every value that the algorithm names, at the best layer "
        f"(mean over {len(table.names)} values: {means}). A value counts as found only where the "
        "model's column stands above input-only, random init and the control task."
    )
    if table.constant:
        caption += f" Left out, as they do not vary: {', '.join(table.constant)}."
    alt = "Table of probe scores: algorithm's values by model and control columns."
    title = "Can the algorithm's values be read off?"
    return Picture("probes", title, caption, alt, png(figure))


def _patches(patches: Patches) -> Picture:
    built, trained = np.asarray(patches.construction), np.asarray(patches.trained)
    limit = float(max(np.abs(built).max(), np.abs(trained).max())) or 1.0
    figure, axes = figure_of(9.2, 1.5 + 0.28 * len(built), 2, sharey=True)
    image: Any = None
    for axis, title, effect in zip(
        axes, ("construction", "trained"), (built, trained), strict=True
    ):
        image = axis.imshow(effect, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set(title=title, xlabel="token")
        _ticks(axis.xaxis, [str(n + 1) for n in range(built.shape[1])])
        _ticks(axis.yaxis, [str(n) for n in range(len(built))])
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel("layers applied")
    figure.colorbar(image, ax=list(axes), label="effect", shrink=0.9, pad=0.02)
    layer, token = np.unravel_index(np.abs(built).argmax(), built.shape)
    caption = (
        "Effect on the prediction of giving one token, after so many layers, the stream that it "
        "has on another input (1: the prediction becomes the other input's). The maps correlate at "
        f"{span(patches.correlation)} and differ by {span(patches.relative_error, percent)}; the "
        f"largest effect, {number(float(built[layer, token]))} in the construction and "
        f"{number(float(trained[layer, token]))} when trained, is at token {token + 1} after "
        f"{layer} layer{'s' if layer != 1 else ''}."
    )
    alt = "Two maps of patching effects, layers by tokens, construction and trained."
    title = "Is the same information used in the same places?"
    return Picture("patches", title, caption, alt, png(figure))


def _scale(curve: ScaleCurve) -> Picture:
    figure, (axis,) = figure_of(6.4, 3.2)
    band(axis, curve.scales, curve.trained, TRAINED, "trained (mean, range of seeds)")
    axis.plot(curve.scales, curve.construction, color=CONSTRUCTION, ls="--", label="construction")
    axis.axvline(1, color=GREY, lw=0.8, ls=":")
    axis.set(xlabel="scale of the inputs (1: as in training)", ylabel="loss", yscale="log")
    axis.legend()
    built, trained = np.asarray(curve.construction), np.asarray(curve.trained)
    gap = np.abs(trained / built - 1)
    worst = int(gap.max(0).argmax())
    caption = (
        "Off the training distribution the losses differ by at most "
        f"{percent(float(gap.max()))}, at scale {number(curve.scales[worst])} "
        f"(construction {four(float(built[worst]))}, trained "
        f"{span(trained[:, worst].tolist(), four)}): a shared failure is evidence of a shared "
        "algorithm."
    )
    alt = "Loss against the scale of the inputs, construction and trained."
    title = "Does it fail where the algorithm fails?"
    return Picture("scale", title, caption, alt, png(figure))


def _roll_out(data: RollOut) -> Picture:
    built, trained = np.asarray(data.construction), np.asarray(data.trained)
    steps = np.arange(built.shape[-1])
    top = 20 * max(built[0, 0], built[0].min())
    # what has left the frame once stays out: beyond it, losses of diverging iterations are noise
    gone = np.maximum.accumulate(~(trained < top), axis=-1)
    shown = np.where(np.roll(gone, 1, axis=-1) & gone, np.nan, trained)
    figure, (axis,) = figure_of(6.8, 3.2)
    for damping, own, theirs, color in zip(
        data.dampings, built, shown, (TRAINED, GREEN), strict=False
    ):
        band(axis, steps, theirs, color, f"trained, damping {number(damping)}")
        axis.plot(
            steps, own, color=color, ls="--", label=f"construction, damping {number(damping)}"
        )
    axis.set(xlabel="times the layer is applied", ylabel="loss", yscale="log")
    axis.set_ylim(0.5 * np.nanmin(built), top)
    axis.legend(fontsize=8)
    caption = (
        "The same layer applied again and again. Weights without effect on a single application, "
        "which training leaves as they were initialised, are set to zero first."
    )
    for damping, own, theirs in zip(data.dampings, built, trained, strict=True):
        lost = int((~(theirs.max(1) < 100 * own[0])).sum())
        least = int(np.nanargmin(own))  # what diverges ends in NaN
        close = np.abs(theirs[:, : least + 1] / own[: least + 1] - 1)
        caption += (
            f" With damping {number(damping)} the construction's loss goes from {four(own[0])} to "
            f"{four(own[least])} at {least} applications"
        )
        if not own.max() < 100 * own[0]:
            caption += " and diverges"
        caption += (
            f"; the trained models' follow it within {percent(float(close.max()))} up to there"
        )
        caption += f", and {lost} of {len(theirs)} diverge." if lost else "."
    alt = "Loss against the number of applications, construction and trained, two dampings."
    title = "Does the layer go on as the algorithm would?"
    return Picture("roll-out", title, caption, alt, png(figure))
