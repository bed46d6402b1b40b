"""The mesa layer against direct solves, its methods against each other, gradients, decoding."""

import inspect
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.mesa_layer import (
    METHODS,
    mesa,
    mesa_attention,
    mesa_start,
    mesa_step,
)
from constructions.mesa_layer.layer import reference
from constructions.mesa_layer.problem import inverse_cholesky

GATED = [name for name, method in METHODS.items() if method.forgets]
NAMES = ("query", "key", "value", "regularization", "input_gate", "forget_gate")
CASES = [(name, gates) for name in METHODS for gates in ("", "input")] + [
    (name, gates) for name in GATED for gates in ("forget", "both")
]


def draw(seed=0, batch=2, time=13, heads=3, dim=5, value_dim=4, gates="both", diagonal=True):
    """Random arguments of `mesa`, those that are not asked for left out."""
    rng = np.random.default_rng(seed)
    arguments = {
        "query": rng.normal(size=(batch, time, heads, dim)),
        "key": rng.normal(size=(batch, time, heads, dim)),
        "value": rng.normal(size=(batch, time, heads, value_dim)),
        "regularization": rng.uniform(0.1, 2, (heads, dim) if diagonal else heads),
    }
    input_gate = rng.uniform(0, 2, (batch, time, heads))
    input_gate[0, 2:3] = 0
    forget_gate = rng.uniform(0.2, 1, (batch, time, heads))
    forget_gate[:, 4:5] = 1
    if gates in ("input", "both"):
        arguments["input_gate"] = input_gate
    if gates in ("forget", "both"):
        arguments["forget_gate"] = forget_gate
    return {name: jnp.asarray(x) for name, x in arguments.items()}


def direct(query, key, value, regularization, input_gate=None, forget_gate=None):
    """The definition: sums over pairs and one numpy solve for every time of every head."""
    query, key, value, ridge = map(np.asarray, (query, key, value, regularization))
    batch, time, heads, dim = query.shape
    beta = np.ones(query.shape[:-1]) if input_gate is None else np.asarray(input_gate)
    gamma = np.ones(query.shape[:-1]) if forget_gate is None else np.asarray(forget_gate)
    output = np.zeros(value.shape)
    for b, t, h in np.ndindex(batch, time, heads):
        moment, gram = np.zeros((value.shape[-1], dim)), np.zeros((dim, dim))
        for s in range(t + 1):
            weight = beta[b, s, h] * np.prod(gamma[b, s + 1 : t + 1, h])
            moment += weight * np.outer(value[b, s, h], key[b, s, h])
            gram += weight * np.outer(key[b, s, h], key[b, s, h])
        ridge_matrix = np.diag(np.broadcast_to(ridge[h], dim))
        output[b, t, h] = moment @ np.linalg.solve(gram + ridge_matrix, query[b, t, h])
    return output


def relative(x, y):
    return float(np.abs(np.asarray(x) - np.asarray(y)).max() / np.abs(np.asarray(y)).max())


def loss_of(function, arguments, **options):
    """A loss whose gradient reaches every output with another weight, and its arguments' values."""
    weight = jax.random.normal(jax.random.key(7), arguments["value"].shape)

    def loss(values):
        return (function(**dict(zip(arguments, values, strict=True)), **options) * weight).sum()

    return loss, list(arguments.values())


@pytest.mark.parametrize(("method", "gates"), CASES)
def test_equals_a_direct_solve(x64, method, gates):
    arguments = draw(gates=gates, diagonal=gates != "input")
    # no refinement: it and the safeguard behind it would make up for a wrong method
    output = mesa(**arguments, method=method, chunk=4, refinements=0)
    assert output.dtype == jnp.float64
    assert relative(output, direct(**arguments)) < 1e-11


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (1, 11, 2, 3, 7), (3, 9, 1, 7, 2)],
)
@pytest.mark.parametrize("gates", ["input", "both"])
def test_methods_agree_on_any_shape(x64, shape, gates):
    arguments = draw(1, *shape, gates=gates)
    expected = direct(**arguments)
    for method in GATED if gates == "both" else METHODS:
        output = mesa(**arguments, method=method)
        assert output.shape == arguments["value"].shape
        assert relative(output, expected) < 1e-11


