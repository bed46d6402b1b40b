"""Softmax rewrites against the linear programs they stand for, run by an interpreter in numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.core.compile import compile_program
from constructions.core.program import CAUSAL, Head, Layer, Mlp, Norm, Program, erase
from constructions.core.slots import Slots, constant
from constructions.core.softmax import soften
from constructions.family import verify
from constructions.softened import Softened
from tests import plain_numpy


def rich():
    """Constants, windows, token groups, an erase, an MLP and a norm that act everywhere."""
    rng = np.random.default_rng(0)
    slots = Slots()
    a = slots.add("a", 3, accumulates=True)
    b = slots.add("b", 2, dies=2)
    c = slots.add("c", 2, born=1, accumulates=True)
    d = slots.add("d", 2, born=2)

    def m(*shape):
        return rng.normal(size=shape) / 2

    first = Layer(
        [
            Head(m(2, 3) @ a + m(2), m(2, 2) @ b + m(2), m(2, 3) @ a + m(2), {c: m(2, 2)}),
            Head(a, a, b, {c: 1.0}, window=CAUSAL, queries="one", scale=0.5),
            Head(b, m(2, 3) @ a, a, {a: m(3, 3)}, window=(1, 1), keys="two"),
            Head(constant(0.5), constant(2.0), m(3, 3) @ a, {a: 0.3}, window=(-2, -1)),
        ],
        mlp=Mlp(m(4, 3) @ a + m(4), {c: m(2, 4)}),
    )
    second = Layer([erase(b), Head(c, c, 2 * b, {d: 0.7})], norm=Norm(b, c))
    return Program(slots, [first, second], token_groups=("one", "two"))


def test_a_rich_program_keeps_its_function(x64):
    program, rng = rich(), np.random.default_rng(1)
    kinds = rng.integers(0, 2, (2, 5))
    stream = 0.3 * rng.normal(size=(2, 5, program.slots.width))
    stream[..., program.slots["c"].columns] = 0
    values = {s.name: stream[..., s.columns] for s in program.slots if s.born == 0}
    wanted = plain_numpy.interpret(program, values, kinds)
    soft = soften(program, scale=1e-4, null_score=25.0)
    assert {head.mixer for layer in soft.layers for head in layer.heads} == {"softmax"}
    model = compile_program(soft)
    # the null token behind all others: 1 in the last column, and a kind of its own
    stream = np.pad(stream, [(0, 0), (0, 1), (0, 1)])
    stream[:, -1, -1] = 1
    kinds = np.pad(kinds, [(0, 0), (0, 1)], constant_values=2)
    out = np.asarray(jax.jit(lambda m, s, g: m(s, g))(model, jnp.asarray(stream), kinds))
    for slot in program.slots:
        if slot.dies is None:
            found, value = out[:, :5, slot.columns], wanted[slot.name]
            assert np.abs(found - value).max() < 1e-6 * np.abs(value).max(), slot
    # the null token stays what it is
    assert np.array_equal(out[:, -1], np.eye(out.shape[-1])[[-1, -1]])


@pytest.mark.parametrize(
    ("dtype", "scale", "bar"), [("float64", 1e-4, 1e-7), ("float32", 0.03, 1e-4)]
)
@pytest.mark.parametrize("steps", [1, 4])
def test_error_per_layer(steps, dtype, scale, bar):
    """Largest error of a prediction, over the root mean square: at most the bar a layer."""
    with jax.enable_x64(dtype == "float64"):
        c = CATALOGUE["gradient-descent"](
            dim_x=7, steps=steps, step_size=0.6, init_weight=[[0.3] * 7]
        )
        inputs = c.sample(jax.random.key(steps), 256)
        wanted = np.asarray(jax.jit(c.trace)(*inputs)["prediction"], float)
        soft = Softened(c, scale=scale, null_score=25.0)
        found = np.asarray(jax.jit(soft.apply)(soft.compile().model, *inputs), float)
    error = np.abs(found - wanted).max() / np.sqrt((wanted**2).mean())
    assert bar * 1e-4 < error < bar * steps


def test_error_follows_the_bound(x64):
    """Quadratic in eps until the other keys count: then s_j is off by (N s_j + sum_k s_k) e^-c."""
    c = CATALOGUE["gradient-descent"](dim_x=4, num_examples=6)
    inputs = c.sample(jax.random.key(0), 64)
    wanted = c.trace(*inputs)["prediction"]
    predict = jax.jit(Softened(c).apply)

    def error(scale, score):
        model = Softened(c, scale=scale, null_score=score).compile().model
        return np.asarray(predict(model, *inputs) - wanted)

    def size(a):
        return float(np.sqrt(np.square(a).mean()))

    assert size(error(0.2, 30.0)) / size(error(0.02, 30.0)) == pytest.approx(100, rel=0.02)
    x, y, q = (np.asarray(a) for a in inputs)
    scores = np.einsum("bni,bqi->bqn", x, q)
    mean = c.step_size / 6 * np.einsum("bqn,bmo->bqo", scores, y)
    expected = -np.exp(-8.0) * (6 * np.asarray(wanted) + mean)
    assert size(error(1e-4, 8.0) - expected) < 0.01 * size(expected)


def test_without_a_null_token_it_is_centred_attention(x64):
    c = CATALOGUE["gradient-descent"](dim_x=4, num_examples=6)
    inputs = c.sample(jax.random.key(0), 16)
    soft = compile_program(soften(c.program, scale=1e-3, num_keys=6))
    centred = c.predict(c.near_misses()["centred attention"].model, *inputs)
    found = c.predict(soft, *inputs)
    assert np.allclose(found, centred, atol=1e-5 * np.abs(centred).max())
    linear = c.predict(c.compile().model, *inputs)
    assert np.abs(found - linear).max() > 0.05 * np.abs(linear).max()


SOFTENED = Softened(CATALOGUE["gradient-descent"](dim_x=3, num_examples=4, steps=2, step_size=0.5))


def test_certificate_of_a_softened_construction():
    c = SOFTENED
    certificate = verify(c, batch=64)
    error, single = certificate.errors
    assert error.passed and single.passed
    assert error.tolerance < 1e-5 and single.tolerance < 1e-2
    assert "largest score on the task" in certificate.domain

    def other(dtype):
        del dtype
        return compile_program(soften(c.construction.program, scale=0.05, null_score=25.0))

    assert not verify(c, dtypes=("float64",), batch=64, model=other).passed


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_default_scale_is_the_best_in_each_dtype(dtype):
    """The least sum of curvature and rounding, searched for; and a certificate in each dtype."""
    c, low, high = SOFTENED, 1e-8, 1.0
    for _ in range(2):  # the whole range, then what lies about the best of it
        scales = np.geomspace(low, high, 201)
        bounds = [at_scale(scale).tolerance(dtype) for scale in scales]
        assert c.tolerance(dtype) <= min(bounds)
        best = int(np.argmin(bounds))
        low, high = scales[max(best - 1, 0)], scales[min(best + 1, 200)]
    assert c.scale_in(dtype) == pytest.approx(scales[best], rel=0.01)
    assert c.tolerance(dtype) < {"float64": 1e-8, "float32": 1e-2}[dtype]


def test_a_scale_that_is_too_small_for_a_dtype():
    certificate = verify(at_scale(1e-7), batch=64)
    assert [e.verdict for e in certificate.errors] == ["passed", "not certified"]
    error = certificate.errors[1]
    assert error.max_rel_error > 1
    assert "rounding at scale 1e-07, about 0.023 is best" in error.reason


def at_scale(scale):
    """`SOFTENED` at this scale, with what was measured on its task."""
    other = replace(SOFTENED, scale=float(scale))
    other.__dict__["largest"] = SOFTENED.largest
    return other


def test_a_weight_that_the_dtype_does_not_hold():
    c = replace(SOFTENED, scale=1e-6, null_score=79.0)
    (error,) = verify(c, dtypes=("float32",), batch=64).errors
    assert error.verdict == "not certified" and "beyond float32" in error.reason


def test_bad_arguments():
    c = CATALOGUE["gradient-descent"](dim_x=2, num_examples=3)
    program = c.program
    (layer,) = program.layers
    centred = replace(program, layers=[Layer([replace(layer.heads[0], mixer="centred")])])
    with pytest.raises(TypeError, match="layer 1, head 'head' has mixer 'centred'"):
        soften(centred, scale=1e-3, null_score=20.0)
    soft = soften(program, scale=1e-3, null_score=20.0)
    for bad, message in (
        ({"scale": 0.0, "null_score": 20.0}, "scale is 0.0"),
        ({"scale": float("nan"), "null_score": 20.0}, "scale is nan"),
        ({"scale": 1e-3}, "give one of them"),
        ({"scale": 1e-3, "null_score": 20.0, "num_keys": 3}, "give one of them"),
        ({"scale": 1e-3, "null_score": -1.0}, "null_score is -1.0"),
        ({"scale": 1e-3, "num_keys": 0}, "num_keys is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            soften(program, **bad)
    with pytest.raises(TypeError, match="softmax"):
        soften(soft, scale=1e-3, null_score=20.0)
