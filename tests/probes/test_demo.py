"""The demonstration: a page at once, one report after the other, and going on after a stop."""

from pathlib import Path
from typing import Any

import pytest

from constructions.certificate import Error
from constructions.family import Certificate
from probes.cli import main
from probes.report.data import Comparison
from probes.report.index import is_report

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

    def compare(_: Any, name: str, settings: Any, progress: Any) -> Comparison:
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
    assert main(["demo", "--out", str(out)]) == 130
    written, progress = capsys.readouterr()
    assert written.splitlines()[0] == f"{out / 'report.html'} lists the reports"
    assert str(out / "gradient-descent" / "report.html") in written
    assert "[1/3] gradient-descent: claims" in progress and "to go" in progress
    page = said(out)
    assert "1 of 3 reports are there." in page and "Missing: tint, mesa-ridge." in page
    assert f"orrery demo --out {out}" in page and "refresh" not in page and "Now:" not in page
    assert 'href="gradient-descent/report.html"' in page and page.count("Not there yet") == 2

    stop.clear()
    assert main(["demo", "--out", str(out)]) == 1  # one of them is not certified
    assert made == NAMES
    assert "1 of 3 are there already: gradient-descent" in capsys.readouterr().out
    page = said(out)
    assert all(f'href="{name}/report.html"' in page for name in NAMES)
    assert "Missing" not in page and "http-equiv" not in page and "http://" not in page
    assert all(is_report(folder) for folder in (out, *(out / name for name in NAMES)))

    assert main(["demo", "--out", str(out)]) == 1
    assert made == NAMES and "--overwrite makes them anew" in capsys.readouterr().out
    (out / "tint" / "report.html").unlink()
    made.remove("tint")
    assert main(["demo", "--out", str(out)]) == 1
    assert made == ["gradient-descent", "mesa-ridge", "tint"]
    made.clear()
    assert main(["demo", "--out", str(out), "--overwrite"]) == 1
    assert made == NAMES


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
    argv = ["demo", "--out", str(tmp_path / "reports")]
    assert main(argv) == main(argv) == 0 and len(made) == 1
    if change == "sources":
        monkeypatch.setattr("probes.report.commands.sources", lambda: "another version")
    elif change == "damaged":
        (tmp_path / "reports" / "report.json").write_text('{"format": "orrery-report"}')
    else:
        argv += [f"--{change}", "4"]
    assert main(argv) == 0 and len(made) == 2
