r"""Paths between models that no symmetry of the weights can bend.

The straight line between two sets of weights depends on the bases that they happen to be written
in. The line between what the layers do does not: with delta_l and delta*_l the updates of layer l,

    h  <-  h + (1 - s) delta_l(h) + s delta*_l(h),

which for linear attention is the line (1 - s) T + s T* between canonical forms (see
`constructions.core.symmetry`). The union of both models' heads, with outputs (1 - s) P and s P*,
has exactly this update, so no factorisation is needed to walk along it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from constructions.core.config import Config
from constructions.core.transformer import Transformer
from constructions.family import Construction
from constructions.runs import Run
from probes.probe import Probe, Result, seed_names, table
from synthetic.compilation import compile_once
from synthetic.tasks.task import Batch


def more_than_attention(*configs: Config) -> str:
    """Why models are no sums of heads, in one phrase; "" where they are."""
    for config in configs:
        if config.final_norm or any(m.mlp or m.norm or m.mlp_norm for m in config.layers()):
            return "models must be attention alone to be blended, got an mlp or a norm"
    return ""


def obstacle(one: Config, other: Config) -> str:
    """Why two models cannot be blended, in one phrase; "" where they can."""
    if found := more_than_attention(one, other):
        return found
    for name in ("width", "token_groups"):
        if getattr(one, name) != getattr(other, name):
            return (
                f"{name} of the model is {getattr(one, name)}, "
                f"of the reference {getattr(other, name)}"
            )
    plans = [[(len(s.pattern), s.repeats, s.tied) for s in c.segments] for c in (one, other)]
    if plans[0] != plans[1]:
        return (
            f"segments (layers, repeats, tied) of the model are {plans[0]}, "
            f"of the reference {plans[1]}"
        )
    return ""


def blend(model: Transformer, reference: Transformer, fraction: ArrayLike) -> Transformer:
    """The model whose layers do (1 - s) of what `model`'s do and s of what `reference`'s do.

    Its canonical forms are (1 - s) T + s T*. Any mixer; `fraction` may be traced and may lie
    outside [0, 1].

    Raises:
        TypeError: a model is more than attention: an mlp or a norm has no such line.
        ValueError: depths, widths, token groups or loops differ.
    """
    one, other = model.config, reference.config
    if found := more_than_attention(one, other):
        raise TypeError(found)
    if found := obstacle(one, other):
        raise ValueError(found)
    stored = [m.arrays()["segments"] for m in (model, reference)]
    segments, arrays = [], {}
    for s, pair in enumerate(zip(one.segments, other.segments, strict=True)):
        pattern, layers = [], {}
        for p, (mine, theirs) in enumerate(zip(*(x.pattern for x in pair), strict=True)):
            pattern.append(replace(mine, heads=mine.heads + theirs.heads))
            own, its = (weights[s]["layers"][p]["heads"] for weights in stored)
            groups = [_scaled(w, 1 - fraction) for w in own.values()]
            groups += [_scaled(w, fraction) for w in its.values()]
            layers[p] = {"heads": dict(enumerate(groups))}
        segments.append(replace(pair[0], pattern=tuple(pattern)))
        arrays[s] = {"layers": layers}
    return Transformer(replace(one, segments=tuple(segments)), {"segments": arrays})


def _scaled(heads: Mapping[str, Array], factor: Any) -> dict[str, Array]:
    outputs = ("output", "output_bias")
    return {n: (a * factor).astype(a.dtype) if n in outputs else a for n, a in heads.items()}


def interpolate(
    construction: Construction,
    model: Transformer,
    reference: Transformer,
    batch: Batch,
    fractions: Float[Array, " fraction"],
) -> Float[Array, " fraction"]:
    """Mean loss on a batch along the line from `model` (fraction 0) to `reference` (fraction 1).

    One compilation and the memory of one model, whatever the number of fractions. Unchanged by
    every symmetry of either model, inert weights included. Errors as in `blend`.
    """

    def loss(fraction: Array) -> Array:
        between = blend(model, reference, fraction)
        return construction.task.loss(construction.apply(between, *batch.inputs), batch).mean()

    return jax.lax.map(loss, jnp.asarray(fractions))


def interpolation_gap(losses: Float[Array | np.ndarray, " fraction"]) -> float:
    """max_s loss(s) / min(loss(0), loss(1)) - 1: 0 if no point is worse than the better end.

    The first and the last entry are the ends.
    """
    found = np.asarray(losses)
    return float(found.max() / min(found[0], found[-1]) - 1)


FRACTIONS = tuple(n / 10 for n in range(11))


@compile_once(static_argnums=0, often=True)
def between(
    construction: Construction, model: Transformer, reference: Transformer, examples: Batch
) -> Array:
    """Losses at `FRACTIONS` of the line from model to reference, jitted."""
    fractions = jnp.array(FRACTIONS)
    return interpolate(construction, model, reference, examples, fractions)


def measure(run: Run, seed: int) -> Result:
    """Loss along the line from each trained model to the construction."""
    construction, reference = run.construction, run.construction.reference
    batch = construction.task.sample(jax.random.key(seed), 2048)
    values = [between(construction, model, reference, batch) for model in run.models]
    columns = [f"{100 * f:.0f} %" for f in FRACTIONS]
    return table("loss between trained (0 %) and construction", columns, seed_names(run), values)


def needs_attention_alone(run: Run) -> str:
    """Models that are attention alone, with the construction's layers."""
    reference = run.construction.reference
    return next((f for m in run.models if (f := obstacle(m.config, reference.config))), "")


INTERPOLATION = Probe(
    "interpolation",
    "does a line between what the layers do lose anything?",
    "the loss is convex there, and any two models pass",
    measure,
    needs_attention_alone,
)
