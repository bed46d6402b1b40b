"""The group leaves the function alone, the canonical form is its invariant, and nothing else is."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from constructions.core import symmetry as symmetries
from constructions.core.canonical import (
    canonical,
    canonical_distance,
    from_canonical,
    head_products,
    layer_tensors,
    without_inert,
)
from constructions.core.compile import FAR, compile_program
from constructions.core.config import (
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
)
from constructions.core.symmetry import (
    add_gram_pair,
    change_key_basis,
    change_value_basis,
    fill_inert,
    permute_heads,
    rescale_heads,
    split_heads,
    transform,
)
from constructions.core.transformer import Transformer
from constructions.family import Gauge
from constructions.gradient_descent.construction import GradientDescent

WIDTH, TOKENS = 5, 6
KINDS = jnp.asarray([0, 0, 0, 0, 1, 1])
ALL = Gauge(np.eye(WIDTH), np.eye(WIDTH))
MASKS = {"every": (-FAR, FAR), "causal": (-FAR, 0), "next": (1, 2)}
ANY = (change_key_basis, change_value_basis, permute_heads, split_heads)
ACTIONS = (*ANY, rescale_heads, add_gram_pair, transform)

# threefry takes longer to compile than everything that is tested here
random_key = partial(jax.random.key, impl="unsafe_rbg")

pytestmark = pytest.mark.usefixtures("x64")


def gauge(read=2, values=3):
    rng = np.random.default_rng(5)
    return Gauge(rng.normal(size=(read, WIDTH)), rng.normal(size=(WIDTH, values)))


def draw(config, seed=0, mask="causal"):
    """Random weights; all heads look at tokens of kind 0 through the same window, None: mixed."""
    rng = np.random.default_rng(seed)

    def fill(name, shape):
        if isinstance(shape, dict):
            return {n: fill(n, s) for n, s in shape.items()}
        if name == "window":
            chosen = list(MASKS.values()) if mask is None else [MASKS[mask]]
            windows = np.asarray(chosen)[rng.integers(len(chosen), size=shape[:-1])]
            return jnp.asarray(windows, jnp.int32)
        if name.endswith("groups"):
            kinds = {"query": [True, True], "key": [True, False], "sink": [False, False]}
            return jnp.broadcast_to(jnp.asarray(kinds[name.removesuffix("_groups")]), shape)
        return jnp.asarray(rng.normal(size=shape) / 2)

    return Transformer(config, fill("", config.shapes()))


def config(*mixers, depth=1, bias=False, tied=False, **layer):
    heads = tuple(HeadsConfig(m, 2 + n, 3 - n, 1 + n, bias) for n, m in enumerate(mixers))
    segment = SegmentConfig((LayerConfig(heads, **layer),), depth, tied)
    return Config(WIDTH, (segment,), ("context", "query"))


def stream(seed=1, batch=3):
    return np.random.default_rng(seed).normal(size=(batch, TOKENS, WIDTH))


def equal(a, b, tolerance=1e-10):
    a, b = np.asarray(a), np.asarray(b)
    return np.allclose(a, b, rtol=0, atol=tolerance * np.sqrt(np.mean(b**2)))


# Run eagerly, each call of a model compiles its scans anew.
call = nnx.jit(lambda model, inputs: model(inputs, KINDS))


@cache
def jitted(function, gauge):
    """A function of models, compiled once for a gauge."""
    return nnx.jit(partial(function, gauge=gauge))


def distance(model, reference, gauge):
    return float(jitted(canonical_distance, gauge)(model, reference))


def brute_force(model, layer):
    """T of one layer, entry by entry from the stored weights."""
    t = np.zeros((WIDTH,) * 4)
    for part in model.segments[0].layers[0].heads:
        w = {n: np.asarray(a)[layer] for n, a in nnx.to_pure_dict(nnx.state(part)).items()}
        for n in range(len(w["scale"])):
            a = w["output"][n] @ w["value"][n]
            b = w["scale"][n] * w["key"][n].T @ w["query"][n]
            for i, j in np.ndindex(WIDTH, WIDTH):
                t[:, i, j, :] += (np.outer(a[:, i], b[j]) + np.outer(a[:, j], b[i])) / 2
    return t


def orbit(act, model, *, distance):
    """Outputs before and after, and the distance travelled, in one compilation."""

    @nnx.jit
    def run(model, inputs, key):
        moved = act(model, key)
        apart = canonical_distance(moved, model, ALL) if distance else jnp.zeros(())
        return moved(inputs, KINDS), apart, moved.segments[0].layers[0].heads[0].output[...]

    after, apart, output = jax.device_get(run(model, stream(), random_key(1)))
    old = np.asarray(model.segments[0].layers[0].heads[0].output[...])
    key = act in (change_key_basis,)
    assert key or output.shape != old.shape or not np.allclose(output, old), "nothing moved"
    return after, apart


@pytest.mark.parametrize("mixer", ["linear", "centred", "softmax", "mesa"])
@pytest.mark.parametrize("act", ACTIONS, ids=lambda f: f.__name__)
def test_group_leaves_the_function_alone(act, mixer):
    """And, for linear heads, the canonical form; masks differ from head to head."""
    linear = mixer == "linear"
    model = draw(config(mixer, mixer, depth=2, bias=not linear), mask=None)
    if (act is rescale_heads and mixer in ("softmax", "mesa")) or (
        act is add_gram_pair and not linear
    ):
        with pytest.raises(TypeError, match=mixer):
            act(model, random_key(0))
        return
    after, apart = orbit(act, model, distance=linear)
    assert equal(after, call(model, stream()))
    assert apart < 1e-10


@pytest.mark.slow
def test_whole_group_on_looped_and_biased_models():
    for tied, bias in ((True, False), (False, True)):
        model = draw(config("linear", "linear", depth=2, tied=tied, bias=bias))
        after, apart = orbit(transform, model, distance=not bias)
        assert equal(after, call(model, stream()))
        assert apart < 1e-10


@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_inert_weights(depth):
    """Without effect on what is read of the query tokens, for queries in the gauge's domain."""
    model, g = draw(config("linear", "linear", depth=depth)), gauge()
    free = np.random.default_rng(2).normal(size=(3, 2, g.query.shape[1]))
    inputs = stream()
    inputs[:, 4:] = free @ g.query.T

    @nnx.jit
    def read(m, inputs):
        return m(inputs, KINDS, read=slice(4, 6)) @ g.read.T

    @nnx.jit
    def run(model, key):
        moved = fill_inert(model, gauge=g, key=key)
        return moved, transform(model, key, gauge=g)

    moved, everything = run(model, random_key(0))
    assert equal(read(moved, inputs), read(model, inputs))
    assert not equal(call(moved, inputs), call(model, inputs), 1e-3)
    if depth == 1:
        assert not equal(read(moved, stream()), read(model, stream()), 1e-3)
    assert distance(moved, model, g) < 1e-10
    assert distance(moved, model, ALL) > 0.1
    assert equal(read(everything, inputs), read(model, inputs))
    assert distance(everything, model, g) < 1e-10


