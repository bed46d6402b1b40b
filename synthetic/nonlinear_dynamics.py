r"""Dynamical systems with a law that is linear in known features of the state.

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

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from synthetic.bits import normal_from_unit, threefry_2x32
from synthetic.dynamics import Dynamics, product
from synthetic.task import Batch

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
        self._at_least_one("hidden")
        for name in ("scale", "start"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be finite and above 0")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, must be at least 0 and below 2^31")

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
