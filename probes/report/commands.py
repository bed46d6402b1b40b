"""The subcommands that judge models, and the one by which models of others come in."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from probes.options import (
    FAILED,
    OK,
    Settings,
    check_free,
    check_run,
    duration,
    family_names,
    importable_here,
    one_line,
    parse_settings,
    seed_list,
    write_json,
)
from probes.report.index import (
    PAGE,
    Entry,
    Index,
    claim_directories,
    claim_directory,
    sources,
)
from synthetic.compilation import collect_rarely, compile_quickly, keep_programs

#: Inputs per statistic of the ledger where time is short.
FEWER = 2**14

#: Models of somebody else's, as they are typed.
Models = Annotated[UseAppendAction[list[str]], arg(metavar="MODULE:ATTRIBUTE")]


def run_of_models(name: str, models: Sequence[str], settings: Mapping[str, Any]) -> Any:
    """What `--model` names, as a run of a family."""
    from probes.foreign import foreign_run, named_model

    importable_here()
    return foreign_run(name, [named_model(one) for one in models], settings)


def check_subject(
    run: Path | None, models: Sequence[str], family: str | None, settings: Sequence[str]
) -> None:
    """ValueError unless a saved run is given, or models and the family whose inputs they take."""
    if (run is None) == (not models):
        raise ValueError("give --run, or --model and --family: one of them")
    if run is not None:
        if family is not None or settings:
            what = f"--set {settings[0]}" if settings else f"--family {family}"
            raise ValueError(f"{what} cannot be given with --run, which has its own")
        check_run(run)
    elif family is None:
        raise ValueError(f"--model {models[0]}: --family must say whose inputs it takes")
    else:
        family_names((family,))
        parse_settings(settings)


@dataclass
class Compare:
    """Compare a construction with its trained counterpart: report.html, report.json, figures."""

    name: Positional[str]
    out: Path
    """the directory of the report"""
    run_directory: Annotated[Path | None, arg(name="run")] = None
    """a finished fit, or an import; without it, a fit is made on the spot"""
    model: Models = field(default_factory=list)
    """in place of a fit: a function from the family's inputs to predictions, a Subject, or a
    function without arguments that makes one; several are several models"""
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

            said = print if sys.stderr.isatty() else lambda *_, **__: None
            comparison = self.comparison(
                name, settings, lambda part: said(f"{name}: {part}", file=sys.stderr)
            )
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
        step: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> Any:
        """The comparison of a saved or a fresh run.

        `progress` is called with the name of each part, `step` with each record of a fit; without
        it they are printed.
        """
        from constructions.runs import fit_family, load_run
        from synthetic.fitting.train import print_progress

        options = " ".join(f"--set {s}" for s in self.settings)
        if self.model:
            for option, given in (("--run", self.run_directory), ("--steps", self.steps)):
                if given is not None:
                    raise ValueError(f"{option} {given} cannot be given with --model")
            run = run_of_models(name, self.model, settings)
            quick = " --quick" if self.quick else ""
            models = " ".join(f"--model {one}" for one in self.model)
            given = f"{models}{quick}{' ' + options if options else ''}"
            again = [f"orrery compare {name} {given} --seed {self.seed} --out {self.out}"]
            return self.compared(run, again, progress)
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
                progress=step or print_progress,
                **steps,
            )
            quick = " --quick" if self.quick else ""
            count = f" --steps {self.steps}" if steps else ""
            again = [
                f"orrery compare {name} --seeds {self.seeds} --seed {self.seed}{quick}{count}"
                f"{' ' + options if options else ''} --out {self.out}"
            ]
        return self.compared(run, again, progress)

    def compared(self, run: Any, again: list[str], progress: Callable[[str], object]) -> Any:
        """The comparison of a run."""
        from constructions import CATALOGUE
        from probes.report.data import compare

        name, family = run.family, CATALOGUE[run.family]
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
class Import:
    """Make a run directory of weights that were trained elsewhere.

    Arrays are named layers.0.heads.1.query, key, value [width, rows] and output [rows, width]: the
    first axis goes in, y = x @ array; layers and heads are counted from 0. Biases end in _bias;
    further names, of norms, MLPs and embeddings, are in the docstring of
    constructions.interchange.named_weights. Other layouts of attention are known by their names:
    W_Q, W_K, W_V, W_O; one matrix qkv; haiku's MODULE/layer_0/query/w. Nothing is unpickled.
    """

    name: Positional[str]
    weights: Annotated[UseAppendAction[list[Path]], arg(metavar="FILE")]
    """safetensors, npz, or torch's .pt of tensors alone; several, one after the other, are several
    models of one shape"""
    out: Path
    """the run directory"""
    settings: Settings = field(default_factory=list)
    layout: Literal["names", "stacked", "fused", "haiku"] | None = None
    """how arrays are named and cut; by default as their names have it"""
    heads: int | None = None
    """heads side by side in a matrix, where shapes do not say"""
    scores: Literal["plain", "scaled"] | None = None
    """query . key as it is, or over the root of a head's rows"""
    transposed: bool = False
    """matrices are [out, in], as torch's Linear keeps them, although their names do not say so"""
    expect: Annotated[UseAppendAction[list[Path]], arg(metavar="FILE")] = field(
        default_factory=list
    )
    """inputs of the family by name, and the "prediction" of the model for them where it was
    trained; refuses weights that say something else"""
    overwrite: bool = False

    def run(self) -> int:
        """Run the command; the exit status."""
        (name,), settings = family_names((self.name,)), parse_settings(self.settings)
        from constructions.imported import import_weights

        run = import_weights(
            name,
            self.weights,
            settings,
            self.out,
            layout=self.layout,
            heads=self.heads,
            scores=self.scores,
            transposed=self.transposed,
            expect=self.expect or None,
            overwrite=self.overwrite,
        )
        count = f"{len(run.models)} models" if len(run.models) > 1 else "1 model"
        checked = "as expected" if self.expect else "not checked: --expect would"
        print(f"{self.out}: {count} of {name}, predictions {checked}")
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
    workers: int = 0
    """families at a time, each in a process of its own; 0: one a core, at most 4"""
    overwrite: bool = False
    """make all reports anew"""

    def run(self) -> int:
        """Run the command; the exit status."""
        seed_list(self.seed, self.seeds)
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers}: must be at least 1, or 0 for one a core")
        names = family_names(())
        # an earlier demonstration may be replaced, anything else is left alone
        claim_directories(self.out, names)
        described = {name: _described(name) for name in names}
        settings = {"seed": self.seed, "seeds": self.seeds, "made by": sources()}
        index = Index(self.out, described, settings)
        if not self.overwrite:
            index.read()
        missing = index.missing
        workers = min(self.workers or min(cores(), 4), len(missing))
        print(f"{index.write(missing[:workers])} lists the reports", flush=True)
        if index.found and missing:
            print(f"{len(index.found)} of {len(names)} are there already: {', '.join(index.found)}")
        elif not missing:
            print("All of them are there; --overwrite makes them anew.")
        try:
            if workers > 1:
                self.share_out(index, workers)
            else:
                self.fill(index)
        finally:
            index.write()
        certified = all(entry.certified for entry in index.found.values())
        return OK if certified and not index.missing else FAILED

    def fill(self, index: Index) -> None:
        """Make the reports that are missing, one after the other."""
        began, missing = time.perf_counter(), index.missing
        for name in missing:
            index.write([name])
            try:
                made = self.report(index, name)
            except Exception as error:
                self.miss(name, error)
            else:
                self.keep(index, name, made, began, len(missing))

    def share_out(self, index: Index, workers: int) -> None:
        """Make the reports that are missing, so many at a time."""
        began, missing = time.perf_counter(), index.missing
        waiting = list(reversed(missing))
        # one XLA in each: two programs that run at once in one process may wait for ever
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin)
        running: dict[Future[Entry], str] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    name = waiting.pop()
                    running[pool.submit(self.report, index, name)] = name
                index.write(list(running.values()))
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    name, error = running.pop(done), done.exception()
                    if error is None:
                        self.keep(index, name, done.result(), began, len(missing))
                    elif isinstance(error, Exception) and not isinstance(error, BrokenExecutor):
                        self.miss(name, error)
                    else:
                        raise error
        except BaseException:
            for process in active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def report(self, index: Index, name: str) -> Entry:
        """Write the report of a family; what the index says of it."""
        import jax

        from probes.report.page import entry, write_report
        from synthetic.fitting.train import progress_line

        start = time.perf_counter()
        where = f"[{list(index.families).index(name) + 1}/{len(index.families)}] {name}"

        def say(what: str) -> None:
            print(f"{where}: {what}", file=sys.stderr, flush=True)

        say(f"fitting {self.seeds} counterparts")
        command = Compare(name, self.out / name, seeds=self.seeds, seed=self.seed, quick=True)
        comparison = command.comparison(name, {}, say, lambda step: say(progress_line(step)))
        write_report(comparison, command.out, overwrite=True)
        jax.clear_caches()  # the next family has other programs
        return entry(comparison, time.perf_counter() - start)

    def miss(self, name: str, error: Exception) -> None:
        """Say that a report could not be made; the others are."""
        again = f"orrery compare {name} --quick --out {self.out / name} --overwrite says where"
        print(f"orrery: {name}: {one_line(error)}; {again}", file=sys.stderr)

    def keep(self, index: Index, name: str, made: Entry, began: float, missing: int) -> None:
        """Enter a report that is finished, and say how long the others will take."""
        index.found[name] = made
        print(f"{name}: {made.verdict}.\n  {self.out / name / PAGE}", flush=True)
        left = len(index.missing)
        seconds = (time.perf_counter() - began) / (missing - left) * left
        after = f"about {duration(seconds)} to go" if left else "done"
        there = f"{len(index.found)} of {len(index.families)} are there"
        print(f"{name}: {duration(made.seconds)}; {there}, {after}", file=sys.stderr)


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _begin() -> None:
    """What the command does before it computes, in a process of its own."""
    keep_programs()
    collect_rarely()
    compile_quickly()


def _described(name: str) -> tuple[str, str]:
    from constructions import CATALOGUE

    return CATALOGUE[name].about, CATALOGUE[name].source
