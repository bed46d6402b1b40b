"""What the command prints of what it computes: certificates, claims and probe results."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from constructions.family import Certificate
from constructions.measurement import LOCAL, Measurement, Remark, parted
from probes.coverage import Line
from probes.ledger import CONSTRUCTION, HOLDS, NOT_APPLICABLE, RANDOM, REFUTED, VOID, Row
from probes.probe import Result
from probes.report.page import controls, interval, mean
from probes.style import WIDTH, headed_table, number

MARKS = {HOLDS: "green", REFUTED: "red", VOID: "yellow", NOT_APPLICABLE: "cyan"}
MARKS |= {"reproduced": "green", "better": "green", LOCAL: "green", "differs": "red"}
MARKS |= {"undecided": "yellow"}


def _show(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
        table.box = box.ASCII2
    console.print(table)


def show_certificate(name: str, certificate: Certificate) -> None:
    """Print the errors of a certificate, a line a dtype, at once, and what was compared."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(name)
    marks = {"passed": "[green]passed[/]", "failed": "[red]FAILED[/]"}
    for e in certificate.errors:
        relative, absolute, allowed = map(number, (e.max_rel_error, e.max_abs_error, e.tolerance))
        verdict = marks.get(e.verdict, "[yellow]not certified[/]")
        console.print(
            f"  {e.dtype}: {verdict}, error {relative} (at most {allowed}), absolute {absolute}, "
            f"worst in {escape(e.worst)}"
        )
        if e.reason:
            console.print(f"  not certified in {e.dtype}: {escape(e.reason)}")
    batches = ", ".join(map(str, certificate.batches))
    console.print(f"  compared {', '.join(certificate.compared)} in batches of {batches}")
    sys.stdout.flush()


def show_ledger(name: str, rows: Sequence[Row]) -> None:
    """Print the claims of a family, their controls, and below them reasons and notes."""
    if not rows:
        print(f"{name}: nothing is claimed at these settings, so nothing was decided")
        return
    others = controls(rows)
    table = headed_table(
        f"{name} (ok: rejected as it must be; MISSED: accepted; in brackets: not asked for)",
        *("claim", "holds if", "published", "construction", "trained mean [95 %]", *others, ""),
    )
    for row in rows:
        claim = row.claim
        cells = [f"{claim.direction} {number(claim.threshold)}"]
        cells += [number(claim.published) if claim.published is not None else "-"]
        cells += [
            number(row.values[CONSTRUCTION]),
            f"{mean(row)} {interval(row)}".replace("[", "\\["),
        ]
        for other in others:
            value = number(row.values[other])
            if other in row.lacking:
                cells.append("n/a")
            elif other not in (RANDOM, *claim.catches):
                cells.append(f"({value})")
            else:
                missed = claim.holds(row.values[other])
                cells.append(f"[red]MISSED[/] {value}" if missed else f"ok {value}")
        table.add_row(claim.name, *cells, f"[{MARKS[row.verdict]}]{row.verdict}[/]")
    _show(table)
    for row in rows:
        if row.reason:
            print(f"{row.verdict}: {row.claim.name}: {row.reason}")
    for note in dict.fromkeys(row.note for row in rows if row.note):
        print(f"note: {note}")
    for row in rows:
        if row.claim.note:
            print(f"note: {row.claim.name}: {row.claim.note}")


def show_progress(row: Measurement | Remark) -> None:
    """Say on stderr that a number has been measured."""
    said = f"{row.name}: {number(row.measured)} ({row.verdict})"
    Console(stderr=True, highlight=False, soft_wrap=True).print(said, markup=False)


def show_measurements(name: str, rows: Sequence[Measurement | Remark]) -> None:
    """Print what numbers decide, then remarks, which nothing decides, then the notes."""
    decided, remarks = parted(rows)
    if decided:
        columns = ("number", "published", "measured", "standard error", "decided by", "")
        table = headed_table(f"{name}: numbers that decide a statement", *columns)
        for row in decided:
            cells = [number(row.published) if row.published is not None else "-"]
            cells += [number(row.measured), number(row.error) if row.error else "exact"]
            verdict = f"[{MARKS[row.verdict]}]{row.verdict}[/]"
            table.add_row(row.name, *cells, row.criterion, verdict)
        _show(table)
    if remarks:
        columns = ("number", "measured", "standard error", "what it is")
        table = headed_table(f"{name}: remarks, which nothing decides", *columns)
        for row in remarks:
            error = number(row.error) if row.error else "exact"
            table.add_row(row.name, number(row.measured), error, escape(row.statement))
        _show(table)
    for note in dict.fromkeys(row.note for row in rows if row.note):
        print(f"note: {note}")


def show_coverage(lines: Sequence[Line]) -> None:
    """Print what the ledger holds of each paper, a table a paper."""
    for paper in dict.fromkeys(line.paper for line in lines):
        title = f"arXiv {paper}" if paper else "of no paper"
        table = headed_table(title, "item", "rows", "size", "can fail", "missing")
        for line in lines:
            if line.paper == paper:
                table.add_row(*map(escape, coverage_cells(line)))
        _show(table)


def coverage_cells(line: Line) -> tuple[str, str, str, str, str]:
    """Item; its rows by family; their sizes; whether they can fail; what is missing."""
    families = dict.fromkeys(row.family for row in line.rows)
    named = [
        f"{family}: " + "; ".join(row.name for row in line.rows if row.family == family)
        for family in families
    ]
    named += [f"elsewhere: {line.elsewhere}"] if line.elsewhere else []
    sizes = "; ".join(dict.fromkeys(row.size for row in line.rows))
    able = [bool(row.fails) for row in line.rows]
    fails = "-" if not able else "yes" if all(able) else "some" if any(able) else "remarks only"
    missing = line.missing or ("" if named else "nothing of it is decided")
    return line.item, "\n".join(named) or "-", sizes or "-", fails, missing


def show_result(result: Result) -> None:
    """Print the result of a probe."""
    _show(result.__rich__())
    if result.note:
        print(result.note)
