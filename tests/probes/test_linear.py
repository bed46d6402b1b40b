import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probes.regression import logistic_probe, ridge, ridge_probe, split

KEY = jax.random.key(0)


def planted(batch=400, tokens=3, features=7, targets=2, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-2, 2, features)
    x = rng.normal(size=(batch, tokens, features)) * scales + 5
    w = rng.normal(size=(features, targets)) / scales[:, None]
    y = x @ w + 3 + noise * rng.normal(size=(batch, tokens, targets))
    return x.astype(np.float32), y.astype(np.float32), w


def test_a_planted_linear_map_is_found_in_float32():
    x, y, w = planted()
    found = ridge_probe(x, y, key=KEY)
    assert found.r2 > 0.9999
    assert found.r2_train > 0.9999
    assert -0.05 < found.control_r2 < 0.02
    assert found.selectivity > 0.95
    np.testing.assert_allclose(found.weight, w, rtol=0.01, atol=1e-3 * np.abs(w).max())
    np.testing.assert_allclose(x @ found.weight + found.bias, y, atol=0.01 * y.std())


def test_noise_bounds_what_is_explained():
    x, y, _ = planted(batch=2000, features=2, targets=1, noise=1.0)
    signal = np.var(y) - 1.0
    assert ridge_probe(x, y, key=KEY).r2 == pytest.approx(signal / (signal + 1.0), abs=0.05)


def test_ridge_equals_the_normal_equations(x64):
    x, y, _ = planted(batch=60, noise=2.0)
    x, y = np.asarray(x, float), np.asarray(y, float)
    parts = split(KEY, 60)
    found = ridge(jnp.asarray(x)[None], jnp.asarray(y)[None], parts)
    flat = [(x[p].reshape(-1, 7), y[p].reshape(-1, 2)) for p in parts]
    (a, b), (c, d) = flat[0], flat[2]
    s = a.std(0)
    a, c = (a - flat[0][0].mean(0)) / s, (c - flat[0][0].mean(0)) / s
    penalty = float(found.regularization[0, 0])
    w = np.linalg.solve(a.T @ a / len(a) + penalty * np.eye(7), a.T @ (b - b.mean(0)) / len(a))
    error = d - b.mean(0) - c @ w
    r2 = 1 - (error**2).sum() / ((d - b.mean(0)) ** 2).sum()
    np.testing.assert_allclose(found.r2[0, 0, 2], r2, rtol=1e-10)


def test_more_features_than_samples():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 300))
    y = x[:, :1] + 0.1 * rng.normal(size=(50, 1))
    found = ridge_probe(x, y, key=KEY)
    assert found.r2_train <= 1 and -1 < found.r2 < 0.9
    noise = ridge_probe(x, rng.normal(size=(50, 1)), key=KEY)
    assert -1 < noise.r2 < 0.3


def test_columns_without_variance_and_constant_targets():
    x, y, _ = planted()
    x = np.concatenate([x, np.full_like(x[..., :1], 7.1), 0 * x[..., :1]], -1)
    assert ridge_probe(x, y, key=KEY).r2 > 0.9999
    constant = ridge_probe(x, np.full_like(y, 0.3), key=KEY)
    assert np.isnan(constant.r2)
    np.testing.assert_allclose(constant.bias, 0.3, rtol=1e-5)


def test_parts_do_not_overlap_and_copies_stay_together():
    parts = split(KEY, 103)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(103))
    assert [len(p) for p in parts] == [62, 20, 21]
    groups = np.arange(120) // 4
    parts = split(KEY, 120, groups)
    members = [set(groups[p]) for p in parts]
    assert not members[0] & members[1] and not members[0] & members[2]
    assert not members[1] & members[2]
    assert sum(map(len, parts)) == 120


