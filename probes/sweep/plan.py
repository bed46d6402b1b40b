"""A sweep as data: one family, a grid of settings, seeds, and what is measured at every point.

A setting in the grid is one of the family's, or a field of the recipe of its fits: `recipe.steps`,
or plainly `learning_rate` where the family has no setting of that name.

Points whose fits differ in numbers alone (`synthetic.fitting.recipe.NUMBERS`, and the settings that
a construction names in `numbers`) are a *group*: one program fits them all. A group is cut into
*blocks* of at most `lanes` fits, the unit of work. Which points are in a block follows from the
sweep alone, so that neither an interruption nor the number of workers changes a bit of the table.

Nothing here imports JAX, so that mistakes are answered at once.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

from constructions.catalogue import Family, resolve
from synthetic.files import RunError, parse_json_text
from synthetic.guards import number

FORMAT, VERSION = "orrery-sweep", 1
RECIPE = "recipe."
#: What runs a sweep; it knows sweeps, not the other way round.
ENGINE = "probes.sweep.engines:run"
#: What can be measured besides "probe:NAME".
MEASURES = {
    "loss": "mean loss of the fitted model on fresh inputs, beside the construction's",
    "canonical_distance": "distance of the weights to the construction's, up to symmetries",
}
#: More points than anyone means.
MOST_POINTS = 100_000


@dataclass(frozen=True)
class Point:
    """One setting of everything in the grid.

    Attributes:
        number: its place in the grid, the last axis running fastest.
        values: axis -> value.
    """

    number: int
    values: dict[str, Any]

    @property
    def folder(self) -> str:
        """The name of its run directory."""
        said = "_".join(f"{name}={written(value)}" for name, value in self.values.items())
        return f"{self.number:05d}_{re.sub(r'[^A-Za-z0-9_.=+-]+', '-', said)[:80]}".rstrip("_")


@dataclass(frozen=True)
class Sweep:
    """Fits of a family's counterpart over a grid of settings.

    Attributes:
        name: of the family, or "module:attribute" of one.
        grid: setting -> its values, plain data.
        seeds: the seeds of every point.
        measures: "loss", "canonical_distance", "probe:NAME".
        settings: those that are the same at every point.
        quick: start from the settings for a demonstration, where the counterpart has them.
        lanes: most fits in one program; seeds of a point are never separated.
        examples: fresh inputs on which losses are taken.

    Raises:
        ValueError: one of these is not allowed, or names what there is not; in one line.
    """

    name: str
    grid: Mapping[str, Sequence[Any]]
    seeds: Sequence[int] = (0,)
    measures: Sequence[str] = ("loss",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    lanes: int = 32
    examples: int = 4096

    def __post_init__(self) -> None:
        for name in ("seeds", "measures"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "grid", {k: tuple(v) for k, v in self.grid.items()})
        object.__setattr__(self, "settings", dict(self.settings))
        for name in ("lanes", "examples"):
            number(name, getattr(self, name), whole=True, least=1)
        self._check_seeds()
        self._check_settings()
        self._check_measures()

    def _check_seeds(self) -> None:
        if not self.seeds:
            raise ValueError("seeds is empty, must hold at least one")
        for seed in self.seeds:
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
                raise ValueError(f"seed is {seed!r}, must be in 0..{2**32 - 1}")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}, must not hold one twice")

    def _check_settings(self) -> None:
        from constructions import CATALOGUE

        family, recipe = known_settings(CATALOGUE.find(self.name)), recipe_fields()
        for name in (*self.grid, *self.settings):
            whose, known = f"setting of {self.name}", family
            if name.startswith(RECIPE):
                whose, known = "field of a recipe", [RECIPE + field for field in recipe]
            if known is not None and name not in known and name not in recipe:
                also = "" if name.startswith(RECIPE) else f", or of its fit {', '.join(recipe)}"
                raise ValueError(
                    f"unknown {whose} {name!r}, must be one of {', '.join(known)}{also}"
                )
        points = 1
        for name, values in self.grid.items():
            if name in self.settings:
                raise ValueError(f"{name} is in the grid and among the settings, must be in one")
            if not values:
                raise ValueError(f"grid: {name} has no values")
            said = [json.dumps(value) for value in values]
            for value in said:
                if said.count(value) > 1:
                    raise ValueError(f"grid: {name} has {value} twice")
            points *= len(values)
        if points > MOST_POINTS:
            raise ValueError(f"grid: has {points} points, must be at most {MOST_POINTS}")

    def _check_measures(self) -> None:
        from probes import check_name

        if not self.measures:
            raise ValueError("measures is empty, must hold at least one")
        for measure in self.measures:
            kind, _, probe = measure.partition(":")
            if kind == "probe" and probe:
                check_name(probe)
            elif measure not in MEASURES:
                known = ", ".join(MEASURES)
                raise ValueError(
                    f"unknown measure {measure!r}, must be one of {known}, or probe:NAME"
                )
            if self.measures.count(measure) > 1:
                raise ValueError(f"measures: {measure!r} is there twice")

    @property
    def points(self) -> list[Point]:
        """All of the grid."""
        every = itertools.product(*self.grid.values())
        return [
            Point(n, dict(zip(self.grid, values, strict=True))) for n, values in enumerate(every)
        ]

    def split(self, point: Point) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of the construction at a point, and the fields of its recipe."""
        from constructions import CATALOGUE

        known = known_settings(CATALOGUE.find(self.name))
        family: dict[str, Any] = {}
        recipe: dict[str, Any] = {}
        for name, value in {**self.settings, **point.values}.items():
            if name.startswith(RECIPE):
                recipe[name.removeprefix(RECIPE)] = value
            elif name in recipe_fields() and (known is None or name not in known):
                recipe[name] = value
            else:
                family[name] = value
        return family, recipe

    def blocks(self, numbers: Sequence[str], recipe: Sequence[str]) -> list[list[Point]]:
        """The points in blocks; within one, settings differ in these numbers alone.

        Args:
            numbers: settings of the construction whose numbers share a program.
            recipe: fields of the recipe that do.
        """
        groups: dict[str, list[Point]] = {}
        for point in self.points:
            settings, fields = self.split(point)
            free = {f"s.{n}" for n in numbers} | {f"r.{n}" for n in recipe}
            every = {f"s.{n}": v for n, v in settings.items()}
            every |= {f"r.{n}": v for n, v in fields.items()}
            key = {n: _kind(v) if n in free else [v] for n, v in every.items()}
            groups.setdefault(json.dumps(key, sort_keys=True, default=repr), []).append(point)
        most = max(1, self.lanes // len(self.seeds))
        found = []
        for group in groups.values():
            size = -(-len(group) // -(-len(group) // most))  # of equal size, but for the last
            found += [group[n : n + size] for n in range(0, len(group), size)]
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` is the inverse."""
        return json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Sweep:
        """A sweep from `to_json`'s dict; RunError where it is none."""
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise RunError(f"format {content.get('format')!r}: no sweep of this version")
        fields = {k: v for k, v in content.items() if k not in ("format", "version")}
        try:
            return cls(**fields)
        except TypeError as error:
            raise RunError(f"no sweep of this version: {error}") from error

    def run(self, out: str | PathLike[str], **options: Any) -> list[dict[str, Any]]:
        """Fit and measure every point that is not there yet; the table, a row for each seed.

        See `probes.sweep.engines.run` for the options, and for what is written.
        """
        return resolve(ENGINE)(self, Path(out), **options)


def _kind(value: Any) -> Any:
    """What must agree of a number that is a lane: that it is one, and above 0."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number above 0" if value > 0 else value
    return [value]


def written(value: Any) -> str:
    """A value as it is typed, and as figures and folders have it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def parse_grid(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """`["steps=1,2,3", "dim_x=5:20:5"]` as lists of values.

    A value is JSON, or text where it is none; commas inside of brackets separate nothing. A range
    lo:hi:step counts from lo, and hi is in it where a step ends there.

    Raises:
        ValueError: names what cannot be read.
    """
    grid: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name or not text:
            raise ValueError(f"--grid {pair}: must be SETTING=a,b,c or SETTING=lo:hi:step")
        if name in grid:
            raise ValueError(f"--grid {pair}: {name} is there twice")
        if re.fullmatch(r"[^\[\]{}\",]*:[^\[\]{}\",]*:[^\[\]{}\",]*", text):
            grid[name] = _range(pair, text)
            continue
        grid[name] = [_value(pair, part) for part in _parts(text)]
    return grid


def _range(pair: str, text: str) -> list[float | int]:
    try:
        low, high, step = (Decimal(part) for part in text.split(":"))
        ok = all(number.is_finite() for number in (low, high, step)) and step > 0 and low <= high
    except (InvalidOperation, ValueError):
        ok, low, high, step = False, Decimal(0), Decimal(0), Decimal(1)
    if not ok:
        raise ValueError(f"--grid {pair}: must be lo:hi:step, numbers, lo <= hi and step above 0")
    count = int((high - low) / step) + 1
    if count > MOST_POINTS:
        raise ValueError(f"--grid {pair}: has {count} values, must be at most {MOST_POINTS}")
    values = [low + n * step for n in range(count)]
    whole = all(re.fullmatch(r"[+-]?\d+", part) for part in text.split(":"))
    return [int(value) if whole else float(value) for value in values]


def _parts(text: str) -> list[str]:
    """Split at the commas that stand in no bracket and no string."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += 0 if quoted else (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(pair: str, text: str) -> Any:
    if not text:
        raise ValueError(f"--grid {pair}: a value is empty")
    try:
        return parse_json_text(text)
    except ValueError:
        return text


def known_settings(family: Family) -> list[str] | None:
    """The settings of a family, read from its source where it is not imported; None: any."""
    if isinstance(family.construct, str):
        return _settings_in_source(family.construct)
    found = inspect.signature(family.construct).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in found.values())
    return None if free else list(found)


def recipe_fields() -> list[str]:
    """The fields of `synthetic.fitting.recipe.Recipe`."""
    found = _settings_in_source("synthetic.fitting.recipe:Recipe")
    assert found is not None
    return found


@cache
def _settings_in_source(reference: str) -> list[str] | None:
    """The arguments of a function, or the fields of a dataclass and its bases, without importing.

    None where the source does not say.
    """
    module, _, name = reference.partition(":")
    spec = importlib.util.find_spec(module)  # imports the packages around it
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    tree = ast.parse(Path(spec.origin).read_bytes())
    homes = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
    }
    for node in tree.body:
        if getattr(node, "name", None) != name:
            continue
        if isinstance(node, ast.FunctionDef):
            return _arguments(node)
        if isinstance(node, ast.ClassDef):
            return _fields(node, homes, module)
    return _settings_in_source(homes[name]) if name in homes else None


def _arguments(node: ast.FunctionDef) -> list[str] | None:
    given = node.args
    every = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return None if given.kwarg else every


def _fields(node: ast.ClassDef, homes: Mapping[str, str], module: str) -> list[str] | None:
    found: list[str] = []
    for base in node.bases:
        name = ast.unparse(base)
        inherited = _settings_in_source(homes.get(name, f"{module}:{name}"))
        found += inherited or []
    decorated = any("dataclass" in ast.unparse(each) for each in node.decorator_list)
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            own = _arguments(part)
            return None if own is None else own[1:]
        if decorated and isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            name = part.target.id
            if "ClassVar" not in ast.unparse(part.annotation) and name not in found:
                found.append(name)
    return found
