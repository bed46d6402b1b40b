"""A family of another package takes part in every command, with no list of ours to edit."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import orrery
from constructions import CATALOGUE
from constructions.catalogue import GROUP, Family
from constructions.runs import fit_family, load_run
from probes.cli import main
from synthetic.files import RunError

PACKAGE = Path(__file__).parent / "another_package"
SOURCE = PACKAGE / "sign_descent.py"
NAME, REFERENCE = "sign-descent", "sign_descent:SignDescent"
SHORT = ["--steps", "8", "--batch", "8"]


def install(site: Path, entries: dict[str, str], package: str = "sign-descent") -> None:
    """What an installer leaves in a site-packages folder, as far as entry points go."""
    info = site / f"{package.replace('-', '_')}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    lines = [f"{name} = {value}\n" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("".join([f"[{GROUP}]\n", *lines]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package, installed outside of the repository."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    install(folder, project["entry-points"][GROUP])
    shutil.copy(SOURCE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("sign_descent", None)


@pytest.fixture(scope="module")
def run(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["fit", NAME, "--out", str(path), "--seeds", "2", *SHORT]) == 0
    return path


def test_it_is_short_and_needs_few_names() -> None:
    text = SOURCE.read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 60
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in imports if node.module == "orrery" for alias in node.names]
    assert len(names) <= 15 and set(names) <= set(orrery.__all__)
    roots = {str(node.module).split(".")[0] for node in imports}
    assert not roots & {"constructions", "synthetic", "probes"}


def test_its_import_is_small() -> None:
    """A family needs the compiler, the protocol and its task, no other family and no orbax."""
    code = (
        f"import sys; sys.path[1:1] = [{str(PACKAGE)!r}, {str(SOURCE.parents[2])!r}];"
        "import sign_descent; ours = ('constructions', 'synthetic', 'probes');"
        "print(sum(name.split('.')[0] in ours for name in sys.modules), 'orbax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, orbax = done.stdout.split()
    assert int(count) <= 25 and orbax == "False"


def test_list(site: Path, capsys: Any) -> None:
    assert NAME in CATALOGUE and NAME in list(CATALOGUE)
    assert main(["list"]) == 0
    assert "Two layers of linear attention and a norm are one step" in capsys.readouterr().out
    for name in (NAME, REFERENCE):
        assert main(["list", name]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{name}\n") and "claims: equal predictions" in out


def test_verify(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "v.json"
    argv = ["verify", NAME, "--set", "dim_x=3", "--dtype", "float64", "--json", str(file)]
    assert main(argv) == 0
    certificate = json.loads(file.read_text())[NAME]
    assert certificate["passed"] and set(certificate["dtypes"]) == {"float64"}
    assert certificate["compared"] == ["gradient", "prediction", "sign"]


def test_runs_can_be_opened_again(site: Path, run: Path, tmp_path: Path, capsys: Any) -> None:
    assert repr(load_run(run).construction) == repr(CATALOGUE[NAME]())
    assert main(["probe", "similarity", "--run", str(run)]) == 0
    made = fit_family(REFERENCE, {"step_size": 1.0}, tmp_path / "run", steps=2, batch=4)
    again = load_run(tmp_path / "run")
    assert again.family == made.family == REFERENCE
    assert again.construction == made.construction
    with pytest.MonkeyPatch.context() as patch:  # without the package: one line
        patch.setattr(sys, "path", [p for p in sys.path if p != str(site)])
        patch.delitem(sys.modules, "sign_descent")
        with pytest.raises(RunError, match="config.json: family: 'sign-descent', must be one"):
            load_run(run)
        with pytest.raises(RunError, match="family: sign_descent:SignDescent: importing .* fails"):
            load_run(tmp_path / "run")


def test_claims_and_compare(site: Path, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    loaded = load_run(run)
    monkeypatch.setattr("constructions.runs.fit_family", lambda *_, **__: loaded)
    monkeypatch.setattr("constructions.family.Construction.examples", 2**8)
    file = tmp_path / "c.json"
    assert main(["claims", NAME, "--quick", "--seeds", "2", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())[NAME]["claims"]
    assert row["verdict"] == "refuted"  # 8 steps teach nothing
    assert row["values"]["construction"] < 1e-5 < 0.1 < row["values"]["twice the step"]
    out = tmp_path / "report"
    assert main(["compare", NAME, "--run", str(run), "--quick", "--out", str(out)]) == 0
    assert NAME in (out / "report.html").read_text()
    certificate = json.loads((out / "report.json").read_text())["certificate"]
    assert all(certificate["dtypes"][dtype]["passed"] for dtype in ("float64", "float32"))


def test_from_the_current_directory(tmp_path: Path) -> None:
    """A module beside the one who types, installed nowhere, by the command as it is installed."""
    (tmp_path / "mine.py").write_text(SOURCE.read_text())
    code = (
        f"import sys; sys.path.insert(1, {str(SOURCE.parents[2])!r}); sys.path.remove('');"
        "from probes.cli import main; sys.exit(main(['list', 'mine:SignDescent']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "equal predictions" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad:A: bad has no A"),
        ("A = 3", "bad:A is a int, must be a Family or a class of constructions"),
        ("import nothing_of_that_name", "importing bad fails: ModuleNotFoundError: .*nothing_of"),
        ("1 / 0", "importing bad fails: ZeroDivisionError"),
        ("def f(:", "importing bad fails: SyntaxError"),
    ],
)
def test_what_is_no_family(
    text: str, message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "bad.py").write_text(text)
    install(tmp_path, {"bad": "bad:A"}, "bad")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad", raising=False)
    for name in ("bad:A", "bad"):
        with pytest.raises(ValueError, match=message):
            CATALOGUE.find(name)
        assert main(["verify", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert main(["list"]) == 0  # all others are still there
    out = " ".join(capsys.readouterr().out.split())
    assert "gradient-descent" in out and "not imported" in out
    sys.modules.pop("bad", None)


@pytest.mark.parametrize("name", [":", "a:", ":a", "a b:c", "../a:b", ".a:b", "a:b:c"])
def test_what_is_no_reference(name: str) -> None:
    with pytest.raises(ValueError, match="must be module:attribute"):
        CATALOGUE.find(name)


def test_names_that_are_taken(tmp_path: Path, monkeypatch: Any) -> None:
    install(tmp_path, {"tint": "other:A", "mine": "other:A", "a/b": "other:A"}, "one")
    install(tmp_path, {"mine": "another:A"}, "two")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning) as said:
        names = list(CATALOGUE)
    reasons = sorted(str(w.message) for w in said)
    assert len(reasons) == 3
    assert "'a/b': must be letters" in reasons[0] and "the name is taken" in reasons[1]
    assert names.count("mine") == 1 and "a/b" not in names
    assert CATALOGUE["tint"].source.startswith("Panigrahi")


def test_a_record_of_this_process(monkeypatch: Any) -> None:
    family = Family("mine", dict, {"a": 1}, "what it claims")
    monkeypatch.setitem(CATALOGUE, "mine", family)
    assert CATALOGUE["mine"] is family and "mine" in CATALOGUE
    assert list(family.measurements(True, 0)) == []
    assert CATALOGUE["mine"].constructor is dict
