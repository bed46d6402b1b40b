"""Text of which the front part is learnt from and the rest is to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from synthetic.task import Batch, Outcome
from synthetic.text import Corpus, TextTask, cross_entropy


@dataclass(frozen=True)
class AdaptationTask:
    """Windows of text; a model may be trained on what it says at the first positions. A `Task`.

    Attributes:
        corpus: the text.
        length: tokens that are seen.
        share: of the positions, the first, that are trained on; the others are scored.

    Raises:
        ValueError: the share leaves no position to train on or none to score, or the corpus is
            shorter than one window.
    """

    corpus: Corpus
    length: int = 16
    share: float = 0.5

    outcome: ClassVar[Outcome] = "probabilities"

    def __post_init__(self) -> None:
        TextTask(self.corpus, self.length)
        if not 0 < self.trained < self.length:
            raise ValueError(
                f"share is {self.share}, must leave some of {self.length} positions to train on "
                "and some to score"
            )

    @property
    def trained(self) -> int:
        """How many positions are trained on."""
        return round(self.share * self.length)

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw windows.

        Returns:
            `inputs`: tokens `[batch, length]` int32, and whether each position is trained on,
            `[batch, length]` bool; `target`: the next tokens, the same shape.
        """
        text = TextTask(self.corpus, self.length).sample(key, batch)
        train = jnp.broadcast_to(jnp.arange(self.length) < self.trained, text.target.shape)
        return Batch((*text.inputs, train), text.target)

    def loss(self, prediction: Float[Array, "batch time word"], batch: Batch) -> Array:
        """Mean cross-entropy of a sequence at positions that are not trained on, in nats."""
        nats = cross_entropy(prediction, batch.target)
        scored = ~batch.inputs[1]
        return jnp.where(scored, nats, 0).sum(1) / jnp.maximum(scored.sum(1), 1)


def exchanged(corpus: Corpus, key: Array) -> Corpus:
    """The same text with its words exchanged for one another, all but the last, a separator.

    What is known of the words is then wrong, and what is known of their order is not.
    """
    words = len(corpus.vocabulary) - 1
    order = np.append(np.asarray(jax.random.permutation(key, words)), words)
    return Corpus(order[corpus.tokens].astype(corpus.tokens.dtype), corpus.vocabulary)
