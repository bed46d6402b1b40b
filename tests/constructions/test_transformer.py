"""The transformer against loops in numpy, its sites against one another, and its NNX side."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import plain_numpy
import pytest
from flax import nnx

from constructions.core.config import (
    WIRING,
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
)
from constructions.core.transformer import SITES, Edit, Transformer, randomise
from constructions.core.weights import Wiring

WIDTH = 6
KINDS = ("word", "prefix", "stop")

PLAIN = LayerConfig(heads=(HeadsConfig("linear", 2, 3, 2),))
RICH = LayerConfig(
    heads=(
        HeadsConfig("softmax", 2, 3, 2, bias=True),
        HeadsConfig("linear", 1, 1, 4),
        HeadsConfig("centred", 3, 2, 1, bias=True),
    ),
    mlp=MlpConfig(5, "gelu", bias=True, tokens=("prefix", "stop")),
    norm=NormConfig("layer", affine=True),
    mlp_norm=NormConfig("rms", eps=1e-3, affine=True),
)
SLOTTED = LayerConfig(
    heads=(HeadsConfig("softmax", 1, 2, 2),),
    mlp=MlpConfig(3, "identity", gated=True),
    norm=NormConfig("rms", read=(0, 2), write=(3, 5), tokens=("word",)),
)
GATED = LayerConfig(mlp=MlpConfig(4, "tanh", gated=True, bias=True))
RELU = LayerConfig(
    heads=(HeadsConfig("linear", 1, 2, 2, bias=True),),
    mlp=MlpConfig(2, "relu"),
    mlp_norm=NormConfig("layer", read=(1, 4), write=(0, 3), affine=True),
)
MESA = LayerConfig(
    heads=(
        HeadsConfig("mesa", 2, 3, 2, bias=True),
        HeadsConfig("softmax", 1, 2, 2),
        HeadsConfig("mesa", 1, 2, 3, gates=True),
    ),
    mlp=MlpConfig(3, "relu"),
)
FACTOR = LayerConfig(
    heads=(
        HeadsConfig("softmax", 2, 3, 2, bias=True, factor_dim=2),
        HeadsConfig("linear", 1, 2, 3, factor_dim=1),
    ),
    mlp=MlpConfig(3, "identity"),
)
TRANSPOSED = LayerConfig(
    heads=(HeadsConfig("transposed_softmax", 2, 2, 3, factor_dim=3), HeadsConfig("linear", 1, 2, 2))
)
EMPTY = LayerConfig(norm=NormConfig("layer", read=(0, 3), write=(3, 6)))

CONFIGS = {
    "plain": Config(WIDTH, (SegmentConfig((PLAIN,)),)),
    "rich": Config(WIDTH, (SegmentConfig((RICH,), 2),), KINDS, NormConfig("layer", affine=True)),
    "tied": Config(WIDTH, (SegmentConfig((PLAIN, RICH), 3, tied=True),), KINDS),
    "segments": Config(
        WIDTH,
        (SegmentConfig((SLOTTED, GATED), 2), SegmentConfig((RICH,)), SegmentConfig((RELU,), 3)),
        KINDS,
        NormConfig("rms"),
    ),
    "mesa": Config(WIDTH, (SegmentConfig((MESA,), 2), SegmentConfig((PLAIN,))), KINDS),
    "factors": Config(WIDTH, (SegmentConfig((FACTOR,), 2), SegmentConfig((TRANSPOSED,))), KINDS),
    "no weights": Config(WIDTH, (SegmentConfig((EMPTY,), 2), SegmentConfig((PLAIN, EMPTY), 2))),
}


def arrays_of(config, seed=0, dtype=np.float64):
    """Random arrays of a config, windows and token groups among them."""
    rng = np.random.default_rng(seed)

    def draw(tree, name=""):
        if isinstance(tree, dict):
            drawn = {key: draw(value, str(key)) for key, value in tree.items()}
            if "log_regularization" in tree:  # a mesa head sees all tokens so far
                drawn["window"] = jnp.broadcast_to(jnp.int32([-(2**30), 0]), tree["window"])
                drawn["sink_groups"] = jnp.zeros(tree["sink_groups"], bool)
            return drawn
        if name == "window":
            low = rng.integers(-4, 2, tree[:-1])
            return jnp.asarray(np.stack([low, low + rng.integers(0, 5, low.shape)], -1), jnp.int32)
        if name.endswith("_groups"):
            return jnp.asarray(rng.random(tree) < 0.7)
        return jnp.asarray(rng.normal(size=tree) * 0.6, dtype)

    return draw(config.shapes())


def model_of(config, seed=0):
    arrays = arrays_of(config, seed)
    return Transformer(config, arrays), arrays


def stream_of(config, batch=2, tokens=5, seed=1):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, len(config.token_groups), (batch, tokens))
    return jnp.asarray(rng.normal(size=(batch, tokens, config.width))), jnp.asarray(groups)


# One compiled function a configuration, shared by all tests of this file: run eagerly, each call of
# a model compiles its scans anew.
@jax.jit
def call(model, stream, groups):
    return model(stream, groups)


@jax.jit
def run(model, stream, groups, edits):
    return model.run(stream, groups, sites=tuple(SITES), edits=edits)


@pytest.mark.parametrize(
    ("name", "per_example"),
    [pytest.param(name, True, id=f"{name}-[batch, token]") for name in CONFIGS]
    + [
        # one kind of token in all sequences is another mask, the same for every config
        pytest.param(
            name, False, id=f"{name}-[token]", marks=pytest.mark.slow if name != "rich" else ()
        )
        for name in CONFIGS
    ],
)
def test_equals_loops(x64, name, per_example):
    config = CONFIGS[name]
    model, arrays = model_of(config)
    stream, groups = stream_of(config)
    groups = groups if per_example else groups[0]
    expected, sites, before = plain_numpy.transformer(config, arrays, stream, groups)
    np.testing.assert_allclose(call(model, stream, groups), expected, rtol=1e-11, atol=1e-11)

    out, found = run(model, stream, groups, {})
    np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(found["residual"][-1], before, rtol=1e-11, atol=1e-11)
    for number, (layer, site) in enumerate(zip(config.layers(), sites, strict=True)):
        for wanted, at in (("residual", "residual"), ("middle", "middle")):
            np.testing.assert_allclose(found[at][number], site[wanted], rtol=1e-11, atol=1e-11)
        heads = sum(h.heads for h in layer.heads)
        attention = found["attention"][number]
        assert attention.shape[1] == config.max_heads
        assert not attention[:, heads:].any()
        if heads:
            np.testing.assert_allclose(attention[:, :heads], site["attention"], atol=1e-11)
            each = np.moveaxis(np.asarray(site["head_output"]), 1, 2)
            head_output = found["head_output"][number]
            np.testing.assert_allclose(head_output[:, :, :heads], each, rtol=1e-11, atol=1e-11)
            assert not head_output[:, :, heads:].any()
        hidden = found["mlp_hidden"][number]
        used = layer.mlp.hidden if layer.mlp else 0
        assert not hidden[..., used:].any()
        if used:
            np.testing.assert_allclose(hidden[..., :used], site["hidden"], rtol=1e-11, atol=1e-11)


def test_float32_is_kept():
    config = CONFIGS["segments"]
    model = Transformer(config, arrays_of(config, dtype=np.float32))
    stream, groups = stream_of(config)
    assert jax.eval_shape(model, stream.astype(jnp.float32), groups).dtype == jnp.float32


def test_a_query_without_keys_gets_nothing(x64):
    config = CONFIGS["rich"]
    arrays = arrays_of(config)
    for heads in arrays["segments"][0]["layers"][0]["heads"].values():
        heads["query_groups"] = jnp.zeros_like(heads["query_groups"])
    model = Transformer(config, arrays)
    stream, groups = stream_of(config)
    _, found = run(model, stream, groups, {})
    assert not found["attention"].any()
    assert not found["head_output"].any()


READS = [slice(2, None), slice(-3, -1), slice(0, 2), slice(None)]


@pytest.mark.parametrize("name", CONFIGS)
def test_read_is_the_full_run_sliced(x64, name):
    config = CONFIGS[name]
    model, _ = model_of(config)
    stream, groups = stream_of(config)
    for kinds, reads in ((groups[0], READS), (groups, [slice(-1, None)])):
        full = call(model, stream, kinds)
        parts = jax.jit(lambda m, s, g, reads=reads: [m(s, g, read=read) for read in reads])
        for read, part in zip(reads, parts(model, stream, kinds), strict=True):
            assert part.shape == full[:, read].shape
            np.testing.assert_allclose(part, full[:, read], rtol=1e-12, atol=1e-12)


def test_read_computes_fewer_queries_in_the_last_layer():
    config = CONFIGS["plain"]
    model = Transformer(config, arrays_of(config, dtype=np.float32))
    stream = jnp.zeros((2, 64, WIDTH))
    full, last = (
        str(jax.make_jaxpr(lambda m, s, read=read: m(s, read=read))(model, stream))
        for read in (None, slice(-1, None))
    )
    assert "f32[2,2,64,64]" in full
    assert "f32[2,2,64,64]" not in last
    assert "f32[2,2,1,64]" in last


@pytest.mark.parametrize("name", CONFIGS)
def test_sites_satisfy_their_equations(x64, name):
    config = CONFIGS[name]
    model, arrays = model_of(config)
    arrays = jax.device_get(arrays)
    stream, groups = stream_of(config)
    _, found = jax.device_get(run(model, stream, groups, {}))
    assert found["residual"].shape[0] == config.depth + 1
    np.testing.assert_array_equal(found["residual"][0], stream)
    number = 0
    for s, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            for p, layer in enumerate(segment.pattern):
                stored = arrays["segments"][s]["layers"][p]
                weights = jax.tree.map(lambda a, t=segment.tied, r=repeat: a[0 if t else r], stored)
                before, middle = found["residual"][number], found["middle"][number]
                if layer.norm is None or layer.norm.write is None:
                    bias = sum(w.get("output_bias", 0) for w in weights["heads"].values())
                    update = found["head_output"][number].sum(2) + bias
                    np.testing.assert_allclose(middle, before + update, atol=1e-12)
                after = found["residual"][number + 1]
                if layer.mlp is None:
                    np.testing.assert_array_equal(after, middle)
                elif layer.mlp_norm is None or layer.mlp_norm.write is None:
                    hidden = found["mlp_hidden"][number][..., : layer.mlp.hidden]
                    w = weights["mlp"]
                    out = hidden @ w["output"].T + w.get("output_bias", 0)
                    if layer.mlp.tokens is not None:
                        kinds = [config.token_groups.index(kind) for kind in layer.mlp.tokens]
                        out = out * np.isin(groups, kinds)[..., None]
                    np.testing.assert_allclose(after, middle + out, atol=1e-12)
                number += 1


@pytest.mark.parametrize("name", ["rich", "segments", "tied"])
def test_an_edit_with_the_value_itself_changes_nothing(x64, name):
    config = CONFIGS[name]
    model, _ = model_of(config)
    stream, groups = stream_of(config)
    out, found = run(model, stream, groups, {})
    for site in SITES:
        # wrong values at the other sites, which are not asked for
        edits = {
            s: Edit(np.full((1,) * a.ndim, s == site), np.asarray(a) + (s != site))
            for s, a in found.items()
        }
        again, seen = run(model, stream, groups, edits)
        np.testing.assert_allclose(again, out, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(seen[site], found[site])


@pytest.mark.parametrize("name", ["rich", "segments", "tied"])
def test_a_residual_edit_restarts_the_model_there(x64, name):
    """Patching the whole stream of one run into another gives the other run from there on."""
    config = CONFIGS[name]
    model, _ = model_of(config)
    stream, groups = stream_of(config)
    out, found = run(model, stream_of(config, seed=5)[0], groups, {})
    wanted = np.asarray(found["residual"])
    for layer in (0, 1, -1):
        where = np.zeros((config.depth + 1, 1, 1, 1), bool)
        where[layer] = True
        patched, seen = run(model, stream, groups, {"residual": Edit(where, found["residual"])})
        np.testing.assert_allclose(patched, out, rtol=1e-12, atol=1e-12)
        start, after = layer % (config.depth + 1), np.asarray(seen["residual"])
        np.testing.assert_allclose(after[start:], wanted[start:], atol=1e-12)
        if start:
            assert np.abs(after[start - 1] - wanted[start - 1]).max() > 1e-3


def test_edits_broadcast(x64):
    config = CONFIGS["segments"]
    model, _ = model_of(config)
    stream, groups = stream_of(config)
    shape = (config.depth, 2, 5, config.max_heads, WIDTH)
    # token 3, every head of layer 2, every example
    where = jnp.zeros((config.depth, 1, 5, 1, 1), bool).at[2, :, 3].set(True)
    value = jnp.full((1, 1, 1, 1, 1), 0.25)
    small = run(model, stream, groups, {"head_output": Edit(where, value)})[0]
    full = Edit(jnp.broadcast_to(where, shape), jnp.broadcast_to(value, shape))
    np.testing.assert_array_equal(small, run(model, stream, groups, {"head_output": full})[0])
    assert np.abs(small - call(model, stream, groups)).max() > 1e-3


def test_an_ablated_head_is_a_head_with_zero_output(x64):
    config = CONFIGS["rich"]
    model, arrays = model_of(config)
    stream, groups = stream_of(config)
    where = jnp.zeros((2, 1, 1, config.max_heads, 1), bool).at[1, :, :, 3].set(True)
    edited, _ = run(model, stream, groups, {"head_output": Edit(where, jnp.zeros((1,) * 5))})
    # head 3 of the layer is the first of the third group
    heads = arrays["segments"][0]["layers"][0]["heads"]
    heads[2]["output"] = heads[2]["output"].at[1, 0].set(0)
    without = call(Transformer(config, arrays), stream, groups)
    np.testing.assert_allclose(edited, without, atol=1e-12)


def test_many_edits_share_one_compile(x64):
    config = CONFIGS["rich"]
    model, _ = model_of(config)
    stream, groups = stream_of(config)
    compiled = 0

    @jax.jit
    def patched(where, value):
        nonlocal compiled
        compiled += 1
        return model.run(stream, groups, edits={"residual": Edit(where, value)})[0]

    for layer in range(3):
        where = jnp.zeros((3, 1, 1, 1), bool).at[layer].set(True)
        patched(where, jnp.zeros((1, 1, 1, 1)))
    assert compiled == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": ("nothing",)}, "unknown site 'nothing'"),
        ({"edits": {"nothing": Edit(jnp.ones(1, bool), jnp.ones(1))}}, "unknown site 'nothing'"),
        ({"edits": {"middle": Edit(jnp.ones((1, 1, 1), bool), jnp.ones((1, 1, 1, 1)))}}, "where"),
        (
            {"edits": {"middle": Edit(jnp.ones((1, 1, 1, 1), bool), jnp.ones((7, 1, 1, 1)))}},
            "value",
        ),
    ],
)
def test_bad_sites_are_named(arguments, message):
    config = CONFIGS["rich"]
    model = Transformer(config, arrays_of(config, dtype=np.float32))
    with pytest.raises(ValueError, match=message):
        model.run(jnp.zeros((1, 2, WIDTH)), jnp.zeros(2, int), **arguments)


def test_bad_shapes_are_named():
    config = CONFIGS["rich"]
    arrays = arrays_of(config, dtype=np.float32)
    with pytest.raises(ValueError, match=r"stream has shape \(1, 2, 5\)"):
        Transformer(config, arrays)(jnp.zeros((1, 2, WIDTH - 1)))
    heads = arrays["segments"][0]["layers"][0]["heads"]
    heads[1]["query"] = heads[1]["query"][..., :-1]
    with pytest.raises(ValueError, match=r"segments.0.layers.0.heads.1.query"):
        Transformer(config, arrays)
    del heads[1]["query"]
    with pytest.raises(ValueError, match=r"segments.0.layers.0.heads.1"):
        Transformer(config, arrays)


def equations(jaxpr):
    """Number of equations, those of inner jaxprs included."""
    count = 0
    for equation in jaxpr.eqns:
        count += 1
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            count += equations(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("read", [None, slice(-1, None)])
def test_the_computation_does_not_grow_with_depth(tied, read):
    sizes = []
    for repeats in (10, 100):
        config = Config(WIDTH, (SegmentConfig((RICH, PLAIN), repeats, tied),), KINDS)
        model = Transformer(config, arrays_of(config, dtype=np.float32))
        jaxpr = jax.make_jaxpr(lambda m, s: m(s, jnp.zeros(5, int), read=read))(
            model, jnp.zeros((2, 5, WIDTH))
        )
        sizes.append(equations(jaxpr.jaxpr))
    assert sizes[0] == sizes[1] > 50


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_json(name):
    config = CONFIGS[name]
    again = Config.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert hash(again) == hash(config)
    assert again.shapes() == config.shapes()
    for change in ({"width": 7}, {"precision": "default"}, {"token_groups": ("other",)}):
        other = dataclasses.replace(config, **change)
        assert Config.from_json(json.loads(json.dumps(other.to_json()))) == other != config


@pytest.mark.parametrize("name", CONFIGS)
def test_split_and_merge(x64, name):
    model, _ = model_of(CONFIGS[name])
    stream, groups = stream_of(CONFIGS[name])
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    again = nnx.merge(graph, params, rest)
    np.testing.assert_array_equal(call(again, stream, groups), call(model, stream, groups))
    assert not {str(path[-1]) for path, _ in nnx.to_flat_state(params)} & {*WIRING}
    assert {str(path[-1]) for path, _ in nnx.to_flat_state(rest)} <= {*WIRING}
    assert all(isinstance(v, Wiring) for _, v in nnx.to_flat_state(rest))


def test_gradients_reach_every_parameter_and_no_wiring(x64):
    config = Config(
        WIDTH, (SegmentConfig((RICH,), 2), SegmentConfig((SLOTTED,), 2)), KINDS, RICH.norm
    )
    arrays = arrays_of(config)
    for segment in arrays["segments"].values():
        for heads in segment["layers"][0]["heads"].values():
            heads["window"] = jnp.broadcast_to(jnp.array([-9, 9], jnp.int32), heads["window"].shape)
            heads["query_groups"] = jnp.ones_like(heads["query_groups"])
            heads["key_groups"] = jnp.ones_like(heads["key_groups"])
    model = Transformer(config, arrays)
    stream, groups = stream_of(config)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    gradient = jax.jit(
        jax.grad(lambda p: jnp.sin(nnx.merge(graph, p, rest)(stream, groups)).sum())
    )(params)
    flat = dict(nnx.to_flat_state(gradient))
    assert {p for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))} == set(flat)
    # a softmax does not see what is added to all keys alike, nor centred attention what is added
    # to all values; every other array must matter
    still = {path for path, leaf in flat.items() if not np.abs(leaf[...]).max() > 1e-12}
    centred = next(n for n, heads in enumerate(RICH.heads) if heads.mixer == "centred")
    assert all(p[-1] == "key_bias" or p[-2:] == (centred, "value_bias") for p in still), still


def test_randomise(x64):
    config = Config(
        32,
        (SegmentConfig((dataclasses.replace(RICH, heads=(HeadsConfig("linear", 3, 8, 8),)),), 4),),
        KINDS,
        NormConfig("layer", affine=True),
    )
    model, _ = model_of(config)
    draw = jax.jit(randomise)
    drawn = draw(model, jax.random.key(0), 0.3)

    flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(drawn))}
    old = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    weights = []
    for path, value in flat.items():
        name = path[-1]
        if name in WIRING:
            np.testing.assert_array_equal(value, old[path])
        elif name == "gain":
            np.testing.assert_array_equal(value, 1)
        elif name == "offset" or name.endswith("_bias"):
            np.testing.assert_array_equal(value, 0)
        else:
            weights.append(value.ravel())
    joined = np.concatenate(weights)
    assert len(np.unique(joined)) == len(joined)
    # 4 standard errors of mean, variance and fourth moment of a normal distribution
    n = len(joined)
    z = joined / 0.3
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs((z**2).mean() - 1) < 4 * np.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96 / n)

    def same(a, b):
        leaves = zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True)
        return all(np.array_equal(x, y) for x, y in leaves)

    assert same(drawn, draw(model, jax.random.key(0), 0.3))
    assert not same(drawn, draw(model, jax.random.key(1), 0.3))


def test_randomise_under_vmap(x64):
    model, _ = model_of(CONFIGS["plain"])
    stream, groups = stream_of(CONFIGS["plain"])
    keys = jax.random.split(jax.random.key(0), 3)
    outputs = jax.jit(jax.vmap(lambda k, s: randomise(model, k, s)(stream, groups), (0, None)))(
        keys, 0.2
    )
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    alone = randomise(model, keys[1], 0.2)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    np.testing.assert_allclose(outputs[1], call(alone, stream, groups), rtol=1e-10, atol=1e-12)
    assert np.abs(outputs[1] - outputs[0]).max() > 1e-3


def test_under_tree_mode():
    """The same model where NNX keeps trees instead of graphs."""
    if os.environ.get("NNX_GRAPH_MODE") == "false":
        pytest.skip("already in tree mode")
    code = """
