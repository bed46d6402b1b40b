"""What the subcommands share: types of their options, and checks that come before any work."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from synthetic.files import atomic, check_writable, parse_json, parse_json_text

OK, FAILED, BAD_INPUT = 0, 1, 2

Names = Positional[tuple[str, ...]]
Settings = Annotated[
    UseAppendAction[list[str]],
    arg(name="set", metavar="KEY=VALUE", help="a setting of the family; the value is JSON"),
]


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["dim_x=5"]` as `{"dim_x": 5}`; values are JSON, and text where they are not.

    A grammar may also be the name of a file in NLTK's notation, or of JSON. It is read here, so
    that a run keeps the grammar itself.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair}: must be KEY=VALUE")
        try:
            settings[key] = parse_json_text(value)
        except ValueError:
            settings[key] = value
        if key == "grammar" and isinstance(settings[key], str):
            settings[key] = _grammar(settings[key])
    return settings


def _grammar(given: str) -> Any:
    """The grammar of a file, as JSON; a name of one of ours as it is."""
    from synthetic.grammar.examples import NAMED

    path = Path(given)
    if given in NAMED:
        return given
    if not path.is_file():
        raise ValueError(
            f"--set grammar={given}: must be one of {', '.join(NAMED)}, a file in NLTK's notation "
            "or JSON, and there is no such file"
        )
    if path.suffix == ".json":
        try:
            return parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: no JSON: {error}") from error
    from synthetic.grammar.grammar import Grammar

    return Grammar.from_file(path).to_json()


def family_names(names: Sequence[str]) -> list[str]:
    """The families named, or all of them; needs no JAX where they are in the catalogue.

    In the place of a name may stand module:attribute, also of the current directory.

    Raises:
        ValueError: lists the known names; or the object cannot be imported, or is no family.
    """
    from constructions import CATALOGUE

    for name in names:
        if ":" in name:
            importable_here()
            CATALOGUE.find(name)
        elif name not in CATALOGUE:
            CATALOGUE.find(name)  # lists the names
    return list(names or CATALOGUE)


def importable_here() -> None:
    """Modules of the current directory are found, behind all others: it hides nothing."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


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
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, must be a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists; give --overwrite to replace it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: its directory does not exist")
    if not path.exists() or path.is_file():
        check_writable(path)


def check_run(path: Path) -> None:
    """Raise ValueError where there is no run to read; whether it is whole is seen later."""
    if not path.is_dir():
        raise ValueError(
            f"{path / 'config.json'}: missing, so this is no run; `orrery fit NAME --out {path}` "
            "makes one"
        )


def write_file(path: Path, content: bytes) -> None:
    """Write a file as a whole: cut off in the middle, it is the old one or there is none."""
    target = path.resolve()
    if target.exists() and not target.is_file():  # a pipe or a terminal
        target.write_bytes(content)
        return
    with atomic(target) as partial:
        partial.write_bytes(content)


def write_json(path: Path | None, content: Any, overwrite: bool) -> None:
    """Write JSON where a path is given; numbers that are not finite become null."""
    if path is None:
        return
    from synthetic.files import plain

    check_free(path, overwrite)
    text = json.dumps(plain(content), indent=2, allow_nan=False) + "\n"
    write_file(path, text.encode())


def duration(seconds: float) -> str:
    """Seconds, as one says them."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def one_line(error: BaseException | str) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    said = " ".join(str(error).split())
    if isinstance(error, str | ValueError | OSError):
        return said
    return f"{type(error).__name__}: {said}"[:400]
