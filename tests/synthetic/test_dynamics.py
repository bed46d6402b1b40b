"""Dynamical systems: laws of the promised kind, states that follow them, losses by hand."""

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.tasks.dynamics import LinearDynamics

TASK = LinearDynamics(dim=4, length=9, noise=0.0)


def states(task: LinearDynamics, batch: int = 6) -> np.ndarray:
    """Inputs and the last target, `[batch, length + 1, dim]`."""
    found = task.sample(jax.random.key(0), batch)
    (inputs,), target = found.inputs, np.asarray(found.target)
    np.testing.assert_array_equal(inputs[:, 1:], target[:, :-1])
    assert inputs.shape == target.shape == (batch, task.length, task.dim)
    return np.concatenate([inputs, target[:, -1:]], 1)


def law(sequence: np.ndarray) -> np.ndarray:
    """W from states without noise, by least squares."""
    before, after = sequence[:-1], sequence[1:]
    found, residual, rank, _ = np.linalg.lstsq(before, after, rcond=None)
    assert rank == before.shape[1] and residual.max() < 1e-16
    return found.T


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (0.6, 0.9)])
def test_states_follow_a_law_with_these_singular_values(x64, bounds):
    found = states(replace(TASK, singular_values=bounds))
    laws = [law(sequence) for sequence in found]
    values = np.linalg.svd(np.stack(laws))[1]
    assert values.min() > bounds[0] - 1e-9 and values.max() < bounds[1] + 1e-9
    assert np.abs(laws[0] - laws[1]).max() > 0.1
    if bounds[0] < bounds[1]:
        assert np.ptp(values) > 0.1


def test_orthogonal_laws_are_haar():
    w = np.asarray(replace(TASK, dim=3).laws(jax.random.key(1), 20_000))
    np.testing.assert_allclose(w.mean(0), 0, atol=0.02)
    np.testing.assert_allclose((w**2).mean(0), 1 / 3, atol=0.01)
    # the trace of Haar matrices has variance 1 and mean 0; a QR without its signs has not
    trace = np.trace(w, axis1=1, axis2=2)
    assert abs(trace.mean()) < 0.03 and abs(trace.var() - 1) < 0.05


def test_contracting_laws_are_turned_on_both_sides():
    task = replace(TASK, dim=3, singular_values=(0.2, 0.9))
    w = np.asarray(task.laws(jax.random.key(1), 20_000))
    s = np.linspace(0.2, 0.9, 10_001)
    squares, spread = np.mean(s**2), np.var(s**2)
    for gram in (w @ w.mT, w.mT @ w):
        np.testing.assert_allclose(gram.mean(0), squares * np.eye(3), atol=0.01)
        # a Haar rotation of eigenvalues drawn independently: Var / (dim + 2) off the diagonal
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert np.mean(gram[:, i, j] ** 2) == pytest.approx(spread / 5, rel=0.06)


@pytest.mark.parametrize("hidden_dim", [None, 6])
def test_first_states_are_spread_alike_in_all_directions(hidden_dim):
    task = replace(TASK, length=1, hidden_dim=hidden_dim)
    first = np.asarray(task.sample(jax.random.key(3), 20_000).inputs[0])[:, 0]
    # uniform in [-1, 1); seen through C, of which every sequence has its own, as spread as that
    np.testing.assert_allclose(first.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(first.T @ first / len(first), np.eye(4) / 3, atol=0.02)
    if hidden_dim is None:
        assert -1 <= first.min() < -0.999 and 0.999 < first.max() < 1
        np.testing.assert_allclose(np.mean(first**4), 1 / 5, atol=0.01)


def test_a_fixed_law_is_shared(x64):
    found = states(replace(TASK, fixed=3))
    np.testing.assert_allclose(law(found[0]), law(found[1]), atol=1e-8)
    assert np.abs(found[0] - found[1]).max() > 0.1
    other = law(states(replace(TASK, fixed=4))[0])
    assert np.abs(law(found[0]) - other).max() > 0.1


def test_hidden_states_have_a_law_of_their_own_size(x64):
    found = states(replace(TASK, hidden_dim=6, length=20))
    sequence = found[0]
    assert np.linalg.lstsq(sequence[:-1], sequence[1:], rcond=None)[1].max() > 1e-3
    # states of 6 dimensions: two successive views of 4 determine the next
    both = np.concatenate([sequence[:-2], sequence[1:-1]], 1)
    fitted = both @ np.linalg.lstsq(both, sequence[2:], rcond=None)[0]
    np.testing.assert_allclose(fitted, sequence[2:], atol=1e-8)


def test_noise_and_its_floor():
    task = replace(TASK, noise=0.3, fixed=0, length=2000)
    batch = task.sample(jax.random.key(5), 8)
    w = task.laws(jax.random.key(9), 1)[0]
    known = batch.inputs[0] @ w.T
    assert float(task.loss(known, batch).mean()) == pytest.approx(task.noise_floor, rel=0.03)
    start = np.asarray(batch.inputs[0][:, 0])
    assert np.abs(start).max() <= 1


def test_losses_by_hand(x64):
    batch = TASK.sample(jax.random.key(0), 3)
    wrong = batch.target.at[1, 4, 2].add(2.0)
    by_position = np.zeros((3, 9))
    by_position[1, 4] = 2.0
    np.testing.assert_allclose(TASK.loss_by_position(wrong, batch), by_position)
    np.testing.assert_allclose(TASK.loss(wrong, batch), [0, 2 / 9, 0])
    with pytest.raises(ValueError, match=r"prediction must have shape \(3, 9, 4\)"):
        TASK.loss(wrong[:, :-1], batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim is 0, must be an integer of at least 1"),
        ({"length": 0}, "length is 0, must be an integer of at least 1"),
        ({"hidden_dim": 0}, "hidden_dim is 0, must be an integer of at least 1"),
        ({"noise": -0.1}, "noise is -0.1, must be a finite number of at least 0"),
        ({"singular_values": (0.9, 0.5)}, r"is \(0.9, 0.5\), must be \(low, high\) with 0 <= low"),
        ({"singular_values": (1.0,)}, r"singular_values is \(1.0,\), must be \(low, high\)"),
        ({"singular_values": 1.0}, r"singular_values is 1.0, must be \(low, high\)"),
        ({"dim": 2.5}, "dim is 2.5, must be an integer of at least 1"),
        ({"length": 2.5}, "length is 2.5, must be an integer of at least 1"),
        ({"hidden_dim": 2.5}, "hidden_dim is 2.5, must be an integer of at least 1"),
        ({"fixed": 1.5}, "fixed is 1.5, must be None or an integer"),
    ],
)
def test_bad_settings_are_named(changes, message):
    unchecked = inspect.unwrap(LinearDynamics.__init__)  # without the tests' checks of annotations
    with pytest.raises(ValueError, match=message):
        unchecked(object.__new__(LinearDynamics), **changes)


def test_sampling_inside_jit_is_the_same():
    inside = jax.jit(lambda key: TASK.sample(key, 4))(jax.random.key(2))
    np.testing.assert_allclose(inside.target, TASK.sample(jax.random.key(2), 4).target, atol=1e-6)
    assert jnp.isfinite(inside.target).all()
