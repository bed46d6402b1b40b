"""A frozen model behind a prompt: what is predicted, what is trained, and what is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from constructions.mesa.measurements import Prompt, Prompted, least_squares
from constructions.mesa.ridge import MesaRidge
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.train import fit
from synthetic.tasks.few_shot import FewShotRegression

TASK = FewShotRegression(dim=2, pairs=4)
RIDGE = MesaRidge(2, 12, regularization=0.1)


def solve(before, after, query, rho):
    gram = before.T @ before + rho * np.eye(before.shape[1])
    return after.T @ before @ np.linalg.solve(gram, query)


def test_a_prompted_model_is_ridge_regression_on_the_tokens(x64):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 4, 2))
    prefix, eos = rng.normal(size=(2, 2)), rng.normal(size=2)
    for prompt in (Prompt(), Prompt(eos=eos), Prompt(prefix=prefix), Prompt(prefix, eos)):
        found = Prompted(RIDGE, RIDGE.compile().model, prompt)(jnp.asarray(x), jnp.asarray(y))
        for b in range(3):
            rows = [] if prompt.prefix is None else [*prefix]
            for i in range(4):
                rows.append(x[b, i])
                tokens = np.stack(rows)
                expected = solve(tokens[:-1], tokens[1:], tokens[-1], 0.1)
                np.testing.assert_allclose(found[b, i], expected, atol=1e-11)
                rows += [y[b, i]] if prompt.eos is None else [y[b, i], eos]


def test_least_squares_sees_the_pairs_before_only(x64):
    x, y = np.random.default_rng(1).normal(size=(2, 3, 5, 2))
    found = least_squares(jnp.asarray(x), jnp.asarray(y), 0.1)
    for b in range(3):
        for i in range(5):
            expected = solve(x[b, :i], y[b, :i], x[b, i], 0.1)
            np.testing.assert_allclose(found[b, i], expected, atol=1e-12)


def test_a_fit_moves_the_prompt_and_nothing_else():
    model = RIDGE.compile().model
    start = Prompted(RIDGE, model, Prompt.draw(jax.random.key(0), 2, count=2))
    found = fit(start, TASK, Recipe(steps=3, batch=8, chunk=3)).model
    for before, after in zip(
        jax.tree.leaves(model.arrays()), jax.tree.leaves(found.model.arrays()), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    for name in ("prefix", "eos"):
        moved = getattr(found.prompt, name)[...] - getattr(start.prompt, name)[...]
        assert (np.abs(moved) > 0).all()
    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(found, nnx.Param))}
    assert names == {"prefix", "eos"}


def test_tuning_eos_of_exact_ridge_regression_finds_zero():
    """`FewShotRegression.limit` is least at EOS = 0; so is the loss of few pairs."""
    start = Prompted(RIDGE, RIDGE.compile().model, Prompt(eos=jnp.asarray([1.0, -0.5])))
    recipe = Recipe(steps=300, batch=64, learning_rate=0.02, schedule="cosine")
    found = fit(start, TASK, recipe)
    assert np.linalg.norm(found.model.prompt.eos[...]) < 0.1
    losses = [record["loss"] for record in found.history]
    assert losses[-1] < losses[0]


def test_too_many_tokens_are_named():
    prompted = Prompted(RIDGE, RIDGE.compile().model, Prompt.draw(jax.random.key(0), 2, count=3))
    x = jnp.zeros((1, 4, 2))
    with pytest.raises(ValueError, match=r"states has shape \(1, 13, 2\), must be .* from 1 to 12"):
        prompted(x, x)
