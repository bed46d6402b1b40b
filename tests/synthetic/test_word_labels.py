"""Labelled words: the law of the samples, and the posterior by counting them."""

from itertools import permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.tasks.adaptation import WordLabels


def test_words_and_labels_by_turns_one_label_a_class():
    task = WordLabels(classes=3, words=2, demonstrations=5, usual=0.25)
    batch = task.sample(jax.random.key(0), 6000)
    tokens = np.concatenate([batch.inputs[0], batch.target[:, -1:]], 1)
    np.testing.assert_array_equal(batch.inputs[0][:, 1:], batch.target[:, :-1])
    words, label = tokens[:, ::2], tokens[:, 1::2] - 6
    assert words.min() == 0 and words.max() == 5 and label.min() == 0 and label.max() == 2
    assert task.vocabulary == 9 and task.length == 11 == batch.inputs[0].shape[1]
    usual = 0
    for row, says in zip(words // 2, label, strict=True):
        assigned = dict(zip(row.tolist(), says.tolist(), strict=True))
        assert [assigned[c] for c in row.tolist()] == says.tolist()
        assert len(set(assigned.values())) == len(assigned)
        usual += all(a == c for a, c in assigned.items())
    counts = np.bincount(words.ravel(), minlength=6) / words.size
    np.testing.assert_allclose(counts, 1 / 6, atol=0.01)
    # usual for sure in .25, and where all three classes are seen 1 in 6 of the rest; with two
    # classes seen the same, with one class seen (3 / 3^6 of the sequences) 1 in 3
    wanted = 0.25 + 0.75 * ((1 - 3**-5) / 6 + 3**-5 / 3)
    assert usual / 6000 == pytest.approx(wanted, abs=0.02)


def test_the_mask_is_on_words_whose_label_is_seen():
    task = WordLabels(demonstrations=2)
    tokens = task.sample(jax.random.key(0), 3).inputs[0]
    assert (
        np.asarray(task.before_labels(tokens)).tolist() == [[True, False, True, False, False]] * 3
    )


@pytest.mark.parametrize("usual", [0.0, 0.4, 1.0])
def test_posterior_by_enumeration(usual):
    task = WordLabels(classes=3, words=1, demonstrations=2, usual=usual)
    weight = {}
    for kinds in product(range(3), repeat=3):
        for order in permutations(range(3)):
            chance = (1 - usual) / 6 + usual * (order == (0, 1, 2))
            seen = (kinds[0], order[kinds[0]] + 3, kinds[1], order[kinds[1]] + 3, kinds[2])
            mass = weight.setdefault(seen, np.zeros(3))
            mass[order[kinds[2]]] += chance
    weight = {seen: mass for seen, mass in weight.items() if mass.sum() > 0}
    found = task.posterior(jnp.array(list(weight)))
    wanted = np.array([mass / mass.sum() for mass in weight.values()])
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_no_guess_is_right_more_often_than_the_posterior():
    task = WordLabels(classes=3, words=2, demonstrations=2, usual=0.3)
    batch = task.sample(jax.random.key(4), 4000)
    found = np.asarray(task.posterior(batch.inputs[0]))
    label = np.asarray(batch.target[:, -1]) - task.labels.start
    right = (found.argmax(1) == label).mean()
    assert right == pytest.approx(found.max(1).mean(), abs=0.02)


@pytest.mark.parametrize(
    "field, value",
    [("classes", 1), ("classes", 7), ("words", 0), ("demonstrations", 0), ("usual", 1.1)],
)
def test_refuses(field, value):
    with pytest.raises(ValueError, match=f"^{field} is {value}"):
        WordLabels(**{field: value})
