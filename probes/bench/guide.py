"""Tables of README and documentation that follow from a kept card.

    python benchmarks/report_card.py --out DIR --save

measures and keeps `benchmarks/results/bench_cpu.json`, and writes the tables between the markers of
`MARKED`; a test holds both to what `tables` makes of the kept card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probes.bench.disguises import DISGUISES
from probes.bench.methods import METHODS
from synthetic.files import read_text

#: Files with a table, and which.
MARKED = {"README.md": "short", "docs/probes.md": "long"}
BEGIN, END = "<!-- of the report card -->\n", "<!-- end of the report card -->\n"
ASKED = {"heads": "heads", "sites": "values", "edges": "edges"}
BASELINES = ("weights", "chance", "true subspace")


def worst(card: dict[str, Any], method: str, task: str) -> tuple[str, float, float] | None:
    """The disguise in which a method does worst, its mean precision there, and chance's.

    Worst is by what chance leaves open, (precision - chance) / (1 - chance). None where the card
    has nothing of it.
    """
    row, chance = card["tables"][task].get(method, {}), card["tables"][task]["expected of chance"]
    found = [
        (d, row[d]["mean"], chance[d]["mean"])
        for d in card["disguises"]
        if row.get(d) is not None and chance.get(d) is not None and chance[d]["mean"] < 0.999
    ]
    return min(found, key=lambda f: (f[1] - f[2]) / (1 - f[2])) if found else None


def _mean(card: dict[str, Any], method: str, task: str, disguise: str) -> str:
    cell = card["tables"][task].get(method, {}).get(disguise)
    return "" if cell is None else f"{cell['mean']:.2f}"


def _asked(card: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m, t) for m in METHODS for t in ASKED if m in card["tables"][t]]


def short(card: dict[str, Any]) -> str:
    """Method, what it finds of bare constructions, and where it misleads most."""
    lines = [
        "| method | asked for | bare | misleads most in | there | chance |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        tasks = [t for m, t in _asked(card) if m == method]
        found = [(f, t) for t in tasks if (f := worst(card, method, t)) is not None]
        if method in BASELINES or not found:
            continue
        (disguise, mean, chance), task = min(
            found, key=lambda f: (f[0][1] - f[0][2]) / (1 - f[0][2])
        )
        bare = _mean(card, method, task, "bare")
        name = f"`{disguise}`"
        lines.append(f"| {method} | {ASKED[task]} | {bare} | {name} | {mean:.2f} | {chance:.2f} |")
    return "\n".join([
        f"Average precisions over {_subjects(card)}; 1 is a perfect order.", "", *lines, ""
    ])  # fmt: skip


def _subjects(card: dict[str, Any]) -> str:
    return "{subjects} subjects of {families} families".format(**card)


def long(card: dict[str, Any]) -> str:
    """All methods and what is asked of them, with the reason, and the findings."""
    lines = [
        f"Measured on {_subjects(card)} "
        f"({', '.join(f'{name}: {sum(n.values())}' for name, n in card['measured'].items())}):",
        "",
        "| method | asked for | bare | misleads most in | there | chance | because |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, task in _asked(card):
        found = worst(card, method, task)
        if found is None:
            continue
        disguise, mean, chance = found
        bare, why = _mean(card, method, task, "bare"), METHODS[method].fails
        at = f"`{disguise}` | {mean:.2f} | {chance:.2f}"
        lines.append(f"| {method} | {ASKED[task]} | {bare} | {at} | {why} |")
    lines += ["", "Findings of others, with their numbers here:", ""]
    lines += [f"- {title}: {text}" for title, text in card["findings"]]
    for disguise, values in card["stated"].items():
        means = ", ".join(f"{name} {value['mean']:.2g}" for name, value in values.items())
        lines.append(
            f"- subjects that are `{disguise}` ({DISGUISES[disguise]}): {means} on average"
        )
    return "\n".join([*lines, ""])


def tables(card: dict[str, Any]) -> dict[str, str]:
    """The text between the markers, by file."""
    return {file: {"short": short, "long": long}[kind](card) for file, kind in MARKED.items()}


def between(text: str) -> tuple[str, str, str]:
    """What is before, between and behind the markers."""
    before, _, rest = text.partition(BEGIN)
    inside, _, behind = rest.partition(END)
    return before + BEGIN, inside, END + behind


def write(card: dict[str, Any], root: Path) -> None:
    """Puts the tables into the files."""
    for file, text in tables(card).items():
        path = root / file
        before, _, behind = between(read_text(path))
        path.write_text(before + text + behind, encoding="utf-8")
