"""The auxiliary decoder: its numbers, what it sees, what is refused; one that is fitted to text."""

import dataclasses
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from constructions.core.compile import untrained
from constructions.core.config import Config, TokensConfig
from constructions.core.transformer import Transformer, randomise
from constructions.interchange.decoder import (
    DecoderShape,
    TrainedAuxiliary,
    _fitted,
    check_auxiliary,
    decoder,
    logits,
    with_parameters,
)
from constructions.mesa.models import causal_language_model
from synthetic.fitting.weights_file import load_model, save_model
from synthetic.grammar import examples as grammars
from synthetic.tasks.text import TextTask, text_entropy

SIZES = {"positions": 6, "layers": 2, "heads": 2, "width": 8}
QUICK = TrainedAuxiliary(grammar="toy", layers=1, width=8, length=8, steps=120, batch=32)


def random_decoder(key=0, **sizes):
    return randomise(decoder(7, **(SIZES | sizes)), jax.random.key(key), 0.4)


def numbers(model):
    return sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("sizes", [{}, {"hidden": 5}, {"heads": 4, "layers": 3, "positions": 11}])
def test_parameters(sizes):
    model = decoder(7, **(SIZES | sizes))
    assert numbers(model) == check_auxiliary(model).parameters


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ((50257, 1024, 12, 12, 768, 3072, "gelu", 1e-5), 124_439_808),
        ((50272, 2050, 12, 12, 768, 3072, "relu", 1e-5), 125_239_296),
    ],
)
def test_parameters_of_the_published_models(sizes, published):
    """GPT-2, and OPT-125M with its two idle rows of positions."""
    assert DecoderShape(*sizes).parameters == published


def test_what_a_token_depends_on(x64):
    model, tokens = random_decoder(), jnp.array([[0, 1, 2, 3, 4, 5]])
    change = np.abs(logits(model, tokens.at[0, 3].set(6)) - logits(model, tokens))[0].max(1)
    assert (change[:3] == 0).all() and (change[3:] > 1e-4).all()
    # places matter, and a shorter text is the beginning of a longer one
    same = logits(model, jnp.zeros((1, 6), int))[0]
    assert np.abs(same[1:] - same[:-1]).max(1).min() > 1e-4
    np.testing.assert_allclose(
        logits(model, tokens[:, :4]), logits(model, tokens)[:, :4], atol=1e-14
    )


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_equals_its_equations(x64, activation):
    """The module's equations, head by head in numpy."""
    model = random_decoder(activation=activation)
    key = jax.random.key(1)  # gains, offsets and biases too

    def move(path, leaf):
        wired = leaf.dtype.kind != "f" or path[-1].key == "scale"
        own = jax.random.fold_in(key, zlib.crc32(str(path).encode()))
        return leaf if wired else leaf + 0.2 * jax.random.normal(own, leaf.shape)

    a = jax.tree_util.tree_map_with_path(move, model.arrays())
    found = logits(Transformer(model.config, a), jnp.array([[3, 1, 4, 1, 5]]))[0]
    a = jax.tree.map(np.asarray, a)

    def norm(w, x):
        x = x - x.mean(-1, keepdims=True)
        return w["gain"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) + w["offset"]

    def act(u):
        tanh = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        return tanh if activation == "gelu" else np.maximum(u, 0)

    table = a["tokens"]["embedding"]
    h = table[[3, 1, 4, 1, 5]] + a["tokens"]["position"][:5]
    for layer in range(2):
        w = jax.tree.map(lambda x, n=layer: x[n], a["segments"][0]["layers"][0])
        x, heads = norm(w["norm"], h), w["heads"][0]
        for n in range(2):
            q, k, v = (x @ heads[s][n].T + heads[f"{s}_bias"][n] for s in ("query", "key", "value"))
            scores = np.where(np.tri(5, dtype=bool), q @ k.T / 2, -np.inf)  # d = 4
            weights = np.exp(scores)
            h = h + weights / weights.sum(1, keepdims=True) @ v @ heads["output"][n].T
        h = h + heads["output_bias"]
        u = act(norm(w["mlp_norm"], h) @ w["mlp"]["hidden"].T + w["mlp"]["hidden_bias"])
        h = h + u @ w["mlp"]["output"].T + w["mlp"]["output_bias"]
    np.testing.assert_allclose(found, norm(a["final_norm"], h) @ table.T, atol=1e-12)


