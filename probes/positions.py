"""Held-out linear probes at one position of a sequence, for what an algorithm computes there.

What can be read off a token early in a sequence and late in it are different questions, as the
vector itself changes with what has been seen. Beside the models stand the input alone (the token
before any layer) and a model at random initialisation: the solution of a linear system is partly a
multiple of its right side, so that much of it is read off the input without any computing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.family import Construction
from constructions.imported import random_model
from constructions.runs import Run
from probes.foreign import lacking, no_site
from probes.probe import Probe, Result, seed_names, table
from probes.regression import ridge, split
from probes.subject import Readable, activations, too_large

#: Sequences that the probe draws.
SEQUENCES = 512
INPUT = "input-only"


@dataclass(frozen=True, eq=False)
class PositionProbes:
    """R^2 of ridge probes, the regularisation chosen on validation sequences.

    Attributes:
        targets: names, in the order of the rows.
        held_out: column -> `[target, layer]`, on test sequences (layer 0 is the embedding).
        in_sample: the same on the sequences that the probes were fitted to, as some papers report.
        layers: column -> `[target]`, the layer with the best score on validation sequences.
    """

    targets: tuple[str, ...]
    held_out: Mapping[str, np.ndarray]
    in_sample: Mapping[str, np.ndarray]
    layers: Mapping[str, np.ndarray]

    def best(self, column: str, target: str) -> float:
        """Held-out R^2 at the layer that validation sequences choose."""
        if target not in self.targets:
            raise ValueError(f"target is {target!r}, must be one of {self.targets}")
        row = self.targets.index(target)
        return float(self.held_out[column][row, self.layers[column][row]])


def position_probes(
    construction: Construction,
    models: Mapping[str, Readable],
    targets: Mapping[str, Array],
    inputs: tuple[Array, ...],
    position: int,
    key: Array,
) -> PositionProbes:
    """Can the targets at a position be read off the token there, layer by layer?

    Args:
        construction: how inputs enter; its read-out tokens are the positions.
        models: column -> `Transformer`, or a function from inputs to `{"residual": [layer, batch,
            token, feature]}`. A randomly initialised one is a column like others.
        targets: name -> `[batch, position, entry]`, all with as many entries.
        inputs: of the construction, leading axis `batch`.
        position: counted from 0 among the tokens that are read out.
        key: of the split.

    Returns:
        Scores of the models, and of the construction's embedding as `INPUT`.

    Raises:
        ValueError: no model or one named `INPUT`, no target or one of another shape, or a position
            that does not exist.
    """
    if not models or INPUT in models or not targets:
        raise ValueError(
            f"models are {list(models)}, targets {list(targets)}: must be some, none '{INPUT}'"
        )
    stream, _, read = construction.stream(construction.reference, *inputs)
    tokens = range(stream.shape[1])[read]
    if not 0 <= position < len(tokens):
        raise ValueError(f"position is {position}, must be 0 to {len(tokens) - 1}")
    entries = jnp.shape(next(iter(targets.values())))[-1]
    for name, target in targets.items():
        if jnp.shape(target) != (len(stream), len(tokens), entries):
            raise ValueError(
                f"target '{name}' has shape {jnp.shape(target)}, must be "
                f"{(len(stream), len(tokens), entries)}, [batch, position, entry]"
            )
    parts = split(key, len(stream))
    wanted = jnp.stack([jnp.asarray(a)[:, position, None] for a in targets.values()])
    token = tokens[position]
    features = {INPUT: stream[None, :, token, None]}
    for name, subject in models.items():
        found = activations(construction, subject)(*inputs)["residual"]
        features[name] = found[:, :, token, None]
    held_out, in_sample, layers = {}, {}, {}
    for name, x in features.items():
        fitted = ridge(x, wanted.astype(x.dtype), parts)
        r2 = np.asarray(fitted.r2, float)  # [layer, target, part]
        held_out[name], in_sample[name] = r2[:, :, 2].T, r2[:, :, 0].T
        layers[name] = r2[:, :, 1].argmax(0)
    return PositionProbes(tuple(targets), held_out, in_sample, layers)


def _values(construction: Construction, inputs: tuple[Array, ...]) -> dict[str, Array]:
    """The values of the algorithm with as many entries a position as the prediction has."""
    trace = construction.trace(*inputs)
    shape = trace["prediction"].shape
    return {name: value for name, value in trace.items() if value.shape == shape}


def measure(run: Run, seed: int) -> Result:
    """Probes early, half-way and late in a sequence, for what the algorithm has at every position.

    The layer is chosen on validation sequences, and scored on others.
    """
    construction = run.construction
    draw, cut = jax.random.split(jax.random.key(seed))
    inputs = construction.sample(draw, SEQUENCES)
    targets = _values(construction, inputs)
    length = targets["prediction"].shape[1]
    models: dict[str, Readable] = dict(zip(seed_names(run), run.models, strict=True))
    models["random init"] = random_model(run)
    columns, rows, values = [*models, INPUT], [], []
    for position in sorted({length // 4, length // 2, length - 1}):
        found = position_probes(construction, models, targets, inputs, position, cut)
        for name in targets:
            rows.append(f"{name}, position {position + 1} of {length}")
            values.append([found.best(column, name) for column in columns])
    return table("held-out R^2 of ridge probes by position", columns, rows, values)


def needs_sequences(run: Run) -> str:
    """A prediction, in numbers, at every position of a sequence."""
    construction = run.construction
    if missing := too_large(construction):
        return missing
    inputs = construction.sample(jax.random.key(0), 2)
    shape = jax.eval_shape(lambda *i: construction.trace(*i)["prediction"], *inputs).shape
    stream, _, read = construction.stream(construction.reference, *inputs)
    if len(shape) != 3 or shape[1] != len(range(stream.shape[1])[read]) or shape[1] < 4:
        return f"{type(construction).__name__} predicts no numbers at each of some positions"
    return lacking(run, no_site)


POSITIONS = Probe(
    "positions",
    "what can be read off a token early in a sequence, and what late?",
    "the input column is left out of account: much of a solution is a multiple of its right side",
    measure,
    needs_sequences,
    functions=True,
)
