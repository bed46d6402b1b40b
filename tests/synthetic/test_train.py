"""`fit` against a training loop written out by hand, and its behaviour when things go wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array

from synthetic.fitting.recipe import Recipe
from synthetic.fitting.step import seed_keys
from synthetic.fitting.train import NonFiniteLossError, fit, minimize, print_progress
from synthetic.fitting.weights_file import RunError, load_model
from synthetic.tasks.task import Batch


class Regression(NamedTuple):
    """y = <coefficients, x>; a pytree, so that its array is an argument of the jitted chunk."""

    coefficients: Any

    def sample(self, key: Array, batch: int) -> Batch:
        x = jax.random.normal(key, (batch, self.coefficients.shape[0]))
        return Batch((x,), x @ self.coefficients)

    def loss(self, prediction: Any, batch: Batch) -> Array:
        return 0.5 * (prediction[:, 0] - batch.target) ** 2


TASK = Regression(jnp.array([1.0, -2.0, 0.5]))
SMALL = Recipe(steps=60, batch=16, learning_rate=0.05, chunk=20, checkpoint_every=20)


def init(key: Array) -> nnx.Linear:
    return nnx.Linear(3, 1, rngs=nnx.Rngs(key))


def weights(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def same_bits(a: nnx.Module, b: nnx.Module) -> bool:
    pairs = zip(weights(a), weights(b), strict=True)
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


def by_hand(recipe: Recipe, tx: optax.GradientTransformation, seed: int = 0) -> tuple[Any, Any]:
    """Losses and iterates of the same fit: one Python step after another, on kernel and bias."""
    initial, data = seed_keys(seed)
    model = init(initial)
    params: Any = {"kernel": model.kernel[...], "bias": jnp.zeros(1)}
    state = tx.init(params)
    losses, iterates = [], []

    def loss(params: Any, x: Array, y: Array) -> Array:
        return 0.5 * jnp.mean(((x @ params["kernel"] + params["bias"])[:, 0] - y) ** 2)

    for step in range(recipe.steps):
        x = jax.random.normal(jax.random.fold_in(data, step), (recipe.batch, 3))
        value, gradient = jax.value_and_grad(loss)(params, x, x @ TASK.coefficients)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
        iterates.append(np.asarray(params["kernel"]))
    return losses, np.stack(iterates)


ORACLES = [
    (SMALL, optax.adam(0.05)),
    (
        Recipe(
            steps=25,
            batch=16,
            learning_rate=0.05,
            chunk=10,
            optimizer="adamw",
            weight_decay=0.1,
            clip=0.3,
            schedule="cosine",
            warmup=5,
        ),
        optax.chain(
            optax.clip_by_global_norm(0.3),
            # optax counts its warm-up from 0, a recipe from 1.
            optax.adamw(
                optax.join_schedules(
                    [
                        optax.linear_schedule(0.01, 0.06, 5),
                        optax.cosine_decay_schedule(0.05, 20),
                    ],
                    [5],
                ),
                weight_decay=0.1,
            ),
        ),
    ),
    (
        Recipe(
            steps=25,
            batch=16,
            learning_rate=0.05,
            chunk=10,
            optimizer="sgd",
            b1=0.8,
            schedule="linear",
        ),
        optax.sgd(optax.linear_schedule(0.05, 0.0, 25), momentum=0.8),
    ),
    (
        Recipe(steps=10, batch=16, learning_rate=0.01, optimizer="lion", b2=0.99),
        optax.lion(0.01, weight_decay=0.0),
    ),
]


@pytest.mark.parametrize(("recipe", "tx"), ORACLES, ids=[r.optimizer for r, _ in ORACLES])
def test_fit_equals_a_loop_by_hand(recipe: Recipe, tx: Any) -> None:
    losses, iterates = by_hand(recipe, tx)
    result = fit(init, TASK, recipe)
    np.testing.assert_allclose(result.model.kernel[...], iterates[-1], rtol=2e-5, atol=1e-6)
    ends = [record["step"] for record in result.history]
    assert ends == [*range(recipe.chunk, recipe.steps, recipe.chunk), recipe.steps]
    for start, record in zip([0, *ends], result.history, strict=False):
        expected = np.mean(losses[start : record["step"]])
        np.testing.assert_allclose(record["loss"], expected, rtol=2e-5)


@pytest.mark.parametrize("field", [{"ema": 0.9}, {"average_tail": 0.5}])
def test_averages_equal_their_definition(field: dict[str, Any]) -> None:
    _, iterates = by_hand(SMALL, optax.adam(0.05))
    result = fit(init, TASK, SMALL, **field, metrics=lambda m: {"first": m.kernel[0, 0]})
    if "ema" in field:
        powers = 0.9 ** np.arange(SMALL.steps)[::-1]
        expected = np.tensordot(powers / powers.sum(), iterates, 1)
    else:
        expected = iterates[SMALL.steps // 2 :].mean(0)
    np.testing.assert_allclose(result.model.kernel[...], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.last.kernel[...], iterates[-1], rtol=1e-5, atol=1e-6)
    assert result.history[-1]["first"] == result.model.kernel[0, 0]


def test_seeds_at_once_equal_seeds_alone() -> None:
    together = fit(init, TASK, SMALL, seeds=[3, 0, 7], metrics=lambda m: {"b": m.bias[0]})
    assert together.seeds == (3, 0, 7)
    for index, seed in enumerate(together.seeds):
        alone = fit(init, TASK, SMALL, seed=seed, metrics=lambda m: {"b": m.bias[0]})
        for a, b in zip(weights(together.models[index]), weights(alone.model), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(together.history, alone.history, strict=True):
            for name in ("loss", "gradient_norm", "b"):
                np.testing.assert_allclose(a[name][index], b[name], rtol=1e-4, atol=1e-6)
    assert not np.allclose(weights(together.models[0])[1], weights(together.models[1])[1])


def test_same_seed_same_bits_whatever_the_chunk_and_the_model_is_left_alone() -> None:
    model = init(seed_keys(0)[0])
    before = weights(model)
    a = fit(model, TASK, SMALL)
    assert all((x == y).all() for x, y in zip(weights(model), before, strict=True))
    assert same_bits(a.model, fit(init, TASK, SMALL).model)
    assert same_bits(a.model, fit(model, TASK, SMALL, chunk=7).model)
    assert not same_bits(a.model, fit(model, TASK, SMALL, seed=1).model)


def test_float64_stays_float64(x64: None) -> None:
    result = fit(
        lambda key: nnx.Linear(3, 1, param_dtype=jnp.float64, rngs=nnx.Rngs(key)),
        Regression(jnp.array([1.0, -2.0, 0.5], jnp.float64)),
        SMALL,
        steps=2000,
        learning_rate=0.02,
        average_tail=0.1,
        schedule="linear",
    )
    assert result.model.kernel.dtype == jnp.float64
    np.testing.assert_allclose(result.model.kernel[:, 0], [1.0, -2.0, 0.5], atol=1e-9)


class Counter(nnx.Module):
    """Dropout and a counter: state that is no parameter."""

    def __init__(self, key: Array) -> None:
        rngs = nnx.Rngs(key)
        self.linear = nnx.Linear(3, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.empty = nnx.Variable(jnp.zeros((0, 2)))

    def __call__(self, x: Array) -> Array:
        self.calls[...] = self.calls[...] + 1
        return self.linear(self.dropout(x))


def test_other_state_is_carried_and_resumed(tmp_path: Path) -> None:
    whole = fit(Counter, TASK, SMALL)
    assert whole.model.calls[...] == SMALL.steps
    fit(Counter, TASK, SMALL, steps=40, out=tmp_path / "run")
    rest = fit(Counter, TASK, SMALL, out=tmp_path / "run", resume=True)
    assert rest.model.calls[...] == SMALL.steps
    assert same_bits(whole.model, rest.model)


def test_metrics_excess_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[dict[str, Any]] = []
    result = fit(
        init,
        TASK,
        SMALL,
        optimum=0.25,
        predict=lambda model, x: 2 * model(x),
        metrics=lambda model: {"bias": model.bias[0], "undefined": jnp.log(-1.0)},
        progress=lambda record: seen.append(dict(record)),
    )
    last = result.history[-1]
    assert last["excess"] == pytest.approx((last["loss"] - 0.25) / 0.25)
    assert last["bias"] == result.model.bias[0]
    assert last["undefined"] is None
    assert seen[-1]["steps"] == 60 and seen[-1]["steps_per_second"] > 0
    doubled = fit(init, TASK, SMALL, predict=lambda model, x: 2 * model(x), steps=2000).model
    np.testing.assert_allclose(2 * doubled.kernel[:, 0], TASK.coefficients, atol=1e-3)
    print_progress(seen[-1])
    line = capsys.readouterr().err
    assert "step 60/60" in line and f"bias {last['bias']:.4g}" in line and "steps/s" in line
    assert "undefined n/a" in line and "excess" not in line
    print_progress({n: v for n, v in seen[-1].items() if n not in ("bias", "undefined")})
    assert f"excess {last['excess']:.4g}" in capsys.readouterr().err
    print_progress({"step": 1, "steps": 2, "steps_per_second": 3.0, "loss": [0.5, 0.25, 1.0]})
    assert "loss 0.25 to 1" in capsys.readouterr().err


class Rising(NamedTuple):
    """Its loss is the share of the fit that is behind, whatever the model says."""

    def sample(self, key: Array, batch: int) -> Batch:
        raise AssertionError("a fit asks for the batch of its own time")

    def sample_during(self, key: Array, batch: int, progress: Array) -> Batch:
        return Batch((jnp.zeros((batch, 3)),), jnp.full(batch, progress))

    def loss(self, prediction: Any, batch: Batch) -> Array:
        return batch.target + 0 * prediction[:, 0]


def test_a_curriculum_is_told_how_far_the_fit_is() -> None:
    recipe = replace(SMALL, steps=5, chunk=1, checkpoint_every=1)
    for seeds in (None, (0, 1)):
        history = fit(init, Rising(), recipe, seeds=seeds).history
        losses = [np.max(record["loss"]) for record in history]
        np.testing.assert_allclose(losses, [0, 0.25, 0.5, 0.75, 1])
    assert fit(init, Rising(), recipe, steps=1).history[0]["loss"] == 0


def test_own_optax_transformation() -> None:
    tx = optax.chain(optax.scale_by_belief(), optax.scale(-0.02))
    _, iterates = by_hand(SMALL, tx)
    result = fit(init, TASK, SMALL, optimizer=tx)
    np.testing.assert_allclose(result.model.kernel[...], iterates[-1], rtol=1e-4, atol=1e-5)
    assert result.recipe.optimizer == "custom"


@pytest.mark.parametrize("seeds", [None, [3, 4]])
def test_divergence_names_the_step_and_keeps_a_good_checkpoint(
    tmp_path: Path, seeds: list[int] | None
) -> None:
    recipe = Recipe(
        steps=48, batch=8, optimizer="sgd", b1=0.0, learning_rate=7.0, chunk=8, checkpoint_every=8
    )
    names = [4] if seeds is None else seeds
    found = []
    for seed in names:
        losses, _ = by_hand(recipe, optax.sgd(7.0), seed)
        found.append((int(np.argmin(np.isfinite(losses))), seed))
    first, culprit = min(found)
    assert first > 16
    which: dict[str, Any] = {"seed": 4} if seeds is None else {"seeds": seeds}
    with pytest.raises(NonFiniteLossError, match=f"at step {first}$") as caught:
        fit(init, TASK, recipe, out=tmp_path / "run", **which)
    assert caught.value.step == first
    assert seeds is None or f"seed {culprit} " in str(caught.value)
    reached = first // 8 * 8
    # What is left is a run that ends at the checkpoint before.
    with pytest.raises(RunError, match=f"reached step {reached}"):
        fit(init, TASK, recipe, steps=8, out=tmp_path / "run", resume=True, **which)
    kept = fit(init, TASK, recipe, steps=reached, out=tmp_path / "run", resume=True, **which)
    assert np.isfinite(weights(kept.model)[1]).all()
    assert kept.history[-1]["step"] == reached


def test_bad_arguments_are_named() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "steps=0"),
        ({"batch": -1}, "batch=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"weight_decay": 0.1}, "weight_decay=0.1"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"ema": 0.5, "average_tail": 0.5}, "average_tail=0.5"),
        ({"optimum": 0.0}, "optimum=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"seeds": []}, r"seeds=\[\]"),
        ({"resume": True}, "out=None"),
        ({"optimizer": "custom"}, "optimizer='custom'"),
        ({"metrics": lambda model: {"loss": 0.0}}, "metrics: 'loss'"),
        ({"metrics": lambda model: {"bias": model.bias[...]}}, r"bias has shape \(1,\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            fit(init, TASK, **arguments)
    with pytest.raises(TypeError, match="with seeds"):
        fit(init(jax.random.key(0)), TASK, seeds=[0, 1])
    with pytest.raises(TypeError, match="stepz"):
        fit(init, TASK, stepz=3)


def test_recipe_through_json() -> None:
    recipe = Recipe(ema=0.99, schedule="cosine", warmup=10, clip=1.0)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    with pytest.raises(ValueError, match="lr: no field"):
        Recipe.from_json({"lr": 1.0})


def test_saved_model_is_the_fitted_one(tmp_path: Path) -> None:
    result = fit(init, TASK, SMALL, ema=0.9, out=tmp_path / "run")
    loaded = load_model(tmp_path / "run" / "model.safetensors", init(jax.random.key(9)))
    assert same_bits(loaded, result.model) and not same_bits(loaded, result.last)


class Product(nnx.Module):
    def __init__(self) -> None:
        self.u = nnx.Param(jnp.array(0.3))
        self.v = nnx.Param(jnp.array([0.1, -0.2]))


def test_minimize_a_quadratic(x64: None) -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    matrix = jnp.asarray(basis @ np.diag(np.logspace(0, 3, 20)) @ basis.T)
    linear = jnp.asarray(rng.normal(size=20))
    model = nnx.Linear(20, 1, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def loss(model: Any) -> Array:
        w = model.kernel[:, 0]
        return 0.5 * w @ matrix @ w - linear @ w + 2.0

    start = weights(model)
    found = minimize(model, loss)
    exact = np.linalg.solve(matrix, linear)
    np.testing.assert_allclose(found.model.kernel[:, 0], exact, atol=1e-12)
    assert found.loss == pytest.approx(2.0 - 0.5 * float(linear @ exact), rel=1e-14)
    assert found.converged and found.gradient_norm <= 1e-12 and found.iterations < 2000
    assert (weights(model)[0] == start[0]).all()
    short = minimize(model, loss, steps=3)
    assert short.iterations == 3 and not short.converged


def test_minimize_a_product(x64: None) -> None:
    target = jnp.array([2.0, -1.0])
    # Nonconvex, with a saddle at 0 and a curve of minima: u v = target / 1.25 up to scale.
    found = minimize(
        Product(),
        lambda m: jnp.sum((m.u * m.v[...] - target) ** 2) + jnp.sum((m.u * m.v[...]) ** 2) / 4,
    )
    np.testing.assert_allclose(found.model.u * found.model.v[...], target / 1.25, atol=1e-12)
    assert found.loss == pytest.approx(5 * (0.2**2 + 0.8**2 / 4), abs=1e-12)


def test_minimize_refuses(x64: None) -> None:
    with pytest.raises(ValueError, match="steps=0"):
        minimize(Product(), lambda m: m.u**2, steps=0)
    with pytest.raises(FloatingPointError, match="not finite"):
        minimize(Product(), lambda m: jnp.log(-m.u))
