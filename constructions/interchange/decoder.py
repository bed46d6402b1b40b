"""Decoders in the shape of GPT-2 and OPT, of the one class: the auxiliary models of TinT.

With d = width / heads, E the embedding, P the positions and LN a norm with gain and offset,

    h     =  E[token] + P[place]
    h     <- h + W_O concat_n softmax(q^n k^n^T / sqrt(d), causal) v^n + b_O,   q, k, v of LN(h)
    h     <- h + W_2 act(W_1 LN(h) + b_1) + b_2
    score =  E LN(h)

(Radford et al. 2019; Zhang et al. 2022, arXiv 2205.01068). Linear maps have biases; the readout is
the embedding. Weights are fitted here to text of a grammar, or read from a folder by
`constructions.interchange.huggingface`. `from_arrays` and `to_arrays` convert a model's arrays to
and from these names:

    query, key, value, output, hidden, back   [W b], `[layer, rows, columns + 1]`; W_1 is "hidden",
                                              W_2 "back"
    gain, offset                              of the norms, `[2 layers + 1, width]`: in front of
                                              attention and MLP of every layer, then the final one
    embedding, position                       `[words, width]`, `[positions, width]`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from constructions.core.compile import untrained
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
from constructions.core.program import CAUSAL
from constructions.core.transformer import Transformer, randomise
from synthetic.fitting.train import Recipe, fit
from synthetic.grammar import examples as grammars
from synthetic.guards import number
from synthetic.tasks.text import Corpus, TextTask

#: Matrices of one layer, in the order of a forward pass.
MATRICES = ("query", "key", "value", "output", "hidden", "back")
#: What of blocks and norms is trained.
CHANGED = (*MATRICES, "gain", "offset")
NORMS = ("norm", "mlp_norm")

Weights = Mapping[str, Array]


def from_arrays(arrays: Any) -> dict[str, Any]:
    """Weights from `Transformer.arrays()`, in JAX or numpy as they come."""
    layer, final = arrays["segments"][0]["layers"][0], arrays["final_norm"]
    heads, mlp = layer["heads"][0], layer["mlp"]
    xp = jnp if isinstance(heads["query"], jax.Array) else np
    count, width = heads["output_bias"].shape

    def matrix(w: Any, b: Any) -> Any:
        parts = w.reshape(count, -1, w.shape[-1]), b.reshape(count, -1, 1)
        return xp.concatenate(parts, -1)

    def norms(name: str) -> Any:
        each = xp.stack([layer[norm][name] for norm in NORMS], 1).reshape(-1, width)
        return xp.concatenate([each, final[name][None]])

    output = heads["output"].swapaxes(1, 2).reshape(count, width, -1)
    return {
        **{name: matrix(heads[name], heads[f"{name}_bias"]) for name in MATRICES[:3]},
        "output": matrix(output, heads["output_bias"]),
        "hidden": matrix(mlp["hidden"], mlp["hidden_bias"]),
        "back": matrix(mlp["output"], mlp["output_bias"]),
        "gain": norms("gain"),
        "offset": norms("offset"),
        **{name: arrays["tokens"][name] for name in ("embedding", "position")},
    }


def to_arrays(weights: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """The inverse: parameters of a decoder with that many heads, nested as `Config.shapes`.

    Weights may have any axes in front, which every leaf then has.
    """
    (*lead, count, width, _), rows = weights["query"].shape, weights["query"].shape[-2] // heads
    w = {name: weights[name][..., :-1] for name in MATRICES}
    b = {f"{name}_bias": weights[name][..., -1] for name in MATRICES}
    attention = {name: w[name].reshape(*lead, count, heads, rows, width) for name in MATRICES[:3]}
    for name in attention.copy():
        attention[f"{name}_bias"] = b[f"{name}_bias"].reshape(*lead, count, heads, rows)
    output = w["output"].reshape(*lead, count, width, heads, rows).swapaxes(-2, -3)
    attention |= {"output": output, "output_bias": b["output_bias"]}
    mlp = {"hidden": w["hidden"], "hidden_bias": b["hidden_bias"]}
    mlp |= {"output": w["back"], "output_bias": b["back_bias"]}
    affine = {name: weights[name] for name in ("gain", "offset")}
    norms = {
        norm: {
            name: a[..., :-1, :].reshape(*lead, count, 2, width)[..., n, :]
            for name, a in affine.items()
        }
        for n, norm in enumerate(NORMS)
    }
    return {
        "segments": {0: {"layers": {0: {"heads": {0: attention}, "mlp": mlp, **norms}}}},
        "final_norm": {name: a[..., -1, :] for name, a in affine.items()},
        "tokens": {name: weights[name] for name in ("embedding", "position")},
    }


ACTIVATIONS = ("gelu", "relu")
EPS = 1e-5
STOP = "."
SENTENCES = 20_000


@dataclass(frozen=True)
class DecoderShape:
    """The numbers that fix a decoder: `decoder(**asdict(shape))` has this shape.

    Attributes:
        words: size of the vocabulary.
        positions: tokens of the longest sequence.
        layers, heads, width: width is a multiple of heads.
        hidden: units of every MLP.
        activation: "gelu" (the tanh form, as GPT-2 has it) or "relu".
        eps: added to the variance by every norm.

    Raises:
        ValueError: a size below 1, heads that do not divide the width, another activation, or an
            eps that is not above 0.
    """

    words: int
    positions: int
    layers: int
    heads: int
    width: int
    hidden: int
    activation: str
    eps: float

    def __post_init__(self) -> None:
        for name in ("words", "positions", "layers", "heads", "width", "hidden"):
            number(name, getattr(self, name), whole=True, least=1)
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, must be a multiple of heads={self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, must be one of {ACTIVATIONS}")
        number("eps", self.eps, above=0)

    @property
    def parameters(self) -> int:
        """How many numbers the model has: tables, final norm, and every layer's."""
        d, u = self.width, self.hidden
        layer = 4 * (d * d + d) + 2 * u * d + u + d + 4 * d
        return (self.words + self.positions) * d + 2 * d + self.layers * layer


