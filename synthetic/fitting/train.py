"""`fit`: any Flax NNX module on any task, in jitted chunks of steps with data made on the device.

A step is a pure function of the training state and the step's number: the data of step `t` come
from `fold_in(data_key, t)`. Resuming therefore needs nothing but the state, and repeats the bits of
an uninterrupted fit.

`minimize` finds the minimum of a loss known in closed form by full-batch L-BFGS, to the last digit;
it is for use as a library.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from synthetic.display import ShowsHistory
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.recorder import Recorder
from synthetic.fitting.run_directory import RunDirectory, finite
from synthetic.fitting.step import RESERVED, Loop, TrainingState, make_loop
from synthetic.fitting.weights_file import named, unnamed
from synthetic.tasks.task import Task

__all__ = ["Fit", "Minimum", "NonFiniteLossError", "Recipe", "fit", "minimize", "print_progress"]


class NonFiniteLossError(ArithmeticError):
    """A loss, gradient or parameter stopped being finite.

    Attributes:
        step: the first step, counted from 0, at which it was seen.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True, repr=False)
class Fit(ShowsHistory):
    """The result of `fit`.

    Attributes:
        models: the fitted model of every seed: the averaged parameters where the recipe averages,
            else the last iterate.
        last_models: the last iterate of every seed.
        history: one record per chunk, as in `metrics.jsonl`: "step" (steps done), "loss" and
            "gradient_norm" (means over the chunk's steps), "excess" where the optimum is known, and
            the metrics; lists over seeds where `seeds` was given.
        step: steps done.
        seconds: wall time of this call, {"compile": ..., "run": ...}.
        recipe: the settings.
        seeds: the seeds, in the order of `models`.
    """

    models: tuple[nnx.Module, ...]
    last_models: tuple[nnx.Module, ...]
    history: list[dict[str, Any]]
    step: int
    seconds: dict[str, float]
    recipe: Recipe
    seeds: tuple[int, ...]

    @property
    def model(self) -> Any:
        """The fitted model of the first seed."""
        return self.models[0]

    @property
    def last(self) -> Any:
        """The last iterate of the first seed."""
        return self.last_models[0]

    def __repr__(self) -> str:
        """Steps, time, and the losses of the last chunks, a column for each of four seeds."""
        shown = self.seeds[:4]
        kind = type(self.models[0]).__name__ if self.models else "no model"
        lines = [f"Fit of {kind}: {self.step} steps in {sum(self.seconds.values()):.1f} s"]
        more = f" and {len(self.seeds) - len(shown)} more" if len(self.seeds) > len(shown) else ""
        lines.append("    step" + "".join(f"  loss, seed {seed}" for seed in shown) + more)
        for record in self.history[-3:]:
            losses = record["loss"] if isinstance(record["loss"], list) else [record["loss"]]
            cells = zip(shown, losses, strict=False)
            values = (f"{loss:>{12 + len(str(seed))}.4g}" for seed, loss in cells)
            lines.append(f"{record['step']:>8}  " + "  ".join(values))
        return "\n".join(lines)


