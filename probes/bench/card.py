"""The report card: methods by disguises, what they cost, and known findings with their numbers."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from probes.bench.findings import Record, findings
from probes.report.index import sources, templates, write_json
from probes.style import BLUE, VERMILION, Picture, in_style, png
from synthetic.files import parse_json, plain

TASKS = {
    "heads": "Which heads have a job? Average precision over all heads",
    "sites": "Which values are used from where? Average precision over values, layers and kinds",
    "edges": "Which heads are read by what? Average precision over heads and their receivers",
}
#: Scores that differ by more than this share of the largest depend on the basis.
SAME = 1e-6
#: Methods that estimate, by gradients, the effect of an exchange.
ESTIMATES = ("attribution patching", "integrated gradients")


def record_of(family: str, disguise: str, seed: int, methods: Sequence[str], batch: int) -> Record:
    """Makes one subject and asks methods about it."""
    from probes.bench.evidence import Evidence
    from probes.bench.methods import METHODS
    from probes.bench.scores import overlap, score, truth_of
    from probes.bench.subjects import make_subject

    subject = make_subject(family, disguise, seed, batch)
    evidence = Evidence(subject)
    asked: dict[str, Any] = {}
    for name in methods:
        asked[name] = {}
        # a backup is about heads; values are where they were
        for task in ("heads", "edges") if disguise == "backup" else TASKS:
            found = METHODS[name](subject, task, evidence)
            if found is None:
                continue
            entry: dict[str, Any] = {"scores": score(subject, task, found)}
            entry["answer"] = found.scores.ravel().tolist()
            if found.bases is not None:
                pairs = zip(found.bases, subject.sites, strict=True)
                entry["overlap"] = [overlap(u, s.basis) for u, s in pairs]
            if found.bases is not None and name in ESTIMATES:
                # what the estimate is one of: the same subspaces exchanged
                entry["exact"] = evidence.with_sites(found.bases, along=True).tolist()
            if found.control is not None:
                entry["control"] = found.control.tolist()
            asked[name][task] = entry
    size = subject.roles.shape[1]
    truth = {
        "heads": {
            "names": [f"layer {n // size + 1}, head {n % size}" for n in range(subject.roles.size)],
            "true": truth_of(subject, "heads")[0].ravel().tolist(),
            "roles": subject.roles.ravel().tolist(),
        },
        "sites": {
            "names": [site.name for site in subject.sites],
            "slots": [site.slot for site in subject.sites],
            "true": [site.used for site in subject.sites],
        },
        "edges": {
            "names": [edge.name for edge in subject.edges],
            "true": [edge.used for edge in subject.edges],
        },
    }
    about = {
        "made by": sources(),
        "family": family,
        "disguise": disguise,
        "seed": seed,
        "batch": batch,
        "stated": subject.stated,
    }
    return plain(about | {"truth": truth, "methods": asked})


def run(
    families: Sequence[str],
    disguises: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    batch: int,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """The records of all subjects; with a folder, those that these sources left are not made again.

    ValueError where a file of the folder is no record.
    """
    from probes.bench.families import supports

    records = []
    # one disguise after the other: all of a family share their compiled programs
    wanted = [(f, d, s) for f in families for d in disguises for s in seeds if not supports(f, d)]
    for number, (family, disguise, seed) in enumerate(wanted, start=1):
        path = None if out is None else out / "subjects" / f"{family}.{disguise}.{seed}.json"
        known = read_record(path) if path is not None and path.exists() else None
        if known is not None and (known["made by"], known["batch"]) != (sources(), batch):
            known = None
        missing = [name for name in methods if known is None or name not in known["methods"]]
        if missing:
            progress(f"{number}/{len(wanted)} {family}, {disguise}, seed {seed}")
            found = record_of(family, disguise, seed, missing, batch)
            if known is not None:
                found["methods"] = known["methods"] | found["methods"]
            known = found
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, found)
        assert known is not None
        kept = {name: known["methods"][name] for name in methods}
        records.append(known | {"methods": kept})
    return records


def read_record(path: Path) -> Record:
    """A record on disk; ValueError where it is none."""
    try:
        found = parse_json(path.read_bytes())
        if not {"made by", "batch", "methods", "truth"} <= set(found):
            raise ValueError("fields are missing")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: no record of a subject ({error}); remove it") from None
    return found


@dataclass(frozen=True)
class Cell:
    """A mean over families and seeds, half the width of its 95 % interval over seeds, and how many.

    The interval is 1.96 standard errors of the means of the single seeds; None of one seed.
    """

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.half is None else f" ±{self.half:.2f}")


def cell(records: Sequence[Record], method: str, task: str, name: str = "precision") -> Cell | None:
    """The mean of one score of one method; None where it has none."""
    by_seed: dict[int, list[float]] = {}
    for record in records:
        value = record["methods"].get(method, {}).get(task, {}).get("scores", {}).get(name)
        if value is not None:
            by_seed.setdefault(record["seed"], []).append(value)
    if not by_seed:
        return None
    everything = [v for values in by_seed.values() for v in values]
    means = [float(np.mean(values)) for values in by_seed.values()]
    half = 1.96 * float(np.std(means, ddof=1)) / len(means) ** 0.5 if len(means) > 1 else None
    return Cell(float(np.mean(everything)), half, len(everything))


def moved_by_basis(records: Sequence[Record], method: str, task: str) -> float | None:
    """How far answers differ between a construction and the same in another basis.

    Mean over families and seeds of max |a - b| / max |a|; None without such pairs.
    """
    found: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for record in records:
        entry = record["methods"].get(method, {}).get(task)
        if entry is not None and record["disguise"] in ("bare", "basis"):
            answer = np.array(entry["answer"], float)
            found.setdefault((record["family"], record["seed"]), {})[record["disguise"]] = answer
    pairs = [pair for pair in found.values() if len(pair) == 2]
    apart = [
        float(np.abs(p["bare"] - p["basis"]).max() / max(np.abs(p["bare"]).max(), 1e-9))
        for p in pairs
    ]
    return float(np.mean(apart)) if apart else None


def card_of(records: Sequence[Record]) -> dict[str, Any]:
    """The card as data: {task: {method: {column: Cell or number}}}, and the findings."""
    disguises = list(dict.fromkeys(r["disguise"] for r in records))
    methods = list(dict.fromkeys(name for r in records for name in r["methods"]))
    tables: dict[str, Any] = {}
    for task in TASKS:
        tables[task] = {}
        for method in methods:
            row: dict[str, Any] = {}
            for disguise in disguises:
                own = [r for r in records if r["disguise"] == disguise]
                row[disguise] = cell(own, method, task)
            if all(value is None for value in row.values()):
                continue
            row["other basis"] = moved_by_basis(records, method, task)
            for name in ("distracted", "missed", "angle", "runs", "seconds"):
                row[name] = cell(records, method, task, name)
            tables[task][method] = row
        expected = {}
        for disguise in disguises:
            own = [r for r in records if r["disguise"] == disguise]
            expected[disguise] = next(
                (c for m in methods if (c := cell(own, m, task, "expected")) is not None), None
            )
        tables[task]["expected of chance"] = expected
    return {
        "disguises": disguises,
        "subjects": len(records),
        "measured": {
            family: dict(Counter(r["disguise"] for r in records if r["family"] == family))
            for family in dict.fromkeys(r["family"] for r in records)
        },
        "batch": sorted({r["batch"] for r in records if "batch" in r}),
        "stated": stated(records),
        "made by": sorted({r["made by"] for r in records if "made by" in r}),
        "families": len({r["family"] for r in records}),
        "seeds": len({r["seed"] for r in records}),
        "tables": tables,
        "findings": findings(records),
    }


def stated(records: Sequence[Record]) -> dict[str, dict[str, Cell]]:
    """Means of what disguises state: {disguise: {"loss": ...}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for name, value in record.get("stated", {}).items():
            found.setdefault(record["disguise"], {}).setdefault(name, []).append(value)
    return {
        disguise: {name: Cell(float(np.mean(v)), None, len(v)) for name, v in values.items()}
        for disguise, values in found.items()
    }


def to_json(card: dict[str, Any]) -> dict[str, Any]:
    """The card as plain data, with the versions that it was made with."""

    def value(entry: Any) -> Any:
        if isinstance(entry, Cell):
            return {"mean": entry.mean, "half": entry.half, "count": entry.count}
        return {k: value(v) for k, v in entry.items()} if isinstance(entry, dict) else entry

    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy", "optax")}
    made = {"python": platform.python_version(), **versions}
    return plain({"made with": made, **value(card)})


STYLES = {"good": "green", "fair": "yellow", "poor": "red"}
MORE = ("distracted", "missed", "angle", "runs", "seconds")


def show(card: dict[str, Any]) -> None:
    """Print the card, with colours where there is a terminal."""
    import sys

    from rich.console import Console
    from rich.text import Text

    from probes.style import headed_table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 190)
    shown = "{subjects} subjects of {families} families, {seeds} seeds".format(**card)
    console.print(f"How well do methods find mechanisms that are known? {shown}", markup=False)
    for task, title in TASKS.items():
        table = headed_table(title, "method", *card["disguises"], "other basis", *MORE)
        for method, row in card["tables"][task].items():
            cells = [
                Text(str(row[d]), style=STYLES[_tone(row[d])]) if row.get(d) else Text("")
                for d in card["disguises"]
            ]
            basis = row.get("other basis")
            cells.append(Text(_moves(basis)))
            for name in MORE:
                entry = row.get(name)
                cells.append(Text("" if entry is None else _cost(name, entry)))
            table.add_row(method, *cells)
        console.print(table)
    for title, text in card["findings"]:
        console.print(f"{title}: {text}", markup=False)


