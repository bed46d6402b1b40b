import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probes.regression import Split, ridge
from probes.syntax.sentence_probes import ProbeRecipe, two_layer

KEY = jax.random.key(0)
ROWS = 3000
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, ROWS, 6)).astype(np.float32)
PARTS = Split(*np.split(RNG.permutation(ROWS), [1800, 2400]))
QUADRATIC = np.stack([X[1, :, 0] * X[1, :, 1], X[1, :, 2] ** 2 - 1], 1)
NOISE = RNG.normal(size=(ROWS, 2)).astype(np.float32)


def r2(found, targets, part=PARTS.test):
    return 1 - ((found - targets)[part] ** 2).sum() / (targets[part] ** 2).sum()


def test_a_quadratic_target_is_found_where_ridge_finds_nothing_and_noise_is_not():
    targets = np.stack([QUADRATIC, NOISE])
    probe = two_layer(X, targets, PARTS, KEY)
    found = probe(X)
    assert found.shape == (2, 2, ROWS, 2)
    assert r2(found[0, 1], QUADRATIC) > 0.97
    assert abs(r2(found[0, 0], QUADRATIC)) < 0.03
    linear = ridge(jnp.asarray(X[:, :, None]), jnp.asarray(targets[:, :, None]), PARTS).r2
    assert float(linear[1, 0, 2]) < 0.03
    assert all(abs(r2(f, NOISE)) < 0.05 for f in found[1])
    # it stops before it learns the training rows by heart
    assert probe.stopped[1, 0] > 10 * probe.stopped[:, 1].max()
    assert all(abs(r2(f, NOISE, PARTS.train)) < 0.1 for f in found[1])


def test_a_linear_target_is_found_as_by_ridge():
    weight = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    y = X[1] @ weight + 2 * np.random.default_rng(2).normal(size=(ROWS, 3)).astype(np.float32)
    found = r2(two_layer(X, y[None], PARTS, KEY)(X)[0, 1], y)
    wanted = float(
        ridge(jnp.asarray(X[:, :, None]), jnp.asarray(y[None, :, None]), PARTS).r2[1, 0, 2]
    )
    assert wanted - 0.05 < found < wanted + 0.01


def test_units_do_not_matter_and_the_test_part_is_not_looked_at():
    plain = two_layer(X, QUADRATIC[None], PARTS, KEY)(X)
    scale, shift = np.float32([30, 1, 0.1, 7, 1, 1]), np.float32([0, 1e1, 0, 3, 0, 0])
    changed = 50 * QUADRATIC + 3
    changed[PARTS.test] = 1e4
    scaled = scale * X + shift
    found = two_layer(scaled, changed[None], PARTS, KEY)(scaled)
    np.testing.assert_allclose((found - 3) / 50, plain, atol=0.02)
    # columns that do not vary, and targets that do not, are no news
    flat = np.concatenate([X, np.full((2, ROWS, 1), 5, np.float32)], -1)
    assert r2(two_layer(flat, QUADRATIC[None], PARTS, KEY)(flat)[0, 1], QUADRATIC) > 0.95
    constant = two_layer(X, np.full((1, ROWS, 1), 0.3, np.float32), PARTS, KEY)(X)
    np.testing.assert_allclose(constant, 0.3, atol=1e-6)


def test_of_all_weights_those_that_are_best_on_validation_rows_are_kept():
    small = Split(PARTS.train[:40], PARTS.validation, PARTS.test)
    long = ProbeRecipe(steps=600, checks=60)
    stopped = two_layer(X, QUADRATIC[None], small, KEY, long)
    last = two_layer(X, QUADRATIC[None], small, KEY, ProbeRecipe(steps=600, checks=1))
    part = small.validation
    scores = [r2(p(X)[0, 1], QUADRATIC, part) for p in (stopped, last)]
    assert scores[0] > max(scores[1], 0) and 0 < stopped.stopped[1, 0] < 600


def test_bad_input():
    with pytest.raises(ValueError, match="with the same rows"):
        two_layer(X, QUADRATIC[None, :9], PARTS, KEY)
    with pytest.raises(ValueError, match="with the same rows"):
        two_layer(X, QUADRATIC, PARTS, KEY)
    with pytest.raises(ValueError, match="hidden is 0, must be an integer of at least 1"):
        ProbeRecipe(hidden=0)
    with pytest.raises(ValueError, match="checks is 7, must divide steps, 1500"):
        ProbeRecipe(checks=7)
