"""The masked-language task: who is hidden how often, its loss, and rates that change in a fit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synthetic.grammar.examples import named
from synthetic.tasks.masked_language import MaskedLanguageTask
from synthetic.tasks.task import Curriculum

TASK = MaskedLanguageTask(named("toy"), max_length=8, rate=0.15)


def hidden(task: MaskedLanguageTask, progress: float | None = None) -> tuple[np.ndarray, ...]:
    """Hidden words and words of 20000 sentences."""
    key = jax.random.key(3)
    if progress is None:
        batch = task.sample(key, 20_000)
    else:
        batch = task.sample_during(key, 20_000, jnp.asarray(progress))
    _, lengths, mask = map(np.asarray, batch.inputs)
    assert not mask[np.arange(8) >= lengths[:, None]].any()  # nothing behind the end
    return mask.sum(1), lengths


@pytest.mark.parametrize(
    ("task", "progress", "rate"),
    [
        (TASK, None, 0.15),
        (TASK, 0.0, 0.15),
        (replace(TASK, highest=0.55), 0.3, 0.35),
        (replace(TASK, rate=0.3, final=0.1), None, 0.1),
        (replace(TASK, rate=0.3, final=0.1), 0.0, 0.3),
        (replace(TASK, rate=0.3, final=0.1), 0.75, 0.15),
    ],
)
def test_words_are_hidden_at_the_rate(
    task: MaskedLanguageTask, progress: float | None, rate: float
) -> None:
    counts, lengths = hidden(task, progress)
    share = counts.sum() / lengths.sum()
    # some 100000 words; sentences with rates of their own scatter more
    assert share == pytest.approx(rate, abs=0.01 if task.highest else 0.006)
    # one rate for all gives binomial counts
    variance = ((counts - share * lengths) ** 2).sum() / (lengths * share * (1 - share)).sum()
    assert variance > 1.2 if task.highest else variance == pytest.approx(1, abs=0.06)


def test_the_loss_is_the_mean_over_hidden_words() -> None:
    batch = TASK.sample(jax.random.key(0), 64)
    tokens, mask = map(np.asarray, batch.target)
    words = len(TASK.grammar.vocabulary)
    prediction = np.random.default_rng(0).dirichlet(np.ones(words), tokens.shape)
    nats = [-np.log(prediction[n, t, tokens[n, t]]) for n, t in np.argwhere(mask)]
    found = TASK.loss(jnp.asarray(prediction), batch)
    assert found.shape == (64,)
    assert float(found.mean()) == pytest.approx(np.mean(nats), rel=1e-5)
    with pytest.raises(ValueError, match=r"prediction must have shape \(64, 8, 'words'\)"):
        TASK.loss(jnp.asarray(prediction[:, :-1]), batch)


def test_sentences_do_not_depend_on_the_rate() -> None:
    assert isinstance(TASK, Curriculum)
    key = jax.random.key(1)
    tokens = [t.sample(key, 50).inputs[0] for t in (TASK, replace(TASK, rate=0.5, final=0.2))]
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0, must be above 0 and at most 1"),
        ({"highest": 0.1}, "highest is 0.1, must be a finite number from 0.15 to 1"),
        ({"final": 1.5}, "final is 1.5, must be above 0 and at most 1"),
        ({"final": 0.3, "highest": 0.4}, "final is 0.3 and highest 0.4, must be one of them"),
        ({"max_length": 0}, "max_length is 0, must be an integer of at least 1"),
    ],
)
def test_bad_rates_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TASK, **changes)
