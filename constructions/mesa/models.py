r"""Models of sequences, to be trained and compared with the constructions.

Those of next states have any layers and share with a construction only how states enter and
predictions leave: `construction.apply` runs them. `causal_language_model` has words in place of
states, and differs in one thing: the mixer behind the first layer.

`BlockScalars` are linear attention whose products are numbers times identity blocks. The stream of
a model of next states is a row of channels of `dim` columns each (s, z, y, x of `polynomial`). If
the products of every head are

    W_K^T W_Q  =  B kron I,       P W_V  =  A kron I,       B, A  [channel, channel],

then the model treats all directions alike: it commutes with every rotation of the states. These
numbers are all there is to train, to read, to average. `compressed` finds the nearest ones to a
trained model, `between` averages two models by their products, which no change of basis inside a
head can bend. (von Oswald et al. 2023, arXiv 2309.05858, section 4: compressed expression.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from constructions.core.canonical import check_linear, head_products
from constructions.core.compile import FAR, untrained
from constructions.core.config import (
    Config,
    HeadsConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    SegmentConfig,
    TokensConfig,
)
from constructions.core.program import CAUSAL
from constructions.core.transformer import Transformer
from constructions.core.weights import Part
from constructions.mesa.tokens import CLIP, GROUPS, STATE, NextState
from synthetic.guards import number
from synthetic.tasks.dynamics import States


class BlockScalars(nnx.Module):
    """The numbers of linear attention that treats all directions alike.

    Attributes:
        key_query: B of every head, `[layer, head, channel, channel]`.
        output_value: A of every head, as large.

    Raises:
        ValueError: another shape.
    """

    def __init__(self, key_query: ArrayLike, output_value: ArrayLike) -> None:
        shape = jnp.shape(key_query)
        if len(shape) != 4 or shape[2] != shape[3] or jnp.shape(output_value) != shape:
            raise ValueError(
                f"key_query has shape {shape}, output_value {jnp.shape(output_value)}, both must "
                "be [layer, head, channel, channel]"
            )
        self.key_query = nnx.Param(jnp.asarray(key_query))
        self.output_value = nnx.Param(jnp.asarray(output_value))

    def expanded(self, dim: int, clip: float | None = None) -> Transformer:
        """The transformer with these products, on states of `dim` dimensions; pure.

        `clip` is that of its `Config`.
        """
        query, output = (_spread(a[...], dim) for a in (self.key_query, self.output_value))
        return _of_products(query, output, clip)


def compressed(model: Transformer, dim: int) -> BlockScalars:
    """The block scalars nearest to a model's products: the means of the blocks' diagonals.

    Raises:
        TypeError: the model is more than causal linear attention between states.
        ValueError: `dim` does not divide its width.
    """
    return BlockScalars(*(_means(a, dim) for a in _products(model, dim)))


def unexplained(model: Transformer, dim: int) -> Float[Array, " layer"]:
    """Share of the squared norm of each layer's products that no block scalars hold.

    Errors as of `compressed`.
    """
    pairs = [(a, _means(a, dim)) for a in _products(model, dim)]
    total = sum(jnp.square(full).sum((1, 2, 3)) for full, _ in pairs)
    kept = sum(jnp.square(means).sum((1, 2, 3)) for _, means in pairs)
    return jnp.asarray(1 - dim * kept / total)


def between(model: Transformer, other: Transformer, fraction: ArrayLike) -> Transformer:
    """The model whose products are (1 - s) of one model's and s of another's, head by head.

    For models of next states whose heads correspond, such as a model and its compressed expression.
    `probes.interpolation.blend` walks another line: it averages what the heads do.

    Raises:
        TypeError: a model is more than causal linear attention between states.
        ValueError: the models differ in depth, heads, width or clip.
    """
    ours, theirs = _products(model), _products(other)
    if ours[0].shape != theirs[0].shape:
        raise ValueError(
            f"products of the models have shapes {ours[0].shape} and {theirs[0].shape}, "
            "[layer, head, width, width], must agree"
        )
    if model.config.clip != other.config.clip:
        raise ValueError(
            f"clips of the models are {model.config.clip} and {other.config.clip}, must agree"
        )

    def line(a: Array, b: Array) -> Array:
        return jnp.asarray((1 - fraction) * a + fraction * b)

    query, output = (line(a, b) for a, b in zip(ours, theirs, strict=True))
    return _of_products(query, output, model.config.clip)


def _products(model: Transformer, dim: int = 1) -> tuple[Array, Array]:
    """W_K^T W_Q and P W_V of every head, `[layer, head, width, width]`."""
    check_linear(model.config)
    if dim < 1 or model.config.width % dim:
        raise ValueError(f"dim is {dim}, must divide the model's width {model.config.width}")
    products = head_products(model)
    if not (np.asarray(products.wiring)[..., :2] == (-FAR, 0)).all():
        raise TypeError("heads see other tokens than those so far")
    return products.key_query, products.output_value


def _of_products(key_query: Array, output_value: Array, clip: float | None) -> Transformer:
    """Causal linear attention between states with these products, `[layer, head, width, width]`."""
    layers, heads, width, _ = key_query.shape
    layer = LayerConfig((HeadsConfig("linear", heads, width, width),))
    config = Config(width, (SegmentConfig((layer,), layers),), GROUPS, clip=clip)
    base = untrained(config, CAUSAL, keys=[STATE])
    one = jnp.broadcast_to(jnp.eye(width, dtype=key_query.dtype), key_query.shape)
    weights = {"query": key_query, "key": one, "value": one, "output": output_value}
    return base.map_parts(lambda heads: heads.weights | weights)


def _spread(scalars: Array, dim: int) -> Array:
    """kron I, `[layer, head, channel dim, channel dim]`."""
    width = scalars.shape[-1] * dim
    one = jnp.eye(dim, dtype=scalars.dtype)
    return jnp.einsum("lhab,ij->lhaibj", scalars, one).reshape(*scalars.shape[:2], width, width)


def _means(products: Array, dim: int) -> Array:
    """Mean diagonal of every block, `[layer, head, channel, channel]`."""
    layers, heads, width, _ = products.shape
    blocks = products.reshape(layers, heads, width // dim, dim, width // dim, dim)
    return jnp.einsum("lhaibi->lhab", blocks) / dim


_MIXERS = ("linear", "softmax", "mesa")


def sequence_model(
    construction: NextState,
    mixers: Sequence[str],
    heads: int = 4,
    rows: int = 20,
    clip: float | None = None,
) -> Transformer:
    """Causal layers of heads and nothing else, every weight 0; `randomise` draws them.

    Args:
        construction: whose tokens the model reads; its stream is as wide.
        mixers: of the layers: "linear", "softmax" or "mesa" each.
        heads, rows: of every layer, and of their keys and values.
        clip: of the `Config`; `CLIP` for deep linear attention.

    Raises:
        ValueError: no mixer or one that is none of these, or a size below 1.
    """
    if isinstance(mixers, str) or not mixers or not set(mixers) <= set(_MIXERS):
        raise ValueError(f"mixers is {mixers!r}, must be a row of {_MIXERS}")
    number("heads", heads, whole=True, least=1)
    number("rows", rows, whole=True, least=1)
    layers = [LayerConfig((HeadsConfig(mixer, heads, rows, rows),)) for mixer in mixers]
    segments = [SegmentConfig((layer,), len(list(run))) for layer, run in groupby(layers)]
    program = construction.program
    config = Config(program.slots.width, tuple(segments), program.token_groups, clip=clip)
    # the first state has to find BOS where it looks for the state before
    keys = None if construction.tokens == "raw" else [STATE]
    return untrained(config, CAUSAL, keys)


def drawn_scalars(
    key: Array, layers: int, heads: int = 2, channels: int = 4, std: float = 0.01
) -> BlockScalars:
    """Block scalars drawn from N(0, std^2)."""
    shape = (layers, heads, channels, channels)
    return BlockScalars(*(std * jax.random.normal(k, shape) for k in jax.random.split(key)))


def scalar_predictions(construction: NextState) -> Callable[[BlockScalars, States], States]:
    """What block scalars predict as a model of the construction's tokens, for `fit`; clipped."""

    def predict(scalars: BlockScalars, states: States) -> States:
        return construction.apply(scalars.expanded(construction.dim, CLIP), states)

    return predict


