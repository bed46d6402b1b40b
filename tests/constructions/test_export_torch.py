"""Exported models in torch against ours: outputs, gradients and sites; opened by other tools."""

import importlib.util
import inspect
import os
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from constructions import CATALOGUE
from constructions.core.config import (
    WIRING,
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
    TokensConfig,
)
from constructions.core.layer import ACTIVATIONS
from constructions.core.transformer import SITES, Edit, Transformer, cast
from constructions.family import Certificate, Error
from constructions.gradient_descent.construction import GradientDescent
from constructions.interchange.card import MODULES
from constructions.interchange.decoder import decoder
from constructions.interchange.export import export, stored_arrays
from constructions.mesa.models import causal_language_model
from constructions.runs import construct
from constructions.softened import Softened
from synthetic.compilation import compile_once

torch = pytest.importorskip("torch", reason="exported models run in torch, which is not installed")
pytest.importorskip("transformers", reason="exported models need transformers")

#: Largest error, relative to the largest entry.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
NO_CERTIFICATE = Certificate("none", (Error("float64", 0.0, 0.0, 0.0, "prediction"),))
#: Family, dtype, and whether it is trained weights: of many, what is tested every time.
QUICK = [("gradient-descent", "float64", False), ("hyper-prototypes", "float32", True)]


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Where transformers keeps code that it runs; nothing is looked for elsewhere."""
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def load(folder) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, trust_remote_code=True)


def load_as(folder, dtype) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype)


def exported(model, construction, folder) -> Any:
    return load(export(model, construction, folder, certificate=NO_CERTIFICATE))


def relative(found, wanted, least: float = 0.0) -> float:
    """The largest error over the largest entry wanted, or over `least` if that is more."""
    found, wanted = (np.asarray(getattr(a, "detach", lambda a=a: a)()) for a in (found, wanted))
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    size = max(float(np.abs(wanted).max(initial=0)), least) or 1.0
    return float(np.abs(found - wanted).max(initial=0)) / size


def tensor(array) -> Any:
    array = np.asarray(array)
    return torch.tensor(array if array.dtype.kind == "f" else array.astype(np.int64))


def random_config(seed: int) -> Config:
    """A shape with a bit of everything."""
    rng = np.random.default_rng(seed)

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    width, kinds = int(rng.integers(2, 9)), ("a", "b", "c")[: int(rng.integers(1, 4))]

    def size(most: int = 4) -> int:
        return int(rng.integers(1, most + 1))

    def some_kinds() -> tuple[str, ...] | None:
        return kinds[: size(len(kinds))] if chance(0.5) else None

    def norm() -> NormConfig | None:
        if chance(0.5):
            return None
        kind, affine, eps = str(rng.choice(["layer", "rms"])), chance(0.6), float(rng.uniform(0.1))
        if chance(0.5):
            return NormConfig(kind, eps, affine)
        count = size(width)
        read, write = (int(n) for n in rng.integers(0, width - count + 1, 2))
        return NormConfig(
            kind, eps, affine, (read, read + count), (write, write + count), some_kinds()
        )

    def heads() -> HeadsConfig:
        mixer = str(rng.choice(["linear", "centred", "softmax", "transposed_softmax", "mesa"]))
        gates, factor = mixer == "mesa" and chance(0.5), 0 if mixer == "mesa" else size(2)
        factor = factor if chance(0.3) else 0
        return HeadsConfig(mixer, size(3), size(), size(), chance(0.5), gates, factor)

    def layer() -> LayerConfig:
        mlp = None
        if chance(0.6):
            activation = str(rng.choice(list(ACTIVATIONS)))
            mlp = MlpConfig(size(5), activation, chance(0.4), chance(0.5), some_kinds())
        own = tuple(heads() for _ in range(int(rng.integers(0, 4))))
        return LayerConfig(own, mlp, norm(), norm())

    segments = tuple(
        SegmentConfig(tuple(layer() for _ in range(size(2))), size(3), chance(0.4))
        for _ in range(size(2))
    )
    tokens = None
    if chance(0.5):
        tied, words = chance(0.5), 5
        probabilities = str(rng.choice(["softmax", "shares"]))
        tokens = TokensConfig(words, words if tied else 7, 8 * chance(0.5), probabilities, tied)
    final = replace(found, read=None, write=None, tokens=None) if (found := norm()) else None
    clip = 1.5 if chance(0.3) else None
    return Config(width, segments, kinds, final, tokens=tokens, clip=clip)


def random_model(config: Config, seed: int = 0) -> Transformer:
    """Weights, windows and kinds of tokens, all of them random."""
    rng = np.random.default_rng(seed)

    def draw(tree, name=""):
        if isinstance(tree, dict):
            drawn = {key: draw(value, str(key)) for key, value in tree.items()}
            if "log_regularization" in tree:  # a mesa head sees the tokens so far
                drawn["window"] = jnp.broadcast_to(jnp.int32([-(2**30), 0]), tree["window"])
                drawn["sink_groups"] = jnp.zeros(tree["sink_groups"], bool)
            return drawn
        if name == "window":
            low = rng.integers(-4, 2, tree[:-1])
            return jnp.asarray(np.stack([low, low + rng.integers(0, 5, low.shape)], -1), jnp.int32)
        if name.endswith("_groups"):
            return jnp.asarray(rng.random(tree) < 0.7)
        size = 0.2 if name == "output" else 0.6  # products of many layers stay in range
        return jnp.asarray(rng.normal(size=tree) * size / np.sqrt(config.width))

    return Transformer(config, draw(config.shapes()))


def random_inputs(config: Config, seed: int = 1, tokens: int = 5) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    stream = jnp.asarray(rng.normal(size=(2, tokens, config.width)))
    return stream, jnp.asarray(rng.integers(0, len(config.token_groups), (2, tokens)))


@compile_once
def with_gradients(model: Transformer, stream, groups, along):
    """The output, the sites, and the gradient of sum(output * along): of weights and stream."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, stream):
        out, sites = nnx.merge(graphdef, params, rest).run(stream, groups, sites=tuple(SITES))
        return (out * along).sum(), (out, sites)

    slopes, (out, sites) = jax.grad(loss, (0, 1), has_aux=True)(params, stream)
    return out, sites, nnx.merge(graphdef, slopes[0], rest), slopes[1]


