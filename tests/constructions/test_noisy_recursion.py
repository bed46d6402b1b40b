"""The (M, u, w, a) recursion against tokens passed through the layers in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.noisy_regression.recursion import (
    Gram,
    State,
    context_gram,
    diag_states,
    diag_weight,
    full_states,
    layer_gram,
    momentum_step,
)
from synthetic.tasks.noisy import Moments
from synthetic.theory.ridge import context_moments

D, N, BATCH = 3, 6, 4
RANDOM = np.random.default_rng(0)
# of the size at which every term matters and nothing explodes in six layers
LAYERS = RANDOM.normal(size=(6, 4)) * np.array([0.02, 0.02, 0.03, 0.01])


@pytest.fixture
def context(x64):
    random = np.random.default_rng(1)
    x, w = random.normal(size=(BATCH, N, D)), random.normal(size=(BATCH, D))
    y = np.einsum("bnd,bd->bn", x, w)[..., None] + 0.5 * random.normal(size=(BATCH, N, 1))
    return jnp.asarray(x), jnp.asarray(y)


def _heads(layer):
    """A DIAG layer as two heads: one reads with x, the other with y."""
    w_xx, w_xy, w_yx, w_yy = layer
    P = [np.diag([w_xx] * D + [w_yx]), np.diag([w_xy] * D + [w_yy])]
    Q = [np.diag([1.0] * D + [0.0]), np.diag([0.0] * D + [1.0])]
    return np.array(P), np.array(Q)


def _tokens(x, y, queries, layers):
    """`e_j <- e_j + sum_k P_k sum_i e_i (e_i . Q_k e_j)` token by token; context, then queries."""
    out = []
    for b in range(BATCH):
        e = np.concatenate([np.concatenate([x[b], y[b]], 1), np.pad(queries, ((0, 0), (0, 1)))])
        steps = [e]
        for P, Q in layers:
            update = np.zeros_like(e)
            for j in range(len(e)):
                for p, q in zip(P, Q, strict=True):
                    for i in range(N):
                        update[j] += p @ e[i] * (e[i] @ q @ e[j])
            e = e + update
            steps.append(e)
        out.append(steps)
    return np.swapaxes(np.array(out), 0, 1)  # [layer, batch, token, d + 1]


def _check(states, x, y, queries, expected):
    """Every token of every layer, as the state says."""
    M, u, w, a = map(np.asarray, states)
    x_all = np.concatenate([np.asarray(x), np.broadcast_to(queries, (BATCH, *queries.shape))], 1)
    y_all = np.concatenate([np.asarray(y)[..., 0], np.zeros((BATCH, len(queries)))], 1)
    x_now = np.einsum("lbij,bnj->lbni", M, x_all) + np.einsum("bn,lbi->lbni", y_all, u)
    y_now = a[..., None] * y_all - np.einsum("lbi,bni->lbn", w, x_all)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(x_now, expected[..., :D], rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(y_now, expected[..., D], rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_diag_states_are_what_the_tokens_become(context, depth):
    x, y = context
    queries = np.random.default_rng(2).normal(size=(2, D))
    states = diag_states(list(LAYERS[:depth]), context_gram(x, y))
    layers = [_heads(layer) for layer in LAYERS[:depth]]
    expected = _tokens(np.asarray(x), np.asarray(y), queries, layers)
    assert np.abs(expected[-1] - expected[0]).max() > 0.05
    _check(states, x, y, queries, expected)
    prediction = -expected[-1, :, N:, D]
    np.testing.assert_allclose(
        np.einsum("bd,qd->bq", states.w[-1], queries), prediction, rtol=0, atol=1e-12
    )


def test_full_states_are_what_the_tokens_become(context):
    x, y = context
    random = np.random.default_rng(3)
    queries = random.normal(size=(2, D))
    layers = [tuple(0.1 * random.normal(size=(2, 3, D + 1, D + 1))) for _ in range(3)]
    states = full_states(layers, context_gram(x, y))
    expected = _tokens(np.asarray(x), np.asarray(y), queries, layers)
    _check(states, x, y, queries, expected)


def test_diag_is_full_with_diagonal_heads(context):
    gram = context_gram(*context)
    one = diag_states(list(LAYERS[:4]), gram)
    other = full_states([_heads(layer) for layer in LAYERS[:4]], gram)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_the_momentum_reading_is_the_same_layer(context):
    x, y = context
    gram = context_gram(x, y)
    states = diag_states(list(LAYERS), gram)
    for i, layer in enumerate(LAYERS):
        before, after = (State(*(part[j] for part in states)) for j in (i, i + 1))
        reading, now = momentum_step(before, gram, layer), layer_gram(before, gram)
        np.testing.assert_allclose(reading.next_u, after.u, rtol=0, atol=1e-12)
        np.testing.assert_allclose(reading.next_w, after.w, rtol=0, atol=1e-12)
        np.testing.assert_allclose(reading.alpha, now.alpha, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(reading.lam, now.lam, rtol=1e-11, atol=1e-12)

        def squares(w, a=before.a):
            residual = jnp.einsum("bnd,bd->bn", x, w) - a[:, None] * y[..., 0]
            return 0.5 * jnp.sum(residual**2)

        np.testing.assert_allclose(
            reading.gradient, -jax.grad(squares)(before.w), rtol=1e-9, atol=1e-12
        )
    rss = [np.linalg.lstsq(a, b, rcond=None)[1][0] for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(reading.rho, rss, rtol=1e-10)


@pytest.mark.parametrize("depth", range(1, 7))
def test_the_fast_weights_are_those_of_the_recursion(context, depth):
    x, y = context
    moments, vectors = context_moments(x, y)
    known = Moments(*(jnp.zeros_like(p) if jnp.isnan(p).any() else p for p in moments))
    fast = diag_weight(jnp.asarray(LAYERS[:depth]), known)
    states = diag_states(list(LAYERS[:depth]), context_gram(x, y))
    turned = jnp.einsum("bij,jb->bi", vectors, fast)
    np.testing.assert_allclose(turned, states.w[-1], rtol=0, atol=1e-12)


def test_one_context_needs_no_batch_axis(context):
    x, y = context
    whole, first = context_gram(x, y), context_gram(x[0], y[0])
    assert isinstance(first, Gram) and first.lam.shape == ()
    ours = diag_states(list(LAYERS[:2]), first)
    for a, b in zip(ours, diag_states(list(LAYERS[:2]), whole), strict=True):
        np.testing.assert_allclose(a, b[:, 0], rtol=0, atol=1e-13)
