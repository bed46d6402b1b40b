"""Sine waves: the sampler's moments, and the theory against brute force and Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.tasks import sine
from synthetic.tasks.sine import SineTask, sine_and_cosine
from synthetic.tasks.task import Task

TASKS = [SineTask(), SineTask(num_examples=3, high_amplitude=5.0, low=-2.0, high=3.0, tied=True)]


def waves(task, count, seed=0):
    """Amplitudes and phases of a batch, recovered from three points of every wave."""
    batch = task.sample(jax.random.key(seed), count)
    x, y = (np.asarray(a[..., 0], np.float64) for a in batch.inputs[:2])
    phi = sine_and_cosine(x)
    w = np.stack([np.linalg.lstsq(p, v, rcond=None)[0] for p, v in zip(phi, y, strict=True)])
    return np.hypot(*w.T), np.arctan2(w[:, 1], w[:, 0]), batch


@pytest.mark.parametrize("tied", [False, True])
def test_amplitude_and_phase(x64, tied):
    task = SineTask(tied=tied, queries=2)
    assert isinstance(task, Task)
    amplitude, phase, batch = waves(task, 4000)
    assert amplitude.min() > 0.1 and amplitude.max() < 0.5
    assert phase.min() > 0 and phase.max() < np.pi
    assert amplitude.mean() == pytest.approx(0.3, abs=4 * 0.4 / np.sqrt(12 * 4000))
    assert phase.mean() == pytest.approx(np.pi / 2, abs=4 * np.pi / np.sqrt(12 * 4000))
    correlation = np.corrcoef(amplitude, phase)[0, 1]
    if tied:
        assert correlation == pytest.approx(1, abs=1e-9)
    else:
        assert abs(correlation) < 4 / np.sqrt(4000)
    # the queries lie on the same wave
    x_query, target = batch.inputs[2], batch.target
    wanted = amplitude[:, None] * np.sin(np.asarray(x_query)[..., 0] + phase[:, None])
    np.testing.assert_allclose(target[..., 0], wanted, atol=1e-9)
    assert target.shape == (4000, 2, 1)
    x = np.asarray(batch.inputs[0])
    assert -5 <= x.min() < -4.99 and 4.99 < x.max() <= 5


def test_loss_is_half_the_squared_error():
    task = SineTask(queries=2)
    batch = task.sample(jax.random.key(0), 3)
    loss = task.loss(batch.target + jnp.array([1.0, 3.0])[None, :, None], batch)
    np.testing.assert_allclose(loss, 0.5 * (1 + 9) / 2, rtol=1e-6)
    with pytest.raises((ValueError, TypeError), match="prediction"):
        task.loss(batch.target[:, :1], batch)


@pytest.mark.parametrize("task", TASKS, ids=["independent", "tied"])
def test_coefficient_moments(task):
    rng = np.random.default_rng(0)
    unit, other = rng.random((2, 400_000))
    a = task.low_amplitude + (task.high_amplitude - task.low_amplitude) * unit
    rho = np.pi * (unit if task.tied else other)
    w = a * np.stack([np.cos(rho), np.sin(rho)])
    mean, second = sine.coefficient_moments(task)
    products = np.einsum("as,bs->abs", w, w)
    for found, samples in ((mean, w), (second, products)):
        error = samples.std(-1) / np.sqrt(len(unit))
        assert (np.abs(found - samples.mean(-1)) < 4 * error).all()
    if not task.tied:
        np.testing.assert_allclose(
            second, np.eye(2) * (0.5**3 - 0.1**3) / (3 * 0.4) / 2, atol=1e-16
        )
        np.testing.assert_allclose(mean, [0, 2 * 0.3 / np.pi], atol=1e-15)


def polynomials(x):
    """Features that have nothing to do with sine waves."""
    return np.stack([np.ones_like(x), x / 3, (x / 3) ** 2], axis=-1)


@pytest.mark.parametrize("features", [sine_and_cosine, polynomials])
@pytest.mark.parametrize("task", TASKS, ids=["independent", "tied"])
def test_smoother_loss_is_what_sampling_finds(task, features):
    rng = np.random.default_rng(1)
    size = features(np.zeros(1)).shape[-1]
    matrix, start = 0.1 * rng.normal(size=(size, size)), 0.2 * rng.normal(size=size)
    batch = task.sample(jax.random.key(3), 2**15)
    x, y, x_query = (np.asarray(a[..., 0], np.float64) for a in batch.inputs)
    target = np.asarray(batch.target)[:, 0, 0]
    m, query = features(x), features(x_query[:, 0])
    for w0 in (None, start):
        offset = np.zeros(size) if w0 is None else w0
        s = np.einsum("bn,bnf->bf", y - m @ offset, m)
        prediction = np.einsum("bf,fg,bg->b", s, matrix, query) + query @ offset
        losses = 0.5 * (prediction - target) ** 2
        expected = sine.smoother_loss(matrix, task, features, start=w0)
        assert abs(losses.mean() - expected) < 4 * losses.std() / np.sqrt(len(losses))
        assert abs(losses.mean() - 1.1 * expected) > 4 * losses.std() / np.sqrt(len(losses))


@pytest.mark.parametrize("features", [sine_and_cosine, polynomials])
@pytest.mark.parametrize("task", TASKS, ids=["independent", "tied"])
def test_optima_are_minima(task, features):
    """No gradient by autodiff-free central differences, exact for a quadratic; and a bowl."""
    size = features(np.zeros(1)).shape[-1]
    start = np.linspace(0.1, 0.2, size)
    best = sine.optimal_smoother(task, features, start=start)
    step = sine.optimal_step(task, features, start=start)
    at = lambda m: sine.smoother_loss(m, task, features, start=start)  # noqa: E731
    assert at(best.matrix) == pytest.approx(best.loss, rel=1e-12)
    scale = np.abs(best.matrix).max()
    for i in range(size):
        for j in range(size):
            d = np.zeros((size, size))
            d[i, j] = scale
            up, down = at(best.matrix + d), at(best.matrix - d)
            assert up - down == pytest.approx(0, abs=1e-9 * up)
            assert up > best.loss
    c = step.size / task.num_examples * np.eye(size)
    assert at(c) == pytest.approx(step.loss, rel=1e-12)
    assert at(1.1 * c) - at(0.9 * c) == pytest.approx(0, abs=1e-9 * step.loss)
    assert at(1.1 * c) > step.loss >= best.loss


def brute_kernel_loss(task, affine, size=160):
    """The best kernel by solving for it on a grid, without knowing that it is of rank two."""
    nodes, mass = np.polynomial.legendre.leggauss(size)
    x = (task.low + task.high) / 2 + (task.high - task.low) / 2 * nodes
    p, n = mass / 2, task.num_examples
    mean, second = sine.coefficient_moments(task)
    phi = sine_and_cosine(x)
    covariance = phi @ (second - affine * np.outer(mean, mean)) @ phi.T
    # loss(k) = 1/2 (R(q, q) - 2 N sum_i p_i k_i R(i, q) + k^T [N diag(p R) + N (N - 1) p p^T R] k)
    system = n * np.diag(p * np.diag(covariance)) + n * (n - 1) * np.outer(p, p) * covariance
    right = n * p[:, None] * covariance
    kernel = np.linalg.solve(system, right)
    return 0.5 * p @ (np.diag(covariance) - np.einsum("iq,iq->q", right, kernel))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("task", TASKS, ids=["independent", "tied"])
def test_best_kernel(task, affine):
    found = sine.optimal_kernel_loss(task, affine=affine)
    assert found == pytest.approx(brute_kernel_loss(task, affine), rel=1e-9)
    mean, _ = sine.coefficient_moments(task)
    smoother = sine.optimal_smoother(task, start=mean if affine else None).loss
    if task.tied or affine:
        assert found < 0.99 * smoother
    else:
        # the power of y is the same at every x: sine and cosine are the best features
        assert found == pytest.approx(smoother, rel=1e-12)


def test_numbers():
    """The range of amplitudes decides whether the published 0.006 is possible."""
    code, text = SineTask(), SineTask(high_amplitude=5.0)
    assert sine.optimal_smoother(code).loss == pytest.approx(0.0023462, rel=1e-4)
    assert sine.optimal_smoother(text).loss == pytest.approx(0.19307, rel=1e-4)
    assert sine.optimal_kernel_loss(text, affine=True) > 10 * 0.006
    assert sine.optimal_step(code).size == pytest.approx(1.80944, rel=1e-5)
    mean, _ = sine.coefficient_moments(code)
    assert sine.optimal_step(code, start=mean).loss == pytest.approx(0.0014633, rel=1e-4)
    # a mean that is not used costs; one that is off costs too
    assert sine.optimal_step(code, start=1.3 * mean).loss > sine.optimal_step(code, start=mean).loss


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_examples": 0}, ValueError, "num_examples is 0, must be an integer of at least 1"),
        ({"queries": 1.5}, ValueError, "queries is 1.5, must be an integer"),
        ({"low_amplitude": 0.6}, ValueError, "low_amplitude and high_amplitude"),
        ({"high": float("inf")}, ValueError, "low and high"),
        ({"tied": 1}, TypeError, "tied must be"),
    ],
)
def test_task_refuses(settings, error, message):
    # run without the checks of annotations, which would come first
    with pytest.raises((error, TypeError), match=f"{message}|annotation|type"):
        SineTask(**settings)


def test_theory_refuses():
    with pytest.raises(ValueError, match=r"features must map"):
        sine.optimal_smoother(SineTask(), np.sin)
    with pytest.raises(ValueError, match=r"start must have shape \(2,\)"):
        sine.optimal_step(SineTask(), start=np.zeros(3))
