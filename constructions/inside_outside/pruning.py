r"""Pruning text by the perplexity that a small model has of it, where every step is exact.

Documents are strings of `LENGTH` words, from a mixture p of grammars and of noise, so that p is a
table of all strings. A small model, a grammar of two symbols re-estimated on a sample of them
(`chart.em`), gives each string its perplexity, and the strings of low, middle or high perplexity
are kept (Ankner et al. 2024, arXiv 2405.20541). What is kept has the distribution

    p(x | kept) = p(x) / p(kept)  on the strings kept,    KL(p(. | kept) || p) = -log p(kept),

whatever the model and whichever end is kept: how far pruning moves the text depends on the share
alone, and only where it moves it to on the model.

What is learnt from it is asked of a larger grammar, re-estimated on as many documents of each kind:
its cross-entropy on the text without noise, exact by the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import jax
import numpy as np
from scipy import stats

from constructions.claims import Measurement, Remark
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar, Weights

_PAPER = "Ankner et al. 2024, arXiv 2405.20541"
KEPT = ("low", "middle", "high", "random")
LENGTH = 6
#: Three pairs of a noun and a verb one after the other; and pairs of brackets, one in another.
_CLAUSES = Grammar.from_text(
    "S -> C CC [1.0]\nCC -> C C [1.0]\nC -> N V [1.0]\nN -> 'a' [0.7] | 'b' [0.3]\n"
    "V -> 'c' [0.6] | 'd' [0.4]"
)
_NESTED = Grammar.from_text(
    "S -> 'a' S 'c' [0.25] | 'b' S 'd' [0.25] | 'a' 'c' [0.25] | 'b' 'd' [0.25]"
)


@dataclass(frozen=True)
class Text:
    """Every string of `LENGTH` words, and how probable each is in a mixture.

    Attributes:
        clauses, nested, noise: shares of the two grammars and of random words; they sum to 1.
        asked: share of the nested domain in what models are asked about; None for its own.
    """

    clauses: float = 1.0
    nested: float = 0.0
    noise: float = 0.0
    asked: float | None = None

    def __post_init__(self) -> None:
        shares = self.clauses, self.nested, self.noise
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9 or self.noise >= 1:
            raise ValueError(f"shares are {shares}, must be at least 0 and sum to 1, not all noise")

    @property
    def probability(self) -> np.ndarray:
        """p, `[string]`."""
        return np.array([self.clauses, self.nested, self.noise]) @ parts()

    @property
    def wanted(self) -> np.ndarray:
        """The text without noise that models are asked about, `[string]`."""
        nested = self.nested / (1 - self.noise) if self.asked is None else self.asked
        return np.array([1 - nested, nested]) @ parts()[:2]


@lru_cache
def strings() -> np.ndarray:
    """All of them, `[string, LENGTH]` int32."""
    return np.array(list(product(range(len(_CLAUSES.vocabulary)), repeat=LENGTH)), np.int32)


def table(grammar: Grammar | Weights) -> np.ndarray:
    """P(string | its length) by a grammar, `[string]`, exact by the chart."""
    tokens = strings()
    log_z = chart.log_z(grammar, tokens, np.full(len(tokens), LENGTH, np.int32))
    found = np.exp(np.asarray(log_z, float))
    return found / found.sum()


@lru_cache
def parts() -> np.ndarray:
    """The grammars' and the noise's distributions, `[3, string]`."""
    with jax.enable_x64(True):
        return np.stack([table(_CLAUSES), table(_NESTED), np.full(n := len(strings()), 1 / n)])


def fitted(tokens: np.ndarray, symbols: int, seed: int, trust: float = 0.99) -> np.ndarray:
    """log q of every string, `[string]`, by a grammar re-estimated on documents.

    It has so many nonterminals and as many pre-terminals, starts from random rules, and is mixed
    with 1 - trust of random words.
    """
    start = Grammar.random(seed, symbols, symbols, len(_CLAUSES.vocabulary))
    found = chart.em(start, tokens, np.full(len(tokens), LENGTH, np.int32), steps=20).weights
    return np.log(trust * table(found) + (1 - trust) * parts()[2])


def keep(probability: np.ndarray, perplexity: np.ndarray, which: str, share: float) -> np.ndarray:
    """How much of each string is kept, `[string]`: all or nothing, but for random pruning.

    Strings of a share of the probability, as nearly as whole ones allow, from one end of `KEPT`.
    """
    if which not in KEPT:
        raise ValueError(f"which is {which!r}, must be one of {KEPT}")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, must be above 0 and at most 1")
    if which == "random":
        return np.full(len(probability), share)
    order = np.argsort(perplexity, kind="stable")
    middle = np.cumsum(probability[order]) - probability[order] / 2
    start = {"low": 0.0, "middle": (1 - share) / 2, "high": 1 - share}[which]
    found = np.zeros(len(probability))
    found[order] = (start <= middle) & (middle <= start + share)
    return found


@dataclass(frozen=True)
class Pruned:
    """What a way to prune keeps, exactly, and what is learnt from it; `[seed]` each.

    Attributes:
        share: p(kept).
        divergence: KL(p(. | kept) || p).
        noise: share of random words among what is kept.
        loss: cross-entropy of fitted grammars on what is asked, in nats a string.
    """

    share: np.ndarray
    divergence: np.ndarray
    noise: np.ndarray
    loss: np.ndarray


def experiment(
    text: Text, seeds: int, seed: int = 0, share: float = 0.6, documents: int = 128
) -> dict[str, Pruned]:
    """Every way to prune, and none ("all"), with grammars fitted to as many documents each."""
    p, tokens = text.probability, strings()
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("all", *KEPT)}
    for number in range(seeds):
        rng = np.random.default_rng([seed, number])
        sample = rng.choice(len(p), documents, p=p)
        perplexity = -fitted(tokens[sample], 2, seed + number)
        for name, found in results.items():
            kept = p * (1.0 if name == "all" else keep(p, perplexity, name, share))
            after, inside = kept / kept.sum(), kept > 0
            moved = (after[inside] * np.log(after[inside] / p[inside])).sum()
            noise = (after[inside] * text.noise * parts()[2][inside] / p[inside]).sum()
            sample = rng.choice(len(p), documents, p=after)
            loss = -(text.wanted * fitted(tokens[sample], 5, seed + number)).sum()
            found.append((kept.sum(), moved, noise, loss))
    return {name: Pruned(*np.array(found).T) for name, found in results.items()}


#: Texts, by what they are made of, and what is asked of models of them.
TEXTS = {
    "noisy": Text(0.6, 0.0, 0.4),
    "clean": Text(),
    "a rare domain": Text(0.8, 0.2, 0.0, asked=0.5),
}


#: What the paper's statement comes to here: noise is improbable, and so is a rare domain.
EXPECTED = {
    ("low", "noisy"): "at_most",
    ("high", "noisy"): "at_least",
    ("low", "a rare domain"): "at_least",
    ("high", "a rare domain"): "at_most",
}


def rows(quick: bool, seed: int, seeds: int = 5) -> Iterator[Measurement | Remark]:
    """What is kept of each text, and what each way to prune adds to the loss; not if `quick`."""
    for name, text in () if quick else TEXTS.items():
        found = experiment(text, seeds, seed)
        low = found["low"]
        yield Measurement(
            f"divergence of what is kept, {name}",
            "Pruning moves the text by minus the logarithm of the share that it keeps.",
            f"the identity is ours; setting of {_PAPER}",
            float(-np.log(low.share).mean()),
            float(low.divergence.mean()),
            tolerance=1e-9,
            note=f"Noise {text.noise:g}; "
            + ", ".join(f"{which} {found[which].noise.mean():.3f}" for which in KEPT),
        )
        for which in KEPT:
            gain = found[which].loss - found["all"].loss
            half = stats.sem(gain) * stats.t.ppf(0.975, len(gain) - 1)
            said: dict[str, Any] = {
                "name": f"{which} kept, {name}",
                "source": f"{_PAPER} (which perplexities to keep depends on what the text is made "
                "of)",
                "measured": float(gain.mean()),
                "error": float(stats.sem(gain)),
                "note": f"In nats a string; 95 % interval {gain.mean() - half:.3f} to "
                f"{gain.mean() + half:.3f} over {len(gain)} seeds.",
            }
            what = (
                "What pruning adds to the loss on the text without noise, at equally many documents"
            )
            if which == "random":
                yield Measurement(statement=f"{what}: nothing.", published=0.0, **said)
            elif side := EXPECTED.get((which, name)):
                end = "less than nothing" if side == "at_most" else "something"
                yield Measurement(
                    statement=f"{what}: {end}.", published=None, **{side: 0.0}, **said
                )
            else:
                yield Remark(statement=f"{what}.", **said)