def decoder(
    words: int,
    *,
    positions: int,
    layers: int,
    heads: int,
    width: int,
    hidden: int | None = None,
    activation: str = "gelu",
    eps: float = EPS,
) -> Transformer:
    """A decoder with every weight 0; the module has its equations, `DecoderShape` the arguments.

    `hidden` is four times the width if None. ValueError as there.
    """
    hidden = 4 * width if hidden is None else hidden
    shape = DecoderShape(words, positions, layers, heads, width, hidden, activation, eps)
    return untrained(_config(shape), CAUSAL)


def _config(shape: DecoderShape) -> Config:
    rows, norm = shape.width // shape.heads, NormConfig(eps=shape.eps, affine=True)
    layer = LayerConfig(
        heads=(HeadsConfig("softmax", shape.heads, rows, rows, bias=True),),
        mlp=MlpConfig(shape.hidden, shape.activation, bias=True),
        norm=norm,
        mlp_norm=norm,
    )
    return Config(
        shape.width,
        (SegmentConfig((layer,), shape.layers),),
        final_norm=norm,
        tokens=TokensConfig(shape.words, shape.words, shape.positions, tied=True),
    )


def check_auxiliary(model: Any) -> DecoderShape:
    """The shape of an auxiliary model, once it is known to be a `decoder`; `precision` is free.

    Raises:
        ValueError: the model has something that TinT does not simulate, or lacks something; the
            line names it.
    """
    if type(model) is not Transformer:
        raise ValueError(f"auxiliary is a {type(model).__name__}, must be a Transformer")
    config = model.config
    if len(config.segments) != 1 or len(config.segments[0].pattern) != 1:
        raise ValueError(
            f"auxiliary: patterns of {[len(s.pattern) for s in config.segments]} layers, must be "
            "one segment that repeats one layer"
        )
    segment, layer = config.segments[0], config.segments[0].pattern[0]
    if config.tokens is None or layer.mlp is None or len(layer.heads) != 1:
        raise ValueError(
            f"auxiliary: tokens is {config.tokens}, mlp {layer.mlp}, heads {layer.heads}; must "
            "have tables of words, an MLP, and one row of heads"
        )
    try:
        shape = DecoderShape(
            words=config.tokens.embedding,
            positions=config.tokens.positions,
            layers=segment.repeats,
            heads=layer.heads[0].heads,
            width=config.width,
            hidden=layer.mlp.hidden,
            activation=layer.mlp.activation,
            eps=layer.norm.eps if layer.norm else EPS,
        )
    except ValueError as error:
        raise ValueError(f"auxiliary: {error}") from error
    wanted = dataclasses.replace(_config(shape), precision=config.precision)
    _same("", asdict(config), asdict(wanted))
    for part in model.parts():
        if part.kind == "heads":
            _check_wiring(shape, part.weights)
    return shape


