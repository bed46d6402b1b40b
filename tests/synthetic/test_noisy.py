"""The noisy task's distribution, and its moments against the contexts written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.tasks.noisy import NoisyRegressionTask, draw_contexts
from synthetic.tasks.task import Batch, Task


def test_sample_has_the_documented_shapes_and_dtype():
    task = NoisyRegressionTask(4, 3, max_noise=2, queries=5)
    assert isinstance(task, Task)
    for x64, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(x64):
            batch = task.sample(jax.random.key(0), 7)
            assert isinstance(batch, Batch)
            arrays = [*batch.inputs, *batch.target]
            shapes = [(7, 3, 4), (7, 3, 1), (7, 5, 4), (7, 5, 1), (7,), (7, 4)]
            assert [a.shape for a in arrays] == shapes
            assert {a.dtype for a in arrays} == {jnp.dtype(dtype)}


def test_the_target_is_clean_and_the_context_has_the_stated_noise(x64):
    task = NoisyRegressionTask(3, 400, noise_levels=(0.5, 2.0), queries=2)
    batch = task.sample(jax.random.key(1), 40)
    x, y, x_query = map(np.asarray, batch.inputs)
    value, noise, w = map(np.asarray, batch.target)
    np.testing.assert_allclose(value, np.einsum("bqd,bd->bq", x_query, w)[..., None], atol=1e-12)
    assert set(noise) == {0.5, 2.0}
    residual = y[..., 0] - np.einsum("bnd,bd->bn", x, w)
    # a standard deviation over 400 draws is known to 3.5 %
    np.testing.assert_allclose(residual.std(1) / noise, 1, atol=0.18)


def test_everything_is_standard_normal_and_independent(x64):
    batch = NoisyRegressionTask(2, 3, max_noise=1.0).sample(jax.random.key(2), 20_000)
    x, y, x_query = batch.inputs
    w, sigma = batch.target.weight, batch.target.noise
    eps = (y[..., 0] - jnp.einsum("bnd,bd->bn", x, w, precision="highest")) / sigma[:, None]
    table = np.concatenate([np.reshape(a, (20_000, -1)) for a in (x, x_query, w, eps)], 1)
    assert np.abs(table.mean(0)).max() < 5 / 20_000**0.5
    assert np.abs(np.cov(table.T) - np.eye(table.shape[1])).max() < 7 / 20_000**0.5


@pytest.mark.parametrize(
    "task, square",
    [
        (NoisyRegressionTask(max_noise=3), 3.0),
        (NoisyRegressionTask(noise_levels=(1, 3, 5)), 35 / 3),
        (NoisyRegressionTask(), 0.0),
    ],
    ids=["uniform", "levels", "none"],
)
def test_mean_square_noise(task, square, x64):
    assert task.mean_square_noise == pytest.approx(square)
    unit = jnp.linspace(0, 1, 300_000, endpoint=False)
    sampled = np.asarray(task.noise_of(unit))
    assert (sampled**2).mean() == pytest.approx(square, rel=1e-4)
    assert sampled.min() >= 0


def test_loss_is_half_the_squared_error_of_the_clean_target():
    task = NoisyRegressionTask(2, 3, max_noise=1, queries=2)
    batch = task.sample(jax.random.key(0), 4)
    off = batch.target.value + jnp.array([[[1.0], [3.0]]])
    np.testing.assert_allclose(task.loss(off, batch), 0.5 * (1 + 9) / 2, rtol=1e-5)
    with pytest.raises(ValueError, match="prediction must have shape"):
        task.loss(off[..., 0], batch)


def test_drawn_contexts_have_the_moments_of_real_ones(x64):
    """Means of symmetric functions of both, within their standard errors."""
    task = NoisyRegressionTask(3, 5, noise_levels=(1.0, 2.0))
    drawn = task.moments(draw_contexts(jax.random.key(3), 3, 5, 9_000))
    assert drawn.values.shape == (3, 9_000) and drawn.power.shape == (9_000,)
    batch = task.sample(jax.random.key(4), 9_000)
    x, y, _ = map(np.asarray, batch.inputs)
    w = np.asarray(batch.target.weight)
    gram, alpha = np.einsum("bni,bnj->bij", x, x), np.einsum("bni,bn->bi", x, y[..., 0])
    solved = np.linalg.solve(gram + np.eye(3), alpha[..., None])[..., 0]
    real = {
        "trace": np.trace(gram, axis1=1, axis2=2),
        "largest": np.linalg.eigvalsh(gram)[:, -1],
        "smallest": np.linalg.eigvalsh(gram)[:, 0],
        "power": (y**2).sum((1, 2)),
        "alpha2": (alpha**2).sum(1),
        "alpha.w": (alpha * w).sum(1),
        "alpha G alpha": np.einsum("bi,bij,bj->b", alpha, gram, alpha),
        "ridge.w": (solved * w).sum(1),
        "power ridge.alpha": (solved * alpha).sum(1) * (y**2).sum((1, 2)),
        "noise2 power": np.asarray(batch.target.noise) ** 2 * (y**2).sum((1, 2)),
    }
    v, a, p, w, s = map(np.asarray, drawn)
    ours = {
        "trace": v.sum(0),
        "largest": v[-1],
        "smallest": v[0],
        "power": p,
        "alpha2": (a**2).sum(0),
        "alpha.w": (a * w).sum(0),
        "alpha G alpha": (a * v * a).sum(0),
        "ridge.w": (a / (v + 1) * w).sum(0),
        "power ridge.alpha": (a**2 / (v + 1)).sum(0) * p,
        "noise2 power": s**2 * p,
    }
    for name, values in real.items():
        error = np.hypot(values.std(), ours[name].std()) / 9_000**0.5
        assert abs(values.mean() - ours[name].mean()) < 4 * error, name


def test_least_squares_residuals_of_drawn_contexts_are_chi_squared(x64):
    drawn = NoisyRegressionTask(4, 9, noise_levels=(1.0,)).moments(
        draw_contexts(jax.random.key(5), 4, 9, 5_000)
    )
    rss = np.asarray(drawn.power - (drawn.correlation**2 / drawn.values).sum(0))
    assert abs(rss.mean() - 5) < 4 * (10 / 5_000) ** 0.5
    assert rss.var() == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(dim_x=0), "dim_x is 0, must be an integer of at least 1"),
        (dict(max_noise=-1), "max_noise must be finite and at least 0, got -1"),
        (dict(noise_levels=(1, float("nan"))), "noise_levels must be finite"),
        (dict(max_noise=1, noise_levels=(1,)), "give max_noise or noise_levels"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        NoisyRegressionTask(**settings)


def test_is_hashable_and_refuses_other_contexts():
    task = NoisyRegressionTask(noise_levels=(1, 3))
    assert hash(task) == hash(NoisyRegressionTask(noise_levels=(1.0, 3.0)))
    with pytest.raises(ValueError, match="contexts have dim_x=2, the task 10"):
        task.moments(draw_contexts(jax.random.key(0), 2, 3, 4))
    with pytest.raises(ValueError, match="count is 0, must be an integer of at least 1"):
        draw_contexts(jax.random.key(0), 2, 3, 0)
