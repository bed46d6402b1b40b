"""Minimising without gradients: against the gradient, closed forms, and where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from synthetic.fitting.zeroth_order import minimize_without_gradients, moved, replay, two_values

N = 40
CURVATURE = jnp.linspace(0.1, 2.0, N)


class Point(nnx.Module):
    """A vector of weights, and a count that is no weight."""

    def __init__(self, at: Array) -> None:
        self.at = nnx.Param(at)
        self.calls = nnx.Variable(jnp.zeros(()))


def bowl(model: Point, key: Array) -> Array:
    del key
    return 0.5 * (CURVATURE * model.at[...] ** 2).sum()


def test_slope_is_that_of_the_gradient_along_the_direction() -> None:
    params, key = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}, jax.random.key(0)

    def objective(p: dict) -> Array:
        return jnp.sin(p["a"]).sum() + (p["b"] ** 3).sum()

    gradient = jax.grad(objective)(params)
    z = jax.tree.map(lambda a, b: a - b, moved(params, key, 1.0), params)
    along = sum((gradient[n] * z[n]).sum() for n in params)
    above, below = two_values(objective, params, key, 1e-2)
    assert float((above - below) / 2e-2) == pytest.approx(float(along), rel=1e-3)


def test_directions_are_standard_normal_and_leaves_independent() -> None:
    params = {"a": jnp.zeros(20_000), "b": jnp.zeros(20_000)}
    z = moved(params, jax.random.key(1), 2.0)
    for leaf in z.values():
        assert abs(float(leaf.mean())) < 0.06 and float(leaf.std()) == pytest.approx(2, rel=0.02)
    assert abs(float(jnp.corrcoef(z["a"], z["b"])[0, 1])) < 0.03


def test_mean_square_of_the_estimate(x64: None) -> None:
    # E |s z|^2 = (n + 2) |grad|^2; of a quadratic the slope is exact at any eps
    at = jnp.ones(N)
    squared = float((CURVATURE**2).sum())

    def one(key: Array) -> tuple[Array, Array]:
        above, below = two_values(lambda t: 0.5 * (CURVATURE * t**2).sum(), at, key, 1e-3)
        z = moved(jnp.zeros(N), key, 1.0)
        s = (above - below) / 2e-3
        return s**2 * (z @ z), s * z

    sizes, estimates = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 40_000))
    assert float(sizes.mean()) / squared == pytest.approx(N + 2, rel=0.03)
    mean = np.asarray(estimates.mean(0))
    assert np.linalg.norm(mean - np.asarray(CURVATURE)) < 0.1 * np.sqrt(squared)


def test_descends_as_the_expectation_says() -> None:
    start, rate = Point(jnp.ones(N)), 0.3 / float(CURVATURE.sum())
    found = minimize_without_gradients(start, bowl, key=jax.random.key(3), steps=400, rate=rate)
    assert found.losses.shape == found.slopes.shape == (400,)
    assert found.losses[0] == pytest.approx(float(bowl(start, jax.random.key(0))), rel=1e-3)
    # E theta_i^2 of theta - rate z (z . H theta), exactly
    h, square = np.asarray(CURVATURE, float), np.ones(N)
    for _ in range(400):
        square = square * (1 - 2 * rate * h + 2 * (rate * h) ** 2) + rate**2 * (h**2 @ square)
    expected = 0.5 * h @ square
    assert expected < 0.3 * found.losses[0]
    assert float(bowl(found.model, jax.random.key(0))) == pytest.approx(expected, rel=0.35)
    assert bool((start.at[...] == 1).all())  # the model given stays


def test_a_value_that_is_not_finite_is_named() -> None:
    def log(model: Point, key: Array) -> Array:
        return jnp.log(model.at[0])

    with pytest.raises(FloatingPointError, match=r"the objective is nan at step [1-9]\d*"):
        start = Point(jnp.array([0.5]))
        minimize_without_gradients(start, log, key=jax.random.key(3), steps=50, rate=0.1)


def test_a_fit_is_its_slopes() -> None:
    start, key, rate = Point(jnp.ones(N)), jax.random.key(4), 5e-3
    found = minimize_without_gradients(start, bowl, key=key, steps=50, rate=rate)
    again = replay(start, key, found.slopes, rate)
    np.testing.assert_allclose(again.at[...], found.model.at[...], rtol=0, atol=1e-6)
    other = replay(start, jax.random.key(5), found.slopes, rate)
    assert float(jnp.abs(other.at[...] - found.model.at[...]).max()) > 0.01


def test_weights_are_restored_exactly() -> None:
    # in bfloat16 the published walk in place ends elsewhere; a step of slope 0 must not
    start = jax.random.normal(jax.random.key(6), (N,)).astype(jnp.bfloat16)
    model = Point(start)
    found = minimize_without_gradients(
        model, lambda m, key: jnp.zeros(()), key=jax.random.key(7), steps=200, rate=1.0
    )
    assert bool((found.model.at[...] == start).all())
    walked = start
    for step in range(200):
        key = jax.random.fold_in(jax.random.key(7), step)
        for length in (1e-3, -2e-3, 1e-3):
            walked = moved(walked, key, length)
    assert float(jnp.abs(walked - start).max()) > 1e-3


def test_minimises_what_has_no_gradient() -> None:
    # an accuracy: constant piece by piece, and here computed by the host
    x = jax.random.normal(jax.random.key(8), (300, 5))
    truth = np.asarray(x @ jnp.array([1.0, -2.0, 0.5, 0.0, 1.0])) > 0
    host_x = np.asarray(x)

    def on_host(at: np.ndarray) -> np.ndarray:
        return np.float32(np.mean((host_x @ np.asarray(at) > 0) != truth))

    def errors(model: Point, key: Array) -> Array:
        del key
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((), jnp.float32), model.at[...])

    def soft(at: Array) -> Array:
        return ((x @ at > 0) != truth).mean()

    start = Point(jnp.array([-0.5, 0.5, 0.5, 0.5, 0.5]))
    assert not bool(jax.grad(soft)(start.at[...]).any())
    found = minimize_without_gradients(
        start, errors, key=jax.random.key(9), steps=300, rate=0.3, eps=0.3
    )
    before, after = (float(on_host(np.asarray(m.at[...]))) for m in (start, found.model))
    assert before > 0.5 and after < 0.1
    # too small an eps sees nothing of it
    blind = minimize_without_gradients(
        start, errors, key=jax.random.key(9), steps=50, rate=0.3, eps=1e-6
    )
    assert float(on_host(np.asarray(blind.model.at[...]))) == pytest.approx(before, abs=0.05)


def test_data_of_a_step_are_the_same_on_both_sides() -> None:
    def noisy(model: Point, key: Array) -> Array:
        return bowl(model, key) + 100 * jax.random.normal(key)

    found = minimize_without_gradients(
        Point(jnp.ones(N)), noisy, key=jax.random.key(10), steps=20, rate=1e-6
    )
    assert np.ptp(found.losses) > 50 and np.abs(found.slopes).max() < 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0, must be finite and above 0"),
        ({"eps": -1.0}, "eps is -1.0, must be finite and above 0"),
        ({"steps": 0}, "steps is 0, must be at least 1"),
    ],
)
def test_bad_numbers_are_named(changes: dict, message: str) -> None:
    options = {"steps": 3, "rate": 0.1, "eps": 1e-3} | changes
    with pytest.raises(ValueError, match=message):
        minimize_without_gradients(Point(jnp.ones(2)), bowl, key=jax.random.key(0), **options)
