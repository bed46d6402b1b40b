"""Decoders in Hugging Face format: equal to torch's, every refusal one line, there and back.

`tests/make_golden_checkpoints.py` wrote the files of `golden`.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from constructions.core.transformer import Transformer, randomise
from constructions.interchange.decoder import check_auxiliary, decoder, logits
from constructions.interchange.huggingface import FORMATS, load_auxiliary, save_auxiliary
from synthetic.fitting.weights_file import RunError

GOLDEN = Path(__file__).parent / "golden"
MAKER = Path(__file__).parents[1] / "make_golden_checkpoints.py"
NAMES = ("gpt2", "gpt2_double", "opt_sharded", "opt_double")
run = jax.jit(logits)


@pytest.fixture
def copy(tmp_path):
    """`copy(name)`: a folder of golden files that may be changed."""

    def make(name="gpt2"):
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return make


def edit_config(folder, **fields):
    """Sets fields of config.json; those that are `...` are removed."""
    file = folder / "config.json"
    data = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def edit_weights(folder, change, file="model.safetensors"):
    """Replaces the arrays of a file by `change(arrays)`."""
    save_file(dict(change(load_file(folder / file))), folder / file)


def same(one: Transformer, other: Transformer):
    assert one.config == other.config
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one.arrays()),
        jax.tree.leaves(other.arrays()),
        strict=True,
    ):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def drawn(model, key=0):
    """All parameters N(0, .3^2), biases and gains too."""
    leaves, tree = jax.tree.flatten(randomise(model, jax.random.key(key), 0.3).arrays())
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    moved = [
        a + 0.3 * jax.random.normal(k, a.shape, a.dtype) if a.dtype.kind == "f" else a
        for k, a in zip(keys, leaves, strict=True)
    ]
    arrays = tree.unflatten(moved)
    heads = model.arrays()["segments"][0]["layers"][0]["heads"][0]
    arrays["segments"][0]["layers"][0]["heads"][0]["scale"] = heads["scale"]
    return Transformer(model.config, arrays)


@pytest.mark.parametrize("name", NAMES)
def test_equals_torch(name):
    io = np.load(GOLDEN / name / "io.npz")
    assert np.abs(io["logits"]).max() > 2  # weights that matter
    found = run(load_auxiliary(GOLDEN / name), jnp.asarray(io["tokens"]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, io["logits"], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2_double", "opt_double"])
def test_equals_torch_in_float64(x64, name):
    io = np.load(GOLDEN / name / "io.npz")
    found = run(load_auxiliary(GOLDEN / name), jnp.asarray(io["tokens"]))
    np.testing.assert_allclose(found, io["logits"], atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_live(tmp_path, name):
    """Other random weights, through torch's own files and back into torch from ours."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_golden_checkpoints", MAKER)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    kind, config, dtype, saving = maker.CASES[name]
    theirs = maker.random_model(kind, config, dtype, seed=1)
    theirs.save_pretrained(tmp_path / "theirs", **saving)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 9))
    wanted = maker.scores(theirs, tokens)
    ours = load_auxiliary(tmp_path / "theirs")
    np.testing.assert_allclose(run(ours, tokens), wanted, atol=1e-5)
    save_auxiliary(ours, tmp_path / "ours", config.model_type)
    again = kind.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(maker.scores(again, tokens), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_there_and_back(tmp_path, kind):
    """Every array exactly, from either format, whatever the activation and the hidden size."""
    model = drawn(decoder(7, positions=5, layers=3, heads=2, width=6, hidden=5))
    save_auxiliary(model, tmp_path / "new" / kind, kind)
    same(load_auxiliary(tmp_path / "new" / kind), model)
    names = sorted(load_file(tmp_path / "new" / kind / "model.safetensors"))
    golden = GOLDEN / ("opt_double" if kind == "opt" else "gpt2") / "model.safetensors"
    wanted = {name for name in load_file(golden) if ".1." not in name}
    assert wanted <= set(names) and len(names) == len(wanted) + 2 * (
        len(load_file(golden)) - len(wanted)
    )
    with pytest.raises(RunError, match=f"{kind}: cannot be made: File exists"):
        save_auxiliary(model, tmp_path / "new" / kind, kind)


def test_there_and_back_in_float64(x64, tmp_path):
    model = drawn(decoder(7, positions=5, layers=1, heads=1, width=3, activation="relu", eps=1e-3))
    save_auxiliary(model, tmp_path / "model")
    same(load_auxiliary(tmp_path / "model"), model)
    with pytest.raises(ValueError, match="eps is 0.001, must be 1e-05 in this format"):
        save_auxiliary(model, tmp_path / "opt", "opt")
    with pytest.raises(ValueError, match="kind is 'llama', must be one of gpt2, opt"):
        save_auxiliary(model, tmp_path / "llama", "llama")
    assert not (tmp_path / "opt").exists()


def test_what_is_no_decoder_is_not_saved(tmp_path):
    model = decoder(7, positions=5, layers=1, heads=1, width=4)
    heads = model.arrays()["segments"][0]["layers"][0]["heads"][0]
    model.segments[0].layers[0].heads[0].scale[...] = 2 * heads["scale"]
    with pytest.raises(ValueError, match="scale is not 1 / sqrt d"):
        save_auxiliary(model, tmp_path / "model")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(tmp_path, copy, dtype):
    """Files of halves become JAX's default float; a model of halves is stored as it is."""
    folder = copy()
    half = load_auxiliary(folder, dtype)
    assert {a.dtype for a in jax.tree.leaves(half.arrays()) if a.dtype.kind not in "ib"} == {
        jnp.dtype(dtype)
    }
    save_auxiliary(half, tmp_path / "half")
    same(load_auxiliary(tmp_path / "half", dtype), half)
    full = load_auxiliary(tmp_path / "half")
    table = full.arrays()["tokens"]["embedding"]
    assert table.dtype == jnp.float32
    np.testing.assert_array_equal(table, half.arrays()["tokens"]["embedding"].astype(jnp.float32))
    assert np.abs(table - load_auxiliary(folder).arrays()["tokens"]["embedding"]).max() > 0


@pytest.mark.parametrize("name", ["gpt2", "opt_double"])
def test_prefixes_buffers_and_a_tied_head(copy, name):
    """As older files have them: names without a prefix, masks, the head beside the embedding."""
    folder, wanted = copy(name), load_auxiliary(GOLDEN / name)
    prefixes = ("transformer.",) if name == "gpt2" else ("model.", "decoder.")
    table = "wte.weight" if name == "gpt2" else "embed_tokens.weight"
    for prefix in prefixes:
        edit_weights(folder, lambda a, p=prefix: {k.removeprefix(p): v for k, v in a.items()})
        same(load_auxiliary(folder), wanted)
    edit_weights(folder, lambda a: a | {"lm_head.weight": a[table]})
    same(load_auxiliary(folder), wanted)
    if name == "gpt2":
        mask = np.tri(10, dtype=np.uint8)[None, None]
        more = {"h.1.attn.bias": mask, "h.1.attn.masked_bias": np.array(-1e4, np.float32)}
        edit_weights(folder, lambda a: a | more)
        same(load_auxiliary(folder), wanted)
    edit_weights(folder, lambda a: a | {"lm_head.weight": a[table] + 1})
    with pytest.raises(RunError, match="lm_head.weight: differs from the embedding"):
        load_auxiliary(folder)


def test_settings_that_are_honoured(copy):
    folder = copy()
    edit_config(folder, layer_norm_epsilon=0.5, activation_function="relu", resid_pdrop=0.1)
    shape = check_auxiliary(load_auxiliary(folder))
    assert shape.eps == 0.5 and shape.activation == "relu" and shape.hidden == 32
    edit_config(folder, layer_norm_epsilon=..., activation_function="gelu_pytorch_tanh")
    assert check_auxiliary(load_auxiliary(folder)).eps == 1e-5


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"model_type": "llama"}, "model_type: 'llama', must be one of gpt2, opt"),
        ("gpt2", {"model_type": ...}, "model_type: None, must be one of gpt2, opt"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type: ['gpt2'], must be one of gpt2, opt"),
        ("gpt2", {"activation_function": "gelu"}, "'gelu', which has the error function"),
        ("gpt2", {"activation_function": "silu"}, "activation_function: 'silu', must be one of"),
        ("gpt2", {"activation_function": []}, "activation_function: [], must be one of"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False, must be True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx: True, must be"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn: True, must be"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True, must be False"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings: False, must be True"),
        ("gpt2", {"quantization_config": {}}, "quantization_config: present"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon: 0, must be between 0 and 1"),
        ("gpt2", {"layer_norm_epsilon": "x"}, "layer_norm_epsilon: 'x', must be between 0"),
        ("gpt2", {"n_head": 3}, "n_head: 3, must divide n_embd=8"),
        ("gpt2", {"n_head": ...}, "n_head: 12, must divide n_embd=8"),
        ("gpt2", {"num_hidden_layers": 3}, "num_hidden_layers: 3, must be n_layer=2"),
        ("gpt2", {"scale_attn_weights": None}, "scale_attn_weights: None, must be True"),
        ("gpt2", {"n_layer": 2.0}, "n_layer: 2.0, must be an integer above 0"),
        ("gpt2", {"n_layer": True}, "n_layer: True, must be an integer above 0"),
        ("gpt2", {"vocab_size": 0}, "vocab_size: 0, must be an integer above 0"),
        ("gpt2", {"n_inner": "4"}, "n_inner: '4', must be an integer above 0"),
        ("opt_double", {"do_layer_norm_before": False}, "do_layer_norm_before: False, must be"),
        ("opt_double", {"word_embed_proj_dim": 4}, "word_embed_proj_dim: 4, must be 8"),
        ("opt_double", {"enable_bias": False}, "enable_bias: False, must be True"),
        ("opt_double", {"layer_norm_elementwise_affine": False}, "affine: False, must be True"),
        ("opt_double", {"_remove_final_layer_norm": True}, "final_layer_norm: True, must be"),
        ("opt_double", {"tie_word_embeddings": False}, "tie_word_embeddings: False, must be True"),
        ("opt_double", {"ffn_dim": -1}, "ffn_dim: -1, must be an integer above 0"),
    ],
)
def test_settings_that_are_refused(copy, name, fields, message):
    folder = copy(name)
    edit_config(folder, **fields)
    with pytest.raises(RunError) as caught:
        load_auxiliary(folder)
    line = str(caught.value)
    assert line.startswith(f"{folder / 'config.json'}: ") and message in line and "\n" not in line


