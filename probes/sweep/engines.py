"""Where the blocks of a sweep are worked on: in this process, in several of this machine, by Ray.

A block is worked on behind a lock on a file, which the system lets go of when a process ends, in
whatever way. Whoever comes next goes on with the block from its last checkpoint, so that a worker
that is killed costs what it did since then. Ray's workers have a folder of their own, whose
contents come back with the result: they need no disk in common, and a block of a node that is lost
is worked on again from its beginning.

The folder of a sweep holds `sweep.json`; `points/`, a run directory with `measured.json` for each;
`blocks/`, what is in progress; `table.csv`, `table.json`, `report.html` and `figures/`.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from probes.options import duration, one_line
from probes.sweep.plan import FORMAT, Point, Sweep
from synthetic import guards
from synthetic.files import RunError, atomic, claim_folder, json_object, remove

SWEEP = "sweep.json"
#: A block whose worker ends so often without a word is given up.
ATTEMPTS = 3
#: Seconds between two looks at what workers have done, and at least between two tables.
LOOK, REFRESH = 0.3, 10.0
#: The most of the time that is spent on these.
SHARE = 0.05


def run(
    sweep: Sweep,
    out: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    cpus: float | int = 1,
    gpus: float | int = 0,
    overwrite: bool = False,
    progress: Callable[[str], object] | None = None,
) -> list[dict[str, Any]]:
    """Fit and measure every point that is not there yet, and write the table as it grows.

    Args:
        sweep: what to do.
        out: its folder; one of the same sweep is gone on with.
        workers: processes of this machine; 1 is this one.
        ray: the address of a Ray cluster, "auto" for one that runs on this machine, "local" to
            start one here; None: no Ray.
        cpus, gpus: what Ray gives to each block.
        overwrite: begin anew where a sweep is there.
        progress: called with lines that say how far it is.

    Returns:
        The table: a row for every seed of every point that is done or has failed.

    Raises:
        ValueError: an option that is not allowed.
        RunError: the folder cannot be written, or holds something else.
    """
    check_engine(workers, ray, cpus, gpus)
    open_folder(sweep, out, overwrite=overwrite)
    from probes.sweep.work import layout

    table = _Table(sweep, out, layout(sweep), progress or (lambda _: None))
    table.refresh()
    try:
        if ray is not None:
            _on_ray(table, ray, cpus, gpus)
        elif workers == 1:
            _work(table)
        else:
            _on_processes(table, workers)
    finally:
        table.refresh(last=True)
    if not table.open and not table.failed:
        remove(out / "blocks")  # nothing is in progress
    return table.rows


def check_engine(workers: int, ray: str | None, cpus: float | int, gpus: float | int) -> None:
    """ValueError where blocks cannot be worked on in this way; needs no JAX."""
    guards.number("workers", workers, whole=True, least=1)
    if ray is not None and workers != 1:
        raise ValueError(f"workers is {workers}, must be left at 1 with ray: it has its own")
    guards.number("cpus", cpus, least=0)
    guards.number("gpus", gpus, least=0)
    if ray is not None and importlib.util.find_spec("ray") is None:
        raise ValueError("ray: not installed; pip install 'orrery-transformers[cluster]' brings it")


def open_folder(sweep: Sweep, out: Path, *, overwrite: bool = False) -> None:
    """Begin a sweep in a folder, or go on with one; needs no JAX.

    Raises:
        RunError: the folder cannot be written, or holds another sweep or anything else.
    """
    file = out / SWEEP
    if file.is_file() and not overwrite:
        claim_folder(out, "sweep", _is_sweep, overwrite=True)
        found, asked = json_object(file), sweep.to_json()
        for name in asked:
            if found.get(name) != asked[name]:
                raise RunError(
                    f"{file}: {name}: {json.dumps(found.get(name))} in the sweep that is there, "
                    f"{json.dumps(asked[name])} asked; give --overwrite or another folder"
                )
        return
    if out.is_dir():
        remove(out / f".{SWEEP}.partial")  # of one that was cut off before it began
    claim_folder(out, "sweep", _is_sweep, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    tables = [f"table.{kind}" for kind in ("csv", "json", "parquet")]
    for name in ("points", "blocks", "figures", "report.html", *tables):
        remove(out / name)
    with atomic(file) as partial:
        partial.write_text(json.dumps(sweep.to_json(), indent=2) + "\n")


def _is_sweep(out: Path) -> bool:
    try:
        return json_object(out / SWEEP).get("format") == FORMAT
    except RunError:
        return False


class _Table:
    """What is there of a sweep, what has failed, and how long the rest will take."""

    def __init__(
        self, sweep: Sweep, out: Path, blocks: list[list[Point]], say: Callable[[str], object]
    ) -> None:
        self.sweep, self.out, self.blocks, self.say = sweep, out, blocks, say
        self.failed: dict[int, str] = {}  # of blocks, in this run
        self.rows: list[dict[str, Any]] = []
        self._began, self._written, self._spoke = time.perf_counter(), 0.0, 0.0
        self._next = 0.0
        self._known: dict[int, dict[str, Any]] = {}
        self._look()
        self._before = len(self._known)

    def _look(self) -> None:
        from probes.sweep.work import measured

        for block in self.blocks:
            for point in block:
                if point.number not in self._known:
                    found = measured(self.out, point)
                    if found is not None:
                        self._known[point.number] = found

    def missing(self, number: int) -> bool:
        """Whether a block has points that are neither there nor given up."""
        if number in self.failed:
            return False
        return any(point.number not in self._known for point in self.blocks[number])

    @property
    def open(self) -> list[int]:
        """The blocks that are still to be worked on."""
        self._look()
        return [number for number in range(len(self.blocks)) if self.missing(number)]

    def fail(self, number: int, error: BaseException | str) -> None:
        """A block cannot be worked on; what it lacks is listed with this line."""
        self.failed[number] = one_line(error)
        self.say(f"block {number + 1} of {len(self.blocks)}: {self.failed[number]}")

    def step(self, number: int, record: Mapping[str, Any]) -> None:
        """How far the fit of a block is; said now and then."""
        if time.perf_counter() - self._spoke > LOOK * 10:
            self._spoke = time.perf_counter()
            done = f"step {record['step']}/{record['steps']}"
            self.say(f"block {number + 1} of {len(self.blocks)}: {done}")

    def refresh(self, last: bool = False) -> None:
        """Write table, figures and page, if they are not too fresh, and say how far it is."""
        from probes.sweep import results

        self._look()
        done, total = len(self._known), sum(map(len, self.blocks))
        now = time.perf_counter()
        if not last and self._written and now < self._next:
            return
        self.rows = self._all_rows()
        try:
            results.write(self.sweep, self.out, self.rows, self.notes, total - done, last)
        except OSError as error:  # a full disk: the points that are there stay
            self.say(one_line(error))
        self._written = time.perf_counter()
        self._next = self._written + max(REFRESH, (self._written - now) / SHARE)
        made = done - self._before
        left = (now - self._began) / made * (total - done) if made else None
        rest = "" if left is None or done == total else f"; about {duration(left)} to go"
        self.say(f"{done} of {total} points, {duration(now - self._began)}{rest}")

    @property
    def notes(self) -> list[str]:
        """What could not be measured, with its point."""
        known = sorted(self._known.items())
        return [f"point {number}: {line}" for number, found in known for line in found["notes"]]

    def _all_rows(self) -> list[dict[str, Any]]:
        from probes.sweep.work import row

        rows = {number: found["rows"] for number, found in self._known.items()}
        for number, line in self.failed.items():
            for point in self.blocks[number]:
                if point.number not in rows:
                    each = [row(point, seed, line) for seed in self.sweep.seeds]
                    rows[point.number] = each
        return [row for _, each in sorted(rows.items()) for row in each]


@contextlib.contextmanager
def _locked(out: Path, number: int) -> Iterator[bool]:
    """Whether this process has the block for as long as the context lasts."""
    import fcntl

    folder = out / "blocks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{number:05d}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            yield False
            return
        yield True  # closing the file gives it back


def _work(table: _Table, alive: Callable[[], object] = lambda: None) -> None:
    """Work on all blocks that nobody else has."""
    from probes.sweep.work import work

    programs: dict[str, Any] = {}

    def progress(number: int, record: Mapping[str, Any]) -> None:
        alive()
        table.step(number, record)

    waiting = True
    while waiting:
        waiting = False
        for number in table.open:
            try:
                with _locked(table.out, number) as ours:
                    if not ours:
                        waiting = True
                        continue
                    if number not in table.open:
                        continue  # another process was faster
                    (table.out / "blocks" / f"{number:05d}.worker").write_text(str(os.getpid()))
                    work(
                        table.sweep, number, table.blocks[number], table.out, programs,
                        lambda record, n=number: progress(n, record),
                    )  # fmt: skip
            except Exception as error:  # a full disk, no memory: one line, and the rest goes on
                table.fail(number, error)
            table.refresh()
        if waiting:
            alive()
            time.sleep(LOOK)


class _Worker(_Table):
    """The table as a worker process has it: it writes none, and leaves failures to be read."""

    def fail(self, number: int, error: BaseException | str) -> None:
        self.failed[number] = one_line(error)
        print(json.dumps({"block": number, "failed": self.failed[number]}), flush=True)

    def refresh(self, last: bool = False) -> None:
        del last


def _on_processes(table: _Table, workers: int) -> None:
    """Blocks in so many processes; one that ends without a word is started again."""
    command = [sys.executable, "-m", "probes.sweep.engines", str(table.out)]
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    running: dict[subprocess.Popen[bytes], Any] = {}  # -> the file with what it says
    ended: dict[int, int] = {}  # block -> how often its worker did
    silent = 0
    try:
        while table.open:
            for process, said in list(running.items()):
                lines = _said(said)
                for line in lines:
                    found = json.loads(line) if line.startswith('{"block": ') else None
                    if found and found["block"] not in table.failed:
                        table.fail(found["block"], found["failed"])
                if process.poll() is None:
                    continue
                running.pop(process).close()
                code = process.returncode
                if code == 0:
                    continue
                ending = f"signal {-code}" if code < 0 else f"status {code}"
                why = f"its process ended with {ending}"
                number = _block_of(table, process.pid)
                if number is None:
                    silent += 1
                    if silent >= ATTEMPTS:
                        last = lines[-1] if lines else "nothing said"
                        raise RuntimeError(f"workers do not start: {why}: {last}")
                    continue
                table.say(f"block {number + 1} of {len(table.blocks)}: {why}; once more")
                ended[number] = ended.get(number, 0) + 1
                if ended[number] >= ATTEMPTS:
                    table.fail(number, f"{why}, {ATTEMPTS} times")
            while len(running) < min(workers, len(table.open)):
                said = tempfile.TemporaryFile()  # noqa: SIM115
                given = [*command, *map(str, sorted(table.failed))]
                running[subprocess.Popen(given, stdout=said, stderr=said, env=environment)] = said
            time.sleep(LOOK)
            table.refresh()
    finally:
        for process, said in running.items():
            if process.poll() is None and table.open:
                process.terminate()
            process.wait()
            said.close()


def _said(file: Any) -> list[str]:
    """The lines of a worker so far; read without moving the place at which it writes."""
    return os.pread(file.fileno(), 2**20, 0).decode(errors="replace").splitlines()


def _block_of(table: _Table, pid: int) -> int | None:
    """The block that a process had when it ended."""
    for number in table.open:
        file = table.out / "blocks" / f"{number:05d}.worker"
        if file.is_file() and file.read_bytes() == str(pid).encode():
            return number
    return None


def worker(out: Path, given_up: list[int]) -> None:
    """Work on the blocks of a sweep until none is left, or whoever started this is gone."""
    from probes.options import importable_here
    from probes.sweep.work import layout
    from synthetic.compilation import collect_rarely, keep_programs

    importable_here()
    keep_programs()
    collect_rarely()
    parent = os.getppid()

    def alive() -> None:
        if os.getppid() != parent:
            sys.exit(0)

    sweep = Sweep.from_json(json_object(out / SWEEP))
    table = _Worker(sweep, out, layout(sweep), lambda _: None)
    table.failed = dict.fromkeys(given_up, "")
    _work(table, alive)


def _on_ray(table: _Table, address: str, cpus: float | int, gpus: float | int) -> None:
    """Blocks as tasks of Ray, each tried again where its worker or node is lost."""
    import ray  # pyright: ignore[reportMissingImports]

    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    local: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    options: dict[str, Any] = local if address == "local" else {"address": address}
    if address == "local":  # elsewhere, every node has the package
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, **options)
    try:
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=ATTEMPTS)(remote_block)
        content = table.sweep.to_json()
        pending = {remote.remote(content, number): number for number in table.open}
        while pending:
            ready, _ = ray.wait(list(pending), timeout=1)
            for reference in ready:
                number = pending.pop(reference)
                try:
                    _put(table.out, ray.get(reference))
                except Exception as error:  # of a worker; what is lost is listed
                    table.fail(number, error)
            table.refresh()
    finally:
        if ours:
            ray.shutdown()


def remote_block(content: Mapping[str, Any], number: int) -> dict[str, bytes]:
    """All points of a block, made in a folder of this machine: path in the sweep's -> contents."""
    from probes.sweep.work import layout, work

    sweep = Sweep.from_json(content)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        work(sweep, number, layout(sweep)[number], out)
        files = (path for path in sorted((out / "points").rglob("*")) if path.is_file())
        return {str(path.relative_to(out)): path.read_bytes() for path in files}


def _put(out: Path, files: Mapping[str, bytes]) -> None:
    """Put points that were made elsewhere in their places, each as a whole."""
    folders: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        kind, folder, file = Path(name).parts
        folders.setdefault(f"{kind}/{folder}", {})[file] = content
    for name, contents in folders.items():
        place = out / name
        if place.exists():
            continue
        partial = place.with_name(f".{place.name}.partial")
        remove(partial)
        partial.mkdir(parents=True)
        for file, content in contents.items():
            (partial / file).write_bytes(content)
        os.replace(partial, place)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), list(map(int, sys.argv[2:])))
