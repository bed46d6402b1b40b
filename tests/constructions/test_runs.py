"""Runs of a family: what is read back is what was fitted, and nothing else is accepted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from constructions.runs import (
    Run,
    construct,
    fit_family,
    initial_models,
    load_checkpoints,
    load_run,
)
from synthetic.fitting.train import NonFiniteLossError
from synthetic.fitting.weights_file import RunError, load_state, save_model

SMALL = {"dim_x": 3, "num_examples": 5, "step_size": 2.0}
RECIPE: dict[str, Any] = {"steps": 20, "chunk": 10, "batch": 16, "checkpoint_every": 10}
NAME = "gradient-descent"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    path = tmp_path_factory.mktemp("runs") / "run"
    return fit_family(NAME, SMALL, path, seeds=[3, 4], **RECIPE), path


@pytest.fixture
def copy(fitted: tuple[Run, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted[1], tmp_path / "copy"))


def bits(model: nnx.Module) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model))]


def test_loads_what_was_fitted(fitted: tuple[Run, Path]) -> None:
    run, path = fitted
    loaded = load_run(path)
    assert loaded.construction == run.construction == construct(NAME, SMALL)
    assert loaded.seeds == run.seeds == (3, 4)
    assert loaded.recipe == run.recipe
    assert loaded.history == run.history
    assert [bits(m) for m in loaded.models] == [bits(m) for m in run.models]
    assert bits(loaded.models[0]) != bits(loaded.models[1])
    inputs = run.construction.sample(jax.random.key(0), 4)
    for a, b in zip(run.models, loaded.models, strict=True):
        np.testing.assert_array_equal(
            run.construction.apply(a, *inputs), run.construction.apply(b, *inputs)
        )


def test_float32_run_loads_in_a_float64_process(fitted: tuple[Run, Path], x64: None) -> None:
    assert [bits(m) for m in load_run(fitted[1]).models] == [bits(m) for m in fitted[0].models]


def test_checkpoints_lead_to_the_model(fitted: tuple[Run, Path]) -> None:
    run, path = fitted
    found = load_checkpoints(path)
    assert [step for step, _ in found] == [10, 20]
    assert [bits(m) for m in found[-1][1]] == [bits(m) for m in run.models]
    assert bits(found[0][1][0]) != bits(run.models[0])


def test_resume_needs_no_options_and_accepts_the_same(copy: Path, fitted: tuple[Run, Path]) -> None:
    for options in ({}, {"seeds": [3, 4], **RECIPE}):
        again = fit_family(NAME, SMALL if options else None, copy, resume=True, **options)
        assert [bits(m) for m in again.models] == [bits(m) for m in fitted[0].models]
    with pytest.raises(RunError, match="settings.dim_x"):
        fit_family(NAME, {"dim_x": 4}, copy, resume=True)
    with pytest.raises(RunError, match="exists"):
        fit_family(NAME, SMALL, copy, **RECIPE)


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_model(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "model.safetensors"
    arrays, config = load_state(file)
    change(arrays)
    save_model(file, arrays, config, overwrite=True)


def first(arrays: dict[str, Any]) -> str:
    return next(name for name in arrays if name.endswith("query"))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: (p / "config.json").unlink(), "config.json: missing"),
    (lambda p: cut(p / "config.json", 40), "config.json: truncated"),
    (lambda p: edit_config(p, format="other"), "config.json: format"),
    (lambda p: edit_config(p, version=99), "config.json: version: 99"),
    (lambda p: edit_config(p, kind="other"), "config.json: kind"),
    (lambda p: edit_config(p, family=None), "config.json: family: missing"),
    (lambda p: edit_config(p, family="nope"), "config.json: family: 'nope'"),
    (lambda p: edit_config(p, settings=[1]), "config.json: settings"),
    (lambda p: edit_config(p, settings={"dim_x": -1}), "config.json: settings: dim_x is -1"),
    (lambda p: edit_config(p, settings={"dim": 1}), "config.json: settings: unknown setting 'dim'"),
    (lambda p: edit_config(p, dtype="int8"), "config.json: dtype"),
    (lambda p: edit_config(p, seeds="x"), "config.json: seed"),
    (lambda p: edit_config(p, recipe={"steps": 0}), "config.json: recipe: steps=0"),
    (lambda p: edit_config(p, settings={**SMALL, "dim_x": 4}), "model.safetensors: .* shape"),
    (
        lambda p: (p / "model.safetensors").unlink(),
        "model.safetensors: missing.* `orrery fit .* --resume` ends it",
    ),
    (lambda p: cut(p / "model.safetensors", 300), "model.safetensors: truncated"),
    (lambda p: (p / "model.safetensors").write_bytes(b"PK" * 99), "model.safetensors: truncated"),
    (lambda p: edit_model(p, lambda a: a.pop(first(a))), "model.safetensors: .*query: missing"),
    (
        lambda p: edit_model(p, lambda a: a.update(extra=np.zeros(2, np.float32))),
        "model.safetensors: extra: not in the model",
    ),
    (
        lambda p: edit_model(p, lambda a: a.update({first(a): a[first(a)].astype(np.float64)})),
        "model.safetensors: .*query: dtype float64",
    ),
    (
        lambda p: edit_model(p, lambda a: a.update({first(a): a[first(a)] * np.float32(np.nan)})),
        "model.safetensors: .*query: .* numbers are NaN",
    ),
    (
        lambda p: edit_model(p, lambda a: a.update({first(a): a[first(a)][:1]})),
        "model.safetensors: .*query: shape",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[m for _, m in DAMAGE])
def test_damage_is_one_line_with_file_and_field(
    copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy)
    with pytest.raises(RunError, match=message) as caught:
        load_run(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="unknown family 'nope', must be one of .*gradient"):
        construct("nope")
    with pytest.raises(ValueError, match="unknown setting 'width'.*dim_x"):
        construct(NAME, {"width": 3})
    with pytest.raises(ValueError, match="step_size"):
        construct(NAME, {"step_size": "large"})
    with pytest.raises(ValueError, match="give one of them"):
        fit_family(NAME, SMALL, seed=0, seeds=[1])


def test_divergence_says_the_step() -> None:
    with pytest.raises(NonFiniteLossError, match="step") as caught:
        fit_family(NAME, SMALL, **(RECIPE | {"optimizer": "sgd", "learning_rate": 1e20}))
    assert 0 < caught.value.step < 20


@pytest.mark.parametrize("seeds", [{"seed": 3}, {"seeds": [3, 5]}])
def test_initial_models_are_what_the_fit_began_with(seeds: Any) -> None:
    """A fit whose steps are lost in rounding ends where it began."""
    still = RECIPE | {"optimizer": "sgd", "learning_rate": 1e-30, "schedule": "constant"}
    run = fit_family(NAME, SMALL, **seeds, **still)
    before = [bits(model) for model in initial_models(run)]
    assert before == [bits(model) for model in run.models]
    assert before[0] != before[-1] or len(before) == 1