import jax, jax.numpy as jnp
from flax import nnx
from constructions.core.config import *
from constructions.core.compile import _cast, _zeros
from constructions.core.transformer import Transformer, randomise
layer = LayerConfig((HeadsConfig("softmax", 2, 2, 2),), MlpConfig(3), NormConfig(affine=True))
config = Config(4, (SegmentConfig((layer,), 2),))
arrays = _cast(_zeros(config.shapes()), jnp.float32)
model = randomise(Transformer(config, arrays), jax.random.key(0), 0.5)
stream = jnp.ones((2, 3, 4))
out = nnx.jit(lambda m, s: m(s))(model, stream)
graph, params, rest = nnx.split(model, nnx.Param, ...)
grads = jax.grad(lambda p: nnx.merge(graph, p, rest)(stream).sum())(params)
assert jax.tree.structure(grads) == jax.tree.structure(params)
_, sites = model.run(stream, sites=("residual",))
assert jnp.allclose(sites["residual"][-1], out, atol=1e-6)
"""
    tree_mode = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | tree_mode,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_weights_are_read_and_replaced_by_name():
    """Of one head of one layer: stored layers repeat, heads of a layer differ in shape."""
    plain = HeadsConfig("linear", 2, 3, 2), HeadsConfig("softmax", 1, 2, 4)
    config = Config(WIDTH, (SegmentConfig((LayerConfig(plain), LayerConfig(plain[:1])), 2),))
    arrays = jax.tree.map(jnp.zeros, config.shapes(), is_leaf=lambda s: isinstance(s, tuple))
    model = randomise(Transformer(config, arrays), jax.random.key(0), 1.0)
    stored = model.arrays()["segments"][0]["layers"][0]["heads"]
    np.testing.assert_array_equal(model.layer(3).head(1).query, stored[0]["query"][1, 1])
    np.testing.assert_array_equal(model.layer(1).head(2).output, stored[1]["output"][0, 0])
    new = model.with_head(3, 2, query=jnp.ones((2, WIDTH)))
    changed = {
        (n, h, name)
        for n in range(1, 5)
        for h, head in enumerate(model.layer(n).heads)
        for name in dir(head)
        if not np.array_equal(getattr(head, name), getattr(new.layer(n).head(h), name))
    }
    assert changed == {(3, 2, "query")} and (new.layer(3).head(2).query == 1).all()
    for bad in (lambda: model.layer(5), lambda: model.layer(1).head(3)):
        with pytest.raises(ValueError, match="is [53], "):
            bad()
    with pytest.raises(ValueError, match="queri"):
        model.with_head(1, 0, queri=jnp.ones((3, WIDTH)))
    with pytest.raises(ValueError, match=r"query has shape \(1, 6\), must be \(3, 6\)"):
        model.with_head(1, 0, query=jnp.ones((1, WIDTH)))
