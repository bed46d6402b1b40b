"""Published numbers: reproduced by theory, not on the inputs that the text names; other layers."""

import math

import jax
import numpy as np
import pytest

from constructions.core.config import NormConfig
from constructions.gradient_descent.construction import GradientDescent
from constructions.gradient_descent.measurements import (
    FixedTasks,
    beside_one_step,
    measure_theory,
    one_layer,
)
from synthetic.tasks.regression import Uniform


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in measure_theory()}


@pytest.fixture(scope="module")
def quick_rows():
    return {row.name: row for row in measure_theory(quick=True)}


@pytest.fixture(scope="module")
def text_rows():
    return {row.name: row for row in measure_theory(quick=True, inputs=Uniform(-1, 1))}


@pytest.mark.slow
def test_every_row_is_reproduced(rows):
    verdicts = {name: row.verdict for name, row in rows.items() if row.published is not None}
    assert set(verdicts.values()) == {"reproduced"}, verdicts
    assert len(verdicts) == 3 + 3 * 4


@pytest.mark.slow
def test_errors_are_small_enough_to_decide(rows):
    for examples in (10, 25, 50, 100):
        row = rows[f"curvature, N = {examples}"]
        assert row.tolerance == 0.03
        assert 0 < row.error < 0.005 * row.measured
        largest = rows[f"largest eigenvalue, N = {examples}"]
        assert 0 < largest.error < 0.08 * largest.measured


@pytest.mark.slow
def test_extremes_are_those_of_sampled_gram_matrices(rows):
    x = np.random.default_rng(5).uniform(-0.5, 0.5, (10_000, 25, 10))
    values = np.linalg.eigvalsh(np.swapaxes(x, 1, 2) @ x)
    for name, extreme in [("smallest", values.min()), ("largest", values.max())]:
        row = rows[f"{name} eigenvalue, N = 25"]
        assert abs(extreme - row.measured) < 4 * row.error


def test_quick_rows_are_reproduced(quick_rows):
    verdicts = {name: row.verdict for name, row in quick_rows.items() if row.published is not None}
    assert set(verdicts.values()) == {"reproduced"}, verdicts
    assert len(verdicts) == 4
    assert quick_rows["loss of one step"].measured == pytest.approx(0.2062290, abs=5e-7)
    assert quick_rows["loss of two steps of GD++, N = 10"].measured == pytest.approx(
        0.1105, rel=0.01
    )


def test_inputs_of_the_text_are_not_those_of_the_figures(quick_rows, text_rows):
    assert quick_rows.keys() == text_rows.keys()
    for name, row in text_rows.items():
        assert row.verdict == ("differs" if row.published is not None else "holds")
        # x -> 2 x: losses grow by 4, curvatures shrink by 4
        factor = row.measured / quick_rows[name].measured
        assert factor == pytest.approx(1 / 4 if "curvature" in name else 4, rel=1e-3)


def test_another_seed_agrees_within_errors(quick_rows):
    for row in measure_theory(quick=True, seed=7):
        other = quick_rows[row.name]
        if row.name.startswith("loss of two"):
            assert abs(row.measured - other.measured) < 4 * math.hypot(row.error, other.error)


def test_the_default_float_is_left_alone():
    rows = measure_theory(quick=True)
    next(rows)
    assert not jax.config.jax_enable_x64


def test_fixed_tasks_are_the_same_few():
    task = GradientDescent(dim_x=2, num_examples=3).task
    fixed = FixedTasks(task, 4, seed=3)
    stored = np.asarray(task.sample(jax.random.key(3), 4).inputs[0])
    drawn = fixed.sample(jax.random.key(0), 64)
    x = np.asarray(drawn.inputs[0])
    which = (x[:, None] == stored[None]).all((2, 3))
    assert (which.sum(1) == 1).all() and which.any(0).all()
    again = fixed.sample(jax.random.key(1), 64)
    assert not np.array_equal(again.inputs[0], x)
    assert np.array_equal(fixed.loss(drawn.target, drawn), np.zeros(64))


@pytest.mark.parametrize(
    ("heads", "mixer", "norm"), [(2, "softmax", None), (1, "linear", NormConfig("layer"))]
)
def test_one_layer_starts_from_nothing(heads, mixer, norm):
    c, model = GradientDescent(), one_layer(heads, mixer, norm)
    (layer,) = model.config.layers()
    assert [(h.mixer, h.heads, h.key_dim, h.value_dim) for h in layer.heads] == [
        (mixer, heads, 11, 11)
    ]
    assert layer.norm == norm
    prediction = c.apply(model, *c.sample(jax.random.key(0), 2))
    assert np.array_equal(prediction, np.zeros((2, 1, 1)))


@pytest.mark.slow
def test_linear_heads_reach_the_step_and_softmax_does_not():
    task = GradientDescent().task
    linear = beside_one_step(one_layer(1, "linear"), task, 0, steps=1500)
    assert linear.excess.max() < 0.01 and linear.cosine.min() > 0.99
    softmax = beside_one_step(one_layer(1), task, 0, steps=1500)
    assert softmax.excess.min() > 0.2
