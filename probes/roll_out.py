"""Does a layer, applied again and again, go on with the algorithm?

    h  <-  h + damping * delta(h),

delta the update of one layer, is gradient descent with step size damping * eta where the layer is
one step of it. A layer that only fits the training loss need not go on like that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from constructions.claims import is_function, masks
from constructions.core.canonical import obstacle, without_inert
from constructions.core.config import SegmentConfig
from constructions.core.transformer import Edit, Transformer
from constructions.family import Construction
from constructions.runs import Run
from probes.foreign import Subject, no_edits
from probes.probe import Probe, Result, compiled_like, own_near_misses, seed_names, table
from probes.style import (
    GREEN,
    GREY,
    NEAR_MISSES,
    TRAINED,
    Picture,
    band,
    figure_of,
    four,
    in_style,
    number,
    percent,
    png,
)
from synthetic import guards
from synthetic.compilation import compile_once
from synthetic.tasks.task import Batch


def roll_out(
    construction: Construction,
    model: Transformer | Subject,
    *inputs: Array,
    depth: int,
    damping: ArrayLike = 1.0,
    layer: int = -1,
) -> Float[Array, "step *prediction"]:  # noqa: UP037
    """Predictions along h <- h + damping * delta(h), the same layer over and over.

    For a layer that does one step of gradient descent this is gradient descent with step size
    damping * eta.

    Args:
        construction: says how inputs enter and where the prediction stands.
        model: whose layer is applied; a `Subject` with the stream as its site "residual", in the
            construction's columns, and edits of it.
        inputs: of the construction.
        depth: how often, at least 0.
        damping: lambda; may be traced.
        layer: which of the model's layers, counted as they are applied; the last by default.

    Returns:
        Predictions before the first and after every application, `[depth + 1, *prediction]`.

    Raises:
        ValueError: negative depth, no such layer, or a construction that does not say where the
            prediction stands; a subject whose prediction does not stand there.
    """
    guards.number("depth", depth, whole=True, least=0)
    if isinstance(model, Subject):
        if missing := no_stream(construction, model, inputs):
            raise ValueError(missing)
        return _roll_out_by_hand(
            construction, model, inputs, depth, float(np.asarray(damping)), layer
        )
    single = _one_layer(model, layer)
    places, slots = construction.places(1, *inputs), construction.program.slots
    if "prediction" not in places:
        raise ValueError(f"{construction} names no place of the prediction in the stream")
    # the place is one of layer 1; the same tokens and columns are read at every depth
    place = replace(places["prediction"], layer=np.zeros_like(places["prediction"].layer))
    stream, groups, _ = construction.stream(single, *inputs)
    factor = jnp.asarray(damping, stream.dtype)

    def step(h: Array, _: None) -> tuple[Array, Array]:
        return h + factor * (single(h, groups) - h), place.gather(h[None], slots)

    last, predictions = jax.lax.scan(step, stream, length=depth)
    return jnp.concatenate([predictions, place.gather(last[None], slots)[None]])


def no_stream(construction: Construction, model: Any, inputs: Any) -> str:
    """Why a function has no layer to apply again, in one phrase; "" where it has."""
    if missing := no_edits(construction, model):
        return missing
    residual, slots = model.read(*inputs)["residual"], construction.program.slots
    places = construction.places(len(residual) - 1, *inputs)
    if "prediction" not in places:
        return f"{construction} names no place of the prediction in the stream"
    if residual.shape[-1] < slots.width:
        return f"the stream has {residual.shape[-1]} columns, the construction's {slots.width}"
    found, said = places["prediction"].gather(jnp.asarray(residual), slots), model(*inputs)
    if not np.allclose(found, said, rtol=SAME, atol=SAME * float(jnp.abs(said).max())):
        return "the prediction is not read off the columns in which the construction keeps it"
    return ""


def _roll_out_by_hand(
    construction: Construction, model: Subject, inputs: Any, depth: int, damping: float, layer: int
) -> Array:
    """The same of a `Subject`: the layer's update is read behind a stream that is put in."""
    residual = model.read(*inputs)["residual"]
    layers, slots = len(residual) - 1, construction.program.slots
    if not -layers <= layer < layers:
        raise ValueError(f"layer is {layer}, the model applies {layers}")
    at = layer % layers
    place = construction.places(1, *inputs)["prediction"]
    place = replace(place, layer=np.zeros_like(place.layer))
    where: Any = np.zeros(residual.shape, bool)
    where[at] = True
    stream, predictions = residual[0], []
    for step in range(depth + 1):
        predictions.append(place.gather(jnp.asarray(stream)[None], slots))
        if step < depth:
            value: Any = np.broadcast_to(stream, residual.shape)
            edit = Edit(where, value)
            after = model.run({"residual": edit}, *inputs)[1]["residual"][at + 1]
            stream = stream + np.asarray(damping, stream.dtype) * (after - stream)
    return jnp.stack(predictions)


