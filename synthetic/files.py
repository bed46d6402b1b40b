"""Files: written as a whole or not at all, and read as text or JSON by one rule.

Whether a file can be written is asked before the work begins. Grammars, treebanks, corpora and
configurations are read alike: a file is UTF-8, with or without a byte-order mark, or UTF-16 with
one; the mark is no part of the text. Nothing is guessed: what would have to be (Latin-1, UTF-16
without its mark) is refused, since a wrong guess makes other words without a word. Lines end at a
line feed, a carriage return, or the two together, and nowhere else: `str.splitlines` cuts at U+0085
and U+2028 as well, which may stand within a word.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """What is given is not what it should be; the message is one line.

    What a long name or line would make longer than `MOST` characters is left out of its middle.
    """

    MOST = 400

    def __init__(self, message: str) -> None:
        left_out = len(message) - self.MOST
        if left_out > 0:
            front, back = message[: self.MOST // 2], message[-self.MOST // 2 :]
            message = f"{front} .. ({left_out} characters) .. {back}"
        super().__init__(message)


class RunError(ValueError):
    """A saved model or run that cannot be used; one line names the file and the field."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file next to `path` that replaces it once the block has ended."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link to somewhere else
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Whether a file or directory can be made at `path`, or written where it exists.

    Its nearest existing directory is tried: what permissions say is not all that can stand in the
    way (a read-only file system, a full one, a folder of the kernel's).

    Raises:
        RunError: it cannot; one line with the path and why.
    """
    folder = Path(os.path.abspath(path))
    try:
        while not folder.exists():
            folder = folder.parent
        if path.is_file():
            folder = path.parent
        # a name as long as that of `atomic`
        names = (".", ".partial") if path.is_dir() else (f".{path.name}", "")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=names[0], suffix=names[1]) as file:
            file.write(b" ")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def remove(path: Path) -> None:
    """Removes a file, a link or a directory, if it is there; what a link leads to is left alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_memory() -> int | None:
    """Bytes that this process can still take, None where the system does not report it."""
    found = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with suppress(OSError, ValueError):  # "max" where a container has no limit
        limits = Path("/sys/fs/cgroup")
        found.append(
            int((limits / "memory.max").read_text()) - int((limits / "memory.current").read_text())
        )
    return min(found, default=None)


LINE_END = re.compile(r"\r\n|\n|\r")

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8", "UTF-8"),
    (b"\xff\xfe", "utf-16-le", "UTF-16"),
    (b"\xfe\xff", "utf-16-be", "UTF-16"),
    (b"", "utf-8", "UTF-8"),
)
_UTF_32 = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")


class TextError(ValueError):
    """Bytes that are no text; the message names the place."""


def decode(data: bytes) -> str:
    """The text of a file's bytes, without a byte-order mark; line ends stay as they are.

    Raises:
        TextError: the bytes are not UTF-8 or, behind its mark, UTF-16, or hold the character NUL.
            The message has the place of the byte, and no name: callers set that before it.
    """
    if data.startswith(_UTF_32):
        raise _refused(0, "begins text in UTF-32")
    mark, encoding, called = next(kind for kind in _MARKS if data.startswith(kind[0]))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise _refused(len(mark) + error.start, f"is not {called}") from None
    if (place := text.find("\0")) >= 0:  # most often UTF-16 without its mark
        raise _refused(len(mark) + len(text[:place].encode(encoding)), "is a NUL")
    return text


def _refused(place: int, why: str) -> TextError:
    return TextError(
        f"must be text in UTF-8, or in UTF-16 with a byte-order mark: byte {place} {why}"
    )


def read_text(path: str | PathLike[str]) -> str:
    """The text of a file, by `decode`.

    Raises:
        OSError: the file cannot be read.
        TextError: as `decode`; the message begins with the path.
    """
    try:
        return decode(Path(path).read_bytes())
    except TextError as error:
        raise TextError(f"{path}: {error}") from None


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends; what stands behind the last end is one more."""
    return LINE_END.split(text)


def line_number(text: str, position: int) -> int:
    """The number of the line in which a character stands, from 1."""
    return 1 + sum(1 for _ in LINE_END.finditer(text, 0, position))


def parse_json(data: bytes) -> Any:
    """The value of a JSON file's bytes, decoded by `decode`.

    Raises:
        ValueError: the bytes are no text (`TextError`) or no JSON, or values are nested too deeply.
    """
    return parse_json_text(decode(data))


def parse_json_text(text: str) -> Any:
    """The value of a text in JSON.

    Raises:
        ValueError: the text is no JSON, or nests values too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; RunError names a file that cannot be read or holds none."""
    try:
        data = parse_json(file.read_bytes())
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{file}: no JSON: {error}") from error
    if not isinstance(data, dict):
        raise RunError(f"{file}: must be a JSON object")
    return data


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples as lists, and None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "dtype"):  # a number of numpy's
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def claim_folder(
    out: Path, kind: str, ours: Callable[[Path], bool], *, overwrite: bool = False
) -> None:
    """Whether a folder may be written: nothing is there, or an earlier one of ours to be replaced.

    Args:
        out: the folder.
        kind: what messages call it, "report" for one.
        ours: whether a folder that exists is one.
        overwrite: it may be replaced.

    Raises:
        RunError: it cannot be written, is a file, or holds what may not be replaced.
    """
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: exists and is no directory")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise RunError(
                f"{out}: exists and is not empty; give --overwrite to replace an earlier {kind}"
            )
        if not ours(out):
            raise RunError(f"{out}: holds no {kind}, so nothing in it is overwritten")
