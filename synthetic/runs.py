"""The run directory of a fit: `config.json`, `metrics.jsonl`, `model.safetensors`, `checkpoints/`.

Every file is written whole or appended line by line, so that a run that was killed can be read.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic.saved import RunError, atomic
from synthetic.text_files import TextError, parse_json, parse_json_text, read_text, split_lines

FORMAT = "orrery-run"
VERSION = 1


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
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON record per chunk."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The fitted model, safetensors; present once the fit has ended."""
        return self.path / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The resumable states, by step."""
        return self.path / "checkpoints"

    def check_free(self, *, overwrite: bool = False) -> None:
        """Whether a new run may begin here.

        Raises:
            RunError: it is a file, or holds anything and `overwrite` is False.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: exists and is no directory")
        if overwrite or not self.path.exists():
            return
        if any(not file.name.endswith(".partial") for file in self.path.iterdir()):
            raise RunError(
                f"{self.path}: exists and is not empty; resume it, overwrite it, or choose "
                "another directory"
            )

    def create(self, *, overwrite: bool = False) -> None:
        """Makes the directory, or with `overwrite` clears it of the four things of a run.

        Raises:
            RunError: as `check_free`.
        """
        self.check_free(overwrite=overwrite)
        # Nothing else is touched: the directory may hold reports, or be a wrong one.
        for file in (self.config, self.metrics, self.model):
            file.unlink(missing_ok=True)
        if self.checkpoints.exists():
            shutil.rmtree(self.checkpoints)
        self.path.mkdir(parents=True, exist_ok=True)

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
            raise RunError(f"{file}: missing, so this is no run") from None
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
            except (ValueError, KeyError, TypeError) as error:
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
