"""Run directories whose process dies: the old run or the new one is whole, and nothing is lost."""

import builtins
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from synthetic.fitting.recipe import Recipe
from synthetic.fitting.run_directory import NEW, PARTS, WHOLE, Checkpoints, RunDirectory
from synthetic.fitting.train import NonFiniteLossError, fit
from synthetic.fitting.weights_file import RunError, load_model, named
from synthetic.tasks.task import Batch


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_at(point: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """From the call with that number on, nothing that changes the disk works any more."""
    calls = [0]

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
            if function in (builtins.open, io.open) and set(str(mode)).isdisjoint("wax+"):
                return function(*arguments, **options)
            calls[0] += 1
            if calls[0] > point:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "mkdir", "unlink", "remove", "rmdir"):
            patch.setattr(os, name, deadly(getattr(os, name)))
        patch.setattr(io, "open", deadly(io.open))
        yield calls


def written(run: RunDirectory, name: str) -> None:
    """A run whose four parts all say its name."""
    run.write_config("fit", {"name": name})
    run.append({"step": 1, "name": name})
    run.model.write_text(name)
    (run.checkpoints / "1").mkdir(parents=True)
    (run.checkpoints / "1" / "d").write_text(name)


def names(run: RunDirectory) -> set[str]:
    """What the four parts of a run say."""
    (record,) = run.records()
    assert [file.name for file in run.checkpoints.iterdir()] == ["1"]
    model, checkpoint = run.model.read_text(), (run.checkpoints / "1" / "d").read_text()
    return {run.read_config("fit")["name"], record["name"], model, checkpoint}


def test_a_replacement_killed_anywhere_leaves_the_old_run_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(RunDirectory(tmp_path / "old").create(), "old")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    found, point = [], 0
    while True:
        run = RunDirectory(shutil.copytree(tmp_path / "old", tmp_path / str(point)))
        with killed_at(point, monkeypatch) as calls:
            try:
                new = run.create(overwrite=True)
                written(new, "new")
                run.replace()
            except Killed:
                pass
        (name,) = names(run)
        found.append(name)
        run.settle()  # as the next process that writes does
        assert names(run) == {name} and not os.path.lexists(run.path / WHOLE)
        assert (run.path / "notes.txt").read_text() == "mine"
        written(run.create(overwrite=True), "newer")
        run.replace()
        assert names(run) == {"newer"}
        assert {file.name for file in run.path.iterdir()} == {*PARTS, "notes.txt"}
        if calls[0] <= point:
            break
        point += 1
    changes = found.index("new")
    assert 8 < changes < len(found) - 8  # kills before the exchange and within it
    assert found == ["old"] * changes + ["new"] * (len(found) - changes)


class Line:
    """y = 3 x, with noise."""

    def sample(self, key: Any, batch: int) -> Batch:
        x, noise = jax.random.normal(key, (2, batch, 4))
        return Batch((x,), 3 * x + noise)

    def loss(self, prediction: Any, batch: Batch) -> Any:
        return ((prediction - batch.target) ** 2).mean(-1)


def linear(key: Any) -> nnx.Module:
    return nnx.Linear(4, 4, rngs=nnx.Rngs(key))


RECIPE = Recipe(steps=20, batch=8, learning_rate=0.01, chunk=10, checkpoint_every=10)


def bits(model: Any) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in named(model).items()}


