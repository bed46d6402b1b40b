"""Programs that run once are compiled quickly; what the command compiled is found again."""

import gc
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probes.cli import main
from synthetic import compilation
from synthetic.compilation import (
    clear_up,
    collect_rarely,
    compile_once,
    compile_quickly,
    compiler_options,
    full_effort,
    keep_programs,
)

ROOT = Path(__file__).parents[2]
X = np.linspace(-1, 1, 5)


def power(number: int, x: Any, *, plus: bool = False) -> Any:
    return (jnp.asarray(x) ** number).sum() + (1 if plus else 0)


@pytest.mark.parametrize(
    "compiled",
    [
        compile_once(power, static_argnums=0, static_argnames="plus"),
        compile_once(static_argnums=0, static_argnames="plus", often=True)(power),
        partial(compile_once, static_argnums=0, static_argnames="plus")(power),
    ],
    ids=["call", "decorator", "partial"],
)
def test_every_form_of_jit_is_taken(compiled: Any) -> None:
    assert compiled.__name__ == "power"
    for number in (2, 3):
        for plus in (False, True):
            wanted = (X**number).sum() + plus
            assert compiled(number, X, plus=plus) == pytest.approx(wanted, abs=1e-6)


@compile_once
def waves(x: Any) -> Any:
    return (jnp.sin(x) ** 2).sum()


@pytest.mark.parametrize("low_effort", [False, True], ids=["often", "once"])
def test_what_xla_is_told(monkeypatch: Any, low_effort: bool) -> None:
    told, jit = [], jax.jit

    def spy(function: Any, *, compiler_options: Any = None, **options: Any) -> Any:
        told.append(compiler_options)
        return jit(function, compiler_options=compiler_options, **options)

    monkeypatch.setattr(jax, "jit", spy)
    compiled = compile_once(lambda x: (jnp.sin(x) ** 2).sum(), often=not low_effort)
    assert told == []  # no back end is needed before it runs
    inner = [compiled(X), jit(compiled)(X), jit(lambda: compiled(X))()]
    np.testing.assert_allclose(inner, (np.sin(X) ** 2).sum(), rtol=1e-6)
    if jax.default_backend() == "cpu":
        assert ("xla_backend_optimization_level" in told[0]) == low_effort
    assert told[1:] == [None]  # once for all that is part of something larger


def test_within_transformations() -> None:
    """JAX refuses compiler options below another transformation than `vmap`."""
    np.testing.assert_allclose(jax.grad(waves)(X), np.sin(2 * X), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(waves)(X[:, None]), np.sin(X) ** 2, atol=1e-6)
    hessian = jax.jit(jax.hessian(waves))(X)
    np.testing.assert_allclose(np.diag(hessian), 2 * np.cos(2 * X), atol=1e-6)
    total = jax.lax.scan(lambda c, x: (c + waves(x), None), 0.0, jnp.asarray(X))[0]
    np.testing.assert_allclose(total, (np.sin(X) ** 2).sum(), rtol=1e-6)


@pytest.fixture
def looks_only(monkeypatch: Any) -> Any:
    """As in a command that only looks: no XLA_FLAGS, and what it sets is taken back."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(compilation, "find_spec", lambda _: None)
    yield monkeypatch
    jax.config.update("jax_disable_most_optimizations", False)


def test_what_runs_long_says_so_where_the_rest_is_compiled_quickly(looks_only: Any) -> None:
    assert full_effort() == {}
    often = compiler_options(often=True)
    compile_quickly()
    assert full_effort()["xla_backend_optimization_level"] == 3
    if often:
        assert compiler_options(often=True) == often | {"xla_backend_optimization_level": 3}
    assert compiler_options().get("xla_backend_optimization_level", 0) == 0
    assert float(jax.jit(jnp.sum).lower(X).compile(full_effort())(X)) == pytest.approx(X.sum())


@pytest.mark.parametrize("obstacle", ["XLA_FLAGS", "accelerator", "version"])
def test_others_decide_how_programs_are_compiled(looks_only: Any, obstacle: str) -> None:
    if obstacle == "XLA_FLAGS":
        looks_only.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    elif obstacle == "accelerator":
        looks_only.setattr(compilation, "find_spec", lambda name: "cuda13" in name or None)
    else:
        looks_only.setattr(compilation, "version", lambda _: "0.11.3")
    compile_quickly()
    assert full_effort() == {}


def test_garbage_is_looked_for_rarely() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(700, 10, 10)
        collect_rarely()
        assert gc.isenabled() and gc.get_threshold()[0] > 10_000
    finally:
        gc.set_threshold(*before)


def test_an_unknown_option_is_never_given(monkeypatch: Any) -> None:
    assert compiler_options(often=True).items() <= compiler_options().items()
    monkeypatch.setattr(compilation, "version", lambda _: "0.11.3")
    assert compiler_options() == compiler_options(often=True) == {}
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options() == {}


SCRIPT = (
    "from synthetic.compilation import keep_programs; folder = keep_programs(); import jax; "
    "print(float(jax.jit(lambda x: x @ x + 1)(jax.numpy.arange(8.0)))); print(folder)"
)


def start(base: Path, **environment: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=kept | {"XDG_CACHE_HOME": str(base), "JAX_PLATFORMS": "cpu"} | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> str:
    """The folder; the number is right and nothing is said."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    value, folder = out.splitlines()
    assert float(value) == 141
    return folder