def test_inert_weights_refused():
    with pytest.raises(ValueError, match="applied 2 times"):
        fill_inert(draw(config("linear", depth=2, tied=True)), gauge(), random_key(0))
    with pytest.raises(TypeError, match="mlp or a norm"):
        fill_inert(draw(config("linear", mlp=MlpConfig(4))), gauge(), random_key(0))


def test_canonical_is_brute_force():
    model = draw(config("linear", "linear", depth=2))
    for layer, t in enumerate(canonical(model, ALL)):
        assert equal(t, brute_force(model, layer), 1e-14)
    g = gauge()
    last = canonical(model, g)[-1]
    assert equal(last, np.einsum("ro,oabc->rabc", g.read, brute_force(model, 1)), 1e-14)
    (only,) = canonical(single := draw(config("linear")), g)
    full = brute_force(single, 0)
    assert equal(only, np.einsum("ro,oabc,cv->rabv", g.read, full, g.query), 1e-14)


def test_distance_is_brute_force():
    one, two = (draw(config("linear", "linear", depth=2), seed) for seed in (0, 1))
    t, u = (np.stack([brute_force(m, layer) for layer in (0, 1)]) for m in (one, two))
    expected = np.linalg.norm(t - u) / np.linalg.norm(u)
    assert equal(distance(one, two, ALL), expected, 1e-12)


