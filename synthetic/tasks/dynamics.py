r"""Sequences of a dynamical system whose law is drawn anew for each: predict the next state.

    s_{t+1} = W s_t + noise eps_t,     eps_t ~ N(0, I)

with a law W of its own for every sequence. From the states so far, the best linear estimate of W is
ridge regression of s_2..s_t on s_1..s_{t-1}; with a standard normal prior on the entries of W its
regularisation is noise^2. (von Oswald et al. 2023, arXiv 2309.05858, section 3; the settings of the
paper's code: orthogonal W of 10 dimensions, 50 states, noise .01, s_1 uniform in [-1, 1).)

`Dynamics` is what all systems share, `LinearDynamics` the systems above. In `NonlinearDynamics` the
law is linear in known features of the state,

    s_{t+1} = W phi(s_t) + noise eps_t,     eps_t ~ N(0, I),
    phi(s) = f(s) / |f(s)|,                 f(s) = B gelu(A s).

The network f is one and the same for all sequences, with entries of A and B from N(0, scale^2);
W is orthogonal and drawn anew for each sequence. Features have length 1, which keeps states there
too. Whoever knows phi learns W by ridge regression of s_{u+1} on phi(s_u).

(von Oswald et al. 2023, arXiv 2309.05858, MLP*; norm and settings are those of the paper's code: 10
dimensions, 40 hidden units, scale 1.1, noise .01, s_1 uniform in [-.25, .25), 50 states. Its very
network is the default.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from synthetic.compilation import compile_once, many
from synthetic.guards import number
from synthetic.tasks.task import Batch
from synthetic.threefry import normal_from_unit, threefry_2x32

States = Float[Array, "batch time dim"]


@dataclass(frozen=True)
class Dynamics:
    """States that follow one another, and the loss of predictions of them.

    Attributes:
        dim: of the states that are seen.
        length: states a sequence; the last one's successor is the last target.
        noise: standard deviation of each coordinate's noise, at every step.

    Raises:
        ValueError: a number out of range.
    """

    dim: int = 10
    length: int = 50
    noise: float = 0.01

    def __post_init__(self) -> None:
        number("dim", self.dim, whole=True, least=1)
        number("length", self.length, whole=True, least=1)
        number("noise", self.noise, least=0)

    @property
    def noise_floor(self) -> float:
        """Loss of whoever knows the law, where all of the state is seen: dim noise^2 / 2."""
        return self.dim * self.noise**2 / 2

    def follow(self, key: Array, start: Array, law: Callable[[Array], Array]) -> States:
        """`length` + 1 states from `start` `[batch, size]`: law(state) plus noise, again and again.

        `law` maps states `[batch, size]` to states, each by the law of its own sequence.
        """
        noise = self.noise * jax.random.normal(key, (self.length, *start.shape))

        def step(state: Array, eps: Array) -> tuple[Array, Array]:
            following = law(state) + eps
            return following, following

        _, later = jax.lax.scan(step, start, noise)
        return jnp.concatenate([start[:, None], jnp.moveaxis(later, 0, 1)], 1)

    def loss(self, prediction: States, batch: Batch) -> Array:
        """Half the squared distance from the next state, its mean over time, `[batch]`."""
        return self.loss_by_position(prediction, batch).mean(-1)

    def loss_by_position(self, prediction: States, batch: Batch) -> Float[Array, "batch time"]:
        """The same at every position; entry t is about the prediction from the states up to t."""
        return half_squared_distance(prediction, batch.target)


@dataclass(frozen=True)
class LinearDynamics(Dynamics):
    """Linear systems; a `Task`. Hashable.

    Attributes:
        dim, length, noise: as in `Dynamics`.
        singular_values: bounds between which those of W are drawn, uniformly and independently;
            (1, 1) makes W orthogonal and Haar-distributed, below 1 it contracts.
        fixed: None, or the seed of the one W that all sequences share. A model may then know W from
            its weights and need not learn it in context: the negative control. C below is drawn
            for every sequence even so.
        hidden_dim: None, or the dimension of states that are not seen: h_{t+1} = W h_t + noise, and
            s_t = C h_t with entries of C from N(0, 1 / hidden_dim).

    Raises:
        ValueError: a number out of range.
    """

    singular_values: tuple[float, float] = (1.0, 1.0)
    fixed: int | None = None
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim is not None:
            number("hidden_dim", self.hidden_dim, whole=True, least=1)
        if self.fixed is not None and not isinstance(self.fixed, int | np.integer):
            raise ValueError(f"fixed is {self.fixed!r}, must be None or an integer")
        bounds = np.atleast_1d(self.singular_values).tolist()
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] < np.inf:
            raise ValueError(
                f"singular_values is {self.singular_values}, must be (low, high) with "
                "0 <= low <= high, finite"
            )
        object.__setattr__(self, "singular_values", (float(bounds[0]), float(bounds[1])))

    def laws(self, key: Array, batch: int) -> Float[Array, "batch size size"]:
        """One W for each sequence."""
        if self.fixed is not None:
            alone = replace(self, fixed=None)
            return jnp.repeat(alone.laws(jax.random.key(self.fixed), 1), batch, axis=0)
        size, (low, high) = self.hidden_dim or self.dim, self.singular_values
        left, right, values = jax.random.split(key, 3)
        law = jax.random.orthogonal(left, size, (batch,))
        if low == high:
            return low * law
        scales = jax.random.uniform(values, (batch, 1, size), minval=low, maxval=high)
        return product(law * scales, jax.random.orthogonal(right, size, (batch,)))

    @compile_once(static_argnums=(0, 2), often=many)
    def sample(self, key: Array, batch: int) -> Batch:
        """Draw sequences.

        Returns:
            `inputs`: the states `[batch, length, dim]`; `target`: their successors, as large.
        """
        law_key, start_key, noise_key, view_key = jax.random.split(key, 4)
        law, size = self.laws(law_key, batch), self.hidden_dim or self.dim
        start = jax.random.uniform(start_key, (batch, size), minval=-1.0, maxval=1.0)
        states = self.follow(noise_key, start, lambda s: product(law, s[..., None])[..., 0])
        if self.hidden_dim is not None:
            view = jax.random.normal(view_key, (batch, self.dim, size)) / np.sqrt(size)
            states = product(states, jnp.swapaxes(view, 1, 2))
        return Batch((states[:, :-1],), states[:, 1:])


def half_squared_distance(prediction: Array, target: Array) -> Array:
    """|prediction - target|^2 / 2 along the last axis; ValueError for shapes that differ."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction must have shape {target.shape}, got {prediction.shape}")
    return jnp.square(prediction - target).sum(-1) / 2


