"""FULL layers: the recursion against tokens, the start against DIAG, and what a fit does."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from constructions.noisy_regression import full
from constructions.noisy_regression.fitting import held_out_loss
from constructions.noisy_regression.full import fit_full, full_layers, full_weight, turn
from synthetic.tasks.noisy import NoisyRegressionTask, draw_contexts
from synthetic.theory.ridge import ridge

TASK = NoisyRegressionTask(2, 4, noise_levels=(0.5, 2.0))
DIAG = np.array([[-0.02, 0.01, -0.1, -0.004], [-0.05, 0.02, -0.15, -0.006], [0, 0, -0.2, -0.01]])


def tokens_through(P, Q, x, y, queries):
    """Predictions for queries, tokens moved one layer after the other."""
    context = np.concatenate([x, y], -1)
    query = np.concatenate([queries, np.zeros((*queries.shape[:2], 1))], -1)
    for p, q in zip(P, Q, strict=True):
        gram = np.einsum("bni,bnj->bij", context, context)
        update = sum(p[k] @ gram @ q[k] for k in range(len(p)))
        context, query = (e + np.einsum("bij,bnj->bni", update, e) for e in (context, query))
    return -query[..., -1]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_weights_are_those_of_tokens_through_the_layers(depth, x64):
    random = np.random.default_rng(depth)
    P, Q = 0.3 * random.normal(size=(2, depth, 2, 4, 4))
    x, y = random.normal(size=(5, 6, 3)), random.normal(size=(5, 6, 1))
    tokens = np.concatenate([x, y], -1)
    gram = jnp.asarray(np.einsum("bni,bnj->ijb", tokens, tokens))
    predicted = tokens_through(P, Q, x, y, np.broadcast_to(np.eye(3), (5, 3, 3)))
    weight = full_weight(jnp.asarray(P), jnp.asarray(Q), gram)
    np.testing.assert_allclose(weight.T, predicted, rtol=1e-9, atol=1e-9 * abs(predicted).max())


def test_gradients_are_those_of_finite_differences(x64):
    random = np.random.default_rng(0)
    P, Q = (jnp.asarray(a) for a in 0.3 * random.normal(size=(2, 3, 2, 3, 3)))
    tokens = random.normal(size=(5, 3, 4))
    gram = jnp.asarray(np.einsum("nib,njb->ijb", tokens, tokens))

    def loss(P, Q):
        return jnp.sum(full_weight(P, Q, gram) ** 2)

    check_grads(jax.jit(loss), (P, Q), 1, ["rev"], atol=1e-5, rtol=1e-4)


def test_diag_layers_are_full_ones(x64):
    """In any basis the same loss, context by context; turned contexts keep their invariants."""
    contexts = draw_contexts(jax.random.key(0), 2, 4, 2000)
    moments = TASK.moments(contexts)
    turned = turn(jax.random.key(1), moments)
    gram = np.asarray(turned.gram)
    values = np.linalg.eigvalsh(np.moveaxis(gram[:2, :2], -1, 0)).T
    np.testing.assert_allclose(values, moments.values, atol=1e-9)
    np.testing.assert_allclose(gram[2, 2], moments.power)
    # ridge regression with sigma, solved in the turned basis
    sigma = np.moveaxis(gram[:2, :2], -1, 0) + np.asarray(moments.noise**2)[:, None, None] * np.eye(
        2
    )
    ridge = np.linalg.solve(sigma, gram[:2, 2].T[..., None])[..., 0]
    np.testing.assert_allclose(turned.oracle.T, ridge, rtol=1e-8, atol=1e-8)
    # uniform over directions: the first axis has half of the trace, and the axes are uncorrelated
    share = gram[0, 0] / (gram[0, 0] + gram[1, 1])
    tilt = gram[0, 1] / (gram[0, 0] + gram[1, 1])
    for mean, values in ((0.5, share), (0.0, tilt)):
        assert abs(values.mean() - mean) < 4 * values.std() / len(values) ** 0.5
    assert abs(share.var() - tilt.var()) < 0.15 * tilt.var()

    P, Q = full_layers(DIAG, 2)
    error = full_weight(jnp.asarray(P), jnp.asarray(Q), turned.gram) - turned.oracle
    loss = 0.5 * np.sum(np.asarray(error) ** 2, 0)
    expected = held_out_loss(TASK, DIAG, contexts)
    # the same in expectation: the weights' mean given a context is the oracle's
    gap = abs(loss.mean() - expected.mean)
    assert gap < 4 * expected.standard_error
    units = full._Units(TASK)
    inside = units.inside(P, Q)
    np.testing.assert_allclose(full._losses(inside, units.turned(turned)) / units.label**2, loss)
    there, back = (
        np.einsum("lkab,lkcd->labcd", *pair) for pair in ((P, Q), units.outside(*inside))
    )
    np.testing.assert_allclose(back, there, atol=1e-12)


def test_a_fit_is_better_than_its_start_and_says_by_how_much():
    with jax.enable_x64(True):
        contexts = draw_contexts(jax.random.key(0), 2, 4, 8192)
        held_out = draw_contexts(jax.random.key(1), 2, 4, 4096)
    start = 0.7 * DIAG[1:]  # not the best DIAG layers
    sizes = dict(pool=contexts, held_out=held_out, steps=300, sample=4096)
    fitted = fit_full(TASK, start, **sizes)
    assert fitted.better and "better" in fitted.finding
    assert fitted.loss.mean < 0.9 * fitted.diag_loss.mean
    assert fitted.gain.mean == pytest.approx(fitted.diag_loss.mean - fitted.loss.mean)
    assert fitted.P.shape == fitted.Q.shape == (2, 2, 3, 3)
    # the loss again, from tokens of contexts never seen
    with jax.enable_x64(True):
        batch = replace(TASK, queries=8).sample(jax.random.key(3), 4096)
        oracle = np.asarray(ridge(*batch.inputs, batch.target.noise**2))[..., 0]
    predicted = tokens_through(fitted.P, fitted.Q, *(np.asarray(a) for a in batch.inputs))
    losses = 0.5 * ((predicted - oracle) ** 2).mean(-1)
    error = np.hypot(losses.std() / 64, fitted.loss.standard_error)
    assert abs(losses.mean() - fitted.loss.mean) < 4 * error
    assert not jax.config.jax_enable_x64


def test_a_fit_that_gains_nothing_says_so():
    with jax.enable_x64(True):
        contexts = draw_contexts(jax.random.key(0), 2, 4, 2048)
    sizes = dict(pool=contexts, held_out=contexts, steps=3, sample=1024, learning_rate=1e-12)
    fitted = fit_full(TASK, DIAG[1:], push=1e-12, **sizes)
    assert not fitted.better and fitted.finding.startswith("FULL = DIAG")


@pytest.mark.parametrize(
    "start, settings, message",
    [
        (DIAG[0], {}, r"diag must have shape \[layer, 4\], got \(4,\)"),
        (DIAG, {"steps": 0}, "steps must be positive, got 0"),
        (DIAG, {"push": -1.0}, "push must be positive, got -1.0"),
    ],
)
def test_fit_full_refuses(start, settings, message):
    with pytest.raises(ValueError, match=message):
        fit_full(TASK, start, **settings)
