"""Runs made of weights that were trained elsewhere, and the check that they were read rightly.

A run directory of kind "import" holds what one of a fit does but the records and the recipe, and
in `config.json` the shape of its model: heads may be of another number and size than those of the
family's counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from constructions import CATALOGUE
from constructions.claims import predict
from constructions.core.transformer import Transformer
from constructions.family import Construction
from constructions.interchange.layouts import flat, read_arrays, to_named
from constructions.interchange.named_weights import with_named
from constructions.runs import (
    IMPORT,
    Run,
    construct_exactly,
    dtype_of,
    initial_models,
    plain_settings,
)
from synthetic.fitting.run_directory import RunDirectory
from synthetic.fitting.step import seed_keys
from synthetic.fitting.weights_file import named, save_model

#: Largest difference to the supplied predictions, relative to their root mean square, that counts
#: as rounding.
AGREES = {"float32": 1e-4, "float64": 1e-6}

Weights = str | PathLike[str] | Mapping[str, Any]


def import_weights(
    name: str,
    weights: Weights | Sequence[Weights],
    settings: Mapping[str, Any] | None = None,
    out: str | PathLike[str] | None = None,
    *,
    layout: str | None = None,
    heads: int | None = None,
    scores: str | None = None,
    transposed: bool = False,
    expect: Weights | Sequence[Weights] | None = None,
    overwrite: bool = False,
) -> Run:
    """Weights trained elsewhere as a run of a family, which every probe and the report take.

    Args:
        name: of the family, in the catalogue, or "module:attribute".
        weights: a file (safetensors, npz, or torch's, read by `weights_only`) or arrays by name; or
            several of them, models of one shape. Names as in
            `constructions.interchange.named_weights`: `layers.0.heads.1.query` `[width, rows]`, or
            of a layout of `constructions.interchange.layouts`.
        settings: of the construction, in place of its example settings.
        out: the run directory; None keeps nothing.
        layout: one of `LAYOUTS`; None: as the names have it.
        heads: how many there are side by side in a matrix, where shapes do not say.
        scores: "plain", query . key, or "scaled", that over the root of a head's rows; None: as the
            names have it.
        transposed: matrices are kept as [out, in] although their names do not say so.
        expect: inputs and "prediction", for each file of weights: what the model says where it was
            trained. Inputs have the names of `construction.arguments`.
        overwrite: replace the run in `out`.

    Raises:
        ValueError: one line with the file, the array and the likely cause; where predictions are
            not those expected, which other reading of the file gives them, if one does.
    """
    given = {**CATALOGUE.find(name).example(), **(settings or {})}
    construction = construct_exactly(name, given)
    directory = None if out is None else RunDirectory(out)
    if directory is not None:
        directory.check_free(overwrite=overwrite)
    every = _several(weights)
    wanted = [None] * len(every) if expect is None else _several(expect)
    if not every:
        raise ValueError("weights (--weights FILE): none given")
    if len(wanted) != len(every):
        raise ValueError(f"{len(every)} weights and {len(wanted)} to expect: must be as many")
    options = {"layout": layout, "heads": heads, "scores": scores, "transposed": transposed}
    models: list[Transformer] = []
    for number, (one, supplied) in enumerate(zip(every, wanted, strict=True)):
        where = str(one) if isinstance(one, str | PathLike) else f"weights[{number}]"
        model = _model(construction, _arrays(one), where, options)
        if supplied is not None:
            _check_predictions(construction, model, supplied, _arrays(one), where, options)
        if models and (model.config, dtype_of(model)) != (models[0].config, dtype_of(models[0])):
            raise ValueError(f"{where}: is of another shape or dtype than the first weights")
        models.append(model)
    run = Run(
        family=name,
        settings=plain_settings(name, given),
        construction=construction,
        models=tuple(models),
        seeds=tuple(range(len(models))),
        history=[],
        recipe=None,
        optimum=construction.counterpart().optimum,
        path=None if directory is None else directory.path,
    )
    if directory is not None:
        _write(run, directory, overwrite)
    return run


def random_model(run: Run) -> Transformer:
    """A model of the counterpart's class without training: the first seed's start, if it is known.

    Else one drawn as that of seed 0 is.
    """
    if run.recipe is not None:
        return initial_models(run)[0]
    known = isinstance(run.models[0], Transformer)
    dtype = dtype_of(run.models[0]) if known else str(jnp.zeros(0).dtype)
    with jax.enable_x64(dtype == "float64"):
        return run.construction.counterpart().init(seed_keys(0)[0])


def _several(given: Any) -> list[Any]:
    one = isinstance(given, str | PathLike | Mapping)
    return [given] if one else list(given)


def _arrays(given: Weights) -> dict[str, np.ndarray]:
    return flat(given) if isinstance(given, Mapping) else read_arrays(given)


def _precision(arrays: Mapping[str, np.ndarray]) -> Any:
    """In float64 where an array is, else in float32."""
    return jax.enable_x64(any(a.dtype == np.float64 for a in arrays.values()))


def _model(
    construction: Construction,
    arrays: Mapping[str, np.ndarray],
    where: str,
    options: Mapping[str, Any],
) -> Transformer:
    """The model of these arrays, in their precision."""
    with _precision(arrays):
        base = construction.counterpart().init(jax.random.key(0))
        return with_named(base, to_named(arrays, base.config.width, where=where, **options), where)


def _write(run: Run, directory: RunDirectory, overwrite: bool) -> None:
    """The run directory of an import."""
    model = run.models[0]
    dtype = dtype_of(model)
    config = {
        "family": run.family,
        "settings": run.settings,
        "dtype": dtype,
        "seeds": list(run.seeds),
        "model": model.config.to_json(),
    }
    with jax.enable_x64(dtype == "float64"):
        each = [{n: np.asarray(a) for n, a in named(m).items()} for m in run.models]
    new = directory.create(overwrite=overwrite)
    new.write_config(IMPORT, config)
    save_model(new.model, {n: np.stack([m[n] for m in each]) for n in each[0]}, config)
    if new != directory:
        directory.replace()


def _check_predictions(
    construction: Construction,
    model: Transformer,
    supplied: Weights,
    arrays: Mapping[str, np.ndarray],
    where: str,
    options: Mapping[str, Any],
) -> None:
    """ValueError unless the model says what was supplied; with the reading that does, if any."""
    source = str(supplied) if isinstance(supplied, str | PathLike) else "expect"
    inputs, wanted = _supplied(construction, _arrays(supplied), source)
    error, dtype = _difference(construction, model, inputs, wanted, source), dtype_of(model)
    if error <= AGREES[dtype]:
        return
    said = (
        f"{where}: its predictions differ from those of {source} by {error:.2g} of their root mean "
        f"square, at most {AGREES[dtype]:g} is rounding"
    )
    for cause, other in _other_readings(construction, arrays, where, options):
        for sign, more in ((1, ""), (-1, ", and predictions that are minus those")):
            if _difference(construction, other, inputs, sign * wanted, source) <= AGREES[dtype]:
                raise ValueError(f"{said}; they agree with {cause}{more}")
    raise ValueError(
        f"{said}, and so do other readings (transposed, scaled, other heads, keys for queries, "
        "another sign): are tokens made as the family makes them, with its settings?"
    )


def _supplied(
    construction: Construction, arrays: Mapping[str, np.ndarray], source: str
) -> tuple[tuple[Any, ...], np.ndarray]:
    """The inputs of a construction among arrays, and the prediction."""
    names = [argument.name for argument in construction.arguments]
    if not names:
        kind = type(construction).__name__
        raise ValueError(f"{source}: {kind} does not name its inputs, so none can be supplied")
    for name in (*names, "prediction"):
        if name not in arrays:
            raise ValueError(
                f"{source}: {name}: missing; must hold {', '.join(names)} and prediction"
            )
    try:
        inputs = construction.given(0.0, *(arrays[name] for name in names))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return inputs, np.asarray(arrays["prediction"], float)


def _difference(
    construction: Construction, model: Transformer, inputs: Any, wanted: np.ndarray, source: str
) -> float:
    """Largest difference of predictions over the root mean square of those wanted."""
    with jax.enable_x64(dtype_of(model) == "float64"):
        found = np.asarray(predict(construction, model, *map(jnp.asarray, inputs)), float)
    if found.shape != wanted.shape:
        raise ValueError(
            f"{source}: prediction: shape {list(wanted.shape)}, the model's is {list(found.shape)}"
        )
    root = float(np.sqrt(np.mean(wanted**2)))
    if not root:
        raise ValueError(f"{source}: prediction: is 0 everywhere, which checks nothing")
    return float(np.abs(found - wanted).max()) / root


def _other_readings(
    construction: Construction,
    arrays: Mapping[str, np.ndarray],
    where: str,
    options: Mapping[str, Any],
) -> Iterator[tuple[str, Transformer]]:
    """What the file may mean instead, and the model that it then is."""
    heads = options["heads"]
    changes: list[tuple[str, dict[str, Any]]] = [("these weights", {})]
    for scores in ("scaled", "plain"):
        changes.append((f"--scores {scores}", {"scores": scores}))
    turned = "no --transposed" if options["transposed"] else "--transposed"
    changes.append((turned, {"transposed": not options["transposed"]}))
    changes += [(f"--heads {n}", {"heads": n}) for n in (1, 2, 4, 8) if heads not in (None, n)]
    edits: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [("", lambda a: a)]
    edits.append((" and keys in the place of queries", _queries_for_keys))
    for reading, change in changes:
        for more, edit in edits:
            with _precision(arrays):
                base = construction.counterpart().init(jax.random.key(0))
                try:
                    found = to_named(
                        arrays, base.config.width, where=where, **{**options, **change}
                    )
                    model = with_named(base, edit(found), where)
                except ValueError:  # it cannot be read that way
                    continue
            yield reading + more, model


def _queries_for_keys(arrays: dict[str, Any]) -> dict[str, Any]:
    swap = {"query": "key", "key": "query", "query_bias": "key_bias", "key_bias": "query_bias"}
    return {
        ".".join([*(parts := name.split("."))[:-1], swap.get(parts[-1], parts[-1])]): array
        for name, array in arrays.items()
    }
