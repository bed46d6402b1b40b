"""Re-estimation: the inside-outside algorithm as expectation-maximisation (Baker 1979).

A weight's expected count is its part in the logarithm of the likelihood (Eisner 2016),

    E[count of rule | words] = weight * d log Z / d weight
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from synthetic.grammar import tables
from synthetic.grammar.grammar import Weights
from synthetic.grammar.tables import log_of


class Fit(NamedTuple):
    """A grammar after `steps` of re-estimation; `log_likelihood[k]` is what k steps reached."""

    weights: Weights
    log_likelihood: Array


def log_z(weights: Weights, tokens: Array, lengths: Array, mask: Array) -> Array:
    """log Z of every sentence, `[batch]`."""
    leaf = tables.leaves(weights, tokens, lengths, mask)
    z, exponent = tables.top(weights, leaf, tables.inside(weights, leaf), lengths)
    return log_of(z, exponent)


def expected_counts(
    weights: Weights, tokens: Array, lengths: Array, mask: Array
) -> tuple[Weights, Array]:
    """Counts summed over the sentences that have a tree, and their log-likelihood."""

    def likelihood(weights: Weights) -> Array:
        log = log_z(weights, tokens, lengths, mask)
        return jnp.where(log > -jnp.inf, log, 0).sum()

    value, slope = jax.value_and_grad(likelihood)(weights)
    return jax.tree.map(jnp.multiply, weights, slope), value


def proper(counts: Weights, otherwise: Weights) -> Weights:
    """Counts as relative frequencies; a symbol that was never seen keeps its weights."""

    def frequencies(count: Array, old: Array, axes: tuple[int, ...]) -> Array:
        whole = count.sum(axes, keepdims=True)
        return jnp.where(whole > 0, count / jnp.where(whole > 0, whole, 1), old)

    return Weights(
        frequencies(counts.root, otherwise.root, (0,)),
        frequencies(counts.rules, otherwise.rules, (1, 2)),
        frequencies(counts.emission, otherwise.emission, (1,)),
    )


def em(weights: Weights, tokens: Array, lengths: Array, mask: Array, steps: int) -> Fit:
    """`steps` times: expected counts, then relative frequencies. The likelihood never falls."""

    def step(weights: Weights, _: None) -> tuple[Weights, Array]:
        counts, value = expected_counts(weights, tokens, lengths, mask)
        return proper(counts, weights), value

    weights, values = lax.scan(step, weights, length=steps)
    _, final = expected_counts(weights, tokens, lengths, mask)
    return Fit(weights, jnp.append(values, final))


def entropy(weights: Weights, tokens: Array, lengths: Array, mask: Array) -> Array:
    """log Z - sum of expected counts * log weights: nats left in tree and hidden words.

    NaN where there is no parse.
    """

    def one(tokens: Array, length: Array, mask: Array) -> Array:
        counts, value = expected_counts(weights, tokens[None], length[None], mask[None])
        terms = jax.tree.map(
            lambda c, w: (c * jnp.log(jnp.where(w > 0, w, 1))).sum(), counts, weights
        )
        return value - sum(terms)

    some = log_z(weights, tokens, lengths, mask) > -jnp.inf
    return jnp.where(some, jax.vmap(one)(tokens, lengths, mask), jnp.nan)
