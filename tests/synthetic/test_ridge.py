"""Ridge regression in context against numpy's solver, one context at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.tasks.noisy import NoisyRegressionTask, draw_contexts
from synthetic.theory import ridge

TASK = NoisyRegressionTask(3, 7, max_noise=2.0, queries=2)


@pytest.fixture
def batch(x64):
    return TASK.sample(jax.random.key(0), 6)


def _solved(batch, penalties):
    """Predictions by `np.linalg.solve`."""
    out = []
    for x, y, q, penalty in zip(*map(np.asarray, batch.inputs), penalties, strict=True):
        w = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
        out.append(q @ w)
    return np.array(out)


def _estimates(batch):
    x, y, _ = map(np.asarray, batch.inputs)
    rss = [np.linalg.lstsq(a, b, rcond=None)[1][0] for a, b in zip(x, y, strict=True)]
    return np.array(rss) / (x.shape[1] - x.shape[2])


def test_ridge_with_one_and_with_many_penalties(batch):
    many = batch.target.noise**2
    np.testing.assert_allclose(ridge.ridge(*batch.inputs, 0.7), _solved(batch, [0.7] * 6), 1e-9)
    np.testing.assert_allclose(ridge.ridge(*batch.inputs, many), _solved(batch, many), 1e-9)


def test_adaptive_ridge_takes_the_residuals_of_least_squares(batch):
    sigma2 = _estimates(batch)
    np.testing.assert_allclose(
        ridge.adaptive_ridge(*batch.inputs), _solved(batch, sigma2), rtol=1e-8
    )
    capped = np.minimum(1.3 * sigma2, 0.9)
    assert (capped == 0.9).any() and (capped < 0.9).any()
    np.testing.assert_allclose(
        ridge.adaptive_ridge(*batch.inputs, factor=1.3, ceiling=0.9),
        _solved(batch, capped),
        rtol=1e-8,
    )


def test_without_penalty_and_with_few_examples_it_is_the_least_norm_solution(x64):
    x, y, q = NoisyRegressionTask(5, 3, max_noise=1).sample(jax.random.key(1), 4).inputs
    expected = [np.asarray(c) @ np.linalg.pinv(a) @ b for a, b, c in zip(x, y, q, strict=True)]
    np.testing.assert_allclose(ridge.ridge(x, y, q, 0.0), expected, rtol=1e-7)
    with pytest.raises(ValueError, match="num_examples must exceed dim_x=5"):
        ridge.adaptive_ridge(x, y, q)


def test_the_oracle_is_the_posterior_mean_and_no_other_penalty_beats_it(x64):
    task = NoisyRegressionTask(3, 7, noise_levels=(0.5, 2.0))
    moments = task.moments(draw_contexts(jax.random.key(2), 3, 7, 40_000))
    oracle = ridge.expected_loss(ridge.oracle_weight(moments), moments)
    # its expectation given the eigenvalues: half the trace of the posterior covariance
    square = np.asarray(moments.noise) ** 2
    posterior = 0.5 * (square / (np.asarray(moments.values) + square)).sum(0)
    gap = np.asarray(oracle) - posterior
    assert abs(gap.mean()) < 4 * gap.std() / 40_000**0.5
    for penalty in (moments.noise**2 * 1.5, moments.noise**2 / 1.5, task.mean_square_noise):
        worse = ridge.expected_adjusted_loss(ridge.ridge_weight(moments, penalty), moments)
        assert worse.mean > 4 * worse.standard_error


def test_expected_loss_is_the_mean_over_queries(x64):
    task = NoisyRegressionTask(3, 7, max_noise=1.0, queries=40_000)
    batch = task.sample(jax.random.key(3), 2)
    x, y, _ = batch.inputs
    loss = np.asarray(task.loss(ridge.ridge(*batch.inputs, 0.4), batch))
    moments, vectors = ridge.context_moments(x, y)
    turned = jnp.einsum("bij,bi->jb", vectors, batch.target.weight)
    moments = moments._replace(weight=turned)
    expected = ridge.expected_loss(ridge.ridge_weight(moments, 0.4), moments)
    np.testing.assert_allclose(loss, expected, rtol=0.04)


def test_tuned_numbers_beat_their_neighbours_and_the_best_constant_is_the_mean_square(x64):
    task = NoisyRegressionTask(5, 12, max_noise=2.0)
    moments = task.moments(draw_contexts(jax.random.key(4), 5, 12, 20_000))
    tuning = ridge.tune(moments, 12, factors=[0.5, 1.0, 1.5], ceilings=[0.5, 2.5, np.inf])

    def loss(factor, ceiling):
        raw = (moments.power - (moments.correlation**2 / moments.values).sum(0)) / 7
        weight = moments.correlation / (moments.values + jnp.minimum(factor * raw, ceiling))
        return float((0.5 * (weight - moments.weight) ** 2).sum(0).mean())

    losses = {(f, c): loss(f, c) for f in (0.5, 1.0, 1.5) for c in (0.5, 2.5, np.inf)}
    assert tuple(tuning) == min(losses, key=lambda pair: losses[pair])
    assert losses[tuple(tuning)] < losses[(1.0, np.inf)]
    # given the inputs, a constant sees the noise through its mean square alone
    assert ridge.fit_constant(moments, 2.0) == pytest.approx(4 / 3, rel=0.05)
    assert ridge.fit_constant(moments, 0.0) == 0
