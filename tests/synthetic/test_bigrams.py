"""Chains with a law of their own: how they are drawn, and what is known of the next word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaln

from synthetic.tasks.task import Task
from synthetic.tasks.text import BigramTask


def evidence(sequence, words, a):
    """log P(sequence), the law integrated out: a product of Dirichlet integrals over the rows."""
    counts = np.zeros((words, words))
    np.add.at(counts, (sequence[:-1], sequence[1:]), 1)
    rows = gammaln(words * a) - gammaln(words * a + counts.sum(1))
    return rows.sum() + (gammaln(a + counts) - gammaln(a)).sum() - np.log(words)


@pytest.mark.parametrize("concentration", [0.1, 2.0])
def test_the_posterior_is_a_ratio_of_evidences(x64, concentration):
    task = BigramTask(words=3, length=12, concentration=concentration)
    sequences = np.random.default_rng(0).integers(0, 3, (4, 12))
    found = task.posterior(jnp.asarray(sequences))
    for b, t in np.ndindex(4, 12):
        seen = sequences[b, : t + 1]
        for word in range(3):
            more = evidence(np.append(seen, word), 3, concentration)
            wanted = np.exp(more - evidence(seen, 3, concentration))
            np.testing.assert_allclose(found[b, t, word], wanted, rtol=1e-11)


def test_sequences_have_the_probability_of_their_evidence(x64):
    task = BigramTask(words=2, length=3, concentration=0.3)
    assert isinstance(task, Task)
    (seen,), target = jax.jit(task.sample, static_argnums=1)(jax.random.key(0), 40_000)
    np.testing.assert_array_equal(seen[:, 1:], target[:, :-1])
    whole = np.concatenate([seen, target[:, -1:]], 1)
    counts = np.bincount(whole @ [8, 4, 2, 1], minlength=16)
    for number, count in enumerate(counts):
        sequence = np.array([number >> 3 & 1, number >> 2 & 1, number >> 1 & 1, number & 1])
        p = np.exp(evidence(sequence, 2, 0.3))
        assert abs(count - 40_000 * p) < 4.5 * np.sqrt(40_000 * p * (1 - p)), sequence


def test_nothing_beats_the_posterior(x64):
    """The loss is the mean of what was seen, and lower than that of other concentrations."""
    task = BigramTask(words=5, length=40, concentration=0.2)
    batch = task.sample(jax.random.key(1), 500)
    losses = {
        a: float(task.loss(BigramTask(5, 40, a).posterior(*batch.inputs), batch).mean())
        for a in (0.05, 0.2, 0.8)
    }
    assert min(losses, key=lambda a: losses[a]) == 0.2
    by_position = task.loss_by_position(task.posterior(*batch.inputs), batch)
    np.testing.assert_allclose(by_position[:, 0], np.log(5))
    assert by_position[:, -1].mean() < by_position[:, 5].mean() - 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"words": 1}, "words is 1, must be an integer of at least 2"),
        ({"length": 0}, "length is 0, must be an integer of at least 1"),
        ({"concentration": 0.0}, "concentration is 0.0, must be above 0"),
        ({"concentration": float("nan")}, "concentration is nan, must be a finite number above 0"),
    ],
)
def test_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        BigramTask(**given)
