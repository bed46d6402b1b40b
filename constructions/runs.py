"""Runs of a family: fit its counterpart into a run directory, and read one back.

`config.json` of such a run holds, beside what every fit keeps,

    {"family": name in CATALOGUE, or module:attribute, "settings": {...}, "dtype": of the weights}

which is all that is needed to rebuild the construction and the structure of the model; the file
of weights is then checked against that structure, name by name. A run of weights that were trained
elsewhere (`constructions.imported`) has no recipe, but the shape of its model as an entry "model".

Families are named as in the catalogue, and their settings are plain data.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from constructions import CATALOGUE
from constructions.core.compile import untrained
from constructions.core.config import Config
from constructions.core.transformer import Transformer, cast
from constructions.family import Certificate, Construction, Counterpart, verify
from constructions.interchange.export import check_exportable, export
from synthetic.display import ShowsHistory
from synthetic.files import RunError
from synthetic.fitting import devices
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.run_directory import Checkpoints, RunDirectory
from synthetic.fitting.step import seed_keys
from synthetic.fitting.weights_file import check_arrays, check_numbers, load_state, named, unnamed


def construct(name: str, settings: Mapping[str, Any] | None = None) -> Construction:
    """The construction of a family: its example settings, with these in their place.

    Raises:
        ValueError: unknown family or setting, or a setting out of range.
    """
    return construct_exactly(name, {**CATALOGUE.find(name).example(), **(settings or {})})


def construct_exactly(name: str, settings: Mapping[str, Any]) -> Construction:
    """The construction with these settings and no others; errors as in `construct`."""
    family = CATALOGUE.find(name)
    known = inspect.signature(family.constructor).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for setting in settings:
        if setting not in known and not free:
            raise ValueError(
                f"unknown setting {setting!r} of {name}, must be one of {', '.join(known)}"
            )
    try:
        return family(**settings)
    except TypeError as error:  # a string where a number is wanted, say
        raise ValueError(f"settings {dict(settings)} of {name}: {error}") from error


def plain_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them: arrays and tuples become lists, grammars what they are made of."""

    def one(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return np.asarray(value).tolist()
        if hasattr(value, "to_json"):  # a grammar, a distribution
            return value.to_json()
        raise ValueError(f"settings of {name}: {value!r} cannot be written as JSON")

    return json.loads(json.dumps(dict(settings), default=one, allow_nan=False))


KIND, IMPORT = "fit", "import"
FIELDS = {
    KIND: ("family", "settings", "dtype", "recipe"),
    IMPORT: ("family", "settings", "dtype", "seeds", "model"),
}


@dataclass(frozen=True)
class Run(ShowsHistory):
    """Models of a family that are compared with its construction, most often a fit.

    Attributes:
        family: its name in the catalogue, or "module:attribute".
        settings: of the construction, as plain data.
        construction: the construction with these settings.
        models, seeds: the fitted model of every seed; or models trained elsewhere, numbered.
        history: the records of `metrics.jsonl`; lists over seeds where the run has several. None
            of models trained elsewhere.
        recipe: how it was fitted, None where that is not known.
        optimum: the lowest loss that the class can reach, None where it is not known.
        seconds: wall time of the fit, where it was made by this process.
        path: the run directory, None for a fit that was not kept.
    """

    family: str
    settings: dict[str, Any]
    construction: Construction
    models: tuple[Any, ...]
    seeds: tuple[int, ...]
    history: list[dict[str, Any]]
    recipe: Recipe | None
    optimum: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    path: Path | None = None


def fit_family(
    name: str,
    settings: Mapping[str, Any] | None = None,
    out: str | PathLike[str] | None = None,
    *,
    quick: bool = False,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[Mapping[str, Any]], object] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **overrides: Any,
) -> Run:
    """Fit the counterpart of a family's construction.

    Args:
        name: in the catalogue, or "module:attribute" of a family.
        settings: of the construction, in place of its example settings.
        out: the run directory; None keeps nothing.
        quick: use the settings for a demonstration, where the counterpart has them.
        seed, seeds: one seed (0 if neither is given), or several that are fitted at once.
        mesh, progress: as in `synthetic.fitting.train.fit`.
        resume: continue the run in `out`. What is left out is then what the run was started with.
        overwrite: replace the run in `out`, once the new one has ended.
        **overrides: fields of the recipe.

    Raises:
        ValueError: an argument out of range, named.
        RunError: `out` exists, or cannot be resumed with these settings.
        NonFiniteLossError: names the step.
    """
    given = dict(settings or {})
    if seed is not None and seeds is not None:
        raise ValueError(f"seed={seed}, seeds={list(seeds)}: give one of them")
    if resume:
        if out is None:
            raise ValueError("out=None: resume=True needs a run directory")
        begun = RunDirectory(out).resumable
        old = _read_config(begun, everywhere=True)
        if old["family"] != name:
            raise RunError(f"{begun.config}: family: {old['family']!r}, asked for {name!r}")
        for key, value in plain_settings(name, given).items():
            if key in old["settings"] and old["settings"][key] != value:
                raise RunError(
                    f"{begun.config}: settings.{key}: {old['settings'][key]!r} in the "
                    f"run, {value!r} asked; a resumed fit keeps its settings"
                )
        settings = {**old["settings"], **given}
        if seed is None and seeds is None:
            seed, seeds = old.get("seed"), old.get("seeds")
        base = _recipe(begun, old)
    else:
        settings = {**CATALOGUE.find(name).example(), **given}
        base = None
    construction = construct_exactly(name, settings)
    settings = plain_settings(name, settings)
    counterpart = construction.counterpart()
    if base is None:
        base = counterpart.quick if quick and counterpart.quick else counterpart.recipe
    result = construction.fit(
        recipe=base,
        seed=seed or 0,
        seeds=seeds,
        mesh=mesh,
        progress=progress,
        out=out,
        config={"family": name, "settings": settings, "dtype": str(jnp.zeros(0).dtype)},
        resume=resume,
        overwrite=overwrite,
        **overrides,
    )
    return Run(
        family=name,
        settings=settings,
        construction=construction,
        models=tuple(result.models),  # type: ignore[arg-type]
        seeds=result.seeds,
        history=result.history,
        recipe=result.recipe,
        optimum=counterpart.optimum,
        seconds=result.seconds,
        path=None if out is None else Path(out),
    )


