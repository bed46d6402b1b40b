"""Sweeps: one table after a kill, from several processes and from Ray; what fails is a line."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from constructions.runs import construct, load_run
from probes.cli import main
from probes.sweep import engines, results, work
from probes.sweep.plan import Sweep, known_settings, parse_grid, recipe_fields
from synthetic.fitting.recipe import Recipe, varied
from synthetic.fitting.train import fit

ROOT = Path(__file__).parents[2]
FIXED = {
    "dim_x": 2,
    "num_examples": 3,
    "batch": 8,
    "chunk": 5,
    "checkpoint_every": 10,
    "recipe.steps": 60,
}
#: Four points of one program, in two blocks.
SWEEP = Sweep(
    "gradient-descent",
    {"noise": (0.1, 0.2), "learning_rate": (0.01, 0.02)},
    measures=("loss", "canonical_distance"),
    settings=FIXED,
    lanes=2,
    examples=256,
)
ARGV = ["sweep", SWEEP.name, "--grid", "noise=0.1,0.2", "--grid", "learning_rate=0.01:0.02:0.01"]
ARGV += ["--measure", "loss,canonical_distance", "--lanes", "2", "--examples", "256"]
ARGV += [word for name, value in FIXED.items() for word in ("--set", f"{name}={value}")]


def tables(out: Path) -> tuple[bytes, bytes]:
    return (out / "table.csv").read_bytes(), (out / "table.json").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, without an interruption."""
    out = tmp_path_factory.mktemp("sweep") / "whole"
    rows = SWEEP.run(out)
    assert [row["failed"] for row in rows] == [None] * 4
    return out


def test_rows_are_what_the_saved_runs_say(whole: Path) -> None:
    rows = json.loads((whole / "table.json").read_text())["rows"]
    for row, point in zip(rows, SWEEP.points, strict=True):
        run = load_run(whole / "points" / point.folder)
        assert run.settings["noise"] == row["noise"] == point.values["noise"]
        assert run.recipe is not None and run.recipe.learning_rate == row["learning_rate"]
        counterpart = run.construction.counterpart()
        key = jax.random.fold_in(jax.random.key(2**32 - 1), 256)
        batch = counterpart.task.sample(key, 256)
        for name, model in (("loss", run.models[0]), ("construction", run.construction.reference)):
            error = np.asarray(run.construction.predict(model, *batch.inputs) - batch.target)
            assert row[name] == pytest.approx(0.5 * np.square(error).sum() / 256, rel=1e-5)
        assert counterpart.metrics is not None
        distance = float(counterpart.metrics(run.models[0])["canonical_distance"])
        assert row["canonical_distance"] == pytest.approx(distance, rel=0.05)  # to the best step
        assert row["optimum"] == counterpart.optimum
    page = (whole / "report.html").read_text()
    assert "All 4 points are there." in page and "http-equiv" not in page
    assert len(list((whole / "figures").glob("*.png"))) == 4


def test_a_fit_among_others_is_the_fit_alone() -> None:
    one = construct("gradient-descent", {"dim_x": 2, "num_examples": 3, "noise": 0.1})
    other = construct("gradient-descent", {"dim_x": 2, "num_examples": 3, "noise": 0.3})
    recipe = Recipe(steps=12, batch=8, chunk=6, clip=0.5, schedule="cosine", warmup=3)
    numbers = ("learning_rate", "b1", "b2", "eps", "clip")
    values = [(1e-2, 0.9, 0.99, 1e-8, 0.5), (3e-2, 0.8, 0.9, 1e-4, 0.1)]
    lanes = {f"recipe.{n}": v for n, v in zip(numbers, zip(*values, strict=True), strict=True)}
    lanes["recipe.learning_rate"] += (1e30,)
    lanes = {name: [*each, each[0]][:3] for name, each in lanes.items()}
    lanes["task.noise"] = [0.1, 0.3, 0.1]
    options: dict[str, Any] = {"recipe": recipe, "metrics": None, "optimum": None}
    together = one.fit(seeds=[4, 5, 4], lanes=lanes, **options)
    said = together.history[-1]["failed"]
    assert said[:2] == [None, None] and said[2].endswith(("at step 1", "at step 2"))
    assert together.history[-1]["loss"][2] is None
    for n, (construction, own) in enumerate(zip((one, other), values, strict=True)):
        alone = construction.fit(seeds=[4 + n], **options, **dict(zip(numbers, own, strict=True)))
        for record, both in zip(alone.history, together.history, strict=True):
            assert both["loss"][n] == pytest.approx(record["loss"][0], rel=1e-5)
    for wrong in ({"recipe.steps": [1.0]}, {"task.dim_x": [1.0]}, {"recipe.eps": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="lanes: "):
            fit(lambda _: one.reference, one.task, recipe, seeds=[0], lanes=wrong)


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "probes.cli", *ARGV, "--out", str(out), *more]


