"""The probe table: every named value of an algorithm, probed for in several models, with controls.

Rows are the values that `construction.trace` names, step by step, at the tokens that own them;
columns are the models asked about, then the compiled construction, the probe on the embedding
alone, a model of the same class at random initialisation, and the control task.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax import Array

from constructions.core.embedding import Stream
from constructions.family import Construction
from constructions.runs import Run
from probes.foreign import lacking, no_site
from probes.probe import Probe, Result, table
from probes.regression import Ridge, Split, ridge, split
from probes.style import Picture, figure_of, in_style, png
from probes.subject import Readable, activations, stream_size, too_large, variables
from synthetic.compilation import compile_once
from synthetic.display import ShowsMarkdown, aligned

#: Numbers in the stream of one input up to which values are looked for in all tokens at once.
SMALL = 10_000

CONTROLS = ("construction", "input-only", "random init", "control task")


@dataclass(frozen=True, eq=False)
class ProbeTable(ShowsMarkdown):
    """Held-out R^2 of ridge probes.

    Attributes:
        names: of the rows, "value, step, tokens".
        columns: the models, then `CONTROLS`.
        values: `[row, column]`, the R^2 on test sequences at the layer that is best on validation
            sequences. The control task probes the first model for shuffled targets.
        layers: `[row, column]`, that layer (0 is the embedding).
        by_layer: column -> `[row, layer]`, test R^2 at every layer.
        constant: values left out because they do not vary between inputs.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray
    layers: np.ndarray
    by_layer: Mapping[str, np.ndarray]
    constant: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table as text: R^2, and the layer in brackets."""
        lines = [["value, step, tokens", *self.columns]]
        lines += [
            [name, *(f"{v:.3f} ({layer})" for v, layer in zip(row, layers, strict=True))]
            for name, row, layers in zip(self.names, self.values, self.layers, strict=True)
        ]
        return aligned(lines)

    def to_json(self) -> dict[str, Any]:
        """As plain data; NaN becomes None."""

        def plain(array: np.ndarray) -> list[list[float | None]]:
            return [[None if np.isnan(v) else float(v) for v in row] for row in array]

        return {
            "names": list(self.names),
            "columns": list(self.columns),
            "values": plain(self.values),
            "layers": self.layers.tolist(),
            "by_layer": {name: plain(array) for name, array in self.by_layer.items()},
            "constant": list(self.constant),
        }


@dataclass(frozen=True, eq=False)
class Target:
    """One value at one step, at some tokens: `values` `[batch, token, entry]`.

    `tokens` is None for a value without an owner: the probe then reads the tokens that are read out
    and the mean over all tokens, joined.
    """

    name: str
    step: int | None
    tokens: tuple[int, ...] | None
    role: str
    values: np.ndarray

    @property
    def row(self) -> str:
        """The row of the table that it counts towards."""
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.name}{step}, {self.role}"


def probe_table(
    construction: Construction,
    models: Mapping[str, Readable],
    key: Array,
    *,
    names: tuple[str, ...] | None = None,
    batch: int = 512,
    site: str = "residual",
) -> ProbeTable:
    """Which intermediate values of the algorithm can be read off which model, and where?

    For every name in `construction.trace` and every step, ridge probes (`probes.regression`) on the
    stream of the tokens that own the value, at every layer. Read a number against its neighbours:
    what the input-only column explains needs no model, what random init explains needs no training.
    A value that the algorithm never changes is probed for once.

    It misleads where a model holds a value in other tokens than the construction does, or not
    linearly; and the best of many layers is chosen on validation sequences, but chosen.

    Args:
        construction: whose algorithm it is.
        models: column -> `Transformer`, or a function from inputs to `{site: [layer, batch, token,
            feature]}` with the construction's tokens. The first is what the control task is run on.
        key: of inputs, splits, random initialisation and control task.
        names: of the values, all of the trace if None.
        batch: number of sequences.
        site: what is probed; its axes must begin with tokens.

    ValueError for an unknown name, no model, a column that is named like a control, or activations
    of the wrong shape.
    """
    if not models or set(models) & set(CONTROLS):
        raise ValueError(f"models are named {list(models)}, must be some, and none of {CONTROLS}")
    draw, cut, shuffle, init = jax.random.split(key, 4)
    inputs = compile_once(construction.sample, static_argnums=1)(draw, batch)
    compiled = construction.reference
    initial = construction.counterpart().untrained(init)
    subjects: dict[str, Readable] = {**models, "construction": compiled, "random init": initial}
    embedded = _stream(construction, compiled, *inputs)
    features = {
        name: _features(activations(construction, subject, (site,))(*inputs), site, embedded, name)
        for name, subject in subjects.items()
    }
    features["input-only"] = np.asarray(embedded.values)[None]
    targets, constant = _varying(
        _targets(construction, inputs, embedded, names, compiled.config.depth)
    )
    parts = split(cut, batch)
    order = np.asarray(jax.random.permutation(shuffle, batch))
    first, read = next(iter(models)), np.arange(embedded.values.shape[1])[embedded.read]
    scores = _scores(features, targets, parts, read, order)
    columns = (*models, *CONTROLS)
    rows = tuple(dict.fromkeys(target.row for target in targets))
    values = np.full((len(rows), len(columns)), np.nan)
    layers = np.zeros(values.shape, int)
    by_layer = {}
    for c, column in enumerate(columns):
        real = scores[first if column == "control task" else column]
        total = [real[row][0] for row in rows]
        shown = [real[row][1] for row in rows] if column == "control task" else total
        layers[:, c] = [np.argmax(r2[:, 1]) for r2 in total]
        by_layer[column] = np.array([r2[:, 2] for r2 in shown])
        values[:, c] = by_layer[column][np.arange(len(rows)), layers[:, c]]
    return ProbeTable(rows, columns, values, layers, by_layer, constant)


@compile_once(static_argnums=0)
def _trace(construction: Construction, *inputs: Array) -> OrderedDict[str, Array]:
    """`construction.trace`, in its order: `jit` would sort a dict."""
    return OrderedDict(construction.trace(*inputs))


def _stream(construction: Construction, model: Any, *inputs: Array) -> Stream:
    """`construction.stream`, jitted."""
    read: list[slice] = []

    @compile_once
    def made(*inputs: Array) -> tuple[Array, Array]:
        values, groups, tokens = construction.stream(model, *inputs)
        read.append(tokens)  # no array: known once it is traced
        return values, groups

    return Stream(*made(*inputs), read[0])


def _features(found: Mapping[str, Array], site: str, embedded: Any, name: str) -> np.ndarray:
    """`[layer, batch, token, feature]`."""
    if site not in found:
        raise ValueError(f"activations of '{name}' hold {sorted(found)}, must hold '{site}'")
    array = np.asarray(found[site])
    if array.ndim < 4 or array.shape[1:3] != embedded.values.shape[:2]:
        raise ValueError(
            f"'{site}' of '{name}' has shape {array.shape}, must be [layer, "
            f"{', '.join(map(str, embedded.values.shape[:2]))}, feature]"
        )
    return array.reshape(*array.shape[:3], -1)


def _targets(
    construction: Construction, inputs: Any, embedded: Any, names: Any, depth: int
) -> Iterator[Target]:
    trace = {name: np.asarray(a) for name, a in _trace(construction, *inputs).items()}
    for name in names or ():
        if name not in trace:
            raise ValueError(f"unknown value '{name}', must be one of {sorted(trace)}")
    kinds = np.asarray(embedded.groups).reshape(-1, embedded.values.shape[1])[0]
    labels = np.asarray(construction.program.token_groups)[kinds]
    placed = variables(construction, depth, inputs)
    for name in names or trace:
        flat = trace[name].reshape(len(trace[name]), -1)
        if name not in placed:
            # what nobody owns has steps if its first axis counts the layers
            steps = trace[name].shape[1] if trace[name].ndim > 2 else 1
            steps = steps if steps == depth + 1 else 1
            for step, values in enumerate(np.split(flat, steps, axis=1)):
                number = step if steps > 1 else None
                yield Target(name, number, None, "pooled", values[:, None])
            continue
        layer, token, column = (np.ravel(a) for a in placed[name])
        for number in np.unique(layer):
            for tokens, entries in _blocks(np.flatnonzero(layer == number), token, column):
                role = "+".join(dict.fromkeys(labels[list(tokens)]))
                yield Target(name, int(number), tokens, role, flat[:, entries])


def _blocks(
    entries: np.ndarray, token: np.ndarray, column: np.ndarray
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Entries `[token, column]` of columns that the same tokens own: one probe serves them all."""
    owners: dict[tuple[int, ...], list[np.ndarray]] = {}
    for c in np.unique(column[entries]):
        own = entries[column[entries] == c]
        own = own[np.argsort(token[own], kind="stable")]
        owners.setdefault(tuple(token[own].tolist()), []).append(own)
    for tokens, columns in owners.items():
        yield tokens, np.stack(columns, -1)


