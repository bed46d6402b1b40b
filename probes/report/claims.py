"""The subcommand `orrery claims`: the ledger of a family, and what it holds of each paper."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from probes.coverage import cites, coverage, minutes
from probes.options import (
    OK,
    Names,
    Settings,
    check_free,
    family_names,
    parse_settings,
    seed_list,
    write_json,
)
from probes.report.commands import FEWER, measurements


@dataclass
class Claims:
    """Decide the claims of the papers on freshly trained models, with every control.

    Then measure the published numbers that the family's theory and fits of its own give.
    """

    names: Names = ()
    """families; all of them if none is named"""
    quick: bool = False
    """demonstration settings: a short fit, fewer inputs"""
    paper: str = ""
    """only what is said to be of this paper, such as 2212.07677"""
    item: str = ""
    """and of this figure, table or statement of it, such as fig3 or "Prop. 1" """
    table: bool = False
    """only print which rows there are of each paper, item by item, and what is missing: seconds, in
    which JAX is loaded and constructions are made, and nothing is fitted or measured"""
    seeds: int = 5
    seed: int = 0
    settings: Settings = field(default_factory=list)
    json: Path | None = None
    """write the ledger as JSON"""
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        names, settings = family_names(self.names), parse_settings(self.settings)
        seeds, found = seed_list(self.seed, self.seeds), {}
        check_free(self.json, self.overwrite)
        if self.item and not self.paper:
            raise ValueError(f"--item {self.item}: --paper must say of which paper")
        if self.table:
            return self.show_table(names)
        from constructions import CATALOGUE
        from constructions.measurement import parted
        from constructions.runs import construct, fit_family
        from probes.ledger import ledger
        from probes.report import tables
        from synthetic.fitting.train import print_progress

        for name in names:
            asked = [c for c in construct(name, settings).claims if self.about(c.source)]
            if self.paper and not asked and not cites(CATALOGUE.find(name).source, self.paper):
                continue
            fits = bool(asked) or not self.paper
            told = minutes(name, self.quick, fits, self.seeds)
            print(f"{name}: {told}", file=sys.stderr)
            rows, measured = [], []
            if fits:
                run = fit_family(
                    name, settings, quick=self.quick, seeds=seeds, progress=print_progress
                )
                rows = ledger(
                    run.construction,
                    run.models,
                    seed=self.seed,
                    batch=FEWER if self.quick else 2**16,
                    claims=asked if self.paper else None,
                )
                tables.show_ledger(name, rows)
            for row in measurements(name, self.quick, self.seed):
                if self.about(row.source):
                    tables.show_progress(row)
                    measured.append(row)
            tables.show_measurements(name, measured)
            decided, remarks = parted(measured)
            found[name] = {
                "claims": [row.to_json() for row in rows],
                "measurements": [row.to_json() for row in decided],
                "remarks": [row.to_json() for row in remarks],
            }
        if self.paper and not any(rows for one in found.values() for rows in one.values()):
            item = f" --item {self.item}" if self.item else ""
            raise ValueError(
                f"--paper {self.paper}{item}: no claim and no measurement of "
                f"{', '.join(names)} has it in its source"
            )
        write_json(self.json, found, self.overwrite)
        return OK

    def show_table(self, names: Sequence[str]) -> int:
        """Print what the ledger holds of each paper."""
        for option, given in (("--quick", self.quick), ("--set", self.settings)):
            if given:
                raise ValueError(f"{option} cannot be given with --table, which fits nothing")
        from probes.report import tables

        lines = coverage(names, self.paper, self.item)
        if not lines:
            item = f" --item {self.item}" if self.item else ""
            raise ValueError(f"--paper {self.paper}{item}: neither row nor item of it is known")
        tables.show_coverage(lines)
        for name in dict.fromkeys(row.family for line in lines for row in line.rows):
            print(f"{name}: --quick {minutes(name, True)}; in full {minutes(name, False)}")
        write_json(self.json, [line.to_json() for line in lines], self.overwrite)
        return OK

    def about(self, source: str) -> bool:
        """Whether something of this source was asked for."""
        return cites(source, self.paper) and cites(source, self.item)
