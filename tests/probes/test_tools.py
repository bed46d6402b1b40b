"""Every tool on a run of every family: a table, or one line that says what the run lacks."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.core.symmetry import change_key_basis, change_value_basis
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


SMALL: dict[str, dict[str, object]] = {
    "gradient-descent": {"dim_x": 3, "num_examples": 5},
    "inside-outside": {"grammar": "toy", "max_length": 4, "activation": "relu"},
}


@cache
def twins(name: str) -> tuple[Run, Run]:
    """A run, and the same with its model in another basis of keys and values."""
    run = fit_family(name, SMALL[name], steps=20, batch=32)
    keys = jax.random.split(jax.random.key(1))
    other = change_value_basis(change_key_basis(run.models[0], keys[0]), keys[1])
    return run, replace(run, models=(other,))


#: A family for each; tools that read checkpoints see no model of ours.
FAMILY = dict.fromkeys(TOOLS, "gradient-descent")
FAMILY |= dict.fromkeys(("saliency", "arcs", "selectivity"), "inside-outside")
del FAMILY["training"], FAMILY["averaging"], FAMILY["fisher-merge"]


@pytest.mark.parametrize("tool", FAMILY)
def test_what_is_said_of_another_basis_is_so(tool: str) -> None:
    ours, theirs = (np.array(find(tool)(run, 0).values, float) for run in twins(FAMILY[tool]))
    assert np.isfinite(ours).any()
    same = np.allclose(ours, theirs, rtol=5e-3, atol=1e-4, equal_nan=True)
    assert same == find(tool).invariant, (ours, theirs)


def test_seeds_that_are_left_out_change_nothing() -> None:
    run = fit_family("gradient-descent", SMALL["gradient-descent"], steps=3, seeds=[4, 5, 6])
    first = replace(run, models=run.models[:2], seeds=run.seeds[:2])
    assert find("graft").seeds == 2
    assert find("graft")(run, 0) == find("graft")(first, 0)


def test_unknown_tool_lists_the_known() -> None:
    with pytest.raises(ValueError, match=f"unknown tool 'nope', must be one of {', '.join(TOOLS)}"):
        find("nope")
