"""Closed forms against exact quadrature, Monte Carlo on the task's own samples and known values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.tasks.regression import Gaussian, RegressionTask, Uniform
from synthetic.theory import one_layer as theory

SIGMA = np.array([[1.0, 0.3], [0.3, 0.5]])
LAMBDA = np.array([[0.7, -0.2], [-0.2, 1.1]])
BASE = RegressionTask()


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def quadrature_loss(tensor: jax.Array, task: RegressionTask) -> jax.Array:
    """The expected loss as a finite sum: 3-node Gauss rules are exact to degree 5 in each variable.

    Written from the definition of the prediction; knows no moment formula.
    """
    n, d, o = task.num_examples, task.dim_x, task.dim_y
    per_input, per_weight = _rule(task.inputs), _rule(task.weights)
    # the loss is of degree 4 in each coordinate of x, w and the noise
    rules = [per_input] * (n * d) + [per_weight] * (o * d)
    rules += [_rule(Gaussian())] * (n * o if task.noise else 0)
    nodes = np.array(list(itertools.product(*(rule[0] for rule in rules))))
    mass = np.array([np.prod(p) for p in itertools.product(*(rule[1] for rule in rules))])
    x = nodes[:, : n * d].reshape(-1, n, d) @ _root(task.inputs, d).T
    w = nodes[:, n * d : n * d + o * d].reshape(-1, o, d) @ _root(task.weights, d).T
    y = np.einsum("pod,pnd->pno", w, x)
    if task.noise:
        y = y + task.noise * nodes[:, n * d + o * d :].reshape(-1, n, o)
    tokens = np.concatenate([x, y], -1)
    gram = np.einsum("pna,pnb->pab", tokens, tokens)
    error = jnp.einsum("oabc,pab->poc", tensor, gram) - w
    # the query is independent of all else and enters squared
    second_moment = task.inputs.covariance_matrix(d)
    return 0.5 * jnp.einsum("p,poc,ce,poe->", mass, error, second_moment, error)


def _rule(distribution):
    if isinstance(distribution, Uniform):
        nodes, mass = np.polynomial.legendre.leggauss(3)
        return distribution.high * nodes, mass / 2
    nodes, mass = np.polynomial.hermite_e.hermegauss(3)
    return nodes, mass / mass.sum()


def _root(distribution, d):
    if isinstance(distribution, Uniform):
        return np.eye(d)
    return np.linalg.cholesky(distribution.covariance_matrix(d))


SMALL = {
    "uniform": RegressionTask(2, 2, inputs=Uniform(-1, 1)),
    "uniform, three inputs": RegressionTask(3, 1, inputs=Uniform(-1, 1)),
    "Gaussian, noise": RegressionTask(2, 2, inputs=Gaussian(0.8), noise=0.7),
    "anisotropic, noise": RegressionTask(
        2, 2, inputs=Gaussian(SIGMA), weights=Gaussian(LAMBDA), noise=0.7
    ),
    "uniform, anisotropic weights": RegressionTask(
        2, 2, inputs=Uniform(-1, 1), weights=Gaussian(LAMBDA), noise=0.4
    ),
    "uniform weights": RegressionTask(2, 2, inputs=Uniform(-1, 1), weights=Uniform(-2, 2)),
    "two outputs": RegressionTask(1, 2, 2, inputs=Uniform(-1, 1), noise=0.5),
    "two outputs, two inputs": RegressionTask(
        2, 1, 2, inputs=Gaussian(SIGMA), weights=Gaussian(LAMBDA), noise=0.5
    ),
}


def _random_tensor(task, seed, heads=2):
    values, keys = jax.random.split(jax.random.key(seed))
    tokens = task.dim_x + task.dim_y
    return theory.gram_tensor(
        jax.random.normal(values, (heads, task.dim_y, tokens)) / 3,
        jax.random.normal(keys, (heads, tokens, task.dim_x)) / 3,
    )


def _tensor_of(matrix, task):
    """The layer that predicts `(sum_i y_i x_i)^T matrix x_query` for every output."""
    d, o = task.dim_x, task.dim_y
    value = jnp.concatenate([jnp.zeros((o, d)), jnp.eye(o)], 1)
    key_query = jnp.concatenate([jnp.asarray(matrix), jnp.zeros((o, d))])
    return theory.gram_tensor(value[None], key_query[None])


@pytest.mark.parametrize("name", SMALL)
def test_population_loss_of_random_weights_equals_quadrature(name):
    task = SMALL[name]
    tensor = _random_tensor(task, seed=1)
    np.testing.assert_allclose(
        theory.one_layer_population_loss(tensor, task), quadrature_loss(tensor, task), rtol=1e-11
    )


@pytest.mark.parametrize("name", SMALL)
def test_optimum_has_its_loss_and_zero_gradient_under_quadrature(name):
    task = SMALL[name]
    optimum = theory.optimal_one_layer(task)
    loss, gradient = jax.value_and_grad(quadrature_loss)(_tensor_of(optimum.matrix, task), task)
    np.testing.assert_allclose(loss, optimum.loss, rtol=1e-11)
    np.testing.assert_allclose(gradient, 0, atol=1e-11)


@pytest.mark.parametrize("name", SMALL)
def test_gradient_descent_loss_equals_quadrature(name):
    task = SMALL[name]
    tensor = _tensor_of(0.37 / task.num_examples * np.eye(task.dim_x), task)
    np.testing.assert_allclose(
        theory.gradient_descent_loss(0.37, task), quadrature_loss(tensor, task), rtol=1e-11
    )


@pytest.mark.parametrize("name", SMALL)
def test_optimal_step_size_minimises_gradient_descent_loss(name):
    best = theory.optimal_step_size(SMALL[name])
    losses = [theory.gradient_descent_loss(best * f, SMALL[name]) for f in (0.99, 1.0, 1.01)]
    assert losses[1] < min(losses[0], losses[2])
    assert losses[0] == pytest.approx(losses[2], rel=1e-10)  # a parabola about its minimum


@pytest.mark.parametrize(
    "task",
    [
        RegressionTask(3, 4, inputs=Uniform(-1, 1), noise=0.3),
        RegressionTask(2, 5, dim_y=2, queries=2, inputs=Gaussian(SIGMA), weights=Gaussian(LAMBDA)),
    ],
    ids=["uniform", "anisotropic"],
)
def test_population_loss_agrees_with_the_sampler(task):
    tensor = _random_tensor(task, seed=2, heads=3)
    batch = task.sample(jax.random.key(5), 50_000)
    x, y, x_query = batch.inputs
    tokens = jnp.concatenate([x, y], -1)
    gram = jnp.einsum("pna,pnb->pab", tokens, tokens)
    prediction = jnp.einsum("oabc,pab,pqc->pqo", tensor, gram, x_query)
    losses = task.loss(prediction, batch)
    error = losses.mean() - theory.one_layer_population_loss(tensor, task)
    assert abs(error / (losses.std() / losses.size**0.5)) < 4


@pytest.mark.parametrize(
    ("task", "step", "loss"),
    [
        (BASE, 0.606061, 0.2062290),
        (RegressionTask(inputs=Uniform(-1, 1)), 0.151515, 0.8249158),
        (RegressionTask(10, 20, inputs=Gaussian()), 0.032258, 1.774194),
        (RegressionTask(10, 20, inputs=Gaussian(), noise=3**-0.5), 0.031915, 1.808511),
    ],
    ids=["U(-1/2,1/2)", "U(-1,1)", "N(0,1)", "N(0,1) with noise"],
)
def test_isotropic_values(task, step, loss):
    optimum = theory.optimal_one_layer(task)
    assert theory.optimal_step_size(task) / task.num_examples == pytest.approx(step, abs=5e-7)
    assert optimum.loss == pytest.approx(loss, abs=5e-7)
    np.testing.assert_allclose(
        optimum.matrix, theory.optimal_step_size(task) / task.num_examples * np.eye(10), atol=1e-14
    )


def test_noiseless_gaussian_optimum_is_that_of_ahn_and_zhang():
    task = RegressionTask(2, 7, inputs=Gaussian(SIGMA))
    gamma = (1 + 1 / 7) * SIGMA + np.trace(SIGMA) / 7 * np.eye(2)
    np.testing.assert_allclose(
        7 * theory.optimal_one_layer(task).matrix, np.linalg.inv(gamma), rtol=1e-13
    )


def test_outputs_add_up():
    single = theory.optimal_one_layer(BASE)
    double = theory.optimal_one_layer(RegressionTask(dim_y=2))
    assert double.loss == pytest.approx(2 * single.loss, rel=1e-14)
    np.testing.assert_array_equal(double.matrix, single.matrix)


def test_input_scale_curve_values_and_scaled_tasks():
    curve = theory.input_scale_curve(BASE, [0.5, 1, 1.5, 2])
    np.testing.assert_allclose(curve, [0.0812, 0.2062, 1.204, 8.401], rtol=7e-4)
    task, factors = SMALL["anisotropic, noise"], [0.5, 2.0]
    expected = [theory.gradient_descent_loss(0.3, task.scaled_inputs(f)) for f in factors]
    np.testing.assert_allclose(theory.input_scale_curve(task, factors, 0.3), expected, rtol=1e-13)


def test_saddle_levels_are_the_best_losses_of_each_rank():
    levels = theory.saddle_levels(BASE)
    np.testing.assert_allclose(levels[[0, 1, 2]], [0.4167, 0.3956, 0.3746], atol=5e-5)
    step = theory.optimal_step_size(BASE) / 10
    for rank in (0, 1, 4, 10):
        tensor = _tensor_of(step * np.diag(np.arange(10) < rank), BASE)
        loss = theory.one_layer_population_loss(tensor, BASE)
        assert loss == pytest.approx(levels[rank], rel=1e-12)


@pytest.mark.parametrize("task", [BASE, SMALL["Gaussian, noise"]], ids=["uniform", "noise"])
def test_excess_law_holds_for_any_deviation(task):
    optimum, law = theory.optimal_one_layer(task), theory.excess_law(task)
    change = 0.3 * np.random.default_rng(0).normal(size=optimum.matrix.shape)
    matrix = optimum.matrix + change
    delta = np.linalg.norm(change) / np.linalg.norm(optimum.matrix)
    loss = theory.one_layer_population_loss(_tensor_of(matrix, task), task)
    assert law.optimal_loss == optimum.loss
    assert loss / optimum.loss - 1 == pytest.approx(law.coefficient * delta**2, rel=1e-10)


def test_excess_keeps_its_digits_in_float32_and_under_jit_and_vmap():
    optimum = theory.optimal_one_layer(BASE).matrix
    tensors = jnp.stack([_tensor_of((1 + e) * optimum, BASE) for e in (1e-4, 1e-3)])
    exact = jax.vmap(lambda t: theory.one_layer_excess(t, BASE))(tensors)
    excess = jax.jit(theory.one_layer_excess, static_argnums=1)
    for i in range(2):
        value = excess(tensors[i].astype(jnp.float32), BASE)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact[i], rtol=5e-3)


def test_one_output_may_leave_out_its_axis_and_symmetry_is_not_needed():
    task = SMALL["uniform"]
    tensor = _random_tensor(task, seed=3)
    skew = tensor + jnp.zeros_like(tensor).at[0, 0, 1, 0].set(1.0).at[0, 1, 0, 0].set(-1.0)
    expected = theory.one_layer_population_loss(tensor, task)
    assert theory.one_layer_population_loss(tensor[0], task) == expected
    np.testing.assert_allclose(theory.one_layer_population_loss(skew, task), expected, rtol=1e-14)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"tensor must have shape \(1, 11, 11, 10\)"):
        theory.one_layer_population_loss(jnp.zeros((11, 11, 11)), BASE)
    with pytest.raises(ValueError, match="inputs must have mean 0"):
        theory.optimal_one_layer(BASE.with_inputs(Uniform(0, 1)))
    with pytest.raises(ValueError, match="inputs must have covariance v I"):
        theory.excess_law(SMALL["anisotropic, noise"])
    with pytest.raises(ValueError, match="dim_y must be 1"):
        theory.saddle_levels(RegressionTask(dim_y=2))