def captured(model, names, **inputs) -> tuple[Any, dict[str, Any]]:
    """The output, and what the modules of these names gave, by plain forward hooks."""
    found, handles = {}, []
    for name in names:

        def keep(module, given, value, name=name):
            found[name] = value

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    out = model(**inputs)
    for handle in handles:
        handle.remove()
    return out, found


def check(model: Transformer, theirs: Any, stream, groups, tolerance: float) -> None:
    """Output, sites and gradients of ours and of theirs."""
    along = jnp.asarray(np.random.default_rng(5).normal(size=stream.shape), stream.dtype)
    out, sites, slopes, down = with_gradients(model, stream, groups, along)
    if stream.dtype == "float32":  # gradients of mesa heads are off by up to 1e-3 in ours
        with jax.enable_x64(True):
            values, weights = (jnp.asarray(np.asarray(a), float) for a in (stream, along))
            exact = with_gradients(cast(model, float), values, groups, weights)
            slopes, down = cast(exact[2], "float32"), np.asarray(exact[3], np.float32)
    names = [name for name, module in theirs.named_modules() if "hook_" in name]
    given = tensor(stream).requires_grad_()
    found, values = captured(theirs, names, inputs_embeds=given, token_type_ids=tensor(groups))
    assert np.abs(out).max() < 1e3
    assert relative(found.last_hidden_state, out) < tolerance
    for site, module in MODULES.items():
        for number, wanted in enumerate(np.asarray(sites[site])):
            name = f"blocks.{number}.{module}"
            if site == "residual" and number == model.config.depth:
                name = f"blocks.{number - 1}.hook_resid_post"
            if name not in values:
                assert not wanted.any(), name
                continue
            mine = np.asarray(values[name].detach())
            gaps = [(0, b - a) for a, b in zip(mine.shape, wanted.shape, strict=True)]
            assert relative(np.pad(mine, gaps), wanted) < tolerance, name
    (found.last_hidden_state * tensor(along)).sum().backward()
    wanted = {n: a for n, a in stored_arrays(slopes).items() if n.rpartition(".")[2] not in WIRING}
    theirs = dict(theirs.named_parameters())
    largest = max(float(np.abs(a).max(initial=0)) for a in wanted.values())
    for name, slope in wanted.items():
        if name.startswith("tokens."):
            continue  # they are not used here
        mine = theirs.pop(name).grad
        mine = np.zeros_like(slope) if mine is None else mine.numpy()
        if name.endswith("output_bias"):  # ours has one for each row of equal heads
            continue
        # of an array whose gradient cancels only the rounding errors are left
        assert relative(mine, slope, largest / 100) < tolerance, name
    assert not [name for name in theirs if not name.startswith("tokens.")]
    assert relative(given.grad, down) < tolerance


