"""A program as a picture: slots as lanes, layers from left to right, heads between the lanes.

Every head is a numbered node: thin lines come from the lanes that it reads (q, k, v: as query, key
or value; f: as a factor), arrows lead to the lanes that it writes. Its colour is its mixer. Below
stands the equation of each number. What repeats is drawn once; see `constructions.core.folding`.

All text has one size: the picture is `WIDTH` inches wide, or less where that is enough, and as high
as it needs to be, so that at 1,200 pixels the smallest letters are 9 pixels high or more.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constructions.core.folding import Folded, Item, Lane, Stage, folded, headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, NARROW = 12.0, 7.0  # inches, at most and at least
LEFT, RIGHT = 2.3, 2.2  # of names, and of what they mean
PITCH = 0.44  # between lanes
STEP, CLOSE, MANY = 0.92, 0.74, 14  # between heads, and where they are more than so many
REACH, RADIUS = 0.3, 0.115  # from a node to its ends, and of a node
SMALL, NORMAL, LARGE = 6.6, 8.0, 11.0  # points
DPI = 160
SUFFIXES = (".svg", ".png")

INK, MUTED, RULE, BAND = "#16202c", "#5b6675", "#c9d0d8", "#f4f6f8"
# Okabe and Ito's palette, told apart by colour-blind readers
COLOURS = {
    "linear": "#0072B2",
    "softmax": "#D55E00",
    "mesa": "#009E73",
    "transposed_softmax": "#CC79A7",
    "MLP": "#4b5563",
    "norm": "#8a6d00",
}
OTHER = "#56B4E9"
LETTERS = {"q": "query", "k": "key", "v": "value", "f": "factor", "h": "hidden", "g": "gate"}
#: What a node is called in the key.
KINDS = {
    "linear": "linear attention",
    "softmax": "softmax attention",
    "mesa": "mesa attention",
    "transposed_softmax": "softmax over queries",
}


@dataclass(frozen=True)
class Drawing:
    """A picture of a program, which shows itself in a notebook.

    Attributes:
        figure: matplotlib's.
        alt: what is to be seen, for readers who do not see it.
    """

    figure: Figure
    alt: str

    def save(self, out: str | PathLike[str]) -> Path:
        """Write it; ValueError unless the suffix is one of `SUFFIXES`."""
        path = Path(out)
        path.write_bytes(self.svg if check_suffix(path) == ".svg" else self.png)
        return path

    def _bytes(self, kind: str) -> bytes:
        import matplotlib

        buffer = io.BytesIO()
        # no date and no version inside: the same program gives the same bytes
        nothing = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        with matplotlib.rc_context({"svg.hashsalt": "orrery", "font.family": "DejaVu Sans"}):
            self.figure.savefig(buffer, format=kind, dpi=DPI, metadata=nothing)
        return buffer.getvalue()

    @cached_property
    def svg(self) -> bytes:
        """The picture as SVG."""
        return self._bytes("svg")

    @cached_property
    def png(self) -> bytes:
        """The picture as PNG."""
        return self._bytes("png")

    def _repr_png_(self) -> bytes:
        return self.png


def check_suffix(out: str | PathLike[str]) -> str:
    """The suffix of a picture's file; ValueError unless it is one of `SUFFIXES`."""
    suffix = Path(out).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{out}: a picture ends in {' or '.join(SUFFIXES)}, not {suffix!r}")
    return suffix


@lru_cache(maxsize=2)
def _advances(bold: bool) -> dict[str, float]:
    """Widths of letters in ems, filled as they are asked for."""
    return {}


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Of a line of text, in inches."""
    known = _advances(bold)
    if missing := set(text) - set(known):
        from matplotlib.font_manager import FontProperties, findfont, get_font

        weight = "bold" if bold else "normal"
        font = get_font(findfont(FontProperties(family="DejaVu Sans", weight=weight)))
        font.set_size(64, 72)
        known |= {a: font.load_char(ord(a)).linearHoriAdvance / 2**16 / 64 for a in missing}
    return sum(known[letter] for letter in text) * size / 72


def wrapped(text: str, size: float, width: float, most: int = 99, bold: bool = False) -> list[str]:
    """A text in lines of so many inches, at most so many of them; a word may be wider."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, bold) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while text_width(f"{last}…", size, bold) > width and len(last) > 1:
        last = last[:-1]
    return [*lines[: most - 1], f"{last.rstrip(' ,;')}…"]