MIXERS = ("softmax", "linear", "mesa")


def causal_language_model(
    words: int,
    mixer: str | None = "mesa",
    *,
    gates: bool = False,
    length: int = 128,
    layers: int = 1,
    heads: int = 4,
    width: int = 64,
) -> Transformer:
    """A causal transformer with every weight 0, in the manner of the models with mesa layers.

    Every layer is norm, heads, norm, MLP of four times the width (gelu). In the first one head n
    sees the token n places back and no other, which is a convolution of `heads` tokens: it binds
    to each token those before it, as the hybrid models of arXiv 2309.05858 do by a softmax layer
    and those of arXiv 2506.05233 by short convolutions. `layers` with the mixer follow. Order is
    known from the first layer alone, there are no positions.

    Left out of those models, to keep one class: keys and queries are neither normalised nor passed
    through an activation (the norm in front of the heads bounds them), there is no norm behind the
    heads, and the scores of linear heads are divided by `length` instead.

    Args:
        words: size of the vocabulary.
        mixer: of all layers but the first, one of "softmax", "linear", "mesa"; None for MLPs alone,
            which see no further back than the first layer.
        gates: of mesa heads.
        length: of sequences, for the scale of linear heads.
        layers, heads, width: width is a multiple of heads.

    Raises:
        ValueError: the mixer is another, a size is below 1, the heads do not divide the width, or
            gates of other heads.
    """
    if mixer is not None and mixer not in MIXERS:
        raise ValueError(f"mixer is {mixer!r}, must be None or one of {MIXERS}")
    if mixer is None and gates:
        raise ValueError("gates is True and mixer None, must be 'mesa' with gates")
    sizes = {"words": words, "length": length, "layers": layers, "heads": heads, "width": width}
    for name, size in sizes.items():
        number(name, size, whole=True, least=1)
    if width % heads:
        raise ValueError(f"width is {width}, must be a multiple of heads={heads}")
    rows, norm = width // heads, NormConfig(affine=True)

    def segment(row: tuple[HeadsConfig, ...], repeats: int) -> SegmentConfig:
        mlp = MlpConfig(4 * width, "gelu", bias=True)
        return SegmentConfig((LayerConfig(row, mlp, norm, norm),), repeats)

    first = (HeadsConfig("softmax", heads, rows, rows),)
    then = () if mixer is None else (HeadsConfig(mixer, heads, rows, rows, gates=gates),)
    config = Config(
        width,
        (segment(first, 1), segment(then, layers)),
        final_norm=norm,
        tokens=TokensConfig(words, words),
        precision="default",
    )
    back = -np.arange(1, heads + 1, dtype=np.int32)

    def wire(part: Part) -> dict[str, Array]:
        w = part.weights
        if part.kind == "heads" and part.segment == 0:
            return w | {"window": jnp.asarray(np.stack([back, back], -1)[None])}
        if part.kind == "heads" and mixer == "linear":
            return w | {"scale": w["scale"] / length}
        return w

    return untrained(config, CAUSAL).map_parts(wire)


def next_token(
    model: Transformer, tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time word"]:
    """Probabilities of the token behind each, from the tokens up to it."""
    return model.word_probabilities(model(model.embed(tokens)))
