"""Imports run downwards only: probes > constructions > synthetic, and so inside each package.

Every import counts, at whatever depth it stands, those for type checkers too.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "synthetic": {"synthetic"},
    "constructions": {"constructions", "synthetic"},
    "probes": {"probes", "constructions", "synthetic"},
}
FAMILIES = (
    "gradient_descent",
    "hyper_transformer",
    "inside_outside",
    "kernel_descent",
    "mesa",
    "noisy_regression",
    "separate_tokens",
    "skills",
    "tint",
)
#: From the bottom up: a module may import what stands in an earlier entry, and its own part. Parts
#: of one entry do not know one another.
ORDER = {
    "synthetic": [
        ("files", "threefry", "display", "guards"),
        ("compilation",),
        ("grammar",),
        ("tasks",),
        ("theory",),
        ("fitting",),
    ],
    "constructions": [
        ("mesa_layer",),
        ("core",),
        ("measurement",),
        ("inputs", "claims", "certificate"),
        ("family",),
        ("regression", "softened", "interchange", "catalogue", "primitives"),
        FAMILIES,
        ("",),  # the package itself: the names of the families
        ("runs",),
        ("imported",),
    ],
}
OURS = {*MAY_IMPORT, "orrery", "tests", "benchmarks", "notebooks"}


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every absolute import, at whatever depth it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def upward_imports(root: Path, package: str) -> list[str]:
    """`file:line imports module` for every import that `package` may not make."""
    return [
        f"{file.relative_to(root)}:{line} imports {name}"
        for file in sorted((root / package).rglob("*.py"))
        for line, name in imported_modules(ast.parse(file.read_text(encoding="utf-8")))
        if name.split(".")[0] in OURS - MAY_IMPORT[package]
    ]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_downwards(package: str) -> None:
    assert any((ROOT / package).rglob("*.py")), f"{package}/ holds no modules"
    assert upward_imports(ROOT, package) == []


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("synthetic", "import constructions"),
        ("synthetic", "import numpy, probes.ledger as ledger"),
        ("synthetic", "from constructions.core.transformer import Transformer"),
        ("constructions", "def late():\n    from probes import ledger"),
        ("constructions", "importlib.import_module('probes.cli')"),
        ("probes", "from tests.conftest import x64"),
    ],
)
def test_planted_upward_import_is_found(tmp_path: Path, package: str, line: str) -> None:
    nested = tmp_path / package / "nested"
    nested.mkdir(parents=True)
    (nested / "module.py").write_text(line)
    assert len(upward_imports(tmp_path, package)) == 1


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("synthetic", "from . import task"),
        ("constructions", "from synthetic.tasks.task import Task"),
        ("probes", "from constructions import CATALOGUE"),
        ("probes", "import probes_of_another_kind"),
    ],
)
def test_downward_import_is_allowed(tmp_path: Path, package: str, line: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "module.py").write_text(line)
    assert upward_imports(tmp_path, package) == []


def graph(root: Path) -> dict[str, dict[str, int]]:
    """Module -> {module of ours that it imports: line}, over the three packages."""
    files = {}
    for package in MAY_IMPORT:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found: dict[str, dict[str, int]] = {}
    for module, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found[module] = {name: line for line, name in imported_modules(tree) if name in files}
        for node in ast.walk(tree):  # of `from package import module` it is the module that counts
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                if full <= set(files):
                    found[module].pop(str(node.module), None)
                found[module] |= {name: node.lineno for name in full if name in files}
    return found


def part_of(module: str) -> str:
    """The name below the package; "" for the package itself."""
    return (module.split(".") + [""])[1]


def out_of_order(modules: dict[str, dict[str, int]], package: str) -> list[str]:
    """`module:line imports module` against `ORDER`, and modules that stand nowhere in it."""
    level = {part: n for n, parts in enumerate(ORDER[package]) for part in parts}
    if package == "synthetic":
        level[""] = -1  # a table of contents
    found = []
    for module, imports in modules.items():
        if module.split(".")[0] != package:
            continue
        mine = part_of(module)
        if mine not in level:
            found.append(f"{module} has no place in the order")
            continue
        for name, line in imports.items():
            other = part_of(name)
            inside = name.split(".")[0] == package and other != mine and other in level
            if inside and level[other] >= level[mine]:
                found.append(f"{module}:{line} imports {name}")
    return found


def circles(modules: dict[str, dict[str, int]]) -> list[list[str]]:
    """Modules that import one another, as the strongly connected parts of the graph."""
    edges = {module: set(imports) for module, imports in modules.items()}

    def reached(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            for name in edges[left.pop()] - seen:
                seen.add(name)
                left.append(name)
        return seen

    reach = {module: reached(module) for module in edges}
    inside = {m: frozenset(n for n in reach[m] if m in reach[n]) for m in edges if m in reach[m]}
    return sorted(sorted(part) for part in set(inside.values()))


@pytest.fixture(scope="module")
def modules() -> dict[str, dict[str, int]]:
    return graph(ROOT)


@pytest.mark.parametrize("package", ORDER)
def test_the_order_inside_each_package(package: str, modules: dict) -> None:
    assert out_of_order(modules, package) == []


def test_no_module_imports_itself_by_way_of_others(modules: dict) -> None:
    assert circles(modules) == []


def tables_of_contents(root: Path) -> list[str]:
    """Modules that the docstring of their folder does not name, and names without a module."""
    found = []
    for package in MAY_IMPORT:
        for init in sorted((root / package).rglob("__init__.py")):
            text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
            heads = re.findall(r"^(\w+(?:, \w+)*) {2,}\S", text, re.MULTILINE)
            named = {name for head in heads for name in head.split(", ")}
            modules = {file.stem for file in init.parent.glob("*.py")} - {"__init__"}
            modules |= {file.parent.name for file in init.parent.glob("*/__init__.py")}
            folder = init.parent.relative_to(root)
            found += [f"{folder} does not name {name}" for name in sorted(modules - named)]
            found += [f"{folder} has no {name}" for name in sorted(named - modules)]
    return found


def test_every_folder_has_a_table_of_its_contents() -> None:
    assert tables_of_contents(ROOT) == []


def test_a_planted_gap_in_a_table_is_found(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "synthetic/__init__.py": '"""Things.\n\na, b  both\n"""',
            "synthetic/a.py": "",
            "synthetic/c/__init__.py": "",
        },
    )
    assert tables_of_contents(tmp_path) == ["synthetic does not name c", "synthetic has no b"]


def plant(root: Path, files: dict[str, str]) -> None:
    """A tree of modules with these lines."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            {
                "constructions/core/a.py": "from constructions.family import Place",
                "constructions/family.py": "",
            },
            "constructions.core.a:1 imports constructions.family",
        ),
        (
            {
                "constructions/mesa/a.py": "def f():\n    import constructions.tint.b",
                "constructions/tint/b.py": "",
            },
            "constructions.mesa.a:2 imports constructions.tint.b",
        ),
        (
            {
                "constructions/tint/a.py": "from constructions import CATALOGUE",
                "constructions/__init__.py": "",
            },
            "constructions.tint.a:1 imports constructions",
        ),
        (
            {
                "synthetic/grammar/a.py": "if TYPE_CHECKING:\n    from synthetic.fitting import b",
                "synthetic/fitting/b.py": "",
                "synthetic/fitting/__init__.py": "",
            },
            "synthetic.grammar.a:2 imports synthetic.fitting.b",
        ),
        ({"synthetic/other.py": ""}, "synthetic.other has no place in the order"),
    ],
)
def test_planted_disorder_is_found(tmp_path: Path, files: dict[str, str], found: str) -> None:
    plant(tmp_path, files)
    assert out_of_order(graph(tmp_path), found.split(".")[0]) == [found]


def test_planted_circles_are_found(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "probes/a.py": "from probes import b",
            "probes/b.py": "def f():\n    import probes.c",
            "probes/c.py": "if TYPE_CHECKING:\n    from probes.a import x",
            "probes/d.py": "from probes import a",
            "synthetic/own.py": "import synthetic.own",
        },
    )
    assert circles(graph(tmp_path)) == [["probes.a", "probes.b", "probes.c"], ["synthetic.own"]]
    plant(tmp_path, {"probes/c.py": "", "synthetic/own.py": ""})
    assert circles(graph(tmp_path)) == []