def when(there: Callable[[], Any], then: Callable[[Any], object]) -> threading.Thread:
    """Do something as soon as something else is there."""

    def watch() -> None:
        began = time.monotonic()
        while time.monotonic() - began < 120:
            if found := there():
                return then(found)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_killed_and_gone_on_with(whole: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def begun() -> bool:  # the second block has a record, the first one is done
        file = out / "blocks" / "00001" / "metrics.jsonl"
        return file.is_file() and file.read_bytes().count(b"\n") > 3

    watcher = when(begun, lambda _: process.send_signal(signal.SIGKILL))
    assert process.wait(120) == -signal.SIGKILL
    watcher.join()
    assert len(list((out / "points").glob("0*"))) == 2
    kept = {f: f.stat().st_mtime_ns for f in (out / "points").rglob("*.json")}
    other = [word.replace("noise=0.1,0.2", "noise=0.1,0.3") for word in ARGV]
    assert main([*other, "--out", str(out)]) == 2
    assert f"{out / 'sweep.json'}: grid: " in capsys.readouterr().err
    assert main([*ARGV, "--out", str(out)]) == 0
    assert tables(out) == tables(whole)
    assert all(file.stat().st_mtime_ns == before for file, before in kept.items())


def test_two_processes_of_which_one_is_killed(whole: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "two", []

    def a_worker() -> int | None:
        for file in (out / "blocks").glob("*.worker"):
            if (out / "blocks" / file.stem / "metrics.jsonl").is_file():
                return int(file.read_text() or 0)
        return None

    watcher = when(a_worker, lambda pid: os.kill(pid, signal.SIGKILL))
    SWEEP.run(out, workers=2, progress=said.append)
    watcher.join()
    assert any("its process ended with signal 9; once more" in line for line in said)
    assert tables(out) == tables(whole)


def test_what_fails_is_a_line_and_the_rest_goes_on(tmp_path: Path, capsys: Any) -> None:
    argv = ["sweep", "gradient-descent", "--grid", "learning_rate=0.01,1e30"]
    argv += ["--grid", "num_examples=3,0", "--examples", "256", "--out", str(tmp_path / "out")]
    argv += [w for n, v in FIXED.items() if n != "num_examples" for w in ("--set", f"{n}={v}")]
    assert main(argv) == 1
    written = capsys.readouterr().err.splitlines()
    failed = [line for line in written if line.startswith("orrery: ")]
    assert failed == [
        "orrery: point 1, seed 0: num_examples is 0, must be an integer of at least 1",
        f"orrery: point 2, seed 0: {failed[1].partition(': point 2, seed 0: ')[2]}",
        "orrery: point 3, seed 0: num_examples is 0, must be an integer of at least 1",
    ]
    assert "at step" in failed[1]
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [row["failed"] is None for row in rows] == [True, False, False, False]
    assert "What failed" in (tmp_path / "out" / "report.html").read_text()


def test_a_full_disk(whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out, write = tmp_path / "full", work.write

    def full(out: Path, point: Any, *arguments: Any) -> None:
        if point.number == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(out / "points"))
        write(out, point, *arguments)

    monkeypatch.setattr(work, "write", full)
    rows = SWEEP.run(out)
    line = f"{out / 'points'}: No space left on device"
    lost = {point.number for point in work.layout(SWEEP)[0]}
    assert {row["point"] for row in rows if row["failed"] == line} == lost
    monkeypatch.setattr(work, "write", write)
    SWEEP.run(out)
    assert tables(out) == tables(whole)


@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_ray_gives_the_same_table(whole: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed (the extra cluster)")
    ray.init(
        num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )  # fmt: skip
    try:
        killed: list[int] = []

        def workers() -> list[int]:
            found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True)
            lines = (line.split(maxsplit=1) for line in found.stdout.splitlines())
            return [int(pid) for pid, name in lines if name.startswith("ray::remote_block")]

        def kill(found: list[int]) -> None:
            time.sleep(1)
            killed.append(found[0])
            os.kill(found[0], signal.SIGKILL)

        watcher = when(workers, kill)
        SWEEP.run(tmp_path / "ray", ray="auto")
        watcher.join()
    finally:
        ray.shutdown()
    assert killed and tables(tmp_path / "ray") == tables(whole)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("5:20:5", [5, 10, 15, 20]),
        ("0:1:0.3", [0.0, 0.3, 0.6, 0.9]),
        ("1,0.5,relu", [1, 0.5, "relu"]),
        ('[1,2],{"gaussian":[[1,0],[0,2]]}', [[1, 2], {"gaussian": [[1, 0], [0, 2]]}]),
        ("true,null", [True, None]),
    ],
)
def test_values_of_a_grid(text: str, values: list[Any]) -> None:
    assert parse_grid([f"a={text}"]) == {"a": values}


