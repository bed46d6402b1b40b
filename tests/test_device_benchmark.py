"""The script for accelerators runs, at small sizes, and says what it had no time for."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(name="device")
def _device(monkeypatch: Any) -> Any:
    # the scripts that it uses add flags, which are not for the tests after this one
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("device")


def test_every_part_at_small_sizes(device: Any) -> None:
    kept: list[Any] = []
    figures = device.measure(True, 10, lambda found: kept.append(json.loads(json.dumps(found))))
    assert list(figures) == ["machine", "toy sizes", *device.PARTS]
    assert [len(found) for found in kept] == list(range(3, 3 + len(device.PARTS)))
    assert {"device", "jax", "jaxlib", "flax"} <= set(figures["machine"])
    assert all(figures[part]["seconds for this part"] > 0 for part in device.PARTS)
    (fit,) = (v for k, v in figures["fits"].items() if k.startswith("batch"))
    assert 0 < fit["share of the memory bound"] < 1 and fit["steps a second"] > 0
    (layer,) = (v for k, v in figures["mesa layer, 4 heads of 32, batch 4"].items() if "time" in k)
    assert layer["mesa"]["times mesa"]["median"] == 1 and layer["softmax"]["ms"] > 0
    errors = figures["certificates"]["gradient-descent"]
    assert {e["verdict"] for e in errors.values()} == {"passed"}


def test_what_there_is_no_time_for(device: Any) -> None:
    figures = device.measure(True, -1, lambda _: None)
    assert {figures[part] for part in device.PARTS} == {"not measured: -1 minutes had passed"}
