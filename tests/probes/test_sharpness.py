"""Sharpness against dense Hessians; edges of stability against closed forms and descents."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from constructions import CATALOGUE
from constructions.core.transformer import Transformer, randomise
from probes.descent import descend, normalised, root
from probes.sharpness import adam_scale, along, edge, sharpness, spherical_sharpness
from probes.subject import ParameterVector
from synthetic.tasks.regression import RegressionTask, Uniform

TASK = RegressionTask(5, 10, inputs=Uniform(-1, 1))


def divided(arrays: Any, by: float) -> Any:
    """Arrays of a model whose sums over the context are divided by a number."""
    return {
        name: divided(value, by) if isinstance(value, dict) else value / by
        if name == "scale"
        else value
        for name, value in arrays.items()
    }  # fmt: skip


def attention(layers: int, std: float, seed: int, by: float = 10.0) -> tuple[ParameterVector, Any]:
    """Random linear attention with sums over N=10 divided by `by`, and 256 tasks."""
    construction = CATALOGUE["gradient-descent"](
        dim_x=5, num_examples=10, steps=layers, step_size=1.0
    )
    like = construction.counterpart().init(jax.random.key(0))
    model = randomise(like, jax.random.key(seed + 1), std)
    model = Transformer(model.config, divided(model.arrays(), by))
    return ParameterVector(construction, model), TASK.sample(jax.random.key(seed), 256)


def squared(flat: ParameterVector, theta: Any, batch: Any) -> Array:
    """Mean of |prediction - target|^2, without the half."""
    return 2 * flat.loss(theta, batch)


def bowl(theta: Any, data: Any) -> Array:
    return 0.5 * (data * theta**2).sum()


def product(theta: Any, data: Any) -> Array:
    """(uv - 1)^2 / 2: at its minima the sharpness is u^2 + v^2, least at u = v."""
    del data
    return 0.5 * (theta[0] * theta[1] - 1) ** 2


def test_sharpness_is_that_of_the_dense_hessian(x64: None) -> None:
    flat, batch = attention(1, 0.3, 0)
    dense = np.asarray(jax.jit(jax.hessian(flat.loss))(flat.theta, batch))
    largest = np.linalg.eigvalsh(dense)[-1]
    assert sharpness(flat.loss, flat.theta, batch) == pytest.approx(largest, rel=1e-6)
    scale = np.linspace(0.1, 3, len(dense))
    weighed = np.linalg.eigvalsh(dense / np.sqrt(np.outer(scale, scale)))[-1]
    found = sharpness(flat.loss, flat.theta, batch, jnp.asarray(scale))
    assert found == pytest.approx(weighed, rel=1e-6)
    assert abs(weighed / largest - 1) > 0.1


def test_small_and_odd_hessians() -> None:
    assert sharpness(bowl, jnp.ones(1), jnp.array([3.0])) == pytest.approx(3.0)
    assert sharpness(bowl, jnp.ones(2), jnp.array([3.0, -9.0])) == pytest.approx(3.0, rel=1e-4)
    assert sharpness(bowl, jnp.ones(4), jnp.zeros(4)) == 0.0
    with pytest.raises(ValueError, match="the Hessian is not finite"):
        sharpness(bowl, jnp.ones(2), jnp.array([3.0, np.nan]))


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_edges_of_a_quadratic(b1: float) -> None:
    # just below its edge a descent converges, just above it diverges; momentum as Adam has it
    rate = 0.01
    rule = optax.chain(optax.ema(b1, debias=False), optax.scale(-rate))
    for factor, converges in ((0.99, True), (1.01, False)):
        curvature = jnp.array([factor * edge(rate, b1), 1.0])
        path = descend(bowl, jnp.array([1e-3, 0.0]), curvature, rule, 3000)
        assert (abs(float(path.thetas[-1, 0])) < 1e-3) == converges, factor
    assert edge(rate) == pytest.approx(200) and edge(rate, 0.9) == pytest.approx(3800)


def test_scale_of_adam() -> None:
    rule = optax.adam(1e-3, b2=0.99, eps=1e-3)
    path = descend(bowl, jnp.array([1.0, 2.0]), jnp.array([3.0, 0.5]), rule, 1)
    state = jax.tree.map(lambda a: a[-1], path.states)
    # after one step v / (1 - b2) is the squared gradient
    np.testing.assert_allclose(adam_scale(state, 0.99, 1e-3), [3.001, 1.001], rtol=1e-4)


def test_gradient_descent_settles_at_its_edge(x64: None) -> None:
    flat, batch = attention(1, 0.2, 14)
    loss = partial(squared, flat)
    ends = {}
    for rate in (0.03, 0.1):
        path = descend(loss, flat.theta, batch, rate, 2000, 400)
        ends[rate] = path, along(loss, path, batch)[-1] / edge(rate)
    assert ends[0.03][1] < 0.8
    assert abs(ends[0.1][1] - 1) < 0.15
    last = np.asarray(ends[0.1][0].losses[-100:])
    assert np.ptp(last) < 1e-6  # not a matter of oscillation: it stands there
    # too large a step goes back and forth between two places; taken at once, it depends on the
    # rounding whether it diverges
    there = ends[0.1][0].thetas[-1]
    for rate in (0.15, 0.2, 0.25, 0.3):
        path = descend(loss, there, batch, rate, 2000, 400)
        there = path.thetas[-1]
    two = np.asarray(descend(loss, there, batch, 0.3, 2, 1).thetas)
    there_and_back = [np.linalg.norm(two[n] - two[0]) for n in (1, 2)]
    assert there_and_back[0] > 1e-3 and there_and_back[1] < 0.1 * there_and_back[0]
    around = np.asarray(path.losses[1000:])
    assert np.mean(np.diff(around) > 0) == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_two_layers_live_at_the_edge(x64: None) -> None:
    flat, batch = attention(2, 0.1, 2)
    loss = partial(squared, flat)
    path = descend(loss, flat.theta, batch, 0.1, 4000, 200)
    found = along(loss, path, batch)[10:] / edge(0.1)
    losses = np.asarray(path.losses)
    assert 0.8 < np.median(found) < 1.4
    assert 0.3 < np.mean(np.diff(losses[2000:]) > 0) < 0.6  # every other step goes up
    assert losses[-100:].mean() < 0.5 * losses[1600:1700].mean()  # and still it learns


def test_sums_that_are_not_divided() -> None:
    # the trap: with sums over the context as they are, two layers are far too sharp to train
    flat, batch = attention(2, 0.3, 0)
    raw, _ = attention(2, 0.3, 0, by=1.0)
    gentle, steep = (sharpness(f.loss, f.theta, batch) for f in (flat, raw))
    assert gentle < edge(0.1) and steep > 1e3 * edge(0.1)
    after = [descend(f.loss, f.theta, batch, 0.1, 50).losses[-1] for f in (flat, raw)]
    assert np.isfinite(after[0]) and not np.isfinite(after[1])


def test_normalised_descent_looks_for_flat_minima(x64: None) -> None:
    start = jnp.array([4.0, 0.3])
    loss, rate = product, 0.1
    plain = descend(loss, start, None, 0.01, 20_000)
    ends = {"gradient descent": plain.thetas[-1]}
    ends["normalised"] = descend(loss, start, None, normalised(rate), 20_000).thetas[-1]
    ends["root"] = descend(root(loss), start, None, rate, 20_000).thetas[-1]
    found = {name: abs(float(theta[0] ** 2 - theta[1] ** 2)) for name, theta in ends.items()}
    assert found["gradient descent"] == pytest.approx(15.9, rel=0.05)  # its flow keeps that
    assert found["normalised"] < 0.3 and found["root"] < 0.3
    np.testing.assert_allclose(
        jnp.linalg.norm(jnp.diff(descend(loss, start, None, normalised(rate), 3, 1).thetas, axis=0),
                        axis=1), rate, rtol=1e-6)  # fmt: skip
    still = descend(bowl, jnp.zeros(2), jnp.ones(2), normalised(rate), 3).thetas[-1]
    assert not bool(still.any())


def scale_free(theta: Any, data: Any) -> Array:
    """A quadratic in theta / |theta|."""
    unit = theta / jnp.linalg.norm(theta)
    return 0.5 * (data * unit**2).sum()


def test_sharpness_on_the_sphere(x64: None) -> None:
    theta, data = jnp.array([0.3, 2.0, -1.0]), jnp.array([3.0, 1.0, 0.5])
    here = sharpness(scale_free, theta, data)
    on_sphere = spherical_sharpness(scale_free, theta, data)
    assert on_sphere == pytest.approx(float(theta @ theta) * here, rel=1e-6)
    with pytest.raises(ValueError, match="at theta and .* at 2 theta, must be equal"):
        spherical_sharpness(bowl, theta, data)


def test_weight_decay_brings_the_sphere_to_its_edge(x64: None) -> None:
    # at the minimum, theta along the last axis, the sphere's sharpness is 3 - 0.5; decay shrinks
    # theta until |theta|^2 is rate / 2 times that, and no further
    rate, decay, data = 0.5, 0.01, jnp.array([3.0, 1.0, 0.5])
    rule = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    path = descend(scale_free, jnp.array([0.3, 0.5, 2.0]), data, rule, 4000, 1)
    sizes = np.asarray(jnp.sum(path.thetas**2, axis=1))
    assert sizes[0] > 4 and sizes[-2000:].min() > 0.2 * rate * 2.5 / 2
    ratio = 2 * sizes[-2000:] / (rate * 2.5)
    assert 0.7 < np.median(ratio) < 1.6
    free = descend(scale_free, jnp.array([0.3, 0.5, 2.0]), data, rate, 4000).thetas[-1]
    assert 2 * float(free @ free) / (rate * 2.5) > 5  # without decay it never comes there
