"""What the subcommands share: types of their options, and checks that come before any work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from synthetic.text_files import parse_json_text

OK, FAILED, BAD_INPUT = 0, 1, 2

Names = Positional[tuple[str, ...]]
Settings = Annotated[
    UseAppendAction[list[str]],
    arg(name="set", metavar="KEY=VALUE", help="a setting of the family; the value is JSON"),
]


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["dim_x=5"]` as `{"dim_x": 5}`; values are JSON, and text where they are not."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair}: must be KEY=VALUE")
        try:
            settings[key] = parse_json_text(value)
        except ValueError:
            settings[key] = value
    return settings


def family_names(names: Sequence[str]) -> list[str]:
    """The families named, or all of them; ValueError lists the known ones."""
    from constructions import CATALOGUE

    for name in names:
        if name not in CATALOGUE:
            raise ValueError(f"unknown family {name!r}; known: {', '.join(sorted(CATALOGUE))}")
    return list(names or CATALOGUE)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that a fit would refuse."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: must be in 0..{2**32 - 1}")


def seed_list(first: int | None, count: int | None) -> list[int] | None:
    """`count` seeds from `first` on, None where no count is given."""
    check_seed(first or 0)
    if count is None:
        return None
    if count < 1:
        raise ValueError(f"--seeds {count}: must be at least 1")
    return list(range(first or 0, (first or 0) + count))


def check_free(path: Path | None, overwrite: bool) -> None:
    """Raise before the work, not after it, where a file could not be written."""
    if path is not None and path.exists() and not overwrite:
        raise ValueError(f"{path}: exists; give --overwrite to replace it")
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: its directory does not exist")


def write_json(path: Path | None, content: Any, overwrite: bool) -> None:
    """Write JSON where a path is given; numbers that are not finite become null."""
    if path is None:
        return
    from probes.comparison import plain

    check_free(path, overwrite)
    path.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