def _varying(targets: Iterator[Target]) -> tuple[list[Target], tuple[str, ...]]:
    """Targets without constants and without repetitions of the step before."""
    kept: list[Target] = []
    constant: list[str] = []
    last: dict[Any, np.ndarray] = {}
    for target in targets:
        values = target.values
        if np.ptp(values, axis=0).max() <= 1e-6 * max(1.0, float(np.abs(values).max())):
            constant.append(target.row)
            continue
        same = (target.name, target.tokens, values.shape)
        if same not in last or not np.array_equal(last[same], values):
            kept.append(target)
        last[same] = values
    return kept, tuple(dict.fromkeys(constant))


def _scores(
    features: Mapping[str, np.ndarray],
    targets: list[Target],
    parts: Split,
    read: np.ndarray,
    order: np.ndarray,
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Column -> row -> R^2 `[layer, part]`, of the targets and of the targets in another order."""
    sums: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in features}

    def alike(target: Target) -> tuple[str, tuple[int, ...]]:
        return str(target.tokens), target.values.shape

    # models of one width are probed in one call, as if they were layers of one model
    widths = {name: array.shape[-1] for name, array in features.items()}
    for width in sorted(set(widths.values())):
        names = [name for name in features if widths[name] == width]
        ends = np.cumsum([len(features[name]) for name in names])[:-1]
        joined = np.concatenate([features[name] for name in names])
        for _, same in groupby(sorted(targets, key=alike), alike):
            chosen = list(same)
            own = chosen[0].tokens
            x = _pooled(joined, read) if own is None else joined[:, :, list(own)]
            y = np.stack([target.values for target in chosen])
            y = np.concatenate([y, y[:, order]])
            fit: Ridge = ridge(x, y, parts)
            both = np.stack([np.asarray(fit.residual), np.asarray(fit.total)], 1).astype(float)
            both = both.reshape(len(x), 2, 2, len(chosen), 3)  # layer, sum, real or not, step, part
            for name, layers in zip(names, np.split(both, ends), strict=True):
                for number, target in enumerate(chosen):
                    sums[name].setdefault(target.row, []).append(layers[:, :, :, number])
    scores: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, rows in sums.items():
        r2 = {}
        for row, blocks in rows.items():
            total = np.sum(blocks, axis=0)
            r2[row] = 1 - total[:, 0] / total[:, 1]  # [layer, real or shuffled, part]
        scores[name] = {row: (array[:, 0], array[:, 1]) for row, array in r2.items()}
    return scores


def _pooled(features: np.ndarray, read: np.ndarray) -> np.ndarray:
    """`[layer, batch, 1, ...]`: the mean over tokens, then the tokens that are read out."""
    ends = features[:, :, read].reshape(*features.shape[:2], -1)
    return np.concatenate([features.mean(2), ends], axis=-1)[:, :, None]


def measure(run: Run, seed: int, placed: bool | None = None, models: int | None = None) -> Result:
    """Linear probes for the values that the algorithm names.

    Args:
        run: trained models; they are the first columns.
        seed: of inputs and controls.
        placed: only values that the construction keeps in its stream, as others are looked for in
            all tokens at once. None: of large models only.
        models: how many of the trained models, None for all.
    """
    construction = run.construction
    named = {f"trained {s}": m for s, m in zip(run.seeds, run.models[:models], strict=False)}
    names = None
    if placed or (placed is None and stream_size(construction) > SMALL):
        inputs = construction.sample(jax.random.key(0), 2)
        names = tuple(construction.places(construction.program.depth, *inputs))
    found = probe_table(construction, named, jax.random.key(seed), names=names)
    return table(
        "held-out R^2 of ridge probes",
        found.columns,
        found.names,
        found.values,
        data=found,
        picture=partial(figure, found),
    )


@in_style
def figure(found: ProbeTable) -> Picture:
    """The table as a heat map with its numbers."""
    shown = np.clip(np.nan_to_num(found.values), 0, 1)
    drawing, (axis,) = figure_of(9.2, 0.9 + 0.34 * len(found.names))
    image = axis.imshow(shown, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(found.values):
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
    axis.set_xticks(range(len(found.columns)), found.columns)
    axis.set_yticks(range(len(found.names)), found.names)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    drawing.colorbar(image, ax=axis, label="held-out R²", shrink=0.9, pad=0.02)
    columns = {name: found.values[:, n] for n, name in enumerate(found.columns)}
    means = ", ".join(f"{name}: {np.nanmean(v):.2f}" for name, v in columns.items())
    caption = (
        f"Held-out R² of ridge probes for every value that the algorithm names, at the best layer "
        f"(mean over {len(found.names)} values: {means}). A value counts as found only where the "
        "model's column stands above input-only, random init and the control task."
    )
    if found.constant:
        caption += f" Left out, as they do not vary: {', '.join(found.constant)}."
    alt = "Table of probe scores: algorithm's values by model and control columns."
    title = "Can the algorithm's values be read off?"
    return Picture("probes", title, caption, alt, png(drawing))


def needs_streams(run: Run) -> str:
    """Models that say what they hold at the construction's tokens, in a stream not too large."""
    return too_large(run.construction) or lacking(run, no_site)


LINEAR = Probe(
    "linear",
    "can a value of the algorithm be read off the stream?",
    "the input or a random model holds it as well: compare with those columns",
    measure,
    needs_streams,
    functions=True,
)