@pytest.mark.parametrize("absent", [..., None], ids=["absent", "null"])
@pytest.mark.parametrize("name", ["gpt2", "opt_double"])
def test_absent_settings_have_the_defaults_of_the_format(copy, name, absent):
    """The published models of 125 million parameters are the defaults, but for their arrays."""
    format, folder = FORMATS[name[:4].rstrip("_")], copy(name)
    sizes = dict.fromkeys((setting for setting, _ in format.sizes.values()), absent)
    edit_config(folder, **sizes, activation_function=absent)
    edit_config(folder, word_embed_proj_dim=absent, layer_norm_epsilon=absent)
    shape = format.shape(json.loads((folder / "config.json").read_text()))
    assert (shape.layers, shape.heads, shape.width, shape.hidden) == (12, 12, 768, 3072)
    if name == "gpt2":
        assert (shape.words, shape.positions, shape.activation) == (50257, 1024, "gelu")
    else:
        assert (shape.words, shape.positions, shape.activation) == (50272, 2048, "relu")
    assert shape.eps == 1e-5
    with pytest.raises(RunError, match="for 12 layers|missing|has \\["):
        load_auxiliary(folder)


def test_settings_that_are_left_out_or_have_their_other_names(copy):
    folder, wanted = copy(), load_auxiliary(GOLDEN / "gpt2")
    absent = ("activation_function", "layer_norm_epsilon", "n_inner", "scale_attn_weights")
    edit_config(folder, **dict.fromkeys([*absent, "tie_word_embeddings"], ...))
    edit_config(folder, n_embd=..., n_head=..., n_layer=..., n_positions=...)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    edit_config(folder, **sizes, max_position_embeddings=10, add_cross_attention=None)
    same(load_auxiliary(folder), wanted)
    folder, wanted = copy("opt_double"), load_auxiliary(GOLDEN / "opt_double")
    edit_config(folder, activation_function=...)
    assert check_auxiliary(wanted).activation == "relu"
    same(load_auxiliary(folder), wanted)
    edit_config(folder, ffn_dim=...)  # no multiple of the width, as it is in GPT-2
    with pytest.raises(RunError, match=r"fc1.weight: shape .*, config.json has \[3072, 8\]"):
        load_auxiliary(folder)


