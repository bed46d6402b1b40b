"""Classification as text: words and their labels by turns, and what the labels mean is to be found.

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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from synthetic.task import Batch
from synthetic.text import NextToken


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
        if not 2 <= self.classes <= 6:
            raise ValueError(f"classes is {self.classes}, must be 2 to 6")
        for name in ("words", "demonstrations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not 0 <= self.usual <= 1:
            raise ValueError(f"usual is {self.usual}, must be 0 to 1")

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
        """What is best for the word that is asked for: the module's equation.

        Where no assignment agrees, which samples never have, entries are nan.
        """
        orders = np.array(list(permutations(range(self.classes))))
        prior = (1 - self.usual) / len(orders) + self.usual * (
            orders == np.arange(self.classes)
        ).all(1)
        kinds = tokens[:, ::2] // self.words
        label = tokens[:, 1::2] - self.labels.start
        says = jnp.asarray(orders)[:, kinds]  # [assignment, batch, word]
        weight = jnp.asarray(prior)[:, None] * (says[..., :-1] == label).all(-1)
        chosen = jax.nn.one_hot(says[..., -1], self.classes)
        mass = jnp.einsum("sb,sbl->bl", weight, chosen, precision="highest")
        return mass / mass.sum(1, keepdims=True)