def test_programs_are_found_again(tmp_path: Path) -> None:
    two = start(tmp_path), start(tmp_path)  # at once, into a folder that is not there yet
    (folder,) = {Path(answer(process)) for process in two}
    assert folder.parent == tmp_path / "orrery" and folder.stat().st_mode & 0o077 == 0
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert any("jit" in path.name for path in files)

    damaged = sorted(files)
    damaged[0].write_bytes(b"")
    damaged[1].write_bytes(files[damaged[1]][:100])
    answer(start(tmp_path))
    assert {path: path.read_bytes() for path in folder.iterdir()}.keys() == files.keys()
    assert damaged[0].stat().st_size  # what was left empty is made again

    # switched off: nothing is read or written, wherever JAX is told to
    for path in files:
        path.unlink()
    assert answer(start(tmp_path, ORRERY_NO_CACHE="1")) == "None"
    other = tmp_path / "other"
    told = {"JAX_COMPILATION_CACHE_DIR": str(other), "ORRERY_NO_CACHE": "yes"}
    assert answer(start(tmp_path, **told)) == "None"
    assert not list(folder.iterdir()) and not other.exists()


def own_folder(monkeypatch: Any, base: str, home: Path) -> Path | None:
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", str(home))
    return compilation._own_folder()


def test_where_they_lie(monkeypatch: Any, tmp_path: Path) -> None:
    folder = own_folder(monkeypatch, str(tmp_path / "a"), tmp_path)
    assert folder is not None and folder.parent == tmp_path / "a" / "orrery"
    assert jax.__version__ in folder.name
    for base in ("", "here/below"):  # relative names are to be ignored
        found = own_folder(monkeypatch, base, tmp_path)
        assert found is not None and found.parent == tmp_path / ".cache" / "orrery"
    monkeypatch.setattr(compilation, "processor", lambda: "another one")
    other = own_folder(monkeypatch, str(tmp_path / "a"), tmp_path)
    assert other is not None and other != folder and other.parent == folder.parent
    monkeypatch.setattr(compilation, "version", lambda _: "9.9")
    assert own_folder(monkeypatch, str(tmp_path / "a"), tmp_path) not in (folder, other)


def test_where_nothing_can_be_kept(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert own_folder(monkeypatch, str(tmp_path / "file"), tmp_path) is None
    assert own_folder(monkeypatch, "/proc", tmp_path) is None
    assert (folder := own_folder(monkeypatch, str(tmp_path), tmp_path)) is not None
    folder.chmod(0o777)  # others might put programs there
    assert own_folder(monkeypatch, str(tmp_path), tmp_path) is None
    folder.chmod(0o700)
    monkeypatch.setattr(compilation, "LARGEST_CACHE", 2**60)  # as on a full disk
    assert own_folder(monkeypatch, str(tmp_path), tmp_path) is None


def test_jax_own_folder_is_left_alone(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_programs() is None and not list(tmp_path.iterdir())


def test_the_oldest_make_room(tmp_path: Path) -> None:
    used = {"a": (9, 1), "b/c": (3, 2), "d": (1, 5), "b/e": (1, 4)}  # seconds: read, written
    for name, (read, written) in used.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (read, written))
    (tmp_path / "empty").write_bytes(b"")
    clear_up(tmp_path, 400)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(used)
    clear_up(tmp_path, 299)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"a", "d"}
    clear_up(tmp_path / "not there", 0)


def test_the_command_is_told(monkeypatch: Any, capsys: Any) -> None:
    calls: list[str] = []
    for name in ("keep_programs", "forget_programs"):
        monkeypatch.setattr(f"probes.cli.{name}", partial(calls.append, name))
    for argv in (["verify", "nothing"], ["--no-cache", "verify", "nothing"]):
        assert main(argv) == 2
    assert main(["verify", "nothing", "--no-cache"]) == 2
    assert calls == ["keep_programs", "forget_programs", "forget_programs"]
    capsys.readouterr()
    assert main(["--help"]) == 0 and "--no-cache" in capsys.readouterr().out
