"""Every probe on a run of every family: a table, or one line that says what the run lacks."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.core.symmetry import change_key_basis, change_value_basis
from constructions.runs import Run, fit_family
from probes import GROUP, PROBES, find, places, probe_table
from probes.probe import NotApplicable, Probe, Result, table


@cache
def short_run(name: str) -> Run:
    return fit_family(name, steps=3, seeds=[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("probe", PROBES)
def test_table_or_one_line(probe: str, name: str) -> None:
    try:
        result = find(probe)(short_run(name), 0)
    except ValueError as error:
        assert 20 < len(str(error)) < 250 and "\n" not in str(error), error
        return
    values = np.array(result.values, float)
    assert values.shape == (len(result.rows), len(result.columns))
    assert np.isfinite(values).any()


SMALL: dict[str, dict[str, object]] = {
    "gradient-descent": {"dim_x": 3, "num_examples": 5},
    "inside-outside": {"grammar": "toy", "max_length": 4, "activation": "relu"},
    "mesa-ridge": {"dim": 2, "length": 8},
}


@cache
def twins(name: str) -> tuple[Run, Run]:
    """A run, and the same with its model in another basis of keys and values."""
    run = fit_family(name, SMALL[name], steps=20, batch=32)
    keys = jax.random.split(jax.random.key(1))
    other = change_value_basis(change_key_basis(run.models[0], keys[0]), keys[1])
    return run, replace(run, models=(other,))


#: A family for each; probes that read checkpoints see no model of ours.
FAMILY = dict.fromkeys(PROBES, "gradient-descent")
FAMILY |= dict.fromkeys(("saliency", "arcs", "selectivity"), "inside-outside")
FAMILY |= dict.fromkeys(("spans", "trees", "span-interchange"), "inside-outside")
FAMILY |= {"positions": "mesa-ridge"}
del FAMILY["training"], FAMILY["averaging"], FAMILY["fisher-merge"]


@pytest.mark.parametrize("probe", FAMILY)
def test_what_is_said_of_another_basis_is_so(probe: str) -> None:
    ours, theirs = (np.array(find(probe)(run, 0).values, float) for run in twins(FAMILY[probe]))
    assert np.isfinite(ours).any()
    same = np.allclose(ours, theirs, rtol=5e-3, atol=1e-4, equal_nan=True)
    assert same == find(probe).invariant, (ours, theirs)


def test_seeds_that_are_left_out_change_nothing() -> None:
    run = fit_family("gradient-descent", SMALL["gradient-descent"], steps=3, seeds=[4, 5, 6])
    first = replace(run, models=run.models[:2], seeds=run.seeds[:2])
    assert find("graft").seeds == 2
    assert find("graft")(run, 0) == find("graft")(first, 0)


def test_a_name_that_leads_to_no_probe() -> None:
    known = f"unknown probe 'nope', must be one of {', '.join(PROBES)}, or module:attribute"
    for name, said in (
        ("nope", known),
        ("no.such:PROBE", "importing no.such fails: ModuleNotFoundError"),
        ("probes.linear:nothing", "probes.linear has no nothing"),
        ("probes.linear:CONTROLS", "is a tuple, must be a Probe"),
        (":PROBE", "must be module:attribute"),
    ):
        with pytest.raises(ValueError) as error:
            find(name)
        assert said in str(error.value) and "\n" not in str(error.value)


def test_probes_are_where_they_are_listed_and_in_the_readme() -> None:
    assert [find(name).name for name in PROBES] == list(PROBES)
    assert probe_table() in (Path(__file__).parents[2] / "docs/probes.md").read_text()


def test_names_are_listed_without_jax() -> None:
    code = "import sys, probes; probes.places(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


COUNT = Probe(
    "count",
    "how many seeds are there?",
    "it is asked twice",
    lambda run, seed: table("seeds", ["<count>"], ["run"], [[len(run.seeds) + seed]], "a & b"),
    lambda run: "the run has no seeds" if not run.seeds else "",
)


class Entry:
    """An entry point as a package of somebody else has it."""

    name, value = "count", f"{__name__}:COUNT"


def test_a_probe_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(f"{__name__}:COUNT") is COUNT
    monkeypatch.setattr("probes.entry_points", lambda group: [Entry] if group == GROUP else [])
    assert list(places()) == [*PROBES, "count"]
    assert find("count") is COUNT
    monkeypatch.setattr(Entry, "name", "linear")
    with pytest.raises(ValueError, match="entry point 'linear' .* the name is that of"):
        find("linear")


def test_what_a_run_lacks_is_asked_first() -> None:
    run = fit_family("gradient-descent", SMALL["gradient-descent"], steps=1)
    assert COUNT(run, 2).values == [[3.0]]
    with pytest.raises(NotApplicable, match="^the run has no seeds$"):
        COUNT(replace(run, seeds=(), models=()))


def test_a_result_prints_and_shows_itself() -> None:
    found = table(
        "<title>", ["one", "two"], ["T[o, a]", "b"], [[1, np.nan], [0.12345, -2]], "a & b"
    )
    lines = str(found).splitlines()
    assert lines[0] == "<title>" and lines[-1] == "a & b"
    assert [line for line in lines if "0.123" in line and "-2" in line and "b" in line]
    assert [line for line in lines if "n/a" in line and "T[o, a]" in line]
    shown = found._repr_html_()
    assert "<td>0.123</td><td>-2</td>" in shown and "&lt;title&gt;" in shown
    assert "<title>" not in shown and "a &amp; b" in shown and "<th>two</th>" in shown
    assert found.to_json()["values"] == [[1, None], [0.12345, -2]]
    assert found.draw().startswith(b"\x89PNG")
    assert Result("t", [], [], []).to_json() == dict(
        title="t", columns=[], rows=[], values=[], note=""
    )
