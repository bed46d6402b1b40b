"""A model of next states that is asked for regression: frozen, behind vectors that are tuned.

    prompted = Prompted(construction, model, Prompt.draw(key, dim, count=8))
    prompt = fit(prompted, FewShotRegression(dim, pairs), recipe).model.prompt

`synthetic.few_shot` has the sequence, and what least squares on its tokens comes to.
(von Oswald et al. 2023, arXiv 2309.05858.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike

from constructions.mesa.ridge import ridge_predictions
from constructions.mesa.tokens import NextState, shifted
from constructions.transformer import Transformer
from synthetic.few_shot import Pairs, interleave


class Prompt(nnx.Module):
    """Vectors in the place of states; `None` is left out of the sequence, and of any fit.

    Args:
        prefix: before the sequence, `[count, dim]`.
        eos: after every pair, `[dim]`.
    """

    def __init__(self, prefix: ArrayLike | None = None, eos: ArrayLike | None = None) -> None:
        self.prefix = None if prefix is None else nnx.Param(jnp.asarray(prefix))
        self.eos = None if eos is None else nnx.Param(jnp.asarray(eos))

    @classmethod
    def draw(
        cls, key: Array, dim: int, count: int = 0, eos: bool = True, std: float = 1.0
    ) -> Prompt:
        """Entries from N(0, std^2): `count` vectors before the sequence, and EOS."""
        rows = std * jax.random.normal(key, (count + 1, dim))
        return cls(rows[1:] if count else None, rows[0] if eos else None)


class Frozen(nnx.Variable):
    """An array of a model that no optimiser touches."""


class Prompted(nnx.Module):
    """A frozen model of next states, called with pairs, `[batch, pair, dim]` each.

    Args:
        construction: embeds states and reads predictions.
        model: of the construction's class, trained or compiled.
        prompt: the only parameters.
    """

    def __init__(self, construction: NextState, model: Transformer, prompt: Prompt) -> None:
        self.construction, self.config, self.prompt = construction, model.config, prompt
        # as state of the module they are arguments of a jitted fit, not constants
        self.weights = nnx.List([Frozen(a) for a in jax.tree.leaves(model.arrays())])

    @property
    def model(self) -> Transformer:
        """The frozen model."""
        structure = jax.tree.structure(
            self.config.shapes(), is_leaf=lambda shape: isinstance(shape, tuple)
        )
        return Transformer(self.config, structure.unflatten([w[...] for w in self.weights]))

    def __call__(self, x: Pairs, y: Pairs) -> Pairs:
        """Predictions of y_i from the pairs before and x_i.

        ValueError: more tokens than the construction's length, or pairs of another dimension.
        """
        eos, prefix = (None if p is None else p[...] for p in (self.prompt.eos, self.prompt.prefix))
        states, places = interleave(x, y, eos, prefix)
        self.construction.check(states)
        return self.construction.apply(self.model, states)[:, places]


def least_squares(x: Pairs, y: Pairs, regularization: float) -> Pairs:
    """Predictions of y_i by ridge regression of y on x over the pairs before, and no others."""
    return ridge_predictions(x, shifted(x), shifted(y), regularization)
