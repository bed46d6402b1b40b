"""Averages of iterates of SGD on a quadratic, against the closed form and simulation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.compile import compile_program
from constructions.core.symmetry import change_key_basis, change_value_basis
from constructions.gradient_descent.construction import GradientDescent
from constructions.runs import fit_family, load_run
from probes.merging import AVERAGING, average, exponential, latest, measured_factor
from probes.subject import ParameterVector
from synthetic.fitting.recipe import Recipe


def iterates(contraction: float, count: int) -> np.ndarray:
    """Distances from the minimum along many directions, `[step, direction]`, once at rest."""
    rng, theta, found = np.random.default_rng(0), np.zeros(20_000), []
    theta = rng.normal(size=theta.shape) / np.sqrt(1 - contraction**2)
    for _ in range(count):
        found.append(theta)
        theta = contraction * theta + rng.normal(size=theta.shape)
    return np.stack(found)


@pytest.mark.parametrize("contraction", [0.9, 0.5, -0.4])
@pytest.mark.parametrize("lag", [1, 4, 30])
def test_two_iterates(contraction: float, lag: int) -> None:
    wanted = (1 + contraction**lag) / 2
    found = iterates(contraction, lag + 1)[[0, lag]]
    losses = np.square(found).mean(1)
    measured = measured_factor(float(np.square(found.mean(0)).mean()), losses.tolist())
    assert measured == pytest.approx(wanted, abs=0.02)


def test_several_iterates() -> None:
    trail = iterates(0.8, 12)
    for weights in (latest(12, 5), exponential(12, 0.7)):
        mean = np.asarray(average(jnp.asarray(trail), weights))
        factor = np.square(mean).mean() / np.square(trail).mean()
        # iterates that far apart correlate at 0.8 to that power
        lags = np.abs(np.subtract.outer(range(12), range(12)))
        assert factor == pytest.approx(weights @ 0.8**lags @ weights, abs=0.02)


def test_averages_of_strangers_lose() -> None:
    """The negative: around two minima the middle is worse than either. One point gains nothing."""
    trail = iterates(0.5, 2) + np.asarray([[9.0], [-9.0]])

    def loss(theta: np.ndarray) -> float:
        return float(np.minimum(np.square(theta - 9), np.square(theta + 9)).mean())

    members = [loss(theta) for theta in trail]
    assert measured_factor(loss(trail.mean(0)), members) > 10
    assert measured_factor(members[0], [members[0]] * 2) == 1
    assert np.isnan(measured_factor(0.0, [0.0, 0.0]))


def test_weights() -> None:
    assert np.allclose(latest(5, 2), [0, 0, 0, 0.5, 0.5])
    # the recipe's running average, written out
    recipe, running = Recipe(steps=6, ema=0.7), 0.0
    values = np.random.default_rng(0).normal(size=6)
    for step, value in enumerate(values):
        running += float(recipe.average_weight(jnp.asarray(step))) * (value - running)
    assert exponential(6, 0.7) @ values == pytest.approx(running, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latest(3, 4), "window is 4, must be from 1 to 3"),
        (lambda: latest(3, 0), "window is 0"),
        (lambda: exponential(3, 1.0), "decay is 1.0"),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_another_basis_is_another_place() -> None:
    """The average of a model with itself is itself only where both are in one basis."""
    construction = GradientDescent(dim_x=2, num_examples=4)
    shape = construction.trained_shape
    model = compile_program(construction.program, config=shape)
    first, second = jax.random.split(jax.random.key(3))
    turned = change_value_basis(change_key_basis(model, first), second)
    flat = ParameterVector(construction, model)
    batch = construction.task.sample(jax.random.key(1), 512)
    thetas, loss = jnp.stack([flat.theta, flat.vector(turned)]), jax.jit(flat.loss)
    alone, copy = (float(loss(theta, batch)) for theta in thetas)
    assert copy == pytest.approx(alone, rel=1e-4)
    assert float(loss(average(thetas, latest(2, 2)), batch)) > 1.02 * alone


def test_tool(tmp_path: Any) -> None:
    settings = {"dim_x": 2, "num_examples": 4}
    fitted = {"steps": 60, "batch": 32, "chunk": 20, "checkpoint_every": 20, "average_tail": None}
    path = tmp_path / "run"
    fit_family("gradient-descent", settings, path, seeds=[0, 1], **fitted)
    found = AVERAGING(load_run(path), 0)
    assert found.rows == ["seed 0", "seed 1", "control: seeds"]
    values = np.array(found.values, float)
    assert (values[:, :3] > 0).all() and (values[:, 4] > 0).all()
    assert np.allclose(values[:, 3], values[:, 1] - values[:, 0], atol=1e-5)
    assert "steps 20, 40, 60" in found.note and "already" not in found.note
    short = tmp_path / "short"
    fit_family("gradient-descent", settings, short, steps=3, batch=8)
    with pytest.raises(ValueError, match="the run has 1 checkpoints, averaging needs two"):
        AVERAGING(load_run(short), 0)
