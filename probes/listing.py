"""The subcommands that say what there is: the families, and the program of one.

Heavy modules are imported inside `run`, as in `probes.cli`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from probes.options import (
    OK,
    Names,
    Settings,
    check_free,
    family_names,
    parse_settings,
    write_file,
    write_json,
)


@dataclass
class List:
    """Show the families: what each claims, its source and settings; of those named, all of it."""

    names: Names = ()
    """families to show with their tasks and the claims about trained models as well"""
    json: Path | None = None
    """write the list as JSON"""
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        check_free(self.json, self.overwrite)
        families = {name: describe(name, bool(self.names)) for name in family_names(self.names)}
        write_json(self.json, families, self.overwrite)
        show_families(families)
        return OK


def describe(name: str, whole: bool) -> dict[str, Any]:
    """A family as plain data: what it claims and its example settings, which need no JAX.

    `whole` adds its task and its claims. A family of someone else's that cannot be imported is an
    error where it is `whole`, and said to be one elsewhere.
    """
    from constructions import CATALOGUE

    try:
        family = CATALOGUE[name]
    except ValueError as error:
        if whole:
            raise
        return {"about": str(error), "source": "not imported", "settings": {}}
    found = {"about": family.about, "source": family.source, "settings": family.example()}
    if whole:
        from constructions.runs import construct

        construction = construct(name)
        found["task"] = repr(construction.task)
        found["claims"] = {claim.name: claim.statement for claim in construction.claims}
    return found


def show_families(families: Mapping[str, Mapping[str, Any]]) -> None:
    """Print `describe` of every family, as text that breaks between words only.

    A line is longer than the terminal only where one word, which one may have to type, is.
    """
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    for name, family in families.items():
        print(name)
        source = f" ({family['source']})" if family["source"] else ""
        lines = {
            "": f"{family['about']}{source}",
            "settings": " ".join(setting(k, v) for k, v in family["settings"].items()),
            "task": family.get("task"),
            "claims": ", ".join(family["claims"]) if "claims" in family else None,
        }
        for title, text in lines.items():
            if text is None:
                continue
            first, indent = (f"  {title}: ", "    ") if title else ("  ", "  ")
            whole: Any = {"break_long_words": False, "break_on_hyphens": False}
            print(
                textwrap.fill(text, width, initial_indent=first, subsequent_indent=indent, **whole)
            )
        print()


def setting(key: str, value: Any) -> str:
    """A setting as it is typed after `--set`."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return shlex.quote(f"{key}={text}")


@dataclass
class Show:
    """Print the program of a construction as equations, and draw it.

    Layers and slots that differ in numbers only are shown once.
    """

    name: Positional[str]
    out: Path | None = None
    """draw it into this file, .svg or .png"""
    settings: Settings = field(default_factory=list)
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        (name,), settings = family_names((self.name,)), parse_settings(self.settings)
        check_free(self.out, self.overwrite)
        from constructions.core.picture import check_suffix

        if self.out is not None:
            check_suffix(self.out)
        from constructions.runs import construct

        program = construct(name, settings).program
        print(program.equations(name))
        if self.out is not None:
            drawing = program.draw(name=name)
            svg = check_suffix(self.out) == ".svg"
            write_file(self.out, drawing.svg if svg else drawing.png)
        return OK
