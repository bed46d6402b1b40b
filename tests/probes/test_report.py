"""The report: self-contained, every number of it that of the data, readable in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.core.canonical import canonical
from constructions.measurement import Measurement
from constructions.runs import fit_family
from probes.cli import main
from probes.ledger import decide
from probes.losses import mean_losses
from probes.report.data import Comparison, compare
from probes.report.index import is_report
from probes.report.page import render, tone, write_report
from probes.report.tables import show_ledger
from probes.style import number
from synthetic.fitting.weights_file import RunError

NAME = "gradient-descent"
SMALL = {"dim_x": 3, "num_examples": 5, "step_size": 2.0}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    run = fit_family(NAME, SMALL, seeds=[0, 1], steps=20, batch=16, chunk=10)
    family = CATALOGUE[NAME]
    commands = ["orrery compare <here>"]
    return compare(
        run,
        about=family.about,
        source=family.source,
        batch=64,
        commands=commands,
        measure=lambda: [Measurement("a level", "It is 2.", "fig. 9", 2.0, 2.5, note="It is not.")],
    )


@pytest.fixture(scope="module")
def out(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "out"
    assert write_report(comparison, path) == path / "report.html"
    return path


class Page(HTMLParser):
    """Text, elements and the embedded data of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.data, self.tags = "", "", []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.data += data
        elif self._inside != "style":
            self.text += data


def page(out: Path) -> Page:
    return Page((out / "report.html").read_text())


def test_published_numbers_stand_beside_ours(out: Path) -> None:
    found = page(out)
    for said in ("a level", "It is 2.", "fig. 9", "2.5", "differs", "It is not."):
        assert said in found.text
    (row,) = json.loads((out / "report.json").read_text())["measurements"]
    assert row["verdict"] == "differs" and row["measured"] == 2.5


def test_nothing_outside_is_asked_for(out: Path) -> None:
    found = page(out)
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, name, value)
        assert tag != "link" or attributes["href"] == "data:,"
        assert tag != "script" or attributes["type"] == "application/json"
    text = (out / "report.html").read_text()
    assert not re.search(r"@import|url\(|https?://", text)


def test_figures_have_words_beside_them(out: Path) -> None:
    images = [a for tag, a in page(out).tags if tag == "img"]
    assert len(images) == 8
    assert "yⱼ" in (images[0]["alt"] or ""), "the program comes first, as equations"
    assert all(len(a["alt"] or "") > 20 for a in images)
    assert page(out).text.count("Gauge-fixed weights") == 1
    files = sorted(p.name for p in (out / "figures").glob("*.png"))
    assert len(files) == 8
    assert all((out / "figures" / f).read_bytes().startswith(b"\x89PNG") for f in files)


def test_every_number_of_the_tables_is_on_the_page(out: Path) -> None:
    data, text = json.loads((out / "report.json").read_text()), page(out).text
    shown = [data["verdict"], str(data["settings"]["step_size"])]
    for claim in data["claims"]:
        shown += [claim["verdict"], number(claim["claim"]["threshold"])]
        shown += [number(v) for v in [*claim["values"].values(), *claim["trained"]]]
        shown += [number(v) for v in claim["interval"] or []]
    for entry in data["certificate"]["dtypes"].values():
        shown += [number(entry[n]) for n in ("max_rel_error", "max_abs_error", "tolerance")]
    shown += [str(v) for v in data["reproduce"]["recipe"].values() if v is not None]
    shown += data["reproduce"]["versions"].values()
    shown += [number(data["curves"]["optimum"], 4), number(data["curves"]["construction"], 4)]
    assert [value for value in shown if value not in text] == []
    assert len(shown) > 80


def test_page_holds_the_data_of_report_json(out: Path) -> None:
    assert json.loads(page(out).data) == json.loads((out / "report.json").read_text())