def _cost(name: str, entry: Cell) -> str:
    return f"{entry.mean:.{0 if name in ('angle', 'runs') else 2}f}"


def _moves(basis: float | None) -> str:
    return "" if basis is None else "same" if basis <= SAME else f"moves {basis:.1g}"


def _tone(entry: Cell) -> str:
    return "good" if entry.mean >= 0.95 else "fair" if entry.mean >= 0.75 else "poor"


def worst(records: Sequence[Record], method: str, task: str) -> Record | None:
    """The subject on which a method does worst, in units of what chance leaves open."""

    def gain(record: Record) -> float:
        s = record["methods"][method][task]["scores"]
        if s["precision"] is None or s["expected"] is None or s["expected"] > 0.999:
            return 1.0
        return (s["precision"] - s["expected"]) / (1 - s["expected"])

    own = [r for r in records if task in r["methods"].get(method, {})]
    return min(own, key=gain) if own else None


@in_style
def failure(record: Record, method: str, task: str) -> Picture:
    """What a method said of one subject, beside the truth."""
    from matplotlib.figure import Figure

    entry, truth = record["methods"][method][task], record["truth"][task]
    scores, true = np.array(entry["answer"], float), np.array(truth["true"], bool)
    scores = np.where(np.abs(scores) > 1e-12, scores, 0)  # rounding is no score
    order = np.argsort(-scores, kind="stable")[:18]
    figure = Figure(figsize=(6.4, 0.8 + 0.19 * len(order)), layout="constrained")
    axis = figure.subplots()
    colors = [BLUE if true[n] else VERMILION for n in order]
    axis.barh(range(len(order)), scores[order], color=colors)
    axis.set_yticks(range(len(order)), [truth["names"][n] for n in order], fontsize=7)
    for label, color in zip(axis.get_yticklabels(), colors, strict=True):
        label.set_color(color)
    axis.invert_yaxis()
    axis.set_xlabel("score of the method (blue: has a job, orange-red: has none)")
    precision = entry["scores"]["precision"]
    title = f"{method}: {record['family']}, {record['disguise']}, seed {record['seed']}"
    caption = f"Average precision {precision:.2f}; chance has {entry['scores']['expected']:.2f}."
    name = f"{method}-{task}".replace(" ", "-")
    return Picture(name, title, caption, f"Bars of the scores that {method} gives.", png(figure))