def test_blocks_hold_points_of_one_program() -> None:
    grid = {"dim_x": (2, 3), "noise": (0, 0.1, 0.2), "learning_rate": (1e-2, 2e-2)}
    sweep = Sweep("gradient-descent", grid, seeds=(0, 1, 2), lanes=7)
    found = [[tuple(p.values.values()) for p in block] for block in work.layout(sweep)]
    assert sorted(values for block in found for values in block) == sorted(
        tuple(p.values.values()) for p in sweep.points
    )
    for block in found:
        assert len(block) <= 2 and len({(dim, noise > 0) for dim, noise, _ in block}) == 1
    assert len(found) == 6  # for each size: 1 without noise, 2 with
    assert Sweep.from_json(sweep.to_json()) == sweep


def test_settings_read_from_source_are_those_of_the_classes() -> None:
    import dataclasses
    import inspect

    from constructions import CATALOGUE

    assert recipe_fields() == [field.name for field in dataclasses.fields(Recipe)]
    for family in CATALOGUE.values():
        every = inspect.signature(family.constructor).parameters
        assert sorted(known_settings(family) or []) == sorted(every), family.name


BAD = [
    (["--grid", "depth=1"], "unknown setting of gradient-descent 'depth', must be one of"),
    (["--grid", "recipe.depth=1"], "unknown field of a recipe 'recipe.depth', must be one of"),
    (["--grid", "dim_x=5:1:1"], "--grid dim_x=5:1:1: must be lo:hi:step"),
    (["--grid", "dim_x"], "--grid dim_x: must be SETTING=a,b,c"),
    (["--grid", "dim_x=1,,2"], "a value is empty"),
    (["--grid", "dim_x=2,2"], "dim_x has 2 twice"),
    (["--grid", "dim_x=1", "--set", "dim_x=2"], "in the grid and among the settings"),
    (["--grid", "dim_x=1:9999999:1"], "must be at most"),
    (["--grid", "dim_x=1", "--measure", "lost"], "unknown measure 'lost', must be one of loss"),
    (["--grid", "dim_x=1", "--measure", "probe:lost"], "unknown probe 'lost', must be one of"),
    (["--grid", "dim_x=1", "--seeds", "0"], "--seeds 0: must be at least 1"),
    (["--grid", "dim_x=1", "--lanes", "0"], "lanes is 0"),
    (["--grid", "dim_x=1", "--workers", "0"], "workers is 0"),
    (["--grid", "dim_x=1", "--workers", "2", "--ray", "auto"], "must be left at 1 with ray"),
    (["--grid", "dim_x=1", "--cpus", "-1"], "cpus is -1"),
    (["--grid", "dim_x=1", "--out", "/proc/none"], "/proc/none: cannot be written"),
    (["--grid", "dim_x=1", "--out", "."], "is not empty"),
]


