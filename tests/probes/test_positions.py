"""Probes at one position: what a planted feature shows, and what it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.mesa.ridge import MesaRidge
from probes.positions import INPUT, position_probes
from probes.regression import split

C = MesaRidge(2, 6, tokens="constructed")
KEY = jax.random.key(0)
SIZE = 300


def planted():
    """Inputs, a target that only layer 1 of a made-up model holds, and only at token 3."""
    states = C.task.sample(KEY, SIZE).inputs[0]
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(SIZE, 6, 2)), jnp.float32)
    mix = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)

    def model(states):
        noise = jax.random.normal(jax.random.key(4), (2, SIZE, 6, 5))
        return {"residual": noise.at[1, :, 3].set(target[:, 3] @ mix)}

    return states, target, model


def test_it_finds_what_is_there_where_it_is():
    states, target, model = planted()
    given = {"planted": target, "input": jnp.concatenate([states[..., :1], states[..., :1]], -1)}
    found = position_probes(C, {"model": model}, given, (states,), 3, KEY)
    assert found.best("model", "planted") > 0.999
    assert found.layers["model"][0] == 1
    assert abs(found.best(INPUT, "planted")) < 0.2 and found.best(INPUT, "input") > 0.999
    elsewhere = position_probes(C, {"model": model}, given, (states,), 2, KEY)
    assert elsewhere.best("model", "planted") < 0.2


def test_the_input_column_is_the_embedding():
    states, target, _ = planted()
    model = C.compile().model
    found = position_probes(C, {"c": model}, {"state": states, "t": target}, (states,), 4, KEY)
    assert found.best(INPUT, "state") > 0.999 and found.best(INPUT, "t") < 0.2
    assert found.held_out["c"].shape == (2, 2) and found.held_out[INPUT].shape == (2, 1)
    np.testing.assert_allclose(found.held_out["c"][0, 0], found.held_out[INPUT][0, 0], atol=1e-6)


def test_layers_are_chosen_on_validation_sequences_and_scored_on_others():
    states, target, _ = planted()
    parts = split(KEY, SIZE)
    noise = np.random.default_rng(1).normal(size=(3, SIZE, 6, 2)).astype(np.float32)
    layers, at = noise.copy(), 3
    for layer, part, blur in ((1, "validation", 0.0), (2, "validation", 0.3), (2, "test", 0.0)):
        for rows in (parts.train, getattr(parts, part)):
            own = blur if rows is not parts.train else 0.0
            layers[layer, rows, at] = np.asarray(target)[rows, at] + own * noise[layer, rows, at]
    model = {"model": lambda _: {"residual": jnp.asarray(layers)}}
    found = position_probes(C, model, {"t": target}, (states,), at, KEY)
    assert found.layers["model"][0] == 1
    assert found.held_out["model"][0, 2] > 0.98 and found.best("model", "t") < 0
    # with almost no penalty it is least squares
    x, y = (np.asarray(a, float)[:, at] for a in (layers[2], target))
    mean_x, mean_y = x[parts.train].mean(0), y[parts.train].mean(0)
    weight = np.linalg.lstsq(x[parts.train] - mean_x, y[parts.train] - mean_y, rcond=None)[0]
    guess = mean_y + (x[parts.test] - mean_x) @ weight
    left, total = (np.square(y[parts.test] - a).sum() for a in (guess, mean_y))
    np.testing.assert_allclose(found.held_out["model"][0, 2], 1 - left / total, atol=0.02)


def test_few_sequences_look_good_in_sample():
    states, target, _ = planted()
    few = {"model": lambda s: {"residual": jax.random.normal(KEY, (1, len(s), 6, 40))}}
    found = position_probes(C, few, {"t": target[:100]}, (states[:100],), 3, KEY)
    assert found.in_sample["model"][0, 0] > found.held_out["model"][0, 0] + 0.02


@pytest.mark.parametrize(
    ("models", "targets", "position", "name"),
    [
        ({}, {"t": jnp.zeros((4, 6, 2))}, 0, "models"),
        ({INPUT: lambda s: {}}, {"t": jnp.zeros((4, 6, 2))}, 0, "models"),
        ({"m": lambda s: {}}, {}, 0, "targets"),
        ({"m": lambda s: {}}, {"t": jnp.zeros((4, 6, 2))}, 6, "position"),
        ({"m": lambda s: {}}, {"t": jnp.zeros((4, 6, 2))}, -1, "position"),
        ({"m": lambda s: {}}, {"t": jnp.zeros((3, 6, 2))}, 0, "'t' has shape"),
        ({"m": lambda s: {}}, {"t": jnp.zeros((4, 2))}, 0, "'t' has shape"),
        ({"m": lambda s: {}}, {"t": jnp.zeros((4, 7, 2))}, 0, "'t' has shape"),
    ],
)
def test_bad_arguments(models, targets, position, name):
    with pytest.raises(ValueError, match=name):
        position_probes(C, models, targets, (jnp.zeros((4, 6, 2)),), position, KEY)
