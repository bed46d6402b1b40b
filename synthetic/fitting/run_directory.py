"""The run directory of a fit: `config.json`, `metrics.jsonl`, `model.safetensors`, `checkpoints/`.

Every file is written whole or appended line by line, so that a run that was killed can be read.

A run is replaced by one rename. The new one is made in `.new`, inside the directory, while the old
one stays as it is. Once its fit has ended, `.new` is renamed to `.whole`: from then on the new run
is the one that is read, part by part from `.whole` as long as it is there and else from the
directory, into which the four parts are then moved. Whoever next writes to the directory ends a
move that was cut off. Other files in the directory are never touched.

Checkpoints, from which a fit is resumed, are written by orbax into a temporary directory that is
renamed when complete.

This file takes and gives host arrays; in a fit of several processes only process 0 uses it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from synthetic.files import (
    RunError,
    TextError,
    atomic,
    check_writable,
    parse_json,
    parse_json_text,
    read_text,
    remove,
    split_lines,
)
from synthetic.fitting.weights_file import check_arrays, load_model, load_state, save_model

__all__ = ["Checkpoints", "RunDirectory", "RunError", "load_model", "load_state", "save_model"]

FORMAT = "orrery-run"
VERSION = 1
PARTS = ("config.json", "metrics.jsonl", "model.safetensors", "checkpoints")
NEW, WHOLE = ".new", ".whole"


@dataclass(frozen=True, init=False)
class RunDirectory:
    """Paths, config and metrics of a run.

    Attributes:
        path: the directory.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "path", Path(path))

    @property
    def config(self) -> Path:
        """What is needed to rebuild and resume the run, JSON."""
        return self._part("config.json")

    @property
    def metrics(self) -> Path:
        """One JSON record per chunk."""
        return self._part("metrics.jsonl")

    @property
    def model(self) -> Path:
        """The fitted model, safetensors; present once the fit has ended."""
        return self._part("model.safetensors")

    @property
    def checkpoints(self) -> Path:
        """The resumable states, by step."""
        return self._part("checkpoints")

    @property
    def resumable(self) -> RunDirectory:
        """Where a resumed fit goes on: in the run that is to replace this one, if one was begun."""
        new = RunDirectory(self.path / NEW)
        return new if new.config.is_file() else self

    def check_free(self, *, overwrite: bool = False) -> None:
        """Whether a new run may begin here.

        Files that end in `.partial` do not count: they are what a write that was cut off leaves.

        Raises:
            RunError: it is a file, cannot be written, or holds anything and `overwrite` is False.
        """
        check_writable(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: exists and is no directory")
        if overwrite or not self.path.exists():
            return
        if any(not file.name.endswith(".partial") for file in self.path.iterdir()):
            resume = "--resume to go on with it, " if self.resumable.config.is_file() else ""
            raise RunError(
                f"{self.path}: exists and is not empty; give {resume}--overwrite to put a new run "
                "in its place, or another directory"
            )

    def create(self, *, overwrite: bool = False) -> RunDirectory:
        """Makes the directory, and gives the one that the new run is to be written to.

        That is this one, or, where `overwrite` replaces a run, one inside it, until `replace`.

        Raises:
            RunError: as `check_free`.
        """
        self.check_free(overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        self.settle()
        self.discard()
        if not any(os.path.lexists(self.path / name) for name in PARTS):
            return self
        new = RunDirectory(self.path / NEW)
        new.path.mkdir()
        return new

    def discard(self) -> None:
        """Removes a run that was to replace this one."""
        remove(self.path / NEW)

    def replace(self) -> None:
        """Puts the run that `create` gave, now that it is whole, in the place of the old one."""
        os.replace(self.path / NEW, self.path / WHOLE)
        self.settle()

    def settle(self) -> None:
        """Ends a replacement that was cut off after its rename; else does nothing."""
        whole = self.path / WHOLE
        if not os.path.lexists(whole):
            return
        for name in PARTS if whole.is_dir() and not whole.is_symlink() else ():
            new, old = whole / name, self.path / name
            if not os.path.lexists(new):
                continue
            if os.path.lexists(old) and (new.is_dir() or old.is_dir()):
                # No rename replaces a directory that holds anything.
                remove(whole / f"old-{name}")
                os.replace(old, whole / f"old-{name}")
            os.replace(new, old)
        remove(whole)

    def check_contained(self) -> None:
        """Whether everything that a resumed fit writes to is inside this directory.

        Raises:
            RunError: a part of the run is a symbolic link.
        """
        found = [self.path / name for name in (NEW, WHOLE)]
        for run in (self.path, self.path / NEW):
            found += [run / name for name in PARTS]
            for folder, folders, files in os.walk(run / "checkpoints"):
                found += [Path(folder) / name for name in (*folders, *files)]
        for file in found:
            if file.is_symlink():
                raise RunError(
                    f"{file}: is a symbolic link; a resumed fit writes inside its directory only: "
                    "put the file itself there"
                )

    def _part(self, name: str) -> Path:
        whole = self.path / WHOLE / name
        return whole if os.path.lexists(whole) else self.path / name

    def write_config(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Writes `config.json` atomically, with the format, its version and the kind of run."""
        content = {"format": FORMAT, "version": VERSION, "kind": kind, **fields}
        with atomic(self.config) as partial:
            partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")

    def read_config(self, kind: str | None = None, fields: Iterable[str] = ()) -> dict[str, Any]:
        """Reads and checks `config.json`.

        Args:
            kind: the kind of run it must be, if any.
            fields: entries it must hold.

        Raises:
            RunError: missing, truncated, foreign, of another version or kind, or without a field.
        """
        file = self.config
        try:
            content = parse_json(file.read_bytes())
        except FileNotFoundError:
            raise RunError(
                f"{file}: missing, so this is no run; `orrery fit NAME --out {self.path}` makes one"
            ) from None
        except OSError as error:
            raise RunError(f"{file}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise RunError(f"{file}: truncated or no JSON: {error}") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise RunError(f"{file}: format: {found!r}, expected {FORMAT!r}")
        if content.get("version") != VERSION:
            raise RunError(f"{file}: version: {content.get('version')!r}, expected {VERSION}")
        if kind is not None and content.get("kind") != kind:
            raise RunError(f"{file}: kind: {content.get('kind')!r}, expected {kind!r}")
        for field in fields:
            if field not in content:
                raise RunError(f"{file}: {field}: missing")
        return content

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record to `metrics.jsonl`."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")

    def records(self, until: int | None = None) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, those of steps up to `until`.

        A last line that was cut off is left out.

        Raises:
            RunError: any other line is no record; the line is named.
        """
        if not self.metrics.exists():
            return []
        try:
            lines = split_lines(read_text(self.metrics))
        except TextError as error:
            raise RunError(str(error)) from error
        records = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = parse_json_text(line)
                step = record["step"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise RunError(f"{self.metrics}: line {number}: no record of a step") from error
            if until is None or step <= until:
                records.append(record)
        return records

    def truncate(self, step: int) -> list[dict[str, Any]]:
        """Drops the records after `step` from `metrics.jsonl` and gives those that stay."""
        records = self.records(until=step)
        with atomic(self.metrics) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        return records


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with None for every number that JSON lacks (infinities, not-a-number)."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: one(value) for name, value in record.items()}


def first_difference(
    found: Any, wanted: Any, ignore: Iterable[str] = (), name: str = ""
) -> tuple[str, Any, Any] | None:
    """The first entry in which two JSON values differ: (dotted name, found, wanted), or None."""
    if name in set(ignore):
        return None
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            inner = f"{name}.{key}" if name else str(key)
            difference = first_difference(found.get(key), wanted.get(key), ignore, inner)
            if difference:
                return difference
        return None
    return None if found == wanted else (name, found, wanted)


MANIFEST = "manifest.json"


class Checkpoints:
    """The last `keep` checkpoints of a fit, each a flat dict of host arrays, by step.

    Args:
        path: the directory; made where missing.
        keep: how many to keep, at least 1.
        writes: False to change nothing, in a directory that must exist: else it is made, and what
            is left of checkpoints that were cut off is removed.
    """

    def __init__(self, path: str | os.PathLike[str], keep: int = 3, *, writes: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: must be at least 1")
        self.path = Path(path).absolute()
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._writes = writes
        self._manager = self._open()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the checkpoint of `step`; when this returns, it is complete on disk.

        The manifest, written last, says which bytes belong to it: a checkpoint without one, or
        that differs from it, counts as cut off.
        """
        import orbax.checkpoint as ocp

        # orbax stores no array without elements, and none carries information.
        tree = {name: array for name, array in arrays.items() if array.size}
        self._manager.save(step, args=ocp.args.StandardSave(tree))
        folder = self.path / str(step)
        with atomic(folder / MANIFEST) as partial:
            partial.write_text(json.dumps(_fingerprints(folder)))

    def restore(self, like: Mapping[str, Any]) -> tuple[int, dict[str, np.ndarray]] | None:
        """The newest checkpoint that can be read, or None where there is none.

        Newer ones, cut off or damaged, are then deleted, and so is the first one if it was cut off
        (there is no other, and it has no manifest). `like` gives names, shapes and dtypes.

        Raises:
            RunError: other checkpoints exist but none can be read, or the newest readable one is of
                other names, shapes or dtypes than `like`.
        """
        steps = self.steps()
        for step in reversed(steps):
            arrays = self.read(step)
            if arrays is None:
                continue
            wanted = {name: array for name, array in like.items() if np.size(array)}
            check_arrays(arrays, wanted, self.path / str(step))
            self._drop([later for later in steps if later > step])
            empty = {n: np.zeros(a.shape, a.dtype) for n, a in like.items() if n not in wanted}
            return step, arrays | empty
        if len(steps) == 1 and not (self.path / str(steps[0]) / MANIFEST).exists():
            self._drop(steps)
        elif steps:
            raise RunError(
                f"{self.path}: none of the checkpoints {steps} can be read; give --overwrite in "
                "place of --resume to begin again"
            )
        return None

    def read(self, step: int) -> dict[str, np.ndarray] | None:
        """The arrays of the checkpoint of one step, None where it is missing or damaged."""
        import orbax.checkpoint as ocp

        # Checked before orbax opens anything: it leaves tasks behind where a file is broken.
        if not self._whole(step):
            return None
        shapes = dict(self._manager.item_metadata(step))
        target = {name: np.zeros(array.shape, array.dtype) for name, array in shapes.items()}
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        return {name: np.asarray(array) for name, array in tree.items()}

    def _whole(self, step: int) -> bool:
        """Whether a checkpoint's files are those of its manifest."""
        folder = self.path / str(step)
        try:
            return parse_json((folder / MANIFEST).read_bytes()) == _fingerprints(folder)
        except (OSError, ValueError):
            return False

    def _drop(self, steps: list[int]) -> None:
        if steps:
            self._manager.close()
            for step in steps:
                shutil.rmtree(self.path / str(step))
            self._manager = self._open()

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        # Only this process takes part: without this, orbax waits for all of them.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix="orrery",
        )
        try:
            return self._manage(ocp, alone)
        except (ValueError, TypeError, KeyError) as error:  # orbax opens all of them at once
            steps = [int(f.name) for f in self.path.iterdir() if f.name.isdecimal()]
            damaged = sorted(step for step in steps if not self._whole(step))
            if not damaged:
                raise RunError(
                    f"{self.path}: cannot be opened: {' '.join(str(error).split())}"
                ) from error
            if not self._writes or len(damaged) == len(steps):
                raise RunError(
                    f"{self.path}: the checkpoints of steps {damaged} are damaged; remove them, or "
                    "give --overwrite in place of --resume to begin again"
                ) from error
        for step in damaged:
            shutil.rmtree(self.path / str(step))
        return self._manage(ocp, alone)

    def _manage(self, ocp: Any, alone: Any) -> Any:
        return ocp.CheckpointManager(
            self.path,
            item_handlers=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep if self._writes else None,
                save_interval_steps=1 if self._writes else 0,
                create=False,
                cleanup_tmp_directories=self._writes,
                read_only=not self._writes,
                enable_async_checkpointing=False,
                multiprocessing_options=alone,
            ),
        )


def _fingerprints(folder: Path) -> dict[str, list[int]]:
    """Size and checksum of every file of a checkpoint."""
    files = sorted(x for x in folder.rglob("*") if x.is_file() and MANIFEST not in x.name)
    contents = ((file.relative_to(folder).as_posix(), file.read_bytes()) for file in files)
    return {name: [len(data), zlib.crc32(data)] for name, data in contents}
