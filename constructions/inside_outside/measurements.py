"""What Zhao et al. 2023 state of the construction's size, beside what ours takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np

from constructions.core.inventory import counts
from constructions.inside_outside import training_data
from constructions.inside_outside.construction import InsideOutside
from constructions.inside_outside.paper import (
    NEAR,
    RIGHT,
    bag_posterior,
    divergence,
    given_up,
    tags_posterior,
    window_posterior,
)
from constructions.measurement import Measurement, Remark
from synthetic.grammar import chart
from synthetic.grammar.grammar import Grammar

_PAPER = "Zhao et al. 2023, arXiv 2303.08117, introduction"
# The symbols that the paper keeps, and the length of a sentence of the Penn Treebank.
_SYMBOLS, _PRETERMINALS, _WORDS = 20, 70, 25

#: Statistic, name of a row, claim and threshold, unit.
_DECIDED = (
    (divergence, "divergence of the best guess from", "the posterior", NEAR, "Nats a hidden word"),
    (given_up, "accuracy given up by", "the likeliest word", RIGHT, "Share of the hidden words"),
)


def measure(quick: bool = False, seed: int = 0) -> Iterator[Measurement | Remark]:
    """Measures layers, heads and width at the paper's sizes, and the least loss of the example.

    Then pruned text and corrupted spans.

    Args:
        quick: of these only the rows that take no fit.
        seed: of the sentences, and of what is fitted.
    """
    program = InsideOutside(_of_size(_SYMBOLS, _PRETERMINALS), _WORDS).program
    found = counts(program)
    yield Measurement(
        f"layers for {_WORDS} words",
        "Inside-outside takes 2 L layers for sentences of L words.",
        _PAPER,
        float(2 * _WORDS),
        float(found.layers),
        tolerance=0.0,
        note="One a length for inside, one a length for outside; ours ends with one of products "
        "and needs none for the inside of single words.",
    )
    yield Measurement(
        f"heads a layer, {_SYMBOLS} nonterminals",
        "A layer has a head for each of the nonterminals.",
        _PAPER,
        float(_SYMBOLS),
        float(counts(replace(program, layers=program.layers[:-2])).max_heads),
        note="Ours has one at either end of a span, so that every score is between the two ends; "
        "inside layers have two more that copy, and the first another two that mark the ends of "
        f"the sentence. The last but one has a head for each of {_PRETERMINALS} pre-terminals. The "
        f"last has one for every symbol and length, {found.max_heads} in all, for probes alone.",
    )
    yield Measurement(
        f"numbers a word, {_SYMBOLS} nonterminals, {_WORDS} words",
        "A word holds 2 N L numbers.",
        _PAPER,
        float(2 * _SYMBOLS * _WORDS),
        float(found.width),
        note="Ours holds the spans from and to a word, copies for its neighbours and products: "
        f"7 N (L - 1) - 2 N + 5 P + 2, here with P = {_PRETERMINALS} pre-terminals.",
    )
    c = InsideOutside("english", 8)
    batch = c.task.sample(jax.random.key(seed), 256)
    exact = chart.inside_outside(c.grammar, *batch.inputs).word_posterior
    ours = c.evaluate(*batch.inputs)["prediction"]
    yield Measurement(
        "loss above the least",
        "Inside-outside attains the least loss that a masked language model can have.",
        f"{_PAPER.removesuffix(', introduction')}, section 3",
        0.0,
        float(c.task.loss(ours, batch).mean() - c.task.loss(exact, batch).mean()),
        error=1e-6,
        note="In nats, against the posterior of the chart on the same sentences, in float32.",
    )
    yield from rival_rows(quick, seed)
    yield from training_data.rows(quick, seed)


def rival_rows(
    quick: bool, seed: int, grammar: str = "brackets", masking: float = 0.3
) -> Iterator[Measurement]:
    """How far the best guess from less than the sentence is from the posterior, on the example.

    Of five seeds, fewer sentences each if `quick`.
    """
    c = InsideOutside(grammar, 8, masking=masking)
    windows = {k: window_posterior(c.grammar, k) for k in range(5)}
    named = {f"a window of {k} words": f for k, f in windows.items()}
    bag = bag_posterior(c.grammar, c.max_length)
    named |= {} if bag is None else {"the bag of words": bag}
    named |= {"the neighbours' tags": tags_posterior(c.grammar)}
    batches = [
        c.task.sample(k, 128 if quick else 512) for k in jax.random.split(jax.random.key(seed), 5)
    ]
    exact = [chart.inside_outside(c.grammar, *b.inputs).word_posterior for b in batches]
    paper = f"control of ours to {_PAPER.removesuffix(', introduction')}, section 3"
    setting = f"{grammar}, 8 words, {masking:.0%} hidden, five seeds."
    above = [0.0, 0.0]
    for name, guess in named.items():
        guesses = [guess(*b.inputs) for b in batches]
        for n, (statistic, what, claim, least, unit) in enumerate(_DECIDED):
            found = np.array(
                [
                    float(statistic(p, q, b.inputs[2]))
                    for p, q, b in zip(exact, guesses, batches, strict=True)
                ]
            )
            less = f" {found.mean() - above[n]:+.3f} against the one before." if above[n] else ""
            above[n] = found.mean() if "window" in name else 0.0
            yield Measurement(
                f"{what} {name}",
                "What knows no more of a sentence than this is too far from the posterior to "
                f"satisfy the claim {claim!r}.",
                paper,
                None,
                float(found.mean()),
                float(found.std(ddof=1) / np.sqrt(len(found))),
                note=f"{unit}, {setting}{less}",
                at_least=least,
            )


def _of_size(nonterminals: int, preterminals: int) -> Grammar:
    """Any grammar with so many symbols: they alone decide the sizes."""
    symbols = nonterminals + preterminals
    return Grammar(
        tuple(f"N{n}" for n in range(nonterminals)),
        tuple(f"P{n}" for n in range(preterminals)),
        ("word",),
        root=np.full(symbols, 1 / symbols),
        rules=np.full((nonterminals, symbols, symbols), 1 / symbols**2),
        emission=np.ones((preterminals, 1)),
    )
