"""What TinT simulates, as plain array code: a decoder, trained on its own input by autograd.

    theta_0 = the auxiliary model's,  theta_(s+1) = theta_s - eta grad L(theta_s),
    L(theta) = - sum_t m_t log p_theta(x_(t+1) | x_1 .. x_t)

for every sequence on its own, then the logits of theta_S on the same sequence. "Value-only"
attention counts its weights a_ij as constants where it is differentiated.

`Backward` is how each part of the decoder is differentiated: as in the paper, exactly, or by finite
differences.

The checks refuse all other settings and inputs with a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from constructions.core.weights import take_rows
from constructions.interchange.decoder import DecoderShape, Weights
from synthetic.guards import number


def decode(
    w: Weights,
    tokens: Int[Array, " time"],
    shape: DecoderShape,
    value_only: bool = False,
    counted: Array | None = None,
) -> Float[Array, "time word"]:
    """Logits of the decoder on one sequence.

    Args:
        counted: tokens, `[time]`, of which the weights of blocks and norms get a gradient; all if
            None. The others pass gradients on, and contribute none of their own.
    """
    times = partial(jnp.matmul, precision="highest")
    held = jax.tree.map(jax.lax.stop_gradient, dict(w))
    time, d = len(tokens), shape.width // shape.heads
    causal = jnp.tril(jnp.ones((time, time), bool))
    act = {"gelu": partial(jax.nn.gelu, approximate=True), "relu": jax.nn.relu}[shape.activation]

    def by_token(apply: Callable[[Weights], Array]) -> Array:
        return apply(w) if counted is None else jnp.where(counted[:, None], apply(w), apply(held))

    def norm(x: Array, n: int) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + shape.eps)
        return by_token(lambda w: x * w["gain"][n] + w["offset"][n])

    def linear(name: str, layer: int, x: Array) -> Array:
        return by_token(lambda w: times(x, w[name][layer, :, :-1].T) + w[name][layer, :, -1])

    x = take_rows(w["embedding"], tokens) + w["position"][:time]
    for layer in range(shape.layers):
        a = norm(x, 2 * layer)
        q, k, v = (
            linear(name, layer, a).reshape(time, shape.heads, d).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        scores = jnp.where(causal, times(q, k.swapaxes(1, 2)) / d**0.5, -jnp.inf)
        weights = jax.nn.softmax(scores)
        weights = jax.lax.stop_gradient(weights) if value_only else weights
        mixed = times(weights, v).swapaxes(0, 1).reshape(time, -1)
        x = x + linear("output", layer, mixed)
        x = x + linear("back", layer, act(linear("hidden", layer, norm(x, 2 * layer + 1))))
    return times(norm(x, 2 * shape.layers), w["embedding"].T)


def loss(
    w: Weights, tokens: Array, train: Array, shape: DecoderShape, value_only: bool = False
) -> Float[Array, ""]:
    """Summed cross-entropy of the words that follow the positions in `train`; not the last's."""
    logs = jax.nn.log_softmax(decode(w, tokens, shape, value_only))
    chosen = jnp.take_along_axis(logs[:-1], tokens[1:, None], -1)[:, 0]
    return -jnp.sum(jnp.where(train[:-1] != 0, chosen, 0))


def descend(
    w: Weights,
    tokens: Int[Array, "batch time"],
    train: Array,
    shape: DecoderShape,
    *,
    steps: int,
    rate: float | Array,
    trained: tuple[str, ...],
    value_only: bool = False,
) -> dict[str, Array]:
    """Weights of every sequence after `steps` of gradient descent, `[batch, ...]`.

    Args:
        trained: names of the weights that are; others stay as they are.
    """

    def one(tokens: Array, train: Array) -> dict[str, Array]:
        now = dict(w)
        for _ in range(steps):
            slope = jax.grad(loss)(now, tokens, train, shape, value_only)
            now |= {name: now[name] - rate * slope[name] for name in trained}
        return now

    return jax.vmap(one)(tokens, train)


ATTENTION = ("value-only", "finite-difference", "exact")
NORM = ("finite-difference", "central", "exact")
ACTIVATION = ("finite-difference", "exact")