def kept(run: RunDirectory) -> dict[str, bytes]:
    return {
        str(file.relative_to(run.path)): file.read_bytes()
        for file in run.path.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "old"
    fit(linear, Line(), RECIPE, out=path)
    return path


@pytest.fixture
def run(old: Path, tmp_path: Path) -> RunDirectory:
    return RunDirectory(shutil.copytree(old, tmp_path / "run"))


def test_an_overwrite_that_fails_keeps_the_old_run(run: RunDirectory) -> None:
    before = kept(run)
    options: dict[str, Any] = {"out": run.path, "overwrite": True}
    with pytest.raises(NonFiniteLossError):
        fit(linear, Line(), RECIPE, **options, optimizer="sgd", learning_rate=1e30)

    def full(record: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fit(linear, Line(), RECIPE, **options, progress=full)
    assert kept(run) == before


def test_an_overwrite_that_is_interrupted_can_be_resumed(run: RunDirectory) -> None:
    before = kept(run)

    def interrupt(record: Any) -> None:
        if record["step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(linear, Line(), RECIPE, seed=1, out=run.path, overwrite=True, progress=interrupt)
    assert {n: data for n, data in kept(run).items() if not n.startswith(NEW)} == before
    with pytest.raises(RunError, match=rf"seed: 1 in the run, 0 asked.*remove {run.path / NEW} to"):
        fit(linear, Line(), RECIPE, out=run.path, resume=True)
    with pytest.raises(RunError, match="5 asked, but the run has reached step 10"):
        fit(linear, Line(), RECIPE, seed=1, steps=5, out=run.path, resume=True)
    new = fit(linear, Line(), RECIPE, seed=1, out=run.path, resume=True)
    assert new.history == run.records() and run.read_config()["seed"] == 1
    whole = fit(linear, Line(), RECIPE, seed=1)
    assert bits(load_model(run.model, linear(jax.random.key(0)))) == bits(whole.model)
    assert {file.name for file in run.path.iterdir()} == set(PARTS)


def test_a_fit_killed_in_its_first_checkpoint_resumes_from_the_start(
    run: RunDirectory, tmp_path: Path
) -> None:
    whole = bits(load_model(run.model, linear(jax.random.key(0))))
    run.model.unlink()
    shutil.rmtree(run.checkpoints / "20")
    for left in ("nothing", "orbax's own", "no manifest", "half a manifest"):
        folder = Path(shutil.copytree(run.checkpoints, tmp_path / left))
        first = folder / "10"
        if left == "nothing":
            shutil.rmtree(first)
        elif left == "orbax's own":
            first.rename(folder / "10.orbax-checkpoint-tmp")
        else:
            (first / "manifest.json").rename(first / ".manifest.json.partial")
            if left == "no manifest":
                (first / ".manifest.json.partial").unlink()
        if left == "half a manifest":
            shutil.copytree(folder, tmp_path / "again")
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.restore({"w": np.zeros(1)}) is None
            assert checkpoints.steps() == []
    shutil.rmtree(run.checkpoints)
    (tmp_path / "again").rename(run.checkpoints)
    resumed = fit(linear, Line(), RECIPE, out=run.path, resume=True)
    assert bits(resumed.model) == whole and resumed.history == run.records()
    assert [r["step"] for r in run.records()] == [10, 20]


def test_a_directory_with_partial_files_alone_is_a_fresh_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / ".config.json.partial").write_text('{"form')
    with pytest.raises(RunError, match="so this is no run; `orrery fit NAME --out .*` makes one"):
        fit(linear, Line(), RECIPE, out=tmp_path, resume=True)
    assert run.create() == run
    run.write_config("fit", {})
    with pytest.raises(RunError, match="not empty; give --resume to go on with it, --overwrite to"):
        run.create()
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("part", [*PARTS, NEW, "checkpoints/20", "checkpoints/20/manifest.json"])
def test_nothing_outside_the_directory_is_written_or_removed(
    run: RunDirectory, part: str, tmp_path: Path
) -> None:
    """A part of the run is moved elsewhere and a symbolic link put in its place."""
    outside = tmp_path / "outside"
    if part == NEW:
        shutil.copytree(run.path, outside)
    else:
        (run.path / part).rename(outside)
    (run.path / part).symlink_to(outside)
    before = kept(RunDirectory(outside)) if outside.is_dir() else outside.read_bytes()
    with pytest.raises(RunError, match=f"{part}: is a symbolic link"):
        fit(linear, Line(), RECIPE, out=run.path, resume=True)
    written(run.create(overwrite=True), "new")
    run.replace()
    assert before == (kept(RunDirectory(outside)) if outside.is_dir() else outside.read_bytes())
    assert names(run) == {"new"} and not (run.path / part).is_symlink()


def test_a_partial_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    run = RunDirectory(tmp_path / "run").create()
    (run.path / ".config.json.partial").symlink_to(outside)
    run.write_config("fit", {})
    assert outside.read_text() == "precious" and not run.config.is_symlink()


def test_reading_changes_nothing(run: RunDirectory) -> None:
    (run.checkpoints / "30.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(run.checkpoints, writes=False) as checkpoints:
        assert checkpoints.steps() == [10, 20] and checkpoints.read(10) is not None
    assert (run.checkpoints / "30.orbax-checkpoint-tmp").is_dir()


def test_where_nothing_can_be_written_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match=r"cannot be written: [A-Z]"):
            fit(linear, Line(), RECIPE, out=path)
