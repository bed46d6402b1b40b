"""Where TinT keeps things: prefix tokens, places, and what its near-misses write there."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tint_oracle import (
    RATE,
    TEXTS,
    TIME,
    TRAINED,
    VALUE_ONLY,
    flat,
    names,
    parameters,
    reference,
    simulate,
    small,
    updated,
)

from constructions.claims import is_function
from constructions.core.evaluate import SlotBySlot
from constructions.core.transformer import Transformer
from constructions.family import verify
from constructions.tint.construction import Tint
from constructions.tint.layout import contents

MATRICES = ("query", "key", "value", "output", "hidden", "back")


@pytest.fixture(scope="module")
def tint():
    with jax.enable_x64(True):
        return Tint(small(), learning_rate=RATE, stack=2)


@pytest.fixture(scope="module")
def dense(tint):
    with jax.enable_x64(True):
        return tint.compile().model


def test_training_the_given_model_later_changes_nothing(x64):
    given = small()
    tint = Tint(given, learning_rate=RATE, stack=2)
    nnx.update(given, jax.tree.map(lambda a: a + 1, nnx.state(given, nnx.Param)))
    found = parameters(tint.auxiliary)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, parameters(small())))
    values = contents(tint.layout, tint.weights, jnp.asarray(TEXTS), jnp.asarray(TRAINED))
    np.testing.assert_array_equal(
        values["embedding"][0, tint.layout.positions("words", TIME).start :][:5],
        parameters(small())["tokens"]["embedding"],
    )


def with_row(model, name, row, noise):
    """The model with `noise` added to one row of [W b]."""
    arrays = jax.tree.map(np.array, jax.device_get(model.arrays()))
    layer = arrays["segments"][0]["layers"][0]
    heads, mlp = layer["heads"][0], layer["mlp"]
    d = heads["query"].shape[2]
    if name in ("query", "key", "value"):
        heads[name][0, row // d, row % d] += noise[:-1]
        heads[f"{name}_bias"][0, row // d, row % d] += noise[-1]
    elif name == "output":
        heads["output"][0, :, row] += noise[:-1].reshape(-1, d)
        heads["output_bias"][0, row] += noise[-1]
    else:
        own = "hidden" if name == "hidden" else "output"
        mlp[own][0, row] += noise[:-1]
        mlp[f"{own}_bias"][0, row] += noise[-1]
    return Transformer(model.config, jax.tree.map(jnp.asarray, arrays))


@jax.jit
def run_dense(model, stream, groups):
    return model(stream, groups)


def test_a_prefix_token_holds_its_rows_alone(x64, tint, dense):
    """Noise in token k of a matrix is noise in the rows k, K + k, ... with K = width / 2."""
    rng = np.random.default_rng(2)
    start = small()
    given, trained = jnp.asarray(TEXTS), jnp.asarray(TRAINED)
    embedded = tint.stream(dense, given[:1], trained[:1])
    streams, expected = [], []
    for n, name in enumerate(MATRICES):
        matrix, model = tint.layout.matrices[name, 0], start
        token, k = tint.layout.positions(matrix.group, TIME).start + n % 2, n % 2
        noise = rng.normal(size=(len(matrix.rows), matrix.rows[0].size))
        stream = embedded.values
        for s, slot in enumerate(matrix.rows):
            stream = stream.at[:, token, slot.columns].add(noise[s])
            model = with_row(model, name, s * 2 + k, noise[s])
        # nothing else in the stream depends on those rows
        again = replace(tint, auxiliary=model).stream(dense, given[:1], trained[:1])
        np.testing.assert_allclose(again.values, stream, atol=1e-15)
        streams.append(stream)
        expected.append(reference(model, given[:1], trained[:1], rate=RATE))
    out = run_dense(dense, jnp.concatenate(streams), embedded.groups)
    places = tint.places(0, given[:1], trained[:1])
    table = parameters(start)["tokens"]["embedding"]
    for name, key in (("before", "final_before"), ("after", "final_after")):
        says = places[key].gather(out[None], tint.program.slots) @ table.T
        for n, one in enumerate(expected):
            np.testing.assert_allclose(says[n], getattr(one, name)[0], atol=1e-11)


@pytest.mark.slow
def test_read_and_places_agree_with_run(x64, tint, dense):
    start = names(parameters(small()))
    one, other = simulate(tint), simulate(tint, model=dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), one, other)
    found = jax.device_get(tint.read(dense, jnp.asarray(TEXTS), jnp.asarray(TRAINED)))
    np.testing.assert_allclose(found["logits_before"], one.logits_before, atol=1e-12)
    np.testing.assert_allclose(found["logits_after"], one.logits_after, atol=1e-12)
    change = {n: (after - start[n]) / RATE for n, after in updated(one).items()}
    change = {n.removeprefix("segments/0/layers/0/"): a for n, a in change.items()}
    for name in ("query", "key", "value"):
        matrix, bias = found[name][:, 0, :, :-1], found[name][:, 0, :, -1]
        np.testing.assert_allclose(
            matrix.reshape(4, 2, 2, 4), change[f"heads/0/{name}"][:, 0], atol=1e-12
        )
        np.testing.assert_allclose(
            bias.reshape(4, 2, 2), change[f"heads/0/{name}_bias"][:, 0], atol=1e-12
        )
    output = found["output"][:, 0, :, :-1].reshape(4, 4, 2, 2).swapaxes(1, 2)
    np.testing.assert_allclose(output, change["heads/0/output"][:, 0], atol=1e-12)
    for name, own in (("hidden", "mlp/hidden"), ("back", "mlp/output")):
        np.testing.assert_allclose(found[name][..., :-1], change[own], atol=1e-12)
        np.testing.assert_allclose(found[name][..., -1], change[f"{own}_bias"], atol=1e-12)
    for name in ("gain", "offset"):
        for n, own in enumerate(("norm", "mlp_norm")):
            np.testing.assert_allclose(found[name][:, n], change[f"{own}/{name}"][:, 0], atol=1e-12)
        np.testing.assert_allclose(found[name][:, 2], change[f"final_norm/{name}"], atol=1e-12)


def test_near_misses(x64, tint, dense):
    right = flat(updated(simulate(tint, model=dense)), small())
    found = {}
    for name, (model, base) in tint.near_misses().items():
        assert base is tint
        if is_function(model):  # of predictions alone; the ledger's tests have them
            assert name in ("no step", "cache of words")
            continue
        found[name] = updated(simulate(tint, model=model))
    changes = {name: flat(after, small()) for name, after in found.items()}
    np.testing.assert_allclose(changes["up the gradient"], -right, atol=1e-12)
    np.testing.assert_allclose(changes["half the step"], right / 2, atol=1e-12)
    frozen = reference(
        small(), TEXTS, TRAINED, rate=RATE, frozen=VALUE_ONLY, value_only=True
    ).updated
    value_only = changes["value-only attention"]
    np.testing.assert_allclose(value_only, flat(frozen, small()), atol=1e-12)
    for name in changes:
        assert np.linalg.norm(changes[name] - right) > 5e-3 * np.linalg.norm(right), name
    blind = found["no gradient through attention"]
    start = names(parameters(small()))
    for name, after in blind.items():
        still = name.split("/")[-1].split("_")[0] in (
            "query",
            "key",
            "value",
            "embedding",
            "position",
        )
        assert (after == start[name]).all() == (
            still or name.endswith("/0/norm/gain") or name.endswith("/0/norm/offset")
        ), name


def test_without_dense_weights(x64, tint, monkeypatch):
    """Where there would be too many the program stands in their place, and nothing is trained."""
    monkeypatch.setattr("constructions.tint.construction.DENSE", 0)
    model = tint.compile().model
    assert isinstance(model, SlotBySlot)
    one, other = simulate(tint), simulate(tint, model=model)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one, other))
    for asked in (tint.counterpart, tint.near_misses):
        with pytest.raises(ValueError, match="auxiliary: its simulator would have .* at most 0"):
            asked()


@pytest.mark.slow
def test_certificate_without_dense_weights(tint, monkeypatch):
    monkeypatch.setattr("constructions.tint.construction.DENSE", 0)
    assert verify(tint, batch=4).passed