def test_tied_tables(x64, tmp_path):
    """The embedding is the readout, once among the arrays; saved, loaded and drawn like others."""
    model = random_decoder()
    assert "readout" not in model.arrays()["tokens"]
    stream = jax.random.normal(jax.random.key(3), (1, 2, 8))
    scores = stream @ model.arrays()["tokens"]["embedding"].T
    np.testing.assert_allclose(model.word_scores(stream), scores, atol=1e-13)
    np.testing.assert_allclose(model.word_probabilities(stream), jax.nn.softmax(scores), atol=1e-13)
    config = Config.from_json(json.loads(json.dumps(model.config.to_json())))
    assert config == model.config
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model", untrained(config))
    np.testing.assert_array_equal(loaded.word_scores(stream), model.word_scores(stream))
    with pytest.raises(ValueError, match="readout is 4, must be embedding=5 of tied tables"):
        TokensConfig(5, 4, tied=True)
    older = {k: v for k, v in dataclasses.asdict(TokensConfig(5, 4)).items() if k != "tied"}
    assert TokensConfig(**older) == TokensConfig(5, 4)


def test_untied_scores_are_the_readouts():
    model = randomise(causal_language_model(5, "softmax", heads=2, width=8), jax.random.key(0), 0.3)
    stream = jax.random.normal(jax.random.key(3), (1, 2, 8))
    scores = stream @ model.arrays()["tokens"]["readout"].T
    np.testing.assert_allclose(model.word_scores(stream), scores, atol=1e-5)
    none = untrained(dataclasses.replace(model.config, tokens=None))
    with pytest.raises(ValueError, match="no readout: its config has no tokens"):
        none.word_scores(stream)


def changed(**fields):
    """A decoder whose config differs in these fields; those of one layer by its parts' names."""
    config = decoder(7, **SIZES).config
    segment = config.segments[0]
    layer = segment.pattern[0]
    for name in [n for n in fields if hasattr(layer, n)]:
        value = fields.pop(name)
        part = getattr(layer, name)
        if isinstance(value, dict):
            one = part[0] if name == "heads" else part
            one = dataclasses.replace(one, **value)
            value = (one,) if name == "heads" else one
        layer = dataclasses.replace(layer, **{name: value})
    inner = {n: fields.pop(n) for n in ("tied", "repeats") if n in fields}
    segment = dataclasses.replace(segment, pattern=(layer,), **inner)
    config = dataclasses.replace(config, segments=(segment,) * fields.pop("segments", 1))
    if "tokens" in fields and fields["tokens"] is not None:
        fields["tokens"] = dataclasses.replace(config.tokens, **fields["tokens"])
    return untrained(dataclasses.replace(config, **fields), (None, 0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": {"mixer": "linear"}}, "heads.mixer is 'linear', must be 'softmax'"),
        ({"heads": {"bias": False}}, "heads.bias is False, must be True"),
        ({"heads": {"key_dim": 2}}, "heads.key_dim is 2, must be 4"),
        ({"heads": ()}, "one row of heads"),
        ({"mlp": {"activation": "tanh"}}, "activation is 'tanh', must be one of"),
        ({"mlp": {"gated": True}}, "mlp.gated is True, must be False"),
        ({"mlp": None}, "an MLP"),
        ({"norm": None}, "norm is None, must be present"),
        ({"norm": {"affine": False}}, "norm.affine is False, must be True"),
        ({"mlp_norm": {"kind": "rms"}}, "mlp_norm.kind is 'rms', must be 'layer'"),
        ({"mlp_norm": {"eps": 1e-3}}, "mlp_norm.eps is 0.001, must be 1e-05"),
        ({"final_norm": None}, "final_norm is None, must be present"),
        ({"tied": True}, "segments.tied is True, must be False"),
        ({"segments": 2}, "one segment that repeats one layer"),
        ({"clip": 1.0}, "clip is 1.0, must be None"),
        ({"token_groups": ("a", "b")}, "token_groups is"),
        ({"tokens": None}, "tables of words"),
        ({"tokens": {"tied": False}}, "tokens.tied is False, must be True"),
        ({"tokens": {"positions": 0}}, "positions is 0, must be an integer of at least 1"),
        ({"tokens": {"probabilities": "shares"}}, "probabilities is 'shares', must be 'softmax'"),
    ],
)
def test_what_is_no_auxiliary(fields, message):
    with pytest.raises(ValueError, match=f"^auxiliary: .*{message}"):
        check_auxiliary(changed(**dict(fields)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", 1.0, "scale is not 1 / sqrt d = 0.5 in some head"),
        ("window", jnp.array([-2, 0]), "window is not causal"),
        ("window", jnp.array([-100, 1]), "window is not causal"),
        ("query_groups", False, "query_groups leave out tokens"),
        ("key_groups", False, "key_groups leave out tokens"),
        ("sink_groups", True, "sink_groups are not empty"),
    ],
)
def test_what_is_wired_otherwise(name, value, message):
    model = decoder(7, **SIZES)
    heads = model.arrays()["segments"][0]["layers"][0]["heads"][0]
    arrays = model.arrays()
    new = {**heads, name: heads[name].at[1, 1].set(value)}
    arrays["segments"][0]["layers"][0]["heads"] = {0: new}
    with pytest.raises(ValueError, match=message):
        check_auxiliary(Transformer(model.config, arrays))
    assert check_auxiliary(changed()) == check_auxiliary(model)
    assert check_auxiliary(changed(precision="default")) == check_auxiliary(model)