def test_default_chunks_of_a_longer_time(x64):
    arguments = draw(10, 1, 70, 1, 3, 3, gates="")
    assert relative(mesa(**arguments), direct(**arguments)) < 1e-11


@pytest.mark.parametrize(
    ("method", "gates"), [(m, "both" if m in GATED else "input") for m in METHODS] + [("auto", "")]
)
def test_gradients_equal_autodiff_of_the_definition(x64, method, gates):
    arguments = draw(2, gates=gates)
    loss, values = loss_of(mesa, arguments, method=method, chunk=4)
    expected = jax.grad(loss_of(reference, arguments)[0])(values)
    for name, found, right in zip(arguments, jax.grad(loss)(values), expected, strict=True):
        assert relative(found, right) < 1e-11, name


@pytest.mark.parametrize("gates", ["input", "both"])
def test_gradients_equal_finite_differences(x64, gates):
    arguments = draw(3, time=7, gates=gates, diagonal=False)
    arguments["forget_gate" if gates == "both" else "input_gate"] *= 0.9  # room for both signs
    arguments["input_gate"] += 0.1
    loss, values = loss_of(mesa, arguments, chunk=3)
    gradient, loss = jax.grad(loss)(values), jax.jit(loss)
    rng = np.random.default_rng(0)
    for place, name in enumerate(arguments):
        way = rng.normal(size=values[place].shape)

        def moved(size, place=place, way=way):
            return [x + size * way if i == place else x for i, x in enumerate(values)]

        slope = (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5
        found = float((gradient[place] * way).sum())
        assert float(slope) == pytest.approx(found, rel=1e-6, abs=1e-7), name


def test_gradient_of_small_forget_gates_keeps_its_digits():
    """In float32, where a difference of sums over all pairs over the gate would be noise."""
    arguments = draw(4, time=12)
    gate = arguments["forget_gate"].at[:, 6].set(1e-6)
    arguments = {n: x.astype(jnp.float32) for n, x in arguments.items()} | {
        "forget_gate": gate.astype(jnp.float32)
    }
    loss, values = loss_of(mesa, arguments, chunk=4)
    found = jax.grad(loss)(values)[-1]
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arguments.items()}
        weight = jax.random.normal(jax.random.key(7), exact["value"].shape, jnp.float32)
        expected = jax.grad(lambda g: (reference(**exact | {"forget_gate": g}) * weight).sum())(
            exact["forget_gate"]
        )
    assert relative(found[:, 6], expected[:, 6]) < 1e-4


@pytest.mark.parametrize(("method", "gates"), [(m, "both" if m in GATED else "") for m in METHODS])
def test_looks_at_no_later_token(x64, method, gates):
    arguments = draw(5, gates=gates)
    later = {n: x.at[:, 7:].add(0.3) for n, x in arguments.items() if n not in NAMES[3:]}
    gates_later = {n: x.at[:, 7:].set(0.5) for n, x in arguments.items() if n in NAMES[4:]}
    before = mesa(**arguments, method=method, chunk=4)
    after = mesa(**arguments | later | gates_later, method=method, chunk=4)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert relative(before[:, 7:], after[:, 7:]) > 0.1


@pytest.mark.parametrize("gates", ["", "input", "forget", "both"])
def test_decoding_equals_the_layer(x64, gates):
    arguments = draw(6, gates=gates)
    ridge = arguments.pop("regularization")
    state, outputs = mesa_start(2, 5, 4, ridge), []
    for t in range(arguments["query"].shape[1]):
        now = {name: x[:, t] for name, x in arguments.items()}
        state, output = mesa_step(state, regularization=ridge, **now)
        outputs.append(output)
    expected = direct(regularization=ridge, **arguments)
    assert relative(jnp.stack(outputs, 1), expected) < 1e-11