@pytest.mark.parametrize("steps", [1, 4])
def test_step_size_is_no_symmetry(steps):
    settings = {"dim_x": 3, "dim_y": 2, "steps": steps, "init_weight": np.ones((2, 3))}
    built = GradientDescent(**settings, step_size=1.0)
    gauge, reference = built.gauge(), built.compile().model
    for factor in (1.1, 0.5):
        model = GradientDescent(**settings, step_size=factor).compile().model
        assert distance(model, reference, gauge) == pytest.approx(abs(factor - 1), abs=1e-14)
    looped = GradientDescent(**settings, step_size=1.0, recurrent=True).compile().model
    assert distance(looped, reference, gauge) == 0
    other = GradientDescent(**(settings | {"init_weight": None}), step_size=1.0).compile().model
    assert distance(other, reference, gauge) > 0.1


def test_other_mask_is_far():
    """Equal weights that look at other tokens: orthogonal, so sqrt(2) away."""
    causal, every = (draw(config("linear"), mask=mask) for mask in ("causal", "every"))
    assert distance(causal, every, ALL) == pytest.approx(2**0.5)
    assert not equal(call(causal, stream()), call(every, stream()), 1e-2)


def seeing(model, keys, queries=(True, True)):
    """The model whose heads let these kinds of tokens see those."""
    arrays = model.arrays()
    for w in arrays["segments"][0]["layers"][0]["heads"].values():
        for name, kinds in (("key_groups", keys), ("query_groups", queries)):
            w[name] = jnp.broadcast_to(jnp.asarray(kinds), w[name].shape)
    return Transformer(model.config, arrays)


def test_what_a_mask_lets_in_counts_as_what_it_adds():
    """The query among the keys: nothing where values do not read it, else what they make of it."""
    g = Gauge(gauge().read, gauge().query, ("query",))
    model = draw(config("linear", "linear"), mask="every")
    without = seeing(model, (True, False))
    with_query = seeing(model, (True, True))
    blind = with_query.arrays()
    outside = jnp.asarray(np.eye(WIDTH) - g.query @ np.linalg.pinv(g.query))
    for w in blind["segments"][0]["layers"][0]["heads"].values():
        w["value"] = w["value"] @ outside
    blind = Transformer(model.config, blind)
    inputs = stream()
    inputs[:, 5:] = np.random.default_rng(2).normal(size=(3, 1, 3)) @ g.query.T
    chosen = np.array([0, 1, 2, 3, 5])  # a context, and one query behind it
    run = nnx.jit(lambda m, inputs: m(inputs, KINDS[chosen]))

    def read(m):
        return np.asarray(run(m, inputs[:, chosen]))[:, -1] @ g.read.T

    assert equal(read(blind), read(seeing(blind, (True, False))))
    assert distance(blind, seeing(blind, (True, False)), g) < 1e-12
    assert distance(seeing(blind, (True, False)), blind, g) < 1e-12
    assert not equal(read(with_query), read(without), 1e-2)
    full = np.einsum("ro,oabc,cv->rabv", g.read, brute_force(model, 0), g.query)
    added = np.einsum("rabv,ap,bq->rpqv", full, g.query, g.query)
    expected = np.linalg.norm(added) / np.linalg.norm(full)
    assert equal(distance(with_query, without, g), expected, 1e-12)
    # what the last layer writes to tokens that nobody reads is without effect
    assert distance(seeing(model, (True, False), (False, True)), without, g) < 1e-12
    # where nobody says which tokens are read, they may be any
    unsaid = Gauge(g.read, g.query)
    assert distance(with_query, without, unsaid) == pytest.approx(1)
    with pytest.raises(ValueError, match="gauge has kind 'quarry', must be one of"):
        canonical_distance(model, model, Gauge(g.read, g.query, ("quarry",)))