def test_no_transformer_is_no_auxiliary():
    with pytest.raises(ValueError, match="auxiliary is a int, must be a Transformer"):
        check_auxiliary(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"words": 0}, "words is 0, must be an integer of at least 1"),
        ({"positions": 0}, "positions is 0"),
        ({"layers": 0}, "layers is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"heads": 3}, "width is 8, must be a multiple of heads=3"),
        ({"activation": "silu"}, "activation is 'silu', must be one of"),
        ({"eps": 0.0}, "eps is 0.0, must be above 0"),
    ],
)
def test_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        decoder(**({"words": 7} | SIZES | given))


def test_too_many_tokens():
    with pytest.raises(ValueError, match="7 tokens, but the model has 6 positions"):
        logits(decoder(7, **SIZES), jnp.zeros((1, 7), int))


def test_with_parameters_keeps_the_wiring_and_the_dtype(x64):
    """1 / sqrt 3 is as exact as float64, though the parameters come from float32."""
    with jax.enable_x64(False):
        model = randomise(decoder(7, **(SIZES | {"width": 6})), jax.random.key(0), 0.4)
        low = jax.tree.map(np.asarray, model.arrays())
    high = with_parameters(decoder(7, **(SIZES | {"width": 6})), low)
    heads = high.arrays()["segments"][0]["layers"][0]["heads"][0]
    np.testing.assert_allclose(heads["scale"], 3**-0.5, rtol=1e-15)
    assert heads["query"].dtype == jnp.float64
    np.testing.assert_array_equal(
        heads["query"], model.arrays()["segments"][0]["layers"][0]["heads"][0]["query"]
    )


def test_it_learns():
    """The loss on fresh text falls from log V to below that of word frequencies."""
    entropy, _ = text_entropy(grammars.named("toy"), jax.random.key(7), 500)
    text = QUICK.text(jax.random.key(99), 1000)
    batch = TextTask(text, QUICK.length).sample(jax.random.key(5), 512)
    model = QUICK.model
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits(model, batch.inputs[0])), batch.target[..., None], -1
    )
    shares = np.bincount(text.tokens) / len(text.tokens)
    unigram = -(shares * np.log(np.maximum(shares, 1e-9))).sum()
    assert entropy < -chosen.mean() < 0.8 * unigram < unigram < np.log(len(QUICK.vocabulary))
    assert check_auxiliary(model) == QUICK.shape


def test_a_fit_is_the_same_in_float64():
    """Fitted in float32 whatever the default, once, and cast; a new model each time."""
    table = QUICK.model.arrays()["tokens"]["embedding"]
    assert table.dtype == jnp.float32 and QUICK.model is not QUICK.model
    with jax.enable_x64(True):
        again = _fitted.__wrapped__(QUICK)["tokens"]["embedding"]
        cast = QUICK.model.arrays()["tokens"]["embedding"]
        assert again.dtype == jnp.float32 and cast.dtype == jnp.float64
        np.testing.assert_array_equal(again, table)
        np.testing.assert_array_equal(cast, table)


def test_settings_are_plain():
    data = json.loads(json.dumps(QUICK.to_json()))
    again = TrainedAuxiliary.from_json(data)
    assert again == QUICK and hash(again) == hash(QUICK)
    assert again.vocabulary[-1] == "." and len(again.vocabulary) == again.shape.words
    for given, message in [
        ({"grammar": "latin"}, "grammar 'latin' is not one of"),
        ({"depth": 3}, "depth: no field of an auxiliary"),
        ({"heads": 3}, "must be a multiple of heads=3"),
        ({"steps": 0}, "steps=0: must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainedAuxiliary.from_json(data | given)
