"""What is said of sentences without a parse, or beyond the range of a floating point type.

A wrong number is worse than none: NaN under `jit` or on demand, and else one line that names the
sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from constructions.inside_outside.exactness import Exactness, exactness
from constructions.inside_outside.units import surely_held
from constructions.transformer import Transformer
from synthetic import chart

if TYPE_CHECKING:
    from constructions.inside_outside.construction import InsideOutside

POSTERIOR, MARGINALS = ("prediction",), ("span_marginals", "tag_marginals")


def is_parser(model: Transformer) -> bool:
    """Whether a model is a compiled one, or has its shape: it ends in shares of products."""
    tokens = model.config.tokens
    return tokens is not None and tokens.probabilities == "shares"


def dtype_of(model: Transformer) -> Any:
    """In which a model with an embedding computes."""
    return model.arrays()["tokens"]["embedding"].dtype


def settled(
    c: InsideOutside,
    found: Mapping[str, Array],
    given: tuple[Array, ...],
    dtype: Any,
    strict: bool,
) -> dict[str, Array]:
    """Values of sentences, with NaN for what a type does not hold; an error where `strict`.

    Args:
        c: the construction.
        found: some of its named values, NaN where they are undefined.
        given: tokens, lengths and mask.
        dtype: in which they were computed.
        strict: raise, for concrete arrays.

    Raises:
        ValueError: a sentence of which nothing is defined, or that the type does not hold.
    """
    kept = dict(found)
    if not len(given[0]):
        return kept
    held = known(c, given, dtype)
    for names, rows in ((POSTERIOR, held.posterior), (MARGINALS, held.marginals)):
        for name in kept.keys() & {*names}:
            own = rows.reshape(-1, *(1,) * (kept[name].ndim - 1))
            kept[name] = jnp.where(own, kept[name], jnp.nan)
    if strict and not any(isinstance(a, Tracer) for a in (*kept.values(), *given)):
        _refuse(c, kept, given, held, dtype)
    return kept


def known(c: InsideOutside, given: tuple[Array, ...], dtype: Any) -> Exactness:
    """Of which sentences a floating point type holds what the construction computes."""
    (tokens, lengths, mask), dtype = given, np.dtype(dtype)
    emission = c.grammar.emission
    longest = min(c.max_length, tokens.shape[1])
    if not isinstance(lengths, Tracer):
        longest = int(np.asarray(lengths).max())
    if c.reduction is None and surely_held(*c.passed, c.leaves, emission, longest, dtype):
        return Exactness(*jnp.ones((2, len(tokens)), bool))
    numbers = c.numbers(tokens, lengths, mask)[:, 1:-1]
    root, rules, leaves, words = (jnp.asarray(a, dtype) for a in (*c.passed, c.leaves, emission))
    return exactness(root, rules, leaves[numbers], words, lengths)


def _refuse(
    c: InsideOutside,
    kept: Mapping[str, Array],
    given: tuple[Array, ...],
    held: Exactness,
    dtype: Any,
) -> None:
    """Raise the error of `settled` for the first sentence that has one."""
    fine = np.ones(len(given[0]), bool)
    for names, rows in ((POSTERIOR, held.posterior), (MARGINALS, held.marginals)):
        if kept.keys() & {*names}:
            fine &= np.asarray(rows)
    refuse_lost(c, fine, given, dtype)
    there = np.arange(given[0].shape[1]) < np.asarray(given[1])[:, None]
    name = min(kept.keys() & {*POSTERIOR, *MARGINALS})  # the posterior, where there is one
    lost = np.isnan(np.asarray(kept[name])).reshape((*there.shape, -1))
    lost = np.asarray(lost.any(-1))
    if name in POSTERIOR:
        nothing, what = ~(there & ~lost).any(1), "even if one of its words were another"
    else:
        nothing, what = lost.any(1), ""
    if c.reduction is not None:
        what = "under the reduction (its Z is not positive)"
    chart.refuse_unparsed(c.grammar, np.asarray(nothing), given[0], given[1], given[2], what)


def refuse_lost(c: InsideOutside, held: np.ndarray, given: tuple[Array, ...], dtype: Any) -> None:
    """Raise ValueError that names the first sentence that a type does not hold."""
    if held.all():
        return
    row, info = int(held.argmin()), np.finfo(dtype)
    one = tuple(a[row : row + 1] for a in given)
    log_z = float(chart.log_z(c.grammar, *one)[0])
    own = np.asarray(c.numbers(*one))[0, 1 : 1 + int(one[1][0])]
    raise ValueError(
        f"{chart.name_sentence(c.grammar, row, *given)} has log Z {log_z:.6g}, in units of the "
        f"construction {log_z + np.log(c.factors[own]).sum():.6g}: {np.dtype(dtype).name} "
        f"({float(info.tiny):.2g} to {float(info.max):.2g}) does not hold its probabilities; "
        "take another scale, or float64"
    )
