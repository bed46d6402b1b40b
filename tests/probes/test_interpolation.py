"""Lines between canonical forms, and damped roll-outs against damped gradient descent."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from constructions.core.canonical import canonical, canonical_distance, from_canonical
from constructions.core.config import Config, HeadsConfig, LayerConfig, MlpConfig, SegmentConfig
from constructions.core.symmetry import transform
from constructions.core.transformer import Transformer, randomise
from constructions.gradient_descent.construction import GradientDescent
from probes.interpolation import blend, interpolate, interpolation_gap
from probes.roll_out import roll_out
from synthetic.tasks.task import Batch

pytestmark = pytest.mark.usefixtures("x64")

SIZES = {"dim_x": 3, "dim_y": 2, "num_examples": 5, "init_weight": np.ones((2, 3)) / 2}
FRACTIONS = jnp.linspace(0, 1, 5)


def pair(steps, **settings):
    construction = GradientDescent(**SIZES, steps=steps, step_size=0.6, **settings)
    reference = construction.compile().model
    return construction, randomise(reference, jax.random.key(1), 0.4), reference


def batch(size=32):
    rng = np.random.default_rng(0)
    shapes = ((size, 5, 3), (size, 5, 2), (size, 1, 3), (size, 1, 2))
    x, y, query, target = (jnp.asarray(rng.normal(size=s)) for s in shapes)
    return Batch((x, y, query), target)


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_interpolation_is_that_of_canonical_forms(steps):
    construction, model, reference = pair(steps)
    gauge, data = construction.gauge(), batch()
    found = interpolate(construction, model, reference, data, FRACTIONS)
    t, u = canonical(model, gauge), canonical(reference, gauge)
    for s, loss in zip(FRACTIONS, found, strict=True):
        tensors = [(1 - s) * a + s * b for a, b in zip(t, u, strict=True)]
        between = from_canonical(tensors, reference, gauge)
        wanted = construction.task.loss(construction.apply(between, *data.inputs), data).mean()
        assert float(loss) == pytest.approx(float(wanted), rel=1e-10)
        assert canonical_distance(blend(model, reference, s), between, gauge) < 1e-10


def test_symmetries_do_not_bend_the_line():
    """While the straight line between the weights themselves loses everything half-way."""
    construction, _, reference = pair(1)
    gauge, data = construction.gauge(), batch()
    moved = nnx.jit(lambda m, k: transform(m, k, gauge))(reference, jax.random.key(0))
    losses = interpolate(construction, moved, reference, data, FRACTIONS)
    assert np.allclose(losses, losses[0], rtol=1e-10)
    assert float(interpolation_gap(losses)) == pytest.approx(0, abs=1e-10)
    arrays = reference.arrays()
    heads = arrays["segments"][0]["layers"][0]["heads"][0]
    heads |= {"output": -heads["output"], "key": -heads["key"]}
    flipped = Transformer(reference.config, arrays)
    graph, weights, rest = nnx.split(reference, nnx.Param, ...)
    average = jax.tree.map(lambda a, b: (a + b) / 2, weights, nnx.state(flipped, nnx.Param))
    half = construction.apply(nnx.merge(graph, average, rest), *data.inputs)
    assert np.allclose(half, data.inputs[2] @ construction.initial.T)


def test_gap():
    assert float(interpolation_gap(jnp.asarray([1.0, 3.0, 2.0]))) == pytest.approx(2.0)
    assert float(interpolation_gap(jnp.asarray([1.0, 0.5, 1.0]))) == 0
    construction, model, reference = pair(1)
    losses = interpolate(construction, model, reference, batch(), jnp.linspace(-1, 2, 4))
    ends = [construction.apply(m, *batch().inputs) for m in (model, reference)]
    wanted = [float(construction.task.loss(p, batch()).mean()) for p in ends]
    assert np.allclose(losses[1:3], wanted, rtol=1e-12)
    # one layer: the prediction is linear in s, so the loss is a parabola
    assert float(losses[0] - 3 * losses[1] + 3 * losses[2] - losses[3]) == pytest.approx(
        0, abs=1e-9
    )


def test_softmax_heads_blend_too():
    """The update of every layer is the mean of the updates."""
    shape = Config(4, (SegmentConfig((LayerConfig((HeadsConfig("softmax", 2, 3, 2, True),)),)),))
    rng = np.random.default_rng(0)

    def model():
        kinds = {"window": [-9, 9], "query_groups": [True], "key_groups": [True]}
        kinds |= {"sink_groups": [False], "scale": 1.0}
        arrays = jax.tree.map(
            lambda s: rng.normal(size=s), shape.shapes(), is_leaf=lambda s: isinstance(s, tuple)
        )
        heads = arrays["segments"][0]["layers"][0]["heads"][0]
        heads |= {n: np.broadcast_to(v, heads[n].shape) for n, v in kinds.items()}
        return Transformer(shape, jax.tree.map(jnp.asarray, arrays))

    one, two, h = model(), model(), jnp.asarray(rng.normal(size=(2, 5, 4)))
    assert np.allclose(blend(one, two, 0.3)(h), 0.7 * one(h) + 0.3 * two(h), atol=1e-12)


def test_models_that_cannot_be_blended():
    construction, model, _ = pair(2)
    looped = GradientDescent(**SIZES, steps=2, step_size=0.5, recurrent=True).compile().model
    with pytest.raises(ValueError, match="segments .layers, repeats, tied. of the model"):
        blend(model, looped, 0.5)
    layer = LayerConfig(mlp=MlpConfig(3))
    shape = Config(5, (SegmentConfig((layer,)),), ("context", "query"))
    arrays = jax.tree.map(jnp.zeros, shape.shapes(), is_leaf=lambda s: isinstance(s, tuple))
    with pytest.raises(TypeError, match="an mlp or a norm"):
        blend(model, Transformer(shape, arrays), 0.5)
    wide = GradientDescent(**(SIZES | {"dim_x": 4, "init_weight": None}), steps=2, step_size=0.5)
    with pytest.raises(ValueError, match="width of the model is 5, of the reference 6"):
        blend(model, wide.compile().model, 0.5)


@pytest.mark.parametrize("damping", [1.0, 0.75])
@pytest.mark.parametrize("layers", [{"steps": 1}, {"steps": 3}, {"steps": 2, "recurrent": True}])
def test_roll_out_is_damped_gradient_descent(layers, damping):
    construction = GradientDescent(**SIZES, **layers, step_size=0.6)
    model = construction.compile().model
    x, y, query = (np.asarray(a) for a in batch(4).inputs)
    found = jax.jit(lambda m, *z, damping: roll_out(construction, m, *z, depth=7, damping=damping))(
        model, x, y, query, damping=damping
    )
    weight = np.broadcast_to(construction.initial, (4, 2, 3))
    for k in range(8):
        assert np.allclose(found[k], query @ weight.transpose(0, 2, 1), atol=1e-12)
        gradient = (weight @ x.transpose(0, 2, 1) - y.transpose(0, 2, 1)) @ x / 5
        weight = weight - damping * 0.6 * gradient
    assert found.shape == (8, 4, 1, 2)


def test_roll_out_takes_any_layer():
    construction, model, _ = pair(3)
    inputs = batch(4).inputs
    stream, groups, _ = construction.stream(model, *inputs)
    for layer in (0, 1, -1):
        part = jax.tree.map(lambda a, k=layer % 3: a[k : k + 1], model.arrays()["segments"])
        alone = replace(model.config, segments=(replace(model.config.segments[0], repeats=1),))
        single, h = Transformer(alone, {"segments": part}), stream
        found = roll_out(construction, model, *inputs, depth=2, damping=0.5, layer=layer)
        for k in range(3):
            assert np.allclose(found[k], -h[:, -1:, 3:], atol=1e-12)
            h = (h + single(h, groups)) / 2
    with pytest.raises(ValueError, match="layer is 3, the model applies 3"):
        roll_out(construction, model, *inputs, depth=1, layer=3)
    with pytest.raises(ValueError, match="depth is -1"):
        roll_out(construction, model, *inputs, depth=-1)