def test_decoding_with_and_without_forgetting_in_turns(x64):
    arguments = draw(7)
    ridge, gate = arguments.pop("regularization"), arguments["forget_gate"]
    arguments["forget_gate"] = gate.at[:, 1::2].set(1)
    state, outputs = mesa_start(2, 5, 4, ridge), []
    for t in range(gate.shape[1]):
        now = {name: x[:, t] for name, x in arguments.items()}
        if t % 2:
            del now["forget_gate"]
        state, output = mesa_step(state, regularization=ridge, **now)
        outputs.append(output)
    expected = direct(regularization=ridge, **arguments)
    assert relative(jnp.stack(outputs, 1), expected) < 1e-11


def dynamics(time, dim=10):
    """Tokens of a rotating state with noise of .01: keys are the states before the queries."""
    rng = np.random.default_rng(0)
    transition = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    state = [rng.uniform(-1, 1, dim)]
    for _ in range(time):
        state.append(transition @ state[-1] + 0.01 * rng.normal(size=dim))
    state = np.asarray(state, np.float32)[None, :, None]
    return state[:, 1:], state[:, :-1], state[:, 1:]


@pytest.mark.parametrize(("ridge", "out", "slope"), [(1.0, 1e-6, 1e-5), (1e-3, 1e-4, 1e-3)])
def test_float32_errors(ridge, out, slope):
    tokens = dynamics(4096)
    arguments = dict(zip(NAMES, (*map(jnp.asarray, tokens), jnp.full(1, ridge)), strict=False))
    weight = jax.random.normal(jax.random.key(1), tokens[0].shape)

    def loss(query, key, value, arguments, weight):
        output = mesa(query, key, value, arguments["regularization"])
        return (output * weight).sum(), output

    run = jax.grad(loss, (0, 1, 2), has_aux=True)
    found, output = run(*(arguments[n] for n in NAMES[:3]), arguments, weight)
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arguments.items()}
        expected = jax.grad(
            lambda q, k, v: (mesa(q, k, v, exact["regularization"], method="scan") * weight).sum(),
            (0, 1, 2),
        )(*(exact[n] for n in NAMES[:3]))
    query, key, value = (np.asarray(x, np.float64) for x in tokens)
    gram = np.cumsum(key[..., :, None] * key[..., None, :], 1) + ridge * np.eye(10)
    moment = np.cumsum(value[..., :, None] * key[..., None, :], 1)
    right = (moment @ np.linalg.solve(gram, query[..., None]))[..., 0]

    def error(x, y):
        return np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)

    assert error(output, right) < out
    for one, other in zip(found, expected, strict=True):
        assert error(one, np.asarray(other)) < slope


def degenerate(kind, dtype, gates):
    """Arguments of `mesa` whose keys are all the same, or of a condition number of 1e8."""
    arguments = draw(0, 1, 40, 1, 8, 8, gates=gates, diagonal=False)
    key = np.asarray(arguments["key"], float)
    key = 30 * key[:, :1] + 0 * key if kind == "repeated" else 1e3 * key * np.logspace(0, -8, 8)
    tokens = {"query": key, "key": key, "value": key[..., ::-1], "regularization": [1e-3]}
    return {name: np.asarray(x, dtype) for name, x in (arguments | tokens).items()}


@pytest.mark.parametrize(
    ("method", "gates", "dtype"),
    [(m, "", "float32") for m in METHODS]
    + [("cholesky", "", "float64")]
    + [pytest.param(m, "", "float64", marks=pytest.mark.slow) for m in METHODS if m != "cholesky"]
    + [(m, "both", "float32") for m in GATED]
    + [("chunked", "input", "float32")],
)
@pytest.mark.parametrize("kind", ["repeated", "condition"])
def test_degenerate_keys_stay_finite(method, gates, dtype, kind):
    plain = degenerate(kind, dtype, gates)
    with jax.enable_x64(dtype == "float64"):
        arguments = {name: jnp.asarray(x) for name, x in plain.items()}
        loss, values = loss_of(mesa, arguments, method=method, chunk=20)
        value, gradient = jax.value_and_grad(loss)(values)
        assert np.isfinite(value)
        assert all(np.isfinite(np.asarray(g)).all() for g in gradient)
        output = mesa(**arguments, method=method, chunk=20)
    plain = {name: np.asarray(x, np.float64) for name, x in plain.items()}
    assert relative(output, direct(**plain)) < 0.05  # without safeguards hundreds, or NaN


