"""Programs as equations and pictures: right against the arrays, and legible for every family."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from constructions import CATALOGUE
from constructions.core.equations import merged, of_head, of_mlp, skeleton
from constructions.core.folding import folded
from constructions.core.picture import WIDTH, draw, wrapped
from constructions.core.program import CAUSAL, SELF, Head, HeadFamily, Layer, Mlp, Norm, Program
from constructions.core.slots import Slots, concatenate, constant
from constructions.runs import construct
from probes.cli import main

ACROSS = 1200  # pixels at which a picture must be legible
LEAST = 8  # pixels of the smallest letters


def texts(figure: Figure, dpi: float) -> Iterator[tuple[Text, Bbox]]:
    """Every text that is drawn, and its box in pixels."""
    figure.set_dpi(dpi)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text.get_visible() and text.get_text():
            yield text, text.get_window_extent(renderer)


def flaws(figure: Figure) -> list[str]:
    """Texts that overlap, leave the page or are too small, at 1,200 pixels."""
    dpi = ACROSS / figure.get_size_inches()[0]
    page = Bbox([[0, 0], [ACROSS, figure.get_size_inches()[1] * dpi]])
    found = []
    shown = list(texts(figure, dpi))
    for n, (text, box) in enumerate(shown):
        if text.get_fontsize() / 72 * dpi < LEAST:
            found.append(f"{text.get_text()!r} is small")
        if not (page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 <= box.y1 <= page.y1):
            found.append(f"{text.get_text()!r} is cut off")
        for other, second in shown[n + 1 :]:
            both = Bbox.intersection(box, second)
            if both is not None and both.width > 0.5 and both.height > 0.5:
                found.append(f"{text.get_text()!r} overlaps {other.get_text()!r}")
    return found


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_pictures_of_the_catalogue_are_legible(name: str) -> None:
    program = construct(name).program
    drawing = draw(program, name)
    assert flaws(drawing.figure) == []
    found = folded(program)
    shown = {text.get_text() for text in drawing.figure.findobj(Text)}
    assert {str(item.number) for item in found.items} <= shown
    assert all(item.equations[0] in drawing.alt for item in found.items)
    # nothing is lost by folding
    heads = sum(len(layer.single_heads) for layer in program.layers)
    assert sum(item.heads for item in found.items) == heads
    assert sorted(n for s in found.stages for n in s.layers) == [
        n + 1 for n in range(len(program.layers))
    ]


def test_flaws_are_found() -> None:
    def figure(*places: tuple[float, float, float]) -> Figure:
        made = Figure(figsize=(WIDTH, 2))
        for x, y, size in places:
            made.text(x, y, "words", fontsize=size)
        return made

    assert flaws(figure((0.1, 0.1, 8), (0.1, 0.6, 8))) == []
    assert flaws(figure((0.1, 0.1, 8), (0.11, 0.12, 8))) == ["'words' overlaps 'words'"]
    assert flaws(figure((0.99, 0.1, 8))) == ["'words' is cut off"]
    assert flaws(figure((0.1, 0.1, 5))) == ["'words' is small"]


def test_equations_say_what_heads_do() -> None:
    slots = Slots()
    x, y = slots.add("x", 3), slots.add("y", 1)
    z = slots.add("z", 3)
    w = np.array([[1.0, 2.0, 3.0]])

    def said(*arguments: object, **options: object) -> tuple[str, ...]:
        return of_head(Head(*arguments, **options)).equations  # type: ignore[arg-type]

    assert said(x, x, w @ x - y, {y: 0.5}) == ("y += 0.5 Σⱼ (xᵢ·xⱼ) (M xⱼ − yⱼ)",)
    assert said(x, x, -y, {y: 0.5}) == ("y += −0.5 Σⱼ (xᵢ·xⱼ) yⱼ",)
    one = constant(1.0)
    assert said(one, one, -x, {x: 1.0}, window=SELF) == ("x += −xᵢ",)
    assert said(one, one, x, {z: 1.0}, "softmax") == ("z += meanⱼ xⱼ",)
    assert said(x, z, y, {y: 1.0}, "softmax", scale=2.0) == ("y += Σⱼ softmaxⱼ(2 xᵢ·zⱼ) yⱼ",)
    assert said(x, z, y, {y: 1.0}, "transposed_softmax") == ("y += Σⱼ softmaxᵢ(xᵢ·zⱼ) yⱼ",)
    assert said(one, one, one, {y: 1.0}) == ("y += Σⱼ 1",)
    assert said(2 * x, -1.5 * x, y, {y: 1.0}) == ("y += −3 Σⱼ (xᵢ·xⱼ) yⱼ",)
    both = concatenate(x, y)
    to_z, to_y = np.split(np.eye(4), [3])
    assert said(x, x, both, {z: 2 * to_z, y: -to_y}) == (
        "z += 2 Σⱼ (xᵢ·xⱼ) xⱼ",
        "y += −Σⱼ (xᵢ·xⱼ) yⱼ",
    )
    assert said(x, x, x[0:1], {z[1:2]: 1.0}) == ("z[1:2] += Σⱼ (xᵢ·xⱼ) x[0:1]ⱼ",)
    assert said(both, concatenate(z, one), y, {y: 1.0}) == ("y += Σⱼ ((xᵢ; yᵢ)·(zⱼ; 1)) yⱼ",)
    assert said(x, x, y, {y: 1.0}, factor=(one, y)) == ("y += Σⱼ (xᵢ·xⱼ) (yⱼ) yⱼ",)
    mesa = Head(x, z, y, {y: 1.0}, "mesa", window=CAUSAL, regularization=0.1, queries="a")
    assert of_head(mesa).equations == ("y += ridge regression of yⱼ on zⱼ, λ = 0.1, at xᵢ",)
    assert of_head(mesa).where == "i in a; j ≤ i"
    family = HeadFamily([(x, z, np.ones((1, 3, 3)))], y, window=(2, 2))
    assert of_head(family).equations == ("y += xᵢ T zⱼ",)
    assert of_head(family).where == "j = i + 2"
    mlp = Mlp(w @ x + 1.0, {y: -1.0}, gate=y, activation="relu")
    assert of_mlp(mlp).equations == ("y += −relu(M x + 1) ⊙ y",)
    mlp = Mlp(x, {y: w}, gate=x, activation="identity")
    assert of_mlp(mlp).equations == ("y += M (x ⊙ x)",)


def test_what_repeats_is_shown_once() -> None:
    slots = Slots()
    x, y = slots.add("x", 3), slots.add("y", 1, accumulates=True)

    def step(rate: float) -> Layer:
        return Layer([Head(x, x, -y, {y: rate}, keys="context")])

    program = Program(slots, [step(0.5), step(0.25), step(0.125)], token_groups=("context", "q"))
    (stage,) = folded(program).stages
    assert stage.title == "layers 1…3"
    assert stage.items[0].equations == ["y += −0.5…−0.125 Σⱼ (xᵢ·xⱼ) yⱼ"]
    said = program.equations("descent")
    assert said.splitlines()[0] == "descent: 3 layers, 3 heads, 4 columns"
    assert "j in context" in said
    other = Layer([Head(x, x, y, {y: 1.0}, "softmax")])
    mixed = Program(slots, [step(0.5), other, step(0.5)], token_groups=("context", "q"))
    assert [stage.title for stage in folded(mixed).stages] == ["layer 1", "layer 2", "layer 3"]


def test_texts_that_differ_in_numbers_are_one() -> None:
    assert merged(["inside 2", "inside 10", "inside 3"]) == "inside 2…10"
    assert merged(["inside 2…4", "inside 3…9"]) == "inside 2…9"
    assert merged(["inside 2", "outside 2"]) == "inside 2"
    assert skeleton("row 0 of 4, part 2") == skeleton("row 3 of 16, part 1")
    assert wrapped("a b c d", 8.0, 0.01)[0] == "a"


def test_a_picture_is_written_by_its_suffix(tmp_path: Path) -> None:
    slots = Slots()
    x, y = slots.add("x", 2), slots.add("y", 2, born=1)
    program = Program(slots, [Layer([], norm=Norm(x, y))])
    drawing = program.draw(tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_bytes().startswith(b"<?xml")
    assert program.draw().svg == drawing.svg, "the same program gives the same bytes"
    program.draw(tmp_path / "p.PNG")
    assert (tmp_path / "p.PNG").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"p\.pdf: a picture ends in \.svg or \.png, not '\.pdf'"):
        program.draw(tmp_path / "p.pdf")
    assert 'alt="program: 1 layer, 0 heads, 4 columns' in program._repr_html_()


def test_the_command_shows_equations_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.svg"
    command = ["show", "gradient-descent", "--set", "step_size=0.5", "--out", str(out)]
    assert main(command) == 0
    assert "y += −0.05 Σⱼ (xᵢ·xⱼ) yⱼ" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"<?xml")
    assert main(command) == 2
    assert "p.svg" in capsys.readouterr().err
    assert main(["show", "gradient-descent", "--out", str(tmp_path / "p.jpg")]) == 2
    assert "a picture ends in .svg or .png, not '.jpg'" in capsys.readouterr().err
