r"""Linear attention whose products are numbers times identity blocks.

The stream of a model of next states is a row of channels of `dim` columns each (s, z, y, x of
`polynomial`). If the products of every head are

    W_K^T W_Q  =  B kron I,       P W_V  =  A kron I,       B, A  [channel, channel],

then the model treats all directions alike: it commutes with every rotation of the states. These
numbers are all there is to train, to read, to average. `compressed` finds the nearest ones to a
trained model, `between` averages two models by their products, which no change of basis inside a
head can bend. (von Oswald et al. 2023, arXiv 2309.05858, section 4: compressed expression.)
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import ArrayLike, Float

from constructions.blank import blank
from constructions.canonical import check_linear, head_products
from constructions.compiler import FAR
from constructions.config import Config, HeadsConfig, LayerConfig, SegmentConfig
from constructions.mesa.tokens import GROUPS, STATE
from constructions.program import CAUSAL
from constructions.transformer import Transformer


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
    base = blank(config, CAUSAL, keys=[STATE])
    one = jnp.broadcast_to(jnp.eye(width, dtype=key_query.dtype), key_query.shape)
    weights = {"query": key_query, "key": one, "value": one, "output": output_value}
    arrays = base.arrays()
    arrays["segments"][0]["layers"][0]["heads"][0] |= weights
    return Transformer(base.config, arrays)


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