def fit(
    model: nnx.Module | Callable[[Array], nnx.Module],
    task: Task,
    recipe: Recipe | None = None,
    *,
    predict: Callable[..., Any] | None = None,
    metrics: Callable[[Any], Mapping[str, Any]] | None = None,
    optimum: float | None = None,
    optimizer: str | optax.GradientTransformation | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[Mapping[str, Any]], object] | None = None,
    out: str | PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    lanes: Mapping[str, Sequence[float]] | None = None,
    programs: dict[str, Any] | None = None,
    **overrides: Any,
) -> Fit:
    """Minimises the mean of `task.loss(predict(model, *inputs), batch)` over fresh batches.

    The same seed on the same number of devices gives the same bits. The model passed in is left
    unchanged. Only `nnx.Param`s are trained; other state is carried along.

    Args:
        model: a module, or a function from a key to one (each seed then draws its own weights).
        task: what to sample and the loss per example.
        recipe: the settings; None takes the defaults of `Recipe`.
        predict: `predict(model, *inputs)`; None calls the model.
        metrics: `metrics(model) -> {name: scalar}`, evaluated inside the jitted call at each
            chunk's end, on the averaged parameters where the recipe averages.
        optimum: the least attainable loss, above 0; adds `excess = (loss - optimum) / optimum`.
        optimizer: a name for `Recipe.optimizer`, or an optax transformation used in place of the
            recipe's optimiser, schedule and clipping.
        seed: the seed of the weights (where `model` is a function) and the data.
        seeds: several seeds, fitted at once; needs `model` to be a function.
        mesh: from `devices.mesh`: splits seeds and batch over devices. None uses one device.
        progress: called with each record, and "steps" and "steps_per_second".
        out: the run directory; config, metrics, checkpoints and the fitted model are kept there.
        config: further JSON entries of `config.json`, such as how to rebuild the model.
        resume: continue the run in `out` from its newest readable checkpoint, or from the start
            where there is none yet.
        overwrite: replace a run in `out` once this one has ended: until then, and where it fails,
            the old one stays as it is. Interrupted or killed, it can be resumed.
        lanes: "recipe.learning_rate" or "task.noise" -> a number for every seed, in the place of
            the one in the recipe (`synthetic.fitting.recipe.NUMBERS`) or the task (its `NUMBERS`):
            fits that differ in numbers run in one program. One that stops being finite is then
            said in "failed" of the records, a line or None for every seed, and the others go on.
        programs: a dict in which compiled programs are kept, for further fits that differ from this
            one in seeds, lanes and `out` alone.
        **overrides: fields of `Recipe`, such as `steps=200`.

    Raises:
        ValueError, TypeError: an argument out of range, named.
        RunError: `out` exists, or cannot be resumed with these settings.
        NonFiniteLossError: names the step; the last checkpoint, whose parameters are finite, stays
            in `out`.
    """
    recipe = Recipe() if recipe is None else recipe
    if optimizer is not None:
        overrides["optimizer"] = optimizer if isinstance(optimizer, str) else "custom"
    recipe = dataclasses.replace(recipe, **overrides)
    if optimum is not None and not (math.isfinite(optimum) and optimum > 0):
        raise ValueError(f"optimum={optimum}: must be finite and above 0")
    if (resume or overwrite) and out is None:
        raise ValueError(f"out=None: resume={resume}, overwrite={overwrite} need a run directory")
    if resume and overwrite:
        raise ValueError("resume=True, overwrite=True: choose one")

    began = time.perf_counter()
    loop = make_loop(
        model,
        task,
        recipe,
        predict=predict,
        metrics=metrics,
        transformation=None if isinstance(optimizer, str) else optimizer,
        seed=seed,
        seeds=seeds,
        mesh=mesh,
        lanes=lanes,
        programs=programs,
    )
    which = {"seed": seed} if seeds is None else {"seeds": list(seeds)}
    settings = {"recipe": recipe.to_json(), **which, "optimum": optimum, **(config or {})}
    if lanes:
        settings["lanes"] = {name: list(map(float, values)) for name, values in lanes.items()}
    run = None if out is None else RunDirectory(out)
    with Recorder(run, recipe.checkpoint_every) as recorder:
        recorder.check(settings, resume=resume, overwrite=overwrite)
        state = loop.init()
        # Compiled first: a model that does not fit its task then leaves no directory behind.
        advance = loop.compile(state)
        step, restored, history = recorder.open(settings, state, resume=resume, overwrite=overwrite)
        if restored is not None:
            state = loop.lay_out(restored)
        compiled = time.perf_counter()
        while step < recipe.steps:
            lap = time.perf_counter()
            stop = min((step // loop.length + 1) * loop.length, recipe.steps)
            state, report = advance(state, step, stop)
            record = _record(loop, report, step, stop, optimum, history)
            history.append(record)
            recorder.record(record)
            if progress is not None:
                rate = (stop - step) / (time.perf_counter() - lap)
                progress({**record, "steps": recipe.steps, "steps_per_second": rate})
            step = stop
            following = None if step == recipe.steps else step + loop.length
            if recorder.due(step, following):
                recorder.save(step, loop.host(state))
        host = loop.host(state)
        recorder.finish(_arrays(host), settings)
    ended = time.perf_counter()
    return Fit(
        models=tuple(loop.modules(host, averaged=True)),
        last_models=tuple(loop.modules(host, averaged=False)),
        history=history,
        step=step,
        seconds={"compile": compiled - began, "run": ended - compiled},
        recipe=recipe,
        seeds=loop.seeds,
    )


def print_progress(record: Mapping[str, Any]) -> None:
    """Prints a record of `fit` as one line on stderr: that of `progress_line`."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(progress_line(record))


def progress_line(record: Mapping[str, Any]) -> str:
    """A record of `fit` as one line: loss, distance to the optimum, speed, what is left.

    The excess is that of the chunk's batches, which scatter around the optimum; metrics, where
    there are some, say more and are shown in its place. Several seeds are shown as a range.
    """

    def shown(name: str) -> str:
        value = record[name]
        values = value if isinstance(value, list) else [value]
        if None in values:
            return "n/a"
        ends = dict.fromkeys(format(end, ".4g") for end in (min(values), max(values)))
        return " to ".join(ends)

    metrics = [name for name in record if name not in RESERVED]
    names = ["loss", *(metrics or [name for name in ("excess",) if name in record])]
    parts = [f"step {record['step']}/{record['steps']}"]
    parts += [f"{name.replace('_', ' ')} {shown(name)}" for name in names]
    parts.append(f"{record['steps_per_second']:.0f} steps/s")
    if left := record["steps"] - record["step"]:
        parts.append(f"{left / max(record['steps_per_second'], 1e-9):.0f} s left")
    return "  ".join(parts)


def _record(
    loop: Loop,
    report: Mapping[str, Any],
    start: int,
    stop: int,
    optimum: float | None,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The record of a chunk, from what the jitted call reported; raises NonFiniteLossError."""
    count = stop - start
    means: dict[str, Any] = {}
    if loop.lanes:
        failed = list(history[-1]["failed"] if history else [None] * len(loop.seeds))
        said = (_first_failure(report, lane, start, count) for lane in range(len(failed)))
        failed = [before or now for before, now in zip(failed, said, strict=True)]
        with np.errstate(all="ignore"):
            rows = {n: np.asarray(report[n], np.float64) for n in ("loss", "gradient_norm")}
            shown = {name: values[:count].mean(axis=0).tolist() for name, values in rows.items()}
        measured = {name: np.asarray(value).tolist() for name, value in report["metrics"].items()}
        return finite({"step": stop, **shown, **measured, "failed": failed})
    for name in ("loss", "gradient_norm"):
        values = np.asarray(report[name], np.float64)[:count]
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            step, *seed = bad[0].tolist()
            where = f" of seed {loop.seeds[seed[0]]}" if seed else ""
            raise NonFiniteLossError(
                f"{name.replace('_', ' ')}{where} is {values[tuple(bad[0])]} at step "
                f"{start + step}",
                start + step,
            )
        means[name] = values.mean(axis=0)
    if not report["finite"]:
        raise NonFiniteLossError(f"a parameter is not finite after step {stop - 1}", stop - 1)
    if optimum is not None:
        means["excess"] = (means["loss"] - optimum) / optimum
    measured = {name: np.asarray(value) for name, value in report["metrics"].items()}
    values = {name: value.tolist() for name, value in {**means, **measured}.items()}
    return finite({"step": stop, **values})


def _first_failure(report: Mapping[str, Any], lane: int, start: int, count: int) -> str | None:
    """What of a lane stopped being finite in a chunk, in one line, and when."""
    found = []
    for name in ("loss", "gradient_norm"):
        values = np.asarray(report[name])[:count, lane]
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            shown = name.replace("_", " ")
            found.append((bad[0], f"{shown} is {values[bad[0]]} at step {start + bad[0]}"))
    if found:
        return min(found)[1]
    if not report["finite"][lane]:
        return f"a parameter is not finite after step {start + count - 1}"
    return None


def _arrays(state: TrainingState) -> dict[str, Any]:
    params = state.params if state.average is None else state.average
    return {**params, **state.rest}


@dataclass(frozen=True)
class Minimum:
    """Where `minimize` stopped.

    Attributes:
        model: the minimising model.
        loss: its loss.
        gradient_norm: Euclidean norm of the loss' gradient there.
        iterations: L-BFGS iterations taken.
        converged: whether the gradient norm fell below the tolerance.
    """

    model: Any
    loss: float
    gradient_norm: float
    iterations: int
    converged: bool


def minimize(
    model: nnx.Module,
    loss: Callable[[Any], Array],
    *,
    steps: int = 2000,
    tolerance: float = 1e-12,
    memory: int = 20,
) -> Minimum:
    r"""Minimises `loss(model)` over the model's `nnx.Param`s by L-BFGS with a zoom line search.

    Stops at $\|\nabla L\| \le$ `tolerance`, when the parameters stop moving, or after `steps`
    iterations. One jitted loop, deterministic; meant for float64 (`jax.enable_x64`), where it
    reaches gradients of about 1e-12 times the loss' scale. The given model is not changed.

    Args:
        model: where to start.
        loss: a scalar function of a module of the same structure.
        steps: most iterations, at least 1.
        tolerance: bound on the gradient's norm, at least 0.
        memory: pairs of steps and gradient differences kept.

    Raises:
        ValueError: an argument out of range.
        FloatingPointError: the loss or its gradient is not finite at the start or at the end.
    """
    for name, value, low in (
        ("steps", steps, 1),
        ("memory", memory, 1),
        ("tolerance", tolerance, 0),
    ):
        if not value >= low:
            raise ValueError(f"{name}={value}: must be at least {low}")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def at_params(arrays: dict[str, Array], rest: Any) -> Array:
        return loss(nnx.merge(graphdef, unnamed(arrays, params), rest))

    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=40)
    optimizer = optax.lbfgs(memory_size=memory, linesearch=search)

    @jax.jit
    def run(arrays: dict[str, Array], rest: Any) -> tuple[Any, Array, Array, Array]:
        def at(arrays: dict[str, Array]) -> Array:
            return at_params(arrays, rest)

        def unfinished(carry: Any) -> Array:
            _, _, norm, moved, iteration = carry
            return (iteration < steps) & (norm > tolerance) & moved

        def iterate(carry: Any) -> Any:
            arrays, state, _, _, iteration = carry
            # The line search has evaluated the accepted point already.
            here, gradient = optax.value_and_grad_from_state(at)(arrays, state=state)
            updates, state = optimizer.update(
                gradient, state, arrays, value=here, grad=gradient, value_fn=at
            )
            after: Any = optax.apply_updates(arrays, updates)
            moved = jnp.stack([jnp.any(after[name] != arrays[name]) for name in arrays]).any()
            norm = optax.tree.norm(optax.tree.get(state, "grad"))
            return after, state, norm, moved, iteration + 1

        norm = optax.tree.norm(jax.grad(at)(arrays))
        begin = (arrays, optimizer.init(arrays), norm, jnp.array(True), 0)
        arrays, _, _, _, iterations = jax.lax.while_loop(unfinished, iterate, begin)
        # Evaluated afresh: the line search's own values are those it was led by.
        here, gradient = jax.value_and_grad(at)(arrays)
        return arrays, here, optax.tree.norm(gradient), iterations

    arrays, final, norm, iterations = run(named(params), rest)
    if not (np.isfinite(final) and np.isfinite(norm)):
        raise FloatingPointError(f"loss={float(final)}, gradient norm={float(norm)}: not finite")
    return Minimum(
        model=nnx.merge(graphdef, unnamed(arrays, params), rest),
        loss=float(final),
        gradient_norm=float(norm),
        iterations=int(iterations),
        converged=bool(norm <= tolerance),
    )
