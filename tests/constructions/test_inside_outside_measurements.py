"""The published sizes beside ours: our own numbers against the formulas of the layout."""

from itertools import islice

import pytest

from constructions.inside_outside.measurements import measure


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
