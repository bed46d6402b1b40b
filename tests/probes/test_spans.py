import jax
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.core.transformer import randomise
from constructions.inside_outside.paper import language_model
from probes.regression import ridge_probe
from probes.syntax.constituents import span_probe, tag_probe, word_stream
from probes.syntax.sentence_probes import Rows, fit

KEY = jax.random.key(0)
BATCH, TIME = 300, 6
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, TIME + 1, BATCH)
MASK = RNG.random((BATCH, TIME)) < 0.5
STREAM = RNG.normal(size=(2, BATCH, TIME, 8)).astype(np.float32)


def marginals(seed=1, labels=3):
    """Of word pairs, linear in the second layer of the stream at both ends; junk elsewhere."""
    w = np.random.default_rng(seed).normal(size=(2, 8, labels))
    mu = (STREAM[1] @ w[0])[:, :, None] + (STREAM[1] @ w[1])[:, None]
    inside = np.arange(TIME) < LENGTHS[:, None]
    mu[~(inside[:, :, None] & inside[:, None])] = 1e3
    mu[np.arange(BATCH), 0, LENGTHS - 1] = -1e3  # whole sentences are not asked for
    mu[:, np.tril_indices(TIME)[0], np.tril_indices(TIME)[1]] = 1e3
    return mu


def test_planted_marginals_are_found_and_noise_has_none():
    noise = np.random.default_rng(2).normal(size=STREAM.shape).astype(np.float32)
    found = span_probe({"m": STREAM, "noise": noise}, marginals(), LENGTHS, KEY, labels=True)
    assert found.layers["m"] == 1 and found["m"] > 0.9999 and found.correlation["m"] > 0.9999
    for column in ("noise", "embedding", "control task", "place"):
        assert found[column] < 0.05, column
    assert found.by_layer["m"][0] < 0.05
    difference, low, high = found.gain("m", "noise")
    assert 0.9 < low < difference < high and difference == pytest.approx(
        found["m"] - found["noise"]
    )
    assert "1.000*" in found.markdown()


def test_the_target_is_the_largest_label():
    one = marginals(labels=1)
    below = np.concatenate([one, one - 1, one - 5], -1)
    assert span_probe({"m": STREAM}, below, LENGTHS, KEY)["m"] > 0.9999


def test_place_explains_what_depends_on_place_and_the_control_task_keeps_it():
    i, j = np.indices((TIME, TIME))
    mu = np.broadcast_to((0.3 * i - 0.7 * j)[None, :, :, None], (BATCH, TIME, TIME, 1))
    positions = np.broadcast_to(np.eye(TIME, dtype=np.float32), (1, BATCH, TIME, TIME))
    found = span_probe({"m": positions}, mu, LENGTHS, KEY)
    assert found["place"] > 0.999 and found["control task"] > 0.999
    assert span_probe({"m": STREAM}, mu, LENGTHS, KEY)["m"] < 0.1


def test_two_layers_find_what_is_not_linear():
    product = STREAM[1, :, :, None, 0] * STREAM[1, :, None, :, 1]
    mu = np.where(marginals()[..., :1] > 900, 1e3, product[..., None])
    linear = span_probe({"m": STREAM}, mu, LENGTHS, KEY)
    found = span_probe({"m": STREAM}, mu, LENGTHS, KEY, probe="two-layer")
    assert linear["m"] < 0.1 and found["m"] > 0.85
    for column in ("embedding", "control task", "place"):
        assert abs(found[column]) < 0.06, column
    # of the exchanged targets nothing is learned; own ones would do worse than nothing on them
    assert abs(found.by_layer["control task"][1]) < 0.1
    assert found.sensitivity("m") == found["m"] - found.by_layer["m"][0] > 0.8
    assert found.sensitivity("embedding") == 0
    assert f"{found.sensitivity('m'):.3f}" in found.markdown().splitlines()[2]
    tags = np.where(MASK[..., None], STREAM[1, :, :, :2] * STREAM[1, :, :, 2:4], 1e3)
    hidden = tag_probe({"m": STREAM}, tags, MASK, LENGTHS, KEY, probe="two-layer")
    assert hidden["m"] > 0.6 and hidden["control task"] < 0.06
    assert tag_probe({"m": STREAM}, tags, MASK, LENGTHS, KEY)["m"] < 0.1


def test_hidden_words_alone_are_probed():
    w = np.random.default_rng(3).normal(size=(8, 4))
    tags = np.where(MASK[..., None], STREAM[1] @ w, 1e3)
    tags[np.arange(TIME) >= LENGTHS[:, None]] = -1e3
    found = tag_probe({"m": STREAM}, tags, MASK, LENGTHS, KEY)
    assert found["m"] > 0.9999 and found["embedding"] < 0.05


def test_equal_rows_give_what_the_probe_of_full_sequences_gives():
    sentence, t = (a.ravel() for a in np.indices((BATCH, TIME)))
    x = STREAM[1].reshape(-1, 8)
    y = x @ np.ones((8, 2)) + 2 * RNG.normal(size=(len(x), 2))
    rows = Rows(sentence, np.stack([t, np.full(len(t), TIME)], 1), BATCH)
    found = fit({"m": x[None]}, y, rows, KEY)
    wanted = ridge_probe(STREAM[1], y.reshape(BATCH, TIME, 2), key=KEY)
    assert found["m"] == pytest.approx(wanted.r2, abs=0.02)
    assert 0.4 < found["m"] == pytest.approx(found.correlation["m"] ** 2, abs=0.02)


def test_the_stream_at_words_of_a_language_model():
    c = CATALOGUE["inside-outside"](grammar="toy", max_length=5, layers=2, width=8, heads=2)
    model = randomise(language_model(len(c.grammar.vocabulary), 5, 2, 2, 8), KEY, 0.1)
    tokens, lengths, mask = c.task.sample(KEY, 7).inputs
    found = word_stream(c, model, (tokens, lengths, mask))
    assert found.shape == (3, 7, 5, 8)
    embedded = np.asarray(model.embed(c.numbers(tokens, lengths, mask)))
    np.testing.assert_allclose(found[0], embedded[:, 1:-1], rtol=1e-6)


def test_bad_input():
    mu = marginals()
    with pytest.raises(ValueError, match="marginals has shape"):
        span_probe({"m": STREAM}, mu[..., 0], LENGTHS, KEY)
    with pytest.raises(ValueError, match="none of"):
        span_probe({"place": STREAM}, mu, LENGTHS, KEY)
    with pytest.raises(ValueError, match=r"models\['n'\] has shape"):
        span_probe({"m": STREAM, "n": STREAM[:, :9]}, mu, LENGTHS, KEY)
    with pytest.raises(ValueError, match=r"lengths must be 300 numbers in 1\.\.6"):
        span_probe({"m": STREAM}, mu, LENGTHS + 1, KEY)
    with pytest.raises(ValueError, match="probe is 'cubic', must be one of linear, two-layer"):
        span_probe({"m": STREAM}, mu, LENGTHS, KEY, probe="cubic")
    with pytest.raises(ValueError, match="mask has shape"):
        tag_probe({"m": STREAM}, mu[:, :, 0], MASK[:9], LENGTHS, KEY)