def in_fractions(query, key, value, ridge, beta=None, gamma=None):
    """One sequence `[time, dim]` without any rounding, but for the last."""
    q, k, v = (
        [[Fraction(float(number)) for number in row] for row in x] for x in (query, key, value)
    )
    dim, found, weights = len(k[0]), [], []
    for t, asked in enumerate(q):
        kept = Fraction(1 if gamma is None else float(gamma[t]))
        weights = [kept * w for w in weights] + [Fraction(1 if beta is None else float(beta[t]))]
        rows = []
        for i in range(dim):
            terms = [w * pair[i] for w, pair in zip(weights, k, strict=False)]
            row = [sum(a * k[s][j] for s, a in enumerate(terms)) for j in range(dim)]
            row[i] += Fraction(float(np.broadcast_to(ridge, dim)[i]))
            rows.append(
                row + [sum(a * v[s][j] for s, a in enumerate(terms)) for j in range(len(v[0]))]
            )
        for i in range(dim):  # positive definite: no pivoting
            rows[i] = [x / rows[i][i] for x in rows[i]]
            for j in range(dim):
                if j != i:
                    rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
        weight = [row[dim:] for row in rows]
        found.append(
            [
                float(sum(a * w[j] for a, w in zip(asked, weight, strict=True)))
                for j in range(len(v[0]))
            ]
        )
    return np.array(found)


def ill_conditioned(gates):
    """Sequences of 9 tokens in 4 dimensions, heads of several ridges: scaled keys, and repeated."""
    rng = np.random.default_rng(3)
    query, key, value = rng.normal(size=(3, 5, 9, 4, 4))
    key = key * np.array([1e-3, 1, 1e3, 1, 1])[:, None, None, None]
    key[3] = key[3, :1]
    key[4] = key[4, np.arange(9) % 2]
    ridge = np.array([[1.0] * 4, [1e-4] * 4, [1e-6] * 4, [1e-8, 1e-2, 1e-8, 1e-5]])
    arguments = {"query": query, "key": key, "value": value, "regularization": ridge}
    if gates in ("input", "both"):
        arguments["input_gate"] = rng.uniform(0.1, 2, (5, 9, 4))
        arguments["input_gate"][:, 2] = 0
    if gates == "both":
        arguments["forget_gate"] = rng.uniform(0.1, 1, (5, 9, 4))
        arguments["forget_gate"][:, 3:6] = [[1], [1], [1e-9]]
    return {name: jnp.asarray(x, jnp.float32) for name, x in arguments.items()}


@pytest.fixture(scope="module", params=["input", "both"])
def exact(request):
    """Ill-conditioned arguments and what is right, without rounding."""
    arguments = ill_conditioned(request.param)
    given = {name: np.asarray(x) for name, x in arguments.items()}
    gates = [given.get(name) for name in NAMES[4:]]
    right = np.zeros(given["value"].shape)
    for b, h in np.ndindex(5, 4):
        tokens = (given[name][b, :, h] for name in NAMES[:3])
        one = (None if g is None else g[b, :, h] for g in gates)
        right[b, :, h] = in_fractions(*tokens, given["regularization"][h], *one)
    return request.param, arguments, right


def largest_error(output, right):
    """Over all sequences, relative to the largest output of each."""
    error = np.abs(np.asarray(output, np.float64) - right).max((1, 3))
    return float((error / np.abs(right).max((1, 3))).max())


@pytest.mark.parametrize("method", METHODS)
def test_float32_keeps_four_digits_at_any_condition(exact, method):
    gates, arguments, right = exact
    if gates == "both" and not METHODS[method].forgets:
        pytest.skip("no forget gate")
    assert largest_error(mesa(**arguments, method=method, chunk=4), right) < 1e-4


