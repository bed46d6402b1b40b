"""The ledger: its verdicts, and the matrix of claims against near-misses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.claims import Claim, Evidence
from constructions.compiler import compile_program, config_of
from constructions.symmetries import transform
from probes.ledger import CONSTRUCTION, RANDOM, decide, ledger, measure


def claim(threshold=0.1, direction="<=", catches=("off",)):
    return Claim("c", "s", "excess_loss", threshold, direction, "paper", catches)


@pytest.mark.parametrize(
    ("values", "trained", "verdict", "reason"),
    [
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2}, [0.05, 0.1], "holds", ""),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2}, [], "holds", "no trained model was given"),
        (
            {CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2},
            [0.05, 0.11],
            "refuted",
            "1 of 2 trained models fail",
        ),
        (
            {CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2},
            [float("nan")],
            "refuted",
            "1 of 1 trained models fail",
        ),
        ({CONSTRUCTION: 0.2, RANDOM: 1.0, "off": 0.2}, [0.0], "void", "the construction itself"),
        ({CONSTRUCTION: float("nan"), RANDOM: 1.0, "off": 0.2}, [0.0], "void", "the construction"),
        ({CONSTRUCTION: 0.0, RANDOM: 0.1, "off": 0.2}, [0.0], "void", "not caught: random init"),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.05}, [0.0], "void", "not caught: off"),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0}, [0.0], "void", "not caught: off"),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2, "other": 0.0}, [0.0], "holds", ""),
        ({CONSTRUCTION: 0.0, RANDOM: 1.0, "off": float("nan")}, [0.0], "holds", ""),
    ],
)
def test_verdicts(values, trained, verdict, reason):
    row = decide(claim(), values, trained)
    assert row.verdict == verdict
    assert row.reason.startswith(reason)


def test_direction():
    values = {CONSTRUCTION: 1.0, RANDOM: 0.0, "off": 0.5}
    assert decide(claim(0.9, ">="), values, [0.95]).verdict == "holds"
    assert decide(claim(0.9, ">="), values, [0.85]).verdict == "refuted"
    with pytest.raises(ValueError, match="direction is '<'"):
        claim(direction="<")


def test_interval_is_students():
    values = {CONSTRUCTION: 0.0, RANDOM: 1.0, "off": 0.2}
    trained = [0.01, 0.02, 0.03, 0.04, 0.05]
    row = decide(claim(), values, trained)
    # t_{0.975, 4} = 2.776445
    half = 2.776445 * np.std(trained, ddof=1) / np.sqrt(5)
    assert row.interval is not None
    np.testing.assert_allclose(row.interval, (0.03 - half, 0.03 + half), rtol=1e-6)
    assert decide(claim(), values, [0.01]).interval is None
    assert row.to_json()["values"] == values


def small():
    """One step at its best step size, small enough for a test."""
    return CATALOGUE["gradient-descent"](dim_x=4, num_examples=6, steps=1)


@pytest.fixture(scope="module")
def rows():
    """The ledger of a construction, with itself in other bases as the trained models."""
    construction = small()
    shape = config_of(construction.program)
    wide = compile_program(construction.program, config=shape.with_heads(5, 5))
    keys = jax.random.split(jax.random.key(3), 2)
    twins = [transform(wide, key, construction.gauge()) for key in keys]
    return {row.claim.name: row for row in ledger(construction, twins, batch=2**12)}


def test_the_construction_in_another_basis_satisfies_every_claim(rows):
    assert {name: (row.verdict, row.reason) for name, row in rows.items()} == {
        name: ("holds", "") for name in rows
    }


def test_every_near_miss_fails_the_claims_that_must_catch_it(rows):
    caught = {}
    for row in rows.values():
        for name in row.claim.catches:
            assert not row.claim.holds(row.values[name]), (row.claim.name, name)
            caught.setdefault(name, []).append(row.claim.name)
    assert set(caught) == set(small().near_misses())
    assert all(len(claims) >= 3 for claims in caught.values()), caught


def test_a_cosine_cannot_see_a_scale(rows):
    row = rows["aligned sensitivities"]
    assert row.claim.holds(row.values["step size + 10 %"])
    assert rows["equal step size"].values["step size + 10 %"] == pytest.approx(0.1, abs=1e-4)
    assert rows["equal weights"].values["step size - 10 %"] == pytest.approx(0.1, abs=1e-4)


def test_a_step_size_off_by_ten_percent_costs_what_the_law_says(rows):
    from synthetic.theory import excess_law

    expected = excess_law(small().task).coefficient * 0.1**2
    assert rows["optimal loss"].values["step size + 10 %"] == pytest.approx(expected, rel=1e-3)
    assert rows["equal loss"].values["step size + 10 %"] == pytest.approx(expected, rel=0.5)


def test_statistics_that_are_not_defined_are_nan():
    construction = small()
    near = construction.near_misses()["centred attention"].model
    key = jax.random.key(0)
    evidence = Evidence(
        construction,
        near,
        construction.compile().model,
        construction.task.sample(key, 16),
        key,
    )
    weights = next(c for c in construction.claims if c.statistic == "weight_distance")
    assert np.isnan(measure(weights, evidence))
    assert not weights.holds(float("nan"))
    loss = replace(weights, statistic=lambda e: jnp.asarray(e.size))
    assert measure(loss, evidence) == 16
