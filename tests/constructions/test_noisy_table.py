"""Fits and the table: closed forms, optimality seen from outside, the published data."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.noisy_regression import fitting, table
from constructions.noisy_regression.fitting import expand, fit, held_out_loss, pool_sample
from constructions.noisy_regression.full import FullLayers
from synthetic.tasks.noisy import NoisyRegressionTask, draw_contexts
from synthetic.tasks.regression import Gaussian, RegressionTask
from synthetic.theory.one_layer import optimal_one_layer
from synthetic.theory.ridge import ridge
from synthetic.theory.spectral import Estimate

TASK = NoisyRegressionTask(3, 6, max_noise=2.0)
SIZES = (1024, 1024)


@pytest.fixture(scope="module")
def contexts():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0))
        return draw_contexts(keys[0], 3, 6, 8_000), draw_contexts(keys[1], 3, 6, 40_000)


@pytest.fixture(scope="module")
def fits(contexts):
    one = fit(TASK, 1, pool=contexts[0], sizes=SIZES)
    return one, fit(TASK, 2, shallower=one, pool=contexts[0], sizes=SIZES)


def test_one_layer_is_the_closed_form(fits, contexts, x64):
    plain = RegressionTask(3, 6, inputs=Gaussian(), noise=TASK.mean_square_noise**0.5)
    optimum = optimal_one_layer(plain)
    w_xx, w_xy, w_yx, _ = fits[0].layers[0]
    assert (w_xx, w_xy) == (0, 0)
    loss = held_out_loss(TASK, fits[0].layers, contexts[1])
    square = np.asarray(TASK.noise_of(contexts[1].level)) ** 2
    oracle = 0.5 * (square / (np.asarray(contexts[1].values) + square)).sum(0).mean()
    assert loss.mean == pytest.approx(optimum.loss - oracle, abs=4 * loss.standard_error)
    # w_yy is a label-dependent step that the exact population optimum has no use for
    assert -w_yx == pytest.approx(optimum.matrix[0, 0], rel=0.1)


def test_two_layers_are_better_and_a_step_aside_is_worse(fits, contexts):
    one, two = fits
    below = held_out_loss(TASK, one.layers, contexts[1])
    best = held_out_loss(TASK, two.layers, contexts[1])
    assert best.mean < 0.8 * below.mean
    assert best.mean > 0  # nothing beats the oracle
    for i, j in [(0, 0), (0, 2), (1, 2)]:
        for factor in (0.8, 1.25):
            moved = np.array(two.layers)
            moved[i, j] *= factor
            assert held_out_loss(TASK, moved, contexts[1]).mean > best.mean


def test_held_out_loss_is_that_of_tokens_through_the_layers(fits, x64):
    """On sampled contexts, tokens in plain numpy; the means agree within their errors."""
    layers = fits[1].layers
    task = NoisyRegressionTask(3, 6, max_noise=2.0, queries=8)
    batch = task.sample(jax.random.key(5), 20_000)
    x, y, q = (np.asarray(a) for a in batch.inputs)
    y, yq = y[..., 0], np.zeros(q.shape[:2])
    for w_xx, w_xy, w_yx, w_yy in layers:
        gram, alpha = np.einsum("bni,bnj->bij", x, x), np.einsum("bn,bni->bi", y, x)
        lam = (y**2).sum(1)[:, None]
        x, y, q, yq = (
            x + w_xx * x @ gram + w_xy * y[..., None] * alpha[:, None],
            y + w_yx * np.einsum("bi,bni->bn", alpha, x) + w_yy * lam * y,
            q + w_xx * q @ gram + w_xy * yq[..., None] * alpha[:, None],
            yq + w_yx * np.einsum("bi,bqi->bq", alpha, q) + w_yy * lam * yq,
        )
    oracle = ridge(*batch.inputs, batch.target.noise**2)
    gap = np.asarray(
        task.loss(jnp.asarray(-yq)[..., None], batch) - task.loss(oracle, batch), np.float64
    )
    loss = held_out_loss(TASK, layers, draw_contexts(jax.random.key(6), 3, 6, 40_000))
    error = np.hypot(loss.standard_error, gap.std() / len(gap) ** 0.5)
    assert abs(loss.mean - gap.mean()) < 4 * error
    assert error < 0.03 * loss.mean


def test_restricted_kinds_obey_their_constraint_and_are_no_better(fits, contexts):
    losses = {"diag": fits[1].loss}
    for kind in ("one-head", "descent"):
        fitted = fit(TASK, 2, kind=kind, pool=contexts[0], sizes=SIZES)
        losses[kind] = fitted.loss
        for w_xx, w_xy, w_yx, w_yy in fitted.layers:
            assert w_xx * w_yy == pytest.approx(w_xy * w_yx, abs=1e-15)
            if kind == "descent":
                assert w_xy == w_yy == 0
    # a sample of 1024 knows the best layers to about half a percent of their loss
    assert losses["diag"] < 1.01 * losses["one-head"]
    assert losses["one-head"] < 1.01 * losses["descent"]


def test_expand():
    np.testing.assert_allclose(expand("one-head", np.array([2.0, 3, 5])), [[6, 10, 3, 5]])
    np.testing.assert_allclose(expand("descent", np.array([[2.0, 3]])), [[2, 0, 3, 0]])
    with pytest.raises(ValueError, match="kind is 'dense', must be one of diag, one-head, descent"):
        expand("dense", np.ones(1))


def test_a_pool_sample_is_unbiased_and_takes_the_rare_ones(contexts, x64):
    pool = contexts[0]
    largest = np.asarray(pool.values[-1])
    score = np.asarray(pool.noise_power)
    means = []
    for seed in range(20):
        sample = pool_sample(pool, 400, seed, [score])
        share = np.asarray(sample.share)
        assert share.sum() == pytest.approx(1) and share.shape == (400,)
        means.append([(share * np.asarray(v)).sum() for v in (sample.contexts.values[0] ** 2,)])
        assert np.asarray(sample.contexts.values[-1]).max() == largest.max()
        assert np.asarray(sample.contexts.noise_power).max() == score.max()
    means = np.array(means)[:, 0]
    expected = (np.asarray(pool.values[0]) ** 2).mean()
    assert abs(means.mean() - expected) < 4 * means.std() / 20**0.5
    with pytest.raises(ValueError, match="count must be 1 to the pool's 8000, got 8001"):
        pool_sample(pool, 8001)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(layers=0), "layers must be at least 1"),
        (dict(layers=1, kind="x"), "kind is 'x'"),
        (dict(layers=1, nested=False), "nested is False and starts is empty"),
        (dict(layers=2, starts=[np.zeros((1, 4))]), r"starts must have shape \(2, 4\)"),
    ],
)
def test_fit_refuses(settings, message, fits, contexts):
    settings = {"shallower": fits[0], **settings}
    with pytest.raises(ValueError, match=message):
        fit(TASK, pool=contexts[0], **settings)


def test_published_rows_are_complete():
    assert list(table.COLUMNS) == [*(f"max {s}" for s in range(8)), "{1,3}", "{1,3,5}"]
    assert table.COLUMNS["max 3"].mean_square_noise == pytest.approx(3)
    for row in (*table.PUBLISHED.values(), *table.BASELINES.values()):
        assert len(row) == 10 and np.isfinite(row).all()
    assert {(m, n) for m, n in table.PUBLISHED} == {
        (m, n) for m in ("GD++", "DIAG", "FULL") for n in (1, 2, 3, 4, 7)
    }
    # the richer model was never published as much worse, but where its training fell short
    assert table.published("DIAG", 4, "{1,3}") == 0.043
    assert table.published("DIAG", 5, "{1,3}") is None
    with pytest.raises(ValueError, match="column is 'max 9'"):
        table.published("DIAG", 1, "max 9")


@pytest.mark.slow
def test_a_corner_of_the_table(monkeypatch):
    small = table._Size(pool=2_048, held_out=16_384, samples=(512,), descent=200)
    monkeypatch.setattr(table, "_QUICK_SIZE", small)
    rows = {m.name: m for m in table.measure(quick=True, layers=(1,), columns=["max 3"])}
    assert set(rows) == {
        *(f"{model} max 3" for model in ("ConstRR", "AdaRR", "TunedRR", "closed form ConstRR")),
        *(f"{model} 1 max 3" for model in ("GD++", "DIAG", "FULL")),
        "closed form 1 max 3",
    }
    assert {m.verdict for m in rows.values()} <= {"reproduced", "better"}
    assert rows["DIAG 1 max 3"].published == 1.175
    assert rows["AdaRR max 3"].measured < rows["ConstRR max 3"].measured / 3
    assert not jax.config.jax_enable_x64
    with pytest.raises(ValueError, match="column is 'x'"):
        next(table.measure(columns=["x"]))
    with pytest.raises(ValueError, match="layers must be at least 1"):
        next(table.measure(layers=(0,)))


@pytest.mark.parametrize("gain, chosen", [(0.5, 0.25), (0.001, None)])
def test_full_layers_are_fitted_where_diag_ones_fall_short(gain, chosen, fits, monkeypatch):
    """The fit's loss if it is better by more than two errors, else that of the DIAG layers."""
    calls = []

    def fake(task, layers, *, pool, held_out, seed):
        calls.append(layers)
        return FullLayers(
            P=np.zeros(()),
            Q=np.zeros(()),
            loss=Estimate(0.25, 0.01),
            diag_loss=Estimate(0.25 + gain, 0.01),
            gain=Estimate(gain, 0.01),
        )

    monkeypatch.setattr(table, "fit_full", fake)
    with jax.enable_x64(True):
        contexts = draw_contexts(jax.random.key(3), 10, 20, 512)

    def entry(diag, always, where_short):
        return table._full_entry("max 3", diag, contexts, contexts, 0, always, where_short)

    idle = replace(fits[1], layers=((0.0,) * 4,) * 2)  # far worse than published
    bound = entry(idle, False, False)
    assert not calls and bound.note == table._BOUND and bound.published == 0.188
    fitted = entry(idle, False, True)
    assert calls == [idle.layers] and fitted.measured == (chosen or bound.measured)
    assert ("FULL = DIAG" in fitted.note) == (chosen is None)
    entry(replace(fits[0], layers=((0.0,) * 4,)), True, True)  # one layer has a closed form
    assert len(calls) == 1
    entry(fits[1], True, False)
    assert len(calls) == 2


def test_kinds_have_units_for_every_number():
    for kind, size in fitting.KINDS.items():
        assert fitting._units(TASK, kind).shape == (size,)