def without(name):
    return lambda arrays: {k: v for k, v in arrays.items() if k != name}


TABLE, GAIN = "transformer.wte.weight", "transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(TABLE), "wte.weight: missing"),
        (without("transformer.h.1.attn.c_attn.bias"), "h.1.attn.c_attn.bias: missing"),
        (lambda a: a | {GAIN: a[GAIN][:7]}, "ln_f.weight: shape [7], config.json has [8]"),
        (lambda a: a | {TABLE: a[TABLE].T.copy()}, "wte.weight: shape [8, 23], config.json has"),
        (lambda a: a | {GAIN: a[GAIN].astype(np.int32)}, "ln_f.weight: dtype int32, must be"),
        (lambda a: a | {"h.2.ln_1.bias": a[GAIN]}, "h.2.ln_1.bias: no array of a decoder"),
        (lambda a: a | {"score.weight": a[GAIN]}, "score.weight: no array of a decoder"),
        (lambda a: a | {"h.0.attn.rotary": a[GAIN]}, "h.0.attn.rotary: no array of a decoder"),
        (lambda a: a | {"ln_f.weight": a[GAIN]}, "ln_f.weight: stored twice"),
        (lambda a: a | {TABLE: a[TABLE] * np.nan}, "wte.weight: 184 of 184 numbers are NaN or"),
        (
            lambda a: a | {GAIN: np.append(a[GAIN][:7], np.float32(np.inf))},
            "ln_f.weight: 1 of 8 numbers are NaN",
        ),
    ],
)
def test_arrays_that_do_not_fit(copy, change, message):
    folder = copy()
    edit_weights(folder, change)
    with pytest.raises(RunError) as caught:
        load_auxiliary(folder)
    line = str(caught.value)
    assert line.startswith(str(folder)) and message in line and "\n" not in line


