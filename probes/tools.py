"""The probes that the command offers on a saved run: name -> function of the run and a seed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from constructions.canonical import canonical_distance
from constructions.runs import Run, load_checkpoints
from probes import losses, sections, similarity
from probes.interpolation import interpolate
from probes.table import probe_table


@dataclass(frozen=True)
class Result:
    """A table of numbers, None where one is not defined.

    Attributes:
        title: what the numbers are.
        columns, rows: names.
        values: `[row][column]`.
    """

    title: str
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def draw(self) -> bytes:
        """The table as a heat map, PNG."""
        from matplotlib.figure import Figure

        shown = np.array(self.values, float)
        width, height = 4 + 0.7 * len(self.columns), 4 + 0.3 * len(self.rows)
        figure = Figure(figsize=(min(width, 16), min(height, 14)), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(shown, aspect="auto", cmap="cividis")
        axis.set_xticks(range(len(self.columns)), self.columns, rotation=90)
        axis.set_yticks(range(len(self.rows)), self.rows)
        axis.set_title(self.title, fontsize=9, wrap=True)
        figure.colorbar(image, ax=axis)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
        return buffer.getvalue()


Tool = Callable[[Run, int], Result]


def _result(title: str, columns: Any, rows: Any, values: Any) -> Result:
    array = np.asarray(values, float)
    plain = [[float(v) if np.isfinite(v) else None for v in row] for row in array]
    return Result(title, [str(c) for c in columns], [str(r) for r in rows], plain)


def linear(run: Run, seed: int) -> Result:
    """Linear probes for every value that the algorithm names."""
    models = {f"trained {s}": m for s, m in zip(run.seeds, run.models, strict=True)}
    table = probe_table(run.construction, models, jax.random.key(seed))
    return _result("held-out R^2 of ridge probes", table.columns, table.names, table.values)


def interchange(run: Run, seed: int) -> Result:
    """Effect of exchanging one token's stream after every layer."""
    reference = run.construction.compile().model
    found = sections.patches(run.construction, run.models, reference, seed)
    rows, values = [], []
    for name in ("construction", "trained"):
        effect = getattr(found, name)
        rows += [f"{name}, {layer} layers applied" for layer in range(len(effect))]
        values += effect
    tokens = [f"token {n + 1}" for n in range(len(values[0]))]
    return _result("effect of interchanging a token's stream", tokens, rows, values)


def functions(run: Run, seed: int) -> Result:
    """Distance of predictions and cosine of sensitivities to the construction's."""
    construction, reference = run.construction, run.construction.compile().model
    inputs = construction.sample(jax.random.key(seed), 256)
    values = []
    for model in run.models:
        ours, theirs = (partial(construction.apply, m) for m in (model, reference))
        distance = similarity.prediction_distance(ours, theirs, inputs)
        try:
            cosine = float(similarity.sensitivity_cosine(ours, theirs, inputs))
        except (TypeError, ValueError):  # inputs that are no real numbers, a token each
            cosine = np.nan
        values.append([float(distance.relative), float(distance.mean_norm), cosine])
    columns = ("relative prediction distance", "mean prediction distance", "sensitivity cosine")
    return _result("functions, against the construction", columns, _seeds(run), values)


def interpolation(run: Run, seed: int) -> Result:
    """Loss along the line from each trained model to the construction."""
    construction, reference = run.construction, run.construction.compile().model
    batch = construction.task.sample(jax.random.key(seed), 2048)
    fractions = jnp.linspace(0, 1, 11)
    line = jax.jit(lambda model: interpolate(construction, model, reference, batch, fractions))
    values = [line(model) for model in run.models]
    columns = [f"{100 * f:.0f} %" for f in fractions]
    return _result("loss between trained (0 %) and construction", columns, _seeds(run), values)


def roll_out(run: Run, seed: int) -> Result:
    """Loss of the last layer looped, undamped and damped."""
    reference = run.construction.compile().model
    found = losses.roll_out(run.construction, run.models, reference, seed, 2048)
    rows, values = [], []
    for damping, built, trained in zip(
        found.dampings, found.construction, found.trained, strict=True
    ):
        rows += [f"{name}, damping {damping:g}" for name in ("construction", *_seeds(run))]
        values += [built, *trained]
    columns = [f"{n} times" for n in range(len(values[0]))]
    return _result("loss of the layer applied again and again", columns, rows, values)


def training(run: Run, seed: int) -> Result:
    """The match along the run's checkpoints: prediction distance and canonical distance."""
    if run.path is None:
        raise ValueError("the run was not kept, so it has no checkpoints")
    construction, reference = run.construction, run.construction.compile().model
    inputs = construction.sample(jax.random.key(seed), 1024)
    rows, values = [], []
    for step, models in load_checkpoints(run.path):
        for name, model in zip(_seeds(run), models, strict=True):
            ours, theirs = (partial(construction.apply, m) for m in (model, reference))
            distance = similarity.prediction_distance(ours, theirs, inputs)
            try:
                weights = float(canonical_distance(model, reference, construction.gauge()))
            except (TypeError, ValueError):  # more than linear attention, or another depth
                weights = np.nan
            rows.append(f"step {step}, {name}")
            values.append([float(distance.relative), weights])
    if not rows:
        raise ValueError(f"{run.path}: holds no readable checkpoint")
    columns = ("relative prediction distance", "canonical weight distance")
    return _result("match with the construction along the fit", columns, rows, values)


def _seeds(run: Run) -> list[str]:
    return [f"seed {seed}" for seed in run.seeds]


TOOLS: dict[str, Tool] = {
    "linear": linear,
    "interchange": interchange,
    "similarity": functions,
    "interpolation": interpolation,
    "roll-out": roll_out,
    "training": training,
}


def find(name: str) -> Tool:
    """The tool of that name; ValueError lists the known ones."""
    if name not in TOOLS:
        raise ValueError(f"unknown tool {name!r}, must be one of {', '.join(TOOLS)}")
    return TOOLS[name]
