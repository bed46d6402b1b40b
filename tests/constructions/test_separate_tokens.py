"""Separate tokens against weight-space gradient descent in numpy, and what each part is for."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.claims import Evidence, predict
from constructions.core.compile import compile_program
from constructions.core.evaluate import evaluate
from constructions.family import verify
from constructions.separate_tokens.construction import SeparateTokens
from constructions.separate_tokens.paper import pairing

BARS = {"float64": 1e-14, "float32": 5e-6}


def descend(x, y, steps, rate):
    """W_0 = 0, ..., W_K for one context, in float64."""
    weights = [np.zeros((y.shape[-1], x.shape[-1]))]
    for _ in range(steps):
        w, gradient = weights[-1], 0.0
        for x_i, y_i in zip(x.astype(float), y.astype(float), strict=True):
            gradient = gradient + np.outer(w @ x_i - y_i, x_i)
        weights.append(w - rate * gradient)
    return np.array(weights)


def case(seed, dim_x, dim_y, context, queries, batch=64, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-0.5, 0.5, (batch, context, dim_x)).astype(dtype)
    y = np.einsum("boi,bni->bno", rng.normal(size=(batch, dim_y, dim_x)), x).astype(dtype)
    q = rng.uniform(-0.5, 0.5, (batch, queries, dim_x)).astype(dtype)
    return x, y, q


@partial(jax.jit, static_argnums=0)
def values(c, model, *inputs):
    """One compilation for all models of a shape."""
    return c.read(model, *inputs)


@partial(jax.jit, static_argnums=0)
def traced(c, *inputs):
    return c.trace(*inputs)


def relative_error(c, model, *inputs):
    """The largest error of a named value, over the value's root mean square."""
    found, wanted = values(c, model, *inputs), traced(c, *inputs)
    return max(
        float(np.abs(found[name] - wanted[name]).max() / np.sqrt(np.mean(wanted[name] ** 2)))
        for name in found
    )


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize(
    ("mixer", "dim_x", "dim_y", "context", "queries", "steps"),
    [
        ("linear", 10, 1, 10, 1, 1),
        ("softmax", 2, 3, 4, 2, 3),
    ],
)
def test_every_named_value_is_gradient_descent(mixer, dim_x, dim_y, context, queries, steps, dtype):
    x, y, q = case([dim_x, steps], dim_x, dim_y, context, queries, dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        eta = None if steps == 1 else 2.0
        c = SeparateTokens(dim_x, dim_y, context, queries, steps, eta, mixer)
        model = c.compile().model
        found = {name: np.asarray(a) for name, a in values(c, model, x, y, q).items()}
    rate = c.eta / context
    weights = np.array([descend(a, b, steps, rate) for a, b in zip(x, y, strict=True)])
    size = max(dim_x, dim_y)
    content = np.zeros((len(x), steps + 2, 2 * context + queries, size))
    content[:, :, 0 : 2 * context : 2, :dim_x] = x[:, None]
    content[:, 0, 1 : 2 * context : 2, :dim_y] = y
    content[:, :, 2 * context :, :dim_x] = q[:, None]
    estimate = np.einsum("bkoi,bqi->bkqo", weights, q.astype(float))
    wanted = {
        "residual": y[:, None] - np.einsum("bkoi,bni->bkno", weights, x.astype(float)),
        "estimate": estimate,
        "content": content,
        "prediction": estimate[:, -1],
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name], value, rtol=0, atol=BARS[dtype], err_msg=name)


def test_certificate():
    certificate = verify(SeparateTokens(2, 3, 4, 4, 3, 1.5), batch=64, dtypes=("float64",))
    assert certificate.passed, certificate.to_json()
    assert certificate.errors[0].max_rel_error < 1e-13


def test_the_leak_of_a_softmax_is_as_large_as_stated(x64):
    """At the published sizes; the bound holds, and is within a factor of 30 of what is found."""
    c = SeparateTokens()
    x, y, q = case(0, 10, 1, 10, 1, batch=256)
    pairs = zip(x, y, q, strict=True)
    wanted = np.array([descend(a, b, 1, c.eta / 10)[-1] @ d[0] for a, b, d in pairs])
    apply = jax.jit(c.predict)
    for scale, measured in ((10.0, 3e-3), (20.0, 1.4e-7), (40.0, None)):
        leaky = replace(c, score_scale=scale)
        model = leaky.compile().model
        error = np.abs(np.asarray(apply(model, x, y, q))[:, 0] - wanted).max()
        if measured is None:
            assert error <= 1e-14
        else:
            assert measured / 2 < error < 2 * measured
            bound = leaky.tolerance("float64")
            assert bound / 30 < relative_error(c, model, x, y, q) < bound
        attention = 1 / (1 + 21 * np.exp(-scale))  # on the right one of T = 22 tokens
        assert leaky.leak == pytest.approx(1 - attention, rel=1e-6, abs=1e-15)


def test_the_bound_on_the_leak_holds_at_other_sizes(x64):
    c = SeparateTokens(2, 3, 5, 2, 4, 2.0)
    inputs = c.sample(jax.random.key(0), 128)
    for scale in (8.0, 14.0):
        bound = replace(c, score_scale=scale).tolerance("float64")
        found, worse = (
            relative_error(c, replace(c, score_scale=s).compile().model, *inputs)
            for s in (scale, scale - 5)
        )
        assert found < bound < worse


