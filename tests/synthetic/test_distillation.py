"""Targets from a teacher: when, with what loss, and what it does to the gradient's noise."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from synthetic.fitting.distillation import Distilled, Taught, agents, teacher_loss
from synthetic.fitting.train import Recipe, fit
from synthetic.grammar import chart
from synthetic.grammar.examples import named
from synthetic.tasks.masked_language import MaskedLanguageTask
from synthetic.tasks.noisy import NoisyRegressionTask
from synthetic.tasks.regression import RegressionTask
from synthetic.tasks.task import Batch, Curriculum, outcome

REGRESSION = RegressionTask(3, 5, queries=2)
WORDS = MaskedLanguageTask(named("toy"), max_length=6, rate=0.3, final=0.5)


def mean_label(x: Array, y: Array, x_query: Array) -> Array:
    return jnp.broadcast_to(y.mean(1, keepdims=True), (*x_query.shape[:2], 1))


def posterior(tokens: Array, lengths: Array, mask: Array) -> Array:
    return chart.inside_outside(WORDS.grammar, tokens, lengths, mask).word_posterior


def test_the_teacher_counts_for_the_first_share() -> None:
    task = Distilled(REGRESSION, mean_label, share=0.4)
    assert isinstance(task, Curriculum) and outcome(task) == "values"
    key = jax.random.key(0)
    plain = REGRESSION.sample(key, 7)
    prediction = jax.random.normal(jax.random.key(1), plain.target.shape)
    own = REGRESSION.loss(prediction, plain)
    said = mean_label(*plain.inputs)
    against = 0.5 * ((prediction - said) ** 2).sum(-1).mean(-1)
    assert float(jnp.abs(own - against).max()) > 0.01
    for progress, wanted in ((0.0, against), (0.39, against), (0.4, own), (1.0, own)):
        batch = jax.jit(task.sample_during, static_argnums=1)(key, 7, progress)
        np.testing.assert_array_equal(batch.inputs[0], plain.inputs[0])
        np.testing.assert_allclose(task.loss(prediction, batch), wanted, rtol=1e-5)
    # outside of a fit it is the task itself
    np.testing.assert_array_equal(task.loss(prediction, task.sample(key, 7)), own)


@pytest.mark.parametrize(("share", "taught"), [(0.0, 0), (0.25, 5), (1.0, 20)])
def test_steps_of_a_fit_that_are_taught(share: float, taught: int) -> None:
    # a teacher that says 5 of everything: its loss is about 12.5 higher
    def five(x: Array, y: Array, x_query: Array) -> Array:
        return jnp.full((*x_query.shape[:2], 1), 5.0)

    class Zero(nnx.Module):
        def __init__(self) -> None:
            self.scale = nnx.Param(jnp.zeros(()))

        def __call__(self, x: Array, y: Array, x_query: Array) -> Array:
            return self.scale[...] * jnp.ones((*x_query.shape[:2], 1))

    recipe = Recipe(steps=20, batch=64, learning_rate=1e-9, chunk=1, checkpoint_every=20)
    found = fit(Zero(), Distilled(REGRESSION, five, share), recipe)
    assert sum(record["loss"] > 5 for record in found.history) == taught
    assert all(record["loss"] > 5 for record in found.history[:taught])


def test_a_curriculum_keeps_its_own() -> None:
    task = Distilled(WORDS, posterior, share=0.5)
    for progress in (0.0, 1.0):
        batch = task.sample_during(jax.random.key(2), 64, jnp.asarray(progress))
        plain = WORDS.sample_during(jax.random.key(2), 64, jnp.asarray(progress))
        np.testing.assert_array_equal(batch.inputs[2], plain.inputs[2])
        assert isinstance(batch.target, Taught) and bool(batch.target.counts.all()) == (
            progress < 0.5
        )


def test_cross_entropy_is_the_mean_loss_over_the_teachers_words() -> None:
    batch = WORDS.sample(jax.random.key(3), 5)
    tokens, mask = map(np.asarray, batch.target)
    words = len(WORDS.grammar.vocabulary)
    rng = np.random.default_rng(0)
    said, found = (rng.dirichlet(np.ones(words), tokens.shape).astype(np.float32) for _ in "ab")
    said[..., 0] = 0  # a word that it rules out; the model may too
    found[..., 0] = 0
    wanted = teacher_loss(WORDS, jnp.asarray(found), jnp.asarray(said), batch)
    total = np.zeros(5)
    for word in range(1, words):  # brute force: every place's target is this word
        for t in range(tokens.shape[1]):
            only = mask & (np.arange(tokens.shape[1]) == t)
            other = Batch(batch.inputs, (jnp.full_like(batch.target[0], word), jnp.asarray(only)))
            hidden = max(only.sum(1).mean(), 1 / 5) / max(mask.sum(1).mean(), 1 / 5)
            total += said[:, t, word] * np.asarray(WORDS.loss(jnp.asarray(found), other)) * hidden
    np.testing.assert_allclose(wanted, total, rtol=1e-4)
    # a teacher that is sure of the targets is the task
    sure = jax.nn.one_hot(tokens, words)
    np.testing.assert_allclose(
        teacher_loss(WORDS, jnp.asarray(found), sure, batch),
        WORDS.loss(jnp.asarray(found), batch),
        rtol=1e-5,
    )


@dataclass(frozen=True)
class Labels:
    """Classes with weights of their own; logits."""

    outcome: ClassVar[str] = "logits"

    def sample(self, key: Array, batch: int) -> Batch:
        return Batch((jax.random.normal(key, (batch, 4)),), jnp.arange(batch) % 3)

    def loss(self, prediction: Array, batch: Batch) -> Array:
        logs = jax.nn.log_softmax(prediction)
        weight = 1.0 + jnp.arange(len(prediction))
        return -weight * jnp.take_along_axis(logs, batch.target[:, None], 1)[:, 0]


def test_a_target_of_several_fields_has_its_value_taught() -> None:
    task = NoisyRegressionTask(dim_x=3, num_examples=5, max_noise=1.0)
    batch = task.sample(jax.random.key(0), 4)
    prediction, said = jax.random.normal(jax.random.key(1), (2, *batch.target.value.shape))
    expected = jnp.square(prediction - said)[..., 0].mean(1) / 2
    np.testing.assert_allclose(teacher_loss(task, prediction, said, batch), expected, rtol=1e-6)


def test_logits() -> None:
    task = Labels()
    batch = task.sample(jax.random.key(0), 6)
    prediction = jax.random.normal(jax.random.key(1), (6, 3))
    said = jax.nn.softmax(jax.random.normal(jax.random.key(2), (6, 3)))
    found = teacher_loss(task, prediction, said, batch)
    wanted = sum(
        said[:, c] * task.loss(prediction, Batch(batch.inputs, jnp.full(6, c))) for c in range(3)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_an_exact_posterior_keeps_the_gradient_and_takes_the_noise() -> None:
    # negative: a posterior that is off is a bias
    task, size = MaskedLanguageTask(WORDS.grammar, 6, 0.3), len(WORDS.grammar.vocabulary)
    scores = 0.5 * jax.random.normal(jax.random.key(4), (6, size))

    def uniform(tokens: Array, lengths: Array, mask: Array) -> Array:
        return jnp.full((*tokens.shape, size), 1 / size)

    def gradient(scores: Array, batch: Batch, said: Array | None) -> Array:
        prediction = jnp.broadcast_to(jax.nn.softmax(scores), (*batch.target[0].shape, size))
        if said is None:
            return task.loss(prediction, batch).mean()
        return teacher_loss(task, prediction, said, batch).mean()

    @jax.jit
    def each(keys: Array) -> tuple[Array, ...]:
        def one(key: Array) -> tuple[Array, ...]:
            batch = task.sample(key, 64)
            teachers = (None, posterior(*batch.inputs), uniform(*batch.inputs))
            return tuple(jax.grad(gradient)(scores, batch, said) for said in teachers)

        return jax.lax.map(one, keys)

    own, exact, wrong = (np.asarray(g).reshape(400, -1) for g in each(
        jax.random.split(jax.random.key(5), 400)
    ))  # fmt: skip
    spread = np.sqrt(own.var(0).sum() / 400)
    assert np.linalg.norm(own.mean(0) - exact.mean(0)) < 2 * spread
    assert np.linalg.norm(own.mean(0) - wrong.mean(0)) > 5 * spread
    assert exact.var(0).sum() < 0.6 * own.var(0).sum()


def test_bad_share_is_named() -> None:
    with pytest.raises(ValueError, match=r"share is 1.5, must be 0 to 1"):
        Distilled(REGRESSION, mean_label, 1.5)


def test_linear_agents_that_teach_one_another_become_their_mean(x64: None) -> None:
    # against gradient descent by autodiff, on inputs of a plane in three dimensions
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(20, 2)) @ rng.normal(size=(2, 3)))
    start = rng.normal(size=(4, 2, 3))
    batch = Batch((inputs,), None)

    def loss(own: Array, said: Array) -> Array:
        return teacher_loss(Linear(), inputs @ own.T, said, batch).mean()

    moved = jnp.asarray(start)
    for _ in range(30):
        said = jax.lax.stop_gradient(inputs @ moved.mean(0).T)
        moved = moved - 0.1 * jax.vmap(jax.grad(loss), (0, None))(moved, said)
    np.testing.assert_allclose(agents(start, inputs, 0.1, 30), moved, atol=1e-10)
    last = agents(start, inputs, 0.1, 10**6)
    ensemble = inputs @ start.mean(0).T
    np.testing.assert_allclose(inputs @ jnp.swapaxes(last, 1, 2), [ensemble] * 4, atol=1e-10)
    # off the plane everyone keeps its own
    normal = np.linalg.svd(inputs)[2][2]
    np.testing.assert_allclose(last @ normal, start @ normal, atol=1e-10)
    with pytest.raises(ValueError, match="step is 9.0, must be in"):
        agents(start, inputs, 9.0, 1)


@dataclass(frozen=True)
class Linear:
    """Values, with the loss of regression."""

    outcome: ClassVar[str] = "values"

    def sample(self, key: Array, batch: int) -> Batch:
        return Batch((jax.random.normal(key, (batch, 3)),), jnp.zeros((batch, 2)))

    def loss(self, prediction: Array, batch: Batch) -> Array:
        return 0.5 * ((prediction - batch.target) ** 2).sum(-1)
