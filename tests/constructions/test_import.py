"""Weights trained elsewhere: read as they were meant, or refused in one line that says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

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
from constructions.imported import import_weights, random_model
from constructions.interchange.export import stored_arrays
from constructions.interchange.layouts import flat, layout_of, read_arrays, to_named
from constructions.interchange.named_weights import named_shapes, named_weights, with_named
from constructions.runs import fit_family, initial_models, load_run
from probes.cli import main
from synthetic.files import RunError

NAME = "gradient-descent"
SMALL = {"dim_x": 2, "num_examples": 3, "step_size": 2.0}
WIDTH, HEADS, ROWS = 3, 2, 4
OPTIONS = [o for key, value in SMALL.items() for o in ("--set", f"{key}={value}")]


def weights(layers: int = 1, heads: int = HEADS, rows: int = ROWS, seed: int = 0) -> dict[str, Any]:
    """Arrays by documented names."""
    draw = np.random.default_rng(seed)
    found = {}
    for layer in range(layers):
        for head in range(heads):
            for part in ("query", "key", "value", "output"):
                shape = (rows, WIDTH) if part == "output" else (WIDTH, rows)
                found[f"layers.{layer}.heads.{head}.{part}"] = 0.4 * draw.normal(size=shape)
    return found


def inputs(batch: int = 5) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(1)
    sizes = (3, 2), (3, 1), (1, 2)
    return tuple(draw.normal(size=(batch, *size)) for size in sizes)


def by_hand(w: dict[str, Any], given: tuple[np.ndarray, ...], scale: float = 1.0, loops: int = 1):
    """Minus the last entry of the query's token, behind linear attention to all tokens but it."""
    x, y, q = given
    tokens = np.concatenate([np.concatenate([x, y], 2), np.concatenate([q, 0 * q[..., :1]], 2)], 1)
    layers = 1 + max(int(name.split(".")[1]) for name in w)
    heads = 1 + max(int(name.split(".")[3]) for name in w)
    for layer in list(range(layers)) * loops:
        update = np.zeros_like(tokens)
        for head in range(heads):
            wq, wk, wv, wo = (
                w[f"layers.{layer}.heads.{head}.{part}"]
                for part in ("query", "key", "value", "output")
            )
            for b, own in enumerate(tokens):
                for i, h in enumerate(own):
                    for other in own[:-1]:
                        update[b, i] += scale * ((h @ wq) @ (other @ wk)) * (other @ wv) @ wo
        tokens = tokens + update
    return -tokens[:, -1:, -1:]


def by_layout(w: dict[str, Any], layout: str) -> dict[str, Any]:
    """The same weights as another project keeps them."""
    layers = 1 + max(int(name.split(".")[1]) for name in w)

    def side(layer: int, part: str) -> np.ndarray:
        own = [w[f"layers.{layer}.heads.{n}.{part}"] for n in range(HEADS)]
        return np.concatenate(own, axis=0 if part == "output" else 1)

    def each(layer: int, part: str) -> np.ndarray:
        return np.stack([w[f"layers.{layer}.heads.{n}.{part}"] for n in range(HEADS)])

    letters = {"query": "Q", "key": "K", "value": "V", "output": "O"}
    found: dict[str, Any] = {}
    if layout == "stacked, all layers":
        for part, letter in letters.items():
            found[f"W_{letter}"] = np.stack([each(n, part) for n in range(layers)])
        return found
    for n in range(layers):
        joined = np.concatenate([side(n, part) for part in ("query", "key", "value")], axis=1)
        for part, letter in letters.items():
            if layout == "stacked":
                found[f"blocks.{n}.attn.W_{letter}"] = each(n, part)
            elif layout == "matrices":
                found[f"layers.{n}.W{letter}"] = side(n, part)
            elif layout == "linear":
                found[f"model.layers.{n}.self_attn.{letter.lower()}_proj.weight"] = side(n, part).T
            elif layout == "haiku":
                name = part.replace("output", "linear")
                found[f"Transformer_gd/~trans_block/layer_{n}/{name}/w"] = side(n, part)
            elif layout == "nested haiku":
                name = part.replace("output", "linear")
                found[f"transformer/layer_{n}/{name}"] = {"w": side(n, part)}
        if layout == "fused":
            found |= {f"h.{n}.qkv": joined, f"h.{n}.out": side(n, "output")}
        if layout == "torch's attention":
            found[f"layers.{n}.in_proj_weight"] = joined.T
            found[f"layers.{n}.out_proj.weight"] = side(n, "output").T
        if layout == "gpt2":
            found[f"h.{n}.attn.c_attn.weight"] = joined
            found[f"h.{n}.attn.c_proj.weight"] = side(n, "output")
    return found


