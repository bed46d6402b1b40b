"""What a language model has of syntax and of its task in the course of a fit: numbers for `fit`.

Three questions at every record: do heads look along arcs (`probes.arcs`), can constituents be read
off the stream, and how far are the predictions from the exact posterior? Which of them rises first
says in which order things appear, not that one brings the other about.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from constructions.core.transformer import Transformer
from constructions.inside_outside.construction import InsideOutside
from probes.arcs import arc_scores
from synthetic.compilation import compile_once
from synthetic.grammar.dependencies import Headed, dependencies
from synthetic.grammar.sentences import Sentences, ends, sample


def emergence(
    construction: InsideOutside, headed: Headed, key: Array, sentences: int = 256
) -> Callable[[Transformer], dict[str, Array]]:
    """`metrics(model)` for `synthetic.fitting.train.fit`, pure.

    Args:
        construction: whose counterpart is fitted.
        headed: its grammar, with heads.
        key: of the sentences; half of them choose heads and fit the probe, the others score.
        sentences: how many.

    Returns:
        a function to these numbers. `head_uas`, `relation_uas`: of the best head of attention, and
        of the best for each relation. `arc_weight`: the largest mean attention at arcs, over heads
        and directions. `span_f1`: of `span_f1` at the best layer behind the embedding.
        `divergence`: the counterpart's, of the exact posterior from the model at hidden words, in
        nats. No word is hidden for the others.

    Raises:
        ValueError: heads of another grammar.
    """
    if headed.grammar != construction.grammar:
        raise ValueError("headed is of another grammar, must be of the construction's")
    drawn = sample(construction.grammar, key, sentences, construction.max_length)
    gold = compile_once(dependencies, static_argnums=0)(headed, drawn)
    told = construction.counterpart().metrics
    assert told is not None
    visible = jnp.zeros(drawn.tokens.shape, bool)

    def measure(model: Transformer) -> dict[str, Array]:
        stream, groups, read = construction.stream(model, drawn.tokens, drawn.lengths, visible)
        _, sites = model.run(stream, groups, sites=("attention", "residual"))
        attention = sites["attention"][..., read, read]
        scores = arc_scores(attention, gold, drawn.lengths, len(headed.relations))
        spans = span_f1(sites["residual"][1:, :, read], drawn)
        return {
            "head_uas": scores.heads.uas,
            "relation_uas": scores.heads.labelled,
            "arc_weight": scores.weight.max(),
            "span_f1": spans.max(),
            **told(model),
        }

    return measure


def span_f1(
    stream: Float[Array, "layer batch word width"], drawn: Sentences
) -> Float[Array, " layer"]:
    """F1 of the constituents that a ridge probe reads off the two ends of spans, by layer.

    The probe maps [h_i, h_j] to 1 where words i..j are a node of the derivation, else 0, and is
    fitted on the first half of the sentences. On the second half it names as many spans of each
    sentence as there are, n - 2 of n words, those with the highest scores, so that F1 is the share
    of them that is right. The whole sentence is left out. May be called inside `jit`.
    """
    gold, there = _spans(drawn, stream.shape[2])
    half = len(gold) // 2
    first, last = (jnp.arange(stream.shape[2])[:, None], jnp.arange(stream.shape[2]))
    i, j = jnp.nonzero(first < last, size=stream.shape[2] * (stream.shape[2] - 1) // 2)
    wanted, there = gold[:, i, j], there[:, i, j]

    def of(h: Float[Array, "batch word width"]) -> Float[Array, ""]:
        ones = jnp.ones((*there.shape, 1), h.dtype)
        x = jnp.concatenate([h[:, i], h[:, j], ones], -1) * there[..., None]
        fit, target = x[:half].reshape(-1, x.shape[-1]), (wanted * there)[:half].reshape(-1)
        gram = jnp.matmul(fit.T, fit, precision="highest")
        ridge = 1e-4 * jnp.trace(gram) / len(gram) * jnp.eye(len(gram), dtype=gram.dtype)
        right = jnp.matmul(fit.T, target.astype(h.dtype), precision="highest")
        weights = jnp.linalg.solve(gram + ridge, right)
        score = jnp.where(there, jnp.matmul(x, weights, precision="highest"), -jnp.inf)[half:]
        count = jnp.maximum(drawn.lengths[half:] - 2, 0)
        ranked = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
        named = (ranked < count[:, None]) & there[half:]
        return (named & wanted[half:]).sum() / jnp.maximum(count.sum(), 1)

    return jax.lax.map(of, stream)


def _spans(
    drawn: Sentences, time: int
) -> tuple[Bool[Array, "batch word word"], Bool[Array, "batch word word"]]:
    """Which spans are nodes, and which there are: two words or more, not the whole sentence."""
    last: Int[Array, "batch nodes"] = ends(drawn.starts)
    row = jnp.arange(len(last))[:, None]
    place = jnp.where(last >= 0, drawn.starts, time)
    nodes = jnp.zeros((len(last), time, time), bool).at[row, place, last].set(True, mode="drop")
    first, end = jnp.arange(time)[:, None], jnp.arange(time)
    n = drawn.lengths[:, None, None]
    there = (first < end) & (end < n) & (end - first < n - 1)
    return nodes & there, there