def product(a: Array, b: Array) -> Array:
    """The matrix product at full precision."""
    return jnp.matmul(a, b, precision="highest")


#: Under the square root in |f(s)|, so that phi(0) = 0.
EPS = 1e-24


class Network(NamedTuple):
    """f: A `[hidden, dim]`, which reads the state, and B `[dim, hidden]`, which writes features."""

    read: np.ndarray
    write: np.ndarray


@dataclass(frozen=True)
class NonlinearDynamics(Dynamics):
    """Systems that are linear in features of the state; a `Task`. Hashable.

    Attributes:
        dim, length, noise: as in `Dynamics`.
        hidden: units of the network.
        scale: standard deviation of its weights.
        start: s_1 is uniform in [-start, start).
        seed: of the network, which is the same in float32 and float64; 421 is that of the paper.

    Raises:
        ValueError: a number out of range.
    """

    hidden: int = 40
    scale: float = 1.1
    start: float = 0.25
    seed: int = 421

    def __post_init__(self) -> None:
        super().__post_init__()
        number("hidden", self.hidden, whole=True, least=1)
        number("scale", self.scale, above=0)
        number("start", self.start, above=0)
        number("seed", self.seed, whole=True, least=0, below=2**31)

    @property
    def network(self) -> Network:
        """The weights of f."""
        read = old_normal(self.seed, self.dim, self.hidden)
        write = old_normal(self.seed + 1, self.hidden, self.dim)
        return Network(self.scale * read.T, self.scale * write.T)

    def features(self, states: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """phi of each state."""
        read, write = (jnp.asarray(part, states.dtype) for part in self.network)
        f = product(jax.nn.gelu(product(states, read.T), approximate=True), write.T)
        return f * jax.lax.rsqrt(jnp.square(f).sum(-1, keepdims=True) + EPS)

    @compile_once(static_argnums=(0, 2), often=many)
    def sample(self, key: Array, batch: int) -> Batch:
        """Draw sequences.

        Returns:
            `inputs`: the states `[batch, length, dim]`; `target`: their successors, as large.
        """
        law_key, start_key, noise_key = jax.random.split(key, 3)
        law = jax.random.orthogonal(law_key, self.dim, (batch,))
        bound = self.start
        start = jax.random.uniform(start_key, (batch, self.dim), minval=-bound, maxval=bound)
        states = self.follow(
            noise_key, start, lambda s: product(law, self.features(s)[..., None])[..., 0]
        )
        return Batch((states[:, :-1],), states[:, 1:])


@cache
def old_normal(seed: int, rows: int, columns: int) -> np.ndarray:
    """What `jax.random.normal` drew from `PRNGKey(seed)` in float32 before JAX 0.5, as float64.

    Words n and n + half of the counter made one block of the cipher. The array is read-only.
    """
    size, half = rows * columns, -(-rows * columns // 2)
    with jax.ensure_compile_time_eval():  # the first use may be inside a jitted function
        low = jnp.arange(half, dtype=jnp.uint32)
        high = low + np.uint32(half)
        high = jnp.where(high < size, high, 0)
        bits = jnp.concatenate(threefry_2x32((jnp.uint32(0), jnp.uint32(seed)), (low, high)))
        unit = (bits[:size] >> np.uint32(9)).astype(jnp.float32) * np.float32(2**-23)
        numbers = np.asarray(normal_from_unit(unit), np.float64).reshape(rows, columns)
    numbers.flags.writeable = False
    return numbers