@dataclass(frozen=True)
class Backward:
    """How each part of a decoder is differentiated, and which of its parameters are trained.

    Attributes:
        attention: "value-only" (the scores count as constants: queries and keys are not trained),
            "finite-difference" (the derivative by central differences of softmax heads), "exact".
        norm: "finite-difference" (one-sided, as in the paper), "central" differences, or "exact".
        activation: "finite-difference" (one-sided) or "exact".
        gains: whether gains of LayerNorms are trained; offsets always are.
        step: of one-sided differences. The paper has 1e-3, which truncates by up to 1e-3 of a
            parameter's update; a smaller one loses as much to rounding in float32.
        central: of central differences of attention, a tenth of it of those of norms; both go
            along directions of unit size, so that gradients of any size have the same digits.

    Raises:
        ValueError: another method, or a step that is not above 0.
    """

    attention: str = "exact"
    norm: str = "exact"
    activation: str = "exact"
    gains: bool = True
    step: float = 7e-4
    central: float = 0.01

    def __post_init__(self) -> None:
        for name, allowed in (
            ("attention", ATTENTION),
            ("norm", NORM),
            ("activation", ACTIVATION),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {allowed}")
        if not isinstance(self.gains, bool):
            raise ValueError(f"gains is {self.gains!r}, must be True or False")
        for name in ("step", "central"):
            number(name, getattr(self, name), above=0)


#: Backward passes by name; "paper" is that of Panigrahi et al.
MODES = {
    "paper": Backward("value-only", "finite-difference", "finite-difference", False),
    "finite-difference": Backward("finite-difference", "central", "finite-difference"),
    "exact": Backward(),
}


def check_mode(mode: Any) -> None:
    """A name in `MODES`, a `Backward`, or a mapping with some of its fields."""
    known = isinstance(mode, str) and mode in MODES
    names = [f.name for f in fields(Backward)]
    if isinstance(mode, Mapping):
        known = set(mode) <= set(names)
    if not (known or isinstance(mode, Backward)):
        raise ValueError(
            f"mode is {mode!r}, must be one of {list(MODES)}, a Backward, or some of its fields, "
            f"{', '.join(names)}"
        )


def check_numbers(
    shape: DecoderShape, *, steps: int, stack: int, shards: int, learning_rate: float
) -> None:
    """The numbers of a `Tint` whose auxiliary model has this shape."""
    for name, value in (("steps", steps), ("stack", stack), ("shards", shards)):
        number(name, value, whole=True, least=1)
    width, hidden = shape.width, shape.hidden
    fits = [n for n in range(1, width + 1) if width % n == 0 == hidden % (width // n)]
    if stack not in fits:
        raise ValueError(
            f"stack is {stack}, must divide the auxiliary's width, {width}, into tokens that its "
            f"{hidden} hidden units fill as well: {' or '.join(map(str, fits))}"
        )
    if shards > shape.width:
        raise ValueError(f"shards is {shards}, must be at most the width, {shape.width}")
    if not (np.isfinite(learning_rate) and learning_rate):
        raise ValueError(f"learning_rate is {learning_rate!r}, must be finite and not 0")


def check_texts(shape: DecoderShape, tokens: Any, train_mask: Any) -> None:
    """`[batch, time]` numbers of words, and as many marks of what is trained on.

    Of traced arrays the shapes only. The batch may be empty.
    """
    if (
        len(tokens.shape) != 2
        or not jnp.issubdtype(tokens.dtype, np.integer)
        or not tokens.shape[1]
    ):
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, must be [batch, time] "
            "integers"
        )
    if tokens.shape[1] > shape.positions:
        raise ValueError(f"tokens has {tokens.shape[1]} positions, the auxiliary {shape.positions}")
    if not isinstance(tokens, Tracer) and len(tokens):
        tokens = np.asarray(tokens)
        if tokens.min() < 0 or tokens.max() >= shape.words:
            raise ValueError(
                f"tokens are {tokens.min()} to {tokens.max()}, must be 0 to {shape.words - 1}"
            )
    if train_mask.shape != tokens.shape:
        raise ValueError(
            f"train_mask has shape {train_mask.shape}, must be that of tokens, {tokens.shape}"
        )
    if not isinstance(train_mask, Tracer) and not np.isin(np.asarray(train_mask), (0, 1)).all():
        raise ValueError("train_mask must be 0 or 1 (or bool) everywhere")
