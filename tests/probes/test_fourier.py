"""The degree spectrum against sums over characters, closed forms and algorithms in numpy."""

from itertools import combinations

import jax
import numpy as np
import pytest
from numpy.random import default_rng

from constructions.core.compile import compile_program
from constructions.core.transformer import randomise
from constructions.gradient_descent.construction import GradientDescent
from constructions.mesa.ridge import MesaRidge
from probes.context import (
    Spectrum,
    all_subsets,
    degree_weights,
    spectrum,
    subset_predictions,
    walsh_hadamard,
)


def by_characters(values: np.ndarray) -> np.ndarray:
    """Coefficients as means of products with characters, one set at a time."""
    subsets = np.arange(len(values))
    signs = [
        np.prod([1 - 2 * (subsets >> i & 1) for i in range(20) if s >> i & 1] or [subsets**0], 0)
        for s in subsets
    ]
    return np.array([(values * sign).mean() for sign in signs])


def test_transform_is_the_sum_over_characters() -> None:
    values = default_rng(0).normal(size=32)
    assert np.allclose(walsh_hadamard(values), by_characters(values), rtol=0, atol=1e-15)
    columns = default_rng(1).normal(size=(16, 3, 2))
    each = [walsh_hadamard(columns[:, i, j]) for i in range(3) for j in range(2)]
    assert np.allclose(walsh_hadamard(columns).reshape(16, -1).T, each, rtol=0, atol=1e-15)


def test_weights_sum_to_the_mean_square() -> None:
    values = default_rng(0).normal(size=(64, 5))
    assert np.isclose(degree_weights(values).sum(), (values**2).mean(), rtol=1e-13)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_a_product_of_signs_has_one_degree(degree: int) -> None:
    subsets = np.arange(64)
    values = np.prod([1 - 2 * (subsets >> i & 1) for i in range(degree)], 0).astype(float)
    weights = degree_weights(values)
    assert weights[degree] == 1 and weights.sum() == 1
    assert Spectrum(weights, 1e-16).degree == degree


def descend(x: np.ndarray, y: np.ndarray, query: np.ndarray, steps: int, rate: float) -> float:
    """Gradient descent on whatever pairs there are, written out."""
    weight = np.zeros(x.shape[1])
    for _ in range(steps):
        weight = weight - rate * sum(((weight @ a - b) * a for a, b in zip(x, y, strict=True)), 0.0)
    return weight @ query


def on_subsets(algorithm, x: np.ndarray, y: np.ndarray) -> np.ndarray:  # noqa: ANN001
    subsets = [[i for i in range(len(x)) if s >> i & 1] for s in range(2 ** len(x))]
    return np.array([algorithm(x[s], y[s]) for s in subsets])


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = default_rng(3)
    x = rng.normal(size=(8, 4))
    return x, x @ rng.normal(size=4), rng.normal(size=4)


def share_above(values: np.ndarray, degree: int) -> float:
    return Spectrum(degree_weights(values), 2e-16).above(degree)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_k_steps_have_degree_k(problem: tuple[np.ndarray, ...], steps: int) -> None:
    x, y, query = problem
    values = on_subsets(lambda a, b: descend(a, b, query, steps, 0.5 / len(x)), x, y)
    assert share_above(values, steps) < 1e-20
    assert steps == 1 or share_above(values, steps - 1) > 1e-6
    assert Spectrum(degree_weights(values), 2e-16).degree == steps


def test_what_is_no_sum_over_examples(problem: tuple[np.ndarray, ...]) -> None:
    x, y, query = problem

    def own_length(a: np.ndarray, b: np.ndarray) -> float:
        return descend(a, b, query, 1, 0.5 / max(len(a), 1))

    def ridge(a: np.ndarray, b: np.ndarray) -> float:
        return np.linalg.solve(a.T @ a + 0.1 * np.eye(4), a.T @ b) @ query

    def softmax(a: np.ndarray, b: np.ndarray) -> float:
        weights = np.exp(a @ query)
        return weights @ b / max(weights.sum(), 1e-300)

    for algorithm in (own_length, ridge, softmax):
        assert share_above(on_subsets(algorithm, x, y), 1) > 0.02, algorithm.__name__
    for algorithm in (ridge, softmax):
        assert share_above(on_subsets(algorithm, x, y), 1) > 0.1, algorithm.__name__


