"""What the ledger holds of each paper: nothing of it is lost, and it is what is measured."""

import json
from pathlib import Path

import pytest

from constructions import CATALOGUE
from constructions.measurement import Measurement, Remark
from probes.cli import main
from probes.coverage import ITEMS, STATED, cites, costs, coverage, minutes, stated

KEPT = Path(__file__).parents[2] / "benchmarks" / "results" / "table1_cpu.json"
QUICK = ("hedge", "kernel-descent", "skill-composition")
#: What a number must decide; a remark says what it is.
ASSERTED = (" is worse", " better than", " less than", " beats ", " reaches ", " fails ", " holds ")


@pytest.fixture(scope="module")
def lines():
    return coverage([*CATALOGUE])


def test_every_claim_and_every_number_stands_somewhere(lines):
    there = {(row.family, row.name) for line in lines for row in line.rows}
    for name in ("gradient-descent", "mesa-ridge"):
        construction = CATALOGUE[name](**CATALOGUE[name].example())
        assert {(name, claim.name) for claim in construction.claims} <= there
    for name, family in CATALOGUE.items():
        assert {(name, row.names) for row in STATED.get(name, ())} <= there
        assert bool(family.measure) == (name in STATED)
    assert {line.paper for line in lines} > set(ITEMS)


def test_an_item_has_the_rows_that_cite_it(lines):
    (fig,) = coverage(["gd-plus-plus", "gradient-descent"], "2212.07677", "fig. 3")
    assert {"curvature, N = *", "equal loss", "loss of one step"} <= {r.name for r in fig.rows}
    assert all("2212.07677" in row.source for row in fig.rows) and "gamma" in fig.missing
    (fig,) = coverage(["gd-plus-plus"], "2212.07677", "fig. 7")
    assert not fig.rows and "hours" in fig.missing
    for line in lines:  # what is not there is said to be missing, or where it is
        assert line.rows or line.missing or line.elsewhere, line
    assert not [r for line in lines for r in line.rows if (r.kind == "remark") == bool(r.fails)]


@pytest.mark.parametrize(
    ("source", "words", "found"),
    [
        ("figs. 2 and 3a", "fig3", True),
        ("figs. 1 and 10", "fig. 10", True),
        ("figs. 1, 4 and 10", "fig. 4", True),
        ("figs. 1 and 10", "fig. 0", False),
        ("fig. 2 and appendix A.9", "fig9", False),
        ("section 4 and Prop. 2", "prop. 2", True),
    ],
)
def test_several_figures_are_cited_at_once(source, words, found):
    assert cites(f"arXiv 2212.07677, {source}", words) == found


def check(name, rows):
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        known = stated(name, row.name)
        assert known is not None, row.name
        assert (known.source, known.decided) == (row.source, isinstance(row, Measurement))
        if isinstance(row, Remark):  # nothing decides what it would assert
            assert not [word for word in ASSERTED if word in row.statement], row
        else:
            assert row.verdict and (row.published is None) == (bool(row.criterion[:3] == "at "))


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in STATED]
)
def test_what_is_measured_is_what_is_stated(name):
    check(name, [*CATALOGUE[name].measurements(True, 0)])


def test_the_kept_table_has_the_names_that_are_stated():
    rows = json.loads(KEPT.read_text())["noisy-regression"]["measurements"]
    names = {row["name"] for row in rows}
    assert len(names) > 100 and all(stated("noisy-regression", name) for name in names)


def test_the_command_measures_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("constructions.runs.fit_family", None)
    monkeypatch.setattr("probes.report.claims.measurements", None)
    file = tmp_path / "t.json"
    words = ["claims", "gradient-descent", "--table", "--paper", "2212.07677"]
    assert main([*words, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [line["item"] for line in found] == [item.item for item in ITEMS["2212.07677"]]
    out = capsys.readouterr().out
    assert "fig. 16" in out and "* training" in out
    assert main([*words, "--quick"]) == 2
    assert "--quick cannot be given with --table" in capsys.readouterr().err
    assert main([*words, "--item", "fig99"]) == 2
    assert "fig99: neither row nor item of it is known" in capsys.readouterr().err


def test_costs_are_known_beforehand(monkeypatch):
    """The kept ones are of families that there are; an item without claims needs no fit."""
    assert set(costs()) <= set(CATALOGUE)
    for parts in costs().values():
        assert set(parts) == {"claims", "claims in full", "numbers"}
        assert 0 < parts["claims"] <= parts["claims in full"] and parts["numbers"] >= 0
    kept = {"hedge": {"claims": 240.0, "claims in full": 600.0, "numbers": 30.0}}
    monkeypatch.setattr("probes.coverage.costs", lambda: kept)
    assert minutes("hedge", True) == "about 4 min of one core"  # 270 s, to even
    assert minutes("hedge", True, claims=False) == "about 30 s of one core"
    assert minutes("hedge", True, seeds=1) == "about 78 s of one core"
    told = "about 10 min of one core, and numbers not measured in full"
    assert minutes("hedge", False) == told
    assert minutes("tint", True) == "minutes not measured"