def test_copies_of_sequences_leak_unless_grouped():
    """Noise targets, every sequence four times: memorising pays only if copies are split up."""
    rng = np.random.default_rng(2)
    x = np.repeat(rng.normal(size=(60, 200)), 4, axis=0)
    y = np.repeat(rng.normal(size=(60, 1)), 4, axis=0)
    assert ridge_probe(x, y, key=KEY).r2 > 0.8
    assert ridge_probe(x, y, key=KEY, groups=np.arange(240) // 4).r2 < 0.3


def test_tokens_of_a_sequence_stay_together():
    """Targets that are one random number a sequence cannot be predicted for new sequences."""
    rng = np.random.default_rng(3)
    name = rng.normal(size=(60, 1, 200))
    x = np.broadcast_to(name, (60, 10, 200)) + 1e-3 * rng.normal(size=(60, 10, 200))
    y = np.broadcast_to(rng.normal(size=(60, 1, 1)), (60, 10, 1))
    assert ridge_probe(x, y, key=KEY).r2 < 0.3


def classes(batch=300, tokens=2, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (batch, tokens))
    centres = 3 * np.eye(3, 5) * 10.0 ** np.arange(-1, 4)
    noise = rng.normal(size=(batch, tokens, 5)) * 0.2 * 10.0 ** np.arange(-1, 4)
    return (centres[labels] + noise).astype(np.float32), labels


def test_logistic_probe_against_controls():
    x, labels = classes()
    found = logistic_probe(x, labels, key=KEY)
    assert found.accuracy > 0.99 and found.accuracy_train > 0.99
    assert found.cross_entropy < 0.05
    assert 0.25 < found.control_accuracy < 0.45 and 0.25 < found.majority < 0.45
    assert found.selectivity > 0.5
    predicted = (x @ found.weight + found.bias).argmax(-1)
    assert np.mean(predicted == labels) > 0.99


def test_logistic_probe_is_stationary(x64):
    """At the optimum the penalised gradient is zero; numpy computes it."""
    x, labels = classes()
    x = np.asarray(x, float)
    labels = np.where(np.random.default_rng(1).random(labels.shape) < 0.2, 0, labels)
    found = logistic_probe(x, labels, key=KEY, steps=200)
    train = split(jax.random.split(KEY)[0], len(x)).train
    a, t = x[train].reshape(-1, 5), np.eye(3)[labels[train].ravel()]
    logits = a @ found.weight + found.bias
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    s = a.std(0)
    standard = (a - a.mean(0)) / s
    w = found.weight * s[:, None]
    gradient = standard.T @ (p - t) / len(a) + found.regularization * w
    assert np.abs(gradient).max() < 1e-6
    assert np.abs((p - t).mean(0)).max() < 1e-6


def test_logistic_scores_are_held_out():
    rng = np.random.default_rng(5)
    x, labels = rng.normal(size=(80, 1, 100)), rng.integers(0, 2, (80, 1))
    found = logistic_probe(x.astype(np.float32), labels, key=KEY)
    assert found.accuracy_train > 0.95 and found.accuracy < 0.85


@pytest.mark.slow
def test_logistic_control_task_by_type_can_be_memorised():
    """Features that name the type: the control task is as easy as the task, selectivity is 0."""
    rng = np.random.default_rng(4)
    types = rng.integers(0, 8, (300, 4))
    x = np.eye(8, dtype=np.float32)[types]
    labels = rng.integers(0, 3, 8)[types]
    found = logistic_probe(x, labels, key=KEY, types=types)
    assert found.accuracy > 0.99 and found.control_accuracy > 0.99
    assert abs(found.selectivity) < 0.01


def test_bad_arguments():
    x, y, _ = planted(batch=20)
    with pytest.raises(ValueError, match="must agree in all axes but the last"):
        ridge_probe(x, y[:, 0], key=KEY)
    with pytest.raises(ValueError, match="features holds NaN"):
        ridge_probe(np.full_like(x, np.nan), y, key=KEY)
    with pytest.raises(ValueError, match="too few"):
        ridge_probe(x[:2], y[:2], key=KEY)
    with pytest.raises(ValueError, match="groups has shape"):
        ridge_probe(x, y, key=KEY, groups=np.zeros(3))
    with pytest.raises(ValueError, match="must be integers of shape"):
        logistic_probe(x, y[..., 0], key=KEY)
