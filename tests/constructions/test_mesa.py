"""The mesa constructions from raw states, against numpy: one sequence and time after another."""

import jax
import jax.numpy as jnp
import numpy as np
import plain_numpy
import pytest
from numpy.polynomial import Polynomial

from constructions.core.evaluate import evaluate
from constructions.core.program import CAUSAL, Head
from constructions.core.slots import Slots
from constructions.family import verify
from constructions.mesa.polynomial import MesaPolynomial, best_coefficients, chebyshev, neumann
from constructions.mesa.ridge import MesaRidge
from constructions.mesa.tokens import positional_code, sharpness, turned_back
from synthetic.tasks.dynamics import LinearDynamics

TOKENS = pytest.mark.parametrize("tokens", ["raw", "constructed"])


def states(batch=3, time=7, dim=3, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, time, dim))


def ridge(sequence, rho):
    """Predictions at every time by least squares on rows sqrt(rho) I under the pairs so far."""
    time, dim = sequence.shape
    before = np.concatenate([np.zeros((1, dim)), sequence[:-1]])
    found = []
    for t in range(1, time + 1):
        rows = np.concatenate([before[:t], np.sqrt(rho) * np.eye(dim)])
        values = np.concatenate([sequence[:t], np.zeros((dim, dim))])
        found.append(sequence[t - 1] @ np.linalg.lstsq(rows, values, rcond=None)[0])
    return np.stack(found)


def polynomial(sequence, coefficients):
    """G_t p(H_t) s_t with matrix powers."""
    time, dim = sequence.shape
    before = np.concatenate([np.zeros((1, dim)), sequence[:-1]])
    found = []
    for t in range(1, time + 1):
        gram, moment = before[:t].T @ before[:t], sequence[:t].T @ before[:t]
        p = sum(c * np.linalg.matrix_power(gram, k) for k, c in enumerate(coefficients))
        found.append(moment @ p @ sequence[t - 1])
    return np.stack(found)


@TOKENS
@pytest.mark.parametrize("rho", [1.0, 1e-3])
def test_ridge_from_raw_states(x64, tokens, rho):
    c = MesaRidge(3, 9, tokens=tokens, regularization=rho)
    model, given = c.compile().model, states()
    found = np.asarray(c.predict(model, given))
    expected = np.stack([ridge(sequence, rho) for sequence in given])
    np.testing.assert_allclose(found, expected, atol=1e-11 * np.sqrt(np.mean(expected**2)))
    one = c.predict(model, given[:, :1])
    np.testing.assert_allclose(one, np.zeros((3, 1, 3)), atol=1e-15)  # nothing to learn from yet


def test_float32_from_raw_states():
    c = MesaRidge(10, 50, regularization=1.0)
    given = np.asarray(c.sample(jax.random.key(0), 8)[0])
    expected = np.stack([ridge(sequence, 1.0) for sequence in given.astype(float)])
    found = np.asarray(c.predict(c.compile().model, given), float)
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


