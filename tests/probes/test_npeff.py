"""NPEFF: planted strategies come out pure, shuffled and isotropic ones do not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from constructions.core.compile import compile_program, config_of
from constructions.core.symmetry import change_key_basis
from constructions.gradient_descent.construction import GradientDescent
from constructions.runs import fit_family, load_run
from probes import npeff
from probes.merging import fisher_rows
from probes.npeff import (
    Search,
    coordinates,
    decompose,
    isotropic_rows,
    perturbation,
    purity,
    top_examples,
    top_ratio,
    unit_rows,
)
from probes.subject import ParameterVector
from synthetic.tasks.task import Batch

KEY = jax.random.key(0)
TYPES = np.repeat(np.arange(3), 100)
CONSTRUCTION = GradientDescent(dim_x=6, num_examples=10)
SHAPE = config_of(CONSTRUCTION.program).with_heads(7, 7)
FLAT = ParameterVector(CONSTRUCTION, compile_program(CONSTRUCTION.program, config=SHAPE))
QUERY = next(part for name, part in FLAT.parts.items() if name.endswith("query"))


def examples(blocks: bool) -> Batch:
    """Inputs of type t have the coordinates 2t and 2t + 1 alone, or with no blocks all of them."""
    rng = np.random.default_rng(0)
    inside = np.repeat(np.eye(3), 2, axis=1)[TYPES] if blocks else np.ones((300, 6))
    x, query = (rng.uniform(-0.5, 0.5, (300, n, 6)) * inside[:, None] for n in (10, 1))
    w = rng.normal(size=(300, 6, 1))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, x @ w, query, query @ w)]
    return Batch(tuple(arrays[:3]), arrays[3])


@pytest.fixture(scope="module")
def planted() -> Any:
    """Examples and rows for W_Q: each type's gradients fill four dimensions of their own."""
    batch = examples(blocks=True)
    return batch, fisher_rows(FLAT, FLAT.theta, batch)[..., QUERY]


def lifted(directions: Any) -> Any:
    return jnp.zeros((len(directions), FLAT.theta.size)).at[:, QUERY].set(directions)


def cluster_accuracy(assigned: Any, labels: Any) -> float:
    """The share of examples whose label is that of most of their cluster."""
    counted = [np.bincount(labels[assigned == c]).max() for c in np.unique(assigned)]
    return float(np.sum(counted) / len(labels))


def accuracy(weights: Any) -> float:
    return cluster_accuracy(np.asarray(weights).argmax(1), TYPES)


def test_planted_types(planted: Any) -> None:
    batch, rows = planted
    assert np.linalg.matrix_rank(np.asarray(rows)[:, 0], tol=1e-4) == 12
    found = decompose(rows, 6, KEY)
    assert accuracy(found.weights) == 1
    # clusters of the gradients themselves are far behind: their signs differ
    _, means = kmeans2(np.asarray(unit_rows(rows))[:, 0], 6, minit="++", rng=0)
    assert cluster_accuracy(means, TYPES) < 0.85
    assert (purity(found.weights, TYPES) == 1).all()
    # what a component moves is its own type, and its top examples most
    size = 0.05 * jnp.linalg.norm(FLAT.theta)
    moved = np.asarray(perturbation(FLAT, FLAT.theta, batch, lifted(found.directions), size))
    top = top_examples(found.weights)
    assert (top_ratio(moved, top) > 3).all()
    for row, own in zip(moved, TYPES[top[:, 0]], strict=True):
        assert row[own != TYPES].max() < 1e-6 * row.max()
    # more of the examples is explained than if they had nothing in common
    null = decompose(isotropic_rows(rows, KEY), 6, KEY)
    assert 1 - found.error > 1.7 * (1 - null.error)


def test_too_few_components(planted: Any) -> None:
    """A near-miss: one component a type, each of four dimensions; clusters depend on the start."""
    alone = Search(restarts=1)
    few = [decompose(planted[1], 3, key, alone) for key in jax.random.split(KEY, 5)]
    assert np.mean([accuracy(found.weights) for found in few]) < 0.9
    assert all((purity(found.weights, TYPES) == 1).all() for found in few)