def _same(path: str, found: Any, wanted: Any) -> None:
    """ValueError names the first entry of a nested config that differs."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in wanted:
            _same(f"{path}.{name}".lstrip("."), found[name], wanted[name])
    elif isinstance(found, tuple) and isinstance(wanted, tuple) and len(found) == len(wanted):
        for one, other in zip(found, wanted, strict=True):
            _same(path, one, other)
    elif found != wanted:
        shown = ["present" if isinstance(end, dict) else repr(end) for end in (found, wanted)]
        raise ValueError(f"auxiliary: {path} is {shown[0]}, must be {shown[1]}")


def _check_wiring(shape: DecoderShape, heads: Mapping[str, Array]) -> None:
    """ValueError unless heads see all tokens up to their own, with scores over sqrt d."""
    scale, low, high = (heads["scale"], heads["window"][..., 0], heads["window"][..., 1])
    root = (shape.width // shape.heads) ** -0.5
    tests = {
        f"scale is not 1 / sqrt d = {root:.6g}": np.abs(np.asarray(scale) / root - 1).max() < 1e-2,
        "window is not causal": bool((high == 0).all() and (low <= 1 - shape.positions).all()),
        "query_groups leave out tokens": bool(heads["query_groups"].all()),
        "key_groups leave out tokens": bool(heads["key_groups"].all()),
        "sink_groups are not empty": not bool(heads["sink_groups"].any()),
    }
    for complaint, passed in tests.items():
        if not passed:
            raise ValueError(f"auxiliary: {complaint} in some head")


def logits(model: Transformer, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time word"]:
    """Scores of the token behind each, from the tokens up to it.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    return model.word_scores(model(model.embed(tokens)))


@dataclass(frozen=True)
class TrainedAuxiliary:
    """A decoder fitted to text of one of our grammars; a setting: hashable, and plain as JSON.

    The words are the grammar's and a full stop behind each sentence. The fit is in float32
    whatever JAX's default is, the same bits every time, and done once in a process.

    In nats a token, on other text (`text_entropy` is what no model beats):

        grammar    settings                                          loss    entropy   words alone
        english    as they are                                       3.27    3.08      3.98
        english    width 32, heads 4, length 32, learning_rate .01   3.16    3.08      3.98
        toy        grammar                                           1.68    1.61      2.61

    Attributes:
        grammar: a name of `synthetic.grammar.examples`.
        layers, heads, width, activation: as of `decoder`; the MLPs have four times the width.
        length: positions of the model, and of the windows that it is fitted to.
        steps, batch, learning_rate: of Adam, with a cosine schedule.
        seed: of text, weights and batches.

    Raises:
        ValueError: another grammar, or an entry that `decoder` or a fit does not take.
    """

    grammar: str = "english"
    layers: int = 2
    heads: int = 2
    width: int = 8
    activation: str = "gelu"
    length: int = 16
    steps: int = 1000
    batch: int = 64
    learning_rate: float = 3e-2
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.shape, self._recipe()

    @property
    def shape(self) -> DecoderShape:
        """The numbers of the model, which need no fit."""
        sizes = len(self.vocabulary), self.length, self.layers, self.heads, self.width
        return DecoderShape(*sizes, 4 * self.width, self.activation, EPS)

    @property
    def model(self) -> Transformer:
        """The fitted model, a new one each time, in JAX's default float."""
        return with_parameters(decoder(**asdict(self.shape)), _fitted(self))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """What each token stands for."""
        return (*grammars.named(self.grammar).vocabulary, STOP)

    def text(self, key: Array, sentences: int = SENTENCES) -> Corpus:
        """Text of the grammar in the model's tokens."""
        return Corpus.from_grammar(grammars.named(self.grammar), key, sentences, separator=STOP)

    def to_json(self) -> dict[str, Any]:
        """The fields; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TrainedAuxiliary:
        """Settings from `to_json`'s dict; ValueError names an unknown field."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"{name}: no field of an auxiliary, which has {', '.join(known)}")
        return cls(**fields)

    def _recipe(self) -> Recipe:
        return Recipe(
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            schedule="cosine",
            warmup=min(20, self.steps // 10),
            clip=1.0,
        )


@lru_cache(maxsize=32)
def _fitted(settings: TrainedAuxiliary) -> Any:
    """The fitted arrays, in float32, nested as `Config.shapes`."""
    with jax.enable_x64(False):
        text = settings.text(jax.random.fold_in(jax.random.key(settings.seed), 1))
        shaped = decoder(**asdict(settings.shape))
        found = fit(
            lambda key: randomise(shaped, key, settings.width**-0.5 / 2),
            TextTask(text, settings.length),
            settings._recipe(),
            predict=lambda model, tokens: jax.nn.softmax(logits(model, tokens)),
            seed=settings.seed,
        )
        return jax.tree.map(np.asarray, found.model.arrays())


def with_parameters(model: Transformer, arrays: Any, dtype: Any = None) -> Transformer:
    """A model with these parameters, and the wiring of `model`: scales as exact as floats are.

    Args:
        model: what the rest is taken from.
        arrays: nested as `Config.shapes`; wiring may be left out, and is not looked at.
        dtype: of all floats; each array's own in `model` if None.
    """

    def merge(old: Any, new: Any, name: str | int) -> Any:
        if isinstance(old, dict):
            return {k: merge(old[k], None if k in WIRING else new[k], k) for k in old}
        kind = old.dtype if dtype is None or old.dtype.kind != "f" else dtype
        return jnp.asarray(old if name in WIRING else new, kind)

    return Transformer(model.config, merge(model.arrays(), arrays, ""))
