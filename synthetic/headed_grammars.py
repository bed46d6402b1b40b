"""Grammars with heads: tables for the named ones, and one in which every arc tells something.

In `agreement` words have one of a few genders. Determiners and adjectives mostly have that of their
noun and stand on one side of it, which the gender decides; verbs and prepositions show the genders
of both nouns that they stand between. A noun may be far from what depends on it and from its verb,
so that no fixed offset finds many heads; and nobody tells as much of a hidden adjective as its
noun, since every other adjective errs on its own.
"""

from __future__ import annotations

from functools import cache
from itertools import product

from synthetic.dependencies import Headed
from synthetic.grammar import Grammar
from synthetic.grammars import named

#: Head tables of the named grammars: verbs head clauses, prepositions their phrases.
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "toy": {
        "S": ("VP",),
        "NP": ("NP", "NB", "N"),
        "NB": ("NB", "N"),
        "VP": ("VP", "V"),
        "PP": ("P",),
    },
    "english": {
        "S": ("VPs", "VPp"),
        "NPs": ("NPs", "Ns"),
        "NPp": ("NPp", "NPs", "Np"),
        "CO": ("NPs", "NPp"),
        "Ns": ("Ns",),
        "Np": ("Np",),
        "PP": ("P",),
        "RCs": ("VPs",),
        "RCp": ("VPp",),
        "VPs": ("VPs", "Vs"),
        "VPp": ("VPp", "Vp"),
    },
}


def headed(grammar: Grammar) -> Headed:
    """Our head sides where the grammar is one of ours; else every head is on the right."""
    for name, table in TABLES.items():
        if grammar == named(name):
            return Headed.from_table(grammar, table)
    return agreement() if grammar == agreement().grammar else Headed.everywhere(grammar)


@cache
def agreement(genders: int = 4, agree: float = 0.5, nouns: int = 4) -> Headed:
    """The grammar, with its heads: the noun of a noun phrase, verbs, prepositions.

    Args:
        genders: how many, at least 2; phrases of even ones end in their noun, of odd ones begin
            with it.
        agree: the probability that a determiner or adjective has the form of the noun's gender; the
            other forms are equally likely.
        nouns: words of each gender.

    Raises:
        ValueError: a number out of range.
    """
    if genders < 2:
        raise ValueError(f"genders is {genders}, must be at least 2")
    if not 0 < agree <= 1:
        raise ValueError(f"agree is {agree}, must be above 0 and at most 1")
    if nouns < 1:
        raise ValueError(f"nouns is {nouns}, must be at least 1")
    kinds, share, rest = range(genders), 1 / genders, (1 - agree) / (genders - 1)
    rules: dict[str, dict[tuple[str, str], float]] = {
        "S": {(f"NP{c}", f"VP{c}"): share for c in kinds}
    }
    words: dict[str, dict[str, float]] = {}
    table: dict[str, tuple[str, ...]] = {"S": tuple(f"VP{c}" for c in kinds)}
    for c in kinds:

        def phrase(modifier: str, noun: str, p: float, c: int = c) -> dict[tuple[str, str], float]:
            first, second = f"{modifier}{c}", f"{noun}{c}"
            return {(second, first) if c % 2 else (first, second): p}

        rules[f"NP{c}"] = phrase("D", "N", 0.2) | phrase("D", "NB", 0.6)
        rules[f"NP{c}"] |= {(f"NP{c}", f"PP{c}"): 0.2}
        rules[f"NB{c}"] = phrase("A", "N", 0.35) | phrase("A", "NB", 0.65)
        rules[f"VP{c}"] = {(f"V{c}{d}", f"NP{d}"): 0.8 * share for d in kinds}
        rules[f"VP{c}"] |= {("ADV", f"VP{c}"): 0.2}
        rules[f"PP{c}"] = {(f"P{c}{d}", f"NP{d}"): share for d in kinds}
        table[f"NP{c}"] = (f"NP{c}", f"NB{c}", f"N{c}")
        table[f"NB{c}"] = (f"NB{c}", f"N{c}")
        table[f"VP{c}"] = (f"VP{c}", *(f"V{c}{d}" for d in kinds))
        table[f"PP{c}"] = tuple(f"P{c}{d}" for d in kinds)
        words[f"N{c}"] = {f"n{c}{number}": 1 / nouns for number in range(nouns)}
        for kind in "DA":
            forms = {f"{kind.lower()}{d}": agree if c == d else rest for d in kinds}
            words[f"{kind}{c}"] = {form: p for form, p in forms.items() if p > 0}
    for kind, c, d in product("VP", kinds, kinds):
        words[f"{kind}{c}{d}"] = {f"{kind.lower()}{c}{d}": 1.0}
    words["ADV"] = {"often": 0.5, "now": 0.5}
    return Headed.from_table(Grammar.from_rules({"S": 1.0}, rules, words), table)
