"""torch modules: read and edited by hooks as our own models are, and imported from their files."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from constructions.core.transformer import Edit
from constructions.imported import import_weights
from constructions.interchange.layouts import read_arrays
from constructions.interchange.named_weights import named_weights
from constructions.runs import Run, construct, fit_family, load_run
from probes import find
from probes.cli import main
from probes.foreign import ForeignError, foreign_run, no_edits
from probes.interchange import interchange, sweep
from probes.ledger import ledger
from probes.report.data import compare
from probes.roll_out import roll_out
from probes.similarity import sensitivity
from probes.subject import read_sites, where
from probes.torch_hooks import from_torch
from synthetic.files import RunError

torch = pytest.importorskip("torch", reason="torch is not installed")

NAME = "gradient-descent"
SMALL = {"dim_x": 2, "num_examples": 3, "step_size": 2.0, "steps": 2}
STREAM = ("layers.0:input", "layers.0", "layers.1")


class Attention(torch.nn.Module):
    """A layer of linear attention over all tokens but the last."""

    def __init__(self, heads: int, rows: int, pair: bool = False) -> None:
        super().__init__()
        for name, shape in zip("QKVO", [(heads, 3, rows)] * 3 + [(heads, rows, 3)], strict=True):
            setattr(self, f"W_{name}", torch.nn.Parameter(0.4 * torch.randn(shape)))
        self.pair = pair

    def forward(self, h: Any) -> Any:
        q, k, v = (torch.einsum("btw,nwr->bntr", h, w) for w in (self.W_Q, self.W_K, self.W_V))
        scores = q @ k[:, :, :-1].transpose(-1, -2)
        out = h + torch.einsum("bnqk,bnkr,nrw->bqw", scores, v[:, :, :-1], self.W_O)
        return (out, scores) if self.pair else out


class Model(torch.nn.Module):
    def __init__(self, heads: int = 2, rows: int = 4, loops: int = 1, pair: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        count = 2 if loops == 1 else 1
        self.layers = torch.nn.ModuleList(Attention(heads, rows, pair) for _ in range(count))
        self.dropout, self.loops = torch.nn.Dropout(0.5), loops

    def forward(self, stream: Any) -> Any:
        for _ in range(self.loops):
            for layer in self.layers:
                out = layer(stream)
                stream = out[0] if isinstance(out, tuple) else out
        return self.dropout(stream)


def tokens(x: Any, y: Any, q: Any) -> Any:
    return torch.cat([torch.cat([x, y], 2), torch.nn.functional.pad(q, (0, 1))], 1)


def wrap(module: Any, sites: Any = STREAM, **options: Any) -> Any:
    return from_torch(module, tokens, lambda s: -s[:, -1:, -1:], {"residual": sites}, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Run, tuple[Any, ...]]:
    """A module, a run of its file, and inputs; all in float64."""
    module, file = Model().double(), tmp_path_factory.mktemp("torch") / "m.pt"
    torch.save(module.state_dict(), file)
    run = import_weights(NAME, file, SMALL, scores="plain")
    draw = np.random.default_rng(1)
    return module, run, tuple(draw.normal(size=(5, *s)) for s in ((3, 2), (3, 1), (1, 2)))


def test_a_file_of_torch_s_is_the_module(saved: Any) -> None:
    module, run, inputs = saved
    with torch.no_grad():
        given = [torch.tensor(a) for a in inputs]
        expected = -module.eval()(tokens(*given))[:, -1:, -1:].numpy()
    with jax.enable_x64(True):
        found = run.construction.predict(run.models[0], *inputs)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    w = named_weights(run.models[0])
    for layer, own in enumerate(module.layers):
        for head in range(2):
            query = w[f"layers.{layer}.heads.{head}.query"]
            np.testing.assert_array_equal(query, own.W_Q[head].detach().numpy())


def test_a_module_is_read_edited_and_differentiated_as_the_same_weights(
    saved: Any, x64: None
) -> None:
    module, run, inputs = saved
    construction, (model,) = run.construction, run.models
    inputs = tuple(map(jax.numpy.asarray, inputs))
    source = tuple(a[::-1] for a in inputs)
    expected = read_sites(construction, model, inputs)["residual"]
    prediction = construction.predict(model, *inputs)
    slopes = sensitivity(lambda *i: construction.apply(model, *i), inputs)
    masks = [where(model.config, 4, "residual", layer=layer, token=[1, 3]) for layer in range(3)]

    def patched(which: Any) -> list[Any]:
        return [interchange(construction, which, inputs, source, where=mask) for mask in masks]

    wanted = patched(model)
    for subject in (wrap(module), wrap(module, at_once=2), wrap(Model(pair=True).double())):
        np.testing.assert_allclose(subject.read(*inputs)["residual"], expected, atol=1e-12)
        np.testing.assert_allclose(subject(*inputs), prediction, rtol=1e-12)
        for one, other in zip(wanted, patched(subject), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-10)
        np.testing.assert_allclose(subject.differentiate(*inputs), slopes, rtol=1e-10)
    one, other = (sweep(construction, m, inputs, source) for m in (model, subject))
    np.testing.assert_allclose(other.effect, one.effect, atol=1e-10)
    one, other = (roll_out(construction, m, *inputs, depth=2) for m in (model, subject))
    np.testing.assert_allclose(other, one, rtol=1e-10)
    assert no_edits(construction, subject) == ""


def test_a_layer_that_is_called_again_is_named_for_each_call(x64: None) -> None:
    module = Model(loops=2).double()
    inputs = [np.ones((2, *s)) for s in ((3, 2), (3, 1), (1, 2))]
    subject = wrap(module, ("layers.0:input", "layers.0", "layers.0"))
    found = subject.read(*inputs)["residual"]
    with torch.no_grad():
        first = module.layers[0](tokens(*map(torch.tensor, inputs)))
        second = module.layers[0](first)
    np.testing.assert_allclose(found[1:], [first.numpy(), second.numpy()], rtol=1e-12)
    mask, ones = np.zeros(found.shape, bool), np.ones(found.shape)
    for layer, expected in ((1, module.layers[0](torch.ones(2, 4, 3).double())), (2, ones[2])):
        mask[:] = False
        mask[layer] = True
        prediction, _ = subject.run({"residual": Edit(mask, ones)}, *inputs)  # type: ignore[arg-type]
        expected = np.asarray(torch.as_tensor(expected).detach())[:, -1:, -1:]
        np.testing.assert_allclose(prediction, -expected, rtol=1e-12)
    with pytest.raises(ForeignError, match=r"'layers.0' is called 2 times, and named 1 times"):
        wrap(module, ("layers.0",)).read(*inputs)


def test_a_module_stays_as_it_is() -> None:
    module = Model().train()
    module.layers[1].eval()
    subject = wrap(module)
    inputs = [np.ones((64, *s), np.float32) for s in ((3, 2), (3, 1), (1, 2))]
    first = subject(*inputs)
    np.testing.assert_array_equal(first, subject(*inputs))  # dropout is off
    subject.read(*inputs), subject.differentiate(*inputs)
    assert module.training and module.dropout.training and not module.layers[1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_a_graph_that_ends_before_the_input_gives_no_derivative() -> None:
    cut = from_torch(Model(), lambda *i: tokens(*i).detach(), lambda s: -s[:, -1:, -1:])
    inputs = [np.ones((2, *s), np.float32) for s in ((3, 2), (3, 1), (1, 2))]
    assert cut.differentiate(*inputs) is None
    frozen = Model()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    assert from_torch(
        frozen, lambda *i: tokens(*i).detach(), lambda s: -s[:, -1:, -1:]
    ).differentiate(*inputs) is None  # fmt: skip
    assert cut.activations is None and cut.edit is None


def test_what_is_no_module_or_submodule_is_refused() -> None:
    with pytest.raises(ValueError, match="module is a int, must be a torch.nn.Module"):
        from_torch(3)
    for name in ("layers.7", "layers.0:output"):
        with pytest.raises(ValueError, match=f"sites: residual: '{name}', must be one of layers"):
            wrap(Model(), (name,))
    with pytest.raises(ValueError, match="model 0 is a module of torch's: from_torch"):
        foreign_run(NAME, Model(), SMALL)


def test_files_of_more_than_tensors_are_refused(tmp_path: Path) -> None:
    torch.save(Model(), tmp_path / "module.pt")
    torch.save({"model": Model().state_dict(), "step": 3}, tmp_path / "checkpoint.pt")
    (tmp_path / "none.pt").write_bytes(b"nothing")
    for name, said in (
        ("module.pt", "holds more than tensors, or is no file"),
        ("checkpoint.pt", "step is a int, must be tensors by name: save module.state_dict"),
        ("none.pt", "holds more than tensors, or is no file"),
    ):
        with pytest.raises(RunError, match=f"{name}: {said}") as caught:
            read_arrays(tmp_path / name)
        assert "\n" not in str(caught.value)
    half = {"w": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(half, tmp_path / "half.pt")
    np.testing.assert_array_equal(read_arrays(tmp_path / "half.pt")["w"], np.ones(2, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_a_trained_module_has_the_table_of_a_fit(steps: int, tmp_path: Path) -> None:
    """The same weights fitted here, imported from torch's file, and behind a module's hooks."""
    settings = SMALL | {"steps": steps}
    fitted = fit_family(NAME, settings, seeds=[0], steps=300, batch=64)
    w, module = named_weights(fitted.models[0]), Model(heads=1, rows=3)
    module.layers = module.layers[:steps]
    with torch.no_grad():
        for layer, own in enumerate(module.layers):
            for part, name in zip(("query", "key", "value", "output"), "QKVO", strict=True):
                matrix = torch.tensor(w[f"layers.{layer}.heads.0.{part}"])
                getattr(own, f"W_{name}").copy_(matrix[None])
    torch.save(module.state_dict(), tmp_path / "trained.pt")
    typed = ["import", NAME, "--weights", str(tmp_path / "trained.pt"), "--scores", "plain"]
    typed += [o for key, value in settings.items() for o in ("--set", f"{key}={value}")]
    assert main([*typed, "--out", str(tmp_path / "run")]) == 0
    imported = load_run(tmp_path / "run")
    hidden = foreign_run(NAME, wrap(module, STREAM[: steps + 1]), settings)
    own, theirs, other = (compare(run, batch=2**12) for run in (fitted, imported, hidden))
    assert theirs.verdict == own.verdict
    for row, same in zip(own.rows, theirs.rows, strict=True):
        assert row.verdict == same.verdict, row.claim.name
        np.testing.assert_array_equal(row.trained, same.trained)  # NaN where not applicable
    assert theirs.omitted == own.omitted
    for name, result in own.sections.items():
        if name != "curves":  # which has no records of a fit
            assert theirs.sections[name].values == result.values, name
    assert theirs.sections["curves"].data.trained == own.sections["curves"].data.trained
    decided = [row for row in other.rows if row.verdict != "not applicable"]
    known = {row.claim.name: row for row in own.rows}
    for row in decided:
        expected = known[row.claim.name].trained
        np.testing.assert_allclose(row.trained, expected, rtol=1e-3, atol=1e-5)
        assert row.verdict == known[row.claim.name].verdict
    assert {"curves", "probes", "patches", "scale_curve", "roll_out"} <= set(other.sections)
    for name in ("probes", "patches", "scale_curve"):
        found, wanted = (c.sections[name].values for c in (other, own))
        np.testing.assert_allclose(
            np.array(found, float), np.array(wanted, float), rtol=1e-3, atol=1e-3
        )


@pytest.mark.slow
def test_the_ledger_takes_a_module() -> None:
    construction = construct(NAME, SMALL)
    rows = ledger(construction, [wrap(Model())], batch=256)
    assert {row.verdict for row in rows} <= {"refuted", "not applicable", "void"}
    assert find("similarity")(foreign_run(NAME, wrap(Model()), SMALL)).values[0][2] is not None
