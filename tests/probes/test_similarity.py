"""Similarity measures against closed forms, and against what each of them must not see."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.gradient_descent.construction import GradientDescent
from probes.similarity import (
    linear_cka,
    prediction_distance,
    procrustes,
    sensitivity,
    sensitivity_cosine,
)

pytestmark = pytest.mark.usefixtures("x64")

SIZES = {"dim_x": 3, "dim_y": 2, "num_examples": 5}


def inputs(queries=4, batch=6):
    rng = np.random.default_rng(0)
    shapes = ((batch, 5, 3), (batch, 5, 2), (batch, queries, 3))
    return tuple(jnp.asarray(rng.normal(size=s)) for s in shapes)


def built(**settings):
    construction = GradientDescent(**SIZES, **settings)
    model = construction.compile().model
    return construction, jax.jit(lambda *inputs: construction.apply(model, *inputs))


def test_sensitivity_is_the_weight():
    """Of gradient descent: d (W_K x) / d x = W_K, for every query."""
    construction, apply = built(steps=3, step_size=0.4, init_weight=np.ones((2, 3)))
    weight = construction.trace(*inputs())["weight"][:, -1]
    found = sensitivity(apply, inputs())
    assert found.shape == (6, 4, 2, 3)
    assert np.allclose(found, weight[:, None], rtol=0, atol=1e-12)


def test_sensitivity_is_that_of_the_own_token():
    """Tokens that see each other, against central differences."""

    def apply(z, scale):
        return jnp.tanh(z).sum((1, 2), keepdims=True) * z[..., :2] * scale

    z, scale = inputs()[0], jnp.full((6, 1, 1), 0.7)
    found, step = sensitivity(apply, (z, scale), argnum=0), 1e-5
    assert found.shape == (6, 5, 2, 3)
    for token in range(5):
        for i in range(3):
            high, low = (apply(z.at[:, token, i].add(s), scale)[:, token] for s in (step, -step))
            assert np.allclose(found[:, token, :, i], (high - low) / (2 * step), atol=1e-8)


def test_step_size_is_seen_by_all_but_the_cosine():
    _, apply = built(step_size=1.0)
    _, scaled = built(step_size=1.1)
    distance = prediction_distance(scaled, apply, inputs())
    predictions = np.asarray(apply(*inputs()))
    assert float(distance.relative) == pytest.approx(0.1)
    norms = np.sqrt((predictions**2).sum(-1))
    assert float(distance.mean_norm) == pytest.approx(0.1 * norms.mean())
    assert float(sensitivity_cosine(scaled, apply, inputs())) == pytest.approx(1.0, abs=1e-14)
    assert float(sensitivity_cosine(lambda *z: -apply(*z), apply, inputs())) == pytest.approx(-1.0)


def test_cosine_of_two_algorithms():
    (one, apply), (two, other) = built(steps=1, step_size=0.5), built(steps=4, step_size=0.5)
    a, b = (np.asarray(c.trace(*inputs())["weight"][:, -1]).reshape(6, -1) for c in (one, two))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = float(sensitivity_cosine(apply, other, inputs()))
    assert found == pytest.approx(cosines.mean())
    assert found < 0.99
    flat = float(sensitivity_cosine(lambda x, y, q: 0 * q[..., :2], apply, inputs()))
    assert flat == 0


def test_functions_that_jax_cannot_trace_are_refused():
    _, apply = built()

    def elsewhere(x, y, query):
        return np.asarray(apply(*map(jnp.asarray, map(np.asarray, (x, y, query)))))

    with pytest.raises(ValueError, match="apply cannot be traced by JAX, so it has no derivative"):
        sensitivity_cosine(elsewhere, apply, inputs())

    def at_fault(*_):
        raise TypeError("a mistake of its own")

    with pytest.raises(TypeError, match="of its own"):
        sensitivity_cosine(at_fault, apply, inputs())


def test_bad_inputs():
    _, apply = built()
    x, y, query = inputs()
    with pytest.raises(TypeError, match="input 2 has dtype int"):
        sensitivity(lambda x, y, q: 1.0 * q, (x, y, query.astype(int)))
    with pytest.raises(ValueError, match="input 0 has shape"):
        sensitivity(apply, (x, y, query), argnum=0)
    with pytest.raises(ValueError, match="predictions have shapes"):
        prediction_distance(apply, lambda *z: apply(*z)[:, :1], inputs())
    with pytest.raises(ValueError, match="3 and 3 samples, must be equal numbers of at least 4"):
        linear_cka(jnp.ones((3, 2)), jnp.ones((3, 2)), debiased=True)
    with pytest.raises(ValueError, match="5 and 4 samples"):
        linear_cka(jnp.ones((5, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="activations have shapes"):
        procrustes(jnp.ones((5, 2)), jnp.ones((5, 3)))


def activations(samples=12, features=(5, 4)):
    rng = np.random.default_rng(1)
    a = rng.normal(size=(samples, features[0]))
    return a, a[:, : features[1]] ** 2 + rng.normal(size=(samples, features[1]))


def rotation(size, seed=2):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_invariances(debiased):
    a, b = activations()
    cka = jax.jit(partial(linear_cka, debiased=debiased))
    value = float(cka(a, b))
    for same in (3 * a, a + np.arange(5), a @ rotation(5), -0.1 * a @ rotation(5, 3) + 1):
        assert float(cka(same, b)) == pytest.approx(value, abs=1e-12)
        assert float(cka(b, same)) == pytest.approx(value, abs=1e-12)
    assert float(cka(a, 2 * a @ rotation(5))) == pytest.approx(1.0)
    assert abs(float(cka(a @ np.diag([5, 1, 1, 1, 0.2]), b)) - value) > 0.01


def test_cka_is_the_kernel_alignment():
    a, b = activations()
    n = len(a)
    centre = np.eye(n) - 1 / n
    k, m = a @ a.T, b @ b.T

    def hsic(k, m):
        return np.trace(k @ centre @ m @ centre)

    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert float(linear_cka(jnp.asarray(a), jnp.asarray(b))) == pytest.approx(expected)


def test_debiased_cka_is_the_u_statistic():
    """HSIC as the mean over all distinct (i, j, q, r) of k_ij (m_ij + m_qr - 2 m_iq)."""
    a, b = activations(samples=7)
    k, m = a @ a.T, b @ b.T

    def hsic(k, m):
        terms = [
            k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
            for i, j, q, r in np.ndindex(7, 7, 7, 7)
            if len({i, j, q, r}) == 4
        ]
        return np.mean(terms)

    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    found = float(linear_cka(jnp.asarray(a), jnp.asarray(b), debiased=True))
    assert found == pytest.approx(expected)


def test_debiasing_is_needed():
    """Independent activations, more features than samples."""
    a, b = jax.random.normal(jax.random.key(0), (2, 40, 200))
    assert linear_cka(a, b) > 0.7
    assert abs(linear_cka(a, b, debiased=True)) < 0.1


def test_procrustes():
    a, _ = activations()
    found = procrustes(jnp.asarray(a), jnp.asarray(a @ rotation(5)))
    assert found.residual < 1e-12
    assert np.allclose(found.rotation, rotation(5))
    b = np.random.default_rng(4).normal(size=a.shape)
    best = procrustes(jnp.asarray(a), jnp.asarray(b))
    assert np.allclose(best.rotation @ best.rotation.T, np.eye(5))
    for seed in range(50):  # no orthogonal map does better, near the best one or far away
        near = best.rotation @ rotation_near(seed)
        for other in (near, rotation(5, seed)):
            assert np.linalg.norm(a @ other - b) / np.linalg.norm(b) >= best.residual
    turned = procrustes(jnp.asarray(a @ rotation(5)), jnp.asarray(b @ rotation(5, 3)))
    assert float(turned.residual) == pytest.approx(float(best.residual))
    assert procrustes(jnp.asarray(1.1 * a), jnp.asarray(a)).residual == pytest.approx(0.1)


def rotation_near(seed):
    skew = np.random.default_rng(seed).normal(size=(5, 5)) / 100
    skew = skew - skew.T
    return np.linalg.solve(np.eye(5) + skew, np.eye(5) - skew)