def test_in_a_deeper_model_only_the_first_layer_knows_how_queries_enter():
    """With a query among the keys of layer 2 there is a difference, even where y is 0 at first."""
    c = GradientDescent(dim_x=4, steps=2, step_size=1.0)
    reference, gauge = c.compile().model, c.gauge()
    arrays = reference.arrays()
    for segment in arrays["segments"].values():
        for w in segment["layers"][0]["heads"].values():
            w["key_groups"] = w["key_groups"].at[0].set(True)
    first = Transformer(reference.config, arrays)
    inputs = c.sample(random_key(0), 3)
    assert equal(c.predict(first, *inputs), c.predict(reference, *inputs))
    assert distance(first, reference, gauge) == 0
    every = compile_program(c._program("linear", None))
    assert not equal(c.predict(every, *inputs), c.predict(reference, *inputs), 1e-2)
    assert distance(every, reference, gauge) > 0.5


def test_jit_and_gradient():
    model, reference = draw(config("linear", "linear", depth=2)), draw(config("linear"), 1)
    with pytest.raises(ValueError, match="depth of the model is 2, of the reference 1"):
        canonical_distance(model, reference, ALL)
    reference = draw(config("linear", depth=2), 1)
    g = gauge()
    assert equal(distance(model, reference, g), canonical_distance(model, reference, g), 1e-14)
    for t, u in zip(
        nnx.jit(partial(layer_tensors, gauge=g))(model), canonical(model, g), strict=True
    ):
        assert equal(t, u, 1e-14)
    with pytest.raises(TypeError, match="masks are traced"):
        nnx.jit(partial(canonical, gauge=g))(model)

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, target):
        return canonical_distance(nnx.merge(graph, params, rest), target, g)

    loss, slopes = jax.jit(loss), jax.jit(jax.grad(loss))
    leaves = jax.tree.leaves(slopes(params, reference))
    direction = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape), params)
    slope = sum(jnp.vdot(a, b) for a, b in zip(leaves, jax.tree.leaves(direction), strict=True))
    step = 1e-5
    near = [
        loss(jax.tree.map(lambda a, d, s=s: a + s * step * d, params, direction), reference)
        for s in (1, -1)
    ]
    assert float(slope) == pytest.approx(float(near[0] - near[1]) / (2 * step), rel=1e-6)
    flat = slopes(params, model)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(flat)), "NaN where the distance is 0"


@pytest.mark.parametrize(("depth", "mask"), [(1, "causal"), (1, "next"), (2, "every")])
def test_from_canonical(depth, mask):
    like, g = draw(config("linear", depth=depth), mask=mask), gauge()
    rng = np.random.default_rng(3)
    tensors = [jnp.asarray(rng.normal(size=(WIDTH,) * 4) / 5) for _ in range(depth)]
    model = from_canonical(tensors, like, ALL)
    h = stream()
    offset = np.arange(TOKENS)[None] - np.arange(TOKENS)[:, None]
    low, high = MASKS[mask]
    seen = (low <= offset) & (offset <= high) & (np.asarray(KINDS) == 0)
    for t in tensors:
        h = h + np.einsum("oabc,zja,zjb,ij,zic->zio", t, h, h, seen, h, optimize=True)
    assert equal(call(model, stream()), h)
    for t, u in zip(canonical(model, ALL), tensors, strict=True):
        assert equal(t, (u + np.swapaxes(u, 1, 2)) / 2)
    # through a gauge: what is contracted away is inert
    again = from_canonical(canonical(model, g), like, g)
    assert distance(again, model, g) < 1e-10
    inputs = stream()
    if depth == 1:
        inputs[:, 4:] = inputs[:, 4:, : g.query.shape[1]] @ g.query.T
    one, other = (np.asarray(call(m, inputs))[:, 4:] @ g.read.T for m in (again, model))
    assert equal(one, other)


