"""Kernels of training: against products of gradients by hand, and where they hold."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from constructions import CATALOGUE
from constructions.core.compile import compile_program
from constructions.core.transformer import randomise
from probes import kernels
from probes.descent import descend, gradient_moments
from probes.subject import ParameterVector
from synthetic.tasks.regression import RegressionTask, Uniform
from synthetic.theory.one_layer import optimal_step_size

TASK = RegressionTask(5, 10, inputs=Uniform(-1, 1))
DESCENT = CATALOGUE["gradient-descent"](dim_x=5, num_examples=10, step_size=optimal_step_size(TASK))


def built(start: str = "construction") -> ParameterVector:
    """One layer with heads as wide as its tokens: 144 weights; made once in each precision."""
    return _built(start, jnp.zeros(()).dtype)


@lru_cache
def _built(start: str, dtype: Any) -> ParameterVector:
    del dtype
    wide = DESCENT.counterpart().init(jax.random.key(0)).config
    model = compile_program(DESCENT.program, config=wide)
    return ParameterVector(
        DESCENT, model if start == "construction" else randomise(model, _KEY, 0.2)
    )


_KEY = jax.random.key(1)


@lru_cache
def predictor(flat: ParameterVector) -> Any:
    """The model's outputs of weights and data, compiled once for all tests."""
    return jax.jit(lambda theta, batch: flat.predict(theta, *batch.inputs))


class Features:
    """A model that is linear in its weights, of features that are not linear in x."""

    def predict(self, theta: Any, batch: Any) -> Array:
        return jnp.tanh(batch[0] @ jnp.ones((3, 8)).cumsum(1)) @ theta

    def loss(self, found: Any, batch: Any) -> Array:
        return 0.5 * ((found - batch[1]) ** 2).mean()


class Wide:
    """Two layers, tanh; the second of its weights moves little where it is wide."""

    def __init__(self, width: int) -> None:
        self.width = width

    def predict(self, theta: Any, batch: Any) -> Array:
        first, second = jnp.split(theta, [3 * self.width])
        hidden = jnp.tanh(batch[0] @ first.reshape(3, self.width))
        return hidden @ second / self.width**0.5

    def loss(self, found: Any, batch: Any) -> Array:
        return 0.5 * ((found - batch[1]) ** 2).mean()


def toy(seed: int = 0) -> tuple[Array, Array]:
    x = jax.random.normal(jax.random.key(seed), (20, 3))
    return x, jnp.sin(x[:, 0])


def change(model: Any, theta: Array, batch: Any, rate: float, steps: int) -> float:
    def whole(theta: Any, batch: Any) -> Array:
        return model.loss(model.predict(theta, batch), batch)

    ends = descend(whole, theta, batch, rate, steps).thetas
    grams = [kernels.gradient_kernel(j, j) for j in (
        kernels.jacobian(model.predict, t, batch) for t in ends)]  # fmt: skip
    return float(kernels.kernel_change(*grams))


def test_kernels_are_products_of_gradients(x64: None) -> None:
    flat = built("random")
    batch = TASK.sample(jax.random.key(2), 6)
    one_gradient = jax.jit(jax.grad(lambda t, b: predict(t, b)[0, 0, 0]))

    predict = predictor(flat)

    rows = []
    for n in range(6):  # one gradient at a time
        one = jax.tree.map(lambda a, n=n: a[n : n + 1], batch)
        rows.append(np.asarray(one_gradient(flat.theta, one)))
    jac = kernels.jacobian(predict, flat.theta, batch)
    np.testing.assert_allclose(jac, rows, rtol=1e-12, atol=1e-14)
    for kernel, left, right in (
        (kernels.gradient_kernel, lambda g: g, lambda g: g),
        (kernels.asymmetric_sign_kernel, lambda g: g, np.sign),
        (kernels.sign_kernel, np.sign, np.sign),
    ):
        wanted = [[sum(left(a) * right(b)) for b in rows[2:]] for a in rows]
        np.testing.assert_allclose(kernel(jac, jac[2:]), wanted, rtol=1e-10, atol=1e-12)
    # more outputs than weights: the other mode, the same numbers
    narrow = kernels.jacobian(lambda t, b: jnp.outer(b, t[:2]) ** 2, jnp.arange(2.0), jnp.ones(3))
    assert narrow.shape == (6, 2)


@pytest.mark.parametrize(("rule", "scale"), [("gradient", 1.0), ("sign", 0.1)])
def test_one_step_error_is_of_first_order(rule: Any, scale: float, x64: None) -> None:
    flat, rates = built(), [0.1, 0.01, 0.001]
    batch = TASK.sample(jax.random.key(0), 64)

    predict = predictor(flat)

    def loss(found: Any, batch: Any) -> Array:
        return TASK.loss(found, batch).mean()

    def error(rate: float, f: Any = predict) -> float:
        return kernels.one_step_error(f, loss, flat.theta, batch, rate * scale, rule)

    errors = [error(rate) for rate in rates]
    slopes = -np.diff(np.log10(errors))
    assert np.abs(slopes - 1).max() < 0.05 and errors[0] < 0.2
    # the same through the kernel, in output space
    jac = kernels.jacobian(predict, flat.theta, batch)
    pull = jax.grad(loss)(predict(flat.theta, batch), batch).ravel()
    step = kernels.predicted_step(jac, pull, 0.01 * scale, rule)
    if rule == "gradient":
        by_kernel = -0.01 * kernels.gradient_kernel(jac, jac) @ pull
        np.testing.assert_allclose(step, by_kernel, rtol=1e-9, atol=1e-15)
    gradient = pull @ jac
    moved = flat.theta - 0.01 * scale * (gradient if rule == "gradient" else jnp.sign(gradient))
    actual = (predict(moved, batch) - predict(flat.theta, batch)).ravel()
    found = jnp.linalg.norm(step - actual) / jnp.linalg.norm(actual)
    assert float(found) == pytest.approx(errors[1], rel=1e-6)
    # near-miss: a kernel of other weights has an error that does not vanish
    other = kernels.jacobian(predict, flat.theta + 0.1, batch)
    off = kernels.predicted_step(other, pull, 1e-3 * scale, rule)
    near = kernels.predicted_step(jac, pull, 1e-3 * scale, rule)
    assert float(jnp.linalg.norm(off - near) / jnp.linalg.norm(near)) > 0.05


