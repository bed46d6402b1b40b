"""The published sizes beside ours: our own numbers against the formulas of the layout."""

from itertools import islice

import jax.numpy as jnp
import numpy as np
import pytest

from constructions.inside_outside.measurements import measure, rival_rows
from constructions.inside_outside.paper import given_up


def test_rows_are_the_formulas_of_the_layout() -> None:
    rows = {row.name: row for row in islice(measure(quick=True, seed=3), 4)}
    layers, heads, width, loss = rows.values()
    n, p, length = 20, 70, 25
    assert (layers.published, layers.measured) == (50, 2 * length)
    # both ends of a span; two copies; first and last word
    assert (heads.published, heads.measured) == (20, 2 * n + 4)
    assert (width.published, width.measured) == (1000, 7 * n * (length - 1) - 2 * n + 5 * p + 2)
    assert loss.measured == pytest.approx(0, abs=1e-6)
    assert [row.verdict for row in rows.values()] == [
        "reproduced",
        "differs",
        "differs",
        "reproduced",
    ]


def test_equal_words_cost_nothing() -> None:
    """Against a loop over the words."""
    rng = np.random.default_rng(0)
    exact, found = rng.dirichlet(np.ones(4), (2, 3, 5))
    exact[0, 0] = 0.25  # whatever is guessed there is as good
    mask = rng.random((3, 5)) < 0.6
    mask[0, 0] = True
    lost = [
        p.max() - p[q.argmax()]
        for p, q, m in zip(*map(flat, (exact, found, mask)), strict=True)
        if m
    ]
    assert lost[0] == 0
    given = given_up(jnp.asarray(exact), jnp.asarray(found), jnp.asarray(mask))
    assert float(given) == pytest.approx(np.mean(lost), abs=1e-6)


@pytest.mark.slow
def test_windows_cost_more_than_the_claims_allow() -> None:
    rows = {row.name: row for row in rival_rows(True, 1)}
    for k in range(5):
        row = rows[f"accuracy given up by a window of {k} words"]
        assert row.verdict == "holds" and row.measured > 0.05 + 2 * row.error
    assert {row.verdict for row in rows.values()} == {"holds"}


def flat(array: np.ndarray) -> np.ndarray:
    """Words in a row."""
    return array.reshape(15, *array.shape[2:])