@dataclass(frozen=True)
class _System:
    """Stages beside each other, as many as the page is wide, and the lanes that they use."""

    stages: list[tuple[int, Stage, float, float]]  # number, stage, left and right edge
    lanes: list[str]
    header: int  # lines


class _Page:
    """Draws from the top down; inches, y grows upwards from the lower edge."""

    def __init__(self, program: Any, found: Folded, name: str) -> None:
        self.found = found
        self.title = headline(program, name)
        meanings = [bool(lane.meaning) for lane in found.lanes.values()]
        beside = RIGHT if 3 * sum(meanings) > len(meanings) else 0.25
        self.step = CLOSE if len(found.items) > MANY else STEP
        self.kinds = {i.kind: KINDS.get(i.kind, i.kind) for i in found.items}
        roles = {role for item in found.items for part in item.parts for _, role in part.reads}
        letters = [f"{a} {b}" for a, b in LETTERS.items() if a in roles]
        self.letters = f"reads as {', '.join(letters)}" if letters else ""
        names = max(text_width(item.name, NORMAL) for item in found.items)
        self.margin = 0.52 + min(names, 2.4) + 0.3
        equations = max(text_width(e, NORMAL) for item in found.items for e in item.equations)
        keys = [text_width(said, SMALL) + 0.52 for said in (*self.kinds.values(), self.letters)]
        needs = (
            LEFT + 1.5 * sum(map(self.stage_width, found.stages)) + beside,
            self.margin + equations + 0.25,
            text_width(self.title, LARGE, True) + 0.4,
            sum(keys) + 0.3,
        )
        self.width = min(max(*needs, NARROW), WIDTH)
        self.right = self.width - beside
        self.systems = list(self._systems())
        self.lines = [(item, *self._lines(item)) for item in found.items]

    def _systems(self) -> Iterator[_System]:
        row: list[tuple[int, Stage, float, float]] = []
        x = LEFT
        for number, stage in enumerate(self.found.stages):
            width = self.stage_width(stage)
            if row and x + width > self.right:
                yield self._system(row)
                row, x = [], LEFT
            row.append((number, stage, x, x + width))
            x += width
        if row:
            yield self._system(row)

    def stage_width(self, stage: Stage) -> float:
        """The least that its heads and its title take."""
        words = max(text_width(word, SMALL, True) for word in stage.title.split())
        return max(self.step * len(stage.items) + 0.12, words + 0.15)

    def _system(self, row: list[tuple[int, Stage, float, float]]) -> _System:
        stretch = min((self.right - LEFT) / (row[-1][3] - LEFT), 2.4)  # use the room that is left
        row = [
            (n, stage, LEFT + (a - LEFT) * stretch, LEFT + (b - LEFT) * stretch)
            for n, stage, a, b in row
        ]
        used = {
            self.found.lane(slot)
            for _, stage, *_ in row
            for item in stage.items
            for part in item.parts
            for slot in (*part.writes, *(s for s, _ in part.reads))
        }
        whole = not self.found.folds
        lanes = [key for key in self.found.lanes if whole or key in used]
        header = max(len(wrapped(s.title, SMALL, b - a - 0.1, 6, True)) for _, s, a, b in row)
        return _System(row, lanes, header)

    def _lines(self, item: Item) -> tuple[list[str], list[str]]:
        """The equations of an item, wrapped, and what stands below them."""
        width = self.width - self.margin - 0.2
        rows = [w for e in item.equations for w in wrapped(e, NORMAL, width)]
        return rows, wrapped(item.where, SMALL, width)

    def height(self, system: _System) -> float:
        """Of a system."""
        return 0.16 * system.header + 0.2 + PITCH * len(system.lanes) + 0.16

    def total(self) -> float:
        """Height of the page."""
        below = sum(self._item_height(rows, where) for _, rows, where in self.lines)
        return 0.75 + sum(self.height(s) + 0.15 for s in self.systems) + 0.25 + below + 0.15

    @staticmethod
    def _item_height(rows: list[str], where: list[str]) -> float:
        return max(0.175 * len(rows) + 0.145 * len(where), 0.31) + 0.09

    def draw(self) -> Figure:
        """The whole picture."""
        from matplotlib.figure import Figure

        total = self.total()
        figure = Figure(figsize=(self.width, total), facecolor="white")
        self.axis = figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, self.width), ylim=(0, total))
        self.axis.axis("off")
        y = total - 0.28
        self.text(0.2, y, self.title, LARGE, weight="bold")
        self.key(y - 0.3)
        y = total - 0.75
        for system in self.systems:
            self.system(system, y)
            y -= self.height(system) + 0.15
        self.equations(y - 0.1)
        return figure

    def text(self, x: float, y: float, text: str, size: float, **options: Any) -> None:
        """A text; $ is an ordinary letter."""
        options = {"color": INK, "va": "center", "ha": "left", "zorder": 5} | options
        self.axis.text(x, y, text, fontsize=size, parse_math=False, family="DejaVu Sans", **options)

    def node(self, x: float, y: float, kind: str, number: str) -> None:
        """A head as a circle, an MLP as a square, a norm as a diamond."""
        from matplotlib.patches import Circle, FancyBboxPatch, RegularPolygon

        colour = COLOURS.get(kind, OTHER)
        style: Any = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.8, "zorder": 4}
        if kind == "MLP":
            r = RADIUS * 0.86
            box = "round,pad=0,rounding_size=0.03"
            self.axis.add_patch(FancyBboxPatch((x - r, y - r), 2 * r, 2 * r, box, **style))
        elif kind == "norm":
            self.axis.add_patch(RegularPolygon((x, y), 4, radius=RADIUS * 1.25, **style))
        else:
            self.axis.add_patch(Circle((x, y), RADIUS, **style))
        self.text(x, y - 0.004, number, SMALL, color="white", ha="center", weight="bold")

    def key(self, y: float) -> None:
        """What colours, shapes and letters mean."""
        x = 0.32
        for kind, said in self.kinds.items():
            self.node(x, y, kind, "")
            self.text(x + 0.17, y, said, SMALL, color=MUTED)
            x += text_width(said, SMALL) + 0.52
        self.text(x, y, self.letters, SMALL, color=MUTED)

    def system(self, system: _System, top: float) -> None:
        """Lanes, stages and nodes."""
        first = top - 0.16 * system.header - 0.2 - PITCH / 2
        places = {key: first - PITCH * n for n, key in enumerate(system.lanes)}
        bottom = first - PITCH * len(places) + PITCH / 2
        start, end = system.stages[0][2], system.stages[-1][3]
        for position, (_, stage, a, b) in enumerate(system.stages):
            self.axis.fill_between(
                [a, b], bottom, top, color=BAND if position % 2 == 0 else "white", lw=0, zorder=0
            )
            lines = wrapped(stage.title, SMALL, b - a - 0.1, 6, True)
            for n, line in enumerate(lines):
                y = top - 0.13 - 0.16 * n
                self.text((a + b) / 2, y, line, SMALL, weight="bold", ha="center")
        numbers = [n for n, *_ in system.stages]
        for key, y in places.items():
            self.lane(self.found.lanes[key], y, (start, end), (numbers[0], system))
        for _, stage, a, b in system.stages:
            step = (b - a) / len(stage.items)
            for n, item in enumerate(stage.items):
                self.item(item, a + step * (n + 0.5), places)

    def lane(
        self, lane: Lane, y: float, ends: tuple[float, float], place: tuple[int, _System]
    ) -> None:
        """A line from where the slot is born on, its name, and what it means."""
        start, end = ends
        born = start
        if lane.first is not None:
            edges = {n: a for n, _, a, _ in place[1].stages}
            last = place[1].stages[-1][0]
            born = edges.get(lane.first, start if lane.first < place[0] else end)
            born = end if lane.first > last else born
            self.axis.plot([start, born], [y, y], color=RULE, lw=0.8, ls=(0, (1, 3)), zorder=1)
        self.axis.plot([born, end], [y, y], color=RULE, lw=1.6, zorder=1)
        room = LEFT - 0.35
        name = wrapped(lane.name, NORMAL, room, 1, True)[0]
        self.text(LEFT - 0.12, y + 0.075, name, NORMAL, weight="bold", ha="right")
        facts = wrapped(f"{lane.size}; {lane.groups}", SMALL, room, 1)[0]
        self.text(LEFT - 0.12, y - 0.085, facts, SMALL, color=MUTED, ha="right")
        room = self.width - self.right - 0.2
        said = wrapped(lane.meaning, SMALL, room, 2) if room > 1 else []
        for n, line in enumerate(said):
            self.text(end + 0.1, y + 0.07 * (len(said) - 1) - 0.14 * n, line, SMALL, color=MUTED)

    def item(self, item: Item, x: float, places: dict[str, float]) -> None:
        """A node, lines from what it reads, arrows to what it writes."""
        from matplotlib.patches import FancyArrowPatch

        read: dict[str, list[str]] = {}
        write: dict[str, None] = {}
        for part in item.parts:
            for slot, role in part.reads:
                roles = read.setdefault(self.found.lane(slot), [])
                roles += [role] if role not in roles else []
            write |= dict.fromkeys(self.found.lane(slot) for slot in part.writes)
        touched = [places[key] for key in (*read, *write)]
        middle = sum(touched) / len(touched)
        first = max(places.values())
        # half-way between two lanes, where no line runs through the number
        row = min(max(round((first - middle) / PITCH - 0.5), 0), max(len(places) - 2, 0))
        y = first - PITCH * (row + 0.5)
        colour = COLOURS.get(item.kind, OTHER)
        curve: Any = {"color": colour, "lw": 1.1, "zorder": 2, "shrinkA": 0, "shrinkB": 0}
        for key, roles in read.items():
            at = places[key]
            self.axis.plot([x - REACH], [at], "o", ms=3.4, color=colour, zorder=3)
            path = FancyArrowPatch(
                (x - REACH, at), (x, y), arrowstyle="-", alpha=0.75, **curve,
                connectionstyle=f"arc3,rad={-0.12 if at > y else 0.12}",
            )  # fmt: skip
            self.axis.add_patch(path)
            letters = "".join(r for r in "qkvfhg" if r in roles)
            if letters:
                self.text(x - REACH - 0.03, at + 0.085, letters, SMALL, color=colour, ha="right")
        for key in write:
            path = FancyArrowPatch(
                (x, y), (x + REACH, places[key]), arrowstyle="-|>", mutation_scale=9, **curve,
                connectionstyle=f"arc3,rad={0.18 if places[key] > y else -0.18}",
            )  # fmt: skip
            self.axis.add_patch(path)
        self.node(x, y, item.kind, str(item.number))

    def equations(self, y: float) -> None:
        """The equation of every number."""
        for item, rows, where in self.lines:
            self.node(0.32, y - 0.04, item.kind, str(item.number))
            for n, line in enumerate(wrapped(item.name, NORMAL, 2.4, 2)):
                self.text(0.52, y - 0.04 - 0.15 * n, line, NORMAL, color=MUTED)
            at = y - 0.04
            for line in rows:
                self.text(self.margin, at, line, NORMAL)
                at -= 0.175
            for line in where:
                self.text(self.margin, at, line, SMALL, color=MUTED)
                at -= 0.145
            y -= self._item_height(rows, where)


def draw(program: Any, name: str = "") -> Drawing:
    """The picture of a program."""
    found = folded(program)
    page = _Page(program, found, name)
    said = "; ".join(f"{i.number} {i.name}: {', '.join(i.equations)}" for i in found.items)
    lanes = ", ".join(lane.name for lane in found.lanes.values())
    alt = f"{page.title}. Lanes: {lanes}. Nodes, from left to right: {said}."
    return Drawing(page.draw(), alt)