def test_weights_and_steps_keep_their_digits(exact):
    _, arguments, right = exact
    tokens = dict(arguments)
    ridge, value = tokens.pop("regularization"), tokens.pop("value")
    weights = mesa_attention(**tokens, regularization=ridge)
    found = np.einsum("bhts,bshv->bthv", np.asarray(weights, np.float64), value)
    assert largest_error(found, right) < 1e-4

    def step(state, now):
        return mesa_step(state, regularization=ridge, **now)

    by_time = {name: jnp.moveaxis(x, 1, 0) for name, x in (tokens | {"value": value}).items()}
    found = jax.jit(lambda x: jax.lax.scan(step, mesa_start(5, 4, 4, ridge), x)[1])(by_time)
    assert largest_error(np.moveaxis(np.asarray(found), 0, 1), right) < 1e-4


def test_gradients_keep_their_digits(exact):
    """Against float64, which has them up to conditions of 1e10: not the largest keys here."""
    gates, arguments, _ = exact
    kept = {
        n: x if n == "regularization" else x[np.array([0, 1, 3, 4])] for n, x in arguments.items()
    }
    loss, values = loss_of(mesa, kept, chunk=4)
    found = jax.grad(loss)(values)
    weight = np.asarray(jax.random.normal(jax.random.key(7), kept["value"].shape))
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in values]

        def other(values):
            return (reference(**dict(zip(kept, values, strict=True))) * weight).sum()

        right = jax.grad(other)(wide)
    for name, one, expected in zip(kept, found, right, strict=True):
        assert np.isfinite(one).all(), name
        one, expected = (np.asarray(x, np.float64) for x in (one, expected))
        if name == "regularization":
            assert relative(one[:2], expected[:2]) < 1e-3
            continue
        axes = tuple(range(1, one.ndim)) if one.ndim == 3 else (1, 3)
        scale = np.abs(expected).max(axes if one.ndim == 4 else 1)
        error = np.abs(one - expected).max(axes if one.ndim == 4 else 1)
        assert (error / scale).max() < 1e-3, name


def test_gradients_of_gates_of_0_and_1_equal_finite_differences(x64):
    """At ill-conditioned times; a gate of 0 only from within a trace."""
    arguments = draw(11, 1, 6, 2, 4, 2)
    arguments["regularization"] = jnp.full((2, 4), 1e-6)
    arguments["input_gate"] = arguments["input_gate"].at[:, 1].set(0)
    gate = arguments["forget_gate"].at[:, 2].set(1).at[:, 4].set(0)
    arguments["forget_gate"] = gate
    weight = jax.random.normal(jax.random.key(7), arguments["value"].shape)

    @jax.jit
    def loss(beta, gamma):
        gates = {"input_gate": beta, "forget_gate": gamma}
        return (mesa(**arguments | gates, chunk=3) * weight).sum()

    gates = arguments["input_gate"], gate
    found = jax.jit(jax.grad(loss, (0, 1)))(*gates)
    assert all(np.isfinite(x).all() for x in found)
    for place, time, sign in ((0, 1, 1), (1, 2, -1), (1, 4, 1)):
        for head in range(2):
            ends = []
            for size in (0, 1, 2, 3, 4):  # one side, fourth order
                moved = list(gates)
                moved[place] = gates[place].at[0, time, head].add(sign * size * 1e-8)
                ends.append(float(loss(*moved)))
            slope = np.dot([-25 / 12, 4, -3, 4 / 3, -1 / 4], ends) / (sign * 1e-8)
            largest = float(jnp.abs(found[place]).max())
            assert abs(slope - float(found[place][0, time, head])) < 1e-3 * largest


