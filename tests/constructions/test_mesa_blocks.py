"""Block scalars against loops over heads and tokens, and what reduces a model to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.core.canonical import head_products
from constructions.core.config import Config
from constructions.core.transformer import randomise
from constructions.mesa.models import (
    BlockScalars,
    between,
    compressed,
    drawn_scalars,
    scalar_predictions,
    sequence_model,
    unexplained,
)
from constructions.mesa.polynomial import MesaPolynomial
from constructions.mesa.tokens import CLIP
from synthetic.fitting.train import fit

KEY = jax.random.key(0)
DIM, CHANNELS = 3, 4


def construction(length=6):
    return MesaPolynomial(DIM, length, tokens="constructed", coefficients=(0.1, -0.01))


def random_model(layers=2, std=0.3):
    base = sequence_model(construction(), ("linear",) * layers, heads=2, rows=5)
    return randomise(base, KEY, std)


def by_loops(scalars, tokens):
    """The last stream of one sequence `[time, channel, dim]`, channel by channel."""
    h = np.array(tokens)
    for query, output in zip(
        np.asarray(scalars.key_query[...]), np.asarray(scalars.output_value[...]), strict=True
    ):
        new = h.copy()
        for b, a in zip(query, output, strict=True):
            for t in range(len(h)):
                for s in range(t + 1):
                    score = sum(
                        b[i, j] * (h[s, i] @ h[t, j]) for i in range(CHANNELS) for j in range(4)
                    )
                    new[t] += score * a @ h[s]
        h = new
    return h


def test_expanded_scalars_are_linear_attention_between_channels(x64):
    scalars = drawn_scalars(KEY, layers=2, std=0.2)
    model = scalars.expanded(DIM)
    tokens = np.random.default_rng(0).normal(size=(2, 5, CHANNELS, DIM))
    groups = jnp.ones(5, int)  # all of them states
    found = model(jnp.asarray(tokens.reshape(2, 5, -1)), groups).reshape(tokens.shape)
    expected = np.stack([by_loops(scalars, sequence) for sequence in tokens])
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_scalars_commute_with_rotations_and_free_weights_do_not(x64):
    c = construction()
    states = c.task.sample(KEY, 4).inputs[0]
    turn = jax.random.orthogonal(jax.random.key(1), DIM)
    for model, alike in ((drawn_scalars(KEY, 2, std=0.2).expanded(DIM), True), (random_model(), 0)):
        first, turned = c.predict(model, states), c.predict(model, states @ turn)
        gap = float(jnp.abs(turned - first @ turn).max() / jnp.abs(first).max())
        assert gap < 1e-12 if alike else gap > 0.1


def test_compressed_is_the_nearest():
    model = random_model()
    scalars = compressed(model, DIM)
    products = head_products(model)

    def distance(query, output):
        near = head_products(BlockScalars(query, output).expanded(DIM))
        pairs = zip(products[:2], near[:2], strict=True)
        return sum(jnp.square(a - b).sum() for a, b in pairs)

    given = (scalars.key_query[...], scalars.output_value[...])
    slopes = jax.grad(distance, argnums=(0, 1))(*given)
    assert max(float(jnp.abs(s).max()) for s in slopes) < 1e-4
    assert float(distance(*(1.1 * a for a in given))) > float(distance(*given))
    total = sum(jnp.square(a).sum((1, 2, 3)) for a in products[:2])
    left = [
        sum(
            np.square(np.asarray(a[layer] - b[layer])).sum()
            for a, b in zip(products[:2], head_products(scalars.expanded(DIM))[:2], strict=True)
        )
        for layer in range(2)
    ]
    np.testing.assert_allclose(unexplained(model, DIM), np.array(left) / total, rtol=1e-5)


def test_compression_gives_scalars_back():
    scalars = drawn_scalars(KEY, 2, std=0.2)
    found = compressed(scalars.expanded(DIM), DIM)
    np.testing.assert_allclose(found.key_query[...], scalars.key_query[...], atol=1e-7)
    np.testing.assert_allclose(found.output_value[...], scalars.output_value[...], atol=1e-7)
    np.testing.assert_allclose(unexplained(scalars.expanded(DIM), DIM), 0, atol=1e-6)


def test_between_two_models(x64):
    c, model = construction(), random_model()
    other = compressed(model, DIM).expanded(DIM)
    states = c.task.sample(KEY, 4).inputs[0]
    for fraction, end in ((0.0, model), (1.0, other)):
        line = between(model, other, fraction)
        np.testing.assert_allclose(c.predict(line, states), c.predict(end, states), atol=1e-12)
    middle = head_products(between(model, other, 0.25))
    for a, b, m in zip(head_products(model)[:2], head_products(other)[:2], middle[:2], strict=True):
        np.testing.assert_allclose(m, 0.75 * a + 0.25 * b, atol=1e-14)


def test_scalars_are_fitted():
    c = construction(length=8)
    task, recipe = c.task, {"steps": 150, "batch": 64, "learning_rate": 0.01, "chunk": 50}
    predict = scalar_predictions(c)
    found = fit(lambda key: drawn_scalars(key, 2, std=0.02), task, predict=predict, **recipe)
    batch = task.sample(jax.random.key(5), 1024)
    silent = float(task.loss(jnp.zeros_like(batch.target), batch).mean())
    assert float(task.loss(predict(found.model, *batch.inputs), batch).mean()) < 0.85 * silent


@pytest.mark.parametrize("mixers", [("softmax", "mesa"), ("softmax", "softmax", "linear")])
def test_sequence_models_run_from_raw_states(mixers):
    c = CATALOGUE["mesa-ridge"](dim=2, length=5, tokens="raw")
    base = sequence_model(c, mixers, heads=2, rows=3)
    assert [h.mixer for layer in base.config.layers() for h in layer.heads] == list(mixers)
    model = randomise(base, KEY, 0.5)
    states = c.task.sample(KEY, 3).inputs[0]
    before = np.asarray(c.predict(model, states))
    later = c.predict(model, states.at[:, 3:].add(1.0))
    np.testing.assert_array_equal(later[:, :3], before[:, :3])
    assert np.abs(later[:, 3:] - before[:, 3:]).max() > 1e-3


def test_a_bounded_stream():
    c = construction()
    base = sequence_model(c, ("linear",) * 3, clip=0.5)
    assert Config.from_json(base.config.to_json()) == base.config
    wild = randomise(base, KEY, 3.0)
    stream, groups, _ = c.stream(wild, c.task.sample(KEY, 4).inputs[0])
    _, sites = wild.run(stream, groups, sites=("residual",))
    assert np.abs(sites["residual"][1:]).max() == 0.5
    scalars = drawn_scalars(KEY, 2)
    bounded = [scalars.expanded(DIM, CLIP), between(*[scalars.expanded(DIM, CLIP)] * 2, 0.5)]
    assert [model.config.clip for model in bounded] == [CLIP, CLIP]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: BlockScalars(jnp.zeros((2, 1, 4, 3)), jnp.zeros((2, 1, 4, 3))),
        lambda: BlockScalars(jnp.zeros((2, 1, 4, 4)), jnp.zeros((1, 1, 4, 4))),
        lambda: compressed(random_model(), 5),
        lambda: unexplained(random_model(), 0),
        lambda: between(random_model(1), random_model(2), 0.5),
        lambda: between(random_model(), drawn_scalars(KEY, 2).expanded(DIM, CLIP), 0.5),
        lambda: sequence_model(construction(), "linear"),
        lambda: sequence_model(construction(), ()),
        lambda: sequence_model(construction(), ("linear", "attention")),
        lambda: sequence_model(construction(), ("linear",), heads=0),
    ],
)
def test_wrong_shapes(wrong):
    with pytest.raises(ValueError, match=r"must (be|divide|agree)"):
        wrong()


def test_what_has_no_compressed_expression():
    base = sequence_model(CATALOGUE["mesa-ridge"](dim=2, length=5), ("softmax",))
    with pytest.raises(TypeError, match="linear"):
        compressed(base, 2)
    # its head sees nothing but the token itself
    alone = construction().near_misses()["one law in the weights"].model
    with pytest.raises(TypeError):
        compressed(alone, DIM)
