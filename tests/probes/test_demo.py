"""The demonstration: a page at once, reports one by one or side by side, and going on."""

import os
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from constructions.certificate import Error
from constructions.family import Certificate
from probes.cli import main
from probes.report.commands import Demo
from probes.report.data import Comparison
from probes.report.index import Entry, Index, is_report
from probes.report.page import write_report

NAMES = ["gradient-descent", "tint", "mesa-ridge"]


def comparison(name: str, certified: bool = True) -> Comparison:
    """A comparison without sections, as quick as one can be."""
    error = Error("float64", 0.0, 1e-15 if certified else 1.0, 1e-13, "prediction")
    return Comparison(
        family=name,
        about="",
        source="",
        settings={},
        seeds=(0, 1, 2),
        certificate=Certificate(f"{name}()", (error,)),
        rows=[],
        sections={},
        measurements=[],
        reproduce={"commands": []},
    )


def said(out: Path) -> str:
    return (out / "report.html").read_text()


def test_the_page_is_first_grows_and_is_gone_on_with(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "reports"
    made: list[str] = []
    stop = {"tint"}

    def compare(_: Any, name: str, settings: Any, progress: Any, _step: Any) -> Comparison:
        page = said(out)  # there before anything is computed
        assert f"Now: {name}; this page" in page and 'http-equiv="refresh"' in page
        assert [f'href="{n}/report.html"' in page for n in NAMES] == [n in made for n in NAMES]
        progress("claims")
        if name in stop:
            raise KeyboardInterrupt
        made.append(name)
        return comparison(name, name != "mesa-ridge")

    monkeypatch.setattr("probes.report.commands.Compare.comparison", compare)
    monkeypatch.setattr("probes.report.commands.family_names", lambda _: NAMES)
    assert main(["demo", "--workers", "1", "--out", str(out)]) == 130
    written, progress = capsys.readouterr()
    assert written.splitlines()[0] == f"{out / 'report.html'} lists the reports"
    assert str(out / "gradient-descent" / "report.html") in written
    assert "[1/3] gradient-descent: claims" in progress and "to go" in progress
    page = said(out)
    assert "1 of 3 reports are there." in page and "Missing: tint, mesa-ridge." in page
    assert f"orrery demo --out {out}" in page and "refresh" not in page and "Now:" not in page
    assert 'href="gradient-descent/report.html"' in page and page.count("Not there yet") == 2

    stop.clear()
    assert main(["demo", "--workers", "1", "--out", str(out)]) == 1  # one of them is not certified
    assert made == NAMES
    assert "1 of 3 are there already: gradient-descent" in capsys.readouterr().out
    page = said(out)
    assert all(f'href="{name}/report.html"' in page for name in NAMES)
    assert "Missing" not in page and "http-equiv" not in page and "http://" not in page
    assert all(is_report(folder) for folder in (out, *(out / name for name in NAMES)))

    assert main(["demo", "--workers", "1", "--out", str(out)]) == 1
    assert made == NAMES and "--overwrite makes them anew" in capsys.readouterr().out
    (out / "tint" / "report.html").unlink()
    made.remove("tint")
    assert main(["demo", "--workers", "1", "--out", str(out)]) == 1
    assert made == ["gradient-descent", "mesa-ridge", "tint"]
    made.clear()
    assert main(["demo", "--workers", "1", "--out", str(out), "--overwrite"]) == 1
    assert made == NAMES


class InOtherProcesses(Demo):
    """A demonstration whose reports cost nothing, but for one that cannot be made."""

    def report(self, index: Index, name: str) -> Entry:
        # so that no process takes all of them; and so that one is at work when another fails
        time.sleep(4 if self.seed and name == "1" else 0.2)
        if name == str(self.seed):
            raise KeyboardInterrupt
        if name == "broken":
            raise ZeroDivisionError("float division\nby zero")
        page = write_report(comparison(name), self.out / name, overwrite=True)
        return Entry(f"made by {os.getpid()}", "good", {}, page.is_file(), 0.2)


def test_reports_are_shared_out_to_processes(tmp_path: Path, capsys: Any) -> None:
    names = ["1", "broken", "2", "3", "4"]
    index = Index(tmp_path, {name: ("", "") for name in names}, {})
    InOtherProcesses(tmp_path, workers=2).share_out(index, 2)
    assert index.missing == ["broken"]  # the others are made
    assert all((tmp_path / name / "report.html").is_file() for name in index.found)
    made_by = {entry.verdict for entry in index.found.values()}
    assert len(made_by) == 2 and f"made by {os.getpid()}" not in made_by
    said = capsys.readouterr().err
    assert "orrery: broken: ZeroDivisionError: float division by zero; orrery compare" in said
    assert "4 of 5 are there" in said
    index.found.clear()
    out = tmp_path / "ended"
    with pytest.raises(KeyboardInterrupt):
        InOtherProcesses(out, seed=2, workers=2).share_out(index, 2)
    assert not active_children() and not (out / "1").exists()  # the others are ended


@pytest.mark.parametrize("change", ["seed", "seeds", "sources", "damaged"])
def test_what_was_made_otherwise_is_made_anew(
    tmp_path: Path, monkeypatch: Any, change: str, capsys: Any
) -> None:
    made: list[str] = []

    def compare(_: Any, name: str, *__: Any) -> Comparison:
        made.append(name)
        return comparison(name)

    monkeypatch.setattr("probes.report.commands.Compare.comparison", compare)
    monkeypatch.setattr("probes.report.commands.family_names", lambda _: NAMES[:1])
    argv = ["demo", "--workers", "1", "--out", str(tmp_path / "reports")]
    assert main(argv) == main(argv) == 0 and len(made) == 1
    if change == "sources":
        monkeypatch.setattr("probes.report.commands.sources", lambda: "another version")
    elif change == "damaged":
        (tmp_path / "reports" / "report.json").write_text('{"format": "orrery-report"}')
    else:
        argv += [f"--{change}", "4"]
    assert main(argv) == 0 and len(made) == 2
