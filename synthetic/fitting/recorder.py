"""Keeps a fit's run directory: opens or resumes it, adds records and checkpoints, ends it."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from synthetic.files import RunError, check_writable
from synthetic.fitting import devices
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.run_directory import NEW, Checkpoints, RunDirectory, first_difference
from synthetic.fitting.weights_file import parse_arrays, save_model

KIND = "fit"


class Recorder:
    """Writes on process 0 only; every process is given what was read.

    Args:
        run: the directory, or None to keep nothing.
        every: most steps between two checkpoints.
        keep: how many checkpoints to keep.
    """

    def __init__(self, run: RunDirectory | None, every: int, keep: int = 3) -> None:
        self._run = run  # as asked for
        self._target = run  # where it is written, which differs while a run is to be replaced
        self._began = False  # by this process
        self._every = every
        self._keep = keep
        self._saved = 0
        self._checkpoints: Checkpoints | None = None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        failed = kind is not None and issubclass(kind, Exception)
        if failed and self._replacing and self._began and self._run is not None:
            # It failed by itself. One that was interrupted, or killed, can be resumed.
            self._run.discard()

    @property
    def _replacing(self) -> bool:
        """Whether this process writes a run that is to take the place of another."""
        return self._target is not self._run

    def _close(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.__exit__()
            self._checkpoints = None

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
                _check_same(run.resumable, _as_json(config))
                run.check_contained()
                check_writable(run.path)
            else:
                run.check_free(overwrite=overwrite)
            return b""

        devices.on_first_process(read)

    def open(
        self, config: Mapping[str, Any], like: Any, *, resume: bool, overwrite: bool
    ) -> tuple[int, Any, list[dict[str, Any]]]:
        """Starts or resumes the run: the step reached, its state (None at 0), its history.

        A run that is to be overwritten stays as it is until `finish`, and so it does where the new
        one fails. A run without any whole checkpoint is resumed from the start.

        Raises:
            RunError: as `check`, or `resume` finds no readable checkpoint or one of another model.
        """
        if self._run is None:
            return 0, None, []
        run = self._run
        config = _as_json(config)

        def read() -> bytes:
            if not resume:
                new = run.create(overwrite=overwrite)
                self._target = run if new == run else new
                self._began = True
                new.write_config(KIND, config)
                self._checkpoints = Checkpoints(new.checkpoints, self._keep)
                return b""
            run.settle()
            old = run.resumable
            self._target = run if old == run else old
            self._checkpoints = Checkpoints(old.checkpoints, self._keep)
            found = self._checkpoints.restore(_flat(like))
            step, arrays = found or (0, {})
            if step > config["recipe"]["steps"]:
                raise RunError(
                    f"{old.config}: recipe.steps: {config['recipe']['steps']} asked, but the run "
                    f"has reached step {step}"
                )
            old.write_config(KIND, config)
            return _pack(step, old.truncate(step), arrays)

        packed = devices.on_first_process(read)
        if not packed:
            return 0, None, []
        step, history, arrays = _unpack(packed)
        self._saved = step
        return step, _unflat(arrays, like) if step else None, history

    def record(self, record: Mapping[str, Any]) -> None:
        """Adds a record to the metrics."""
        if self._checkpoints is not None and self._target is not None:
            self._target.append(record)

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
        """Writes the fitted model, and puts the run in the place of the one that it replaces."""
        if self._checkpoints is None or self._run is None or self._target is None:
            return
        save_model(self._target.model, arrays, config, overwrite=True)
        self._close()
        if self._replacing:
            self._run.replace()
            self._target = self._run


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
    if run.path.name == NEW:
        why += f"; remove {run.path} to give up this run, which was to replace the other"
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