@TOKENS
@pytest.mark.parametrize("coefficients", [(0.3,), (0.3, -0.02, 0.004, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("step", [None, 0.1, -0.5])
def test_any_polynomial_from_raw_states(x64, tokens, coefficients, step):
    c = MesaPolynomial(3, 9, tokens=tokens, coefficients=coefficients, step=step)
    given = states()
    found = np.asarray(c.predict(c.compile().model, given))
    expected = np.stack([polynomial(sequence, coefficients) for sequence in given])
    np.testing.assert_allclose(found, expected, atol=1e-13 * np.abs(expected).max())


def test_powers_that_cancel_are_rounded_little(x64):
    # Chebyshev's coefficients are large and alternate: in powers of h float64 loses four digits
    given = np.asarray(LinearDynamics(4, 30).sample(jax.random.key(0), 4).inputs[0], np.longdouble)
    before = np.concatenate([np.zeros_like(given[:, :1]), given[:, :-1]], 1)
    gram = np.cumsum(before[..., :, None] * before[..., None, :], 1)
    moment = np.cumsum(given[..., :, None] * before[..., None, :], 1)
    highest = float(np.linalg.eigvalsh(gram[:, -1].astype(float)).max())
    coefficients = chebyshev(5, 0.5, highest)
    expected = np.zeros_like(given)
    for c in reversed(coefficients):
        expected = np.einsum("btij,btj->bti", gram, expected) + np.longdouble(c) * given
    expected = np.einsum("btij,btj->bti", moment, expected).astype(float)
    c = MesaPolynomial(4, 30, coefficients=coefficients, step=2 / highest)
    found = c.predict(c.compile().model, given.astype(float))
    np.testing.assert_allclose(found, expected, atol=1e-13 * np.sqrt(np.mean(expected**2)))


@TOKENS
@pytest.mark.parametrize(
    "make",
    [
        lambda tokens: MesaRidge(2, 5, tokens=tokens, regularization=0.1),
        lambda tokens: MesaPolynomial(2, 5, tokens=tokens, coefficients=neumann(2, 0.2)),
    ],
    ids=["ridge", "polynomial"],
)
def test_back_ends_and_certificate(tokens, make):
    c = make(tokens)
    certificate = verify(c, batch=32)
    assert certificate.passed, certificate
    with jax.enable_x64(True):
        given = jnp.asarray(states(2, 5, 2))
        stream, groups, read = c.stream(c.compile().model, given)
        slots = {s.name: stream[..., s.columns] for s in c.program.slots if s.born == 0}
        found = evaluate(c.program, slots, np.asarray(groups))
        both = np.broadcast_to(groups, stream.shape[:2])
        loops = plain_numpy.interpret(c.program, slots, both)
        expected = c.predict(c.compile().model, given)
        for other in (found, loops):
            np.testing.assert_allclose(other["prediction"][:, read], expected, atol=1e-12)


def test_certificate_at_a_tiny_regularization():
    certificate = verify(MesaRidge(4, 16, tokens="constructed", regularization=1e-9), batch=64)
    assert certificate.passed
    assert max(error.max_rel_error for error in certificate.errors) < 1e-6
    assert max(error.tolerance for error in certificate.errors) <= 1e-2


@pytest.mark.parametrize("make", [MesaRidge, MesaPolynomial])
def test_later_states_change_nothing_and_rotations_carry_over(x64, make):
    c = make(3, 9)
    model, given = c.compile().model, states(seed=4)
    before = np.asarray(c.predict(model, given))
    later = given.copy()
    later[:, 4:] += 1.0
    after = np.asarray(c.predict(model, later))
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert np.abs(after[:, 4:] - before[:, 4:]).max() > 0.1
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    np.testing.assert_allclose(c.predict(model, given @ turn), before @ turn, atol=1e-10)


@pytest.mark.parametrize("coefficients", [(0.3,), (0.3, -0.02)])
def test_the_gauge_spans_what_enters_and_is_read(coefficients):
    c = MesaPolynomial(3, 9, tokens="constructed", coefficients=coefficients)
    gauge, given = c.gauge(), jnp.asarray(states())
    stream, _, read = c.stream(c.compile().model, given)
    tokens = np.asarray(stream).reshape(-1, stream.shape[-1])
    free = np.linalg.lstsq(gauge.query, tokens.T, rcond=None)[0]
    np.testing.assert_allclose(gauge.query @ free, tokens.T, atol=1e-6)
    assert np.linalg.matrix_rank(tokens) == gauge.query.shape[1] == 6
    model = c.compile().model
    np.testing.assert_allclose(
        model(stream, c.stream(model, given).groups)[:, read] @ gauge.read.T,
        c.predict(model, given),
        atol=1e-6,
    )


@pytest.mark.parametrize("tokens", [2, 51, 400])
def test_the_copy_head_finds_the_token_before(tokens):
    code = positional_code(tokens)
    np.testing.assert_allclose(code[1:] @ turned_back().T, code[:-1], atol=1e-12)
    scores = sharpness(tokens) * code @ turned_back().T @ code.T
    for t in range(1, tokens):
        others = np.delete(scores[t, : t + 1], t - 1)
        assert scores[t, t - 1] - others.max() > 45 - 1e-6


def test_without_bos_the_first_state_is_its_own_predecessor():
    c = MesaRidge(4, 20)
    wrong = c.near_misses()["no BOS"].model
    batch = c.task.sample(jax.random.key(0), 256)
    right, off = (
        np.asarray(c.task.loss_by_position(c.predict(m, batch.inputs[0]), batch).mean(0))
        for m in (c.compile().model, wrong)
    )
    assert off[8] > 20 * right[8]
    assert right[-1] < 3 * c.task.noise_floor


def test_chebyshev_has_the_least_largest_residual():
    low, high, degree = 0.5, 20.0, 5
    p = Polynomial(chebyshev(degree, low, high))
    assert p.degree() == degree
    h = np.linspace(low, high, 20001)
    residual = 1 - h * p(h)
    largest = np.abs(residual).max()
    # it alternates degree + 2 times between +-largest, so that no other polynomial is below
    extremes = residual[np.abs(residual) > largest * (1 - 1e-4)]
    assert (np.diff(np.sign(extremes)) != 0).sum() == degree + 1
    assert chebyshev(0, 1.0, 3.0) == pytest.approx((0.5,))


def test_neumann_is_gradient_descent(x64):
    h, x, step = 0.7, 0.0, 0.3
    for _ in range(5):
        x = x + step * (1 - h * x)
    assert Polynomial(neumann(4, step))(h) == pytest.approx(x, rel=1e-14)
    assert MesaPolynomial(3, 9, coefficients=neumann(4, step)).contraction == pytest.approx(step)


def test_best_coefficients_solve_least_squares(x64):
    task, key = LinearDynamics(2, 8, 0.1), jax.random.key(0)
    found = best_coefficients(task, 2, key, 200)
    batch = task.sample(key, 200)
    each = [
        np.stack([polynomial(s, np.eye(3)[k]) for s in np.asarray(batch.inputs[0])]).ravel()
        for k in range(3)
    ]
    expected = np.linalg.lstsq(np.stack(each, 1), np.asarray(batch.target).ravel(), rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MesaRidge(0), "dim is 0, must be an integer of at least 1"),
        (lambda: MesaRidge(3, 0), "length is 0, must be an integer of at least 1"),
        (lambda: MesaRidge(3, tokens="bound"), "tokens is 'bound', must be one of"),
        (lambda: MesaRidge(3, noise=-1.0), "noise is -1.0, must be a finite number of at least 0"),
        (lambda: MesaRidge(3, regularization=0.0), "regularization is 0.0, must be above 0"),
        (lambda: MesaRidge(3, regularization=np.inf), "regularization is inf, must be a finite"),
        (lambda: MesaPolynomial(3, coefficients=()), "coefficients is empty"),
        (lambda: MesaPolynomial(3, coefficients=(0.1, np.inf)), r"coefficients\[1\] is inf"),
        (lambda: MesaPolynomial(3, step=0.0), "step is 0, must not be"),
        (lambda: chebyshev(2, 3.0, 1.0), r"bounds \[3.0, 1.0\]"),
        (lambda: MesaPolynomial(coefficients=(0.3, 0.1), step=1e-320), "step is 1e-320"),
        (lambda: neumann(-1, 0.1), "degree is -1"),
        (lambda: neumann(2, 0.0), "step 0.0"),
        (lambda: best_coefficients(LinearDynamics(2, 3), -1, jax.random.key(0)), "degree is -1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3)), r"states has shape \(2, 3\)"),
        (np.zeros((2, 3, 4)), r"states has shape \(2, 3, 4\), must be \[batch, time, 3\]"),
        (np.zeros((2, 3, 3), complex), "states has dtype complex128, must be real"),
        (np.zeros((2, 0, 3)), "with time from 1 to 9"),
        (np.zeros((2, 10, 3)), "with time from 1 to 9, the construction's length"),
        (np.full((2, 3, 3), 10**30, object), "states has dtype object, must be real"),
        (np.full((2, 3, 3), 2**62), r"states has 4.61e\+18, every entry must be from"),
        (np.full((2, 3, 3), -np.inf), "states holds NaN or infinite values"),
        (np.full((2, 3, 3), np.nan), "states holds NaN or infinite values"),
    ],
)
def test_bad_states_are_named(given, message):
    c = MesaRidge(3, 9)
    with pytest.raises(ValueError, match=message):
        c.predict(c.compile().model, given)


@pytest.mark.parametrize(
    "other", [MesaRidge(4, 9), MesaRidge(2, 9), MesaRidge(3, 9, tokens="constructed")]
)
def test_models_of_other_widths_are_named(other):
    c, model = MesaRidge(3, 9), other.compile().model
    message = f"model has width {model.config.width}, must be 49, that of the construction's slots"
    with pytest.raises(ValueError, match=message):
        c.predict(model, np.zeros((2, 3, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "linear", "regularization": 1.0}, "regularization is 1.0, but its mixer is no"),
        ({"mixer": "mesa"}, "regularization is None, must be finite and above 0"),
        ({"mixer": "mesa", "regularization": -1.0}, "regularization is -1.0, must be"),
        (
            {"mixer": "mesa", "regularization": 1.0, "window": (0, 0)},
            "a mesa head has window",
        ),
        ({"mixer": "mesa", "regularization": 1.0, "sinks": ("a",)}, "and no sinks"),
    ],
)
def test_bad_heads_are_named(changes, message):
    x = Slots().add("x", 2)
    with pytest.raises(ValueError, match=message):
        Head(x, x, x, {x: 1.0}, **({"window": CAUSAL} | changes))