@pytest.mark.parametrize(
    ("seed", "dtype"),
    [(1, "float64"), (2, "float32")]
    + [
        pytest.param(seed, dtype, marks=pytest.mark.slow)
        for seed, dtype in product([0, *range(3, 12)], TOLERANCE)
    ],
)
def test_random_shapes(tmp_path, seed, dtype):
    with jax.enable_x64(dtype == "float64"):
        config = random_config(seed)
        model = random_model(config, seed)
        theirs = exported(model, None, tmp_path / "m")
        assert theirs.dtype == getattr(torch, dtype)
        check(model, theirs, *random_inputs(config), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("name", "dtype", "trained"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in product(CATALOGUE, TOLERANCE, (False, True))
    ],
)
def test_families(tmp_path, name, dtype, trained):
    """Every named value of every family; `trained` is of its counterpart, untrained."""
    with jax.enable_x64(dtype == "float64"):
        construction = construct(name)
        model = construction.compile(dtype).model
        if trained:
            model = construction.counterpart().init(jax.random.key(1))
        theirs = exported(model, construction, tmp_path / "m")
        inputs = construction.sample(jax.random.key(3), 3)
        stream, groups, _ = construction.stream(model, *inputs)
        run = compile_once(lambda model, s, g: model.run(s, g, sites=("residual",)))
        out, sites = run(model, stream, groups)
        streams = jnp.concatenate([sites["residual"][:-1], out[None]])
        places = construction.places(model.config.depth, *inputs)
        found = theirs(
            inputs_embeds=tensor(stream), token_type_ids=tensor(groups), output_hidden_states=True
        )
        assert relative(found.last_hidden_state, out) < TOLERANCE[dtype]
        if model.config.width < construction.program.slots.width:  # columns of its own
            places = {}
        assert set(theirs.config.places) == set(places)
        for value, place in places.items():
            wanted = place.gather(streams, construction.program.slots)
            mine = theirs.read(found.hidden_states, value)
            assert relative(mine, wanted) < TOLERANCE[dtype], value
        if model.config.tokens is not None:
            probable = theirs.probabilities(found.logits)
            assert relative(probable, model.word_probabilities(out)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_softened(tmp_path, dtype):
    """Weights of attention to rounding; what small differences of them give, as certified."""
    with jax.enable_x64(dtype == "float64"):
        linear = GradientDescent(dim_x=3, num_examples=5, steps=2, step_size=0.5)
        construction = Softened(linear)
        model = construction.compile(dtype).model
        theirs = exported(model, construction, tmp_path / "m")
        inputs = construction.sample(jax.random.key(3), 3)
        stream, groups, _ = construction.stream(model, *inputs)
        out, sites = model.run(stream, groups, sites=("attention",))
        found, values = captured(
            theirs,
            ["blocks.0.attn.hook_pattern"],
            inputs_embeds=tensor(stream),
            token_type_ids=tensor(groups),
        )
        (pattern,) = values.values()
        assert relative(pattern, sites["attention"][0]) < TOLERANCE[dtype] / 100
        assert relative(found.last_hidden_state, out) < construction.tolerance(dtype)
        assert theirs.config.layers[0]["heads"][1]["name"].endswith("minus")


@pytest.mark.parametrize("mixer", [None, pytest.param("mesa", marks=pytest.mark.slow)])
def test_language_models(x64, tmp_path, mixer):
    """Words go in as `input_ids`, scores and probabilities of words come out."""
    shaped = decoder(9, positions=6, layers=2, heads=2, width=4)
    if mixer is not None:
        shaped = causal_language_model(9, mixer, gates=True, heads=2, width=4)
    model = random_model(shaped.config)
    theirs = exported(model, None, tmp_path / "m")
    words = np.random.default_rng(0).integers(0, 9, (2, 6))
    out = compile_once(lambda model, stream: model(stream))(model, model.embed(words))
    found = theirs(input_ids=tensor(words))
    assert relative(found.logits, model.word_scores(out)) < 1e-12
    probable = theirs.probabilities(found.logits)
    assert relative(probable, model.word_probabilities(out)) < 1e-12
    with pytest.raises(ValueError, match="input_ids must be .* numbers from 0 to 8"):
        theirs(input_ids=tensor(words + 5))
    if mixer is None:
        with pytest.raises(ValueError, match="input_ids has 12 tokens, the model 6 positions"):
            theirs(input_ids=tensor(np.tile(words, 2)))


def mesa_model(gates: bool, ridge: float) -> Transformer:
    layer = LayerConfig((HeadsConfig("mesa", 2, 3, 3, gates=gates),))
    model = random_model(Config(6, (SegmentConfig((layer,)),)))
    return model.map_parts(
        lambda part: part.weights | {"log_regularization": jnp.full((1, 2), np.log(ridge))}
    )


@pytest.mark.slow
@pytest.mark.parametrize("gates", [False, True])
def test_mesa_heads_keep_what_the_layer_promises(tmp_path, gates):
    """At condition numbers of 1e11, which leave no digits of a Gram matrix in float32."""
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-4)):
        with jax.enable_x64(dtype == "float64"):
            model = cast(mesa_model(gates, 1e-10), dtype)
            stream, groups = random_inputs(model.config, tokens=40)
            theirs = exported(model, None, tmp_path / dtype)
            out = theirs(inputs_embeds=tensor(stream), token_type_ids=tensor(groups))
            assert relative(out.last_hidden_state, model(stream, groups)) < tolerance


