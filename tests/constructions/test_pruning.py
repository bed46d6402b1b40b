"""Perplexity pruning: tables of strings against the grammars by hand, what is kept by counting."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from constructions.inside_outside import pruning
from constructions.inside_outside.pruning import TEXTS, Documents, Text, keep, parts, strings
from constructions.inside_outside.training_data import experiment, limits

WORDS = ("a", "b", "c", "d")


def test_tables_are_the_grammars():
    assert pruning._CLAUSES.vocabulary == pruning._NESTED.vocabulary == WORDS
    nouns, verbs = {"a": 0.7, "b": 0.3}, {"c": 0.6, "d": 0.4}
    rows = [[WORDS[w] for w in row] for row in strings()]
    clauses = [
        np.prod([nouns.get(w, 0) for w in row[::2]] + [verbs.get(w, 0) for w in row[1::2]])
        for row in rows
    ]
    pairs = {("a", "c"), ("b", "d")}
    nested = [float(all((row[i], row[5 - i]) in pairs for i in range(3))) / 8 for row in rows]
    assert np.abs(parts() - [clauses, nested, np.full(4096, 4.0**-6)]).max() < 1e-12
    text = Text(0.5, 0.2, 0.3, asked=0.5)
    assert abs(text.probability.sum() - 1) < 1e-12 and abs(text.wanted.sum() - 1) < 1e-12
    assert np.abs(text.wanted - (parts()[0] + parts()[1]) / 2).max() < 1e-12
    assert np.abs(replace(text, asked=None).wanted - [5 / 7, 2 / 7] @ parts()[:2]).max() < 1e-12


@pytest.mark.parametrize("which", ["low", "middle", "high"])
def test_whole_strings_are_kept_and_the_divergence_is_minus_the_log_of_their_share(which):
    rng = np.random.default_rng(0)
    p, perplexity = TEXTS["noisy"].probability, rng.random(4096)
    kept = keep(p, perplexity, which, 0.4)
    assert set(np.unique(kept)) == {0.0, 1.0}
    share = (kept * p).sum()
    assert abs(share - 0.4) < p.max()
    inside = perplexity[kept > 0]
    ends = {
        "low": inside.max() < perplexity[kept == 0].min(),
        "high": inside.min() > perplexity[kept == 0].max(),
        "middle": (kept[(perplexity > inside.min()) & (perplexity < inside.max())] == 1).all(),
    }
    assert ends[which]
    after = kept * p / share
    moved = (after[after > 0] * np.log(after[after > 0] / p[after > 0])).sum()
    assert abs(moved + np.log(share)) < 1e-10
    # by documents: what is drawn and kept has that distribution, and the noise of `experiment`
    drawn = rng.choice(4096, 200_000, p=p)
    assert abs(kept[drawn].mean() - share) < 3 * np.sqrt(share * (1 - share) / 200_000)


@pytest.mark.slow
def test_random_pruning_keeps_the_distribution_and_low_perplexity_the_clean_text():
    found = experiment(TEXTS["noisy"], 2)
    random, low, high = found["random"], found["low"], found["high"]
    for name in ("low", "middle", "high"):
        one = found[name]
        assert np.abs(one.divergence + np.log(one.share)).max() < 1e-10
    np.testing.assert_allclose(random.noise, 0.4, atol=1e-12)
    assert low.noise.max() < 0.2 < 0.5 < high.noise.min()
    assert (low.grammar < found["all"].grammar).all() and (
        high.grammar > found["all"].grammar
    ).all()
    with jax.enable_x64(True):  # a perplexity that is exact is one that noise cannot have
        exact = -np.log(np.maximum(parts()[0], 1e-30))
    p = TEXTS["noisy"].probability
    kept = keep(p, exact, "low", 0.6) * p
    # noise that happens to be a clause stays
    same = 0.4 * parts()[2][parts()[0] > 0].sum()
    assert (kept * 0.4 * parts()[2] / p).sum() <= same + 1e-12


def test_documents_are_drawn_by_their_row_and_their_posterior_is_that_of_enumeration(x64):
    chances = np.stack([parts()[1], TEXTS["noisy"].probability])
    task = Documents(chances=chances, row=1.0)
    tokens, _, mask = map(np.asarray, (batch := task.sample(jax.random.key(0), 20_000)).inputs)
    drawn = np.bincount(tokens @ 4 ** np.arange(6)[::-1], minlength=4096) / 20_000
    frequent = chances[1] > 2e-3
    errors = np.sqrt(chances[1] / 20_000)
    assert (abs(drawn - chances[1])[frequent] < 5 * errors[frequent]).all()
    assert abs(mask.mean() - task.rate) < 0.01
    few = [a[:8] for a in batch.inputs]
    found = np.asarray(task.posterior(*few))
    for row in range(8):
        words = np.zeros((6, 4))
        for string, p in zip(strings(), chances[1], strict=True):
            if all(m or a == b for m, a, b in zip(mask[row], tokens[row], string, strict=True)):
                words[range(6), string] += p
        np.testing.assert_allclose(found[row], words / words.sum(1, keepdims=True), atol=1e-12)


def test_what_models_tend_to_is_least_on_what_they_were_shown():
    clean, other = parts()[:2]
    own, uniform, wrong = limits(np.stack([clean, parts()[2], other]), clean)
    assert 0 < own < 0.05 < uniform < wrong


def test_bad_settings_are_named():
    for bad in (Text, lambda **s: Text(**s)):
        with pytest.raises(ValueError, match="shares are"):
            bad(clauses=0.5)
    with pytest.raises(ValueError, match="which is 'best'"):
        keep(np.ones(2) / 2, np.arange(2.0), "best", 0.5)
    with pytest.raises(ValueError, match="share is 0"):
        keep(np.ones(2) / 2, np.arange(2.0), "low", 0.0)
