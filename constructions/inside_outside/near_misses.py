"""Models that are almost the construction: what its claims must tell from it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from constructions.claims import NearMiss
from constructions.compiler import compile_program
from constructions.program import Head, HeadFamily, Program
from synthetic.grammar import Grammar

if TYPE_CHECKING:
    from constructions.inside_outside.construction import InsideOutside


def near_misses(c: InsideOutside) -> dict[str, NearMiss]:
    """Parses by a grammar that is off, or with half of the outside pass."""
    g = c.grammar

    def of(program: Program) -> NearMiss:
        return NearMiss(compile_program(program), c)

    def with_grammar(**changes: Any) -> NearMiss:
        parts = {"root": g.root, "rules": g.rules, "emission": g.emission} | changes
        names = (g.nonterminals, g.preterminals, g.vocabulary)
        other = replace(c, grammar=Grammar(*names, **parts))
        return of(other.program)

    alike = (g.rules > 0) / np.maximum((g.rules > 0).sum((1, 2), keepdims=True), 1)
    words = 0.7 * g.emission + 0.3 * g.emission.sum(1, keepdims=True) / g.emission.shape[1]
    before = [*c.layout.before.values()]

    def left(part: Head | HeadFamily) -> Head | HeadFamily:
        if isinstance(part, Head):
            return part
        kept = [t for t in part.terms if t[0] not in before and t[1] not in before]
        return replace(part, terms=kept)

    layers = [replace(la, heads=[left(h) for h in la.heads]) for la in c.program.layers]
    return {
        "every rule alike": with_grammar(rules=alike),
        "uniform words": with_grammar(emission=words),
        "left children only": of(replace(c.program, layers=layers)),
    }
