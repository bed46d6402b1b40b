"""Keeps a fit's run directory: opens or resumes it, adds records and checkpoints, ends it."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from synthetic import devices
from synthetic.checkpoints import Checkpoints
from synthetic.recipe import Recipe
from synthetic.runs import RunDirectory, first_difference
from synthetic.saved import RunError, parse_arrays, save_model

KIND = "fit"


class Recorder:
    """Writes on process 0 only; every process is given what was read.

    Args:
        run: the directory, or None to keep nothing.
        every: most steps between two checkpoints.
        keep: how many checkpoints to keep.
    """

    def __init__(self, run: RunDirectory | None, every: int, keep: int = 3) -> None:
        self._run = run
        self._every = every
        self._keep = keep
        self._saved = 0
        self._checkpoints: Checkpoints | None = None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._checkpoints is not None:
            self._checkpoints.__exit__()

    def check(self, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Whether the run can be started or resumed; reads only.

        Raises:
            RunError: as `RunDirectory.create`, or `resume` finds no run or another recipe.
        """
        if self._run is None:
            return
        run = self._run

        def read() -> bytes:
            if resume:
                _check_same(run, _as_json(config))
            else:
                run.check_free(overwrite=overwrite)
            return b""

        devices.on_first_process(read)

    def open(
        self, config: Mapping[str, Any], like: Any, *, resume: bool, overwrite: bool
    ) -> tuple[int, Any, list[dict[str, Any]]]:
        """Starts or resumes the run: the step reached, its state (None at 0), its history.

        Raises:
            RunError: as `check`, or `resume` finds no readable checkpoint or one of another model.
        """
        if self._run is None:
            return 0, None, []
        run = self._run
        config = _as_json(config)

        def read() -> bytes:
            if not resume:
                run.create(overwrite=overwrite)
                run.write_config(KIND, config)
                self._checkpoints = Checkpoints(run.checkpoints, self._keep)
                return b""
            self._checkpoints = Checkpoints(run.checkpoints, self._keep)
            found = self._checkpoints.restore(_flat(like))
            step, arrays = found or (0, {})
            if step > config["recipe"]["steps"]:
                raise RunError(
                    f"{run.config}: recipe.steps: {config['recipe']['steps']} asked, but the run "
                    f"has reached step {step}"
                )
            run.write_config(KIND, config)
            return _pack(step, run.truncate(step), arrays)

        packed = devices.on_first_process(read)
        if not packed:
            return 0, None, []
        step, history, arrays = _unpack(packed)
        self._saved = step
        return step, _unflat(arrays, like) if step else None, history

    def record(self, record: Mapping[str, Any]) -> None:
        """Adds a record to the metrics."""
        if self._checkpoints is not None and self._run is not None:
            self._run.append(record)

    def due(self, step: int, following: int | None) -> bool:
        """Whether to save at `step`, the next chance being at `following` (None: there is none)."""
        last_chance = following is None or following - self._saved > self._every
        return self._run is not None and last_chance and step > self._saved

    def save(self, step: int, state: Any) -> None:
        """Writes the checkpoint of `step` from a host state."""
        self._saved = step
        if self._checkpoints is not None:
            self._checkpoints.save(step, _flat(state))

    def finish(self, arrays: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Writes the fitted model."""
        if self._checkpoints is not None and self._run is not None:
            save_model(self._run.model, arrays, config, overwrite=True)


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config))


def _check_same(run: RunDirectory, config: Mapping[str, Any]) -> None:
    found = run.read_config(KIND, fields=config)
    recipe = Recipe.from_json(config["recipe"])
    # The rate and the tail average of a step depend on how many steps there will be.
    grows = recipe.schedule == "constant" and recipe.average_tail is None
    free = ["format", "version", "kind", "recipe.checkpoint_every"]
    difference = first_difference(found, config, [*free, "recipe.steps"] if grows else free)
    if difference is None:
        return
    name, has, asked = difference
    why = "a resumed fit keeps its settings"
    if name == "recipe.steps":
        why = "only a constant schedule without average_tail can be given other steps"
    raise RunError(f"{run.config}: {name}: {has!r} in the run, {asked!r} asked; {why}")


def _flat(state: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def _unflat(arrays: Mapping[str, np.ndarray], like: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _flat(like)])


def _pack(step: int, history: list[dict[str, Any]], arrays: Mapping[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    header = np.frombuffer(json.dumps([step, history]).encode(), np.uint8)
    return save({"header": header, **{f"state/{k}": v for k, v in arrays.items()}})


def _unpack(data: bytes) -> tuple[int, list[dict[str, Any]], dict[str, np.ndarray]]:
    arrays = parse_arrays(data)
    step, history = json.loads(arrays.pop("header").tobytes())
    return step, history, {name.removeprefix("state/"): x for name, x in arrays.items()}
