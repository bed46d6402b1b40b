"""Every mistake is one clear line: status 2 from the command, a typed exception from Python."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from constructions.core.compile import compile_program
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots
from constructions.gradient_descent.construction import GradientDescent
from probes.cli import main
from synthetic.fitting.run_directory import Checkpoints
from synthetic.fitting.train import NonFiniteLossError, fit
from synthetic.fitting.weights_file import load_state, save_model
from synthetic.tasks.task import Batch

NAME = "gradient-descent"
SMALL = ["--set", "dim_x=2", "--set", "num_examples=3"]


def complaint(capsys: Any, argv: list[str], status: int = 2) -> str:
    """What the command says on stderr, which must be a single line."""
    capsys.readouterr()
    assert main(argv) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("orrery: "), lines
    return lines[0].removeprefix("orrery: ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad") / "run"
    assert main(["fit", NAME, "--out", str(path), *SMALL, "--steps", "4", "--batch", "4"]) == 0
    return path


SETTINGS = [
    ("dim_x=0", "dim_x is 0, must be an integer of at least 1"),
    ("dim_y=-3", "dim_y is -3"),
    ("num_examples=2.5", "num_examples.*2.5"),
    ("num_examples=NaN", "num_examples.*nan"),
    ("steps=true", "steps.*True"),
    ("steps=2", "step_size is None, must be given for steps=2"),
    ("step_size=NaN", "step_size is nan, must be a finite number"),
    ("step_size=Infinity", "step_size is inf"),
    ("step_size=large", "step_size.*'large'"),
    ("step_size=true", "step_size.*True"),
    ("recurrent=maybe", "recurrent.*'maybe'"),
    ("init_weight=[1,2]", r"init_weight has shape \(2,\).* shape \(1, 10\)"),
    ("init_weight=zero", "init_weight is 'zero', must be finite numbers"),
    ("init_weight=[[1],[1,2]]", "init_weight is .*, must be finite numbers"),
    ('init_weight={"a":1}', "init_weight is .*, must be finite numbers"),
    ("init_weight=[[NaN,0,0,0,0,0,0,0,0,0]]", "init_weight holds NaN"),
    ("depth=3", "unknown setting 'depth'"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": ["a", "a"]}, "vocabulary: 'a' is there twice"),
        ({"root": {"A": 10**400}}, "'root' .* is too large for a float"),
        ({"emission": {"A": {"": 1}}}, "'' is in a rule but is no symbol or word"),
    ],
    ids=["repeated word", "large integer", "empty word"],
)
def test_grammars_that_are_none(capsys: Any, change: dict[str, Any], message: str) -> None:
    grammar = {"vocabulary": ["a"], "root": {"A": 1}, "rules": {}, "emission": {"A": {"a": 1}}}
    said = complaint(
        capsys, ["verify", "inside-outside", "--set", f"grammar={json.dumps(grammar | change)}"]
    )
    assert re.search(message, said)


@pytest.mark.parametrize(("setting", "message"), SETTINGS, ids=[s for s, _ in SETTINGS])
def test_settings(setting: str, message: str, capsys: Any) -> None:
    assert re.search(message, complaint(capsys, ["verify", NAME, "--set", setting]))


OPTIONS = [
    (["nonsense"], "Unrecognized options: nonsense"),
    ([], "Expected one of"),
    (["fit", NAME], "Missing from orrery fit: --out PATH"),
    (["verify", "--dtype", "float16"], "invalid choice 'float16' for argument '--dtype'"),
    (["fit", NAME, "--out", "new", "--steps", "many"], "Error parsing --steps"),
    (["fit", NAME, "--out", "new", "--stepz", "3"], "Unrecognized options: --stepz, 3"),
    (["fit", NAME, "--out", "new", "--learning-rate", "nan"], "learning_rate=nan"),
    (["fit", NAME, "--out", "new", "--batch", "-1"], "batch=-1"),
    (["fit", NAME, "--out", "new", "--seed", "-1"], "seed -1: must be in 0"),
    (["verify", NAME, "--seed", "-1"], "--seed -1: must be in 0"),
    (["verify", NAME, "--seed", str(2**70)], f"--seed {2**70}: must be in 0"),
    (["claims", NAME, "--seeds", "0"], "--seeds 0: must be at least 1"),
    (["demo", "--out", "new", "--seeds", "0"], "--seeds 0: must be at least 1"),
    (["compare", NAME, "--out", "new", "--seeds", "-1"], "--seeds -1: must be at least 1"),
    (["compare", NAME, "--run", "absent", "--out", "new"], "absent/config.json: missing"),
    (["compare", NAME, "--run", "r", "--out", "new", "--steps", "5"], "--steps 5 cannot be given"),
    (["fit", NAME, "--out", "file/run", *SMALL, "--steps", "4"], "file/run.*: Not a directory"),
    (["fit", NAME, "--out", "file", *SMALL], "file: exists and is no directory"),
]


@pytest.mark.parametrize(("argv", "message"), OPTIONS, ids=[" ".join(a) for a, _ in OPTIONS])
def test_options(
    argv: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").symlink_to(run)
    (tmp_path / "file").write_text("precious")
    line = complaint(capsys, argv)
    assert re.search(message, line), line
    assert (tmp_path / "file").read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_json_file_is_not_replaced(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "v.json"
    file.write_text("precious")
    assert "exists" in complaint(capsys, ["verify", NAME, "--json", str(file)])
    assert file.read_text() == "precious"


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        file = run / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


def other_shape(run: Path) -> None:
    arrays, config = load_state(run / "model.safetensors")
    arrays["segments.0.layers.0.heads.0.key"] = np.zeros((1, 2), np.float32)
    save_model(run / "model.safetensors", arrays, config, overwrite=True)


def foreign(run: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3)}, run / "model.safetensors")


def cut(run: Path) -> None:
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 3:
            file.write_bytes(file.read_bytes()[:-3])


PROBE = ["probe", "similarity", "--run", "RUN"]
RESUME = ["fit", NAME, "--out", "RUN", "--resume"]
DAMAGE = [
    (edit_config(version=99), PROBE, "config.json: version: 99, expected 1"),
    (edit_config(version=99), RESUME, "config.json: version: 99, expected 1"),
    (edit_config(format="other"), PROBE, "config.json: format: 'other'"),
    (edit_config(family="other"), PROBE, "config.json: family: 'other'"),
    (edit_config(settings={"dim_x": -1}), PROBE, "config.json: settings: dim_x is -1"),
    (edit_config(settings=[1]), RESUME, r"config.json: settings: \[1\]"),
    (edit_config(recipe={"steps": -1}), RESUME, "config.json: recipe: steps=-1"),
    (edit_config(seed="a"), PROBE, "config.json: seed: 'a'"),
    (edit_config(dtype="int8"), PROBE, "config.json: dtype: 'int8'"),
    (lambda r: (r / "config.json").write_text("{"), PROBE, "config.json: truncated"),
    (lambda r: (r / "config.json").write_bytes(b"\xff\xfe"), RESUME, "config.json: truncated"),
    (lambda r: (r / "metrics.jsonl").write_text("no\n"), PROBE, "metrics.jsonl: line 1"),
    (lambda r: (r / "model.safetensors").write_bytes(b""), PROBE, "safetensors: truncated"),
    (lambda r: (r / "model.safetensors").unlink(), PROBE, "safetensors: missing"),
    (foreign, PROBE, "safetensors: format: None"),
    (other_shape, PROBE, r"heads.0.key: shape \[1, 2\], the model has \[1, 1, 3, 3\]"),
    (cut, RESUME, "checkpoints: none of the checkpoints .* can be read"),
    (lambda r: None, [*RESUME, "--set", "dim_x=3"], "settings.dim_x: 2 in the run, 3 asked"),
    (lambda r: None, [*RESUME, "--seed", "5"], "seed: 0 in the run, 5 asked"),
    (lambda r: None, [*RESUME, "--overwrite"], "choose one"),
    (lambda r: None, ["fit", NAME, "--out", "RUN"], "exists and is not empty"),
]


@pytest.mark.parametrize(("damage", "argv", "message"), DAMAGE, ids=[d[2] for d in DAMAGE])
def test_damaged_run(
    damage: Any, argv: list[str], message: str, run: Path, tmp_path: Path, capsys: Any
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    damage(copy)
    line = complaint(capsys, [str(copy) if a == "RUN" else a for a in argv])
    assert re.search(message, line), line


class Trap(nnx.Module):
    """Sound for 25 steps of plain descent on its loss -w, which w = 25 ends."""

    def __init__(self) -> None:
        self.w = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Any) -> Any:
        return jnp.where(self.w[...] > 24.5, jnp.inf, self.w[...]) * x


class Falling:
    def sample(self, key: Any, batch: int) -> Batch:
        return Batch((jnp.ones(batch),), None)

    def loss(self, prediction: Any, batch: Batch) -> Any:
        return -prediction


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    out, options = tmp_path / "r", {"optimizer": "sgd", "b1": 0.0, "learning_rate": 1.0}
    sizes = {"steps": 60, "batch": 2, "chunk": 10, "checkpoint_every": 10}
    with pytest.raises(NonFiniteLossError, match="loss is -inf at step 25") as error:
        fit(Trap(), Falling(), out=out, **options, **sizes)  # type: ignore[arg-type]
    assert error.value.step == 25
    with Checkpoints(out / "checkpoints") as kept:
        assert kept.steps() == [10, 20]
    assert not (out / "model.safetensors").exists()


def test_divergence_is_one_line(tmp_path: Path, capsys: Any) -> None:
    options = ["--steps", "600", "--batch", "4", "--learning-rate", "1e30"]
    line = complaint(capsys, ["fit", NAME, "--out", str(tmp_path / "r"), *SMALL, *options], 1)
    assert re.search(r"(loss|gradient norm) is \S+ at step \d+", line)
    assert not (tmp_path / "r" / "model.safetensors").exists()


INPUTS = [
    ("x", (2, 3, 5), "x has shape"),
    ("x", (3, 2), "x has shape"),
    ("y", (2, 4, 1), "y has shape"),
    ("y", (2, 3, 2), "y has shape"),
    ("x_query", (3, 1, 2), "x_query has shape"),
    ("x_query", (2, 0, 2), "x_query has shape .*at least one token"),
]


@pytest.mark.parametrize(("name", "shape", "message"), INPUTS)
def test_shapes(name: str, shape: tuple[int, ...], message: str) -> None:
    c = GradientDescent(dim_x=2, num_examples=3)
    model = c.compile().model
    given = {"x": (2, 3, 2), "y": (2, 3, 1), "x_query": (2, 1, 2), name: shape}
    inputs = [np.zeros(s) for s in given.values()]
    with pytest.raises(ValueError, match=message):
        c.predict(model, *inputs)
    with pytest.raises(ValueError, match=message):
        jax.jit(c.predict)(model, *inputs)
    with pytest.raises(ValueError, match=message):
        c.trace(*inputs)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    c = GradientDescent(dim_x=2, num_examples=3)
    model = c.compile().model
    for number, name in enumerate(("x", "y", "x_query")):
        inputs = [np.zeros(s) for s in ((2, 3, 2), (2, 3, 1), (2, 1, 2))]
        inputs[number][0, 0, 0] = bad
        with pytest.raises(ValueError, match=f"^{name} holds NaN or infinite"):
            c.predict(model, *inputs)
        with pytest.raises(ValueError, match=f"^{name} holds NaN or infinite"):
            c.trace(*inputs)


def test_empty_context() -> None:
    c = GradientDescent(dim_x=2, num_examples=3)
    with pytest.raises(ValueError, match="x has shape .*at least one token"):
        c.predict(c.compile().model, np.zeros((2, 0, 2)), np.zeros((2, 0, 1)), np.zeros((2, 1, 2)))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_inputs_of_any_number_type(dtype: str, x64: bool) -> None:
    # several layers are a scan, whose carry must not change its type
    values = [np.arange(np.prod(s)).reshape(s) % 3 for s in ((2, 3, 2), (2, 3, 1), (2, 1, 2))]
    with jax.enable_x64(x64):
        c = GradientDescent(dim_x=2, num_examples=3, steps=4, step_size=0.1)
        inputs = [v.astype(dtype) for v in values]
        found = c.predict(c.compile().model, *inputs)
        assert found.dtype == jnp.result_type(float)
        np.testing.assert_allclose(found, c.trace(*inputs)["prediction"], rtol=1e-5, atol=1e-6)


def test_two_heads_must_not_write_over_each_other() -> None:
    slots = Slots()
    x, y = slots.add("x", 2), slots.add("y", 2, token_groups="query", born=1)
    to_y = Head(query=x, key=x, value=x, write={y: 1.0}, name="spill")
    with pytest.raises(ValueError, match=r"'spill': writes outside slot 'y'.*query"):
        compile_program(Program(slots, [Layer([to_y])], token_groups=("context", "query")))
    over = Head(query=x, key=x, value=x, write={x: 1.0}, name="over")
    with pytest.raises(ValueError, match=r"'over': overwrites slot 'x', written at layer 0"):
        compile_program(Program(slots, [Layer([over])], token_groups=("context", "query")))
