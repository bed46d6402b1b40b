"""Hedge over step sizes: weights, regrets, and the controls."""

import jax
import numpy as np
import pytest

from constructions.gradient_descent.hedge import Hedge
from synthetic.theory.experts import (
    dyadic,
    hedge,
    hedge_bound,
    regret,
    sleeping,
    sleeping_bound,
)


def test_attention_weights_are_hedges_and_keep_its_bound(x64):
    """On every context, by a loop over examples in numpy; losses are clipped in some of them."""
    c = Hedge(dim_x=2, num_examples=4, validation=6, step_sizes=(3.0, 10.0, 60.0))
    inputs = c.sample(jax.random.key(0), 500)
    held = jax.jit(c.read)(c.reference, *inputs)
    x, y, x_query = (np.asarray(a) for a in inputs)
    step = np.einsum("bno,bni->bi", y[:, :4], x[:, :4]) / 4
    worst = 0.0
    for b in range(500):
        losses = np.zeros((6, 3))
        for t in range(6):
            total = losses[:t].sum(0)
            weight = np.exp(-c.rate * total) / np.exp(-c.rate * total).sum()
            np.testing.assert_allclose(held["weight"][b, t], weight, rtol=0, atol=1e-12)
            for j, eta in enumerate(c.step_sizes):
                error = (eta * step[b] @ x[b, 4 + t] - y[b, 4 + t, 0]) ** 2
                losses[t, j] = min(1.0, error)
        weight = np.exp(-c.rate * losses.sum(0))
        mixed = weight / weight.sum() @ np.asarray(c.step_sizes) * (step[b] @ x_query[b, 0])
        np.testing.assert_allclose(held["prediction"][b, 0, 0], mixed, rtol=1e-10, atol=1e-12)
        found = (np.asarray(held["weight"][b, :6]) * losses).sum() - losses.sum(0).min()
        worst = max(worst, found)
    assert 0.3 * hedge_bound(6, 3) < worst <= hedge_bound(6, 3)


@pytest.mark.parametrize("length", [1, 7, 32])
def test_bounds_hold_on_adversarial_losses(length):
    """Losses of 0 and 1, random, alternating, and such that the best expert changes."""
    rng = np.random.default_rng(length)
    drawn = (rng.uniform(size=(200, length, 3)) < rng.uniform(size=(200, 1, 3))).astype(float)
    change = np.zeros((1, length, 3))
    change[:, length // 2 :, 0], change[:, : length // 2, 1:] = 1, 1
    drawn = np.concatenate([drawn, change, np.indices((length, 3)).sum(0)[None] % 2])
    plain = hedge(drawn, np.sqrt(8 * np.log(3) / length))
    assert (regret(plain, drawn) <= hedge_bound(length, 3)).all()
    awake = sleeping(drawn)
    np.testing.assert_allclose(awake.sum(-1), 1)
    for start, end in dyadic(length):
        assert (regret(awake, drawn, start, end) <= sleeping_bound(start, end, 3)).all()
    if length == 32:  # which Hedge does not keep to
        assert (
            regret(plain[200:201], change, 16, 32)[0]
            > 1.8 * regret(sleeping(change), change, 16, 32)[0]
        )


def test_refused():
    with pytest.raises(ValueError, match="step_sizes is .* must be 2 numbers"):
        Hedge(step_sizes=(1.0,))
    with pytest.raises(ValueError, match="scales"):
        Hedge(scales=(1.0, -1.0))


def test_the_rate_has_the_least_bound():
    """Of log n / rate + rate T / 8, Hedge's bound for any rate; that least one is `hedge_bound`."""
    c = Hedge(dim_x=2, num_examples=4, validation=6, step_sizes=(1.0, 2.0, 3.0))

    def bound(rate):
        return np.log(3) / rate + rate * 6 / 8

    assert bound(c.rate) == pytest.approx(hedge_bound(6, 3))
    assert bound(c.rate) < min(bound(0.9 * c.rate), bound(1.1 * c.rate))