@pytest.mark.parametrize(("mixer", "steps"), [("softmax", 2), ("linear", 1)])
def test_every_near_miss_is_far_away(x64, mixer, steps):
    c = SeparateTokens(4, 1, 6, 2, steps, 4.0, mixer)
    inputs = case(1, 4, 1, 6, 2)
    wanted = jax.jit(c.trace)(*inputs)["prediction"]
    misses = c.near_misses()
    assert ("no erase head" in misses) == (steps > 1)
    assert ("no dump token" in misses) == ("score scale 5" in misses) == (mixer == "softmax")
    for name, (model, base) in misses.items():
        assert base == c
        gap = np.sqrt(np.mean((predict(c, model, *inputs) - wanted) ** 2))
        assert gap > 0.03 * np.sqrt(np.mean(wanted**2)), name


def test_one_step_needs_no_erase_head_and_linear_heads_no_dump(x64):
    inputs = case(2, 3, 1, 5, 1)
    c = SeparateTokens(3, 1, 5)
    wanted = jax.jit(c.trace)(*inputs)["prediction"]
    linear = replace(c, mixer="linear")
    for program in (c._program(erases=False), linear._program(keys=("context", "query"))):
        found = predict(c, compile_program(program), *inputs)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-14)


def test_slot_by_slot_equals_dense(x64):
    c = SeparateTokens(2, 3, 4, 2, 2, 1.0)
    model = c.compile().model
    stream, groups, read = c.stream(model, *map(jnp.asarray, case(3, 2, 3, 4, 2, batch=3)))
    assert read == slice(8, 10)
    slots = jax.jit(lambda s: evaluate(c.program, s, np.asarray(groups)))(stream)
    out = jax.jit(lambda m, s, g: m(s, g))(model, stream, groups)
    for slot in c.program.slots:
        np.testing.assert_allclose(slots[slot.name], out[..., slot.columns], rtol=0, atol=1e-14)


def test_shorter_contexts_and_any_number_of_queries(x64):
    c = SeparateTokens(dim_x=3, num_examples=6, steps=2, step_size=0.8)
    x, y, q = case(4, 3, 1, 4, 5)
    weight = np.zeros((len(x), 1, 3))
    for _ in range(2):
        error = np.einsum("boi,bni->bno", weight, x) - y
        weight = weight - 0.8 / 6 * np.einsum("bno,bni->boi", error, x)
    found = c.predict(c.compile().model, x, y, q)
    assert np.abs(found - np.einsum("boi,bqi->bqo", weight, q)).max() < 1e-14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, y, q: (jnp.tile(x, (1, 2, 1)), jnp.tile(y, (1, 2, 1)), q),
            "x has 10 tokens, must have at most num_examples=5",
        ),
        (lambda x, y, q: (x, y[..., 0], q), "y has shape (2, 5)"),
        (lambda x, y, q: (x.at[0, 0, 0].set(jnp.nan), y, q), "x holds NaN"),
    ],
)
def test_inputs_of_another_length_are_refused(change, message):
    c = SeparateTokens(dim_x=3, num_examples=5)
    good = jnp.ones((2, 5, 3)), jnp.ones((2, 5, 1)), jnp.ones((2, 1, 3))
    c.check(*good)
    with pytest.raises(ValueError, match=re.escape(message)):
        c.check(*change(*good))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_examples": 0}, "num_examples is 0"),
        ({"queries": 0}, "queries is 0"),
        ({"steps": 2}, "step_size is None"),
        ({"step_size": float("nan")}, "step_size is nan"),
        ({"mixer": "mesa"}, "mixer is 'mesa', must be 'softmax' or 'linear'"),
        ({"attends": "all"}, "attends is 'all', must be 'position' or 'anything'"),
        ({"score_scale": 0.0}, "score_scale is 0.0, must be above 0"),
        ({"score_scale": float("inf")}, "score_scale is inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SeparateTokens(**settings)


def test_the_first_layer_of_the_counterpart_learns_positions_only():
    c = SeparateTokens(2, 1, 2)
    before = c.counterpart().init(jax.random.key(0))
    after = c.fit(steps=3, batch=8).model
    free = replace(c, attends="anything").counterpart().init(jax.random.key(0))
    for head in (0, 1):
        for name in ("query", "key"):
            seen = [
                np.asarray(m.arrays()["segments"][0]["layers"][0]["heads"][head][name][0, 0])
                for m in (before, after, free)
            ]
            assert not seen[0][:, :3].any() and not seen[1][:, :3].any()
            assert seen[2][:, :3].any()
            assert (seen[0][:, 3:] != seen[1][:, 3:]).any()


@pytest.mark.parametrize("mixer", ["softmax", "linear"])
@pytest.mark.parametrize("attends", ["position", "anything"])
def test_claims_name_near_misses_that_exist(mixer, attends):
    c = SeparateTokens(2, 1, 2, mixer=mixer, attends=attends)
    names = {name for claim in c.claims for name in claim.catches}
    assert names <= set(c.near_misses())
    assert ("pairs found" in {claim.name for claim in c.claims}) == (mixer == "softmax")
    assert replace(c, steps=2).claims == ()


def test_pairs_are_found_by_the_construction_only(x64):
    c = SeparateTokens(2, 1, 4)
    batch = c.task.sample(jax.random.key(0), 64)
    model = c.compile().model
    subjects = (model, c.near_misses()["copy from the previous token"].model)
    shares = [pairing(Evidence(c, m, model, batch, jax.random.key(1))) for m in subjects]
    assert shares == [1.0, 0.0]