def test_verdict_comes_first_and_markup_is_escaped(comparison: Comparison, out: Path) -> None:
    text = (out / "report.html").read_text()
    assert text.index('id="verdict"') < text.index("<figure>") < text.index('id="claims"')
    assert text.index('id="claims"') < text.index('id="certificate"') < text.index('id="reproduce"')
    assert "orrery compare &lt;here&gt;" in text and "<here>" not in text


def test_sections_are_what_they_say(comparison: Comparison) -> None:
    run = fit_family(NAME, SMALL, seeds=[0, 1], steps=20, batch=16, chunk=10)
    c = run.construction
    reference = c.compile().model
    # one example after another, by the algorithm itself
    drawn = c.task.sample(jax.random.key(7), 32)
    by_hand = c.task.loss(c.trace(*drawn.inputs)["prediction"], drawn).mean()
    np.testing.assert_allclose(mean_losses(c, [reference], 7, 32), [by_hand], rtol=1e-5)
    found = {name: result.data for name, result in comparison.sections.items()}
    (built,), (trained,) = (canonical(m, c.gauge()) for m in (reference, run.models[0]))
    y, x = 3, 1
    slice_ = found["weights"][0]
    assert (slice_.rows, slice_.columns) == (["x1", "x2", "x3", "y"], ["x1", "x2", "x3"])
    np.testing.assert_allclose(slice_.construction, built[0, y], rtol=1e-6)
    np.testing.assert_allclose(slice_.trained, trained[0, y], rtol=1e-4, atol=1e-7)
    # W_1 x = (eta / N) sum_i y_i x_i . x, and T is symmetric in its two middle axes
    expected = c.step_size / c.num_examples / 2  # type: ignore[attr-defined]
    assert slice_.construction[x][x] == pytest.approx(expected)
    deep = CATALOGUE[NAME](**SMALL, dim_y=1, steps=5)
    drawn = c.task.sample(jax.random.key(0), 1024)
    losses = c.task.loss(deep.trace(*drawn.inputs)["prediction"], drawn).mean()
    assert found["roll_out"].construction[0][5] == pytest.approx(float(losses), rel=1e-4)


def test_verdict_counts(comparison: Comparison) -> None:
    import dataclasses

    claim = comparison.rows[0].claim
    values = {name: 0.0 if name == "construction" else 1.0 for name in comparison.rows[0].values}
    good, bad = decide(claim, values, [0.0, 0.0]), decide(claim, values, [0.0, 1.0])
    two = dataclasses.replace(comparison, rows=[good, bad])
    assert two.verdict.startswith("1 of 2 claims hold on 2 trained models")
    assert "1 of 2 trained models fail" in render(two, [])
    assert two.counts == {"holds": 1, "refuted": 1, "void": 0, "not applicable": 0}
    other = decide(claim, values, [np.nan] * 2, {f"trained {n}": "it is softmax" for n in (0, 1)})
    for rows, said, mark in (
        ([good], "1 of 1 claim holds on 2 trained models;", "good"),
        ([good, other], "1 of 1 claim holds on 2 trained models, 1 not applicable", "good"),
        ([good, bad, other], "1 of 2 claims hold on 2 trained models, 1 not applicable", "mixed"),
        ([other], "None of 1 claims is applicable; 2 trained models fitted, with losses", "none"),
        ([], "Nothing was claimed at these settings; 2 trained models fitted, with losses", "none"),
    ):
        shown = dataclasses.replace(comparison, rows=rows)
        assert shown.verdict.startswith(said)
        assert tone(shown) == mark
        assert f'class="verdict {mark}"' in render(shown, [])
        if other in rows:
            assert "</b>: it is softmax." in render(shown, [])
    curves = comparison.sections["curves"].data
    apart = sorted(100 * abs(a / curves.construction - 1) for a in curves.trained)
    silent = dataclasses.replace(comparison, rows=[]).verdict
    assert (
        f"with losses {number(apart[0])} to {number(apart[1])} % from the construction's" in silent
    )
    wrong = dataclasses.replace(comparison.certificate.errors[0], max_rel_error=1.0)
    failed = dataclasses.replace(comparison.certificate, errors=(wrong,))
    assert tone(dataclasses.replace(comparison, rows=[good], certificate=failed)) == "mixed"