@pytest.mark.parametrize("small", [1.0, 1e-7])
@pytest.mark.parametrize("gates", ["", "both"])
def test_forward_mode_and_hessian_products_equal_finite_differences(x64, gates, small):
    """By the solvers, and by the rotations of ill-conditioned times."""
    arguments = draw(3, 1, 6, 2, 4, 2, gates=gates, diagonal=False)
    arguments["regularization"] *= small
    if gates:
        arguments["forget_gate"] *= 0.9
        arguments["input_gate"] += 0.1
    loss, values = loss_of(mesa, arguments, chunk=3)
    rng = np.random.default_rng(0)
    way = [jnp.asarray(rng.normal(size=x.shape) * x) for x in values]

    @jax.jit
    def both(size):
        at = [x + size * w for x, w in zip(values, way, strict=True)]
        return jax.value_and_grad(loss)(at)

    @jax.jit
    def forward(way):
        return jax.jvp(jax.value_and_grad(loss), (values,), (way,))[1]

    (above, higher), (below, lower) = both(1e-5), both(-1e-5)
    slope, product = forward(way)
    assert float(slope) == pytest.approx(float(above - below) / 2e-5, rel=1e-6)
    for name, x, y, z in zip(arguments, product, higher, lower, strict=True):
        limit = 1e-6 if small == 1 or name != "regularization" else 1e-2  # of the difference there
        assert relative(x, (y - z) / 2e-5) < limit, name


def test_a_pair_that_may_not_enter_leaves_nothing():
    query, key, value, ridge = (jnp.ones((1, 1, 3)),) * 3 + (jnp.full(1, 1e-3),)
    for gates in ({}, {"forget_gate": jnp.full((1, 1), 0.5)}):
        given = {"input_gate": jnp.zeros((1, 1))} | gates
        state, output = mesa_step(mesa_start(1, 3, 3, ridge), query, key, value, ridge, **given)
        np.testing.assert_array_equal(output, 0)
        np.testing.assert_array_equal(state.moment, 0)
        one = {name: x[:, None] for name, x in given.items()}
        tokens = (x[:, None] for x in (query, key, value))
        np.testing.assert_array_equal(mesa(*tokens, ridge, **one), 0)


def test_one_pair_in_float32():
    k, q = jnp.array([3.0, 1, 2]), jnp.array([1.0, -2, 4])
    for ridge in (1e-4, 1e-6, 1e-8):
        found = mesa(*(x[None, None, None] for x in (q, k, jnp.ones(1))), jnp.full(1, ridge))
        assert float(found[0, 0, 0, 0]) == pytest.approx(9 / (14 + ridge), rel=1e-6)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_not_finite_changes_nothing_before(name):
    arguments = {n: x.astype(jnp.float32) for n, x in draw(5, gates="").items()}
    before = mesa(**arguments)
    for wrong in (jnp.nan, jnp.inf):
        broken = arguments | {name: arguments[name].at[:, 7].set(wrong)}
        after = mesa(**broken)
        np.testing.assert_array_equal(before[:, :7], after[:, :7])
        assert not np.isfinite(after[:, 7]).any()


def test_large_and_small_keys_do_not_overflow():
    arguments = {n: x.astype(jnp.float32) for n, x in draw(6, gates="", diagonal=False).items()}
    key, ridge = arguments["key"], arguments["regularization"]
    expected = mesa(**arguments | {"regularization": 1e-4 * ridge})
    for size in (1e15, 1e18):
        scaled = {"key": key * size, "query": arguments["query"] * size}
        found = mesa(**arguments | scaled | {"regularization": ridge * jnp.float32(1e-4)})
        limit = mesa(**arguments | {"regularization": 1e-30 * ridge})
        np.testing.assert_allclose(found, limit, rtol=1e-4, atol=1e-5)
    assert np.isfinite(expected).all()


@pytest.mark.parametrize("gates", ["", "both"])
@pytest.mark.parametrize("kind", ["repeated", "condition"])
def test_decoding_of_degenerate_keys_stays_finite(gates, kind):
    arguments = {name: jnp.asarray(x) for name, x in degenerate(kind, "float32", gates).items()}
    ridge = arguments.pop("regularization")

    @jax.jit
    def decoded(tokens):
        def step(state, now):
            return mesa_step(state, regularization=ridge, **now)

        by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
        return jax.lax.scan(step, mesa_start(1, 8, 8, ridge), by_time)[1]

    output, gradient = jax.jit(jax.value_and_grad(lambda t: decoded(t).sum()))(arguments)
    assert np.isfinite(output)
    assert all(np.isfinite(x).all() for x in gradient.values())