def test_compiled_models_have_the_spectrum_of_their_algorithm() -> None:
    """And random models of the class keep the bound of the class, which GD++ reaches."""
    with jax.enable_x64(True):
        for steps, curvature in ((1, 0.0), (2, 0.0), (2, 0.05)):
            c = GradientDescent(3, 1, 4, steps, 0.6, curvature)
            inputs = c.sample(jax.random.key(steps), 4)
            model = c.compile().model
            found = spectrum(c, model, inputs)
            most = (3**steps - 1) // 2  # three tokens a layer
            bound = most if curvature else steps
            assert found.degree == bound and found.above(bound) < 1e-20
            x, y, query = (np.asarray(a) for a in inputs)
            if not curvature:
                each = [
                    on_subsets(
                        lambda a, b, q=q, k=steps: descend(a, b, q[0], k, 0.6 / 4), u, v[:, 0]
                    )
                    for u, v, q in zip(x, y, query, strict=True)
                ]
                assert np.allclose(found.weights, degree_weights(np.stack(each, 1)), atol=1e-15)
            random = spectrum(c, randomise(model, jax.random.key(1), 0.5), inputs)
            assert random.above(most) < 1e-20
            assert steps == 1 or random.degree > steps


def test_examples_are_removed_and_not_set_to_zero() -> None:
    """For softmax attention that is not the same; for linear attention it is."""
    with jax.enable_x64(True):
        distance = {}
        for mixer in ("linear", "softmax"):
            c = GradientDescent(3, 1, 4, 1, 0.6)
            model = compile_program(c._program(mixer=mixer, keys="context"))
            x, y, query = c.sample(jax.random.key(0), 4)
            zeroed = c.apply(model, x.at[:, 1].set(0), y.at[:, 1].set(0), query)
            (removed,) = subset_predictions(c, model, [(x, y, query)], [[0, 2, 3]])
            distance[mixer] = float(np.abs(np.asarray(zeroed) - removed).max())
        assert distance["linear"] < 1e-15 and distance["softmax"] > 1e-3


def test_other_examples_stay() -> None:
    with jax.enable_x64(True):
        c = GradientDescent(3, 1, 4, 1, 0.6)
        model, inputs = c.compile().model, c.sample(jax.random.key(0), 2)
        found = all_subsets(c, model, inputs, 2)
        assert found.shape[0] == 4
        assert np.allclose(found[3], c.apply(model, *inputs), atol=1e-15)
        x, y, query = inputs
        assert np.allclose(found[2], c.apply(model, x[:, 1:], y[:, 1:], query), atol=1e-15)


def test_states_of_a_sequence_are_removed() -> None:
    """Against ridge regression on the shorter sequence."""
    with jax.enable_x64(True):
        c = MesaRidge(2, 5, "constructed", regularization=0.5)
        (states,) = c.sample(jax.random.key(0), 3)
        model = c.compile().model
        for kept in combinations(range(4), 2):
            (found,) = subset_predictions(c, model, [(states,)], [kept])
            short = states[:, [*kept, 4]]
            want = c.trace(short)["prediction"][:, -1]
            assert np.allclose(found, want, rtol=0, atol=1e-12)


def test_refused() -> None:
    c = GradientDescent(3, 1, 14)
    model, inputs = c.compile().model, c.sample(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="examples is 13, must be at most 12"):
        spectrum(c, model, inputs, 13)
    with pytest.raises(ValueError, match="examples is 0, must be 1 to 14"):
        spectrum(c, model, inputs, 0)
    with pytest.raises(ValueError, match="6 subsets, must be a power of 2"):
        walsh_hadamard(np.zeros(6))
