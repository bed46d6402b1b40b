"""Posteriors of corrupted spans, against enumeration of every fill of every width."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.inside_outside.spans import SpanTask
from constructions.inside_outside.training_data import rows
from synthetic.grammar import chart
from synthetic.grammar.examples import named
from synthetic.grammar.grammar import Grammar
from synthetic.tasks.task import Batch

SMALL = Grammar.from_text(
    "S -> S S [0.2] | 'a' B [0.5] | A 'b' [0.1] | 'b' 'a' [0.2]\nA -> 'a' [0.6] | 'b' [0.4]\n"
    "B -> 'b' [0.7] | S B [0.3]"
)


def likelihood(words):
    """P(words) over the number of widths that a span of theirs may have."""
    if len(words) > 6:
        return 0.0
    tokens, length = np.array([words + (0,) * (6 - len(words))], np.int32), np.array([len(words)])
    return float(np.exp(chart.log_z(SMALL, tokens, length.astype(np.int32))[0])) / min(
        3, len(words)
    )


def test_posterior_is_that_of_enumeration(x64):
    task = SpanTask(SMALL, max_length=6, widest=3)
    batch = task.sample(jax.random.key(0), 24)
    chance, marginal = map(np.asarray, task.posterior(*batch.inputs))
    tokens, lengths, mask = map(np.asarray, batch.inputs)
    for row in range(24):
        first = int(mask[row].argmax())
        before = tuple(tokens[row, :first].tolist())
        after = tuple(tokens[row, first + 3 : lengths[row]].tolist())
        scores = {
            fill: likelihood((*before, *fill, *after))
            for m in (1, 2, 3)
            for fill in product(range(2), repeat=m)
        }
        total = sum(scores.values())
        widths, slots = np.zeros(3), np.zeros((3, 3))
        for fill, score in scores.items():
            widths[len(fill) - 1] += score / total
            for t in range(3):
                slots[t, fill[t] if t < len(fill) else task.empty] += score / total
        assert np.abs(chance[row] - widths).max() < 1e-10
        assert np.abs(marginal[row, first : first + 3] - slots).max() < 1e-10
        assert not marginal[row, ~mask[row]].any()


def test_spans_are_drawn_by_their_law():
    """Every width of every sentence, and every place, as often as it should be."""
    task = SpanTask(SMALL, max_length=4, widest=3)
    tokens, lengths, mask = map(np.asarray, task.sample(jax.random.key(1), 2**14).inputs)
    width = (mask & (tokens != task.empty)).sum(1)
    sentence = lengths - 3 + width
    assert mask.sum(1).tolist() == [3] * 2**14 and sentence.max() == 4
    four = sentence == 4
    for m in (1, 2, 3):
        own = four & (width == m)
        assert abs(own.sum() / four.sum() - 1 / 3) < 4 * np.sqrt(2 / 9 / four.sum())
        places = np.bincount(mask[own].argmax(1), minlength=5 - m) / own.sum()
        assert np.abs(places - 1 / (5 - m)).max() < 4 / np.sqrt(own.sum())


def test_what_is_drawn_is_the_sentence_with_its_span_in_the_slots():
    task = SpanTask(named("brackets"), max_length=7, widest=3)
    tokens, lengths, mask = map(np.asarray, task.sample(jax.random.key(2), 64).inputs)
    sentences = [
        [w for w in row[:n].tolist() if w != task.empty]
        for row, n in zip(tokens, lengths, strict=True)
    ]
    longest = max(map(len, sentences))
    padded = np.array([s + [0] * (longest - len(s)) for s in sentences], np.int32)
    found = chart.log_z(named("brackets"), padded, np.array([*map(len, sentences)], np.int32))
    assert np.isfinite(found).all()  # each of them has a parse
    assert (mask.sum(1) == 3).all() and (np.diff(mask, axis=1, prepend=False).sum(1) <= 2).all()


def test_loss_is_least_at_the_marginals(x64):
    task = SpanTask(SMALL, max_length=6, widest=3)
    batch = task.sample(jax.random.key(3), 2048)
    _, exact = task.posterior(*batch.inputs)
    losses = {}
    for power in (0.7, 1.0, 1.4):
        other = exact**power
        other = other / jnp.maximum(other.sum(-1, keepdims=True), 1e-30)
        losses[power] = float(task.loss(other, batch).mean())
    assert losses[1.0] < min(losses[0.7], losses[1.4])
    tokens, mask = batch.target
    by_hand = [
        -np.log(np.asarray(exact)[row, t, tokens[row, t]])
        for row in range(50)
        for t in np.flatnonzero(mask[row])
    ]
    few = Batch(tuple(a[:50] for a in batch.inputs), (tokens[:50], mask[:50]))
    assert float(task.loss(exact[:50], few).mean()) == pytest.approx(np.mean(by_hand), abs=1e-12)


def test_rows_and_the_control():
    calibrated, wrong = rows(quick=True, seed=0)
    assert calibrated.verdict == "reproduced" and "0.333" in calibrated.note
    assert wrong.measured > 5 * wrong.error > 0


def test_bad_widths_are_named():
    with pytest.raises(ValueError, match="widest is 9, must be 1 to 8"):
        SpanTask(SMALL, 8, 9)