def small_model() -> Transformer:
    """Two blocks that share their weights, with heads, MLP and norms."""
    norm = NormConfig(affine=True)
    heads = HeadsConfig("softmax", 2, 2, 3), HeadsConfig("linear", 1, 3, 1, bias=True)
    layer = LayerConfig(heads, MlpConfig(4, "gelu"), norm, norm)
    config = Config(5, (SegmentConfig((layer,), 2, tied=True),), ("a", "b"), norm)
    return random_model(config)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(ours, theirs, stream, kinds of tokens)."""
    with jax.enable_x64(True):
        model = small_model()
        theirs = exported(model, None, tmp_path_factory.mktemp("small") / "m")
        return model, theirs, *random_inputs(model.config)


def test_edits_equal_hooks_that_replace(small, x64):
    model, theirs, stream, groups = small
    sites = model.run(stream, groups, sites=tuple(SITES))[1]
    layers = jnp.arange(2)[:, None, None, None, None]
    one = jnp.broadcast_to(layers == 1, sites["attention"].shape)
    edits = {
        "attention": Edit(one, 2 * sites["attention"]),
        "middle": Edit(one[..., 0, :, :1] & (layers[..., 0] == 1), jnp.full((1, 1, 1, 1), 0.25)),
    }
    wanted, _ = model.run(stream, groups, edits=edits)
    block = theirs.blocks[1]
    handles = [
        block.attn.hook_pattern.register_forward_hook(lambda m, x, y: 2 * y),
        block.hook_resid_mid.register_forward_hook(lambda m, x, y: torch.full_like(y, 0.25)),
    ]
    found = theirs(inputs_embeds=tensor(stream), token_type_ids=tensor(groups))
    for handle in handles:
        handle.remove()
    assert relative(found.last_hidden_state, wanted) < 1e-12
    plain = theirs(inputs_embeds=tensor(stream), token_type_ids=tensor(groups))
    assert relative(plain.last_hidden_state, wanted) > 1e-3


def test_outputs_by_the_names_of_transformers(small, x64):
    model, theirs, stream, groups = small
    sites = model.run(stream, groups, sites=("residual", "attention"))[1]
    given = {"inputs_embeds": tensor(stream), "token_type_ids": tensor(groups)}
    out = theirs(**given, output_hidden_states=True, output_attentions=True)
    for number in range(2):
        assert relative(out.hidden_states[number], sites["residual"][number]) < 1e-12
        assert relative(out.attentions[number], sites["attention"][number]) < 1e-12
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert out.hidden_states[2] is out.last_hidden_state and out.logits is None
    (alone,) = theirs(**given, return_dict=False)
    assert torch.equal(alone, out.last_hidden_state)


def test_transformer_lens(small, x64):
    lens = pytest.importorskip("transformer_lens", reason="needs transformer-lens")
    model, theirs, stream, groups = small
    sites = model.run(stream, groups, sites=tuple(SITES))[1]
    assert isinstance(theirs, lens.HookedRootModule)
    given = {"inputs_embeds": tensor(stream), "token_type_ids": tensor(groups)}
    out, cache = theirs.run_with_cache(**given)
    for site, module in MODULES.items():
        for number in range(2):
            assert relative(cache[f"blocks.{number}.{module}"], sites[site][number]) < 1e-12
    assert cache["blocks.0.attn.hook_q"].shape == (2, 5, 3, 3)
    nothing = theirs.run_with_hooks(
        **given, fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: 0 * value)]
    )
    last = theirs.ln_final(theirs.final_norm, cache["blocks.1.hook_resid_mid"])
    assert relative(nothing.last_hidden_state, last) < 1e-12
    assert relative(out.last_hidden_state, last) > 1e-3


def test_nnsight(small, x64):
    nnsight = pytest.importorskip("nnsight", reason="needs nnsight")
    model, theirs, stream, groups = small
    wanted = model.run(stream, groups, sites=("attention",))[1]["attention"]
    traced = nnsight.NNsight(theirs)
    with traced.trace(inputs_embeds=tensor(stream), token_type_ids=tensor(groups)):
        pattern = traced.blocks[0].attn.hook_pattern.output.save()
        traced.blocks[1].hook_resid_post.output[:] = 0
        out = traced.output.save()
    assert relative(pattern, wanted[0]) < 1e-12
    zero = theirs.ln_final(theirs.final_norm, torch.zeros_like(tensor(stream)))
    assert relative(out.last_hidden_state, zero) < 1e-12


def test_without_other_tools(small, x64, monkeypatch):
    """Torch and transformers are enough."""
    model, theirs, stream, groups = small
    for name in ("transformer_lens", "transformer_lens.hook_points"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("alone", inspect.getfile(type(theirs)))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alone", module)
    spec.loader.exec_module(module)
    other = module.OrreryModel(module.OrreryConfig(**theirs.config.to_dict())).double()
    assert type(other.blocks[0].hook_resid_pre).__module__ == "alone"
    assert not hasattr(other, "run_with_cache")
    other.load_state_dict(theirs.state_dict())
    given = {"inputs_embeds": tensor(stream), "token_type_ids": tensor(groups)}
    found, values = captured(other, ["blocks.0.hook_resid_pre"], **given)
    assert relative(found.last_hidden_state, model(stream, groups)) < 1e-12
    assert relative(values["blocks.0.hook_resid_pre"], stream) == 0


def test_saved_again_by_transformers(small, x64, tmp_path):
    _, theirs, stream, groups = small
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    given = {"inputs_embeds": tensor(stream), "token_type_ids": tensor(groups)}
    assert torch.equal(again(**given).last_hidden_state, theirs(**given).last_hidden_state)
    narrow = load_as(tmp_path / "again", torch.float32)
    found = narrow(**given | {"inputs_embeds": given["inputs_embeds"].float()})
    assert found.last_hidden_state.dtype == torch.float32
    assert narrow.layers[0].heads[0].window.dtype == torch.int32


def test_streams_from_named_values(x64, tmp_path):
    construction = construct("gradient-descent", {"dim_x": 2, "num_examples": 3})
    model = construction.compile().model
    theirs = exported(model, construction, tmp_path / "m")
    x, y, query = construction.sample(jax.random.key(0), 2)
    stream = theirs.stream_of(
        x=tensor(jnp.concatenate([x, query], 1)),
        y=torch.nn.functional.pad(tensor(y), (0, 0, 0, 1)),
    )
    assert relative(stream, construction.stream(model, x, y, query).values) == 0
    with pytest.raises(ValueError, match=r"no slot 'z', must be one of \['x', 'y'\]"):
        theirs.stream_of(z=stream)
    with pytest.raises(ValueError, match="y: 3 columns, must be 1"):
        theirs.stream_of(y=stream)
    with pytest.raises(ValueError, match="no value 'nothing', must be one of"):
        theirs.read([stream], "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs_embeds": None}, "give input_ids or inputs_embeds, one of them"),
        ({"token_type_ids": None}, r"token_type_ids must say which of \['a', 'b'\]"),
        ({"token_type_ids": np.full(5, 2)}, "token_type_ids must be 0 to 1"),
        ({"token_type_ids": np.zeros(4)}, r"token_type_ids has shape \(4,\), must be \[5\]"),
        ({"inputs_embeds": np.zeros((2, 5, 4))}, r"inputs_embeds has shape \(2, 5, 4\)"),
        ({"attention_mask": np.zeros((2, 5))}, "attention_mask holds other numbers than 1"),
        ({"inputs_embeds": None, "input_ids": np.zeros((2, 5))}, "the model has no embedding"),
    ],
)
def test_what_the_model_refuses(small, change, message):
    _, theirs, stream, groups = small
    given = {"inputs_embeds": stream, "token_type_ids": groups} | change
    with pytest.raises(ValueError, match=message):
        theirs(**{name: a if a is None else tensor(a) for name, a in given.items()})


@pytest.mark.slow
def test_the_lines_on_your_own_tool(tmp_path, monkeypatch):
    pytest.importorskip("transformer_lens", reason="needs transformer-lens")
    page = (Path(__file__).parents[2] / "docs/your_tool.md").read_text()
    (code,) = (c for c in re.findall("```python\n(.*?)```", page, re.DOTALL) if "export(" in c)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["cache"]["blocks.0.attn.hook_pattern"].shape == (2, 1, 6, 6)
