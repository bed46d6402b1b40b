"""Words per second of sampled sentences with their trees, against a stack in plain Python.

Both draw from the English-like grammar and drop sentences above 20 words; only words of sentences
that are kept count. The peer expands the top of a stack with `bisect` on cumulative probabilities,
and keeps tags and words, but no tree.
"""

import random
import time
from bisect import bisect
from itertools import accumulate

import jax
import numpy as np
from common import paired, ratio, report

from synthetic.grammar.examples import named
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import Sampler, sample

LONGEST, BATCH, PEER = 20, 65536, 2000


class Peer:
    def __init__(self, grammar: Grammar) -> None:
        def table(weights: np.ndarray) -> tuple[list, list]:
            chosen = np.argwhere(weights).tolist()
            return chosen, list(accumulate(weights[tuple(np.transpose(chosen))].tolist()))

        self.nonterminals = len(grammar.nonterminals)
        self.root = table(grammar.root)
        self.rules = [table(own) for own in grammar.rules]
        self.words = [table(own) for own in grammar.emission]

    def draw(self, table: tuple[list, list]) -> list[int]:
        chosen, cumulative = table
        place = bisect(cumulative, random.random() * cumulative[-1])
        return chosen[min(place, len(chosen) - 1)]

    def sentence(self) -> list[tuple[int, int]] | None:
        stack, found = self.draw(self.root), []
        stack = list(stack)
        while stack:
            symbol = stack.pop()
            if symbol < self.nonterminals:
                left, right = self.draw(self.rules[symbol])
                stack += [right, left]
            else:
                tag = symbol - self.nonterminals
                found.append((tag, self.draw(self.words[tag])[0]))
            if len(found) + len(stack) > LONGEST:
                return None
        return found

    def run(self) -> int:
        words, kept = 0, 0
        while kept < PEER:
            if found := self.sentence():
                words += len(found)
                kept += 1
        return words


def main() -> None:
    grammar = named("english")
    random.seed(0)
    peer, sampler = Peer(grammar), Sampler.of(grammar)
    words: dict[str, list[int]] = {"peer": [], "sample": []}
    key = jax.random.key(0)

    def slow() -> None:
        words["peer"].append(peer.run())

    def fast() -> None:
        drawn = sample(sampler, jax.random.fold_in(key, len(words["sample"])), BATCH, LONGEST)
        words["sample"].append(int(drawn.lengths.sum()))

    start = time.perf_counter()
    sample(sampler, key, BATCH, LONGEST).tokens.block_until_ready()
    compiled = time.perf_counter() - start
    seconds = paired({"peer": slow, "sample": fast}, rounds=15)
    per_word = {name: [s / n for s, n in zip(t, words[name][1:], strict=True)]
                for name, t in seconds.items()}  # fmt: skip
    report(
        "sampling",
        {
            "grammar": repr(grammar),
            "longest sentence": LONGEST,
            "batch": BATCH,
            "share of sentences kept": float(grammar.length_probabilities(LONGEST).sum()),
            "seconds to the first batch": compiled,
            "words per second": {n: 1 / float(np.median(t)) for n, t in per_word.items()},
            "sample / peer": ratio(per_word["peer"], per_word["sample"]),
        },
    )


if __name__ == "__main__":
    main()
