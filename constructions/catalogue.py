"""Families by name: what each claims is read without JAX, and it is imported when it is asked for.

A `Family` is a record. Its construction and its measurements may be given as "module:attribute", so
that a package of a family is read at once and JAX is loaded only where something is computed.

Families of other packages are found by the entry points of the group `orrery.families`, each a
`Family` or a class of constructions:

    [project.entry-points."orrery.families"]
    sign-descent = "sign_descent:SignDescent"

In the place of a name, "module:attribute" is such an object too.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import constructions.family

#: The entry points by which other packages register theirs.
GROUP = "orrery.families"
_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
#: What stands in a file path or means something in a shell is no name.
_NAME = re.compile(r"\w[\w.+-]*")


def resolve(reference: str) -> Any:
    """The object that "module:attribute" names.

    Raises:
        ValueError: it is not of that form; the module cannot be imported, or lacks the attribute.
    """
    if not _REFERENCE.fullmatch(reference):
        raise ValueError(f"{reference!r}: must be module:attribute")
    module, _, attribute = reference.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a module of someone else's does at import
        kind = type(error).__name__
        raise ValueError(f"{reference}: importing {module} fails: {kind}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{reference}: {module} has no {attribute}")
        found = getattr(found, part)
    return found


@dataclass(frozen=True)
class Family:
    """A paper's claim that a transformer runs an algorithm: a constructor with example settings.

    Attributes:
        name: in the catalogue.
        construct: settings -> construction, or "module:attribute" of that.
        settings: of the example.
        about, source: the claim in a sentence, and the paper.
        measure: (quick, seed) -> the published numbers that need no counterpart of the example,
            beside ours, one after the other; or "module:attribute" of that; None where there are
            none.
        claims: "module:attribute" of the claims at the example settings, where making the
            construction would take long.
    """

    name: str
    construct: str | Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    source: str = ""
    measure: str | Callable[[bool, int], Iterator[Any]] | None = None
    claims: str | None = None

    @property
    def constructor(self) -> Callable[..., Any]:
        """settings -> construction."""
        return resolve(self.construct) if isinstance(self.construct, str) else self.construct

    def __call__(self, *arguments: Any, **settings: Any) -> constructions.family.Construction:
        """The construction with these settings, in the order of its class or by name."""
        return self.constructor(*arguments, **settings)

    def example(self) -> dict[str, Any]:
        """Settings that tests, the demonstration and the command use where none are given."""
        return dict(self.settings)

    def measurements(self, quick: bool, seed: int) -> Iterator[Any]:
        """The published numbers beside ours, one after the other; nothing where there are none."""
        if self.measure is None:
            return iter(())
        measure = resolve(self.measure) if isinstance(self.measure, str) else self.measure
        return measure(quick, seed)


def _family(name: str, reference: str) -> Family:
    """What a reference names, under a name; ValueError unless it is one of the two kinds."""
    found = resolve(reference)
    if isinstance(found, Family):
        return replace(found, name=name)
    if isinstance(found, type) and all(
        callable(getattr(found, method, None)) for method in ("trace", "embed", "places")
    ):
        said = (found.__doc__ or "").strip().partition("\n")[0]
        generated = said.startswith(f"{found.__name__}(")  # what a dataclass says of itself
        about = found.__name__ if generated or not said else said.rstrip(".")
        return Family(name, found, {}, about, str(getattr(found, "source", "")))
    kind = type(found).__name__
    raise ValueError(f"{reference} is a {kind}, must be a Family or a class of constructions")


@lru_cache(maxsize=8)
def _registered(path: tuple[str, ...], ours: frozenset[str]) -> dict[str, str]:
    """Name -> reference, of the packages on this path; a name that is taken is left out."""
    del path
    found: dict[str, str] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        reference = f"{entry.module}:{entry.attr}"
        taken = entry.name in ours or found.get(entry.name, reference) != reference
        if taken or not _NAME.fullmatch(entry.name):
            package = entry.dist.name if entry.dist else entry.value
            why = "the name is taken" if taken else "must be letters, digits and . + - _"
            warnings.warn(f"{GROUP} of {package}: {entry.name!r}: {why}; left out", stacklevel=2)
            continue
        found[entry.name] = reference
    return found


class Catalogue(MutableMapping[str, Family]):
    """Families by name; see the module.

    Names are those given here, then those of entry points. A family is imported when it is taken
    out. "module:attribute" can be taken out as well, and is no name.
    """

    def __init__(self, families: Mapping[str, str | Family]) -> None:
        self._families = dict(families)

    def _references(self) -> dict[str, str | Family]:
        return self._families | _registered(tuple(sys.path), frozenset(self._families))

    def __getitem__(self, name: str) -> Family:
        """The family.

        Raises:
            KeyError: no name, and no "module:attribute".
            ValueError: the object that is named cannot be imported, or is something else.
        """
        found = self._families.get(name)
        if found is None:
            found = name if ":" in name else self._references()[name]
        return found if isinstance(found, Family) else _family(name, found)

    def __setitem__(self, name: str, family: Family) -> None:
        """Register a family for as long as this process runs."""
        self._families[name] = family

    def __delitem__(self, name: str) -> None:
        del self._families[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._references())

    def __len__(self) -> int:
        return len(self._references())

    def __contains__(self, name: object) -> bool:
        return name in self._families or name in self._references()

    def find(self, name: str) -> Family:
        """As `catalogue[name]`; ValueError lists the names where it is none."""
        try:
            return self[name]
        except KeyError:
            known = ", ".join(sorted(self))
            raise ValueError(
                f"unknown family {name!r}, must be one of {known}, or module:attribute"
            ) from None


def lazily(package: str, **homes: str) -> Callable[[str], Any]:
    """A package's `__getattr__`, for names that are imported when they are used.

    Args:
        package: its `__name__`.
        **homes: name -> the module that it is in.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, found)
        return found

    return get
