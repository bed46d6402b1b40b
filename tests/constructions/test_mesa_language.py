"""Language models whose layers differ in their mixer: what they see, and that they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.transformer import randomise
from constructions.mesa.models import causal_language_model, next_token
from constructions.mesa_layer import mesa
from synthetic.fitting.train import fit
from synthetic.tasks.text import BigramTask

KINDS = [("softmax", False), ("linear", False), ("mesa", False), ("mesa", True), (None, False)]
predict = jax.jit(next_token)


def model_of(mixer, gates, words=7, **size):
    size = {"layers": 1, "heads": 2, "width": 8, "length": 12} | size
    return causal_language_model(words, mixer, gates=gates, **size)


@pytest.mark.parametrize(("mixer", "gates"), KINDS)
def test_what_a_token_depends_on(x64, mixer, gates):
    """Nothing behind it; all in front of it, or as many tokens as the first layer has heads."""
    model = randomise(model_of(mixer, gates), jax.random.key(0), 0.7)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (1, 12)))
    out = predict(model, tokens)
    np.testing.assert_allclose(out.sum(-1), 1)
    change = predict(model, tokens.at[0, 5].set((tokens[0, 5] + 1) % 7)) - out
    size = np.abs(change).max((0, 2))
    reach = np.arange(12) - 5
    assert (size[reach < 0] < 1e-14).all()
    near = (reach >= 0) & (reach <= 2)
    assert (size[near] > 1e-6).all()
    far = size[reach > 2]
    assert (far < 1e-14).all() if mixer is None else (far > 1e-9).all()


def test_models_differ_in_the_mixer_alone():
    shapes = {kind: model_of(*kind).arrays() for kind in KINDS}
    heads = {kind: a["segments"][1]["layers"][0].pop("heads") for kind, a in shapes.items()}
    structures = {str(jax.tree.map(jnp.shape, a)) for a in shapes.values()}
    assert len(structures) == 1
    softmax, linear = (heads["softmax", False][0]["scale"], heads["linear", False][0]["scale"])
    np.testing.assert_allclose(softmax, 0.5)
    np.testing.assert_allclose(linear, 1 / 12, rtol=1e-6)


def test_it_learns():
    task = BigramTask(words=4, length=12, concentration=0.1)
    untrained = model_of("mesa", True, words=4)
    found = fit(
        lambda key: randomise(untrained, key, 0.2),
        task,
        predict=next_token,
        steps=60,
        batch=32,
        chunk=20,
        learning_rate=1e-2,
    )
    assert found.history[-1]["loss"] < 0.95 * found.history[0]["loss"]


def test_a_mesa_head_is_the_posterior_of_a_chain(x64):
    """One-hot keys and values: n_ij / (n_i + ridge), the posterior but for the prior."""
    task = BigramTask(words=5, length=30, concentration=0.2)
    (words,), _ = task.sample(jax.random.key(0), 3)
    here = jax.nn.one_hot(words, 5)
    before = jnp.pad(here, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    # the pair (word before, word), read by the word
    read = mesa(here[:, :, None], before[:, :, None], here[:, :, None], jnp.array([1.0]))[:, :, 0]
    same = np.asarray(before.cumsum(1) * here).sum(-1, keepdims=True)
    np.testing.assert_allclose(read + 0.2 / (same + 1), task.posterior(words), atol=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixer": "centred"}, "mixer is 'centred', must be None or one of"),
        ({"mixer": "linear", "gates": True}, "gates is True and mixer 'linear'"),
        ({"mixer": None, "gates": True}, "gates is True and mixer None"),
        ({"words": 0}, "words is 0, must be an integer of at least 1"),
        ({"layers": 0}, "layers is 0, must be an integer of at least 1"),
        ({"heads": 3}, "width is 64, must be a multiple of heads=3"),
    ],
)
def test_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        causal_language_model(**({"words": 5} | given))