def test_nothing_to_find(planted: Any) -> None:
    """Shuffled labels; and examples of one kind, whose components move their top examples too."""
    weights = decompose(planted[1], 6, KEY).weights
    shuffled = np.random.default_rng(0).permutation(TYPES)
    assert purity(weights, shuffled).mean() < 0.6
    assert cluster_accuracy(np.asarray(weights).argmax(1), shuffled) < 0.5
    batch = examples(blocks=False)
    rows = fisher_rows(FLAT, FLAT.theta, batch)[..., QUERY]
    found, null = (decompose(r, 6, KEY) for r in (rows, isotropic_rows(rows, KEY)))
    assert purity(found.weights, TYPES).mean() < 0.6 and accuracy(found.weights) < 0.5
    assert 1 - found.error < 1.5 * (1 - null.error)
    size = 0.05 * jnp.linalg.norm(FLAT.theta)
    moved = perturbation(FLAT, FLAT.theta, batch, lifted(found.directions), size)
    assert (top_ratio(moved, top_examples(found.weights)) > 3).all()  # which shows nothing


def test_objective_by_brute_force() -> None:
    """The error is that of the matrices themselves, and a fixed point has no gradient."""
    rng = np.random.default_rng(1)
    rows = jnp.asarray(rng.normal(size=(12, 2, 5)), jnp.float32)
    found = decompose(rows, 3, KEY, Search(joint=4000))
    fisher = np.einsum("ncp,ncq->npq", *[np.asarray(rows, float)] * 2)
    fisher /= np.linalg.norm(fisher, axis=(1, 2), keepdims=True)

    def left(weights: Any, directions: Any) -> Any:
        held = jnp.einsum("nj,jp,jq->npq", weights, directions, directions)
        return jnp.square(fisher - held).sum() / 12

    assert np.allclose(np.linalg.norm(found.directions, axis=1), 1, atol=1e-5)
    assert left(*found[:2]) == pytest.approx(float(found.error), abs=1e-5)
    slopes = jax.grad(left, argnums=(0, 1))(*found[:2])
    used = np.asarray(found.weights) > 1e-3
    assert np.abs(np.where(used, slopes[0], 0)).max() < 1e-3
    assert (np.asarray(slopes[0])[~used] > -1e-3).all()
    assert np.abs(slopes[1]).max() < 2e-3


@pytest.mark.parametrize("weights", [4, 60])
def test_coordinates(weights: int) -> None:
    """Lengths and angles stay, however many weights there are."""
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3, weights)), jnp.float32)
    inside, lift = coordinates(rows)
    ours, theirs = (np.asarray(a).reshape(15, -1) for a in (inside, rows))
    assert inside.shape[-1] == min(weights, 15)
    assert np.allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-4)
    assert np.allclose(lift(inside.reshape(15, -1)), theirs, atol=1e-4)


def test_directions_depend_on_the_basis(planted: Any) -> None:
    """The same function in another basis: one model's component is nothing in the other."""
    batch, rows = planted
    model = change_key_basis(FLAT.model, jax.random.key(5))
    turned = FLAT.vector(model)
    other = fisher_rows(FLAT, turned, batch)[..., QUERY]
    grams = [
        np.asarray(jnp.square(jnp.einsum("np,mp->nm", r[:, 0], r[:, 0]))) for r in (rows, other)
    ]
    assert not np.allclose(grams[0], grams[1], rtol=0.05, atol=1e-3 * grams[0].max())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decompose(jnp.ones((3, 1, 2)), 0, KEY), "components is 0"),
        (lambda: unit_rows(jnp.zeros((3, 1, 2))), "3 of 3 examples are 0"),
        (lambda: Search(joint=0), "joint is 0"),
        (lambda: Search(rate=0.0), "rate is 0"),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_tool(tmp_path: Any, monkeypatch: Any) -> None:
    fit_family(
        "gradient-descent", {"dim_x": 2, "num_examples": 4}, tmp_path / "r", steps=3, batch=8
    )
    run = load_run(tmp_path / "r")
    found = npeff.NPEFF(run, 0)
    values = np.array(found.values, float)
    assert found.rows[0] == "seed 0, component 1" and len(found.rows) == npeff.COMPONENTS
    assert values[:, 0].sum() == npeff.EXAMPLES and (values[:, 1] > 1).all()
    assert np.isnan(values[:, 2]).all() and "of isotropic ones" in found.note
    monkeypatch.setattr("probes.probe.MOST_WEIGHTS", 10)
    with pytest.raises(ValueError, match="has 36 weights, NPEFF takes at most 10"):
        npeff.NPEFF(run, 0)