LAYOUTS = (
    "stacked, all layers",
    "stacked",
    "matrices",
    "linear",
    "haiku",
    "nested haiku",
    "fused",
    "torch's attention",
    "gpt2",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_cut_into_the_same_heads(layout: str) -> None:
    w = weights(layers=2)
    plain = {"scores": None if "haiku" in layout else "plain", "heads": HEADS}
    found = to_named(flat(by_layout(w, layout)), WIDTH, **plain)
    scales = {name for name in found if name.endswith("scale")}
    assert set(found) - scales == set(w)
    assert len(scales) == (0 if "haiku" in layout else 2 * HEADS)
    for name, array in w.items():
        np.testing.assert_array_equal(found[name], array)


def test_biases_go_with_their_heads() -> None:
    w = by_layout(weights(), "torch's attention")
    w |= {"layers.0.in_proj_bias": np.arange(24.0), "layers.0.out_proj.bias": np.arange(3.0)}
    found = to_named(w, WIDTH, heads=HEADS, scores="scaled")
    np.testing.assert_array_equal(found["layers.0.heads.1.query_bias"], np.arange(4, 8))
    np.testing.assert_array_equal(found["layers.0.heads.0.value_bias"], np.arange(16, 20))
    np.testing.assert_array_equal(found["layers.0.output_bias"], np.arange(3))
    assert found["layers.0.heads.1.scale"] == ROWS**-0.5


@pytest.mark.parametrize("layers", [1, 2])
def test_a_run_of_imported_weights_predicts_what_they_do(layers: int, tmp_path: Path) -> None:
    """In the layout of the public code of the paper, and by documented names; to rounding."""
    w, given = weights(layers), inputs()
    settings = SMALL | {"steps": layers}
    np.savez(tmp_path / "haiku.npz", **by_layout(w, "haiku"))
    save_file(w, tmp_path / "names.safetensors")
    expected = by_hand(w, given)
    for file in ("haiku.npz", "names.safetensors"):
        run = import_weights(NAME, tmp_path / file, settings, tmp_path / file[:5], heads=HEADS)
        loaded = load_run(tmp_path / file[:5])
        assert (loaded.family, loaded.settings, loaded.seeds) == (NAME, run.settings, (0,))
        assert loaded.recipe is None and loaded.history == []
        with jax.enable_x64(True):
            for model in (*run.models, *loaded.models):
                found = run.construction.predict(model, *given)
                np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(RunError, match="kind: 'import', expected 'fit'"):
        fit_family(NAME, None, tmp_path / "haiku", resume=True)
    with pytest.raises(ValueError, match="trained elsewhere"):
        initial_models(loaded)
    assert (
        random_model(loaded).config
        == loaded.construction.counterpart().init(jax.random.key(0)).config
    )


def test_one_stored_layer_is_applied_again_and_again() -> None:
    w, given = weights(), inputs()
    haiku = {n.replace("~trans_block/layer_0", "multi_head_attention"): a.astype(np.float32)
             for n, a in by_layout(w, "haiku").items()}  # fmt: skip
    run = import_weights(NAME, haiku, SMALL | {"steps": 2, "recurrent": True}, heads=HEADS)
    found = run.construction.predict(run.models[0], *(a.astype(np.float32) for a in given))
    expected = by_hand(w, given, loops=2)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_several_files_are_several_models(tmp_path: Path) -> None:
    given = inputs()
    run = import_weights(NAME, [weights(seed=1), weights(seed=2)], SMALL, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert loaded.seeds == run.seeds == (0, 1)
    with jax.enable_x64(True):
        for model, seed in zip(loaded.models, (1, 2), strict=True):
            found = run.construction.predict(model, *given)
            np.testing.assert_allclose(found, by_hand(weights(seed=seed), given), rtol=1e-12)
    with pytest.raises(ValueError, match=r"weights\[1\]: is of another shape"):
        import_weights(NAME, [weights(), weights(rows=2)], SMALL)


MESA = HeadsConfig("mesa", 1, 3, 2, gates=True)
FACTOR = HeadsConfig("softmax", 2, 3, 2, bias=True, factor_dim=2)
EVERYTHING = Config(
    4,
    (
        SegmentConfig((LayerConfig((MESA, FACTOR)), LayerConfig((), MlpConfig(5, bias=True)))),
        SegmentConfig(
            (
                LayerConfig(
                    (HeadsConfig("linear", 1, 2, 2),),
                    MlpConfig(3, gated=True),
                    NormConfig(affine=True),
                    NormConfig("rms", affine=True),
                ),
            ),
            repeats=2,
        ),
    ),
    final_norm=NormConfig(affine=True),
    tokens=TokensConfig(6, 5, positions=7),
)


def test_every_weight_of_a_model_has_a_name() -> None:
    """Norms, MLPs, embeddings, regularisations: other numbers come in, and are the model's."""
    model = untrained(EVERYTHING)
    w = named_weights(model)
    assert {n: a.shape for n, a in w.items()} == named_shapes(model.config)
    draw = np.random.default_rng(0)
    other = {n: draw.normal(size=a.shape).astype(a.dtype) for n, a in w.items()}
    made = with_named(model, other)
    found = named_weights(made)
    assert set(found) == set(w) and made.config == model.config
    for n, array in other.items():
        np.testing.assert_array_equal(found[n], array)
    own = made.layer(4)
    np.testing.assert_array_equal(own.head(0).query, other["layers.3.heads.0.query"].T)
    np.testing.assert_array_equal(made.layer(1).head(2).value, other["layers.0.heads.2.value"].T)
    stored = sum(a.size for a in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    scales = sum(n.endswith(".scale") for n in w)
    assert sum(a.size for a in w.values()) - scales == stored


def changed(**arrays: Any) -> dict[str, Any]:
    """Weights with some replaced, or left out where they are None."""
    w = weights() | {name.replace("__", "."): array for name, array in arrays.items()}
    return {name: array for name, array in w.items() if array is not None}


Q, V = "layers__0__heads__1__query", "layers__0__heads__1__value"
SQUARE = weights(rows=WIDTH)
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (changed(**{V: None}), {}, r"layers.0.heads.1.value: missing$"),
    (changed(**{Q: None, V: None}), {}, r"1.query: missing \(and 1 more\)"),
    (changed(layers__0__heads__3__query=np.zeros((3, 4))), {}, r"heads \[0, 1, 3\], must have all"),
    (weights(2), {}, "holds layers 0, 1, the model of these settings stores 1, .*steps"),
    (
        {n: a.T for n, a in weights().items()},
        {},
        r"shape \[4, 3\], must be \[3, rows\].*transposed",
    ),
    (changed(**{Q: np.zeros((4, 3))}), {}, r"1.query: shape \[4, 3\], must be \[3, 4\].*transpos"),
    (changed(**{Q: np.zeros((3, 5))}), {}, r"heads.1.query: shape \[3, 5\], must be \[3, 4\]$"),
    (changed(**{Q: np.full((3, 4), np.nan)}), {}, "heads.1.query: holds NaN or infinite numbers"),
    (changed(**{Q: np.zeros((3, 4), int)}), {}, "heads.1.query: dtype int64, must be a float"),
    (changed(layers__0__norm__gain=np.ones(3)), {}, "norm.gain: not in the model .* no layers.0.n"),
    (changed(layers__0__heads__0__bias=np.ones(3)), {}, "0.bias: not in the model.* has key, out"),
    ({"w": np.zeros(3)}, {}, "holds w, which are names of no known layout"),
    (by_layout(weights(), "stacked"), {}, "layout stacked: --scores must say"),
    (by_layout(weights(), "haiku"), {}, "query/w: --heads must say how many heads"),
    (by_layout(weights(), "haiku"), {"heads": 3}, "8 columns cannot be shared out over 3 heads"),
    (
        by_layout(weights(), "stacked"),
        {"scores": "plain", "heads": 3},
        "has 2 heads, --heads says 3",
    ),
    (
        by_layout(weights(), "stacked"),
        {"scores": "plain", "transposed": True},
        r"W_Q: shape \[2, 4, 3\], must be \[head, width, rows\] with width 3; .*leave out",
    ),
    (
        {"W_Q": np.zeros((4, 3))},
        {"scores": "plain", "heads": 1},
        r"W_Q: shape \[4, 3\], must be \[3, head \* rows\].*give --transposed",
    ),
    (
        by_layout(weights(), "stacked") | {"blocks.0.ln1.w": np.ones(3)},
        {"scores": "plain"},
        "blocks.0.ln1.w: no part of attention in layout stacked",
    ),
    (
        {"qkv.weight": np.zeros((24, 5)), "out.weight": np.zeros((3, 8))},
        {"scores": "plain", "heads": 2},
        r"qkv.weight: shape \[24, 5\], must be \[3, 3 \* head \* rows\] or its transpose",
    ),
    (
        by_layout(weights(), "haiku") | {"other/layer_0/key/w": np.zeros((3, 8))},
        {"heads": 2},
        "holds 2 models: Transformer_gd/~trans_block, other",
    ),
    (weights(), {"layout": "odd"}, "layout is 'odd', must be one of names, stacked"),
    (weights(), {"scores": "odd"}, "scores is 'odd', must be one of plain, scaled"),
    (weights(), {"heads": 0}, "heads is 0, must be at least 1"),
]


@pytest.mark.parametrize(("w", "options", "said"), REFUSED, ids=[r[2][:40] for r in REFUSED])
def test_what_does_not_fit_is_refused_by_name(w: Any, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        import_weights(NAME, w, SMALL, **options)
    assert "\n" not in str(caught.value)


def test_what_heads_see_is_the_family_s_whatever_a_file_says() -> None:
    """As in a model folder of ours, which keeps matrices as [rows, width]."""
    plain = import_weights(NAME, weights(), SMALL)
    w = {name: array.T for name, array in weights().items()}
    seen = plain.models[0].layer(1).head(0)
    kinds = ("window", "query_groups", "key_groups", "sink_groups")
    w |= {f"layers.0.heads.{n}.{k}": np.asarray(getattr(seen, k)) for n in range(2) for k in kinds}
    run, given = import_weights(NAME, w, SMALL), inputs()
    with jax.enable_x64(True):
        found = run.construction.predict(run.models[0], *given)
    np.testing.assert_allclose(found, by_hand(weights(), given), rtol=1e-12)
    folder = stored_arrays(plain.models[0])
    assert set(w) | {f"layers.0.heads.{n}.scale" for n in range(2)} == set(folder)
    again = named_weights(import_weights(NAME, folder, SMALL).models[0])
    for name, array in weights().items():
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(ValueError, match="heads.5.window: the model of .* has no such head"):
        import_weights(NAME, w | {"layers.0.heads.5.window": np.zeros(2, int)}, SMALL)
    w["layers.0.heads.1.key_groups"] = np.array([True, True])
    said = r"heads.1.key_groups: \[True, True\], a head of these settings has \[True, False\]"
    with pytest.raises(ValueError, match=said):
        import_weights(NAME, w, SMALL)


def test_softmax_heads_must_say_how_scores_are_scaled() -> None:
    soft = HeadsConfig("softmax", 1, 3, 3)
    model = untrained(Config(4, (SegmentConfig((LayerConfig((soft, soft)),)),)))
    w = {n: a for n, a in named_weights(model).items() if not n.endswith("scale")}
    with pytest.raises(ValueError, match=r"layers.0.heads.0.scale: missing; softmax heads need it"):
        with_named(model, w)
    with pytest.raises(ValueError, match=r"layer 0 has the heads \[0\], must have 2 of them"):
        with_named(model, {n: a for n, a in w.items() if "heads.1" not in n})


def turned(w: dict[str, Any]) -> dict[str, Any]:
    return {name: array.T for name, array in w.items()}


def swapped(w: dict[str, Any]) -> dict[str, Any]:
    other = {"query": "key", "key": "query"}
    return {f"{n[:17]}{other.get(n[17:], n[17:])}": a for n, a in w.items()}


MEANT: list[tuple[Any, dict[str, Any], float, float, str]] = [
    (SQUARE, {}, 1.0, 1.0, ""),
    (SQUARE, {"scores": "scaled"}, WIDTH**-0.5, 1.0, ""),
    (turned(SQUARE), {"transposed": True}, 1.0, 1.0, ""),
    (turned(SQUARE), {}, 1.0, 1.0, "they agree with --transposed$"),
    (SQUARE, {"transposed": True}, 1.0, 1.0, "they agree with no --transposed$"),
    (SQUARE, {}, WIDTH**-0.5, 1.0, "they agree with --scores scaled$"),
    (SQUARE, {}, 1.0, -1.0, "with these weights, and predictions that are minus those$"),
    (swapped(SQUARE), {}, 1.0, 1.0, "these weights and keys in the place of queries$"),
    (weights(rows=WIDTH, seed=7), {}, 1.0, 1.0, "and so do other readings.*tokens made as the fam"),
]


@pytest.mark.parametrize(("w", "options", "scale", "sign", "said"), MEANT)
def test_predictions_say_whether_the_import_is_right(
    w: Any, options: Any, scale: float, sign: float, said: str
) -> None:
    given = inputs()
    expect = dict(zip(("x", "y", "x_query"), given, strict=True))
    expect["prediction"] = sign * by_hand(SQUARE, given, scale)
    if not said:
        import_weights(NAME, w, SMALL, expect=expect, **options)
        return
    with pytest.raises(ValueError, match=said):
        import_weights(NAME, w, SMALL, expect=expect, **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": None}, "expect: x: missing; must hold x, y, x_query and prediction"),
        ({"prediction": np.ones((5, 1))}, r"prediction: shape \[5, 1\], the model's is \[5, 1, 1"),
        ({"prediction": np.zeros((5, 1, 1))}, "prediction: is 0 everywhere, which checks nothing"),
        ({"y": np.zeros((5, 2, 1))}, r"expect: y has shape \(5, 2, 1\), must be \(5, 3, 1\)"),
    ],
)
def test_what_is_expected_must_fit(change: dict[str, Any], said: str) -> None:
    expect = dict(zip(("x", "y", "x_query"), inputs(), strict=True))
    expect |= {"prediction": np.ones((5, 1, 1))} | change
    with pytest.raises(ValueError, match=said):
        given = {name: array for name, array in expect.items() if array is not None}
        import_weights(NAME, weights(), SMALL, expect=given)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (pytest.fail, ("was unpickled",))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    import pickle

    np.savez(tmp_path / "objects.npz", w=np.array([Trap()], object), allow_pickle=True)
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "file.npz").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "file.safetensors").write_bytes(pickle.dumps(Trap()))
    for name, said in (
        ("objects.npz", "no npz file of arrays: holds objects, which only unpickling"),
        ("file.pkl", "must end in .safetensors, .npz, .pt, .pth, .bin"),
        ("file.npz", "no npz file of arrays"),
        ("file.safetensors", "truncated or no safetensors file"),
        ("absent.npz", "cannot be read: No such file"),
        ("absent.pt", "cannot be read: no such file"),
    ):
        with pytest.raises(RunError, match=f"{name}: {said}"):
            read_arrays(tmp_path / name)


