"""The same fit on one device, on four, and in two processes; meshes and start-up."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from synthetic.fitting import devices
from synthetic.fitting.run_directory import RunDirectory
from synthetic.fitting.train import Recipe, fit
from synthetic.tasks.task import Batch

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(steps=60, batch=24, learning_rate=0.01, chunk=20, checkpoint_every=20, ema=0.8)
# What a subprocess runs: `python -c` with this and a line that calls a function of this file.
PRELUDE = 'import sys\nsys.path.insert(0, "tests/synthetic")\nimport test_devices as t\n'


class Cubic:
    """y = x^3 + noise, in two dimensions."""

    def sample(self, key: Any, batch: int) -> Batch:
        x, noise = jax.random.normal(key, (2, batch, 2))
        return Batch((x,), x**3 + 0.1 * noise)

    def loss(self, prediction: Any, batch: Batch) -> Any:
        return ((prediction - batch.target) ** 2).mean(-1)


def mlp(key: Any) -> nnx.Module:
    rngs = nnx.Rngs(key)
    return nnx.Sequential(nnx.Linear(2, 16, rngs=rngs), jnp.tanh, nnx.Linear(16, 2, rngs=rngs))


def trained(mesh: Any = None, seeds: list[int] | None = None, **rest: Any) -> dict[str, Any]:
    result = fit(mlp, Cubic(), RECIPE, mesh=mesh, seeds=seeds, **rest)
    arrays = [jax.tree.leaves(nnx.state(model)) for model in result.models]
    return {
        "history": result.history,
        "weights": [np.asarray(leaf).ravel().tolist() for model in arrays for leaf in model],
    }


def equal(a: Any, b: Any) -> None:
    """Losses to 1e-6, weights to rounding."""
    assert len(a["history"]) == len(b["history"]) == 3
    for x, y in zip(a["history"], b["history"], strict=True):
        assert x["step"] == y["step"]
        np.testing.assert_allclose(x["loss"], y["loss"], rtol=1e-6)
    for x, y in zip(a["weights"], b["weights"], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def python(line: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + line, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> Any:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def on_four_devices(run: str) -> None:
    one = jax.devices()[0]
    mesh = devices.mesh()
    assert dict(mesh.shape) == {"seed": 1, "data": 4}
    assert dict(devices.mesh(seeds=6).shape) == {"seed": 2, "data": 2}
    assert dict(devices.mesh(seeds=3).shape) == {"seed": 1, "data": 4}
    seen: list[Any] = []

    class Watched(Cubic):
        def loss(self, prediction: Any, batch: Batch) -> Any:
            jax.debug.inspect_array_sharding(batch.target, callback=seen.append)
            return super().loss(prediction, batch)

    fit(mlp, Watched(), RECIPE, mesh=mesh)
    for arguments, message in (
        ({"batch": 6, "mesh": mesh}, "batch=6: must be a multiple of the 4 devices"),
        ({"seeds": [1], "mesh": devices.mesh(seeds=2)}, "number of seeds=1: must be a multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(mlp, Cubic(), RECIPE, **arguments)
    results = {
        "split": trained(mesh),
        "again": trained(mesh),
        "seeds": trained(devices.mesh(seeds=2), [5, 6]),
        "alone": trained(devices.mesh(devices=[one])),
        "resumed": trained(mesh, out=run, resume=True),
        "shards": [list(sharding.shard_shape((24, 2))) for sharding in seen],
    }
    print(json.dumps(results))


def test_four_devices_equal_one(tmp_path: Path) -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    fit(mlp, Cubic(), RECIPE, steps=40, out=tmp_path)  # to be resumed on another number of them
    process = python("t.on_four_devices(sys.argv[1])", str(tmp_path), XLA_FLAGS=flags)
    plain, several = trained(), trained(seeds=[5, 6])
    found = answer(process)
    equal(found["split"], plain)
    equal(found["seeds"], several)
    equal(found["alone"], plain)
    equal(found["resumed"], plain)
    assert found["split"] == found["again"]
    # Each device makes and uses a quarter of the batch.
    assert found["shards"] and all(shape == [6, 2] for shape in found["shards"])


def in_two_processes(out: str, again: str) -> None:
    assert devices.start()  # from the environment
    mesh = devices.mesh()
    assert dict(mesh.shape) == {"seed": 1, "data": 2} and len(jax.local_devices()) == 1
    results: dict[str, Any] = {"seeds": trained(devices.mesh(seeds=2), [5, 6])}
    # Process 1 is given a path of its own: nothing may appear there.
    own = out if jax.process_index() == 0 else out + "-other"
    fit(mlp, Cubic(), RECIPE, steps=40, mesh=mesh, out=own)
    results["data"] = trained(mesh, out=own, resume=True)
    assert not Path(out + "-other").exists()
    try:
        devices.on_first_process(lambda: Path(again).read_bytes())
    except (OSError, RuntimeError) as error:
        results["error"] = str(error)
    print(json.dumps(results))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [
        python(
            "t.in_two_processes(*sys.argv[1:])",
            str(tmp_path / "run"),
            str(tmp_path / "absent"),
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in (0, 1)
    ]
    plain, several = trained(), trained(seeds=[5, 6])
    found = [answer(process) for process in pair]
    for result in found:
        equal(result["data"], plain)
        equal(result["seeds"], several)
        assert "absent" in result["error"]
    assert [found[0][name] for name in ("data", "seeds")] == [
        found[1][name] for name in ("data", "seeds")
    ]
    assert RunDirectory(tmp_path / "run").records() == found[0]["data"]["history"]


def test_mesh_of_one_device_changes_nothing() -> None:
    assert trained(devices.mesh(devices=jax.devices()[:1])) == trained()


def test_bad_meshes() -> None:
    with pytest.raises(ValueError, match="seeds=0"):
        devices.mesh(seeds=0)
    with pytest.raises(ValueError, match="devices="):
        devices.mesh(devices=[])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 2}, "give both or neither"),
        ({"num_processes": 2, "process_id": 2, "coordinator": "h:1"}, r"must be in 0\.\.1"),
        ({"num_processes": 0, "process_id": 0}, "num_processes=0"),
        ({"num_processes": 2, "process_id": 0}, "needs host:port"),
        ({"coordinator": "localhost"}, "must be host:port"),
        ({"coordinator": "localhost:65536"}, "must be host:port, with a port up to 65535"),
    ],
)
def test_bad_starts(arguments: dict[str, Any], message: str, monkeypatch: Any) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=message):
        devices.start(**arguments)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} cannot be opened: "):
            devices.start(f"127.0.0.1:{port}", 1, 0)
    assert not devices.start()
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='one'"):
        devices.start()
