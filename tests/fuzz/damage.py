"""Random damage to a folder of files: bytes, JSON, headers of weights, links; and what may follow.

A `Damage` is data, so that hypothesis shrinks and prints it; `Damage.to` carries it out.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.fuzzing import built
from hypothesis import strategies as st

DEEP = "[" * 3000 + "]" * 3000
#: What a JSON value is replaced by; strings that begin with "raw:" are written as they are.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 0.5, 1e308, -1e-9, 10**12, 2**63, 10**400, "", "x", "1",
    "\0", "../outside/file", [], [1], {}, {"a": 1}, ["a", ["b"]], [[[]]],
    "raw:NaN", "raw:Infinity", "raw:1e999", f"raw:{DEEP}",
)  # fmt: skip
BYTES = (b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", "\x85".encode(), b"\xe9", b"(", b")",
         b"'", b"[", b"->", b"|", b" [-1]", b" [1e999]", b"{", b"}", b"\n", b"\r", b"#", b"\\",
         b"(" * 5000, b"A -> A\n", b"%start X\n", "ß’".encode(), b"0", b"9" * 5000)  # fmt: skip
SECONDS = 100  # for what takes a tenth of one


@dataclass(frozen=True)
class Damage:
    """One change of one file.

    Attributes:
        file: which of them, by number among the sorted ones.
        kind: a name in `KINDS`.
        place, size: where, and how much, as shares of the file or of the values in it.
        what: the bytes or the value that comes there.
    """

    file: int
    kind: str
    place: float
    size: float
    what: Any

    def __repr__(self) -> str:
        what = repr(self.what)
        what = what if len(what) < 60 else f"{what[:30]}... ({len(what)})"
        return f"Damage({self.file}, {self.kind!r}, {self.place}, {self.size}, {what})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def to(self, folder: Path) -> str:
        """Carries it out, and names the file."""
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        if not files:
            return "nothing is left"
        path = files[self.file % len(files)]
        if self.kind == "keep elsewhere":
            kept = folder.parent / f"kept of {path.name}"
            shutil.move(path, kept)
            path.symlink_to(kept)
        else:
            KINDS[self.kind](self, path, files)
        return f"{self.kind} {path.relative_to(folder)}"

    def at(self, count: int) -> int:
        """The place as a number below `count`."""
        return min(int(self.place * count), max(count - 1, 0))


def _truncate(d: Damage, path: Path, _: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[: d.at(len(path.read_bytes()))])


def _flip(d: Damage, path: Path, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[d.at(len(data))] ^= 1 << int(d.size * 7.99)
    path.write_bytes(bytes(data))


def _insert(d: Damage, path: Path, _: list[Path]) -> None:
    data, at = path.read_bytes(), d.at(len(path.read_bytes()) + 1)
    piece = d.what if isinstance(d.what, bytes) else json.dumps(str(d.what)).encode()
    path.write_bytes(data[:at] + piece + data[at + int(d.size * 9) :])


def _remove(_: Damage, path: Path, __: list[Path]) -> None:
    path.unlink()


def _folder(_: Damage, path: Path, __: list[Path]) -> None:
    path.unlink()
    path.mkdir()


def _swap(d: Damage, path: Path, files: list[Path]) -> None:
    other = files[d.at(len(files))]
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def _link(d: Damage, path: Path, files: list[Path]) -> None:
    targets = [path, files[d.at(len(files))], Path("/dev/null"), path.parent, Path("missing"),
               path.parents[1]]  # fmt: skip
    target = targets[int(d.size * len(targets)) % len(targets)]
    path.unlink()
    path.symlink_to(target)


def _edit(d: Damage, path: Path, _: list[Path]) -> None:
    """Another value somewhere in JSON: all of a file, one line of several, or a header."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        text = _edited(d, data[8 : 8 + size])
        length = len(text) if d.size < 0.9 else int(d.place * 2**63)
        path.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])
    elif path.suffix == ".jsonl":
        lines = data.split(b"\n")
        lines[d.at(len(lines))] = _edited(d, lines[d.at(len(lines))])
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_bytes(_edited(d, data))


def _edited(d: Damage, text: bytes) -> bytes:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):  # an edit before this one has nested it too deeply
        return text + b"{"
    places = list(_places(tree))
    if not places:
        return json.dumps(_value(d)).encode()
    holder, key = places[d.at(len(places))]
    if d.size < 0.2:
        del holder[key]
    else:
        holder[key] = _value(d)
    found = json.dumps(tree)
    if isinstance(d.what, str) and d.what.startswith("raw:"):
        found = found.replace(json.dumps(d.what), d.what[4:])
    return found.encode()


def _value(d: Damage) -> Any:
    return d.what if not isinstance(d.what, bytes) else d.what.decode("latin-1")


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(list or dictionary, index or name) of every value."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


#: "keep elsewhere" leaves a link to the same bytes beside the folder: nothing is damaged.
KINDS: dict[str, Callable] = {
    "truncate": _truncate,
    "flip": _flip,
    "insert into": _insert,
    "remove": _remove,
    "a folder for": _folder,
    "swap": _swap,
    "link": _link,
    "keep elsewhere": shutil.move,
    "edit": _edit,
}
HARMLESS = ("keep elsewhere",)


@built
def damages(draw: Any, kinds: tuple[str, ...] = tuple(KINDS)) -> list[Damage]:
    """One or two changes."""
    share = st.floats(0, 1, exclude_max=True, width=32)
    one = st.builds(
        Damage,
        st.integers(0, 9),
        st.sampled_from((*kinds, "edit", "edit") if "edit" in kinds else kinds),
        share,
        share,
        st.sampled_from((*VALUES, *BYTES)),
    )
    return draw(st.lists(one, min_size=1, max_size=2))


def contents(folder: Path) -> dict[str, Any]:
    """Everything below a folder: bytes of files, targets of links."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink()
        else p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }  # fmt: skip


@contextmanager
def in_time(seconds: int = SECONDS) -> Iterator[None]:
    """TimeoutError for what does not end."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"has not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def opened(read: Callable[[Path], Any], path: Path, *, names: bool = True) -> Any:
    """What `read` gives, or None where it refuses in one line that names the file."""
    try:
        with in_time():
            return read(path)
    except ValueError as error:
        message = str(error)
        assert type(error) is not UnicodeDecodeError and type(error) is not json.JSONDecodeError
        assert message and "\n" not in message, f"not one line: {message!r}"
        assert len(message) < 9000, f"{len(message)} characters: {message[:300]!r} ..."
        assert not names or str(path) in message, f"does not name {path}: {message!r}"
        return None
