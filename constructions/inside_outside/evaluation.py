"""What follows from the values of spans, and the run of the program without dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from constructions.core.evaluate import evaluate
from constructions.core.slots import Slot
from constructions.core.transformer import shares
from constructions.inside_outside.tableau import layout, tableau


def token_numbers(
    words: int, tokens: Int[Array, "batch time"], lengths: Array, mask: Array
) -> Int[Array, "batch time+2"]:
    """Numbers of `words` words, MASK, BOS, EOS and PAD, of sentences between BOS and EOS."""
    visible = jnp.where(mask, words, tokens)
    position, end = jnp.arange(tokens.shape[1] + 2), lengths[:, None] + 1
    inner = jnp.pad(visible, ((0, 0), (1, 1)))
    word = (position >= 1) & (position < end)
    special = words + jnp.where(position == 0, 1, jnp.where(position == end, 2, 3))
    return jnp.where(word, inner, special)


def within(time: int, lengths: Int[Array, " batch"]) -> Bool[Array, "batch time"]:
    """Where there are words."""
    return jnp.arange(time) < lengths[:, None]


def defined(
    posterior: Float[Array, "batch time word"], lengths: Int[Array, " batch"]
) -> Float[Array, "batch time word"]:
    """The posterior, with NaN in the place of shares of nothing (0/0) within a sentence."""
    nothing = within(posterior.shape[1], lengths) & ~(posterior > 0).any(-1)
    return jnp.where(nothing[..., None], jnp.nan, posterior)


def word_posterior(
    around: Float[Array, "batch time preterminal"],
    emission: Float[Array, "preterminal word"],
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch time word"]:
    """P(word at t | the others) from alpha(t, t); NaN where no word has a parse, 0 behind the end.

    What a reduction makes negative counts as 0.
    """
    return defined(shares(jnp.einsum("btx,xw->btw", around, emission)), lengths)


def marginals(
    products: Mapping[int, Array], lengths: Int[Array, " batch"], longest: int
) -> dict[str, Array]:
    """alpha beta of spans over Z, which is their sum over pre-terminals at any word.

    NaN where Z is not positive: where there is no parse, or where a reduction leaves none.
    """
    z = products[1].sum(-1)
    z = jnp.where((z < 0).any(1, keepdims=True), 0, z)  # signs that differ are rounding
    time = z.shape[1]
    there = within(time, lengths)
    start, end = jnp.arange(time)[:, None], jnp.arange(time)
    by_words = [products[n] for n in range(2, longest + 1)]
    longer = jnp.stack(by_words, 2)[:, :, : max(time - 1, 1)]
    # [batch, i, words - 2, A] to [batch, i, j, A], j = i + words - 1
    words = jnp.clip(end - start - 1, 0, longer.shape[2] - 1)
    spans = jnp.take_along_axis(longer, words[None, :, :, None], 2)
    fits = (end > start) & there[:, None]
    spans = jnp.where((fits & (end - start <= longer.shape[2]))[..., None], spans, 0)
    over = jnp.where(z > 0, z, jnp.nan)
    return {
        "span_marginals": jnp.where(fits[..., None], spans / over[:, :, None, None], 0),
        "tag_marginals": jnp.where(there[..., None], products[1] / over[..., None], 0),
    }


@partial(jax.jit, static_argnums=0)
def run_program(
    longest: int,
    root: Array,
    rules: Array,
    leaves: Array,
    emission: Array,
    form: Array | None,
    tokens: Array,
    lengths: Array,
    mask: Array,
) -> dict[str, Any]:
    """The named values of sentences by the program's second back end.

    The grammar is an argument, so that one compilation serves all grammars of a size.

    Args:
        longest: words of the longest sentence of the program.
        root, rules, leaves, emission, form: as `tableau` takes them, the last as `products`.
        tokens, lengths, mask: as `InsideOutside.word_posterior` takes them.
    """
    program = tableau(root, rules, leaves, emission, longest, form)
    at = layout(len(rules), len(emission), longest, None if form is None else len(form))
    words = emission.shape[1]
    numbers = token_numbers(words, tokens, lengths, mask)
    groups = jnp.maximum(numbers - words, 0)
    found = evaluate(program, {at.starts[1].name: leaves[numbers]}, groups)
    own = {n: found[slot.name][:, 1:-1] for n, slot in at.products.items()}
    around = found[at.outside_starts[1].name][:, 1:-1]

    def spans(slots: Mapping[int, Slot]) -> Array:
        return jnp.stack([found[slots[n].name][:, 1:-1] for n in range(2, longest + 1)], 2)

    return {
        "inside": spans(at.starts),
        "outside": spans(at.outside_starts),
        "leaves": found[at.starts[1].name][:, 1:-1],
        "around": around,
        **marginals(own, lengths, longest),
        "prediction": word_posterior(around, emission, lengths),
    }


def values(c: Any, given: tuple[Array, ...]) -> dict[str, Array]:
    """`run_program` of a construction, for any number of sentences, none included."""
    form = None if c.reduction is None else jnp.asarray(c.reduction.products, float)
    arrays = (*c.passed, c.leaves, c.grammar.emission)
    run = partial(run_program, c.max_length, *(jnp.asarray(a, float) for a in arrays), form)
    if len(given[0]):
        return run(*given)
    one = (jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for a in given)
    shapes = jax.eval_shape(run, *one)
    return {name: jnp.zeros((0, *a.shape[1:]), a.dtype) for name, a in shapes.items()}