def test_projections_are_no_arrays_of_a_decoder(copy):
    """An OPT-350m whose config hides it."""
    folder = copy("opt_double")
    more = {"model.decoder.project_in.weight": np.zeros((8, 4), np.float32)}
    edit_weights(folder, lambda a: a | more)
    with pytest.raises(RunError, match="project_in.weight: no array of a decoder"):
        load_auxiliary(folder)


def break_files(folder, what):
    """Damages a folder; what `load_auxiliary` then says."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    data = weights.read_bytes()
    if what == "no config":
        config.unlink()
        return "config.json: cannot be read: No such file or directory"
    if what in ("half a config", "no object"):
        config.write_text("[1]" if what == "no object" else config.read_text()[:40])
        return "config.json: " + ("must be a JSON" if what == "no object" else "no JSON: ")
    if what == "bytes":
        config.write_bytes(b"\xff\xfe\xfa")
        return "config.json: no JSON: "
    if what in ("no weights", "pickled"):
        weights.unlink()
        if what == "pickled":
            (folder / "pytorch_model.bin").write_bytes(b"\x80")
            return "only pytorch_model.bin, which is pickled; save it as safetensors"
        return "neither model.safetensors nor model.safetensors.index.json"
    if what == "another dtype":
        size = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + size].replace(b'"F32"', b'"F8_E4M3"')
        entries = json.loads(header)
        for entry in entries.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = [n // 4 for n in entry["data_offsets"]]
        header = json.dumps(entries).encode()
        body = data[8 + size : 8 + size + (len(data) - 8 - size) // 4]
        weights.write_bytes(len(header).to_bytes(8, "little") + header + body)
        return "model.safetensors: an array of dtype 'F8_E4M3', must be a float"
    weights.write_bytes({"empty": b"", "foreign": b"<html>" * 9, "truncated": data[:-100]}[what])
    return "model.safetensors: truncated or no safetensors file"


@pytest.mark.parametrize(
    "what",
    ["no config", "half a config", "no object", "bytes", "no weights", "pickled", "another dtype"]
    + ["empty", "foreign", "truncated"],
)
def test_damaged_files(copy, what):
    folder = copy()
    message = break_files(folder, what)
    with pytest.raises(RunError) as caught:
        load_auxiliary(folder)
    line = str(caught.value)
    assert line.startswith(str(folder)) and message in line and "\n" not in line


def edit_index(folder, **fields):
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_damaged_shards(copy):
    folder = copy("opt_sharded")
    listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = sorted(set(listed.values()))
    one = next(name for name, file in listed.items() if file == second)

    def fails(message):
        with pytest.raises(RunError, match=message):
            load_auxiliary(folder)

    edit_index(folder, weight_map=listed | {one: first})
    fails(f"00001-of-00002.safetensors: {one}: missing, though model.safetensors.index.json lists")
    edit_index(folder, weight_map=listed | {one: "../config.json"})
    fails("weight_map: .*'../config.json', must be a file of the folder")
    edit_index(folder, weight_map=listed | {one: "no\nfile"})
    fails(r"weight_map: .*'no\\nfile', must be a file of the folder")
    edit_index(folder, weight_map={})
    fails("index.json: weight_map: missing or not a map")
    edit_index(folder, weight_map=listed)
    same(load_auxiliary(folder), load_auxiliary(GOLDEN / "opt_sharded"))
    both = load_file(folder / second)
    edit_weights(folder, lambda a: a | {one: both[one]}, first)
    fails(f"00002-of-00002.safetensors: {one}: stored twice")
    (folder / second).unlink()
    fails("00002-of-00002.safetensors: cannot be read: No such file")


def test_files_and_settings_that_claim_too_much(copy):
    """A file of a terabyte without contents, a config of a billion layers, one that never ends."""
    folder = copy()
    weights, config = folder / "model.safetensors", folder / "config.json"
    kept = weights.read_bytes()
    with weights.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(RunError, match=r"safetensors: 1024.0 GiB, .* more than the .* GiB of mem"):
        load_auxiliary(folder)
    weights.write_bytes(kept)
    edit_config(folder, n_layer=10**9)
    with pytest.raises(RunError, match="28 arrays, too few for 1000000000 layers"):
        load_auxiliary(folder)
    config.write_text("[" * 100_000)
    with pytest.raises(RunError, match="config.json: no JSON: values are nested too deeply"):
        load_auxiliary(folder)


def test_numbers_beyond_the_dtype(copy):
    folder = copy()
    edit_weights(folder, lambda a: a | {GAIN: a[GAIN] + 1e5})
    with pytest.raises(RunError, match=r"ln_f.weight: holds 10000\d, beyond float16 \(65504\)"):
        load_auxiliary(folder, jnp.float16)


def test_nothing_is_downloaded(tmp_path):
    with pytest.raises(RunError, match="no such folder; weights are never downloaded"):
        load_auxiliary(tmp_path / "gpt2")
    with pytest.raises(RunError, match="no such folder"):
        load_auxiliary(GOLDEN / "gpt2" / "config.json")


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(jnp.int32, "dtype is int32, must be a float"), (jnp.float64, "in its x64 mode alone")],
)
def test_dtypes_that_are_refused(dtype, message):
    with pytest.raises(ValueError, match=message):
        load_auxiliary(GOLDEN / "gpt2", dtype)