def test_one_example_is_the_sign_kernel(x64: None) -> None:
    # a step along the signs at one example changes the others by K_A sign(dL/df)
    flat = built("random")
    batch = TASK.sample(jax.random.key(3), 6)

    predict = predictor(flat)

    jac = kernels.jacobian(predict, flat.theta, batch)
    pull = jnp.zeros(6).at[2].set(-0.7)
    found = kernels.predicted_step(jac, pull, 0.01, "sign")
    wanted = 0.01 * kernels.asymmetric_sign_kernel(jac, jac[2:3])[:, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_what_is_linear_in_its_weights_is_kernel_like(x64: None) -> None:
    model, theta, batch = Features(), jnp.linspace(-1, 1, 8), toy()
    assert change(model, theta, batch, 0.1, 300) < 1e-12
    error = kernels.one_step_error(model.predict, model.loss, theta, batch, 1.0)
    assert error < 1e-12

    def whole(theta: Any, batch: Any) -> Array:
        return model.loss(model.predict(theta, batch), batch)

    real = descend(whole, theta, batch, 0.1, 100)
    straight = kernels.linearised_descent(model.predict, model.loss, theta, batch, 0.1, 100)
    np.testing.assert_allclose(straight, real.losses, rtol=1e-10)
    jac = kernels.jacobian(model.predict, theta, batch)
    outputs = kernels.kernel_descent(
        kernels.gradient_kernel(jac, jac),
        model.predict(theta, batch),
        lambda found: model.loss(found, batch),
        0.1,
        100,
    )
    np.testing.assert_allclose(outputs[-1], model.predict(real.thetas[-1], batch), rtol=1e-8)


def test_linearised_descent_is_kernel_descent(x64: None) -> None:
    # of a model that is not linear: two ways to the same linearised training
    flat = built("random")
    batch = TASK.sample(jax.random.key(4), 6)

    predict = predictor(flat)

    def loss(found: Any, batch: Any) -> Array:
        return TASK.loss(found.reshape(batch.target.shape), batch).mean()

    jac = kernels.jacobian(predict, flat.theta, batch)
    by_kernel = kernels.kernel_descent(
        kernels.gradient_kernel(jac, jac),
        predict(flat.theta, batch).ravel(),
        lambda found: loss(found, batch),
        0.03,
        50,
    )
    wanted = [loss(found, batch) for found in by_kernel]
    straight = kernels.linearised_descent(predict, loss, flat.theta, batch, 0.03, 50)
    np.testing.assert_allclose(straight, wanted, rtol=1e-9)


@pytest.mark.parametrize("start", ["construction", "random"])
def test_training_linear_attention_is_not(start: str) -> None:
    flat = built(start)
    batch = TASK.sample(jax.random.key(0), 64)
    path = descend(flat.loss, flat.theta, batch, 0.1, 300, 10)

    predict = predictor(flat)

    jacobians = [kernels.jacobian(predict, path.thetas[n], batch) for n in (0, 1, 10, -1)]
    for kernel, least in ((kernels.gradient_kernel, 0.4), (kernels.sign_kernel, 0.25)):
        grams = [kernel(j, j) for j in jacobians]
        found = [float(kernels.kernel_change(grams[0], gram)) for gram in grams]
        assert found[0] == 0 and min(found[1:]) > least, found


def test_width_makes_two_layers_kernel_like() -> None:
    # near-miss of the linear model: how far it is from it falls with the width
    found = []
    for width in (16, 256, 2048):
        theta = jax.random.normal(jax.random.key(5), (4 * width,))
        found.append(change(Wide(width), theta, toy(), 0.3, 50))
    assert found[0] > 0.1 > found[1] > 2 * found[2], found


def test_descent_by_hand_and_its_arguments() -> None:
    def bowl(theta: Any, data: Any) -> Array:
        return 0.5 * (data * theta**2).sum()

    h, rate = jnp.array([1.0, 0.5]), 0.3
    path = descend(bowl, jnp.ones(2), h, rate, 6, 2)
    wanted = (1 - rate * np.asarray(h)) ** np.arange(7)[:, None]
    np.testing.assert_allclose(path.thetas, wanted[::2], rtol=1e-6)
    np.testing.assert_allclose(path.losses, 0.5 * wanted**2 @ np.asarray(h), rtol=1e-6)
    assert path.steps.tolist() == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="steps=6, every=4: must be at least 1, and a multiple"):
        descend(bowl, jnp.ones(2), h, rate, 6, 4)


def test_gradient_moments() -> None:
    # gradient theta + 2 z: mean theta, covariance 4 I
    def loss(theta: Any, z: Any) -> Array:
        return 0.5 * theta @ theta + 2 * theta @ z

    mean, variance = gradient_moments(
        loss, lambda key: jax.random.normal(key, (3,)), jnp.ones(3),
        jax.random.split(jax.random.key(0), 4000),
    )  # fmt: skip
    np.testing.assert_allclose(mean, jnp.ones(3), atol=0.15)
    assert float(variance) == pytest.approx(12, rel=0.06)