def load_run(path: str | PathLike[str]) -> Run:
    """Read a finished run.

    Raises:
        RunError: one line that names the file and the field: no run, truncated, foreign, of
            another version, or weights whose names, shapes or dtypes are not the family's.
    """
    run = RunDirectory(path)
    config, construction, counterpart = _rebuild(run)
    if not run.model.exists():
        raise RunError(
            f"{run.model}: missing: the fit has not ended; "
            f"`orrery fit {config['family']} --out {run.path} --resume` ends it"
        )
    arrays, _ = load_state(run.model)
    return Run(
        family=config["family"],
        settings=config["settings"],
        construction=construction,
        models=_models(arrays, counterpart, config, run.model),
        seeds=_seeds(config),
        history=run.records(),
        recipe=None if config["kind"] == IMPORT else _recipe(run, config),
        optimum=counterpart.optimum,
        path=run.path,
    )


def initial_models(run: Run) -> tuple[Transformer, ...]:
    """The weights that the fits of a run began with, one model a seed: drawn again, bit for bit."""
    if run.recipe is None:
        raise ValueError(UNKNOWN_START)
    counterpart = run.construction.counterpart()
    with jax.enable_x64(dtype_of(run.models[0]) == "float64"):
        seeds = jnp.asarray(run.seeds, jnp.uint32)
        drawn = [counterpart.init(seed_keys(seed)[0]) for seed in seeds]
        if not run.history or not isinstance(run.history[-1]["loss"], list):
            return tuple(drawn)

        def draw(seed: jax.Array) -> Any:
            return nnx.state(counterpart.init(seed_keys(seed)[0]))

        together = jax.jit(jax.vmap(draw))(seeds)  # as `fit` does, which rounds otherwise
        for n, model in enumerate(drawn):
            nnx.update(model, jax.tree.map(lambda a, n=n: a[n], together))
        return tuple(drawn)