def page(card: dict[str, Any], records: Sequence[Record]) -> str:
    """The card as one self-contained HTML page."""
    from probes.bench.disguises import DISGUISES
    from probes.bench.methods import METHODS

    def shown(row: dict[str, Any]) -> list[tuple[str, str]]:
        """Text and tone of every cell but the first."""
        scores = [(str(c), _tone(c)) if (c := row.get(d)) else ("", "") for d in card["disguises"]]
        costs = [("" if row.get(n) is None else _cost(n, row[n]), "") for n in MORE]
        return [*scores, (_moves(row.get("other basis")), ""), *costs]

    tables = [
        (title, [(method, shown(row)) for method, row in card["tables"][task].items()])
        for task, title in TASKS.items()
    ]
    failures = [
        (failure(record, method, task), METHODS[method].fails)
        for method in METHODS
        for task in TASKS
        if method not in ("chance", "true subspace")
        and (record := worst(records, method, task)) is not None
    ]
    return (
        templates()
        .get_template("bench.html.j2")
        .render(
            title="orrery bench",
            card=card,
            columns=("method", *card["disguises"], "other basis", *MORE),
            tables=tables,
            disguises={name: DISGUISES[name] for name in DISGUISES if name in card["disguises"]},
            failures=failures,
        )
    )
