"""Facts in a linear memory: fading, repetition, surprise, and scrambled sentences."""

from itertools import permutations

import numpy as np
import pytest

from constructions.gradient_descent import facts


@pytest.fixture(scope="module")
def stream():
    """(grammar, sentences, their probabilities, keys, covariance)."""
    grammar, sentences = facts.language()
    chance, keys = facts.probability(grammar, sentences), facts.bags(grammar, sentences)
    return grammar, sentences, chance, keys, np.einsum("s,si,sj->ij", chance, keys, keys)


def test_language_is_complete_and_scrambled_sentences_have_no_parse(stream):
    grammar, sentences, chance, keys, _ = stream
    assert chance.sum() == pytest.approx(1, abs=1e-6)
    orders = [list(p) for p in permutations(["the", "dog", "saw"]) if p != ("the", "dog", "saw")]
    assert not facts.probability(grammar, orders).any()
    np.testing.assert_array_equal(facts.bags(grammar, orders), np.tile(keys[0], (5, 1)))


def test_fading_and_repetition_are_those_of_gradient_descent(stream):
    """On a memory of values as well, with steps on the whole stream; to 1e-10."""
    _, _, chance, keys, covariance = stream
    rng, step = np.random.default_rng(0), 0.3
    world = rng.normal(size=(4, keys.shape[1]))
    for key in keys[[0, 5, 9]]:
        value = rng.normal(size=4)
        memory = world + np.outer(value, key)
        for t in range(60):
            recall = value @ (memory - world) @ key / (value @ value)
            assert recall == pytest.approx(float(facts.fading(covariance, key, step, t)), abs=1e-10)
            errors = (memory - world) @ keys.T
            memory -= step * (errors * chance) @ keys
        memory, seen = world.copy(), []
        for _ in range(6):
            memory += step * np.outer(value + world @ key - memory @ key, key)
            for _ in range(7):
                memory -= step * (((memory - world) @ keys.T) * chance) @ keys
            seen.append(value @ (memory - world) @ key / (value @ value))
        np.testing.assert_allclose(facts.repeated(covariance, key, step, 7, 6), seen, atol=1e-10)


def test_half_life_is_exponential_in_surprise_and_large_eigenvalues_fade_first(stream):
    """With a key for each sentence; and along eigenvectors, in their order."""
    _, sentences, chance, _, covariance = stream
    one, times = np.eye(len(sentences)), np.arange(20_000)
    for n in (0, 1, 3):
        left = facts.fading(np.diag(chance), one[n], 0.1, times)
        half = int(np.argmax(left < 0.5))
        surprise = -np.log(chance[n])
        assert half == pytest.approx(np.log(2) / 0.1 * np.exp(surprise), rel=0.02, abs=1)
    vectors = np.linalg.eigh(covariance)[1].T
    left = [float(facts.fading(covariance, v, 0.3, 50)) for v in vectors]
    assert left == sorted(left, reverse=True) and left[0] > 0.9 > 0.1 > left[-1]


def test_streams_forget_as_the_closed_form_and_scrambled_facts_as_likely_ones(stream):
    grammar, _, _, keys, covariance = stream
    rows = {row.name.split(", ")[-1]: row for row in facts.measure(quick=True)}
    heron = facts.bags(grammar, [["the", "heron", "sang"]])[0]
    for name, key in (("likely", keys[0]), ("unlikely", heron), ("scrambled", keys[0])):
        exact = float(facts.fading(covariance, key, 0.1, 100))
        assert abs(rows[name].measured - exact) < 4 * rows[name].error + 1e-3
    assert rows["unlikely"].measured > 5 * rows["likely"].measured
    assert "infinite" in rows["scrambled"].note
    assert rows["scrambled"].measured == pytest.approx(rows["likely"].measured, rel=1e-4)
    assert rows["5% of its update"].measured < 0.5 < 0.99 < rows["95% of its update"].measured


def test_steps_that_diverge_are_refused(stream):
    with pytest.raises(ValueError, match=r"step is 5.0, must be in \(0, "):
        facts.fading(stream[4], stream[3][0], 5.0, 3)
