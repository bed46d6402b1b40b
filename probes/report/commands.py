"""The subcommands that fit and judge: compare, claims, demo."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from probes.options import (
    FAILED,
    OK,
    Names,
    Settings,
    check_free,
    check_run,
    family_names,
    parse_settings,
    seed_list,
    write_json,
)
from probes.report.index import Index, claim_directories, claim_directory
from synthetic import kept_programs

#: Inputs per statistic of the ledger where time is short.
FEWER = 2**14


@dataclass
class Compare:
    """Compare a construction with its trained counterpart: report.html, report.json, figures."""

    name: Positional[str]
    out: Path
    """the directory of the report"""
    run_directory: Annotated[Path | None, arg(name="run")] = None
    """a finished fit; without it, one is made on the spot"""
    seeds: int = 5
    """seeds of that fit"""
    settings: Settings = field(default_factory=list)
    steps: int | None = None
    quick: bool = False
    """demonstration settings: a short fit, fewer inputs a statistic"""
    seed: int = 0
    json: Path | None = None
    """write the numbers to this file too"""
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        (name,), settings = family_names((self.name,)), parse_settings(self.settings)
        seed_list(self.seed, self.seeds)
        check_free(self.json, self.overwrite)
        if self.run_directory is not None:
            check_run(self.run_directory)
        fresh = not self.out.exists()
        claim_directory(self.out, overwrite=self.overwrite)
        try:
            from probes.report.page import write_report

            comparison = self.comparison(name, settings)
        except BaseException:  # interrupted, too
            if fresh:
                self.out.rmdir()
            raise
        # the directory was empty or ours before the work began
        page = write_report(comparison, self.out, overwrite=True)
        write_json(self.json, comparison.to_json(), True)
        print(f"{comparison.verdict}.\n{page}")
        return OK if comparison.certificate.passed else FAILED

    def comparison(
        self,
        name: str,
        settings: Mapping[str, Any],
        progress: Callable[[str], object] = lambda _: None,
    ) -> Any:
        """The comparison of a saved or a fresh run; `progress` is called with each part of it."""
        from constructions import CATALOGUE
        from constructions.runs import fit_family, load_run
        from probes.report.data import compare
        from synthetic.fitting.train import print_progress

        options = " ".join(f"--set {s}" for s in self.settings)
        if self.run_directory is not None:
            run = load_run(self.run_directory)
            if run.family != name:
                raise ValueError(f"{self.run_directory}: family: {run.family!r}, not {name!r}")
            if self.steps is not None:
                options = f"{options} --steps {self.steps}".lstrip()
            if options:
                raise ValueError(f"{options} cannot be given with --run, which has its own")
            again = [f"orrery compare {name} --run {self.run_directory} --out {self.out}"]
        else:
            steps: dict[str, Any] = {} if self.steps is None else {"steps": self.steps}
            run = fit_family(
                name,
                settings,
                quick=self.quick,
                seeds=seed_list(self.seed, self.seeds),
                progress=print_progress,
                **steps,
            )
            quick = " --quick" if self.quick else ""
            count = f" --steps {self.steps}" if steps else ""
            again = [
                f"orrery compare {name} --seeds {self.seeds} --seed {self.seed}{quick}{count}"
                f"{' ' + options if options else ''} --out {self.out}"
            ]
        family = CATALOGUE[name]
        return compare(
            run,
            about=family.about,
            source=family.source,
            seed=self.seed,
            batch=FEWER if self.quick else 2**16,
            commands=again,
            measure=lambda: measurements(name, self.quick, self.seed),
            progress=progress,
        )


def measurements(name: str, quick: bool, seed: int) -> Iterator[Any]:
    """The family's published numbers beside ours, one after the other."""
    from constructions import CATALOGUE

    return CATALOGUE[name].measurements(quick, seed)


@dataclass
class Claims:
    """Decide the claims of the papers on freshly trained models, with every control.

    Then measure the published numbers that the family's theory and fits of its own give.
    """

    names: Names = ()
    """families; all of them if none is named"""
    quick: bool = False
    """demonstration settings: a short fit, fewer inputs"""
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
        from constructions.runs import fit_family
        from probes.ledger import ledger
        from probes.report import tables
        from synthetic.fitting.train import print_progress

        for name in names:
            run = fit_family(name, settings, quick=self.quick, seeds=seeds, progress=print_progress)
            rows = ledger(
                run.construction,
                run.models,
                seed=self.seed,
                batch=FEWER if self.quick else 2**16,
                claims=run.construction.claims,
            )
            tables.show_ledger(name, rows)
            measured = []
            for row in measurements(name, self.quick, self.seed):
                tables.show_progress(row)
                measured.append(row)
            tables.show_measurements(name, measured)
            found[name] = {
                "claims": [row.to_json() for row in rows],
                "measurements": [row.to_json() for row in measured],
            }
        write_json(self.json, found, self.overwrite)
        return OK


@dataclass
class Demo:
    """Compare every family at quick settings; the page that lists the reports is there at once.

    What an earlier demonstration with the same settings has finished is kept, so that one that was
    interrupted goes on.
    """

    out: Path = Path("reports")
    seed: int = 0
    seeds: int = 3
    overwrite: bool = False
    """make all reports anew"""

    def run(self) -> int:
        """Run the command; the exit status."""
        seed_list(self.seed, self.seeds)
        names = family_names(())
        # an earlier demonstration may be replaced, anything else is left alone
        claim_directories(self.out, names)
        described = {name: _described(name) for name in names}
        settings = {"seed": self.seed, "seeds": self.seeds, "made by": kept_programs.sources()}
        index = Index(self.out, described, settings)
        if not self.overwrite:
            index.read()
        print(f"{index.write(next(iter(index.missing), ''))} lists the reports")
        if index.found and index.missing:
            print(f"{len(index.found)} of {len(names)} are there already: {', '.join(index.found)}")
        elif not index.missing:
            print("All of them are there; --overwrite makes them anew.")
        try:
            self.fill(index)
        finally:
            index.write()
        return OK if all(entry.certified for entry in index.found.values()) else FAILED

    def fill(self, index: Index) -> None:
        """Make the reports that are missing, one after the other."""
        missing, began = index.missing, time.perf_counter()
        if not missing:
            return
        from probes.report.page import entry, write_report

        for done, name in enumerate(missing):
            index.write(name)
            start = time.perf_counter()
            where = f"[{len(index.found) + 1}/{len(index.families)}] {name}"
            print(f"{where}: fitting {self.seeds} counterparts", file=sys.stderr)
            command = Compare(name, self.out / name, seeds=self.seeds, seed=self.seed, quick=True)
            comparison = command.comparison(
                name, {}, lambda part, at=where: print(f"{at}: {part}", file=sys.stderr)
            )
            page = write_report(comparison, command.out, overwrite=True)
            now = time.perf_counter()
            index.found[name] = entry(comparison, now - start)
            del comparison, command
            kept_programs.free_programs()  # the next family has others
            print(f"{name}: {index.found[name].verdict}.\n  {page}", flush=True)
            left = (now - began) / (done + 1) * (len(missing) - done - 1)
            after = f"about {_duration(left)} to go" if left else "done"
            print(f"{where}: {_duration(now - start)}; {after}", file=sys.stderr)


def _described(name: str) -> tuple[str, str]:
    from constructions import CATALOGUE

    return CATALOGUE[name].about, CATALOGUE[name].source


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
