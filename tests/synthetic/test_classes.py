"""Few-shot classification: samples, the exact posterior against Gaussian conditioning, the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from synthetic.tasks.classes import GaussianClasses
from synthetic.tasks.task import Task


def test_samples_are_episodes():
    task = GaussianClasses(
        dim=3, classes=4, shots=2, queries=5, unlabelled=6, spread=1.5, noise=0.5
    )
    assert isinstance(task, Task)
    (support, labels, queries), target = task.sample(jax.random.key(0), 2000)
    assert support.shape == (2000, 14, 3) and queries.shape == (2000, 5, 3)
    assert labels.shape == (2000, 8) and target.shape == (2000, 5)
    counts = np.stack([np.bincount(row, minlength=4) for row in np.asarray(labels)])
    assert (counts == 2).all()
    assert len({tuple(row) for row in np.asarray(labels).tolist()}) > 500
    share = np.bincount(np.asarray(target).ravel(), minlength=4) / target.size
    np.testing.assert_allclose(share, 0.25, atol=0.02)
    # examples of one class share their mean, all others are independent
    labelled = np.asarray(support[:, :8], float)
    same = (labels[:, :, None] == labels[:, None]) & ~np.eye(8, dtype=bool)
    products = np.einsum("bid,bjd->bij", labelled, labelled) / 3
    asked = np.einsum("bid,bqd->biq", labelled, queries) / 3
    own = np.asarray(labels)[:, :, None] == np.asarray(target)[:, None]
    for values, chosen, wanted in (
        (products, np.asarray(same), 1.5**2),
        (products, np.broadcast_to(np.eye(8, dtype=bool), same.shape), 1.5**2 + 0.5**2),
        (asked, own, 1.5**2),
        (asked, ~own, 0.0),
    ):
        found = values[np.asarray(chosen)]
        assert abs(found.mean() - wanted) < 0.1
    others = np.asarray(support[:, 8:], float)
    assert abs((others**2).mean() - 2.5) < 0.1


@pytest.fixture
def uneven(x64):
    """Five examples of class 0, one of class 1, none of class 2."""
    task = GaussianClasses(dim=2, classes=3, spread=1.3, noise=0.7)
    labels = jnp.array([[0, 0, 1, 0, 0, 0]])
    support, queries = jax.random.normal(jax.random.key(1), (2, 1, 6, 2))
    return task, support, labels, queries


def test_posterior_is_gaussian_conditioning(uneven):
    task, support, labels, queries = uneven
    found = jax.nn.softmax(task.posterior(support, labels, queries))[0]
    density = np.empty((6, 3))
    for c in range(3):
        own = np.asarray(support[0])[np.asarray(labels[0]) == c]
        cov = task.spread**2 * np.ones((len(own) + 1,) * 2) + task.noise**2 * np.eye(len(own) + 1)
        gain = np.linalg.solve(cov[1:, 1:], cov[1:, 0])
        mean, variance = gain @ own, cov[0, 0] - gain @ cov[1:, 0]
        density[:, c] = stats.norm.pdf(queries[0], mean, np.sqrt(variance)).prod(1)
    np.testing.assert_allclose(found, density / density.sum(1, keepdims=True), rtol=1e-12)


def test_posterior_ignores_what_has_no_label(uneven):
    task, support, labels, queries = uneven
    more = jnp.concatenate([support, 9 * jnp.ones((1, 3, 2))], 1)
    np.testing.assert_array_equal(
        task.posterior(more, labels, queries), task.posterior(support, labels, queries)
    )


def test_posterior_is_right_as_often_as_it_says():
    task = GaussianClasses(dim=3, classes=3, shots=1, queries=2)
    episodes = task.sample(jax.random.key(2), 20_000)
    p = jax.nn.softmax(task.posterior(*episodes.inputs))
    assert abs(float(p.max(-1).mean() - task.accuracy(p, episodes).mean())) < 0.01


@pytest.mark.parametrize("settings", [{}, {"dim": 2, "classes": 3, "shots": 1, "noise": 2.0}])
def test_step_size_is_where_the_loss_is_least(settings):
    task = GaussianClasses(**settings)
    episodes = task.sample(jax.random.key(3), 20_000)
    support, labels, queries = episodes.inputs
    shown = jax.nn.one_hot(labels, task.classes) - 1 / task.classes
    z = jnp.einsum("bic,bid,bqd->bqc", shown, support, queries) / task.labelled
    eta = task.step_size()
    below, best, above = (float(task.loss(f * eta * z, episodes).mean()) for f in (0.9, 1.0, 1.1))
    assert best < min(below, above)
    # a parabola through the three: its minimum is near the middle
    shift = 0.1 * (below - above) / (2 * (below + above - 2 * best))
    assert abs(shift) < 0.03


def test_loss_is_cross_entropy_in_nats():
    task = GaussianClasses(dim=2, classes=4, queries=3)
    episodes = task.sample(jax.random.key(4), 5)
    np.testing.assert_allclose(task.loss(jnp.zeros((5, 3, 4)), episodes), np.log(4), rtol=1e-6)
    logits = jax.random.normal(jax.random.key(5), (5, 3, 4))
    p = np.exp(np.asarray(logits, float))
    p /= p.sum(-1, keepdims=True)
    each = [[-np.log(p[b, q, episodes.target[b, q]]) for q in range(3)] for b in range(5)]
    np.testing.assert_allclose(task.loss(logits, episodes), np.mean(each, 1), rtol=1e-5)
    with pytest.raises(ValueError, match=r"prediction has shape \(5, 3, 3\), must be \(5, 3, 4\)"):
        task.loss(logits[..., :3], episodes)


def test_scaled_inputs_scale_everything_but_the_labels():
    task = GaussianClasses(dim=2, unlabelled=3)
    plain, twice = (t.sample(jax.random.key(6), 4) for t in (task, task.scaled_inputs(2.0)))
    np.testing.assert_allclose(twice.inputs[0], 2 * plain.inputs[0], rtol=1e-6)
    np.testing.assert_allclose(twice.inputs[2], 2 * plain.inputs[2], rtol=1e-6)
    np.testing.assert_array_equal(twice.inputs[1], plain.inputs[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim is 0, must be an integer of at least 1"),
        ({"classes": 1}, "classes is 1, must be an integer of at least 2"),
        ({"queries": True}, "queries is True"),
        ({"unlabelled": -1}, "unlabelled is -1, must be an integer of at least 0"),
        ({"spread": 0.0}, "spread is 0.0, must be above 0"),
        ({"noise": float("nan")}, "noise is nan"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        GaussianClasses(**settings)
