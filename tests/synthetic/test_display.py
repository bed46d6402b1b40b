"""How objects show themselves: one look, nothing unescaped, colours of the page around it."""

from html.parser import HTMLParser

import numpy as np
import pytest

from constructions.certificate import Certificate, Error
from constructions.claims import Claim
from constructions.core.config import Config
from constructions.core.inventory import Components, Part
from constructions.measurement import Measurement
from probes.ledger import decide
from probes.probe import table
from probes.report.data import Comparison
from synthetic.display import Image, Mark, Table, Text, curve, number, settings_table, shown
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.train import Fit


class Reader(HTMLParser):
    """What a page shows, whether its elements are closed, and its alternative texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.alts: list[str] = []
        self.closed = True
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.alts.append(dict(attrs).get("alt") or "")
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.closed &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.cells.append(data)


CLAIM = Claim("a claim", "It says so.", "prediction_distance", 0.1, "<=", "a paper", catches=("x",))
FIT = Fit((), (), [{"step": 1, "loss": [2.0, 3.0]}, {"step": 9, "loss": [0.5, 0.25]}], 9,
          {"run": 1.5}, Recipe(steps=9), (0, 1))  # fmt: skip
ROW = decide(CLAIM, {"construction": 0.0, "random init": 0.9, "x": 0.01}, [0.2, 0.3])
CERTIFICATE = Certificate("C(<b>)", (Error("float32", 1e-7, 2e-7, 1e-6, "v"),), {"task": "T"})
COMPARISON = Comparison("f", "", "", {}, (0, 1), CERTIFICATE, [ROW], {}, [], {})
OBJECTS = {
    "claim": (CLAIM, ["a claim", "must reject", "random init, x"]),
    "components": (Components((Part("p", 1, 2, 1, {"mesa": 1}),)), ["non-standard", "mesa (1)"]),
    "comparison": (COMPARISON, ["0 of 1 claim holds on 2 trained models", "passed", "void"]),
    "certificate": (
        CERTIFICATE,
        ["passed", "float32", "2e-7", "C(<b>)"],
    ),
    "ledger row": (
        ROW,
        ["void", "a claim", "<= 0.1", "random init"],
    ),
    "probe result": (table("a <title>", ["c"], ["r"], [[np.nan]], "a note"), ["n/a", "a <title>"]),
    "measurement": (Measurement("m", "It is.", "fig", 1.0, 1.01), ["reproduced", "1.01"]),
    "recipe": (Recipe(steps=7), ["steps", "7", "average_tail", "none"]),
    "config": (Config(5, ()), ["width", "5"]),
    "fit": (FIT, ["seed", "0.25"]),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_show_themselves(name: str) -> None:
    shows, words = OBJECTS[name]
    page = shows._repr_html_()
    read = Reader(page)
    assert read.closed and not read.open
    text = " ".join(read.cells)
    assert [word for word in words if word not in text] == []
    assert all(read.alts), "a picture without words"
    assert page.startswith('<div class="orrery">')


def test_text_keeps_the_colour_of_the_page() -> None:
    style = shown("x").partition("</style>")[0]
    rules = [r for r in style.split("}") if "color:" in r.replace("background", "")]
    fixed = [r for r in rules if "#" in r and ".mark" not in r and "img" not in r]
    assert not fixed, "ink of its own on a page that may be dark"


def test_blocks() -> None:
    assert Mark("refuted").html() == '<span class="mark bad">refuted</span>'
    assert Text("<&").html() == "<p>&lt;&amp;</p>" and Text("").html() == ""
    assert Table((), [("a", 0.12345)]).html() == (
        "<table><tbody><tr><td>a</td><td>0.123</td></tr></tbody></table>"
    )
    assert 'alt="&quot;"' in Image(b"x", '"').html()
    assert number(1e-7) == "1e-7" and number(float("nan")) == "n/a"
    assert curve([1, 2], [[3.0, 1.0], [0.2, 0.1]], 0.1).startswith(b"\x89PNG")
    assert "none" in settings_table(Recipe())


def test_a_comparison_says_its_claims_in_text() -> None:
    assert str(COMPARISON).splitlines()[1] == "a claim: void (<= 0.1)"


def test_a_row_says_its_verdict_in_text() -> None:
    row, _ = OBJECTS["ledger row"]
    said = str(row).splitlines()
    assert said[0] == "a claim: void (<= 0.1)"
    assert "  x: 0.01" in said and "  construction: 0" in said