def test_names_tell_the_layout() -> None:
    for layout in LAYOUTS:
        kind = "stacked" if layout in ("matrices", "linear") else layout.split()[-1].split(",")[0]
        names = {"layers": "stacked", "attention": "fused", "gpt2": "fused"}
        assert layout_of(flat(by_layout(weights(), layout)), "") == names.get(kind, kind)
    assert layout_of(weights(), "") == "names"


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    file, out = tmp_path / "w.npz", tmp_path / "run"
    expect = dict(zip(("x", "y", "x_query"), inputs(), strict=True))
    np.savez(tmp_path / "e.npz", prediction=by_hand(weights(), inputs()), **expect)
    np.savez(file, **weights())
    typed = ["import", NAME, "--weights", str(file), "--out", str(out), *OPTIONS]
    assert main([*typed, "--expect", str(tmp_path / "e.npz")]) == 0
    assert "1 model of gradient-descent, predictions as expected" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["kind"] == "import"
    before = (out / "model.safetensors").read_bytes()
    for more, said in (
        ([], "exists and is not empty"),
        (["--overwrite", "--transposed"], "shape [4, 3], must be [3, rows]"),
        (["--overwrite", "--set", "dim_x=4"], "shape [3, 4], must be [5, rows]"),
    ):
        assert main([*typed, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("orrery: ") and said in error
        assert (out / "model.safetensors").read_bytes() == before
    np.savez(file, **weights(seed=3))
    assert main([*typed, "--overwrite"]) == 0
    assert "not checked: --expect would" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() != before
    config = json.loads((out / "config.json").read_text())
    config["model"].pop("width")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="config.json: model: no shape of a model"):
        load_run(out)
