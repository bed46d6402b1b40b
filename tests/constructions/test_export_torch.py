"""Exported models in torch against ours: outputs, gradients and sites; opened by other tools."""

import os
from dataclasses import replace
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
from constructions.gradient_descent import GradientDescent
from constructions.interchange.decoder import decoder
from constructions.interchange.export import export, stored_arrays
from constructions.mesa.models import sequence_model
from constructions.runs import construct
from constructions.softened import Softened
from synthetic.compilation import compile_once

torch = pytest.importorskip("torch", reason="exported models run in torch, which is not installed")
pytest.importorskip("transformers", reason="exported models need transformers")

#: Largest error, relative to the largest entry.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
NO_CERTIFICATE = Certificate("none", (Error("float64", 0.0, 0.0, 0.0, "prediction"),))
#: Our sites, and the modules that have them.
MODULES = {
    "residual": "hook_resid_pre",
    "attention": "attn.hook_pattern",
    "head_output": "attn.hook_result",
    "middle": "hook_resid_mid",
    "mlp_hidden": "mlp.hook_post",
}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Where transformers keeps code that it runs; nothing is looked for elsewhere."""
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def load(folder) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, trust_remote_code=True)


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
        assert relative(mine, slope, largest / 100) < 10 * tolerance, name
    assert not [name for name in theirs if not name.startswith("tokens.")]
    assert relative(given.grad, down) < 10 * tolerance


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(x64, tmp_path, seed):
    config = random_config(seed)
    model = random_model(config, seed)
    check(model, exported(model, None, tmp_path / "m"), *random_inputs(config), 1e-12)
