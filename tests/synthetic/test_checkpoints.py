"""Files of a run: exact bits, atomic, and one clear line for whatever is wrong with them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from synthetic.fitting.recipe import Recipe
from synthetic.fitting.run_directory import Checkpoints, RunDirectory, first_difference
from synthetic.fitting.train import fit
from synthetic.fitting.weights_file import (
    RunError,
    load_model,
    load_state,
    named,
    save_model,
    unnamed,
)
from synthetic.tasks.task import Batch

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path.insert(0, "tests/synthetic")
import test_checkpoints
test_checkpoints.training(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume")
"""


class Line:
    """y = 3 x, with noise."""

    def sample(self, key: Any, batch: int) -> Batch:
        x, noise = jax.random.normal(key, (2, batch, 4))
        return Batch((x,), 3 * x + noise)

    def loss(self, prediction: Any, batch: Batch) -> Any:
        return ((prediction - batch.target) ** 2).mean(-1)


def mlp(key: Any) -> nnx.Module:
    rngs = nnx.Rngs(key)
    return nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs))


RECIPE = Recipe(steps=90, batch=8, learning_rate=0.01, chunk=10, checkpoint_every=30, ema=0.9)


def training(out: str | None, steps: int, resume: bool) -> Any:
    return fit(
        mlp, Line(), RECIPE, steps=steps, seed=3, out=out, resume=resume, config={"family": "line"}
    )


def bits(model: Any) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in named(model).items()}


ARRAYS = {
    "a/b.c": np.array([[1.0, -0.0], [np.pi, np.nextafter(1, 2)]]),
    "half": np.asarray(jnp.array([1.5, -3e38], jnp.bfloat16)),
    "count": np.array(7, np.int32),
    "single": np.array([1e-45, np.inf], np.float32),
    "none": np.zeros((0, 3), np.float32),
}


def exactly(found: Any, wanted: Any) -> bool:
    return list(found) == list(wanted) and all(
        found[k].dtype == wanted[k].dtype
        and found[k].shape == wanted[k].shape
        and found[k].tobytes() == wanted[k].tobytes()
        for k in wanted
    )


def test_checkpoints_keep_the_last_and_the_bits(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        assert checkpoints.restore(ARRAYS) is None
        for step in (10, 20, 30, 40):
            checkpoints.save(step, {**ARRAYS, "count": np.array(step, np.int32)})
        assert checkpoints.steps() == [20, 30, 40]
    with Checkpoints(tmp_path / "c") as checkpoints:
        found = checkpoints.restore(ARRAYS)
        assert found is not None and found[0] == 40
        arrays = {name: found[1][name] for name in ARRAYS}
        assert exactly(arrays, {**ARRAYS, "count": np.array(40, np.int32)})


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))


DAMAGE = {
    "truncate": _truncate,
    "flip": _flip,
    "empty": lambda file: file.write_bytes(b""),
    "remove": lambda file: file.unlink(),
    "no manifest": lambda file: file.name == "manifest.json" and file.unlink(),
}


def damage(checkpoint: Path, how: str) -> None:
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    arrays = [file for file in files if "/d/" in file.as_posix()]
    assert arrays
    for file in files if how == "no manifest" else arrays:
        DAMAGE[how](file)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_falls_back(tmp_path: Path, how: str) -> None:
    arrays = {"w": np.random.default_rng(0).normal(size=300)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": arrays["w"] + step})
    damage(tmp_path / "2", how)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(arrays)
        assert found is not None and found[0] == 1
        assert exactly(found[1], {"w": arrays["w"] + 1})
        checkpoints.save(2, arrays)
        assert checkpoints.steps() == [1, 2]
    damage(tmp_path / "1", how)
    damage(tmp_path / "2", how)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(RunError, match=r"\[1, 2\] can be"):
        checkpoints.restore(arrays)
    # Nothing is deleted where nothing better was found.
    assert (tmp_path / "1").exists() and (tmp_path / "2").exists()


def test_what_a_checkpoint_says_of_itself_is_damaged(tmp_path: Path) -> None:
    arrays = {"w": np.arange(4.0)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": arrays["w"] + step})
    for step, message in ((2, r"steps \[2\] are damaged"), (1, r"steps \[1\] are damaged")):
        (file,) = (tmp_path / str(step)).glob("_CHECKPOINT_METADATA")
        said = json.loads(file.read_text())
        file.write_text(json.dumps({**said, "commit_timestamp_nsecs": 0.5}))
        with pytest.raises(RunError, match=message):  # nothing is deleted by who only reads
            Checkpoints(tmp_path, writes=False)
        if step == 2:
            with Checkpoints(tmp_path) as checkpoints:
                found = checkpoints.restore(arrays)
                assert found is not None and found[0] == 1
                assert exactly(found[1], {"w": arrays["w"] + 1})
    with pytest.raises(
        RunError, match=r"steps \[1\] are damaged; remove them, or give --overwrite"
    ):
        Checkpoints(tmp_path)
    assert (tmp_path / "1").exists()


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"w": np.zeros(3), "old": np.zeros(1)})
        for like, message in (
            ({"w": np.zeros(3)}, "old: not in the model"),
            ({"w": np.zeros(3), "old": np.zeros(1), "new": np.zeros(2)}, "new: missing"),
            (
                {"w": np.zeros((3, 1)), "old": np.zeros(1)},
                r"w: shape \[3\], the model has \[3, 1\]",
            ),
            ({"w": np.zeros(3, np.float32), "old": np.zeros(1)}, "w: dtype float64, the model"),
        ):
            with pytest.raises(RunError, match=message):
                checkpoints.restore(like)


