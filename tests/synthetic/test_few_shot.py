"""Few-shot regression: the sequence by hand, and what least squares on its tokens comes to."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from synthetic.tasks.few_shot import FewShotRegression, interleave

TASK = FewShotRegression(dim=3, pairs=5, noise=0.0)


def losses(task, sequences, eos=None):
    """Losses that least squares on all successive tokens up to the last x has at any other x."""
    key = jax.random.key(0)
    law = np.asarray(jax.random.orthogonal(jax.random.split(key, 3)[0], task.dim, (sequences,)))
    tokens, _ = interleave(*task.sample(key, sequences).inputs, eos)
    tokens = np.asarray(tokens, float)
    found = [np.linalg.lstsq(rows[:-1], rows[1:], rcond=None)[0].T for rows in tokens]
    wrong = np.square(law - np.stack(found)).sum((1, 2)) / 3  # times the variance of x
    return wrong / 2 + task.noise_floor


def test_pairs_have_orthogonal_maps_of_their_own(x64):
    (x, y), target = TASK.sample(jax.random.key(0), 4)
    np.testing.assert_array_equal(y, target)
    maps = [np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(x, y, strict=True)]
    for found, a, b in zip(maps, x, y, strict=True):
        np.testing.assert_allclose(a @ found, b, atol=1e-12)
        np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)
    assert np.abs(maps[0] - maps[1]).max() > 0.1
    x = np.asarray(replace(TASK, pairs=2000).sample(jax.random.key(1), 4).inputs[0])
    assert np.abs(x).max() <= 1 and x.var() == pytest.approx(1 / 3, rel=0.05)


def test_noise_floor():
    task = replace(TASK, noise=0.5, pairs=2000)
    batch = task.sample(jax.random.key(1), 4)
    clean = replace(task, noise=0.0).sample(jax.random.key(1), 4)
    loss = float(task.loss(clean.target, batch).mean())
    assert loss == pytest.approx(task.noise_floor, rel=0.05)


@pytest.mark.parametrize("eos", [None, np.full(2, 7.0)])
@pytest.mark.parametrize("count", [None, 0, 3])
def test_the_sequence_by_hand(eos, count):
    x, y = np.arange(12.0).reshape(2, 3, 2), -np.arange(12.0).reshape(2, 3, 2)
    prefix = None if count is None else np.full((count, 2), 5.0)
    tokens, places = interleave(x, y, eos, prefix)
    for number in range(2):
        rows = [] if prefix is None else [*prefix]
        for i in range(3):
            rows += [x[number, i], y[number, i]] + ([] if eos is None else [eos])
        rows = rows[: -1 if eos is None else -2]  # the last x has no answer yet
        np.testing.assert_array_equal(tokens[number], rows)
    np.testing.assert_array_equal(tokens[:, places], x)


def test_losses_by_hand():
    batch = TASK.sample(jax.random.key(0), 2)
    wrong = batch.target.at[1, 4, 2].add(2.0)
    by_pair = np.zeros((2, 5))
    by_pair[1, 4] = 2.0
    np.testing.assert_allclose(TASK.loss_by_pair(wrong, batch), by_pair)
    np.testing.assert_allclose(TASK.loss(wrong, batch), [0, 2 / 5])
    with pytest.raises(ValueError, match=r"prediction must have shape \(2, 5, 3\)"):
        TASK.loss(wrong[:, :-1], batch)


@pytest.mark.parametrize("length", [None, 0.0, 0.8])
def test_least_squares_on_all_tokens_tends_to_half_the_map(length):
    task = replace(TASK, pairs=4001, noise=0.3)
    found = losses(task, 20, None if length is None else np.array([0, length, 0]))
    assert found.mean() == pytest.approx(task.limit(length), rel=0.01)
    assert task.limit() == task.limit(0.0) < task.limit(0.8) < task.limit(3.0)
    assert replace(task, noise=0.0).limit() == pytest.approx(3 / 24)  # c dim / 8


@pytest.mark.parametrize("eos", [False, True])
def test_least_squares_on_all_tokens_to_first_order(eos):
    task = replace(TASK, dim=4, pairs=101)
    found = losses(task, 4000, np.zeros(4) if eos else None) - task.limit()
    expected = task.expansion(100, eos) - task.limit()
    error = found.std() / 4000**0.5
    assert error < 0.04 * expected
    assert abs(found.mean() - expected) < 3 * error + 0.05 * expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(TASK, dim=0), "dim is 0, must be an integer of at least 1"),
        (lambda: replace(TASK, pairs=0), "pairs is 0, must be an integer of at least 1"),
        (lambda: replace(TASK, noise=-1.0), "noise is -1.0, must be a finite number of at least 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


X = np.zeros((2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X[:, :2]), r"x has shape \(2, 3, 4\), y \(2, 2, 4\), must be"),
        ((X, X, np.zeros(3)), r"eos has shape \(3,\), must be \(4,\)"),
        ((X, X, None, np.zeros((2, 3))), r"prefix has shape \(2, 3\), must be \[count, 4\]"),
    ],
)
def test_bad_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        interleave(*arguments)