def _one_layer(model: Transformer, layer: int) -> Transformer:
    """One of the applied layers as a model of its own."""
    config = model.config
    if not -config.depth <= layer < config.depth:
        raise ValueError(f"layer is {layer}, the model applies {config.depth}")
    s, p, r = config.stored(layer % config.depth + 1)
    alone = SegmentConfig((config.segments[s].pattern[p],))
    own = model.arrays()["segments"][s]["layers"][p]
    arrays = {"segments": {0: {"layers": {0: jax.tree.map(lambda a: a[r : r + 1], own)}}}}
    return Transformer(replace(config, segments=(alone,), final_norm=None), arrays)


DAMPINGS = (1.0, 0.75)
#: Rounding between a prediction and what stands in the stream, relative.
SAME = 1e-4


@dataclass(frozen=True)
class RollOut:
    """Loss when one layer is applied over and over, h <- h + damping * delta(h).

    Attributes:
        dampings: the factors.
        construction: `[damping, step]`, before the first and after every application.
        trained: `[damping, seed, step]`.
        as_trained: whether weights without effect are still there in a trained model.
        near_misses: name -> `[step]`, of other algorithms, at the last of the dampings.
    """

    dampings: list[float]
    construction: list[list[float]]
    trained: list[list[list[float]]]
    as_trained: bool = False
    near_misses: dict[str, list[float]] = field(default_factory=dict)


def measure(run: Run, seed: int, batch: int = 2048, depth: int = 12, bare: bool = True) -> Result:
    """Loss of the last layer looped, undamped and damped.

    Inert weights are removed first: training leaves them where they began, and a second application
    would read what they wrote. Of functions they cannot be; their rows say "as trained".

    Args:
        run: trained models.
        seed: of the inputs.
        batch: how many inputs.
        depth: how often the layer is applied.
        bare: whether inert weights are removed.
    """
    construction = run.construction
    reference = compiled_like(construction, run.models[0])
    drawn = construction.task.sample(jax.random.key(seed), batch)
    names = ["construction", *seed_names(run)]
    models: list[Any] = [reference, *run.models]
    for n, model in enumerate(models):
        if bare and isinstance(model, Transformer):
            models[n] = without_inert(model, construction.gauge())
        elif n:
            names[n] += ", as trained"
    losses = np.array([
        [_rolled(construction, model, drawn, depth, damping) for model in models]
        for damping in DAMPINGS
    ])  # fmt: skip
    left = any("as trained" in name for name in names)
    gauge = construction.gauge()
    missed = {
        name: _rolled(
            construction, without_inert(model, gauge), drawn, depth, DAMPINGS[-1]
        ).tolist()
        for name, model in own_near_misses(construction).items()
    }
    found = RollOut(list(DAMPINGS), losses[:, 0].tolist(), losses[:, 1:].tolist(), left, missed)
    rows = [f"{name}, damping {damping:g}" for damping in DAMPINGS for name in names]
    note = "as trained: weights without effect, which a second application reads, were not removed"
    return table(
        "loss of the layer applied again and again",
        [f"{n} times" for n in range(depth + 1)],
        rows,
        losses.reshape(len(rows), -1),
        note if left else "",
        data=found,
        picture=partial(figure, found),
    )


def needs_attention_alone(run: Run) -> str:
    """Linear attention behind one mask a layer, and a place of the prediction in the stream."""
    construction, gauge = run.construction, run.construction.gauge()
    inputs = construction.sample(jax.random.key(0), 2)
    for model in (compiled_like(construction, run.models[0]), *run.models):
        if is_function(model):
            if found := no_stream(construction, model, inputs):
                return found
            continue
        if found := obstacle(model.config):
            return f"the canonical form is that of linear attention alone; {found}"
        for layer, own in enumerate(masks(model), start=1):
            if len(own) > 1:
                return f"layer {layer} has heads with different masks, so it has no single T"
        width = model.config.width
        if gauge.read.shape[1] != width or gauge.query.shape[0] != width:
            return (
                f"gauge has read {gauge.read.shape} and query {gauge.query.shape}, must be "
                f"[rows, {width}] and [{width}, values]"
            )
    return no_single_layer(construction, construction.sample(jax.random.key(0), 1))


