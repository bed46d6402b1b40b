"""Fits of one layer that are not the paper's main one."""

import jax
import numpy as np
import pytest

from constructions.core.config import NormConfig
from constructions.gradient_descent import GradientDescent
from constructions.gradient_descent.variants import FixedTasks, excess, one_layer


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
    assert excess(one_layer(1, "linear"), task, 0, steps=1500).max() < 0.01
    assert excess(one_layer(1), task, 0, steps=1500).min() > 0.2
