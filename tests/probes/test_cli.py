"""The command: what it prints and writes, and one line with status 2 for every mistake."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import pytest

from constructions import CATALOGUE
from constructions.family import Certificate, Error, verify
from constructions.measurement import Measurement, Remark
from constructions.runs import construct, load_run, plain_settings
from probes import PROBES
from probes.cli import installed_version, main
from probes.coverage import cites
from probes.ledger import ledger
from probes.options import parse_settings
from synthetic.grammar.grammar import Grammar

NAME = "gradient-descent"
SMALL = ["--set", "dim_x=3", "--set", "num_examples=5", "--set", "step_size=2.0"]
SHORT = ["--steps", "20", "--batch", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["fit", NAME, "--out", str(path), "--seeds", "2", *SMALL, *SHORT]) == 0
    return path


def complaint(capsys: Any, argv: list[str], status: int = 2) -> str:
    capsys.readouterr()
    assert main(argv) == status
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("orrery: ")]
    assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
    assert "Traceback" not in err
    return lines[0]


def test_help_needs_no_jax() -> None:
    code = (
        "import sys; from probes.cli import main; status = main(['--help']); "
        "sys.exit(status or int('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("list", "verify", "fit", "compare", "claims", "probe", "demo", "export"):
        assert command in done.stdout


MISTAKES_AT_ONCE = {
    "verify nope": "unknown family 'nope', must be one of gd-plus-plus, ",
    "fit nope --out x": "unknown family 'nope'",
    "probe nope --run x": "unknown probe 'nope', must be one of losses, ",
    "probe losses --run /no/run": "/no/run/config.json: missing, so this is no run",
    "probe losses --run x --seed -1": "--seed -1: must be in 0..",
    "verify --json /no/file.json": "/no/file.json: its directory does not exist",
    "claims --seeds 0": "--seeds 0: must be at least 1",
    "claims --item fig2": "--item fig2: --paper must say of which paper",
    "compare tint --out x --seeds 0": "--seeds 0: must be at least 1",
    "compare tint --out x --run /no/run": "/no/run/config.json: missing",
    "demo --seeds 0": "--seeds 0: must be at least 1",
    "demo --workers -1": "--workers -1: must be at least 1, or 0 for one a core",
}


def test_what_needs_no_jax_takes_none(capsys: Any) -> None:
    """`list` and mistakes in what is typed; in a process that has nothing loaded."""
    code = (
        "import sys; from probes.cli import main; "
        f"status = [main(words.split()) for words in {['list', *MISTAKES_AT_ONCE]!r}]; "
        f"wrong = status != [0] + {len(MISTAKES_AT_ONCE)} * [2]; "
        "sys.exit(wrong or any(name in sys.modules for name in ('jax', 'flax', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, message in zip(done.stderr.splitlines(), MISTAKES_AT_ONCE.values(), strict=True):
        assert message in line
    assert main(["list"]) == 0
    assert capsys.readouterr().out == done.stdout


def test_list(capsys: Any, tmp_path: Path) -> None:
    # without names the settings, with them tasks and claims as well
    assert main(["list"]) == 0
    every = capsys.readouterr().out
    assert main(["list", *CATALOGUE, "--json", str(tmp_path / "l.json")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "l.json").read_text())
    assert set(found) == set(CATALOGUE)
    assert all(name in out for name in CATALOGUE)
    # it can be read in 80 columns, but for words that must stay whole, and its settings typed
    assert out.isascii()
    for line in out.splitlines():
        assert len(line) <= 80 or line.removeprefix("  settings:").count(" ") <= 4, line
    words = out.split()
    for family in CATALOGUE.values():
        assert family.name in words
        line = next(x for x in out.split("\n\n") if x.startswith(f"{family.name}\n"))
        shown = line[line.index("settings: ") + 10 : line.index("  task: ")]
        assert parse_settings(shlex.split(shown)) == json.loads(json.dumps(family.example()))
    assert "tokens, 18 words)" in " ".join(words)  # of a corpus
    short = [part[: part.index("\n  task: ")] for part in out.split("\n\n") if part]
    assert every.split("\n\n")[:-1] == short
    assert all(found[name]["task"] and found[name]["claims"] for name in CATALOGUE)
    assert "unknown family 'nope'" in complaint(capsys, ["list", "nope"])


def test_verify_prints_each_family_when_it_is_done(monkeypatch: Any, capsys: Any) -> None:
    names = ["mesa-ridge", NAME, "tint"]
    error = Error("float64", 0.0, 0.0, 1e-13, "prediction", 1)
    certificate = Certificate("c", (error,), {}, ("prediction",), (), (1,))
    printed = []

    def verified(construction: Any, **_: Any) -> Any:
        printed.append(capsys.readouterr().out)
        return certificate

    monkeypatch.setattr("constructions.family.verify", verified)
    assert main(["verify", *names]) == 0
    assert printed[0] == "" and len(printed) == 3
    for name, said in zip(names, printed[1:], strict=False):
        assert said.startswith(f"{name}\n  float64: passed") and said.count("compared") == 1


def test_a_grammar_from_a_file(tmp_path: Path) -> None:
    text, data = tmp_path / "g.txt", tmp_path / "g.json"
    text.write_text("S -> A S [0.5] | A A [0.5]\nA -> 'a' [0.25] | 'b' [0.75]")
    wanted = Grammar.from_file(text)
    data.write_text(json.dumps(wanted.to_json()))
    for file in (text, data):
        settings = parse_settings([f"grammar={file}", "max_length=4"])
        assert construct("inside-outside", settings).grammar == wanted  # type: ignore[attr-defined]
        assert plain_settings("inside-outside", settings) == settings
    assert parse_settings(["grammar=toy"]) == {"grammar": "toy"}


def test_verify(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "v.json"
    assert main(["verify", NAME, *SMALL, "--json", str(file)]) == 0
    assert "passed" in capsys.readouterr().out
    dtypes = json.loads(file.read_text())[NAME]["dtypes"]
    assert set(dtypes) == {"float64", "float32"}
    for entry in dtypes.values():
        assert entry["passed"] and entry["max_rel_error"] <= entry["tolerance"]
        assert "max_abs_error" in entry
    assert "exists" in complaint(capsys, ["verify", "--json", str(file)])
    again = ["verify", NAME, *SMALL, "--dtype", "float32", "--json", str(file), "--overwrite"]
    assert main(again) == 0
    assert set(json.loads(file.read_text())[NAME]["dtypes"]) == {"float32"}


def test_failed_certificate_is_status_1(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "constructions.gradient_descent.construction.GradientDescent.tolerance", lambda *_: 0.0
    )
    assert main(["verify", NAME, *SMALL, "--dtype", "float32"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_fit_keeps_a_run_that_loads(run: Path) -> None:
    loaded = load_run(run)
    assert loaded.settings["dim_x"] == 3 and loaded.seeds == (0, 1)
    assert (loaded.recipe.steps, loaded.recipe.batch) == (20, 16)
    assert (run / "metrics.jsonl").exists() and (run / "checkpoints").is_dir()


def test_resume_may_repeat_the_options(run: Path, capsys: Any) -> None:
    assert main(["fit", NAME, "--out", str(run), "--resume"]) == 0
    assert main(["fit", NAME, "--out", str(run), "--seeds", "2", *SMALL, *SHORT, "--resume"]) == 0
    other = ["fit", NAME, "--out", str(run), "--resume", "--set", "dim_x=4"]
    assert "settings.dim_x" in complaint(capsys, other)


#: Probes whose assumptions a regression run of a few steps does not meet, and what they say.
REFUSED = {
    "saliency": "RegressionTask predicts numbers",
    "averaging": "the run has 1 checkpoints, averaging needs two",
    "arcs": "family 'gradient-descent' has no grammar",
    "selectivity": "",
    "spans": "family 'gradient-descent' is no masked language model",
    "trees": "family 'gradient-descent' is no masked language model",
    "span-interchange": "family 'gradient-descent' keeps no values of spans",
    "positions": "GradientDescent predicts no numbers at each of some positions",
}


#: Those behind the command in the fast suite; every probe has tests of its own.
SHOWN = ("linear", "training", "graft", *REFUSED)


@pytest.mark.parametrize(
    "name", [p if p in SHOWN else pytest.param(p, marks=pytest.mark.slow) for p in PROBES]
)
def test_probe(name: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    file, figure = tmp_path / "p.json", tmp_path / "p.png"
    command = ["probe", name, "--run", str(run), "--json", str(file), "--figure", str(figure)]
    if name in REFUSED:
        assert REFUSED[name] in complaint(capsys, command)
        assert not file.exists() and not figure.exists()
        return
    assert main(command) == 0
    result = json.loads(file.read_text())
    assert len(result["values"]) == len(result["rows"]) > 0
    assert all(len(row) == len(result["columns"]) for row in result["values"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert result["rows"][0] in said and result["note"] in said


def test_claims_are_the_ledgers(monkeypatch: Any, tmp_path: Path, run: Path, capsys: Any) -> None:
    loaded = load_run(run)
    monkeypatch.setattr("constructions.runs.fit_family", lambda *_, **__: loaded)
    # both ledgers take no more inputs than a construction has as its examples
    monkeypatch.setattr("constructions.family.Construction.examples", 2**10)
    measurements = [
        Measurement("one number", "It is 2.", "fig. 1", 2.0, 2.01, 0.01),
        Measurement("another", "It is 3.", "fig. 2", 3.0, 2.0, tolerance=0.1, better="<="),
        Measurement("a third", "It is 4.", "fig. 3", 4.0, 5.0, note="why it differs"),
    ]
    remark = Remark("aside", "It is 5.", "fig. 4", 5.0)
    family = replace(CATALOGUE[NAME], measure=lambda quick, seed: iter([*measurements, remark]))
    monkeypatch.setitem(CATALOGUE, NAME, family)
    file = tmp_path / "c.json"
    assert main(["claims", NAME, "--quick", "--seeds", "2", "--json", str(file)]) == 0
    expected = ledger(loaded.construction, loaded.models, batch=2**14)
    written = json.loads(file.read_text())[NAME]
    found, measured = written["claims"], written["measurements"]
    assert measured == [m.to_json() for m in measurements]
    assert written["remarks"] == [remark.to_json()]
    assert [r["verdict"] for r in found] == [row.verdict for row in expected]
    assert [r["claim"]["name"] for r in found] == [row.claim.name for row in expected]
    out = capsys.readouterr().out
    assert all(row.claim.name in out for row in expected)
    # 20 steps teach nothing: a ledger that cannot refute would be no ledger
    assert "refuted" in {r["verdict"] for r in found}
    for said in ("one number", "reproduced", "better", "differs", "note: why it differs", "aside"):
        assert said in out


def test_claims_of_one_figure(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    for source, words, found in (
        ("von Oswald et al. 2022, arXiv 2212.07677, figs. 2 and 3a", "Fig 2", True),
        ("arXiv 2212.07677, fig. 21", "fig2", False),
        ("arXiv 2212.07677, Prop. 1", "prop1", True),
        ("arXiv 2212.07677, Prop. 1", "2212.0767", False),
    ):
        assert cites(source, words) == found
    asked: list[Any] = []
    monkeypatch.setattr("constructions.runs.fit_family", lambda *_, **__: Mock(models=()))
    monkeypatch.setattr("probes.ledger.ledger", lambda *_, claims, **__: asked.extend(claims) or [])
    paper = "von Oswald et al. 2022, arXiv 2212.07677"
    rows = [Measurement(str(n), "It is 2.", f"{paper}, fig. {n}", 2.0, 2.0) for n in (2, 3, 23)]
    for name, made in ((NAME, rows), ("mesa-ridge", [])):
        family = replace(CATALOGUE[name], measure=lambda *_, r=made: iter(r))
        monkeypatch.setitem(CATALOGUE, name, family)
    file = tmp_path / "c.json"
    words = ["--paper", "2212.07677", "--item", "fig2", "--json", str(file)]
    assert main(["claims", NAME, "mesa-ridge", *words]) == 0
    found = json.loads(file.read_text())
    assert [row["name"] for row in found[NAME]["measurements"]] == ["2"]
    assert asked and all("2212.07677" in c.source and "fig" in c.source for c in asked)
    assert [*found] == [NAME]
    capsys.readouterr()
    nothing = ["claims", "mesa-ridge", "--paper", "2309.05858", "--item", "fig99"]
    assert "fig99: no claim and no measurement of mesa-ridge" in complaint(capsys, nothing)


class Unread(io.StringIO):
    """Standard output that nobody reads."""

    def flush(self) -> None:
        raise BrokenPipeError


def test_output_that_nobody_reads(monkeypatch: Any, capsys: Any) -> None:
    for argv in (["list"], ["--help"], ["--version"]):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Unread())
            assert main(argv) == 141
    assert capsys.readouterr().err == ""


def terminate(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def failing(error: BaseException) -> Any:
    def run(_: Any) -> None:
        raise error

    return run


FAILURES = [
    (terminate, 143, "orrery: terminated"),
    (failing(KeyboardInterrupt()), 130, "orrery: interrupted"),
    (
        failing(MemoryError("Unable to allocate 8 TiB")),
        2,
        "out of memory: Unable to allocate 8 TiB",
    ),
    (failing(MemoryError()), 2, "orrery: out of memory"),
    (failing(OSError(28, "No space left on device")), 2, "orrery: No space left on device"),
    (failing(OSError(28, "No space left on device", "run/x")), 2, "run/x: No space left on device"),
    (
        failing(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n  in module x")),
        2,
        "orrery: RESOURCE_EXHAUSTED: Out of memory",
    ),
]


@pytest.mark.parametrize(("run", "status", "message"), FAILURES, ids=[m for *_, m in FAILURES])
def test_what_ends_a_command(
    run: Any, status: int, message: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("probes.cli.List.run", run)
    before = signal.getsignal(signal.SIGTERM)
    assert complaint(capsys, ["list"], status).endswith(message)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_back_end_that_is_not_there_and_a_closed_output() -> None:
    command = f"{sys.executable} -m probes.cli verify {NAME} >&-"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "JAX_PLATFORMS": "foo"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("orrery: Unable to initialize backend 'foo'")


def test_version(capsys: Any) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"orrery {installed_version()}\n"


MISTAKES = [
    (["verify", NAME, "--json", "full"], "full: is a directory, must be a file"),
    (["verify", NAME, "--json", "/proc/v.json"], "/proc/v.json: cannot be written: "),
    (["verify", NAME, "--json", "file/v.json"], "file/v.json: its directory does not exist"),
    (["verify", NAME, "--json", "x" * 250], "xxx: cannot be written: File name too long"),
    (["probe", "linear", "--run", "x", "--figure", "/proc/f.png"], "/proc/f.png: cannot be wr"),
    (["probe", "linear", "--run", "x", "--figure", "no/f.png"], "no/f.png: its directory does"),
    (["probe", "linear", "--run", "x", "--figure", "f", "--json", "f"], "--json f: must be ano"),
    (["compare", NAME, "--out", "/proc/new"], "/proc/new: cannot be written: "),
    (["demo", "--out", "linked"], "linked/tint: is a symbolic link, must be a folder in linked"),
    (["verify", "inside-outside", "--set", "grammar=g.txt"], "grammar=g.txt: must be one of toy, "),
    (["verify", "inside-outside", "--set", "grammar=file"], "file: .*precious"),
    (["verify", "nope"], "unknown family 'nope', must be one of .*gradient-descent"),
    (["fit", "nope", "--out", "x"], "unknown family"),
    (["probe", "nope", "--run", "x"], "unknown probe 'nope', must be one of losses"),
    (["probe", "linear", "--run", "absent"], "absent/config.json: missing"),
    (["compare", NAME, "--run", "absent", "--out", "new"], "absent/config.json: missing"),
    (["verify", NAME, "--set", "dim_x=-1"], "dim_x is -1"),
    (["verify", NAME, "--set", "dim_x"], "must be KEY=VALUE"),
    (["verify", NAME, "--set", "width=1"], "unknown setting 'width'"),
    (["verify", NAME, "--set", "dim_x=ten"], "dim_x.*ten"),
    (["verify", NAME, "--json", "no/such/folder.json"], "directory does not exist"),
    (["fit", NAME, "--out", "new", "--steps", "0"], "steps=0"),
    (["fit", NAME, "--out", "new", "--seeds", "0"], "--seeds 0"),
    (["fit", NAME, "--out", "new", "--learning-rate", "-1"], "learning_rate=-1"),
    (["fit", NAME, "--out", "new", "--resume"], "new/config.json: missing"),
    (["fit", NAME, "--out", "full"], "full: exists and is not empty"),
    (["fit", NAME, "--out", "file"], "file: exists and is no directory"),
    (["fit", NAME, "--out", "new", "--num-processes", "2"], "process_id=None"),
    (["compare", NAME, "--out", "full"], "full: exists and is not empty"),
    (["compare", NAME, "--out", "full", "--overwrite"], "full: holds no report"),
    (["demo", "--out", "full"], "full: holds no report"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "tint").symlink_to(tmp_path / "full")
    (tmp_path / "linked" / "report.json").write_text('{"format": "orrery-report"}')
    line = complaint(capsys, argv)
    assert re.search(message, line), line
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    assert not (tmp_path / "new" / "config.json").exists()


def test_truncated_run_and_wrong_family(run: Path, tmp_path: Path, capsys: Any) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    model = copy / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-5])
    line = complaint(capsys, ["probe", "linear", "--run", str(copy)])
    assert "model.safetensors: truncated" in line


def test_divergence_is_status_1(tmp_path: Path, capsys: Any) -> None:
    argv = ["fit", NAME, "--out", str(tmp_path / "r"), *SMALL, *SHORT, "--learning-rate", "1e30"]
    assert " at step " in complaint(capsys, argv, status=1)


def test_unknown_options_are_status_2(capsys: Any) -> None:
    assert main(["fit"]) == 2
    assert main(["nonsense"]) == 2
    capsys.readouterr()


def test_seed_changes_inputs_not_the_verdict() -> None:
    # the command's certificate is that of `verify`
    construction = CATALOGUE[NAME](dim_x=3, num_examples=5)
    first, other = (verify(construction, dtypes=("float32",), seed=s) for s in (0, 1))
    assert first.passed and other.passed
    assert first.errors[0].max_abs_error != other.errors[0].max_abs_error
    assert jax.config.jax_enable_x64 is False