def test_long_decoding_in_float32_does_not_drift():
    query, key, value = dynamics(3000)
    tokens = [jnp.asarray(x[0]) for x in (query, key, value)]
    ridge = jnp.full(1, 1e-3)

    def step(state, xs):
        state, output = mesa_step(state, *(x[None] for x in xs), ridge)
        return state, output[0]

    _, output = jax.lax.scan(step, mesa_start(1, 10, 10, ridge), tuple(tokens))
    key, value, query = (np.asarray(x[0, :, 0], np.float64) for x in (key, value, query))
    right = (value.T @ key) @ np.linalg.solve(key.T @ key + 1e-3 * np.eye(10), query[-1])
    assert relative(output[-1, 0], right) < 1e-5


@pytest.mark.parametrize("n", [1, 4, 7, 16])
def test_inverse_cholesky(x64, n):
    a = np.random.default_rng(n).normal(size=(3, n, n))
    matrix = a @ a.swapaxes(-1, -2) + 0.1 * np.eye(n)
    inverse = inverse_cholesky(jnp.asarray(matrix), jnp.full(n, 0.1))
    np.testing.assert_allclose(inverse, np.linalg.inv(np.linalg.cholesky(matrix)), atol=1e-11)


def test_half_precision_is_computed_in_float32():
    arguments = draw(8, gates="input")
    half = {name: x.astype(jnp.bfloat16) for name, x in arguments.items()}
    full = {name: x.astype(jnp.float32) for name, x in half.items()}
    output = mesa(**half)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_array_equal(output, mesa(**full).astype(jnp.bfloat16))
    ridge = full.pop("regularization")
    start = mesa_start(2, 5, 4, ridge, jnp.bfloat16)
    now, exact = ({name: x[:, 0] for name, x in a.items() if name in full} for a in (half, full))
    state, output = mesa_step(start, regularization=ridge, **now)
    assert state.moment.dtype == state.root.dtype == state.root_rest.dtype == jnp.float32
    assert output.dtype == jnp.bfloat16
    expected = mesa_step(start, regularization=ridge, **exact)[1]
    np.testing.assert_array_equal(output, expected.astype(jnp.bfloat16))


def test_transforms(x64):
    arguments = draw(9)
    values = [arguments[name] for name in NAMES]
    mapped = jax.vmap(
        lambda q, k, v, r, b, g: mesa(q, k, v, r, input_gate=b, forget_gate=g, chunk=4),
        (0, 0, 0, None, 0, 0),
    )(*(x if n == 3 else x[:, None] for n, x in enumerate(values)))
    np.testing.assert_allclose(mapped[:, 0], mesa(**arguments, chunk=4), rtol=1e-12, atol=1e-14)