def test_mistakes_are_one_line_before_jax_is_imported(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    argv = [["sweep", "gradient-descent", "--out", "new", *more] for more, _ in BAD]
    code = (
        "import json, sys\nfrom probes.cli import main\n"
        "found = [main(argv) for argv in json.loads(sys.argv[1])]\n"
        "sys.exit(0 if found == [2] * len(found) and 'jax' not in sys.modules else 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(argv)], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == len(BAD), done.stderr
    for line, (_, message) in zip(lines, BAD, strict=True):
        assert line.startswith("orrery: ") and message in line
    assert sorted(tmp_path.iterdir()) == [tmp_path / "something"]


def test_the_interval_is_that_of_student() -> None:
    values = [1.0, 2.0, 4.0, 3.5]
    mean, half = results.mean_and_half(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert results.mean_and_half([2.0]) == (2.0, 0.0)


def test_lines_of_errors() -> None:
    assert engines.one_line(OSError(28, "No space", "f")) == "f: No space"
    assert engines.one_line(ZeroDivisionError("a\nb")) == "ZeroDivisionError: a b"


def test_families_and_summary_of_the_kept_sweeps(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sweeps

    assert sweeps.AsManyExamples(dim_x=3).task.num_examples == 3
    x = sweeps.Stretched(smallest=0.25).task.sample(jax.random.key(0), 4096).inputs[0]
    deviations = np.asarray(x).std(axis=(0, 1))
    assert deviations == pytest.approx([0.25, 0.354, 0.5, 0.707, 1], rel=0.03)
    sweep = Sweep("gradient-descent", {"dim_x": (2, 3)}, seeds=(0, 1))
    rows = [
        {"point": 0, "dim_x": 2, "seed": 0, "loss": 2.2, "construction": 2.0, "failed": None},
        {"point": 0, "dim_x": 2, "seed": 1, "loss": 2.6, "construction": 2.0, "failed": None},
        {"point": 1, "dim_x": 3, "seed": 0, "loss": None, "construction": None, "failed": "NaN"},
    ]
    (line,) = sweeps.summary(sweep, rows)
    assert line["dim_x"] == 2 and line["seeds"] == 2
    # half the interval of two values: t(.975, 1) = 12.71 times half their distance
    assert line["excess"] == [pytest.approx(0.2), pytest.approx(1.271, rel=1e-3)]


def test_the_two_estimators_of_a_pool_of_tasks(monkeypatch: Any, x64: None) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import task_diversity as diversity

    rng = np.random.default_rng(0)
    x, query, pool = rng.normal(size=(3, 5, 2)), rng.normal(size=(3, 4, 2)), rng.normal(size=(6, 2))
    y = rng.normal(size=(3, 5, 1))
    found = np.asarray(diversity.pool_estimate(x, y, query, pool, 0.7))
    for b in range(3):
        # the posterior by Bayes' rule, task by task and example by example
        p = np.array([np.prod(stats.norm(x[b] @ w, 0.7).pdf(y[b, :, 0])) for w in pool])
        assert found[b, :, 0] == pytest.approx(query[b] @ (p @ pool) / p.sum())
    # of very many tasks from N(0, I) it is ridge, the posterior mean under that prior
    many = rng.normal(size=(200_000, 2))
    of_many = np.asarray(diversity.pool_estimate(x, y, query, many, 0.7))
    gram = np.einsum("bni,bnj->bij", x, x) + 0.49 * np.eye(2)
    w = np.linalg.solve(gram, np.einsum("bni,bnk->bik", x, y))
    assert of_many == pytest.approx(np.asarray(query @ w), abs=0.05)
    assert diversity.crossing([1, 4, 16], [1.0, 1.0, 4.0], [2.0, 2.0, 2.0]) == pytest.approx(8.0)
    assert diversity.crossing([1, 4], [1.0, 1.0], [2.0, 2.0]) is None
    batch = diversity.PoolTask(pool=2.0).sample(jax.random.key(0), 64)
    slopes = np.linalg.solve(np.asarray(batch.inputs[2][:, :3]), np.asarray(batch.target[:, :3]))
    assert len(np.unique(slopes.round(4), axis=0)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gradient-descent", "gd-plus-plus", "separate-tokens", "noisy-regression"]
)
def test_numbers_change_nothing_but_the_task(name: str) -> None:
    numbers = type(construct(name)).numbers
    fixed = {"noise_levels": ()} if name == "noisy-regression" else {"num_examples": 3}
    made = [construct(name, fixed | dict.fromkeys(numbers, value)) for value in (0.2, 0.3)]
    one, other = (construction.counterpart() for construction in made)
    models = [each.init(jax.random.key(3)) for each in (one, other)]
    for ours, theirs in zip(*map(jax.tree.leaves, models), strict=True):
        assert np.array_equal(ours, theirs)
    inputs = one.task.sample(jax.random.key(0), 4).inputs
    said = [np.asarray(c.predict(models[0], *inputs)) for c in made]
    assert np.array_equal(*said)
    assert one.recipe == other.recipe
    free = [field for field in type(one.task).NUMBERS if getattr(one.task, field) > 0]
    assert varied(one.task, {field: getattr(other.task, field) for field in free}) == other.task