#: What probes of the way from the first weights to the last say of models trained elsewhere.
UNKNOWN_START = "the models were trained elsewhere: what their fits began with is not known"


def load_checkpoints(path: str | PathLike[str]) -> list[tuple[int, tuple[Transformer, ...]]]:
    """The models along a fit, by step: one a seed, the averaged parameters where it averages.

    Checkpoints that are cut off are left out. A run keeps its last few only.

    Raises:
        RunError: as `load_run`; the fit need not have ended.
    """
    run = RunDirectory(path)
    config, _, counterpart = _rebuild(run)
    if not run.checkpoints.is_dir():
        return []
    found = []
    with Checkpoints(run.checkpoints, writes=False) as checkpoints:
        for step in checkpoints.steps():
            arrays = checkpoints.read(step)
            if arrays is None:
                continue
            tree: dict[str, dict[str, np.ndarray]] = {}
            for name, array in arrays.items():
                part, _, rest = name.partition("/")
                tree.setdefault(part, {})[rest] = array
            flat = {**(tree.get("average") or tree.get("params", {})), **tree.get("rest", {})}
            where = run.checkpoints / str(step)
            found.append((step, _models(flat, counterpart, config, where)))
    return found


def export_family(
    name: str,
    settings: Mapping[str, Any] | None,
    out: str | PathLike[str],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Certificate:
    """Write a family's construction as `constructions.interchange.export` does.

    Returns its certificate, which the model card has. `dtype` is "float32", the default, or
    "float64". Errors as in `construct` and `export`.
    """
    family, construction = CATALOGUE.find(name), construct(name, settings)
    with jax.enable_x64(dtype == "float64"):
        model = construction.compile(dtype or "float32").model
    check_exportable(model)  # before the work that a certificate is
    certificate = verify(construction)
    given = plain_settings(name, {**family.example(), **(settings or {})})
    facts = {"name": name, "claim": family.about, "source": family.source}
    facts |= {"settings": f"`{json.dumps(given)}`"}
    export(
        model,
        construction,
        out,
        facts={title: text for title, text in facts.items() if text},
        certificate=certificate,
        overwrite=overwrite,
    )
    return certificate


def export_run(
    run: Run,
    out: str | PathLike[str],
    *,
    seed: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model of a run as `constructions.interchange.export` does.

    Args:
        run: of one seed, or several.
        out: the folder.
        seed: which one; the first if None.
        dtype: "float32" or "float64"; that of the fit if None.
        overwrite: replace an earlier export.

    Raises:
        ValueError: the run has no such seed; as `export`.
    """
    if seed is not None and seed not in run.seeds:
        raise ValueError(f"seed is {seed}, must be one of {', '.join(map(str, run.seeds))}")
    place = 0 if seed is None else run.seeds.index(seed)
    fit = "trained elsewhere, and imported"
    if run.history:
        loss, step = run.history[-1]["loss"], run.history[-1]["step"]
        loss = loss[place] if isinstance(loss, list) else loss
        fit = f"seed {run.seeds[place]}, {step} steps; the loss at the end was {loss:.6g}"
    facts = {
        "name": f"{run.family}, trained",
        "family": f"{run.family}, {CATALOGUE.find(run.family).source}",
        "settings": f"`{json.dumps(run.settings)}`",
        "fit": fit,
    }
    if run.optimum is not None:
        facts["lowest loss that the class can reach"] = f"{run.optimum:.6g}"
    with jax.enable_x64("float64" in (dtype, dtype_of(run.models[place]))):
        model = run.models[place] if dtype is None else cast(run.models[place], dtype)
        export(model, run.construction, out, facts=facts, overwrite=overwrite)


def dtype_of(model: Transformer) -> str:
    """The name of the weights' type."""
    return str(jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype)


def _read_config(run: RunDirectory, *, everywhere: bool = False) -> dict[str, Any]:
    """The checked config; `everywhere`: of a fit, read on the first process for all of them."""

    def read() -> dict[str, Any]:
        config = run.read_config()
        kind = IMPORT if config.get("kind") == IMPORT and not everywhere else KIND
        config = run.read_config(kind, fields=FIELDS[kind])
        types = {"family": str, "settings": dict, "recipe": dict, "model": dict}
        for name, its in types.items():
            if name in config and not isinstance(config[name], its):
                raise RunError(f"{run.config}: {name}: {config[name]!r}, must be a {its.__name__}")
        if config["dtype"] not in ("float32", "float64"):
            raise RunError(f"{run.config}: dtype: {config['dtype']!r}, must be float32 or float64")
        try:
            _seeds(config)
        except (KeyError, TypeError, ValueError):
            found = config.get("seeds", config.get("seed"))
            raise RunError(f"{run.config}: seed: {found!r}, must be an integer") from None
        return config

    if not everywhere:
        return read()
    return json.loads(devices.on_first_process(lambda: json.dumps(read()).encode()))


def _seeds(config: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(map(int, config["seeds"])) if "seeds" in config else (int(config["seed"]),)


def _recipe(run: RunDirectory, config: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.from_json(config["recipe"])
    except (TypeError, ValueError) as error:
        raise RunError(f"{run.config}: recipe: {error}") from error


def _rebuild(run: RunDirectory) -> tuple[dict[str, Any], Construction, Counterpart]:
    config = _read_config(run)
    try:
        CATALOGUE.find(config["family"])
    except ValueError as error:
        said = str(error).removeprefix("unknown family ")
        raise RunError(f"{run.config}: family: {said}") from error
    try:
        construction = construct_exactly(config["family"], config["settings"])
    except ValueError as error:
        raise RunError(f"{run.config}: settings: {error}") from error
    with _precision(config):
        return config, construction, construction.counterpart()


def _precision(config: Mapping[str, Any]) -> Any:
    """The run's own precision, whatever this process' default is."""
    return jax.enable_x64(config["dtype"] == "float64")


def _models(
    arrays: Mapping[str, np.ndarray],
    counterpart: Counterpart,
    config: Mapping[str, Any],
    path: Path,
) -> tuple[Transformer, ...]:
    """One model a seed from arrays that were checked against the counterpart's structure."""
    stacked = len(config["seeds"]) if "seeds" in config else None
    try:
        shape = Config.from_json(config["model"]) if "model" in config else None
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path.parent}/config.json: model: no shape of a model: {error}") from error
    with _precision(config):
        structure: list[Any] = []

        def abstract(key: jax.Array) -> Any:
            model = counterpart.init(key) if shape is None else untrained(shape)
            graphdef, state = nnx.split(model)
            structure.append(graphdef)
            return named(state), state

        shapes, like = jax.eval_shape(abstract, jax.random.key(0))
        lead = () if stacked is None else (stacked,)
        wanted = {n: jax.ShapeDtypeStruct((*lead, *a.shape), a.dtype) for n, a in shapes.items()}
        check_arrays(arrays, wanted, path)
        check_numbers(arrays, path)

        def model(index: int) -> Any:
            own = {n: jnp.asarray(a if stacked is None else a[index]) for n, a in arrays.items()}
            return nnx.merge(structure[0], unnamed(own, like))

        return tuple(model(index) for index in range(stacked or 1))
