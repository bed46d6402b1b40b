"""Nonlinear systems: features by hand, a law that acts on them, states that stay bounded."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.tasks.dynamics import NonlinearDynamics, old_normal

TASK = NonlinearDynamics(dim=4, length=12, noise=0.0, hidden=7)


def gelu(u):
    return u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))


def features(task, states):
    """One state after another."""
    read, write = task.network
    flat = np.reshape(states, (-1, task.dim))
    f = [sum(gelu(read[h] @ s) * write[:, h] for h in range(task.hidden)) for s in flat]
    return np.reshape([v / np.linalg.norm(v) for v in f], np.shape(states))


def sequences(task, batch=5):
    """Inputs and the last target, `[batch, length + 1, dim]`."""
    found = task.sample(jax.random.key(0), batch)
    (inputs,), target = found.inputs, np.asarray(found.target)
    np.testing.assert_array_equal(inputs[:, 1:], target[:, :-1])
    assert inputs.shape == target.shape == (batch, task.length, task.dim)
    return np.concatenate([inputs, target[:, -1:]], 1)


def test_features_by_hand(x64):
    states = np.random.default_rng(1).normal(size=(2, 3, 4))
    np.testing.assert_allclose(
        TASK.features(jnp.asarray(states)), features(TASK, states), atol=1e-14
    )
    np.testing.assert_array_equal(TASK.features(jnp.zeros((2, 4))), np.zeros((2, 4)))


def test_states_follow_an_orthogonal_law_of_their_features(x64):
    found = sequences(TASK)
    laws = []
    for sequence in found:
        phi = features(TASK, sequence[:-1])
        solved, residual, rank, _ = np.linalg.lstsq(phi, sequence[1:], rcond=None)
        assert rank == 4 and residual.max() < 1e-20
        np.testing.assert_allclose(solved @ solved.T, np.eye(4), atol=1e-9)
        laws.append(solved)
    assert np.abs(laws[0] - laws[1]).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(found[:, 1:], axis=-1), 1, atol=1e-12)
    assert np.abs(found[:, 0]).max() <= TASK.start
    assert np.abs(found[:, 0]).max() > 0.8 * TASK.start


def test_the_network_is_the_seed_s_in_both_dtypes():
    single = np.asarray(TASK.features(jnp.ones((1, 4), jnp.float32)))
    with jax.enable_x64(True):
        double = np.asarray(TASK.features(jnp.ones((1, 4))))
    np.testing.assert_allclose(single, double, atol=1e-6)
    other = replace(TASK, seed=1).network.read
    assert np.abs(other - TASK.network.read).max() > 0.1
    wide = NonlinearDynamics(dim=30, hidden=400, scale=0.7).network
    assert np.std(wide.read) == pytest.approx(0.7, rel=0.03)
    assert np.std(wide.write) == pytest.approx(0.7, rel=0.03)


def test_the_numbers_of_old_versions_of_jax():
    """Recorded: `jax.random.normal(PRNGKey(421), shape)` under `jax_threefry_partitionable=False`.

    An odd number of words pads the cipher's last block.
    """
    even, odd = old_normal(421, 10, 40), old_normal(421, 3, 5)
    first = [0.19035506, -1.1530131, 1.1422745, 0.20542186]
    np.testing.assert_allclose(even[0, :4], first, atol=1e-5)
    np.testing.assert_allclose(
        odd.ravel()[[0, 7, 14]], [0.49508107, 0.37192532, -1.4108205], atol=1e-5
    )
    network = NonlinearDynamics().network
    assert network.read[1, 0] == pytest.approx(1.1 * first[1], abs=1e-5)
    assert network.write[1, 0] == pytest.approx(1.1 * 0.9532547, abs=1e-5)  # PRNGKey(422), [0, 1]


def test_noise_floor_is_reached_by_the_law():
    task = replace(TASK, noise=0.2, length=500)
    key = jax.random.key(3)
    batch = task.sample(key, 8)
    law = jax.random.orthogonal(jax.random.split(key, 3)[0], 4, (8,))
    known = jnp.einsum("bij,btj->bti", law, task.features(batch.inputs[0]))
    assert float(task.loss(known, batch).mean()) == pytest.approx(task.noise_floor, rel=0.05)


def test_hashable_and_the_same_inside_jit():
    sample = jax.jit(lambda task, key: task.sample(key, 3), static_argnums=0)
    inside, outside = sample(TASK, jax.random.key(2)), TASK.sample(jax.random.key(2), 3)
    np.testing.assert_allclose(inside.target, outside.target, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim is 0, must be an integer of at least 1"),
        ({"length": 0}, "length is 0, must be an integer of at least 1"),
        ({"hidden": 0}, "hidden is 0, must be an integer of at least 1"),
        ({"noise": np.inf}, "noise is inf, must be a finite number of at least 0"),
        ({"scale": 0.0}, "scale is 0.0, must be above 0"),
        ({"start": -1.0}, "start is -1.0, must be above 0"),
        ({"seed": -1}, "seed is -1, must be an integer of at least 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TASK, **changes)