def no_single_layer(construction: Any, inputs: tuple[Any, ...]) -> str:
    """Why no prediction is read after a single layer, in one phrase; "" where one is."""
    try:
        places = construction.places(1, *inputs)
    except ValueError as error:  # such as a family whose layers come in pairs
        return f"a single layer is no model of {type(construction).__name__}: {error}"
    if "prediction" in places:
        return ""
    return f"{type(construction).__name__} names no place of the prediction in the stream"


def _rolled(construction: Any, model: Any, drawn: Batch, depth: int, damping: Any) -> Array:
    if is_function(model):
        steps = roll_out(construction, model, *drawn.inputs, depth=depth, damping=damping)
        return _losses(construction, steps, drawn)
    return _rolled_at_once(construction, model, drawn, depth, damping)


@compile_once(static_argnums=(0, 3), often=True)
def _rolled_at_once(
    construction: Any, model: Transformer, drawn: Batch, depth: int, damping: Any
) -> Array:
    steps = roll_out(construction, model, *drawn.inputs, depth=depth, damping=damping)
    return _losses(construction, steps, drawn)


def _losses(construction: Any, steps: Array, drawn: Batch) -> Array:
    return jax.vmap(lambda p: construction.task.loss(p, drawn).mean())(steps)


@in_style
def figure(data: RollOut) -> Picture:
    """Loss against the number of applications."""
    built, trained = np.asarray(data.construction), np.asarray(data.trained)
    steps = np.arange(built.shape[-1])
    top = 20 * max(built[0, 0], built[0].min())
    # what has left the frame once stays out: beyond it, losses of diverging iterations are noise
    gone = np.maximum.accumulate(~(trained < top), axis=-1)
    shown = np.where(np.roll(gone, 1, axis=-1) & gone, np.nan, trained)
    drawing, (axis,) = figure_of(6.8, 3.2)
    for damping, own, theirs, color in zip(
        data.dampings, built, shown, (TRAINED, GREEN), strict=False
    ):
        band(axis, steps, theirs, color, f"trained, damping {number(damping)}")
        axis.plot(
            steps, own, color=color, ls="--", label=f"construction, damping {number(damping)}"
        )
    for n, losses in enumerate(data.near_misses.values()):
        axis.plot(steps, losses, color=GREY, lw=0.8, zorder=1, label=None if n else NEAR_MISSES)
    axis.set(xlabel="times the layer is applied", ylabel="loss", yscale="log")
    axis.set_ylim(0.5 * np.nanmin(built), top)
    axis.legend(fontsize=8)
    caption = (
        "The same layer applied again and again. Weights without effect on a single application, "
        "which training leaves as they were initialised, are set to zero first"
    )
    caption += ", but of models behind functions." if data.as_trained else "."
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
    if data.near_misses:
        last = built[-1]
        end = int(np.argmin(np.append(last < top, False)))  # as far as it is in the frame
        far = {
            name: float(np.nan_to_num(np.abs(np.array(v[:end]) / last[:end] - 1), nan=np.inf).max())
            for name, v in data.near_misses.items()
        }
        nearest = min(far, key=lambda name: far[name])
        caption += (
            f" If the claim were false: of {len(far)} near-misses, in grey at damping "
            f"{number(data.dampings[-1])}, the closest ({nearest}) is at most "
            f"{percent(far[nearest])} away"
        )
        caption += ": this figure cannot see it." if far[nearest] < SAME else "."
    others = ", and near-misses" if data.near_misses else ""
    alt = (
        "Loss against the number of applications, construction and trained at two dampings"
        f"{others}."
    )
    title = "Does the layer go on as the algorithm would?"
    return Picture("roll-out", title, caption, alt, png(drawing))


ROLL_OUT = Probe(
    "roll-out",
    "does the layer, applied again and again, go on with the algorithm?",
    "as trained, a layer leaves what it writes into the context as it was initialised",
    measure,
    needs_attention_alone,
    functions=True,
)
