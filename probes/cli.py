"""The `orrery` command. Each subcommand is a dataclass of its options with a `run`.

Heavy modules are imported inside `run`, so that `--help` and mistakes in options answer at once.
Exit status: 0 done; 1 a certificate failed, or holds in no dtype, or a fit broke down; 2 bad input,
or a machine that cannot do it (no such back end, no memory, a full disk), in one line on stderr;
128 and the number of the signal where one ended it: 130 interrupted, 141 nobody reads the output,
143 terminated.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from probes import PROBES, check_name, find
from probes.bench.command import Bench
from probes.listing import List, Show
from probes.options import (
    BAD_INPUT,
    FAILED,
    OK,
    Names,
    Settings,
    check_free,
    check_seed,
    family_names,
    parse_settings,
    seed_list,
    write_file,
    write_json,
)
from probes.report.claims import Claims
from probes.report.commands import Compare, Demo, Import, Models, check_subject
from probes.sweep.command import Sweep
from synthetic.compilation import collect_rarely, compile_quickly, forget_programs, keep_programs


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
        names, settings = family_names(self.names), parse_settings(self.settings)
        check_seed(self.seed)
        check_free(self.json, self.overwrite)
        from constructions.family import verify
        from constructions.runs import construct
        from probes.report import tables

        dtypes = ("float64", "float32") if self.dtype is None else (self.dtype,)
        certificates = {}
        for name in names:
            certificate = verify(construct(name, settings), dtypes=dtypes, seed=self.seed)
            tables.show_certificate(name, certificate)
            certificates[name] = certificate
        write_json(self.json, {n: c.to_json() for n, c in certificates.items()}, self.overwrite)
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
        (name,), settings = family_names((self.name,)), parse_settings(self.settings)
        from synthetic.fitting import devices

        devices.start(self.coordinator, self.num_processes, self.process_id)
        import jax

        from constructions.runs import fit_family
        from synthetic.fitting.train import print_progress

        check_free(self.json, self.overwrite)
        seeds = seed_list(self.seed, self.seeds)
        given: dict[str, Any] = {n: getattr(self, n) for n in ("steps", "batch", "learning_rate")}
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
            write_json(self.json, run.history[-1], self.overwrite)
        return OK


#: What may be typed after `orrery probe`.
KNOWN = f"{', '.join(PROBES)}; or module:attribute. docs/probes.md says what each answers"


@dataclass
class Probe:
    """Use one probe on a saved run, or on a model of yours."""

    name: Annotated[Positional[str], arg(help=KNOWN)]
    run_directory: Annotated[Path | None, arg(name="run")] = None
    """a finished fit, or an import"""
    model: Models = field(default_factory=list)
    """in its place, as of `compare`"""
    family: str | None = None
    """of --model, whose inputs it takes"""
    settings: Settings = field(default_factory=list)
    """of that family"""
    seed: int = 0
    json: Path | None = None
    """write the result as JSON"""
    figure: Path | None = None
    """draw the result into this PNG file"""
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        check_name(self.name)
        check_seed(self.seed)
        check_free(self.json, self.overwrite)
        check_free(self.figure, self.overwrite)
        if self.json is not None and self.json == self.figure:
            raise ValueError(f"--json {self.json}: must be another file than --figure")
        check_subject(self.run_directory, self.model, self.family, self.settings)
        from constructions.runs import load_run
        from probes.report import tables
        from probes.report.commands import run_of_models

        probe, run = find(self.name), self.run_directory and load_run(self.run_directory)
        run = run or run_of_models(self.family or "", self.model, parse_settings(self.settings))
        result = probe(run, self.seed)
        tables.show_result(result)
        write_json(self.json, result.to_json(), self.overwrite)
        if self.figure is not None:
            write_file(self.figure, result.draw())
        return OK


@dataclass
class Export:
    """Write a construction, or a trained model, as a model folder for Hugging Face's transformers.

    AutoModel.from_pretrained(FOLDER, trust_remote_code=True) opens it.
    """

    out: Path
    """the folder"""
    name: Annotated[Positional[str | None], arg(help="a family; or give --run")] = None
    run_directory: Annotated[Path | None, arg(name="run")] = None
    """a finished fit, whose model is written in the place of a construction"""
    seed: int | None = None
    """of a fit of several seeds, which one; the first if none is given"""
    settings: Settings = field(default_factory=list)
    dtype: Literal["float64", "float32"] | None = None
    """of the weights; by default float32, or that of the fit"""
    overwrite: bool = False
    """replace an earlier export"""

    def run(self) -> int:
        """Run the command; the exit status."""
        if (self.name is None) == (self.run_directory is None):
            raise ValueError("give the name of a family, or --run: one of them")
        settings = parse_settings(self.settings)
        if self.name is not None:
            family_names((self.name,))
        if self.name is not None and self.seed is not None:
            raise ValueError(f"--seed {self.seed} can be given with --run alone")
        if self.name is None and settings:
            raise ValueError(f"--set {self.settings[0]}: a run has its own settings")
        from constructions.interchange.export import claim_export
        from constructions.runs import export_family, export_run, load_run

        claim_export(self.out, overwrite=self.overwrite)
        options: dict[str, Any] = {"dtype": self.dtype, "overwrite": self.overwrite}
        if self.run_directory is not None:
            run = load_run(self.run_directory)
            export_run(run, self.out, seed=self.seed, **options)
            passed = True
        else:
            assert self.name is not None
            passed = export_family(self.name, settings, self.out, **options).passed
        print(f"{self.out}: AutoModel.from_pretrained({str(self.out)!r}, trust_remote_code=True)")
        return OK if passed else FAILED


COMMANDS = (List, Show, Verify, Fit, Import, Compare, Claims, Probe, Bench, Sweep, Demo, Export)


class Stopped(BaseException):
    """SIGTERM, as an exception, so that what was begun is cleared away."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    # A closed stream's number would be given to the next file that is opened.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        with _terminable():
            status = _run(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        return _complain("interrupted", 128 + signal.SIGINT)
    except Stopped:
        return _complain("terminated", 128 + signal.SIGTERM)
    except BrokenPipeError:
        _close_output()
        return 128 + signal.SIGPIPE
    except ArithmeticError as error:
        if not hasattr(error, "step"):
            raise
        return _complain(error, FAILED)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _close_output()
        named = error.filename is not None and error.strerror is not None
        what = f"{error.filename}: {error.strerror}" if named else error.strerror or error
        return _complain(what, BAD_INPUT)
    except ValueError as error:
        return _complain(error, BAD_INPUT)
    except MemoryError as error:
        return _complain(f"out of memory: {error}" if str(error) else "out of memory", BAD_INPUT)
    except RuntimeError as error:
        # what a back end says: no such platform, no memory, no other process
        ours = str(error).startswith(("process 0:", "Unable to initialize backend"))
        if not ours and type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
            raise
        return _complain(str(error).partition("\n")[0], BAD_INPUT)


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"orrery {installed_version()}")
        return OK
    anew = "--no-cache" in argv
    argv = [word for word in argv if word != "--no-cache"]
    commands = {command.__name__.lower(): command for command in COMMANDS}
    said = io.StringIO()
    about = (
        "Hand-built transformers, their trained counterparts, and probes of both. "
        "--version says which this is. --no-cache (or ORRERY_NO_CACHE=1) compiles every program "
        "anew, and keeps none in the user's cache folder."
    )
    try:
        with contextlib.redirect_stderr(said):
            command = tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="orrery",
                description=about,
                args=argv,
                config=(FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        return _complain(_first_part(said.getvalue()), BAD_INPUT) if stop.code else OK
    if anew:
        forget_programs()
    elif not isinstance(command, List | Show):
        keep_programs()
    collect_rarely()
    if isinstance(command, Verify | Compare | Demo):
        compile_quickly()
    try:
        return command.run()
    except SystemExit:  # rich's answer to a pipe that nobody reads
        raise BrokenPipeError from None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raises `Stopped` on SIGTERM, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _close_output() -> None:
    """Sends what is still to be written to nowhere, so that the end of the process is silent."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def installed_version() -> str:
    """The version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("orrery-transformers")
    except PackageNotFoundError:
        return "of a source tree that is not installed"


def _first_part(complaint: str) -> str:
    """The message of a complaint of tyro's, which has a title, rules and hints around it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", complaint).strip().splitlines()
    # in a terminal that has them, the title is part of a frame; elsewhere a rule follows it
    body = [line.strip(" \u2502") for line in plain[1 if plain[0].startswith("\u256d") else 2 :]]
    ends = (n for n, line in enumerate(body) if not line.strip("-\u2500\u2570\u256f"))
    return " ".join(body[: next(ends, None)])


def _complain(what: object, status: int) -> int:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"orrery: {' '.join(str(what).split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
