"""Resumable checkpoints, written by orbax into a temporary directory that is renamed when complete.

This file takes and gives host arrays; in a fit of several processes only process 0 uses it.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from synthetic.files import RunError, atomic
from synthetic.runs import RunDirectory
from synthetic.saved import check_arrays, load_model, load_state, save_model
from synthetic.text_files import parse_json

__all__ = ["Checkpoints", "RunDirectory", "RunError", "load_model", "load_state", "save_model"]

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

    def __enter__(self) -> "Checkpoints":
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
        folder = self.path / str(step)
        try:
            if parse_json((folder / MANIFEST).read_bytes()) != _fingerprints(folder):
                return None
        except (OSError, ValueError):
            return None
        shapes = dict(self._manager.item_metadata(step))
        target = {name: np.zeros(array.shape, array.dtype) for name, array in shapes.items()}
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        return {name: np.asarray(array) for name, array in tree.items()}

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
