"""What do hidden words learn of a constituent? Its values exchanged with another sentence's.

With p the exact posterior of hidden words outside of a span, for the pairs of `span_pairs`,

    effect  =  <q(patched) - q(base), p(chimera) - p(base)> / |p(chimera) - p(base)|^2

where q is the model's and sums run over words and pairs: 1 if the model moves all the way, 0 if it
does not move. Beside it stands KL(p(chimera) || q(patched)) in nats a word. In the construction the
inside values of one span are exchanged and nothing else. Nobody knows what a trained model holds
where; there the whole stream is exchanged at some words, as it is after some layer.

    nothing    at no word
    ends       at the first and the last word of the span
    span       at all its words; after layer 0 this is to read the chimera
    crossing   control: at the ends of another span, one inside and one outside of this one; in
               the construction, the inside values of that span

The construction's effect is not exactly 1: trees without the span keep the words of the base. In
total variation the posterior of every hidden word outside is within 1 - m of exact, m the lesser of
the last two of `SpanPairs.marginals`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from constructions.core.slots import Slot
from constructions.core.transformer import Edit, Transformer
from constructions.family import Construction
from constructions.imported import random_model
from constructions.inside_outside.construction import AT_ONCE, InsideOutside
from constructions.inside_outside.tableau import Layout
from constructions.runs import Run
from probes.patching import patched_prediction, site_values, with_sites
from probes.probe import Probe, Result, seed_names, table
from probes.subject import Readable, no_weights
from probes.syntax.span_pairs import SpanPairs, span_pairs
from synthetic.compilation import compile_once
from synthetic.display import ShowsMarkdown

CONSTRUCTION = "construction"
KINDS = ("nothing", "ends", "span", "crossing")
SLOT_KINDS = ("nothing", "inside", "crossing")

#: column -> kind -> `[layer, pair]`
Sums = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class SpanEffects(ShowsMarkdown):
    """Effects by column (model), kind of exchange and layer; the construction has one "layer".

    Attributes:
        along: numerators of the effect.
        nats: KL(p(chimera) || q(patched)), summed over hidden words outside.
        gap, words: `[pair]`, denominator of the effect, and number of hidden words outside.
    """

    along: Sums
    nats: Sums
    gap: np.ndarray
    words: np.ndarray

    def effect(self, column: str, kind: str, seed: int = 0) -> np.ndarray:
        """Value and 95 % interval by layer, `[layer, 3]`, from 2000 resamples of the pairs.

        Pairs share no sentence. The interval does not cover the training of a model.
        """
        return _interval(self.along[column][kind], self.gap, seed)

    def divergence(self, column: str, kind: str, seed: int = 0) -> np.ndarray:
        """The divergence in nats a word, as `effect`."""
        return _interval(self.nats[column][kind], self.words, seed)

    def markdown(self, what: str = "effect") -> str:
        """A table of "effect" or "divergence": columns and kinds down, layers across."""
        if what not in ("effect", "divergence"):
            raise ValueError(f"what is {what!r}, must be 'effect' or 'divergence'")
        found = self.effect if what == "effect" else self.divergence
        depth = max(len(a) for kinds in self.along.values() for a in kinds.values())
        lines = [[what, "exchanged", *(f"layer {n}" for n in range(depth))], ["---"] * (depth + 2)]
        for column, kinds in self.along.items():
            for kind in kinds:
                cells = [f"{v:.3f} [{a:.3f}, {b:.3f}]" for v, a, b in found(column, kind)]
                lines.append([column, kind, *cells, *[""] * (depth - len(cells))])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def span_interchange(
    construction: Construction,
    models: Mapping[str, Readable],
    pairs: SpanPairs,
    compiled: Transformer | None = None,
) -> SpanEffects:
    """The effect of exchanges in trained models, layer by layer, beside that in the construction.

    It misleads where a model knows the words outside from elsewhere, or too little of them: look
    at the divergence of "span" after layer 0, which is that of the model on chimeras, and at a
    model at random initialisation.

    Args:
        construction: the pairs are its.
        models: column -> a trained model; those of one shape share a compilation.
        pairs: of `span_pairs`.
        compiled: the construction's own model; None: it is compiled.

    Raises:
        ValueError: a column is named "construction", or there are too many pairs.
    """
    if CONSTRUCTION in models:
        raise ValueError(f"models are named {list(models)}, must not be '{CONSTRUCTION}'")
    if len(pairs.first) > AT_ONCE:
        raise ValueError(f"there are {len(pairs.first)} pairs, must be at most {AT_ONCE}")
    parser: Transformer = construction.reference if compiled is None else compiled
    given = jax.tree.map(jnp.asarray, pairs)
    found = {CONSTRUCTION: _in_slots(parser, given, construction=construction)}
    for column, model in models.items():
        found[column] = _by_layer(with_sites(model), given, construction=construction)

    def named(number: int) -> dict[str, dict[str, np.ndarray]]:
        kinds = {column: SLOT_KINDS if column == CONSTRUCTION else KINDS for column in found}
        sums = {column: np.asarray(both[number], float) for column, both in found.items()}
        return {c: {kind: sums[c][n] for n, kind in enumerate(kinds[c])} for c in found}

    return SpanEffects(named(0), named(1), pairs.gap, pairs.hidden.sum(1))


def inside_places(
    at: Layout, words: int, layers: int, width: int, first: Array, last: Array
) -> Array:
    """Where the compiled model holds the inside values of a span, in each of several sentences.

    At its first and last word, from the layer on that computes them, and as the copies that the
    words beside it have.

    Args:
        at: the layout.
        words: of the sentences; the model's tokens are BOS, these, EOS.
        layers: entries of the residual stream.
        width: of the stream.
        first, last: `[sentence]`; no span where `last` is negative.

    Returns:
        `[layer, sentence, token, width]` bool.
    """
    number = jnp.where(last < 0, 0, last - first + 1)
    layer, token, column = (jnp.arange(n) for n in (layers, words + 2, width))
    token, layer = token[:, None] - 1, layer[:, None, None, None]
    first, last = first[:, None, None], last[:, None, None]
    where = jnp.zeros((), bool)
    for slots, word in (
        (at.starts, first),
        (at.ends, last),
        (at.behind, first - 1),
        (at.before, last + 1),
    ):
        born, start, stop = (_table(slots, f)[number][:, None, None] for f in _FACTS)
        there = (token == word) & (column >= start) & (column < stop)
        where |= there & (layer >= born)
    return where


#: of a slot: after how many layers it holds its value, its first column, and the one behind it
_FACTS = (lambda s: s.born, lambda s: s.start, lambda s: s.start + s.size)


def _table(slots: Mapping[int, Slot], fact: Any) -> Array:
    """A fact about each slot, by number of words; 0 where there is no slot."""
    return jnp.asarray([fact(slots[n]) if n in slots else 0 for n in range(max(slots) + 2)])


def _spans(pairs: SpanPairs) -> tuple[Array, Array]:
    """First and last word by kind, as in `SLOT_KINDS`, `[kind, pair]`."""
    none = jnp.full_like(pairs.first, -1)
    start, end = jnp.asarray(pairs.crossing).T
    return jnp.stack([none, pairs.first, start]), jnp.stack([none, pairs.last, end])


def _judge(pairs: SpanPairs, start: Array, patched: Array) -> tuple[Array, Array]:
    """Movement along the way, and divergence, summed over hidden words outside: `[pair]`."""
    hidden = pairs.hidden[..., None]
    before, after = jnp.asarray(pairs.before), jnp.asarray(pairs.after)
    moved = (patched - start) * (after - before)
    tiny = jnp.finfo(patched.dtype).tiny
    logs = jnp.log(jnp.maximum(after, tiny)) - jnp.log(jnp.maximum(patched, tiny))
    along, nats = (jnp.where(hidden, a, 0).sum((1, 2)) for a in (moved, after * logs))
    return along, nats


@compile_once(static_argnames="construction", often=True)
def _in_slots(compiled: Transformer, pairs: SpanPairs, *, construction: Any) -> tuple[Array, Array]:
    """By kind, `[kind, 1, pair]`."""
    values = site_values(construction, compiled, pairs.source, "residual")
    start = construction.apply(compiled, *pairs.base)
    layers, _, tokens, width = values.shape

    def patched(span: tuple[Array, Array]) -> tuple[Array, Array]:
        where = inside_places(construction.layout, tokens - 2, layers, width, *span)
        edit = Edit(where, values)
        found = patched_prediction(construction, compiled, pairs.base, "residual", edit)
        return _judge(pairs, start, found)

    along, nats = jax.lax.map(patched, _spans(pairs))
    return along[:, None], nats[:, None]


@compile_once(static_argnames="construction", often=True)
def _by_layer(model: Transformer, pairs: SpanPairs, *, construction: Any) -> tuple[Array, Array]:
    """By kind and layer, `[kind, layer, pair]`."""
    values = site_values(construction, model, pairs.source, "residual")
    start = construction.apply(model, *pairs.base)
    word = jnp.arange(values.shape[2]) - 1
    (_, first, crossing), (_, last, end) = (a[..., None] for a in _spans(pairs))
    masks = jnp.stack(
        [
            jnp.zeros((len(first), len(word)), bool),
            (word == first) | (word == last),
            (first <= word) & (word <= last),
            (word == crossing) | (word == end),
        ]
    )

    def patched(index: Array) -> tuple[Array, Array]:
        kind, layer = index
        here = jnp.arange(len(values)) == layer
        edit = Edit(here[:, None, None, None] & masks[kind][..., None], values)
        found = patched_prediction(construction, model, pairs.base, "residual", edit)
        return _judge(pairs, start, found)

    sizes = (len(masks), len(values))
    grid = jnp.indices(sizes).reshape(2, -1).T
    return jax.tree.map(lambda a: a.reshape(*sizes, -1), jax.lax.map(patched, grid))


def _interval(sums: np.ndarray, over: np.ndarray, seed: int) -> np.ndarray:
    """Ratio of sums over pairs and its 95 % interval, `[layer, 3]`."""
    size = len(over)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(size, np.full(size, 1 / size), 2000).T
    found = sums.sum(1) / over.sum()
    low, high = np.quantile(sums @ counts / (over @ counts), (0.025, 0.975), axis=1)
    return np.stack([found, low, high], 1)


#: Of the probe: words of the longest sentence (a construction for more is large), sentences among
#: which pairs are looked for, and the most pairs.
LONGEST, SENTENCES, PAIRS = 8, 4000, 64


def measure(run: Run, seed: int) -> Result:
    """Effect of exchanging a constituent, at every layer, beside the construction's."""
    construction: Any = run.construction
    few = replace(construction, max_length=min(construction.max_length, LONGEST))
    sentences, choice = jax.random.split(jax.random.key(seed))
    tokens, lengths, mask = few.task.sample(sentences, SENTENCES).inputs
    pairs = span_pairs(few, tokens, lengths, mask, choice, most=PAIRS)
    models = {f"trained, {n}": m for n, m in zip(seed_names(run), run.models, strict=True)}
    models["random init"] = random_model(run)
    found = span_interchange(few, models, pairs)
    layers = max(len(a) for kinds in found.along.values() for a in kinds.values())
    rows, values = [], []
    for column, kinds in found.along.items():
        for kind in kinds:
            effect = found.effect(column, kind)[:, 0].tolist()
            one = column == CONSTRUCTION  # values of its own slots, at no one layer
            rows.append(f"{column}, {kind}")
            values.append([*effect, *[np.nan] * layers] if one else [np.nan, *effect])
    columns = ("values in slots", *(f"stream, {n} layers applied" for n in range(layers)))
    note = f"{len(pairs.first)} pairs; 1: hidden words get the posterior of the exchanged sentence"
    return table("effect of exchanging a constituent", columns, rows, values, note)


def needs_inside_values(run: Run) -> str:
    """The construction whose slots hold the values of spans, and models with sites."""
    if not isinstance(run.construction, InsideOutside):
        return f"family {run.family!r} keeps no values of spans: 'span-interchange' needs them"
    return next((no_weights(model) for model in run.models if no_weights(model)), "")


SPAN_INTERCHANGE = Probe(
    "span-interchange",
    "is a constituent passed on as one thing, in values at its two ends?",
    "the model knows the words outside from elsewhere, or too little of them: look at the span "
    "exchanged before any layer, and at random init",
    measure,
    needs_inside_values,
)
