"""Inputs at the door: what is taken, what is refused in one line, and indices without a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tint_oracle import TEXTS, TRAINED, small

from constructions.core.compile import untrained
from constructions.core.config import Config, HeadsConfig, LayerConfig, SegmentConfig, TokensConfig
from constructions.core.evaluate import evaluate
from constructions.core.transformer import Transformer, randomise
from constructions.gradient_descent.construction import GradientDescent
from constructions.hyper_transformer.gradient import HyperGradient
from constructions.hyper_transformer.prototypes import HyperPrototypes, Memory
from constructions.inputs import FLAGS, INTEGERS, Input, as_arrays, check_inputs, converted
from constructions.separate_tokens.construction import SeparateTokens
from constructions.tint.construction import Tint

DECLARED = (
    Input("x", ("batch", "context", 2)),
    Input("kinds", ("batch", "context"), INTEGERS, 3),
    Input("shown", ("batch",), FLAGS),
)
X, KINDS, SHOWN = np.ones((2, 4, 2)), np.arange(8).reshape(2, 4) % 3, np.array([True, False])


def line(error: pytest.ExceptionInfo) -> str:
    found = str(error.value)
    assert "\n" not in found
    return found


REFUSED = [
    ((X, KINDS), "expected x, kinds and shown, got 2 arrays"),
    ((None, KINDS, SHOWN), "x is None, must be an array of real numbers"),
    (([[1], [1, 2]], KINDS, SHOWN), "x is a list that numpy makes no array of"),
    ((object(), KINDS, SHOWN), "x is a object, must be an array of real numbers"),
    ((X.astype(object), KINDS, SHOWN), "x has dtype object, must be real numbers"),
    (("abc", KINDS, SHOWN), "x has dtype <U3"),
    ((X.astype(complex), KINDS, SHOWN), "x has dtype complex128"),
    ((X.astype("m8[s]"), KINDS, SHOWN), "x has dtype timedelta64"),
    ((jax.random.key(0), KINDS, SHOWN), "x has dtype key<fry>"),
    (([[[10**400]]], KINDS, SHOWN), "x has dtype object"),
    ((X[..., :1], KINDS, SHOWN), r"x has shape \(2, 4, 1\), must be \[batch, context, 2\]"),
    ((X, KINDS[:, :3], SHOWN), r"kinds has shape \(2, 3\), must be \(2, 4\)"),
    ((X[:, :0], KINDS[:, :0], SHOWN), r"x has shape \(2, 0, 2\), must hold at least one token"),
    ((X * np.nan, KINDS, SHOWN), "x holds NaN or infinite values, must be finite"),
    ((X * np.inf, KINDS, SHOWN), "x holds NaN or infinite"),
    ((X * -1e20, KINDS, SHOWN), r"x holds 1e\+20 in size, must be at most 1.8e\+19.* float32"),
    ((X * 1e300, KINDS, SHOWN), r"x holds 1e\+300 in size"),
    ((X, KINDS.astype(float), SHOWN), "kinds are float64, must be integers"),
    ((X, KINDS == 1, SHOWN), "kinds are bool, must be integers"),
    ((X, KINDS + 1, SHOWN), r"kinds holds 3, must be 0 to 2 \(at \[0, 2\]\)"),
    ((X, KINDS - 1, SHOWN), "kinds holds -1, must be 0 to 2"),
    ((X, KINDS + 2**40, SHOWN), f"kinds holds {2**40}, must be 0 to 2"),  # 0 in 32 bits
    ((X, KINDS, [1, 0]), "shown are int64, must be flags"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message) as error:
        check_inputs(DECLARED, given)
    line(error)


def test_what_is_taken():
    for x in (X, X.tolist(), X.astype(int), X > 0, jnp.asarray(X), X.astype(np.longdouble), X[:0]):
        batch = len(x)
        arrays = as_arrays(DECLARED, (x, KINDS[:batch], SHOWN[:batch]))
        check_inputs(DECLARED, arrays)
        x, kinds, shown = converted(DECLARED, arrays, jnp.float32)
        assert (x.dtype, kinds.dtype, shown.dtype) == (jnp.float32, jnp.int32, bool)
        assert x.shape == (batch, 4, 2) and (x == 1).all()


def test_float64_takes_what_float32_cannot_hold(x64):
    check_inputs(DECLARED, (X * 1e20, KINDS, SHOWN))
    with pytest.raises(ValueError, match="in size, must be at most 1.3e"):
        check_inputs(DECLARED, (X * 1e155, KINDS, SHOWN))


ONE = GradientDescent(dim_x=2, num_examples=3)
GIVEN = [np.ones((2, 3, 2)), np.ones((2, 3, 1)), np.ones((2, 1, 2))]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model is None, must be a Transformer"),
        ({}, "model is a dict, must be a Transformer"),
        (ONE.compile(), "model is a Compiled, must be a Transformer.* its attribute .model"),
        (GradientDescent(dim_x=1).compile().model, "model has width 2, must be 3"),
    ],
    ids=["none", "dict", "compiled", "narrow"],
)
def test_models_that_are_none(model, message):
    with pytest.raises(ValueError, match=message) as error:
        ONE.predict(model, *GIVEN)
    line(error)


def test_a_prediction_that_overflows_is_refused():
    model = ONE.compile().model
    # squares of 1e15 are finite in float32, products of three are not
    with pytest.raises(ValueError, match=r"overflows float32: x holds 1e\+15") as error:
        ONE.predict(model, *(1e15 * a for a in GIVEN))
    line(error)
    arrays = model.arrays()
    heads = arrays["segments"][0]["layers"][0]["heads"][0]
    heads["value"] = heads["value"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="model holds NaN or infinite weights"):
        ONE.predict(Transformer(model.config, arrays), *GIVEN)


def test_an_empty_batch_of_pairs():
    c = SeparateTokens(dim_x=2, num_examples=3)
    assert c.predict(c.compile().model, *(a[:0] for a in GIVEN)).shape == (0, 1, 1)


LANGUAGE = Config(
    3,
    (SegmentConfig((LayerConfig((HeadsConfig("softmax", 1, 2, 2),)),)),),
    tokens=TokensConfig(5, 5, positions=4),
)


def language_model() -> Transformer:
    return randomise(untrained(LANGUAGE), jax.random.key(0), 1.0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2], [3, 5]], r"tokens holds 5, must be 0 to 4, a row of the embedding \(at \[1, 1\]"),
        ([[0, -1]], r"tokens holds -1, .* \(at \[0, 1\]\)"),
        ([[2**40, 1]], f"tokens holds {2**40}"),
        ([1, 2], r"tokens has shape \(2,\).* must be \[batch, token\] integers"),
        ([[1.0, 2.0]], "dtype float64, must be"),
        ([[True, False]], "dtype bool, must be"),
    ],
)
def test_words_that_do_not_exist(tokens, message):
    with pytest.raises(ValueError, match=message) as error:
        language_model().embed(tokens)
    line(error)


def test_traced_words_that_do_not_exist_are_nan():
    model = language_model()
    tokens = jnp.array([[1, 2, 4], [1, 5, 0], [-1, 0, 2]])
    found = np.asarray(jax.jit(lambda m, t: m.embed(t))(model, tokens))
    wrong = np.asarray((tokens < 0) | (tokens > 4))
    assert np.isnan(found[wrong]).all()
    good = np.clip(tokens, 0, 4)
    np.testing.assert_array_equal(found[~wrong], np.asarray(model.embed(good))[~wrong])


def test_kinds_of_tokens_that_do_not_exist():
    model = ONE.compile().model
    stream = jnp.ones((1, 3, 3))
    for groups in ([0, 2, 1], [0, -1, 1]):
        with pytest.raises(ValueError, match=f"groups holds {groups[1]}, must be 0 to 1, one of"):
            model(stream, jnp.array(groups))
        with pytest.raises(ValueError, match=f"groups holds {groups[1]}, must be 0 to 1, one of"):
            evaluate(ONE.program, stream, np.array(groups))
    run = jax.jit(lambda m, s, g: (m(s, g), evaluate(ONE.program, s, g)["y"]))
    good, bad = (run(model, stream, jnp.array([0, kind, 1])) for kind in (0, 2))
    assert np.isfinite(good[0]).all() and np.isfinite(good[1]).all()
    assert np.isnan(bad[0][:, 1]).all() and np.isnan(bad[1]).all()


def test_traced_labels_that_do_not_exist_are_nan():
    support, labels, queries = np.ones((2, 4, 3)), np.array([[0, 1, 0, 1]] * 2), np.ones((2, 1, 3))
    labels[1, 2] = 2
    for family in (HyperGradient, HyperPrototypes):
        c = family(dim=3, classes=2, shots=2)
        found = jax.jit(c.apply)(c.compile().model, support, labels, queries)
        assert np.isfinite(found[0]).all() and np.isnan(found[1]).any(), family.__name__


def test_memories_that_are_none():
    c = HyperPrototypes(dim=3, classes=2, shots=2)
    given = np.ones((1, 2, 3)), np.array([[0, 1]]), np.ones((1, 1, 3))
    for memory, message in (
        (Memory(jnp.full((1, 2, 3), jnp.nan), jnp.ones((1, 2), int)), "memory.mean holds NaN"),
        (Memory(jnp.ones((1, 2, 3)), -jnp.ones((1, 2), int)), "memory.count holds -1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            c.predict(c.compile().model, *given, memory=memory)
        line(error)


def test_traced_words_of_a_simulator_that_do_not_exist_are_nan():
    c = Tint(small(), embeddings=True)
    tokens = np.where(np.arange(len(TEXTS))[:, None] == 1, TEXTS + 5, TEXTS)
    found = jax.jit(c.trace)(tokens, TRAINED)["logits_before"]
    assert np.isnan(found[1]).any() and np.isfinite(np.delete(found, 1, 0)).all()
    held = jax.jit(lambda t: c.run(None, t, TRAINED).logits_before)(tokens)
    assert np.isnan(held[1]).any() and np.isfinite(np.delete(held, 1, 0)).all()
