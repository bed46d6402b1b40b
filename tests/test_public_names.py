"""The module `orrery`: every public name, at once to import, and what the README says of it all."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import orrery

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; sys.path[1:1] = [{str(ROOT)!r}]; {code}"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_names_are_those_of_their_modules() -> None:
    for name in orrery.__all__:
        home = importlib.import_module(orrery._HOME[name])
        assert getattr(orrery, name) is getattr(home, name), name
        assert name in dir(orrery)
    with pytest.raises(AttributeError, match="module 'orrery' has no attribute 'nothing'"):
        _ = orrery.nothing
    assert not hasattr(orrery, "__path__")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "orrery.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and "TYPE" in ast.unparse(n.test))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    found = {alias.asname: node.module for node in imports for alias in node.names}
    assert found == orrery._HOME


def test_import_takes_no_jax(tmp_path: Path) -> None:
    done = run("import orrery; sys.exit('jax' in sys.modules)", tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_list_takes_neither_jax_nor_numpy(tmp_path: Path) -> None:
    look = "bool({'jax', 'numpy'} & {*sys.modules})"
    done = run(
        f"import orrery; sys.argv[1:] = ['list']; sys.exit(orrery.main() or {look})", tmp_path
    )
    assert done.returncode == 0 and "gradient-descent" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_project_with_a_folder_of_the_same_name(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "probes").mkdir()
        (tmp_path / "probes" / "__init__.py").write_text("")
    else:
        (tmp_path / "probes.py").write_text("")
    for code, status in (("orrery.CATALOGUE", 1), ("sys.exit(orrery.main())", 2)):
        done = run(f"import orrery; {code}", tmp_path)
        line = done.stderr.splitlines()[-1]
        assert done.returncode == status
        assert re.search(rf"Python finds {tmp_path}/probes\S* under the name probes, which", line)


def test_a_folder_without_code_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "synthetic").mkdir()
    assert run("import orrery; orrery.check_packages()", tmp_path).returncode == 0


def test_the_readme_lists_every_notebook() -> None:
    readme = (ROOT / "README.md").read_text()
    for source in sorted((ROOT / "notebooks").glob("*.py")):
        (title, *_) = re.findall(r"^# # (.*)$", source.read_text(), re.MULTILINE)
        assert f"| [`{source.stem}`](notebooks/{source.stem}.ipynb) | {title} |" in readme


@pytest.mark.parametrize("name", list(orrery.CATALOGUE))
def test_a_familys_class_is_in_its_package(name: str) -> None:
    module, _, cls = orrery.CATALOGUE[name].construct.partition(":")
    package = importlib.import_module(module.rpartition(".")[0])
    assert getattr(package, cls) is getattr(importlib.import_module(module), cls)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = package.Nothing
