"""Fisher rows against curvature of the divergence; merges against joint least squares."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions.core.compile import compile_program
from constructions.core.symmetry import change_key_basis, change_value_basis
from constructions.core.transformer import randomise
from constructions.gradient_descent.construction import GradientDescent
from constructions.inside_outside.construction import InsideOutside
from constructions.inside_outside.paper import language_model
from constructions.runs import fit_family, load_run
from probes.merging import (
    FISHER_MERGE,
    best_merge,
    diagonal_fisher,
    fisher_rows,
    merge,
    normalised,
    share_grid,
)
from probes.npeff import divergences
from probes.subject import ParameterVector

KEY = jax.random.key(0)
BOTH = jnp.asarray([0.5, 0.5])


def least_squares(seed: int, turned: bool) -> tuple[np.ndarray, Any, np.ndarray, np.ndarray]:
    """Two linear models with data of their own: (thetas, their full F, the joint theta, X^T X)."""
    rng = np.random.default_rng(seed)
    scales, basis = np.exp(rng.normal(size=(2, 6))), np.linalg.qr(rng.normal(size=(6, 6)))[0]
    truth, xs, ys = rng.normal(size=6), [], []
    for scale in scales:
        x = np.linalg.qr(rng.normal(size=(40, 6)))[0] * scale @ (basis if turned else np.eye(6))
        xs.append(x)
        ys.append(x @ truth + 0.3 * rng.normal(size=40))
    thetas = np.stack([np.linalg.lstsq(x, y)[0] for x, y in zip(xs, ys, strict=True)])
    every = np.concatenate(xs)
    joint = np.linalg.lstsq(every, np.concatenate(ys))[0]
    full = jnp.stack([x.T @ x / len(x) for x in xs])
    return thetas, full, joint, every.T @ every


def excesses(turned: bool) -> np.ndarray:
    """Relative excess loss of merges: full, diagonal, plain average; the mean of 30 problems."""
    found = []
    for seed in range(30):
        thetas, full, joint, gram = least_squares(seed, turned)
        diagonal = jnp.diagonal(full, axis1=1, axis2=2)
        gaps = [
            np.asarray(merge(jnp.asarray(thetas), f, BOTH, floor=0.0)) - joint
            for f in (full, diagonal, jnp.ones_like(diagonal))
        ]
        found.append([gap @ gram @ gap / (joint @ gram @ joint) for gap in gaps])
    return np.mean(found, axis=0)


@pytest.mark.usefixtures("x64")
def test_merges_of_linear_models() -> None:
    """Full Fisher matrices give the joint solution; diagonals do in the right basis alone."""
    aligned, turned = excesses(False), excesses(True)
    assert aligned[0] < 1e-20 and turned[0] < 1e-20
    assert aligned[1] < 1e-20 and aligned[2] > 0.1
    assert 0.05 < turned[1] < 0.7 * turned[2]


@pytest.mark.usefixtures("x64")
def test_merge_by_hand() -> None:
    thetas = jnp.asarray([[1.0, 2.0, 3.0], [3.0, 6.0, 5.0]])
    fishers = jnp.asarray([[1.0, 3.0, 0.0], [1.0, 1.0, 0.0]])
    found = merge(thetas, fishers, jnp.asarray([0.25, 0.75]))
    wanted = [(0.25 + 2.25) / 1.0, (1.5 + 4.5) / 1.5, 3.0]  # the first model's where none knows
    assert np.allclose(found, wanted, atol=1e-5)
    matrices = jnp.stack([jnp.diag(f) for f in fishers])
    assert np.allclose(merge(thetas, matrices, jnp.asarray([0.25, 0.75])), wanted, atol=1e-5)
    assert float(jnp.linalg.norm(normalised(fishers[0]))) == pytest.approx(1)
    grid = share_grid(2)
    assert len(grid) == 10 and np.allclose(grid.sum(1), 1) and (grid[:, 0] > 0).all()
    assert len(share_grid(3, 4)) == 10
    # the loss is least at the second weights alone, so the smallest share of the first wins
    shares, loss = best_merge(
        lambda t: jnp.square(t - thetas[1]).sum(), thetas, jnp.ones((2, 3)), grid
    )
    assert np.allclose(shares, [0.1, 0.9]) and loss == pytest.approx(0.01 * 24, rel=1e-3)


def models() -> dict[str, Any]:
    """A small model of each kind of likelihood."""
    descent = GradientDescent(dim_x=2, dim_y=2, num_examples=3)
    language = InsideOutside("toy", max_length=4, layers=1, heads=1, width=6)
    return {"values": descent, "probabilities": language}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["values", "probabilities"])
def test_rows_are_the_curvature_of_the_divergence(kind: str) -> None:
    construction = models()[kind]
    shape = (
        language_model(17, 4, 1, 1, 6) if kind == "probabilities" else construction.compile().model
    )
    flat = ParameterVector(construction, randomise(shape, KEY, 0.3))
    batch = construction.task.sample(jax.random.key(1), 8)
    theta = flat.theta
    rows = fisher_rows(flat, theta, batch)
    assert rows.shape == (8, flat.outcomes(batch), theta.size)
    direction = jax.random.normal(KEY, theta.shape)
    curvature = jnp.square(rows @ direction).sum(1)
    step = 1e-4
    others = [theta + sign * step * direction for sign in (1, -1)]
    found = divergences(flat, theta, others, batch).sum(0) / step**2
    assert np.allclose(found, curvature, rtol=1e-4, atol=1e-7)
    # the divergence itself, written out
    here, there = (
        np.asarray(construction.apply(flat.merge(t), *batch.inputs)) for t in (theta, others[0])
    )
    if kind == "values":
        wanted = np.square(here - there).sum((1, 2)) / 2
    else:
        safe = np.where(here > 0, here, 1)
        each = (here * np.log(safe / np.where(here > 0, there, 1))).sum(-1)
        wanted = np.where(batch.target[1], each, 0).sum(1)  # hidden words only
        assert (wanted[~np.asarray(batch.target[1]).any(1)] == 0).all()
    assert np.allclose(
        divergences(flat, theta, others[:1], batch)[0], wanted, rtol=1e-6, atol=1e-13
    )
    if kind == "values":
        diagonal = diagonal_fisher(flat, theta, batch)
        assert np.allclose(diagonal, jnp.square(rows).sum(1).mean(0), rtol=1e-8)
    drawn = fisher_rows(flat, theta, batch, 400, KEY)
    assert drawn.shape[1] == 400
    estimate = float(jnp.square(drawn @ direction).sum(1).mean())
    assert estimate == pytest.approx(float(curvature.mean()), rel=0.15)


def test_tool(tmp_path: Any) -> None:
    settings = {"dim_x": 2, "num_examples": 4}
    fitted = {"steps": 300, "batch": 64, "chunk": 100, "checkpoint_every": 100}
    fit_family("gradient-descent", settings, tmp_path / "run", seeds=[0, 1], **fitted)
    run = load_run(tmp_path / "run")
    found = FISHER_MERGE(run, 0)
    assert found.rows == ["seed 0, steps 100 and 300", "seed 1, steps 100 and 300", "seeds 0 and 1"]
    values = np.array(found.values, float)
    better = values[:, :2].min(1)
    assert (values[:2, 2:4].max(1) < values[:2, :2].max(1)).all()  # within one lineage
    assert values[2, 2] > 1.05 * better[2]  # across lineages
    assert values[2, 5] < 0.9 * values[2, 2]  # though what the layers do is alike
    assert "seeds 0 and 1" in found.note and "assumption is not met" in found.note
    # a copy in another basis is the same function, and merges no better than a stranger
    construction: Any = run.construction
    shape = construction.trained_shape
    built = compile_program(construction.program, config=shape)
    turned = change_value_basis(change_key_basis(built, KEY), jax.random.key(1))
    copies = FISHER_MERGE(replace(run, models=(built, turned), path=None), 0)
    first, second, plain, merged, _, between = np.array(copies.values, float)[0]
    assert second == pytest.approx(first, rel=1e-4) and between == pytest.approx(first, rel=1e-4)
    assert plain > 1.02 * first and merged > 1.001 * first
    one = replace(run, models=run.models[:1], seeds=(0,), path=None)
    with pytest.raises(ValueError, match="one seed and fewer than two checkpoints"):
        FISHER_MERGE(one, 0)
