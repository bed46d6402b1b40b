"""Text of which the front part is learnt from and the rest is to be predicted.

`WordLabels` is classification as text: words and their labels by turns, where the meaning of the
labels has to be found.

    w_1 l_1 w_2 l_2 .. w_n l_n w        and the label of w is asked for

Words fall into classes, which weights can know; labels are assigned to classes, one to each. The
assignment is the usual one, class c has label c, in a share u of the sequences, and drawn anew,
uniformly, in the others. Best is the mean over assignments s that agree with all that was seen,

    P(w has l | demonstrations)  ~  sum_s P(s) [s agrees] [s(class of w) = l],
    P(s)  =  (1 - u) / C! + u [s is usual].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from synthetic.guards import number
from synthetic.tasks.task import Batch, Outcome
from synthetic.tasks.text import Corpus, NextToken, TextTask, cross_entropy


@dataclass(frozen=True)
class AdaptationTask:
    """Windows of text; a model may be trained on its predictions at the first positions. A `Task`.

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


@dataclass(frozen=True)
class WordLabels(NextToken):
    """Labelled words, a `Task` of the next token. Hashable.

    Tokens are the words, class by class, then the labels.

    Attributes:
        classes: as many as labels, 2 to 6.
        words: of each class.
        demonstrations: words with their labels, before the one that is asked for.
        usual: u, the share of sequences whose assignment is the usual one whatever is drawn.

    Raises:
        ValueError: a number out of range.
    """

    classes: int = 4
    words: int = 6
    demonstrations: int = 8
    usual: float = 0.5

    def __post_init__(self) -> None:
        number("classes", self.classes, whole=True, least=2, most=6)
        for name in ("words", "demonstrations"):
            number(name, getattr(self, name), whole=True, least=1)
        number("usual", self.usual, least=0, most=1)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, words and labels."""
        return self.classes * self.words + self.classes

    @property
    def labels(self) -> slice:
        """Which of the tokens are labels."""
        return slice(self.classes * self.words, self.vocabulary)

    @property
    def length(self) -> int:
        """Tokens of a sequence, the last of them the word that is asked for."""
        return 2 * self.demonstrations + 1

    def sample(self, key: Array, batch: int) -> Batch:
        """Draw sequences; words are uniform.

        Returns:
            `inputs`: tokens `[batch, length]` int32; `target`: the next ones, the last of them the
            label that is asked for.
        """
        word, order, kind = jax.random.split(key, 3)
        words = jax.random.randint(
            word, (batch, self.demonstrations + 1), 0, self.classes * self.words
        )
        drawn = jnp.argsort(jax.random.uniform(order, (batch, self.classes)))
        usual = jax.random.uniform(kind, (batch, 1)) < self.usual
        assigned = jnp.where(usual, jnp.arange(self.classes), drawn)
        label = jnp.take_along_axis(assigned, words // self.words, 1) + self.labels.start
        tokens = jnp.stack([words, label], 2).reshape(batch, -1).astype(jnp.int32)
        return Batch((tokens[:, :-1],), tokens[:, 1:])

    def before_labels(self, tokens: Int[Array, "batch time"]) -> Array:
        """Whether a label of a demonstration follows, `[batch, time]` bool; not the one asked."""
        place = jnp.arange(tokens.shape[1])
        return jnp.broadcast_to((place % 2 == 0) & (place < self.length - 1), tokens.shape)

    def posterior(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch label"]:
        """The posterior of the last word's label: the module's equation.

        Where no assignment agrees, which samples never have, entries are nan.
        """
        orders = np.array(list(permutations(range(self.classes))))
        prior = (1 - self.usual) / len(orders) + self.usual * (
            orders == np.arange(self.classes)
        ).all(1)
        kinds = tokens[:, ::2] // self.words
        label = tokens[:, 1::2] - self.labels.start
        meant = jnp.asarray(orders)[:, kinds]  # [assignment, batch, word]
        weight = jnp.asarray(prior)[:, None] * (meant[..., :-1] == label).all(-1)
        chosen = jax.nn.one_hot(meant[..., -1], self.classes)
        mass = jnp.einsum("sb,sbl->bl", weight, chosen, precision="highest")
        return mass / mass.sum(1, keepdims=True)
