"""The square-root rule: its numbers, and the path of training that it keeps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from synthetic.fitting.recipe import Recipe, square_root_scaled

ADAMW = Recipe(
    steps=1000, batch=32, optimizer="adamw", learning_rate=1e-2, warmup=100, weight_decay=0.1,
    b1=0.9, b2=0.99, eps=1e-4, ema=0.95, chunk=100, checkpoint_every=500,
)  # fmt: skip


def test_every_number() -> None:
    found = square_root_scaled(ADAMW, 4)
    assert (found.batch, found.steps, found.warmup) == (128, 250, 25)
    assert (found.chunk, found.checkpoint_every) == (25, 125)
    wanted = {"learning_rate": 2e-2, "b1": 0.6, "b2": 0.96, "eps": 5e-5, "weight_decay": 0.2}
    for name, value in (wanted | {"ema": 0.8}).items():
        assert getattr(found, name) == pytest.approx(value), name
    # what decay does to the weights over the whole fit
    total = [r.learning_rate * r.weight_decay * r.steps for r in (ADAMW, found)]
    assert total[0] == pytest.approx(total[1])


def test_back_and_forth_is_nothing() -> None:
    back = square_root_scaled(square_root_scaled(ADAMW, 4), 1 / 4)
    for name, value in ADAMW.to_json().items():
        found = getattr(back, name)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    ("recipe", "kappa", "message"),
    [
        (ADAMW, 10, "kappa is 10, must be below 10 with b1=0.9"),
        (replace(ADAMW, b1=0.0), 1, "kappa is 1, must be below 1 with b1=0.0"),
        (replace(ADAMW, b1=0.99, ema=0.5), 2, "kappa is 2, must be below 2 with ema=0.5"),
        (ADAMW, 0, "kappa is 0, must be finite and above 0"),
        (ADAMW, float("nan"), "kappa is nan, must be finite and above 0"),
        (ADAMW, 1.01, "kappa is 1.01: 32.32 examples in a batch, must be a whole number"),
        (Recipe(optimizer="sgd"), 4, "optimizer is 'sgd', must be 'adam' or 'adamw'"),
    ],
)
def test_what_is_not_allowed_is_named(recipe: Recipe, kappa: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        square_root_scaled(recipe, kappa)


HESSIAN = jnp.linspace(0.2, 1.0, 8)


def curve(recipe: Recipe, noise: float, seed: int) -> np.ndarray:
    """Mean loss along fits of a quadratic with noise / sqrt(batch) on its gradient, `[20]`."""
    rule = recipe.transformation()

    def one(key: Array) -> Array:
        def step(carry: tuple, key: Array) -> tuple:
            theta, state = carry
            spread = noise / jnp.sqrt(recipe.batch) * jax.random.normal(key, (8,))
            change, state = rule.update(HESSIAN * theta + spread, state, theta)
            theta = optax.apply_updates(theta, change)
            return (theta, state), 0.5 * (HESSIAN * theta**2).sum()

        begin = (jnp.ones(8), rule.init(jnp.ones(8)))
        _, losses = jax.lax.scan(step, begin, jax.random.split(key, recipe.steps))
        return losses.reshape(20, -1)[:, -1]

    keys = jax.random.split(jax.random.key(seed), 300)
    return np.asarray(jax.jit(jax.vmap(one))(keys).mean(0))


def deviations(snr: float, eps: float) -> dict[str, float]:
    """Of the mean loss from that of the smaller batch, by rule; eps in units of the noise."""
    noise = float(jnp.sqrt((HESSIAN**2).mean() / snr))
    base = Recipe(steps=1200, batch=1, learning_rate=1e-2, eps=eps * noise, b2=0.99)
    scaled = square_root_scaled(base, 4)
    with_batch = replace(base, batch=4, steps=300)
    rules = {
        "square root": scaled,
        "rate only": replace(with_batch, learning_rate=2 * base.learning_rate),
        "linear": replace(with_batch, learning_rate=4 * base.learning_rate),
        "unchanged": with_batch,
    }
    path = curve(base, noise, 0)
    return {n: float(np.abs(curve(r, noise, 1) / path - 1).mean()) for n, r in rules.items()}


def test_it_keeps_the_path_where_gradients_are_noise() -> None:
    found = deviations(snr=0.006, eps=1.0)
    assert found["square root"] < 0.02
    for other in ("rate only", "linear", "unchanged"):
        assert found[other] > 0.1, found


@pytest.mark.slow
def test_where_it_misleads() -> None:
    # gradients that are not mostly noise: it is the best rule still, and no longer right
    found = deviations(snr=0.36, eps=1.0)
    assert min(found, key=lambda name: found[name]) == "square root" and found["square root"] > 0.05
    # and with a tiny eps the rate alone does as well, so that such a test would say nothing
    assert deviations(snr=0.006, eps=1e-6)["rate only"] < 0.04
