"""The probes of a report, one by one: a run's models beside their construction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from jaxtyping import Array

from constructions.claims import Evidence, comparable_weights, predict
from constructions.core.canonical import canonical_distance
from constructions.runs import Run, load_checkpoints
from probes import losses, sections, similarity
from probes.interpolation import obstacle
from probes.ledger import OPPOSITE
from probes.statistics import FRACTIONS, between, compared, sensitivities
from probes.table import probe_table
from probes.tools.result import Result, seed_names, table
from synthetic.tasks.task import Batch

#: Numbers in the stream of one input up to which values are looked for in all tokens at once.
SMALL = 10_000


def linear(run: Run, seed: int) -> Result:
    """Linear probes for every value that the algorithm names.

    Of large models for those only that the construction keeps in its stream: others are looked for
    in all tokens at once.
    """
    construction = run.construction
    models = {f"trained {s}": m for s, m in zip(run.seeds, run.models, strict=True)}
    if sections.check_size(construction, construction.reference) > SMALL:
        found = sections.probes(construction, models, seed)
    else:
        found = probe_table(construction, models, jax.random.key(seed))
    return table("held-out R^2 of ridge probes", found.columns, found.names, found.values)


def interchange(run: Run, seed: int) -> Result:
    """Effect of exchanging one token's stream after every layer."""
    reference = run.construction.reference
    found = sections.patches(run.construction, run.models, reference, seed)
    rows, values = [], []
    for name in ("construction", "trained"):
        effect = getattr(found, name)
        rows += [f"{name}, {layer} layers applied" for layer in range(len(effect))]
        values += effect
    tokens = [f"token {n + 1}" for n in range(len(values[0]))]
    return table("effect of interchanging a token's stream", tokens, rows, values)


def _constant(value: Array) -> Callable[..., Array]:
    return lambda *_: value


def functions(run: Run, seed: int) -> Result:
    """Distance of predictions and cosine of sensitivities to the construction's.

    Logits are compared up to a number common to all outcomes.
    """
    construction, reference = run.construction, run.construction.reference
    inputs = construction.sample(jax.random.key(seed), 256)
    values = []
    for model in run.models:
        ours, theirs = (partial(predict, construction, m) for m in (model, reference))
        one, other = (_constant(compared(construction, f(*inputs))) for f in (ours, theirs))
        distance = similarity.prediction_distance(one, other, inputs)
        cosine = np.nan  # where inputs are no real numbers, a token each
        if not similarity.obstacle(ours, inputs):
            cosine = float(sensitivities(construction, model, reference, inputs))
        values.append([float(distance.relative), float(distance.mean_norm), cosine])
    columns = ("relative prediction distance", "mean prediction distance", "sensitivity cosine")
    result = table("functions, against the construction", columns, seed_names(run), values)
    if any(row[-1] < OPPOSITE for row in values):
        hint = "A cosine near -1: is the sign of the read-out the construction's?"
        return replace(result, note=f"{result.note} {hint}".strip())
    return result


def interpolation(run: Run, seed: int) -> Result:
    """Loss along the line from each trained model to the construction.

    Raises ValueError for models that are more than attention.
    """
    construction, reference = run.construction, run.construction.reference
    batch = construction.task.sample(jax.random.key(seed), 2048)
    for model in run.models:
        if missing := obstacle(model.config, reference.config):
            raise ValueError(missing)
    values = [between(construction, model, reference, batch) for model in run.models]
    columns = [f"{100 * f:.0f} %" for f in FRACTIONS]
    return table("loss between trained (0 %) and construction", columns, seed_names(run), values)


def roll_out(run: Run, seed: int) -> Result:
    """Loss of the last layer looped, undamped and damped."""
    reference = run.construction.reference
    found = losses.roll_out(run.construction, run.models, reference, seed, 2048)
    rows, values = [], []
    for damping, built, trained in zip(
        found.dampings, found.construction, found.trained, strict=True
    ):
        rows += [f"{name}, damping {damping:g}" for name in ("construction", *seed_names(run))]
        values += [built, *trained]
    columns = [f"{n} times" for n in range(len(values[0]))]
    return table("loss of the layer applied again and again", columns, rows, values)


def training(run: Run, seed: int) -> Result:
    """The match along the run's checkpoints: prediction distance and canonical distance."""
    if run.path is None:
        raise ValueError("the run was not kept, so it has no checkpoints")
    construction, reference = run.construction, run.construction.reference
    key = jax.random.key(seed)
    inputs = construction.sample(key, 1024)
    rows, values = [], []
    for step, models in load_checkpoints(run.path):
        for name, model in zip(seed_names(run), models, strict=True):
            ours, theirs = (partial(predict, construction, m) for m in (model, reference))
            distance = similarity.prediction_distance(ours, theirs, inputs)
            evidence = Evidence(construction, model, reference, Batch(inputs, None), key)
            weights = np.nan  # where there is more than linear attention, say
            if not comparable_weights(evidence):
                weights = float(canonical_distance(model, reference, construction.gauge()))
            rows.append(f"step {step}, {name}")
            values.append([float(distance.relative), weights])
    if not rows:
        raise ValueError(f"{run.path}: holds no readable checkpoint")
    columns = ("relative prediction distance", "canonical weight distance")
    return table("match with the construction along the fit", columns, rows, values)
