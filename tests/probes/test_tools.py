"""Every tool on a run of every family: a table, or one line that says what the run lacks."""

from functools import cache

import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.runs import Run, fit_family
from probes.tools import TOOLS, find


@cache
def short_run(name: str) -> Run:
    return fit_family(name, steps=3, seeds=[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("tool", TOOLS)
def test_table_or_one_line(tool: str, name: str) -> None:
    try:
        result = find(tool)(short_run(name), 0)
    except ValueError as error:
        assert 20 < len(str(error)) < 250 and "\n" not in str(error), error
        return
    values = np.array(result.values, float)
    assert values.shape == (len(result.rows), len(result.columns))
    assert np.isfinite(values).any()


def test_unknown_tool_lists_the_known() -> None:
    with pytest.raises(ValueError, match=f"unknown tool 'nope', must be one of {', '.join(TOOLS)}"):
        find("nope")
