"""How well do grammars of the Penn Treebank sample parse, exact, restricted and of low rank?

    python benchmarks/treebank.py --treebank nltk_data/corpora/treebank/combined [--save]

Grammars are read off files 1 to 149 and parse the sentences of files 150 to 169 that have up to
25 words, from their gold tags. Conventions of the scores are those of `synthetic.grammar.brackets`:
brackets as evalb counts them, the root's too, corpus level; a sentence without a parse gets a
flat tree, right branching where labels do not count. Only scores are printed and kept: the
treebank has a licence of its own.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before jax is imported: six programs of 50 layers run a few times each, and compile far longer.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
from common import report
from nltk.tree import Tree

from constructions.core.inventory import counts
from constructions.inside_outside.construction import InsideOutside
from constructions.inside_outside.tableau import layout
from synthetic.grammar import brackets, sparse, treebank
from synthetic.grammar.treebank import Induced

LONGEST, BATCH, TRAINED = 25, 67, 400
KEPT = ((5, None), (10, None), (15, None), (20, None), (30, None), (20, 70))
RANKS = (20, 18, 15, 12, 10)
DECODERS = {"symbols (MBRb)": brackets.symbol_recall, "labels (MBR)": brackets.label_recall}


class Develop:
    """The sentences to parse, and the scores of trees over them."""

    def __init__(self, gold: Sequence[Tree]) -> None:
        self.gold = gold
        self.sentences = [treebank.tagged(tree) for tree in gold]
        self.tags = [[tag for _, tag in sentence] for sentence in self.sentences]

    def score(self, trees: Sequence[Tree], unparsed: int = 0) -> dict[str, Any]:
        found = brackets.score(self.gold, trees)
        return {
            "labelled F1": round(100 * found.labelled.f1, 2),
            "unlabelled F1": round(100 * found.unlabelled.f1, 2),
            "sentence F1": round(100 * found.sentence_f1, 2),
            "unparsed": unparsed,
        }

    def marginals(self, grammar: Any, found: Callable[[int], tuple[Any, Any]]) -> dict[str, Any]:
        """Scores of both decoders of marginals that are given sentence by sentence."""
        trees: dict[str, list[Tree]] = {name: [] for name in DECODERS}
        unparsed = 0
        for n, sentence in enumerate(self.sentences):
            spans, tags = found(n)
            unparsed += not tags[0].sum() > 0
            for name, decode in DECODERS.items():
                trees[name] += decode(grammar, spans[None], tags[None], [sentence])
        return {name: self.score(own, unparsed) for name, own in trees.items()}

    def viterbi(self, induced: Induced) -> dict[str, Any]:
        rules = induced.rule_list
        found = [sparse.viterbi(rules, rules.encode(tags))[1] for tags in self.tags]
        trees = [
            brackets.right_branching(s) if t is None else treebank.expand(treebank.unbinarise(t))
            for t, s in zip(found, self.sentences, strict=True)
        ]
        return {"Viterbi": self.score(trees, sum(t is None for t in found))}

    def chart(self, induced: Induced) -> dict[str, Any]:
        rules = induced.rule_list
        encoded = [rules.encode(tags) for tags in self.tags]

        def found(n: int) -> list[np.ndarray]:
            own = sparse.inside_outside(rules, encoded[n], strict=False)
            return [np.nan_to_num(a) for a in own[1:]]

        return self.marginals(rules, found)

    def oracle(self, induced: Induced) -> dict[str, Any]:
        """The gold trees by the symbols of the grammar: what it cannot name is no bracket."""
        span = {symbol: n for n, symbol in enumerate(induced.nonterminals)}
        tag = {symbol: n for n, symbol in enumerate(induced.preterminals)}

        def one(n: int) -> tuple[np.ndarray, np.ndarray]:
            length = len(self.tags[n])
            spans, tags = np.zeros((length, length, len(span))), np.zeros((length, len(tag)))

            def walk(node: Tree, i: int) -> int:
                if treebank.is_tag(node):
                    for symbol in (node.label(), self.tags[n][i]):
                        if symbol in tag and not tags[i].any():
                            tags[i, tag[symbol]] = 1
                    return i + 1
                end = i
                for child in node:
                    end = walk(child, end)
                if node.label() in span:
                    spans[i, end - 1, span[node.label()]] = 1
                return end

            walk(treebank.binarise(treebank.collapse(self.gold[n])), 0)
            return spans, tags

        return self.marginals(induced, one)["symbols (MBRb)"]

    def construction(self, c: InsideOutside) -> dict[str, Any]:
        """By `evaluate` in float32; and how many sentences still have no parse in float64."""
        tokens, lengths = encode(c, self.tags)
        spans, tags = [], []
        for start in range(0, len(tokens), BATCH):
            rows = np.arange(start, start + BATCH) % len(tokens)
            found = c.evaluate(tokens[rows], lengths[rows], strict=False)
            spans += list(np.nan_to_num(found["span_marginals"]))
            tags += list(np.nan_to_num(found["tag_marginals"]))
        scores = self.marginals(c.grammar, lambda n: cut(spans[n], tags[n], lengths[n]))
        lost = [n for n in range(len(tokens)) if not tags[n][0].sum() > 0]
        with jax.enable_x64(True):
            again = c.trace(tokens[lost], lengths[lost], np.zeros((len(lost), LONGEST), bool))
            parsed = np.asarray(again["tag_marginals"][:, 0].sum(-1)) > 0
        return {**scores, "unparsed in float64": int((~parsed).sum())}


def cut(spans: np.ndarray, tags: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    return spans[:n, :n], tags[:n]


def encode(c: InsideOutside, tags: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    tokens, lengths = c.grammar.encode(tags)
    return np.pad(tokens, ((0, 0), (0, LONGEST - tokens.shape[1]))), lengths


def size(induced: Induced) -> dict[str, int]:
    """Of a grammar, and the width of its construction."""
    n, p = len(induced.nonterminals), len(induced.preterminals)
    return {
        "nonterminals": n,
        "preterminals": p,
        "rules": len(induced.rules),
        "width": layout(n, p, LONGEST).slots.width,
        "layers": 2 * LONGEST,
        "heads of a layer inside": 2 * n + 2,
    }


def read(folder: Path, first: int, last: int) -> list[Tree]:
    files = [f for f in sorted(folder.glob("wsj_*.mrg")) if first <= int(f.stem[4:]) <= last]
    if len(files) != last - first + 1:
        sys.exit(
            f"{folder} has {len(files)} files wsj_{first:04}.mrg to {last:04}.mrg, must be all"
        )
    cleaned = map(treebank.clean, treebank.read_brackets(*files))
    return [tree for tree in cleaned if tree is not None]


def measure(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    train = read(folder, 1, 149)
    short = [tree for tree in read(folder, 150, 169) if len(tree.leaves()) <= LONGEST]
    develop, everything = Develop(short), treebank.induce(train)

    def grammar(induced: Induced, name: str, *parts: Callable[[Induced], dict]) -> dict[str, Any]:
        found: dict[str, Any] = size(induced)
        for part in parts:
            found |= part(induced)
        print(f"{time.perf_counter() - started:4.0f} s  {name}", file=sys.stderr, flush=True)
        return found

    full = (develop.viterbi, develop.chart)
    figures: dict[str, Any] = {
        "sentences": len(short),
        "words": sum(map(len, develop.tags)),
        "trees to learn from": len(train),
        "right branching": develop.score([brackets.right_branching(s) for s in develop.sentences]),
        "gold trees by the symbols of h=0 v=1": develop.oracle(everything),
    }
    grammars = {"h=0 v=1": grammar(everything, "h=0 v=1", *full)}
    for k, kp in KEPT:
        kept = treebank.restrict(everything, k, kp)
        name = f"h=0 v=1, {k} nonterminals" + (f", {kp} pre-terminals" if kp else "")
        grammars[name] = grammar(kept, name, develop.chart)
        grammars[name]["gold trees by its symbols"] = develop.oracle(kept)
    for h, v in ((1, 1), (1, 2)):
        name = f"h={h} v={v}"
        grammars[name] = grammar(treebank.induce(train, h, v), name, *full)
    figures["grammars, by the sparse chart"] = grammars

    exact = InsideOutside(treebank.restrict(everything, 20, 70).grammar, LONGEST)
    learned = [[tag for _, tag in treebank.tagged(tree)] for tree in train]
    learned = [tags for tags in learned if len(tags) <= LONGEST][:TRAINED]
    reduction = exact.low_rank(*encode(exact, learned), max(RANKS)).reduction
    built: dict[str, Any] = {}
    for rank in (None, *RANKS):
        c = exact if rank is None else replace(exact, reduction=reduction.first(rank))
        sizes = counts(c.program)
        name = "exact" if rank is None else f"rank {rank}"
        built[name] = {
            "width": sizes.width,
            "layers": sizes.layers,
            "heads": sizes.heads,
            "heads of a layer inside": 2 * c.rank + 2,
            "stored": sizes.stored,
            **develop.construction(c),
        }
        print(f"{time.perf_counter() - started:4.0f} s  {name}", file=sys.stderr, flush=True)
    figures["construction of 20 nonterminals, 70 pre-terminals"] = {
        "evaluated in": "float32",
        "sentences that the reduction looks at": len(learned),
        **built,
    }
    labels = "labels (MBR)"
    best = {n: max(g[d]["labelled F1"] for d in DECODERS) for n, g in grammars.items()}
    best["Viterbi of h=1 v=2"] = grammars["h=1 v=2"]["Viterbi"]["labelled F1"]
    top = max(best, key=lambda name: best[name])
    all_of_them = grammars["h=0 v=1"][labels]["labelled F1"]
    figures["labelled F1"] = {
        "h=0 v=1, labels (MBR)": all_of_them,
        f"best: {top}": best[top],
        "lost by 20 nonterminals": round(
            all_of_them - grammars["h=0 v=1, 20 nonterminals"][labels]["labelled F1"], 2
        ),
        "lost by 20 nonterminals, 70 pre-terminals, in the construction": round(
            all_of_them - built["exact"][labels]["labelled F1"], 2
        ),
        "15 heads a direction": built["rank 15"][labels]["labelled F1"],
    }
    figures["seconds"] = round(time.perf_counter() - started)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--treebank", type=Path, required=True, help="the folder with wsj_*.mrg")
    given, sys.argv[1:] = parser.parse_known_args()
    report("treebank", measure(given.treebank))


if __name__ == "__main__":
    main()
