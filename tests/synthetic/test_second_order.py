"""The least-squares fitter against planted minima and scipy's."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from synthetic.fitting.second_order import least_squares


def decay(parameters, data):
    """`a exp(-b t) + c`, scales that differ by 1e4, against values with noise."""
    t, y = data
    a, b, c = parameters
    return a * jnp.exp(-b * 1e4 * t) + c - y


def _decay_data(blocks, noise):
    random = np.random.default_rng(0)
    t = random.uniform(0, 3, size=(blocks, 20))
    y = 2 * np.exp(-1.5 * t) + 0.5 + noise * random.normal(size=t.shape)
    return jnp.asarray(t), jnp.asarray(y)


def test_finds_a_planted_minimum_to_rounding(x64):
    fitted = least_squares(decay, [[1.0, 1e-5, 0.0]], _decay_data(4, 0.0), tolerance=1e-20)
    np.testing.assert_allclose(fitted.parameters, [2, 1.5e-4, 0.5], rtol=1e-8)
    assert fitted.loss < 1e-16


def test_agrees_with_scipy_where_residuals_do_not_vanish(x64):
    data = _decay_data(3, 0.5)
    t, y = np.asarray(data[0]).ravel(), np.asarray(data[1]).ravel()
    expected = scipy.optimize.least_squares(
        lambda p: p[0] * np.exp(-p[1] * 1e4 * t) + p[2] - y,
        [2, 1.5e-4, 0.5],
        x_scale="jac",
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
    )
    fitted = least_squares(decay, [[1.0, 1e-5, 0.0]], data, tolerance=1e-14)
    assert fitted.converged
    assert fitted.loss == pytest.approx(expected.cost, rel=1e-8)
    assert fitted.loss <= expected.cost * (1 + 1e-12)
    np.testing.assert_allclose(fitted.parameters, expected.x, rtol=1e-3)


@dataclass(frozen=True)
class Wave:
    """Residuals with many local minima; equal instances share a compilation."""

    frequency: float

    def __call__(self, parameters, data):
        return jnp.concatenate([0.3 * parameters, 1 + jnp.cos(self.frequency * parameters)]) * data


def test_returns_the_best_of_many_starts_and_reports_all(x64):
    wave, data = Wave(3.0), jnp.ones((1, 1))
    starts = np.linspace(-6, 6, 13)[:, None]
    fitted = least_squares(wave, starts, data, keep=13, tolerance=1e-14)
    grid = np.linspace(-7, 7, 400_001)
    brute = 0.5 * (0.09 * grid**2 + (1 + np.cos(3 * grid)) ** 2)
    assert fitted.loss == pytest.approx(brute.min(), rel=1e-8)
    assert len(fitted.losses) == 13 and min(fitted.losses) == fitted.loss
    assert max(fitted.losses) > 2 * fitted.loss  # others did get stuck
    alone = least_squares(wave, starts[:1], data, tolerance=1e-14)
    assert fitted.losses[0] == pytest.approx(alone.loss)
    again = least_squares(wave, starts, data, keep=13, tolerance=1e-14)
    np.testing.assert_array_equal(again.parameters, fitted.parameters)


def test_a_start_that_explodes_and_an_inert_parameter_do_no_harm(x64):
    def residuals(parameters, data):
        return jnp.exp(parameters[:1]) - data

    data = jnp.full((2, 1), 3.0)
    fitted = least_squares(residuals, [[800.0, 1.0], [0.0, 7.0]], data)
    assert fitted.losses[0] == np.inf
    np.testing.assert_allclose(fitted.parameters, [np.log(3), 7.0], rtol=1e-6)
    with pytest.raises(FloatingPointError, match="not finite at any start"):
        least_squares(residuals, [[800.0, 1.0]], data)


def test_blocks_are_summed(x64):
    t, y = _decay_data(4, 0.5)
    whole = least_squares(decay, [[1.0, 1e-4, 0.0]], (t.reshape(1, -1), y.reshape(1, -1)))
    blocks = least_squares(decay, [[1.0, 1e-4, 0.0]], (t, y))
    assert whole.loss == pytest.approx(blocks.loss, rel=1e-10)


def test_runs_in_float32():
    t, y = (jnp.asarray(a, jnp.float32) for a in _decay_data(4, 0.0))
    fitted = least_squares(decay, [[1.0, 1e-5, 0.0]], (t, y))
    assert t.dtype == jnp.float32 and not jax.config.jax_enable_x64
    np.testing.assert_allclose(fitted.parameters, [2, 1.5e-4, 0.5], rtol=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(starts=np.zeros((0, 1))), "starts must have shape"),
        (dict(starts=[[np.nan]]), "starts must be finite"),
        (dict(steps=0), "steps=0: must be at least 1"),
        (dict(keep=0), "keep=0"),
        (dict(tolerance=-1.0), "tolerance=-1.0"),
    ],
)
def test_refuses(settings, message):
    settings = {"starts": [[0.0]], **settings}
    starts = settings.pop("starts")
    with pytest.raises(ValueError, match=message):
        least_squares(Wave(1.0), starts, jnp.ones((1, 1)), **settings)