BAD = [
    ({"regularization": jnp.zeros(3)}, r"regularization has 0.0, every entry must be positive"),
    ({"regularization": -jnp.ones((3, 5))}, r"regularization has -1.0, .* positive and finite"),
    ({"regularization": jnp.full(3, jnp.inf)}, r"regularization has inf, .* finite"),
    ({"regularization": jnp.full(3, jnp.nan)}, r"regularization has nan, .* finite"),
    ({"regularization": jnp.ones(5)}, r"regularization has shape \(5,\), .*\(3,\)"),
    ({"key": jnp.ones((2, 13, 3, 4))}, r"key has shape \(2, 13, 3, 4\), .*\(2, 13, 3, 5\)"),
    ({"value": jnp.ones((2, 12, 3, 4))}, r"value has shape \(2, 12, 3, 4\)"),
    ({"value": jnp.ones((2, 13, 3, 0))}, r"value has shape \(2, 13, 3, 0\)"),
    (
        {"query": jnp.ones((2, 13, 5))},
        r"query has shape \(2, 13, 5\), .*\[batch, time, head, dim\]",
    ),
    ({"query": jnp.ones((2, 0, 3, 5))}, r"query has shape \(2, 0, 3, 5\), .* no axis empty"),
    ({"query": jnp.ones((2, 13, 3, 5), int)}, r"query has dtype int32, must be floating"),
    ({"input_gate": jnp.ones((2, 13))}, r"input_gate has shape \(2, 13\), .*\(2, 13, 3\)"),
    ({"input_gate": -jnp.ones((2, 13, 3))}, r"input_gate has -1.0, .* at least 0"),
    ({"forget_gate": jnp.zeros((2, 13, 3))}, r"forget_gate has 0.0, .* in \(0, 1\]"),
    ({"forget_gate": jnp.full((2, 13, 3), 1.5)}, r"forget_gate has 1.5, .* in \(0, 1\]"),
    ({"method": "qr"}, r"method is 'qr', must be one of \['auto', 'chunked'"),
    ({"method": "scan"}, r"method is 'scan', must be one of \['cholesky', 'conj.*forget_gate"),
    ({"method": "chunked"}, r"method is 'chunked', must be one of \['cholesky'"),
    ({"chunk": 0}, r"chunk is 0, must be an integer of at least 1"),
    ({"chunk": 2.5}, r"chunk is 2.5, must be an integer of at least 1"),
    ({"steps": 0}, r"steps is 0, must be an integer of at least 1"),
    ({"refinements": -1}, r"refinements is -1, must be an integer of at least 0"),
    ({"tolerance": -1.0}, r"tolerance is -1.0, must be at least 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_errors_name_argument_value_and_range(change, message):
    with pytest.raises(ValueError, match=message) as error:
        inspect.unwrap(mesa)(**draw() | change)  # without the tests' checks of annotations
    assert "\n" not in str(error.value)


def test_lists_are_arrays():
    arguments = draw(gates="")
    lists = {name: x.tolist() for name, x in arguments.items() if name in NAMES[:3]}
    found = inspect.unwrap(mesa)(**arguments | lists)
    np.testing.assert_array_equal(found, mesa(**arguments))


@pytest.mark.parametrize(
    ("change", "message"), [bad for bad in BAD if bad[0].keys() <= {*NAMES} - {"value"}]
)
def test_errors_of_the_weights(change, message):
    arguments = draw() | change
    del arguments["value"]
    with pytest.raises(ValueError, match=message):
        mesa_attention(**arguments)


def test_errors_of_decoding():
    ridge = jnp.ones(3)
    for sizes, name in (((0, 5, 4), "batch"), ((2, 0, 4), "dim"), ((2, 5, 0), "value_dim")):
        with pytest.raises(ValueError, match=f"{name} is 0, must be an integer of at least 1"):
            mesa_start(*sizes, ridge)
    with pytest.raises(ValueError, match="regularization has -1.0"):
        mesa_start(2, 5, 4, -ridge)
    with pytest.raises(ValueError, match=r"regularization has shape \(\)"):
        mesa_start(2, 5, 4, jnp.ones(()))
    with pytest.raises(ValueError, match=r"regularization has shape \(3, 4\), .*\(3, 5\)"):
        mesa_start(2, 5, 4, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="regularization has dtype int32, must be floating"):
        mesa_start(2, 5, 4, jnp.ones(3, int))
    with pytest.raises(ValueError, match="dtype is int32, must be floating"):
        mesa_start(2, 5, 4, ridge, jnp.int32)
    state, token = mesa_start(2, 5, 4, ridge), jnp.ones((2, 3, 5))
    with pytest.raises(ValueError, match=r"state is of shape \(2, 3, 5, 4\), .*\(2, 3, 5, 5\)"):
        mesa_step(state, token, token, token, ridge)
    with pytest.raises(ValueError, match=r"query has shape \(2, 5\), .*\[batch, head, dim\]"):
        mesa_step(state, token[:, 0], token[:, 0], token[:, 0], ridge)


def test_values_are_not_looked_at_in_traced_arrays():
    arguments = draw(gates="")
    output = jax.jit(mesa)(**arguments | {"regularization": jnp.zeros(3)})
    assert output.shape == arguments["value"].shape