@pytest.mark.parametrize(("depth", "tied"), [(1, False), (2, False), (2, True)])
def test_without_inert(depth, tied):
    """The model that the canonical tensors determine, on every stream; the same prediction."""
    model, g = draw(config("linear", "linear", depth=depth, tied=tied), mask="every"), gauge()
    bare = without_inert(model, g)
    rebuilt = from_canonical(canonical(model, g), model, g)
    assert equal(call(bare, stream()), call(rebuilt, stream()))
    inputs = stream()
    if depth == 1:
        inputs[:, 4:] = inputs[:, 4:, : g.query.shape[1]] @ g.query.T
    one, other = (np.asarray(call(m, inputs))[:, 4:] @ g.read.T for m in (bare, model))
    assert equal(one, other)
    assert not equal(call(bare, inputs), call(model, inputs), 1e-3)


def test_from_canonical_shapes():
    like = draw(config("linear"))
    with pytest.raises(ValueError, match="2 tensors for a model of 1 layers"):
        from_canonical(canonical(like, ALL) * 2, like, ALL)
    with pytest.raises(
        ValueError, match=r"tensor 0 has shape \(5, 5, 5, 5\), must be \(2, 5, 5, 3"
    ):
        from_canonical(canonical(like, ALL), like, gauge())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (config("linear", "softmax"), "layer 1 has softmax heads"),
        (config("centred"), "layer 1 has centred heads"),
        (config("linear", bias=True), "layer 1 has biases"),
        (config("linear", mlp=MlpConfig(3)), "layer 1 has an mlp"),
        (config("linear", norm=NormConfig()), "layer 1 has a norm"),
    ],
)
def test_only_linear_attention_has_a_canonical_form(bad, message):
    model, good = draw(bad), draw(config("linear"))
    for call in (
        lambda: canonical(model, ALL),
        lambda: canonical_distance(model, good, ALL),
        lambda: canonical_distance(good, model, ALL),
        lambda: from_canonical(canonical(good, ALL), model, ALL),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_mixed_masks_and_gauges_are_refused():
    with pytest.raises(TypeError, match="layer 1 has heads with different masks"):
        canonical(draw(config("linear", "linear"), mask=None), ALL)
    with pytest.raises(ValueError, match=r"must be \[rows, 5\] and \[5, values\]"):
        canonical(draw(config("linear")), Gauge(np.eye(4), np.eye(5)))


@pytest.mark.parametrize("mixer", ["linear", "softmax"])
def test_head_products_are_invariants(mixer):
    """Of both changes of basis, for any mixer; looped models show their layers once per loop."""
    model = draw(config(mixer, mixer, depth=3, tied=True))
    found = head_products(model)
    assert found.output_value.shape == found.key_query.shape == (3, 5, WIDTH, WIDTH)
    twice = nnx.jit(lambda m, one, two: change_value_basis(change_key_basis(m, one), two))
    moved = twice(model, *jax.random.split(random_key(0)))
    for a, b in zip(head_products(moved), found, strict=True):
        assert equal(a, b)
    part = model.segments[0].layers[0].heads[1]
    a = part.output[...][0, 2] @ part.value[...][0, 2]
    assert equal(found.output_value[2, 4], a, 1e-14)


def test_every_action_is_tested():
    public = {
        n
        for n, f in vars(symmetries).items()
        if getattr(f, "__module__", "") == symmetries.__name__
    }
    acts = {
        n for n in public if n.split("_")[0] in ("change", "permute", "split", "rescale", "add")
    }
    assert acts == {f.__name__ for f in ACTIONS} - {"transform"}
