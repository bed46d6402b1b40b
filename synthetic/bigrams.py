"""Text whose law has to be found in the text: each sequence is a Markov chain of its own.

The rows of the transition matrix are drawn from a Dirichlet distribution for every sequence, so
that weights can hold nothing but the prior. What is best is known: with n_ij the pairs (i, j) so
far and n_i = sum_j n_ij,

    P(x_{t+1} = j | x_1 .. x_t = i)  =  (n_ij + a) / (n_i + words a),    a the concentration.

Ridge regression of the next word on the last one, both one-hot, gives n_ij / (n_i + ridge).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from synthetic.task import Batch
from synthetic.text import NextToken


@dataclass(frozen=True)
class BigramTask(NextToken):
    """The next word of Markov chains, a `Task`. Hashable.

    Attributes:
        words: size of the vocabulary.
        length: words that are seen, and as many that are predicted: the same, one place further.
        concentration: of the Dirichlet distribution of every row; small for laws that say much.

    Raises:
        ValueError: a number out of range.
    """

    words: int = 16
    length: int = 128
    concentration: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("words", 2), ("length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if not 0 < self.concentration < float("inf"):
            raise ValueError(f"concentration is {self.concentration}, must be above 0 and finite")

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw chains; the first word is uniform.

        By Polya's urn: each word from what is known of the law by then, which gives sequences the
        same distribution as a law drawn beforehand.

        Returns:
            `inputs`: words `[batch, length]` int32; `target`: the next ones, the same shape.
        """
        first, rest = jax.random.split(key)
        start = jax.random.randint(first, (batch,), 0, self.words)
        rows = jnp.arange(batch)

        def draw(state: tuple[Array, Array], uniform: Array) -> tuple[tuple[Array, Array], Array]:
            urns, word = state
            below = jnp.cumsum(urns[rows, word], -1)
            following = (below <= uniform[:, None] * below[:, -1:]).sum(-1)
            following = jnp.minimum(following, self.words - 1)
            return (urns.at[rows, word, following].add(1), following), following

        urns = jnp.full((batch, self.words, self.words), self.concentration)
        uniform = jax.random.uniform(rest, (self.length, batch))
        words = jax.lax.scan(draw, (urns, start), uniform)[1]
        words = jnp.concatenate([start[None], words]).T.astype(jnp.int32)
        return Batch((words[:, :-1],), words[:, 1:])

    def posterior(self, words: Int[Array, "batch time"]) -> Float[Array, "batch time word"]:
        """What is best at every place: P(x_{t+1} | x_1 .. x_t) of the module's equation."""
        here = jax.nn.one_hot(words, self.words)
        # [t, s]: word s is word t's, and the word behind it has been seen
        same = jnp.tril(words[:, :, None] == words[:, None, :], -1).astype(here.dtype)
        following = jnp.roll(here, -1, axis=1)
        counts = jnp.matmul(same, following, precision="highest") + self.concentration
        return counts / counts.sum(-1, keepdims=True)
