"""The construction against weight-space gradient descent in numpy, and its entry points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.gradient_descent.construction import GradientDescent
from constructions.runs import construct

BARS = {"float64": 1e-13, "float32": 5e-6}


def weights_of(x, y, start, steps, rate):
    """W_0..W_K for one context, in float64."""
    weights = [np.array(start, float)]
    for _ in range(steps):
        w, gradient = weights[-1], np.zeros(start.shape)
        for x_i, y_i in zip(x, y, strict=True):
            gradient += np.outer(w @ x_i - y_i, x_i)
        weights.append(w - rate * gradient)
    return np.array(weights)


def case(rng, dim_x, dim_y, context, queries=3, batch=3, dtype="float64"):
    x = rng.uniform(-1, 1, (batch, context, dim_x)).astype(dtype)
    y = rng.normal(size=(batch, context, dim_y)).astype(dtype)
    q = rng.uniform(-1, 1, (batch, queries, dim_x)).astype(dtype)
    largest = max(np.linalg.eigvalsh(a.T.astype(float) @ a)[-1] for a in x)
    return x, y, q, 1.5 / largest


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("recurrent", [False, True], ids=["unrolled", "recurrent"])
@pytest.mark.parametrize("dim_y", [1, 3])
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_every_token_and_layer_is_gradient_descent(steps, dim_y, recurrent, dtype):
    rng = np.random.default_rng([steps, dim_y, recurrent])
    dim_x, context = int(rng.integers(1, 9)), int(rng.integers(1, 12))
    start = rng.normal(size=(dim_y, dim_x)).astype("float32")
    x, y, q, rate = case(rng, dim_x, dim_y, context, dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        c = CATALOGUE["gradient-descent"](
            dim_x=dim_x,
            dim_y=dim_y,
            num_examples=context,
            steps=steps,
            step_size=float(rate * context),
            init_weight=start,
            recurrent=recurrent,
        )
        model = c.compile().model
        inputs = [jnp.asarray(a) for a in (x, y, q)]
        stream, groups, _ = c.stream(model, *inputs)
        prediction = np.asarray(jax.jit(c.predict)(model, *inputs))
        run = jax.jit(lambda m, s, g: m.run(s, g, sites=("residual",)))
        residual = np.asarray(run(model, stream, groups)[1]["residual"])
    assert prediction.dtype == residual.dtype == dtype
    weights = np.array([weights_of(a, b, start, steps, rate) for a, b in zip(x, y, strict=True)])
    estimate = np.einsum("bkoi,bqi->kbqo", weights, q.astype(float))
    moved = np.einsum("bkoi,bni->kbno", weights - start, x.astype(float))
    tokens = np.concatenate([x, q], 1)
    np.testing.assert_array_equal(
        residual[..., :dim_x], np.broadcast_to(tokens, residual[..., :dim_x].shape)
    )
    for found, wanted in (
        (prediction, estimate[-1]),
        (-residual[:, :, context:, dim_x:], estimate),
        (residual[:, :, :context, dim_x:], y - moved),
    ):
        error = np.abs(found - wanted).max() / np.sqrt(np.mean(wanted**2))
        assert error <= BARS[dtype]


def test_contexts_of_another_length_keep_the_step(x64):
    rng = np.random.default_rng(0)
    c = GradientDescent(dim_x=3, dim_y=2, num_examples=5, steps=4, step_size=0.4)
    model = c.compile().model
    for context in (1, 9):
        x, y, q, _ = case(rng, 3, 2, context)
        w = [weights_of(a, b, np.zeros((2, 3)), 4, 0.4 / 5)[-1] for a, b in zip(x, y, strict=True)]
        wanted = np.einsum("boi,bqi->bqo", w, q)
        inputs = [jnp.asarray(a) for a in (x, y, q)]
        found = jax.jit(c.predict)(model, *inputs), jax.jit(c.trace)(*inputs)["prediction"]
        for prediction in found:
            np.testing.assert_allclose(prediction, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, q: (x.at[0, 0, 0].set(jnp.nan), y, q), "x holds NaN"),
        (lambda x, y, q: (x, y.at[0, 0, 0].set(jnp.inf), q), "y holds NaN"),
        (lambda x, y, q: (x, y, q.at[0, 0, 0].set(-jnp.inf)), "x_query holds NaN"),
        (lambda x, y, q: (x[..., :2], y, q), r"x has shape \(2, 5, 2\)"),
        (lambda x, y, q: (x, y[:, :4], q), r"y has shape \(2, 4, 1\)"),
        (lambda x, y, q: (x, y[..., 0], q), r"y has shape \(2, 5\)"),
        (lambda x, y, q: (x, y, q[:1]), r"x_query has shape \(1, 1, 3\)"),
        (lambda x, y, q: (x[:, :0], y[:, :0], q), "at least one token"),
        (lambda x, y, q: (x, y, q[:, :0]), "at least one token"),
    ],
)
def test_predict_refuses(change, message):
    c = GradientDescent(dim_x=3, num_examples=5)
    model = c.compile().model
    good = jnp.ones((2, 5, 3)), jnp.ones((2, 5, 1)), jnp.ones((2, 1, 3))
    # the checks of shapes in annotations would come first
    with pytest.raises(ValueError, match=message):
        c.check(*change(*good))
    with pytest.raises((ValueError, TypeError)):
        c.predict(model, *change(*good))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"dim_x": 0}, "dim_x is 0"),
        ({"dim_y": -1}, "dim_y is -1"),
        ({"num_examples": 0}, "num_examples is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"step_size": float("nan")}, "step_size is nan"),
        ({"step_size": float("inf")}, "step_size is inf"),
        ({"init_weight": np.zeros((2, 10))}, r"init_weight has shape \(2, 10\)"),
        ({"init_weight": np.full((1, 10), np.nan)}, "init_weight"),
    ],
)
def test_constructor_refuses(settings, name):
    with pytest.raises(ValueError, match=name):
        GradientDescent(**settings)


def test_settings_are_values():
    weight = np.arange(3.0).reshape(1, 3)
    one, two = (GradientDescent(dim_x=3, init_weight=weight.copy()) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != GradientDescent(dim_x=3)


@pytest.mark.parametrize("family", ["gradient-descent", "separate-tokens"])
def test_the_task_may_have_other_distributions(family, x64):
    settings = {"inputs": {"gaussian": 2.0}, "weights": {"uniform": [-1, 1]}, "noise": 0.25}
    c = construct(family, {"dim_x": 3, "num_examples": 4, **settings})
    x, y, x_query = c.sample(jax.random.key(0), 20_000)
    np.testing.assert_allclose(jnp.var(x, (0, 1)), 2, rtol=0.05)
    np.testing.assert_allclose(jnp.var(x_query, (0, 1)), 2, rtol=0.05)
    # y = W x + eps: per row E[(w.x)^2] = 3 x 2 x 1/3, and the noise
    np.testing.assert_allclose(jnp.var(y), 2 + 0.25**2, rtol=0.05)
    batch = c.task.sample(jax.random.key(1), 20_000)
    losses = []
    for rate in (0.9, 1.0, 1.1):  # the step size that is chosen is the best on this very task
        w = rate * c.step_size * jnp.einsum("bno,bni->boi", batch.inputs[1], batch.inputs[0]) / 4
        prediction = jnp.einsum("boi,bqi->bqo", w, batch.inputs[2])
        losses.append(float(c.task.loss(prediction, batch).mean()))
    assert losses[1] < min(losses[0], losses[2])


def test_distributions_without_a_closed_form():
    shifted = {"inputs": {"uniform": [0, 1]}}
    with pytest.raises(ValueError, match="step_size is None, must be given: inputs must have mean"):
        construct("gradient-descent", shifted)
    c = construct("gradient-descent", {**shifted, "step_size": 0.5})
    assert (
        c.counterpart().optimum is None
        and c.claims == construct("gradient-descent", {"steps": 2, "step_size": 0.1}).claims
    )
    for name in ("inputs", "weights"):
        with pytest.raises(ValueError, match=f"{name}: covariance must have shape .10, 10."):
            construct("gradient-descent", {name: {"gaussian": [[1, 0], [0, 1]]}})
    with pytest.raises(ValueError, match="noise is -1"):
        construct("gradient-descent", {"noise": -1})
    with pytest.raises(ValueError, match="must be left out for dim_x=1, dim_y=1"):
        construct("kernel-descent", {"noise": 0.1})
    assert construct("gradient-descent", {"inputs": "uniform"}) == construct("gradient-descent")
