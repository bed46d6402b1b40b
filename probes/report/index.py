"""The page that lists the reports of a demonstration, and the folders that reports lie in.

Nothing here needs JAX: the page is there before anything is computed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthetic.files import atomic, claim_folder, parse_json

if TYPE_CHECKING:
    import jinja2

FORMAT, VERSION = "orrery-report", 1
PAGE, DATA, FIGURES = "report.html", "report.json", "figures"


@cache
def sources() -> str:
    """A name for our source files as they are: reports made by others are made anew."""
    found, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in ("constructions", "probes", "synthetic"):
        for path in sorted((root / package).rglob("*.py")):
            found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Entry:
    """A family's report as the index has it.

    Attributes:
        verdict, tone: see `probes.report.page`.
        counts: how many claims have each verdict.
        certified: whether the construction's certificate passed.
        seconds: wall time of fit, comparison and page.
    """

    verdict: str
    tone: str
    counts: dict[str, int]
    certified: bool
    seconds: float


@dataclass
class Index:
    """A demonstration: which families it is to have, and what is there of it.

    Attributes:
        out: its directory.
        families: in the order of the page; name -> (what is claimed, source).
        settings: what all of its reports were made with, and by which sources.
        found: family -> its report, of those that are there.
    """

    out: Path
    families: Mapping[str, tuple[str, str]]
    settings: Mapping[str, Any]
    found: dict[str, Entry] = field(default_factory=dict)

    @property
    def page(self) -> Path:
        """The file to open."""
        return self.out / PAGE

    @property
    def missing(self) -> list[str]:
        """The families whose reports are not there."""
        return [name for name in self.families if name not in self.found]

    def read(self) -> None:
        """Take over what an earlier demonstration with the same settings has left."""
        try:
            content = parse_json((self.out / DATA).read_bytes())
            if content["settings"] != dict(self.settings):
                return
            entries = {name: Entry(**entry) for name, entry in content["families"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # there is none, or one of another version
        self.found = {
            name: entries[name]
            for name in self.families
            if name in entries and (self.out / name / PAGE).is_file()
        }

    def write(self, now: Sequence[str] = ()) -> Path:
        """Write the page and its numbers; `now` are the families that are worked on."""
        known = {name: asdict(self.found[name]) for name in self.families if name in self.found}
        content = {"format": FORMAT, "families": known, "settings": dict(self.settings)}
        write_json(self.out / DATA, content)
        page = templates().get_template("index.html.j2")
        title = "orrery: all families"
        return write_text(self.page, page.render(title=title, index=self, now=now))


def templates() -> jinja2.Environment:
    """The templates of pages."""
    import jinja2

    from probes.style import number

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("probes.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "slug": slug,
        "listing": _listing,
        "base64": lambda data: base64.b64encode(data).decode(),
    }
    return environment


def slug(verdict: str) -> str:
    """A verdict as the name of a style."""
    return verdict.replace(" ", "-")


def _listing(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_listing(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_listing, value)) or "none"
    if isinstance(value, float):
        return repr(value)
    return "none" if value is None else str(value)


def claim_directory(out: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """A directory that a report may be written to; made where missing.

    Raises:
        RunError: it is a file, or holds anything and `overwrite` is False, or holds something
            that is no report of ours.
    """
    out = Path(out)
    claim_folder(out, "report", is_report, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    return out


def claim_directories(out: Path, names: Sequence[str]) -> None:
    """A directory for several reports, each in a folder of its name; errors as above."""
    claim_directory(out, overwrite=True)
    for folder in (out / name for name in names):
        if folder.is_symlink():
            raise ValueError(f"{folder}: is a symbolic link, must be a folder in {out}")
        if folder.exists():
            claim_directory(folder, overwrite=True)


def is_report(directory: Path) -> bool:
    """Whether a directory holds an earlier report."""
    try:
        content = parse_json((directory / DATA).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def write_json(path: Path, content: Any) -> None:
    """Write JSON, as a whole."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a text, as a whole."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