def test_exit_status_is_the_certificates(
    comparison: Comparison, tmp_path: Path, monkeypatch: Any
) -> None:
    """Refuted claims are a result; a construction that is not its algorithm is a failure."""
    import dataclasses

    wrong = dataclasses.replace(comparison.certificate.errors[0], max_rel_error=1.0)
    failed = dataclasses.replace(comparison.certificate, errors=(wrong,))
    monkeypatch.setattr("probes.report.page.pictures", lambda _: [])
    for certificate, status in ((comparison.certificate, 0), (failed, 1)):
        shown = dataclasses.replace(comparison, certificate=certificate)
        monkeypatch.setattr("probes.report.commands.Compare.comparison", lambda *_, c=shown: c)
        assert main(["compare", NAME, "--out", str(tmp_path / str(status))]) == status


def test_printed_ledger_says_what_was_not_decided(comparison: Comparison, capsys: Any) -> None:
    claim = comparison.rows[0].claim
    values = dict.fromkeys(comparison.rows[0].values, 1.0) | {"construction": 0.0}
    show_ledger(NAME, [decide(claim, values, [np.nan], {"trained 0": "it is softmax"})])
    said = capsys.readouterr().out
    assert f"not applicable: {claim.name}: it is softmax" in said
    show_ledger(NAME, [decide(claim, values, [2.0], note="The sign?")])
    assert "note: The sign?" in capsys.readouterr().out
    show_ledger(NAME, [])
    assert f"{NAME}: nothing is claimed at these settings" in capsys.readouterr().out


def test_directories_are_not_clobbered(comparison: Comparison, out: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="exists and is not empty"):
        write_report(comparison, out)
    write_report(comparison, out, overwrite=True)
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(RunError, match="holds no report"):
        write_report(comparison, tmp_path, overwrite=True)
    assert is_report(out) and not is_report(tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_renders_in_a_browser(out: Path, tmp_path: Path) -> None:
    from PIL import Image

    def browse(*options: str) -> str:
        command = [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
            *options,
            (out / "report.html").as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    dom = Page(browse("--dump-dom"))
    assert json.loads((out / "report.json").read_text())["verdict"] in dom.text
    for width in (1200, 400):
        shot = tmp_path / f"{width}.png"
        browse(f"--window-size={width},4000", f"--screenshot={shot}")
        with Image.open(shot) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] >= width
        # text and figures on white: neither blank nor dark, all the way down
        for part in np.array_split(pixels, 4):
            assert 0.6 < (part > 200).mean() < 0.999
    dark = tmp_path / "dark.png"
    style = "--blink-settings=preferredColorScheme=0"
    browse("--window-size=1200,500", f"--screenshot={dark}", style)
    with Image.open(dark) as image:
        assert (np.asarray(image.convert("L")) < 80).mean() > 0.6


@pytest.mark.slow
def test_demo_makes_an_index_and_may_be_repeated(
    tmp_path: Path, monkeypatch: Any, comparison: Comparison, capsys: Any
) -> None:
    monkeypatch.setattr("probes.report.commands.Compare.comparison", lambda *_: comparison)
    monkeypatch.setattr("probes.report.commands.family_names", lambda _: [comparison.family])
    for _ in range(2):
        assert main(["demo", "--workers", "1", "--out", str(tmp_path / "reports")]) == 0
        assert str(tmp_path / "reports" / "report.html") in capsys.readouterr().out
    index = (tmp_path / "reports" / "report.html").read_text()
    assert f'href="{comparison.family}/report.html"' in index
    assert is_report(tmp_path / "reports" / comparison.family)
    assert comparison.verdict in Page(index).text
    assert not re.search(r"https?://", index)
