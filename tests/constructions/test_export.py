"""What an export writes, what its card says, and what is refused; no torch is needed for it."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from constructions.core.compile import untrained
from constructions.core.config import (
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
    TokensConfig,
)
from constructions.core.evaluate import SlotBySlot
from constructions.core.transformer import cast
from constructions.family import Certificate, Error
from constructions.gradient_descent.construction import GradientDescent
from constructions.interchange import export as module
from constructions.interchange.decoder import decoder
from constructions.interchange.export import export, stored_arrays
from constructions.runs import construct
from constructions.tint.construction import Tint
from probes.cli import main
from synthetic.fitting.weights_file import read_safetensors

MODELING = Path(module.__file__).with_name("modeling_orrery.py")
FILES = ["README.md", "config.json", "example.safetensors", "model.safetensors", MODELING.name]
CERTIFICATE = Certificate("c", (Error("float64", 1e-16, 2e-15, 1e-13, "prediction", 7),))
C = GradientDescent(dim_x=2, dim_y=1, num_examples=3, steps=2, step_size=0.5)


def complaint(capsys: Any, argv: list[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "m"
    assert export(C.compile(), C, folder, facts={"source": "paper"}, certificate=CERTIFICATE)
    return folder


def test_weights_have_the_names_that_the_card_gives():
    rows = HeadsConfig("softmax", 2, 3, 1, bias=True), HeadsConfig("mesa", 1, 2, 2, gates=True)
    norm = NormConfig("layer", affine=True)
    layer = LayerConfig(rows, MlpConfig(4, gated=True), norm)
    tables = TokensConfig(7, 7, 3, tied=True)
    config = Config(5, (SegmentConfig((layer,), 2),), ("a", "b"), norm, tokens=tables)
    model = untrained(config)
    shapes = {"gain": (5,), "offset": (5,)}
    wiring: dict[str, tuple[int, ...]] = {"scale": (), "window": (2,)}
    wiring |= {f"{kind}_groups": (2,) for kind in ("query", "key", "sink")}
    wide = {"query": (3, 5), "key": (3, 5), "value": (1, 5), "output": (5, 1)}
    wide |= {"query_bias": (3,), "key_bias": (3,), "value_bias": (1,)} | wiring
    mesa = {"query": (2, 5), "key": (2, 5), "value": (2, 5), "output": (5, 2)} | wiring
    mesa |= {"log_regularization": (), "input_gate": (5,), "input_gate_bias": ()}
    mesa |= {"forget_gate": (5,), "forget_gate_bias": ()}
    parts: dict[str, Any] = {"heads.0": wide, "heads.1": wide, "heads.2": mesa, "norm": shapes}
    parts["mlp"] = {"hidden": (4, 5), "gate": (4, 5), "output": (5, 4)}
    wanted = {"tokens.embedding": (7, 5), "tokens.position": (3, 5)}
    wanted |= {f"final_norm.{name}": shape for name, shape in shapes.items()}
    for n in range(2):
        wanted[f"layers.{n}.output_bias"] = (5,)
        for part, own in parts.items():
            wanted |= {f"layers.{n}.{part}.{name}": shape for name, shape in own.items()}
    stored = stored_arrays(model)
    assert {name: a.shape for name, a in stored.items()} == wanted
    # the numbers are those that the model itself gives by name
    for name, own in {"heads.1": model.layer(2).head(1), "heads.2": model.layer(2).head(2)}.items():
        for weight in ("query", "output", "window", "scale"):
            np.testing.assert_array_equal(stored[f"layers.1.{name}.{weight}"], getattr(own, weight))


def test_layers_that_are_applied_again_are_stored_once(tmp_path):
    layers = tuple(LayerConfig((HeadsConfig("linear", n, 1, 1),)) for n in (1, 2))
    segments = SegmentConfig(layers[:1], 2), SegmentConfig(layers, 2, tied=True)
    folder = export(untrained(Config(3, segments)), None, tmp_path / "m")
    config = config_in(folder)
    assert config["order"] == [0, 1, 2, 3, 2, 3] and config["num_hidden_layers"] == 6
    assert [len(layer["heads"]) for layer in config["layers"]] == [1, 1, 1, 2]
    stored, _ = read_safetensors(folder / "model.safetensors")
    assert {name.split(".")[1] for name in stored} == {"0", "1", "2", "3"}


def test_files(written):
    assert sorted(file.name for file in written.iterdir()) == FILES  # nothing pickled
    stored, header = read_safetensors(written / "model.safetensors")
    assert header == {"format": "pt"} and set(stored) == set(stored_arrays(C.reference))
    assert (written / MODELING.name).read_bytes() == MODELING.read_bytes()
    config = config_in(written)
    for kind, name in config["auto_map"].items():
        file, _, name = name.partition(".")
        assert kind in ("AutoConfig", "AutoModel") and f"{file}.py" == MODELING.name
        assert f"class {name}(" in MODELING.read_text()
    assert config["dtype"] == "float32" and config["hidden_size"] == C.program.slots.width


def test_the_example_is_what_the_places_say(written):
    """Read by the indices of `config.json` alone, from the last stream of the example."""
    example, _ = read_safetensors(written / "example.safetensors")
    place = config_in(written)["places"]["prediction"]
    layer, token, column = np.broadcast_arrays(
        *(np.array(place[axis]) for axis in ("layers", "tokens", "columns"))
    )
    assert (layer == 2).all()
    found = place["scale"] * example["last_hidden_state"][:, token, column]
    inputs = C.sample(jax.random.key(0), 2)
    np.testing.assert_allclose(found, C.predict(C.reference, *inputs), rtol=1e-6)
    trace = C.trace(*inputs)["prediction"]
    np.testing.assert_allclose(found, trace, rtol=1e-5, atol=1e-6)


def test_the_card_of_a_construction(written):
    card = (written / "README.md").read_text()
    for line in (
        "library_name: transformers",
        "**source**: paper",
        "| 0 | context |",
        "float64 passed: relative error 2.0e-15 in prediction, tolerance 1.0e-13",
        "| x | 0-1 | all | 0 to the end | x_i, or M_k x_i in GD++ |",
        "| prediction | y | 2 | 3 | -1 |",
        "`inputs_embeds` | [2, 4, 3]",
    ):
        assert line in card, line
    (head,) = C.program.layers[0].single_heads
    rows = [line for line in card.splitlines() if f"| {head.name} | linear |" in line]
    assert len(rows) == 2 and rows[1].startswith("| 1 | 0 |")
    assert "query: x; key: x; value: y | y | all | context | any |" in rows[0]
    names = [layer["heads"][0]["name"] for layer in config_in(written)["layers"]]
    assert names == [head.name] * 2


def test_heads_are_named_where_they_are(tmp_path):
    """Heads of other sizes stand in another row of the compiled layer, in another order."""
    construction = construct("separate-tokens")
    folder = export(construction.compile(), construction, tmp_path / "m", certificate=CERTIFICATE)
    stored, _ = read_safetensors(folder / "model.safetensors")
    slots = construction.program.slots
    for number, layer in enumerate(construction.program.layers):
        named = [head["name"] for head in config_in(folder)["layers"][number]["heads"]]
        assert sorted(named) == sorted(head.name for head in layer.single_heads)
        for head in layer.single_heads:
            place = f"layers.{number}.heads.{named.index(head.name)}"
            query = head.query.matrix(slots.width)
            np.testing.assert_allclose(stored[f"{place}.query"], query, rtol=1e-6)


def test_a_trained_model_is_not_said_to_be_known(tmp_path):
    model = C.counterpart().init(jax.random.key(0))
    changed = C.reference.with_head(1, 0, scale=jnp.asarray(2.0))
    for name, other in (("trained", model), ("changed", changed)):
        card = (export(other, C, tmp_path / name) / "README.md").read_text()
        assert "What is not known" in card
        assert "certificate" not in card and "What heads do" not in card and "tableau" not in card
        assert "| prediction | y | 2 | 3 | -1 |" in card
    wide = export(C.in_trained_shape(), C, tmp_path / "wide", certificate=CERTIFICATE)
    assert "What heads do" in (wide / "README.md").read_text()


def test_the_certificate_is_computed_where_none_is_given(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "verify", lambda c: asked.append(c) or CERTIFICATE)
    card = (export(C.compile().model, C, tmp_path / "m") / "README.md").read_text()
    assert asked == [C] and str(CERTIFICATE) in card


def test_the_torch_file_stands_alone():
    tree = ast.parse(MODELING.read_text())
    guarded = [n for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)]
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in guarded:
            assert not (isinstance(node, ast.ImportFrom) and node.level)
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            imported |= {str(name).split(".")[0] for name in names}
    assert imported == {
        "__future__", "collections", "dataclasses", "math", "torch", "transformers", "typing"
    }  # fmt: skip
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"exec", "eval", "open", "torch.load", "__import__", "compile"}


def test_models_that_are_refused(tmp_path):
    model, program = C.reference, C.program
    nan = model.with_head(1, 0, query=jnp.full_like(model.layer(1).head(0).query, jnp.nan))
    other = construct("separate-tokens").compile().model
    for wrong, message in (
        (
            SlotBySlot(program, jnp.float32),
            "slot by slot: its .* weights are too many to be made dense",
        ),
        (None, "model is a NoneType, must be a Transformer"),
        (nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "model is a Linear, must be a Transformer"),
        (cast(model, jnp.bfloat16), "weights in bfloat16, must be float32 or float64"),
        (nan, r"model: layers.0.heads.0.query: 6 of 6 numbers are NaN or infinite"),
        (other, r"the model's token groups are \('context', 'query', 'dump'\), must be"),
    ):
        with pytest.raises(ValueError, match=message):
            export(wrong, C, tmp_path / "m")
        assert list(tmp_path.iterdir()) == []


def test_a_program_too_large_to_be_dense(tmp_path, monkeypatch):
    monkeypatch.setattr("constructions.tint.construction.DENSE", 1000)
    tint = Tint(decoder(5, positions=4, layers=1, heads=1, width=2))
    with pytest.raises(ValueError, match="program 'tint.*' slot by slot: its [0-9,]+ weights are"):
        export(tint.compile(), tint, tmp_path / "m")


def test_what_is_there_is_kept(tmp_path, monkeypatch):
    model, folder = C.reference, tmp_path / "m"
    export(model, None, folder)
    with pytest.raises(ValueError, match="m: exists and is not empty; give --overwrite"):
        export(model, None, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space"):
            export(C.counterpart().init(jax.random.key(0)), C, folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    export(C.counterpart().init(jax.random.key(0)), C, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="other: holds no export, so nothing in it is overwritten"):
        export(model, None, tmp_path / "other", overwrite=True)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="file: exists and is no directory"):
        export(model, None, tmp_path / "file", overwrite=True)


SMALL = ["--set", "dim_x=2", "--set", "num_examples=3", "--set", "step_size=0.5"]


def test_the_command(tmp_path, capsys):
    folder, run, trained = (tmp_path / name for name in ("m", "run", "trained"))
    command = ["export", "gradient-descent", *SMALL, "--out", str(folder)]
    assert main([*command, "--dtype", "float64"]) == 0
    assert f"from_pretrained('{folder}', trust_remote_code=True)" in capsys.readouterr().out
    assert config_in(folder)["dtype"] == "float64"
    card = (folder / "README.md").read_text()
    assert "# gradient-descent" in card and "float32 passed" in card and "What heads do" in card
    assert "exists and is not empty; give --overwrite" in complaint(capsys, command)
    fit = ["fit", "gradient-descent", *SMALL, "--out", str(run), "--steps", "4", "--batch", "4"]
    assert main([*fit, "--seeds", "2"]) == 0
    own = ["export", "--run", str(run), "--out"]
    assert main([*own, str(trained), "--seed", "1"]) == 0
    said = (trained / "README.md").read_text()
    assert "seed 1, 4 steps; the loss at the end was" in said and "What is not known" in said
    stored, _ = read_safetensors(run / "model.safetensors")
    weights, _ = read_safetensors(trained / "model.safetensors")
    query = next(a for name, a in stored.items() if name.endswith("heads.0.query"))
    np.testing.assert_array_equal(weights["layers.0.heads.0.query"], query[1, 0, 0])
    new = str(tmp_path / "new")
    for argv, message in (
        (["export", "--out", new], "give the name of a family, or --run: one of them"),
        ([*own, new, "gradient-descent"], "give the name of a family, or --run"),
        ([*own, new, "--seed", "5"], "seed is 5, must be one of 0, 1"),
        ([*own, new, "--set", "dim_x=3"], "--set dim_x=3: a run has its own settings"),
        (["export", "nope", "--out", new], "unknown family 'nope', must be one of"),
        (["export", "tint", "--out", new, "--seed", "1"], "--seed 1 can be given with --run alone"),
        (["export", "tint"], "Missing from orrery export: --out PATH"),
    ):
        assert message in complaint(capsys, argv)
        assert not Path(new).exists()
