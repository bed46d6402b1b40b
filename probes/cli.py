"""The `orrery` command. Each subcommand is a dataclass of its options with a `run`.

Heavy modules are imported inside `run`, so that `--help` and mistakes in options answer at once.
Exit status: 0 done; 1 a certificate failed or a fit broke down; 2 bad input, in one line on stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

OK, FAILED, BAD_INPUT = 0, 1, 2

Names = Positional[tuple[str, ...]]
Settings = Annotated[
    UseAppendAction[list[str]],
    arg(name="set", metavar="KEY=VALUE", help="a setting of the family; the value is JSON"),
]


@dataclass
class List:
    """Show the families, their tasks, settings and claims."""

    json: Path | None = None
    """write the list as JSON"""
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        from probes import tables

        families = {name: tables.describe(name) for name in _names(())}
        _json(self.json, families, self.overwrite)
        tables.show_families(families)
        return OK


@dataclass
class Verify:
    """Compile constructions, compare them with their algorithms, print the certificates."""

    names: Names = ()
    """families; all of them if none is named"""
    dtype: Literal["float64", "float32"] | None = None
    """verify in this precision only"""
    settings: Settings = field(default_factory=list)
    seed: int = 0
    json: Path | None = None
    """write the certificates as JSON"""
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        names, settings = _names(self.names), parse_settings(self.settings)
        from constructions.family import verify
        from constructions.runs import construct
        from probes import tables

        _free(self.json, self.overwrite)
        dtypes = ("float64", "float32") if self.dtype is None else (self.dtype,)
        certificates = {
            name: verify(construct(name, settings), dtypes=dtypes, seed=self.seed) for name in names
        }
        _json(self.json, {n: c.to_json() for n, c in certificates.items()}, self.overwrite)
        tables.show_certificates(certificates)
        return OK if all(c.passed for c in certificates.values()) else FAILED


@dataclass
class Fit:
    """Fit the trained counterpart of a family, on all devices, into a run directory."""

    name: Positional[str]
    out: Path
    """the run directory"""
    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    seeds: int | None = None
    """fit this many seeds at once, counted from --seed"""
    settings: Settings = field(default_factory=list)
    resume: bool = False
    """continue the run; options left out are those it was started with"""
    overwrite: bool = False
    """replace the run"""
    json: Path | None = None
    """write the last record as JSON"""
    coordinator: str | None = None
    """host:port of process 0, where there are several (or JAX_COORDINATOR_ADDRESS)"""
    num_processes: int | None = None
    process_id: int | None = None

    def run(self) -> int:
        """Run the command; the exit status."""
        from synthetic import devices

        devices.start(self.coordinator, self.num_processes, self.process_id)
        (name,), settings = _names((self.name,)), parse_settings(self.settings)
        import jax

        from constructions.runs import fit_family
        from synthetic.train import print_progress

        _free(self.json, self.overwrite)
        seeds = _seeds(self.seed, self.seeds)
        given = {n: getattr(self, n) for n in ("steps", "batch", "learning_rate")}
        first = jax.process_index() == 0
        run = fit_family(
            name,
            settings,
            self.out,
            seed=None if seeds else self.seed,
            seeds=seeds,
            mesh=devices.mesh(len(seeds or [0])) if len(jax.devices()) > 1 else None,
            progress=print_progress if first else None,
            resume=self.resume,
            overwrite=self.overwrite,
            **{name: value for name, value in given.items() if value is not None},
        )
        if first:
            seconds = sum(run.seconds.values())
            print(f"{self.out}: {run.history[-1]['step']} steps, {seconds:.1f} s")
            _json(self.json, run.history[-1], self.overwrite)
        return OK


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
        (name,), settings = _names((self.name,)), parse_settings(self.settings)
        from probes.report import claim_directory, write_report

        claim_directory(self.out, overwrite=self.overwrite)
        _free(self.json, self.overwrite)
        comparison = self.comparison(name, settings)
        # the directory was empty or ours before the work began
        page = write_report(comparison, self.out, overwrite=True)
        _json(self.json, comparison.to_json(), True)
        print(f"{comparison.verdict}.\n{page}")
        return OK

    def comparison(self, name: str, settings: Mapping[str, Any]) -> Any:
        """The comparison of a saved or a fresh run."""
        from constructions import CATALOGUE
        from constructions.runs import fit_family, load_run
        from probes.comparison import compare
        from synthetic.train import print_progress

        options = " ".join(f"--set {s}" for s in self.settings)
        if self.run_directory is not None:
            run = load_run(self.run_directory)
            if run.family != name:
                raise ValueError(f"{self.run_directory}: family: {run.family!r}, not {name!r}")
            if settings:
                raise ValueError(f"settings: {options} cannot be given with --run, which has its own")
            again = [f"orrery compare {name} --run {self.run_directory} --out {self.out}"]
        else:
            steps = {} if self.steps is None else {"steps": self.steps}
            run = fit_family(
                name,
                settings,
                quick=self.quick,
                seeds=_seeds(self.seed, self.seeds),
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
            batch=2048 if self.quick else 4096,
            commands=again,
        )


@dataclass
class Claims:
    """Decide the claims of the papers on freshly trained models, with every control."""

    names: Names = ()
    """families; all of them if none is named"""
    fast: bool = False
    """demonstration settings: a short fit, fewer inputs"""
    seeds: int = 5
    seed: int = 0
    settings: Settings = field(default_factory=list)
    json: Path | None = None
    """write the ledger as JSON"""
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        names, settings = _names(self.names), parse_settings(self.settings)
        from constructions.runs import fit_family
        from probes import tables
        from probes.ledger import ledger
        from synthetic.train import print_progress

        _free(self.json, self.overwrite)
        seeds, found = _seeds(self.seed, self.seeds), {}
        for name in names:
            run = fit_family(
                name, settings, quick=self.fast, seeds=seeds, progress=print_progress
            )
            found[name] = ledger(
                run.construction, run.models, seed=self.seed, batch=1024 if self.fast else 4096
            )
            tables.show_ledger(name, found[name])
        rows = {name: [row.to_json() for row in rows] for name, rows in found.items()}
        _json(self.json, rows, self.overwrite)
        return OK


@dataclass
class Probe:
    """Use one probe on a saved run."""

    tool: Positional[str]
    """linear, interchange, similarity, interpolation, roll-out, ..."""
    run_directory: Annotated[Path, arg(name="run")]
    seed: int = 0
    json: Path | None = None
    """write the result as JSON"""
    figure: Path | None = None
    """draw the result into this PNG file"""
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        from probes import tables, tools

        tool = tools.find(self.tool)
        from constructions.runs import load_run

        _free(self.json, self.overwrite)
        _free(self.figure, self.overwrite)
        result = tool(load_run(self.run_directory), self.seed)
        tables.show_result(result)
        _json(self.json, result.to_json(), self.overwrite)
        if self.figure is not None:
            self.figure.write_bytes(result.draw())
        return OK


@dataclass
class Demo:
    """Compare every family at quick settings and say where the report is."""

    out: Path = Path("reports")
    seed: int = 0
    seeds: int = 5

    def run(self) -> int:
        """Run the command; the exit status."""
        from probes.report import claim_directory, write_index, write_report

        # an earlier demonstration is replaced, anything else is left alone
        claim_directory(self.out, overwrite=True)
        found = []
        for name in _names(()):
            command = Compare(
                name, self.out / name, seeds=self.seeds, seed=self.seed, quick=True
            )
            print(f"{name}: fitting {self.seeds} counterparts", file=sys.stderr)
            comparison = command.comparison(name, {})
            write_report(comparison, command.out, overwrite=True)
            print(f"{name}: {comparison.verdict}.")
            found.append(comparison)
        print(f"The report is {write_index(found, self.out)}")
        return OK


COMMANDS = (List, Verify, Fit, Compare, Claims, Probe, Demo)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["dim_x=5"]` as `{"dim_x": 5}`; values are JSON, and text where they are not."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair}: must be KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def _names(names: Sequence[str]) -> list[str]:
    """The families named, or all of them; ValueError lists the known ones."""
    from constructions import CATALOGUE

    for name in names:
        if name not in CATALOGUE:
            raise ValueError(f"unknown family {name!r}; known: {', '.join(sorted(CATALOGUE))}")
    return list(names or CATALOGUE)


def _seeds(first: int | None, count: int | None) -> list[int] | None:
    if count is None:
        return None
    if count < 1:
        raise ValueError(f"--seeds {count}: must be at least 1")
    return list(range(first or 0, (first or 0) + count))


def _free(path: Path | None, overwrite: bool) -> None:
    """Raise before the work, not after it, where a file could not be written."""
    if path is not None and path.exists() and not overwrite:
        raise ValueError(f"{path}: exists; give --overwrite to replace it")
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: its directory does not exist")


def _json(path: Path | None, content: Any, overwrite: bool) -> None:
    if path is None:
        return
    _free(path, overwrite)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    commands = {command.__name__.lower(): command for command in COMMANDS}
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="orrery",
            description="Hand-built transformers, their trained counterparts, and probes of both.",
            args=None if argv is None else list(argv),
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        return command.run()
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except ArithmeticError as error:
        if not hasattr(error, "step"):
            raise
        return _complain(error, FAILED)
    except (ValueError, OSError) as error:
        return _complain(error, BAD_INPUT)
    except RuntimeError as error:
        if not str(error).startswith("process 0:"):
            raise
        return _complain(error, BAD_INPUT)


def _complain(what: object, status: int) -> int:
    print(f"orrery: {' '.join(str(what).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
