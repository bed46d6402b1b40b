"""Imports run downwards only: probes > constructions > synthetic."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "synthetic": {"synthetic"},
    "constructions": {"constructions", "synthetic"},
    "probes": {"probes", "constructions", "synthetic"},
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
