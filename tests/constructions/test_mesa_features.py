"""Ridge regression on features from raw states, against numpy; and how much the features matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.family import verify
from constructions.mesa.ridge import MesaFeatures, MesaRidge

RIDGE = 1e-3


def gelu(u):
    return u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))


def ridge(c, sequence):
    """Predictions at every time by least squares on rows sqrt(rho) I under the pairs so far."""
    read, write = c.task.network
    f = gelu(sequence @ read.T) @ write.T
    phi = f / np.linalg.norm(f, axis=1, keepdims=True)
    found = [np.zeros(c.dim)]  # before any pair is seen
    for t in range(1, len(sequence)):
        rows = np.concatenate([phi[:t], np.sqrt(c.regularization) * np.eye(c.dim)])
        values = np.concatenate([sequence[1 : t + 1], np.zeros((c.dim, c.dim))])
        found.append(phi[t] @ np.linalg.lstsq(rows, values, rcond=None)[0])
    return phi, np.stack(found)


def test_ridge_on_features_from_raw_states(x64):
    c = MesaFeatures(3, 9, hidden=5, regularization=RIDGE)
    given = np.random.default_rng(0).normal(size=(4, 7, 3))
    model = c.compile().model
    phi, expected = map(np.stack, zip(*(ridge(c, s) for s in given), strict=True))
    # the pair (phi = 0, s_1) of the first time adds nothing to the fit
    np.testing.assert_allclose(c.predict(model, given), expected, atol=1e-11)
    held = c.read(model, jnp.asarray(given))
    np.testing.assert_allclose(held["features"], phi, atol=1e-13)
    np.testing.assert_allclose(held["previous"][:, 1:], phi[:, :-1], atol=1e-13)
    np.testing.assert_allclose(held["previous"][:, 0], 0, atol=1e-13)


def test_certificate():
    certificate = verify(MesaFeatures(3, 9, hidden=5, regularization=RIDGE), batch=32)
    assert certificate.passed, certificate
    assert certificate.errors[0].dtype == "float64"
    assert certificate.errors[0].max_rel_error < 1e-11


def test_features_matter_and_so_does_every_part():
    """On the task, ridge regression on raw states is far behind, as are the near misses."""
    c = MesaFeatures(3, 24, hidden=16)
    batch = c.task.sample(jax.random.key(0), 256)
    states = batch.inputs[0]
    run = jax.jit(lambda model: c.task.loss_by_position(c.apply(model, states), batch))

    def late(prediction):
        return float(c.task.loss_by_position(prediction, batch)[:, 12:].mean())

    exact = late(c.trace(states)["prediction"])
    assert exact < 2 * c.task.noise_floor
    raw = late(MesaRidge(3, 24, regularization=c.regularization).trace(states)["prediction"])
    assert raw > 20 * exact
    missed = {n: float(run(near.model)[:, 12:].mean()) for n, near in c.near_misses().items()}
    assert missed.pop("ridge on states") == pytest.approx(raw, rel=1e-2)
    assert missed.pop("features of another network") > 20 * exact
    assert min(missed.values()) > 2 * exact, missed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim is 0, must be"),
        ({"tokens": "constructed"}, "tokens is 'constructed', must be 'raw'"),
        ({"regularization": 0.0}, "regularization is 0.0, must be above 0"),
        ({"hidden": 0}, "hidden is 0, must be an integer of at least 1"),
        ({"scale": -1.0}, "scale is -1.0, must be above 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MesaFeatures(**settings)