@pytest.mark.parametrize("how", ["truncate", "remove"])
def test_resume_with_a_damaged_checkpoint_repeats_the_bits(tmp_path: Path, how: str) -> None:
    whole = training(None, 90, False)
    training(str(tmp_path / "run"), 60, False)
    run = RunDirectory(tmp_path / "run")
    damage(run.checkpoints / "60", how)
    with run.metrics.open("a") as file:
        file.write('{"step": 70, "los')  # cut off in the middle of a line
    resumed = training(str(run.path), 90, True)
    assert bits(resumed.model) == bits(whole.model)
    assert resumed.history == whole.history == run.records()


def test_killed_fit_resumes_to_the_same_bits(tmp_path: Path) -> None:
    steps = 200_000
    run = RunDirectory(tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(run.path), str(steps), "new"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        limit = time.monotonic() + 60
        while not list(run.checkpoints.glob("*0")):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not run.model.exists()
    reached = max(record["step"] for record in run.records())
    assert 30 <= reached < steps
    total = reached + 65
    command[4:] = [str(total), "resume"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    whole = training(None, total, False)
    assert bits(load_model(run.model, mlp(jax.random.key(0)))) == bits(whole.model)
    assert run.records() == whole.history


def test_resume_names_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    training(str(out), 60, False)
    again: dict[str, Any] = {"out": out, "resume": True, "config": {"family": "line"}}
    recipe = Recipe(**{**RECIPE.to_json(), "steps": 60})
    for arguments, message in (
        ({"seed": 4}, r"config.json: seed: 3 in the run, 4 asked"),
        ({"seed": 3, "batch": 16}, "recipe.batch: 8 in the run, 16 asked"),
        ({"seed": 3, "config": {"family": "curve"}}, "family: 'line' in the run, 'curve' asked"),
        ({"seed": 3, "optimum": 1.0}, "optimum: None in the run, 1.0 asked"),
        ({"seed": 3, "steps": 30}, "recipe.steps: 30 asked, but the run has reached step 60"),
    ):
        with pytest.raises(RunError, match=message):
            fit(mlp, Line(), recipe, **{**again, **arguments})
    assert fit(mlp, Line(), recipe, seed=3, checkpoint_every=20, **again).step == 60
    cosine = Recipe(steps=20, batch=8, chunk=10, schedule="cosine")
    fit(mlp, Line(), cosine, out=tmp_path / "cosine")
    with pytest.raises(RunError, match=r"recipe.steps: 20 in the run, 40 asked; only a constant"):
        fit(mlp, Line(), cosine, steps=40, out=tmp_path / "cosine", resume=True)
    with pytest.raises(RunError, match="missing, so this is no run"):
        fit(mlp, Line(), cosine, out=tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    training(str(out), 20, False)
    (out / "report.html").write_text("mine")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(RunError, match=f"{out}: exists and is not empty"):
        training(str(out), 20, False)
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    new = fit(mlp, Line(), RECIPE, steps=10, out=out, overwrite=True)
    assert RunDirectory(out).records() == new.history and len(new.history) == 1
    assert (out / "report.html").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="exists and is no directory"):
        RunDirectory(tmp_path / "file").create(overwrite=True)


def test_config_is_checked(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.write_config("fit", {"family": "line"})
    assert run.read_config("fit", ["family"])["family"] == "line"
    assert [file.name for file in run.path.iterdir()] == ["config.json"]
    good = json.loads(run.config.read_text())
    for content, message in (
        (run.config.read_text()[:-10], "truncated or no JSON"),
        ("[1]", "format: None, expected 'orrery-run'"),
        (json.dumps({**good, "format": "x"}), "format: 'x', expected"),
        (json.dumps({**good, "version": 2}), "version: 2, expected 1"),
        (json.dumps({**good, "kind": "report"}), "kind: 'report', expected 'fit'"),
        (json.dumps({k: v for k, v in good.items() if k != "family"}), "family: missing"),
    ):
        run.config.write_text(content)
        with pytest.raises(RunError, match=f"^{run.config}: {message}") as caught:
            run.read_config("fit", ["family"])
        assert "\n" not in str(caught.value)
    run.metrics.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(RunError, match="line 2: no record"):
        run.records()


def test_model_file_keeps_names_and_bits(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_model(file, ARRAYS, {"depth": 2})
    arrays, config = load_state(file)
    assert exactly({name: arrays[name] for name in ARRAYS}, ARRAYS) and config == {"depth": 2}
    assert set(load_file(file)) == set(ARRAYS)
    with pytest.raises(RunError, match="exists; give overwrite=True"):
        save_model(file, ARRAYS)
    model = mlp(jax.random.key(1))
    save_model(file, model, overwrite=True)
    assert set(load_file(file)) == {f"layers.{i}.{n}" for i in (0, 1) for n in ("kernel", "bias")}
    other = mlp(jax.random.key(2))
    kept = bits(other)
    assert bits(load_model(file, other)) == bits(model) != kept == bits(other)
    state = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(5)))
    again = unnamed({k: np.asarray(v) for k, v in named(state).items()}, state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state, again))


def test_model_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    model = mlp(jax.random.key(1))
    with pytest.raises(RunError, match="cannot be read: No such file"):
        load_state(file)
    save_file({"one\nline": np.zeros(1)}, file)
    with pytest.raises(RunError, match=r"an array is called 'one\\nline', must be printable"):
        load_state(file)
    file.unlink()
    save_model(file, model)
    good = file.read_bytes()
    for content in (b"", good[:5], good[:-3], b"x" * 100, b"\x02" + bytes(7) + b"[]"):
        file.write_bytes(content)
        with pytest.raises(RunError, match=f"^{file}: truncated or no safetensors") as caught:
            load_state(file)
        assert "\n" not in str(caught.value)
    arrays = {name: np.asarray(array) for name, array in named(model).items()}
    save_file(arrays, file)
    with pytest.raises(RunError, match="format: None"):
        load_state(file)
    save_file(arrays, file, metadata={"format": "orrery-model", "version": "9", "config": "{}"})
    with pytest.raises(RunError, match="version: '9'"):
        load_state(file)
    bias = "layers.0.bias"
    for changed, message in (
        ({k: v for k, v in arrays.items() if k != bias}, f"{bias}: missing"),
        ({**arrays, "extra": np.zeros(1)}, "extra: not in the model"),
        ({**arrays, bias: np.zeros((2, 4), np.float32)}, rf"{bias}: shape \[2, 4\], the model"),
        ({**arrays, bias: np.zeros(8)}, f"{bias}: dtype float64, the model has float32"),
        ({**arrays, bias: np.zeros(8), "extra": np.zeros(1)}, r"\(and 1 more\)"),
    ):
        save_model(file, changed, overwrite=True)
        with pytest.raises(RunError, match=message):
            load_model(file, model)


def test_first_difference() -> None:
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ("a.c", 2, 3)
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}, ignore=["a.b"]) is None
    assert first_difference({"a": 1, "extra": 2}, {"a": 1}) == ("extra", 2, None)


def test_a_model_is_saved_as_the_same_bytes_every_time(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for file in files:
        save_model(file, ARRAYS, {"depth": 2, "kind": "fit"})
    assert len({file.read_bytes() for file in files}) == 1
    arrays, config = load_state(files[0])
    assert config == {"depth": 2, "kind": "fit"} and set(arrays) == set(ARRAYS)
