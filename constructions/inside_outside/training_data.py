"""What is learnt from which data: trained models of pruned text and of corrupted spans, as rows.

Both kinds are judged by exact optima. Of pruned text: by how much more a model loses on the text
without noise than the least, beside what it would lose if it knew what was kept exactly. Of spans
and of single hidden words: by what they lack of their own objective's posterior.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

from constructions.core.transformer import Transformer
from constructions.inside_outside.construction import InsideOutside
from constructions.inside_outside.pruning import (
    KEPT,
    LENGTH,
    TEXTS,
    Documents,
    Text,
    fitted,
    parts,
    strings,
    ways,
)
from constructions.inside_outside.spans import SpanTask
from constructions.measurement import Measurement, Remark
from synthetic.fitting.recipe import Recipe
from synthetic.fitting.train import fit
from synthetic.grammar.examples import named

_PRUNING, _SPANS = "Ankner et al. 2024, arXiv 2405.20541", "Raffel et al. 2019, arXiv 1910.10683"
_PRUNED_STEPS, _SPAN_STEPS = 400, 1000
#: Key and number of the documents with hidden words that models are asked about.
_ASKED = jax.random.key(2**20), 1024
#: Fields of `Pruned`, and what they are of.
MODELS = {
    "grammar": "grammars, in nats a string",
    "model": "masked language models, in nats a hidden word",
}


def limits(chances: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """What models of every row of `chances` tend to: loss on wanted text over the least, `[row]`.

    In nats a hidden word; of the row mixed with 1 % of random words.
    """
    asked = Documents(chances=wanted[None])
    batch = asked.sample(*_ASKED)
    known = (Documents(chances=q[None]) for q in (wanted, *(0.99 * chances + 0.01 * parts()[2])))
    losses = [float(asked.loss(q.posterior(*batch.inputs), batch).mean()) for q in known]
    return np.array(losses[1:]) - losses[0]


def masked_models(
    chances: np.ndarray, wanted: np.ndarray, seeds: list[int], steps: int
) -> np.ndarray:
    """The same of masked language models after so many steps, one a row, `[row]`."""
    asked = Documents(chances=wanted[None])
    c = InsideOutside(asked.grammar, LENGTH, layers=2, heads=2, width=16)
    recipe = Recipe(steps, 32, "adamw", 4e-3, "cosine", steps // 10, clip=1.0, chunk=steps)
    lanes = {"task.row": [float(n) for n in range(len(chances))]}
    task, init = Documents(chances=chances), c.counterpart().init
    found = fit(init, task, recipe, predict=c.apply, seeds=seeds, lanes=lanes)
    batch, apply = asked.sample(*_ASKED), jax.jit(c.apply)
    exact = asked.posterior(*batch.inputs)
    predictions = [exact, *(apply(model, *batch.inputs) for model in found.models)]
    losses = [float(asked.loss(p, batch).mean()) for p in predictions]
    return np.array(losses[1:]) - losses[0]


@dataclass(frozen=True)
class Pruned:
    """What a way to prune keeps, exactly, and what is learnt from it; `[seed]` each.

    Attributes:
        share: p(kept).
        divergence: KL(p(. | kept) || p).
        noise: share of random words among what is kept.
        grammar: cross-entropy of fitted grammars on what is asked, in nats a string.
        limit, model: of masked language models, in nats a hidden word over the least: what they
            tend to, and after training (NaN without).
    """

    share: np.ndarray
    divergence: np.ndarray
    noise: np.ndarray
    grammar: np.ndarray
    limit: np.ndarray
    model: np.ndarray


def experiment(
    text: Text, seeds: int, seed: int = 0, share: float = 0.6, documents: int = 128, steps: int = 0
) -> dict[str, Pruned]:
    """Every way to prune, and none ("all"), with grammars fitted to as many documents each.

    And with masked language models after so many steps, if there are some.
    """
    p, tokens, names = text.probability, strings(), ("all", *KEPT)
    found, chances = np.full((len(names), seeds, 6), np.nan), np.empty((len(names), seeds, len(p)))
    for number in range(seeds):
        rng = np.random.default_rng([seed, number])
        kept_by = ways(text, seed + number, share, rng, documents)
        for way, name in enumerate(names):
            kept = p * kept_by[name]
            chances[way, number] = after = kept / kept.sum()
            inside = kept > 0
            moved = (after[inside] * np.log(after[inside] / p[inside])).sum()
            noise = (after[inside] * text.noise * parts()[2][inside] / p[inside]).sum()
            sample = rng.choice(len(p), documents, p=after)
            loss = -(text.wanted * fitted(tokens[sample], 5, seed + number)).sum()
            found[way, number, :4] = kept.sum(), moved, noise, loss
    flat = chances.reshape(-1, len(p))
    found[..., 4] = limits(flat, text.wanted).reshape(len(names), seeds)
    if steps:
        # random pruning keeps the distribution: its models are those of other seeds
        each = [seed + n + seeds * (name == "random") for name in names for n in range(seeds)]
        found[..., 5] = masked_models(flat, text.wanted, each, steps).reshape(len(names), seeds)
    return {name: Pruned(*own.T) for name, own in zip(names, found, strict=True)}


def missing(task: SpanTask, seeds: range, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """What masked language models lack along a fit, `[time, seed]`, after so many steps, `[time]`.

    (loss - least) / (loss of the words' frequencies - least), the least being the task's own: of
    what a model can learn there, the share that it has not learnt.
    """
    c, batch = task.reader, task.sample(jax.random.key(2**20), 2048)
    tokens, mask = batch.target
    shares = jax.nn.one_hot(tokens, task.empty + 1)[mask].mean(0)
    constant = jnp.broadcast_to(shares, (*mask.shape, task.empty + 1))
    exact = task.posterior(*batch.inputs)[1]
    most, least = (float(task.loss(p, batch).mean()) for p in (constant, exact))

    def measure(model: Transformer) -> dict[str, Array]:
        loss = task.loss(c.apply(model, *batch.inputs), batch).mean()
        return {"missing": (loss - least) / (most - least)}

    start, recipe = c.counterpart().init, c.counterpart().recipe
    recipe = replace(recipe, steps=steps, schedule="constant", ema=0.98, chunk=steps // 10)
    found = fit(start, task, recipe, predict=c.apply, metrics=measure, seeds=seeds)
    along = [(record["step"], record["missing"]) for record in found.history]
    times, shares = zip(*along, strict=True)
    return np.array(times), np.array(shares)


def rows(quick: bool, seed: int, seeds: int = 5) -> Iterator[Measurement | Remark]:
    """Of pruned text, then of spans; only what takes no fit if `quick`."""
    if not quick:
        yield from pruned_rows(seed, seeds)
    yield from span_rows(quick, seed, seeds)


#: What the paper's statement comes to here: noise is improbable, and so is a rare domain.
EXPECTED = {
    ("low", "noisy"): "at_most",
    ("high", "noisy"): "at_least",
    ("low", "a rare domain"): "at_least",
    ("high", "a rare domain"): "at_most",
}


def pruned_rows(seed: int, seeds: int = 5) -> Iterator[Measurement | Remark]:
    """What is kept of each text, and what each way to prune adds to the loss."""
    for name, text in TEXTS.items():
        found = experiment(text, seeds, seed, steps=_PRUNED_STEPS)
        low = found["low"]
        yield Measurement(
            f"divergence of what is kept, {name}",
            "Pruning moves the text by minus the logarithm of the share that it keeps.",
            f"the identity is ours; setting of {_PRUNING}",
            float(-np.log(low.share).mean()),
            float(low.divergence.mean()),
            tolerance=1e-9,
            note=f"Noise {text.noise:g}; "
            + ", ".join(f"{which} {found[which].noise.mean():.3f}" for which in KEPT),
        )
        for which, (kind, unit) in product(KEPT, MODELS.items()):
            gain = getattr(found[which], kind) - getattr(found["all"], kind)
            half = stats.sem(gain) * stats.t.ppf(0.975, len(gain) - 1)
            what = f"What pruning adds to the loss of {unit} on the text without noise"
            note = f"95 % interval {gain.mean() - half:.3f} to {gain.mean() + half:.3f}"
            if kind == "model":
                limit = (found[which].limit - found["all"].limit).mean()
                note += f"; of models that know what is kept exactly {limit:.3f}"
            said: dict[str, Any] = {
                "name": f"{which} kept, {name}, {kind}",
                "source": f"{_PRUNING} (which perplexities to keep depends on the text)",
                "measured": float(gain.mean()),
                "error": float(stats.sem(gain)),
                "note": f"{note}; {len(gain)} seeds.",
            }
            if which == "random":
                yield Measurement(statement=f"{what}: nothing.", published=0.0, **said)
            elif side := EXPECTED.get((which, name)):
                end = "less than nothing" if side == "at_most" else "something"
                yield Measurement(
                    statement=f"{what}: {end}.", published=None, **{side: 0.0}, **said
                )
            else:
                yield Remark(statement=f"{what}.", **said)


def span_rows(quick: bool, seed: int, seeds: int = 5) -> Iterator[Measurement | Remark]:
    """The least loss of spans, what a wrong width costs, and how near training comes."""
    task = SpanTask(named("brackets"))
    batch = task.sample(jax.random.key(seed), 512 if quick else 4096)
    chance, marginal = task.posterior(*batch.inputs)
    tokens, mask = batch.target
    width = (mask & (tokens != task.empty)).sum(1)
    told = jnp.take_along_axis(chance, width[:, None] - 1, 1)[:, 0]
    yield _row(
        "posterior of the width, less what it expects of itself",
        "The posterior gives the true width of a span the probability that it says it does.",
        f"{_SPANS}, section 3.3; the posterior is ours",
        told - (chance**2).sum(1),
        f"Mean probability of the true width {told.mean():.3f}, by guessing 0.333.",
        published=0.0,
    )
    wrong = width % task.widest + 1
    both = marginal, task.posterior(*batch.inputs, assumed=wrong)[1]
    right, other = (task.loss(0.99 * p + 0.01 / (task.empty + 1), batch) for p in both)
    yield _row(
        "cost of the wrong width",
        "A chart that is given the wrong width of the fill is far from the posterior.",
        f"control of ours to {_SPANS}",
        other - right,
        f"Nats a slot; the least loss is {right.mean():.3f}. Both with 1 % of chance.",
        at_least=0.0,
    )
    if quick:
        return
    names, numbers = {"spans": task.widest, "single words": 1}, range(seed, seed + seeds)
    found = {
        name: missing(replace(task, widest=w), numbers, _SPAN_STEPS) for name, w in names.items()
    }
    for name, (times, shares) in found.items():
        along = [f"{m:.4f} after {t} steps" for t, m in zip(times, shares.mean(1), strict=True)]
        yield Remark(
            f"missing of what can be learnt, {name}",
            "Share of the way from the frequencies of words to its objective's own posterior that "
            "a masked language model has not gone.",
            f"{_SPANS}, section 3.3.4",
            float(shares[-1].mean()),
            float(stats.sem(shares[-1])),
            f"Mean of {seeds} seeds: {', '.join(along[::3])}.",
        )
    gap = found["spans"][1][-1] - found["single words"][1][-1]
    half = stats.sem(gap) * stats.t.ppf(0.975, seeds - 1)
    yield _row(
        "missing with spans less missing with single words",
        f"After {_SPAN_STEPS} steps spans have been learnt at least as far as single words.",
        f"{_SPANS}, section 3.3.4 (spans do slightly better than single words)",
        gap,
        f"95 % interval {gap.mean() - half:.4f} to {gap.mean() + half:.4f}. The paper compares "
        "what models of text do downstream; here each is judged by its own exact optimum.",
        at_most=0.0,
    )


def _row(name: str, statement: str, source: str, values: Any, note: str, **decided: Any) -> Any:
    """The mean of values, with its standard error, and what decides it."""
    values = np.asarray(values, float)
    decided = {"published": None, "error": float(stats.sem(values)), "note": note} | decided
    return Measurement(name, statement, source, measured=float(values.mean()), **decided)
