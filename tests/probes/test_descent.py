"""The probes about training, on small runs: what they say of a construction and of a start."""

from pathlib import Path

import numpy as np
import pytest

from constructions.runs import Run, fit_family, load_run
from probes.descent import DISTILLATION, ZEROTH_ORDER
from probes.kernels import KERNEL
from probes.probe import Result
from probes.sharpness import SHARPNESS

SMALL = {"dim_x": 3, "num_examples": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path: Path = tmp_path_factory.mktemp("runs") / "run"
    fit_family("gradient-descent", SMALL, path, steps=400, batch=128)
    return load_run(path)


def rows(result: Result) -> dict[str, dict[str, float]]:
    return {
        row: {c: np.nan if v is None else v for c, v in zip(result.columns, values, strict=True)}
        for row, values in zip(result.rows, result.values, strict=True)
    }


def test_kernel(run: Run) -> None:
    found = rows(KERNEL(run, 0))
    assert list(found) == ["construction", "seed 0", "seed 0, its start"]
    for row in found.values():
        assert row["its order"] == pytest.approx(1, abs=0.1)
    # not kernel-like where there is something left to learn, and little moves where there is not
    start, end = found["seed 0, its start"], found["construction"]
    assert not start["kernel change, 10 steps"] < 0.5 and end["kernel change, 10 steps"] < 0.5


def test_sharpness(run: Run) -> None:
    found = rows(SHARPNESS(run, 0))
    for row in found.values():
        assert row["largest stable step"] == pytest.approx(2 / row["sharpness"], rel=1e-5)
    assert found["construction"]["sharpness"] > 3 * found["seed 0, its start"]["sharpness"]


def test_zeroth_order(run: Run) -> None:
    found = rows(ZEROTH_ORDER(run, 0))
    built, start = found["construction"], found["seed 0, its start"]
    after = next(name for name in built if name.startswith("after "))
    assert built[after] > 0.9 * built["loss"]  # nothing to be found there
    assert start[after] < start["loss"] and start["directions up both ways"] < 0.5
    assert start["trace of the Hessian"] < 0.2 * built["trace of the Hessian"]


def test_distillation(run: Run) -> None:
    (found,) = rows(DISTILLATION(run, 0)).values()
    assert found["gradient's variance, of the task's own"] < 0.8
    assert found["bias over its error"] < 3
    # 300 steps do not decide which is lower; below the teacher neither can be
    assert (
        min(found["loss, taught 50 %"], found["loss, taught 0 %"]) > 0.95 * found["teacher's loss"]
    )


def test_logits_are_taught_as_probabilities() -> None:
    """The teacher is the exact posterior: it takes noise away and adds no bias."""
    sizes = {"dim": 2, "classes": 2, "shots": 2, "queries": 2}
    run = fit_family("hyper-prototypes", sizes, steps=100, batch=64)
    (found,) = rows(DISTILLATION(run, 0)).values()
    assert found["gradient's variance, of the task's own"] < 0.8
    assert found["bias over its error"] < 3
