"""Gradient descent on features against numpy, the kernel identity, and what must differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.claims import predict
from constructions.core.evaluate import evaluate
from constructions.family import verify
from constructions.kernel_descent import KERNEL_DESCENT
from constructions.kernel_descent.construction import KernelDescent
from synthetic.tasks.regression import RegressionTask
from synthetic.tasks.sine import SineTask


def mlp(rng, dim_x, hidden=9, features=4):
    return (
        rng.normal(size=(hidden, dim_x)),
        rng.normal(size=hidden),
        rng.normal(size=(features, hidden)) / 3,
    )


def act(name, u):
    """Activations, written once more."""
    if name == "gelu":
        return 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    return {"relu": np.maximum(u, 0), "tanh": np.tanh(u)}[name]


def features_of(c, x):
    """m(x), from the settings alone."""
    if c.features is None:
        points = np.linspace(-5, 5, c.knots)
        return np.stack([np.interp(x[..., 0], points, f(points)) for f in (np.sin, np.cos)], -1)
    hidden, bias, output = map(np.asarray, c.features)
    return act(c.activation, x @ hidden.T + bias) @ output.T


def case(rng, c, batch=4, context=6, queries=3):
    x = rng.uniform(-4, 4, (batch, context, c.dim_x))
    y = rng.normal(size=(batch, context, c.dim_y))
    return x, y, rng.uniform(-4, 4, (batch, queries, c.dim_x))


def relative(found, wanted):
    return np.abs(np.asarray(found) - wanted).max() / np.sqrt(np.mean(wanted**2))


def settings(rng):
    yield {}
    yield {"steps": 3, "step_size": 1.2, "init_weight": [[0.3, -0.7]]}
    yield {"init_weight": "prior mean", "knots": 31, "amplitudes": [0.1, 5]}
    yield {"features": mlp(rng, 1), "activation": "tanh"}
    yield {"dim_x": 3, "features": mlp(rng, 3), "activation": "gelu", "steps": 2, "step_size": 0.3}
    yield {
        "dim_x": 2,
        "dim_y": 2,
        "num_examples": 7,
        "features": mlp(rng, 2, features=5),
        "steps": 3,
        "step_size": 0.2,
        "init_weight": rng.normal(size=(2, 5)),
    }


CASES = list(settings(np.random.default_rng(7)))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_value_is_gradient_descent_on_features(x64, number):
    c = KernelDescent(**CASES[number])
    assert c.step_size is not None
    x, y, q = case(np.random.default_rng(number), c)
    m, m_query = features_of(c, x), features_of(c, q)
    start = {None: 0.0, "prior mean": np.array([[0, 2 * np.mean(c.amplitudes) / np.pi]])}
    given = c.init_weight
    w = start[given] if given is None or isinstance(given, str) else np.asarray(given)
    w = np.broadcast_to(w, (len(x), c.dim_y, m.shape[-1]))
    estimates, residuals = [], []
    for _ in range(c.steps + 1):
        estimates.append(np.einsum("bof,bqf->bqo", w, m_query))
        residuals.append(y - np.einsum("bof,bnf->bno", w, m))
        w = w + c.step_size / c.num_examples * np.einsum("bno,bnf->bof", residuals[-1], m)
    wanted = {
        "features": np.concatenate([m, m_query], 1),
        "estimate": np.stack(estimates, 1),
        "residual": np.stack(residuals, 1),
        "prediction": estimates[-1],
    }
    inputs = [jnp.asarray(a) for a in (x, y, q)]
    model = c.compile().model
    assert model.config.depth == c.steps + 1

    @jax.jit
    def values(model, *inputs):
        stream, groups, _ = c.stream(model, *inputs)
        slots = evaluate(c.program, stream, np.repeat([0, 1], [6, 3]))
        read, trace = c.read(model, *inputs), c.trace(*inputs)
        return read, trace, c.predict(model, *inputs), model(stream, groups), slots

    read, trace, prediction, out, slots = values(model, *inputs)
    assert set(read) == set(wanted) == set(trace) - {"weight"}
    for name, value in wanted.items():
        assert relative(trace[name], value) < 1e-13, name
        # hinges are as large as 10 before they cancel
        assert relative(read[name], value) < 5e-13, name
    assert relative(prediction, wanted["prediction"]) < 5e-13
    np.testing.assert_array_equal(out[..., : c.dim_x], np.concatenate([x, q], 1))
    # the second back end, slot by slot
    for slot in c.program.slots:
        np.testing.assert_allclose(slots[slot.name], out[..., slot.columns], atol=1e-12)


def test_certificate():
    certificate = verify(KernelDescent(), batch=64)
    assert certificate.passed, certificate.to_json()
    assert len(certificate.errors) == 2


@pytest.mark.parametrize("given", [None, "relu", "gelu"])
def test_one_step_is_a_kernel_smoother(x64, given):
    """y_hat = (eta / N) sum_i y_i m(x_i)^T m(x), sums written out."""
    rng = np.random.default_rng(3)
    extra = {} if given is None else {"features": mlp(rng, 1), "activation": given}
    c = KernelDescent(**extra)
    assert c.step_size is not None
    x, y, q = case(rng, c)
    wanted = np.zeros((4, 3, 1))
    for b, n, t in np.ndindex(4, 6, 3):
        kernel = features_of(c, x[b, n]) @ features_of(c, q[b, t])
        wanted[b, t] += c.step_size / 10 * kernel * y[b, n]
    found = jax.jit(c.predict)(c.compile().model, *(jnp.asarray(a) for a in (x, y, q)))
    assert relative(found, wanted) < 1e-12


@pytest.mark.parametrize("knots", [2, 3, 4, 20, 158, 159])
def test_interpolation_bound(knots):
    """Exact at the points, h^2 / 8 between them, constant beyond the ends."""
    hidden, bias, output = KernelDescent(knots=knots, step_size=1.0).mlp
    points = np.linspace(-5, 5, knots)
    x = np.concatenate([points, np.linspace(-5, 5, 4001), [-7.0, 9.0]])
    m = np.maximum(x[:, None] @ hidden.T + bias, 0) @ output.T
    exact = np.stack([np.sin(x), np.cos(x)], axis=-1)
    error = np.abs(m - exact)
    bound = (10 / (knots - 1)) ** 2 / 8
    assert error[:knots].max() < 1e-13
    assert error[knots:-2].max() <= bound + 1e-13
    if knots >= 20:  # and the bound is nearly met
        assert error[knots:-2].max() > 0.9 * bound
    np.testing.assert_allclose(m[-2:], exact[[0, knots - 1]], atol=1e-13)


def test_random_settings_pass(x64):
    rng = np.random.default_rng(5)
    dim_x, dim_y, steps = (int(v) for v in rng.integers(1, 4, 3))
    c = KernelDescent(
        dim_x=dim_x,
        dim_y=dim_y,
        num_examples=int(rng.integers(1, 9)),
        steps=steps,
        step_size=0.1,
        features=mlp(rng, dim_x, int(rng.integers(1, 9)), int(rng.integers(1, 6))),
        activation="gelu",
    )
    assert verify(c, dtypes=("float64",), batch=8).passed
    assert isinstance(c.task, SineTask if dim_x == dim_y == 1 else RegressionTask)


@pytest.mark.parametrize("start", [None, "prior mean"])
def test_near_misses_differ_and_claims_name_them(start):
    c = KernelDescent(init_weight=start)
    near = c.near_misses()
    batch = c.task.sample(jax.random.key(0), 512)
    apply = jax.jit(c.apply)
    reference = apply(c.compile().model, *batch.inputs)
    for name, (model, base) in near.items():
        assert base == c
        prediction = predict(c, model, *batch.inputs)
        assert prediction.shape == reference.shape
        assert relative(prediction, np.asarray(reference)) > 0.05, name
    assert len({claim.name for claim in c.claims}) == len(c.claims) > 2
    for claim in c.claims:
        assert claim.catches and set(claim.catches) <= set(near), claim.name
    assert {name for claim in c.claims for name in claim.catches} == set(near)


def test_settings_are_values():
    one, two = (KernelDescent(features=mlp(np.random.default_rng(0), 1)) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != KernelDescent()
    assert KernelDescent(amplitudes=[0.1, 5]) != KernelDescent()
    family = KERNEL_DESCENT
    assert family(**family.example()) == KernelDescent()
    # amplitudes scale out of the best step from zero
    wide = KernelDescent(amplitudes=(0.1, 5.0))
    assert wide.step_size == pytest.approx(KernelDescent().step_size, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim_x": 0}, "dim_x is 0"),
        ({"knots": 1}, "knots is 1, must be an integer of at least 2"),
        ({"dim_x": 2}, "features is None, must be given for dim_x=2"),
        ({"activation": "gelu"}, "activation is 'gelu', must be 'relu'"),
        ({"activation": "sine"}, "activation is 'sine', must be one of"),
        ({"steps": 2}, "step_size is None, must be given for steps=2"),
        ({"step_size": float("nan")}, "step_size is nan"),
        ({"amplitudes": (1.0,)}, "amplitudes is"),
        ({"amplitudes": (2.0, 1.0)}, "low_amplitude and high_amplitude"),
        ({"init_weight": np.zeros((1, 3))}, r"init_weight is .* shape \(1, 2\)"),
        ({"init_weight": [[np.nan, 0]]}, "init_weight is"),
        ({"init_weight": "zero"}, "init_weight is 'zero'"),
        ({"features": 3}, "features is 3"),
        ({"features": ([[1.0]], [0.0])}, "features has shapes"),
        ({"features": ([[1.0]], [0.0], [[1.0, 2.0]])}, "features has shapes"),
        ({"features": ([[np.inf]], [0.0], [[1.0]])}, "features holds NaN"),
    ],
)
def test_constructor_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        KernelDescent(**change)


def test_predict_refuses():
    c = KernelDescent()
    good = jnp.ones((2, 5, 1)), jnp.ones((2, 5, 1)), jnp.ones((2, 1, 1))
    with pytest.raises(ValueError, match="x holds NaN"):
        c.check(good[0].at[0, 0, 0].set(jnp.nan), *good[1:])
    with pytest.raises(ValueError, match="x has shape"):
        c.check(jnp.ones((2, 5, 2)), *good[1:])
    c.check(50 * good[0], *good[1:])
    for far in ((51 * good[0], *good[1:]), (*good[:2], -1e5 * good[2])):
        with pytest.raises(ValueError, match=r"x(_query)? holds \S+ in size, must be at most 50"):
            c.check(*far)
