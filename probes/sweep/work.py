"""A block of a sweep: its fits in one program, what is measured of them, and their run directories.

A point is written as a whole: its run directory, which `constructions.runs.load_run` reads, is made
beside its place with what was measured in it, and takes its place by one rename. A block that was
cut off goes on from its last checkpoint, and what it then writes has the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from constructions import CATALOGUE
from constructions.core.canonical import canonical_distance, obstacle, unlike
from constructions.core.transformer import Transformer
from constructions.family import Construction, Counterpart
from constructions.runs import KIND, Run, construct, plain_settings
from probes import find
from probes.sweep.plan import Point, Sweep
from synthetic.compilation import compile_once
from synthetic.files import RunError, atomic, parse_json, plain, remove
from synthetic.fitting.recipe import NUMBERS, Recipe, varied
from synthetic.fitting.run_directory import RunDirectory
from synthetic.fitting.train import Fit
from synthetic.fitting.weights_file import named, save_model
from synthetic.tasks.task import checked

POINTS, BLOCKS, MEASURED = "points", "blocks", "measured.json"
#: What fits of one program may differ in; `b1` decides the state of plain gradient descent.
SHARED = tuple(name for name in NUMBERS if name != "b1")


def layout(sweep: Sweep) -> list[list[Point]]:
    """The blocks of a sweep, the same wherever it is asked for."""
    constructor = CATALOGUE.find(sweep.name).constructor
    return sweep.blocks(getattr(constructor, "numbers", ()), SHARED)


def measured(out: Path, point: Point) -> dict[str, Any] | None:
    """What was measured at a point: {"rows": one a seed, "notes": lines}; None: not there yet."""
    file = out / POINTS / point.folder / MEASURED
    try:
        return parse_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{out / POINTS / point.folder / MEASURED}: cannot be read: {error}"
        ) from error


@dataclass
class Prepared:
    """A point with what its fit is made of.

    Attributes:
        point: of the grid.
        construction, counterpart, recipe: at its settings.
        lanes: which fits of the block are its seeds.
        rows, notes: what was measured; see `measured`.
    """

    point: Point
    construction: Construction
    counterpart: Counterpart
    recipe: Recipe
    lanes: slice = field(default_factory=lambda: slice(0))
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(sweep: Sweep, point: Point, made: dict[str, Any]) -> Prepared:
    """The construction and the recipe of a point; ValueError where there are none.

    Points of equal settings have one construction, which `made` keeps.
    """
    settings, fields = sweep.split(point)
    name = json.dumps(settings, sort_keys=True, default=repr)
    if name not in made:
        construction = construct(sweep.name, settings)
        made[name] = construction, construction.counterpart()
    construction, counterpart = made[name]
    recipe = counterpart.recipe
    if sweep.quick and counterpart.quick is not None:
        recipe = counterpart.quick
    try:
        return Prepared(point, construction, counterpart, replace(recipe, **fields))
    except TypeError as error:
        raise ValueError(f"settings {fields} of a recipe: {error}") from error


def work(
    sweep: Sweep,
    number: int,
    block: Sequence[Point],
    out: Path,
    programs: dict[str, Any] | None = None,
    progress: Callable[[Mapping[str, Any]], object] | None = None,
) -> None:
    """Fit, measure and write the points of a block that are not there yet.

    A point whose settings are refused, or whose fit diverges, is written with the line that says
    so. Whatever else goes wrong is raised.

    Args:
        sweep, number, block: the sweep, and which of its `layout`.
        out: its folder.
        programs: compiled programs, kept from block to block.
        progress: called with the records of the fit.
    """
    ready: list[Prepared] = []
    made: dict[str, Any] = {}
    for point in block:
        try:
            ready.append(prepare(sweep, point, made))
        except ValueError as error:
            if measured(out, point) is None:
                rows = [row(point, seed, str(error)) for seed in sweep.seeds]
                write(out, point, rows, [])
    if all(measured(out, prepared.point) is not None for prepared in ready):
        remove(out / BLOCKS / f"{number:05d}")
        return
    count = len(sweep.seeds)
    for n, prepared in enumerate(ready):
        prepared.lanes = slice(n * count, (n + 1) * count)
    kept = {} if programs is None else programs.setdefault(_program(sweep, ready), {})
    result = fit(sweep, ready, out / BLOCKS / f"{number:05d}", kept, progress)
    measure(sweep, ready, result, kept)
    for prepared in ready:
        if measured(out, prepared.point) is None:
            write(
                out,
                prepared.point,
                prepared.rows,
                prepared.notes,
                lambda path, own=prepared: write_run(sweep, own, result, path),
            )
    remove(out / BLOCKS / f"{number:05d}")


def _program(sweep: Sweep, ready: Sequence[Prepared]) -> str:
    """A name for the programs of a block: what is the same for all of its points, and how many."""
    first = ready[0]
    free = {*first.construction.numbers, *SHARED}
    settings, fields = sweep.split(first.point)
    same = {n: v for n, v in {**settings, **fields}.items() if n not in free}
    return json.dumps([len(ready), *_lanes(ready), same], sort_keys=True, default=repr)


def _lanes(ready: Sequence[Prepared]) -> dict[str, list[float]]:
    """The numbers in which the points of a block may differ, a value for each point."""
    tasks = [prepared.counterpart.task for prepared in ready]
    recipes = [prepared.recipe for prepared in ready]
    names = [n for n in getattr(type(tasks[0]), "NUMBERS", ()) if getattr(tasks[0], n) > 0]
    found = {f"task.{name}": [float(getattr(task, name)) for task in tasks] for name in names}
    for name in SHARED:
        values = [getattr(recipe, name) for recipe in recipes]
        if name == "learning_rate" or len({*values}) > 1:
            found[f"recipe.{name}"] = list(map(float, values))
    for task, recipe in zip(tasks, recipes, strict=True):
        # a family that says more than is true of its settings is found out here
        alike = varied(task, {n: getattr(tasks[0], n) for n in names}) == tasks[0]
        if not alike or varied(recipe, {n: getattr(recipes[0], n) for n in SHARED}) != recipes[0]:
            raise ValueError(f"points of one block differ: {tasks[0]!r} and {task!r}")
    return found


def fit(
    sweep: Sweep,
    ready: Sequence[Prepared],
    scratch: Path,
    programs: dict[str, Any],
    progress: Callable[[Mapping[str, Any]], object] | None = None,
) -> Fit:
    """All fits of a block at once, kept in `scratch` until their points are written."""
    seeds, first = sweep.seeds, ready[0]
    lanes = {n: [v for v in values for _ in seeds] for n, values in _lanes(ready).items()}
    resume = RunDirectory(scratch).resumable.config.is_file()
    if not resume:
        remove(scratch)  # what was cut off before its first checkpoint
    options: dict[str, Any] = {
        "recipe": first.recipe,
        "seeds": [*seeds] * len(ready),
        "lanes": lanes,
        "metrics": None,
        "optimum": None,
        "programs": programs,
        "progress": progress,
        "config": {"points": [prepared.point.number for prepared in ready]},
    }
    if resume:
        try:
            return first.construction.fit(**options, out=scratch, resume=True)
        except RunError:
            remove(scratch)  # damaged: nothing of it is needed
    return first.construction.fit(**options, out=scratch)


def row(point: Point, seed: int, failed: str | None = None) -> dict[str, Any]:
    """A row of the table without its measurements."""
    return {"point": point.number, **point.values, "seed": seed, "failed": failed}


def measure(sweep: Sweep, ready: Sequence[Prepared], result: Fit, programs: dict[str, Any]) -> None:
    """Fill in the rows and notes of the points."""
    failed = result.history[-1]["failed"]
    for prepared in ready:
        lines = failed[prepared.lanes]
        prepared.rows = [
            row(prepared.point, seed, line) for seed, line in zip(sweep.seeds, lines, strict=True)
        ]
    for name in sweep.measures:
        if name == "loss":
            _measure_losses(sweep, ready, result, programs)
        elif name == "canonical_distance":
            _measure_distances(ready, result, programs)
        else:
            for prepared in ready:
                _measure_probe(sweep, prepared, result, name)


def _fill(ready: Sequence[Prepared], name: str, values: Any) -> None:
    """A number for every fit; None where it is none, or its fit has failed."""
    for prepared in ready:
        for own, value in zip(prepared.rows, np.asarray(values)[prepared.lanes], strict=True):
            own[name] = float(value) if own["failed"] is None and np.isfinite(value) else None


def _measure_losses(
    sweep: Sweep, ready: Sequence[Prepared], result: Fit, programs: dict[str, Any]
) -> None:
    first = ready[0]
    task, construction = first.counterpart.task, first.construction
    # no seed of a fit leads to these inputs, which are the same at all points
    key = jax.random.fold_in(jax.random.key(2**32 - 1), sweep.examples)

    def one(model: Any, numbers: Mapping[str, Any]) -> Any:
        own = varied(task, numbers)
        batch = checked(own, own.sample(key, sweep.examples))
        return own.loss(construction.apply(model, *batch.inputs), batch).mean()

    if "loss" not in programs:
        programs["loss"] = compile_once(jax.vmap(one))  # few examples beside those of a fit
    each = {n: v for n, v in _lanes(ready).items() if n.startswith("task.")}
    each = {n.removeprefix("task."): np.asarray(v, jnp.result_type(float)) for n, v in each.items()}
    count = len(sweep.seeds)
    numbers = {name: np.repeat(values, count) for name, values in each.items()}
    _fill(ready, "loss", programs["loss"](_stacked(result.models), numbers))
    for prepared in ready:
        for own in prepared.rows:
            own["optimum"] = prepared.counterpart.optimum
    references = [prepared.construction.reference for prepared in ready]
    if not _alike(references):
        return
    built = np.asarray(programs["loss"](_stacked(references), each))
    _fill(ready, "construction", np.repeat(built, count))


def _measure_distances(ready: Sequence[Prepared], result: Fit, programs: dict[str, Any]) -> None:
    references = [prepared.construction.reference for prepared in ready]
    model: Any = result.models[0]
    why = "" if _alike(references) else "the constructions of a block have different shapes"
    why = why or obstacle(model.config) or unlike(model.config, references[0].config)
    if why:
        _fill(ready, "canonical_distance", [np.nan] * len(result.models))
        for prepared in ready:
            prepared.notes.append(f"canonical_distance: {why}")
        return
    gauge = ready[0].construction.gauge()
    if "distance" not in programs:
        distances = jax.vmap(lambda model, reference: canonical_distance(model, reference, gauge))
        programs["distance"] = compile_once(distances)
    count = len(result.models) // len(ready)
    each = [reference for reference in references for _ in range(count)]
    found = programs["distance"](_stacked(result.models), _stacked(each))
    _fill(ready, "canonical_distance", found)


def _alike(models: Sequence[Any]) -> bool:
    """Whether models are transformers of one shape."""
    if not all(isinstance(model, Transformer) for model in models):
        return False
    return all(model.config == models[0].config for model in models)


def _stacked(models: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *models)


def _measure_probe(sweep: Sweep, prepared: Prepared, result: Fit, name: str) -> None:
    """Every cell of a probe's table, as a column of the sweep's; each seed asked on its own."""
    probe = find(name.partition(":")[2])
    models = result.models[prepared.lanes]
    for own, seed, model in zip(prepared.rows, sweep.seeds, models, strict=True):
        if own["failed"] is not None:
            continue
        run = as_run(sweep, prepared, [model], [seed], result)
        try:
            found = probe(run)
        except Exception as error:  # what a probe cannot do is a line, and the sweep goes on
            line = f"{name}, seed {seed}: {' '.join(str(error).split()) or type(error).__name__}"
            prepared.notes.append(line)
            continue
        for title, values in zip(found.rows, found.values, strict=True):
            for column, value in zip(found.columns, values, strict=True):
                both = [_of_any_seed(part, seed) for part in (title, column)]
                own[f"{name} [{', '.join(both)}]"] = value


def _of_any_seed(name: str, seed: int) -> str:
    """The title of a row or a column without the number of the seed."""
    return "trained" if name in (f"trained {seed}", f"seed {seed}") else name


def as_run(
    sweep: Sweep, prepared: Prepared, models: Sequence[Any], seeds: Sequence[int], result: Fit
) -> Run:
    """A point as the run that `load_run` will read."""
    settings = {**CATALOGUE.find(sweep.name).example(), **sweep.split(prepared.point)[0]}
    places = [prepared.lanes.start + sweep.seeds.index(seed) for seed in seeds]
    history = [
        {"step": record["step"]}
        | {name: [record[name][n] for n in places] for name in ("loss", "gradient_norm")}
        for record in result.history
    ]
    return Run(
        family=sweep.name,
        settings=plain_settings(sweep.name, settings),
        construction=prepared.construction,
        models=tuple(models),
        seeds=tuple(seeds),
        history=history,
        recipe=prepared.recipe,
        optimum=prepared.counterpart.optimum,
    )


def write_run(sweep: Sweep, prepared: Prepared, result: Fit, path: Path) -> None:
    """The run directory of a point: of its seeds whose fits have not failed, if there are any."""
    models = result.models[prepared.lanes]
    whole = [
        (seed, model)
        for seed, model, own in zip(sweep.seeds, models, prepared.rows, strict=True)
        if own["failed"] is None
    ]
    if not whole:
        return
    seeds, models = zip(*whole, strict=True)
    run, directory = as_run(sweep, prepared, models, seeds, result), RunDirectory(path)
    config: dict[str, Any] = {
        "recipe": prepared.recipe.to_json(),
        "seeds": list(seeds),
        "optimum": run.optimum,
        "family": run.family,
        "settings": run.settings,
        "dtype": str(jnp.zeros(0).dtype),
    }
    directory.write_config(KIND, config)
    for record in run.history:
        directory.append(record)
    each = [named(model) for model in models]
    arrays = {name: np.stack([np.asarray(own[name]) for own in each]) for name in each[0]}
    save_model(directory.model, arrays, config)


def write(
    out: Path,
    point: Point,
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    fill: Callable[[Path], object] = lambda _: None,
) -> None:
    """Put a point in its place, as a whole; `fill` writes its run directory."""
    place = out / POINTS / point.folder
    partial = place.with_name(f".{point.folder}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    fill(partial)
    text = json.dumps(plain({"rows": rows, "notes": notes}), indent=1, allow_nan=False)
    with atomic(partial / MEASURED) as file:
        file.write_text(text + "\n")
    os.replace(partial, place)
