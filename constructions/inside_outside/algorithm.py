"""Inside and outside probabilities of all spans, as plain array code: what the program runs.

Unlike `synthetic.chart`, which is fast and safe from underflow, this follows the two recursions
word for word and holds every value in the same units as the construction does.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: number of words -> values of the spans of so many words, by first word `[batch, token, symbol]`.
Spans = dict[int, Array]


def inside_outside(
    root: Float[Array, " symbols"],
    rules: Float[Array, "nonterminals symbols symbols"],
    leaves: Float[Array, "batch token preterminals"],
    lengths: Int[Array, " batch"],
    longest: int,
) -> tuple[Spans, Spans]:
    """beta and alpha of the spans of 1 to `longest` words; 0 where no such span is.

    Args:
        root, rules: the grammar; symbols are nonterminals, then pre-terminals.
        leaves: beta(i, i), 0 behind the end of a sentence.
        lengths: of the sentences.
        longest: spans of more words are left out.
    """
    inner, tokens = len(rules), leaves.shape[1]
    part = {n: slice(inner, None) if n == 1 else slice(inner) for n in range(1, longest + 1)}
    beta: Spans = {1: leaves}
    for n in range(2, longest + 1):
        beta[n] = jnp.zeros((*leaves.shape[:2], inner), leaves.dtype)
        for m in range(1, n):
            rule = rules[:, part[m], part[n - m]]
            beta[n] += _apply("abc,bc->a", rule, beta[m], _from(m, beta[n - m]))
    alpha: Spans = {}
    for n in range(longest, 0, -1):
        whole = (jnp.arange(tokens) == 0) & (lengths == n)[:, None]
        alpha[n] = jnp.where(whole[..., None], root[part[n]], 0)
        for m in range(1, longest - n + 1):
            rule = rules[:, part[n], part[m]]
            alpha[n] += _apply("axc,ac->x", rule, alpha[n + m], _from(n, beta[m]))
            rule = rules[:, part[m], part[n]]
            alpha[n] += _apply("abx,ab->x", rule, _from(-m, alpha[n + m]), _from(-m, beta[m]))
        # no such span: it would reach behind the sentence
        inside = jnp.arange(tokens) + n <= lengths[:, None]
        alpha[n] = jnp.where(inside[..., None], alpha[n], 0)
    return beta, alpha


def _from(offset: int, values: Array) -> Array:
    """The values of the spans that begin `offset` tokens later; 0 where there is no such token."""
    tokens = values.shape[1]
    offset = max(-tokens, min(tokens, offset))
    pad = [(0, 0), (max(-offset, 0), max(offset, 0)), (0, 0)]
    return jnp.pad(values, pad)[:, max(offset, 0) :][:, :tokens]


def _apply(equation: str, rule: Array, left: Array, right: Array) -> Array:
    """A bilinear form of two values of every token: "abc,bc->a" for beta, say."""
    tensor, pair, result = equation.replace("->", ",").split(",")
    return jnp.einsum(
        f"{tensor},...{pair[0]},...{pair[1]}->...{result}", rule, left, right, precision="highest"
    )
