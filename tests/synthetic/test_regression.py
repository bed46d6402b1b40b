"""The task's distributions, its shapes and errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from synthetic.tasks.regression import Gaussian, RegressionTask, Uniform, distribution
from synthetic.tasks.task import Batch, Task

SIGMA = [[1.0, 0.3], [0.3, 0.5]]


def _z(samples, mean):
    samples = np.asarray(samples, np.float64)
    return (samples.mean(0) - mean) / (samples.std(0) / len(samples) ** 0.5)


def test_sample_has_the_documented_shapes_and_dtype():
    task = RegressionTask(dim_x=4, num_examples=3, dim_y=2, queries=5, noise=0.1)
    assert isinstance(task, Task)
    for x64, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(x64):
            batch = task.sample(jax.random.key(0), 7)
            assert isinstance(batch, Batch)
            x, y, x_query = batch.inputs
            shapes = [a.shape for a in (x, y, x_query, batch.target)]
            assert shapes == [(7, 3, 4), (7, 3, 2), (7, 5, 4), (7, 5, 2)]
            assert {a.dtype for a in (x, y, x_query, batch.target)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dim_x", [3, 70], ids=["unrolled", "matrix product"])
def test_context_and_target_share_one_linear_map(dim_x):
    task = RegressionTask(dim_x=dim_x, num_examples=dim_x + 2, dim_y=2, queries=3)
    with jax.enable_x64(True):
        batch = task.sample(jax.random.key(1), 6)
    x, y, x_query = map(np.asarray, batch.inputs)
    for i in range(6):
        w = np.linalg.lstsq(x[i], y[i], rcond=None)[0]
        np.testing.assert_allclose(x_query[i] @ w, batch.target[i], rtol=0, atol=1e-9)
    assert not np.allclose(batch.target[0], batch.target[1])


@pytest.mark.parametrize("inputs", [Uniform(), Uniform(-1, 3)])
def test_uniform_inputs_have_the_stated_law(inputs):
    x, _, x_query = RegressionTask(inputs=inputs).sample(jax.random.key(2), 500).inputs
    for array in (x, x_query):
        assert array.min() >= inputs.low and array.max() < inputs.high
        law = scipy.stats.uniform(inputs.low, inputs.high - inputs.low)
        assert scipy.stats.kstest(np.ravel(array), law.cdf).pvalue > 1e-3
        assert inputs.mean == pytest.approx(law.mean())
        assert inputs.variance == pytest.approx(law.var())
        assert inputs.kurtosis == pytest.approx(3 + float(law.stats("k")))


def test_gaussian_inputs_have_the_stated_covariance():
    task = RegressionTask(dim_x=2, num_examples=3, inputs=Gaussian(SIGMA))
    x, _, x_query = task.sample(jax.random.key(3), 40_000).inputs
    for array in (x[:, 0], x[:, 2], x_query[:, 0]):
        array = np.asarray(array, np.float64)
        assert np.abs(_z(array, 0)).max() < 4
        products = array[:, :, None] * array[:, None, :]
        assert np.abs(_z(products, SIGMA)).max() < 4
        whitened = np.linalg.solve(np.linalg.cholesky(SIGMA), array.T)
        for row in whitened:
            assert scipy.stats.kstest(row, "norm").pvalue > 1e-3
    assert np.abs(_z(np.asarray(x[:, 0]) * np.asarray(x[:, 1]), 0)).max() < 4


def test_singular_covariance_stays_in_its_range():
    task = RegressionTask(dim_x=2, inputs=Gaussian([[1, 1], [1, 1]]))
    x = task.sample(jax.random.key(4), 50).inputs[0]
    np.testing.assert_allclose(x[..., 0], x[..., 1], atol=1e-5)
    assert x.std() > 0.5


@pytest.mark.parametrize("weights", [Gaussian(SIGMA), Uniform(-1, 1)])
def test_rows_of_the_map_are_independent_with_the_weights_covariance(weights):
    task = RegressionTask(dim_x=2, num_examples=2, dim_y=2, weights=weights)
    with jax.enable_x64(True):
        x, y, _ = task.sample(jax.random.key(5), 40_000).inputs
        rows = np.swapaxes(np.linalg.solve(x, y), 1, 2).reshape(-1, 4)
    expected = np.kron(np.eye(2), weights.covariance_matrix(2))
    assert np.abs(_z(rows[:, :, None] * rows[:, None, :], expected)).max() < 4


def test_noise_is_on_the_context_only():
    quiet = RegressionTask(dim_x=1, num_examples=4, dim_y=2, queries=4, weights=Gaussian(1e-12))
    loud = dataclasses.replace(quiet, noise=0.3)
    batch = loud.sample(jax.random.key(6), 20_000)
    noise = np.asarray(batch.inputs[1]).reshape(-1, 8)
    assert np.abs(batch.target).max() < 1e-5
    assert scipy.stats.kstest(noise.ravel() / 0.3, "norm").pvalue > 1e-3
    covariance = 0.09 * np.eye(8)
    assert np.abs(_z(noise[:, :, None] * noise[:, None, :], covariance)).max() < 4


def test_keys_give_other_batches_and_the_same_key_the_same_one():
    task = RegressionTask(noise=0.2)
    first, again, other = (task.sample(jax.random.key(k), 16) for k in (0, 0, 1))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    assert not any(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(other)))


def test_seeds_by_vmap_are_the_batches_of_their_keys():
    task = RegressionTask()
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda key: task.sample(key, 32))(keys)
    single = task.sample(keys[2], 32)
    for several, one in zip(jax.tree.leaves(stacked), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(several[2], one, rtol=1e-5, atol=1e-6)


def test_loss_is_half_the_squared_error_summed_over_outputs():
    task = RegressionTask(dim_y=2, queries=3)
    batch = task.sample(jax.random.key(0), 2)
    error = np.arange(12.0).reshape(2, 3, 2)
    loss = task.loss(batch.target + error, batch)
    np.testing.assert_allclose(loss, [(0 + 1 + 4 + 9 + 16 + 25) / 6, 451 / 6], rtol=1e-5)
    with pytest.raises(ValueError, match=r"prediction must have shape \(2, 3, 2\)"):
        task.loss(batch.target[:, 0], batch)


@pytest.mark.parametrize("inputs", [Uniform(-1, 1), Gaussian(), Gaussian(0.5), Gaussian(SIGMA)])
def test_scaled_inputs_scale_every_sample(inputs):
    task = RegressionTask(dim_x=2, inputs=inputs)
    scaled = task.scaled_inputs(3)
    key = jax.random.key(0)
    for before, after in zip(
        jax.tree.leaves(task.sample(key, 8)), jax.tree.leaves(scaled.sample(key, 8)), strict=True
    ):
        np.testing.assert_allclose(after, 3 * before, rtol=1e-4, atol=1e-5)
    assert scaled.weights == task.weights
    assert task.with_inputs(Uniform()).inputs == Uniform()


def test_task_is_a_static_argument_of_jit():
    traced = []

    def draw(task, key):
        traced.append(task)
        return task.sample(key, 2).target

    compiled = jax.jit(draw, static_argnums=0)
    for covariance in (SIGMA, np.array(SIGMA), jnp.array(SIGMA)):
        compiled(RegressionTask(2, inputs=Gaussian(np.round(covariance, 3))), jax.random.key(0))
    distinct = {RegressionTask(2, inputs=Gaussian(SIGMA)), RegressionTask(2, inputs=Gaussian())}
    assert len(distinct) == 2
    assert hash(Gaussian(SIGMA)) == hash(Gaussian(np.array(SIGMA)))
    assert len(traced) <= 2  # float32 rounding may make one more


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegressionTask(dim_x=0), "dim_x is 0, must be an integer of at least 1"),
        (
            lambda: RegressionTask(num_examples=-1),
            "num_examples is -1, must be an integer",
        ),
        (lambda: RegressionTask(dim_y=0), "dim_y is 0, must be an integer of at least 1"),
        (lambda: RegressionTask(queries=0), "queries is 0, must be an integer of at least 1"),
        (lambda: RegressionTask(noise=-0.1), "noise must be finite and at least 0, got -0.1"),
        (lambda: RegressionTask(noise=float("nan")), "noise must be finite"),
        (
            lambda: RegressionTask().sample(jax.random.key(0), 0),
            "batch is 0, must be an integer",
        ),
        (lambda: RegressionTask().scaled_inputs(0), "factor must be positive"),
        (lambda: Uniform(1, 1), "low < high, got low=1.0, high=1.0"),
        (lambda: Uniform(float("nan"), 1), "finite low < high"),
        (lambda: Gaussian(0.0), "covariance must be positive"),
        (lambda: Gaussian([[1.0, float("nan")], [0.0, 1.0]]), "covariance must be finite"),
        (lambda: Gaussian([[1.0, 0.5], [0.0, 1.0]]), "covariance must be symmetric"),
        (lambda: Gaussian([[1.0, 2.0], [2.0, 1.0]]), "positive semidefinite"),
        (lambda: Gaussian([[1.0, 2.0]]), "square matrix, got shape"),
        (
            lambda: RegressionTask(3, inputs=Gaussian(SIGMA)),
            r"inputs: covariance must have shape \(3, 3\), got \(2, 2\)",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError):
        RegressionTask(dim_x=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        RegressionTask(inputs="normal")  # pyright: ignore[reportArgumentType]


def test_distributions_as_plain_data():
    for given in (Uniform(-2, 3), Uniform(), Gaussian(), Gaussian(2.5), Gaussian(np.eye(2))):
        assert distribution("inputs", json.loads(json.dumps(given.to_json()))) == given
    assert distribution("inputs", "uniform") == Uniform() == distribution("inputs", Uniform())
    must = "inputs is .*, must be 'uniform', 'gaussian', {'uniform': .low, high.} or {'gaussian'"
    for wrong in ("normal", 3, None, {}, {"uniform": [1]}, {"uniform": 2}, {"gaussian": "x"}, [1]):
        with pytest.raises(ValueError, match=must):
            distribution("inputs", wrong)
