"""Grammars written by us, by name: small ones that are really ambiguous.

toy      two attachments of a prepositional phrase, words that are nouns and verbs
english  subject and verb agree in number; modifiers, prepositional phrases, relative clauses and
         coordination recur; nouns, verbs and adjectives share words, so that the tag of a hidden
         word has an entropy of about half a nat even where all but one word in seven are seen

brackets  pairs of opening and closing words of four kinds, one in another or one after the other,
          around single words: a closing word has the kind of its opening one, any number of words
          before, so that windows of neighbours know little of it

toy and english have heads (`synthetic.grammar.dependencies`). In another, `agreement`, every arc is
informative: words have one of a few genders. Determiners and adjectives mostly have that of their
noun and stand on one side of it, which the gender decides; verbs and prepositions show the genders
of both nouns that they stand between. A noun may be far from what depends on it and from its verb,
so that no fixed offset finds many heads; and nobody tells as much of a hidden adjective as its
noun, since every other adjective errs on its own.
"""

from __future__ import annotations

from functools import cache
from itertools import product

from synthetic.grammar.dependencies import Headed
from synthetic.grammar.grammar import Grammar
from synthetic.guards import number

TOY = """
%start S
S   -> NP VP [0.8] | PRO VP [0.2]
NP  -> D NB [0.5] | D N [0.3] | NP PP [0.2]
NB  -> A NB [0.2] | A N [0.5] | N N [0.3]
VP  -> V NP [0.4] | VP PP [0.25] | V ADV [0.2] | U V [0.15]
PP  -> P NP [1.0]

PRO -> 'she' [0.6] | 'it' [0.4]
D   -> 'the' [0.6] | 'a' [0.4]
A   -> 'old' [0.5] | 'watch' [0.2] | 'light' [0.3]
N   -> 'man' [0.3] | 'dog' [0.2] | 'watch' [0.2] | 'light' [0.15] | 'saw' [0.15]
V   -> 'saw' [0.4] | 'watch' [0.3] | 'man' [0.1] | 'walk' [0.2]
U   -> 'can' [0.6] | 'will' [0.4]
P   -> 'with' [0.5] | 'in' [0.3] | 'on' [0.2]
ADV -> 'in' [0.3] | 'on' [0.2] | 'often' [0.5]
"""

ENGLISH = """
%start S
# Subject and verb agree; s is singular, p is plural.
S    -> NPs VPs [0.5] | NPp VPp [0.5]

# Determiner, adjectives and other nouns before the head; phrases behind it; names and pronouns.
NPs  -> Ds Ns [0.36] | M Ns [0.14] | NPs PP [0.18] | NPs RCs [0.08]
NPs  -> 'she' [0.05] | 'he' [0.05] | 'it' [0.05] | 'mary' [0.03] | 'john' [0.02] | 'light' [0.04]
NPp  -> Dp Np [0.20] | M Np [0.24] | NPp PP [0.16] | NPp RCp [0.07] | NPs CO [0.06] | NPp CO [0.06]
NPp  -> 'they' [0.04] | 'we' [0.04] | 'dogs' [0.03] | 'fish' [0.04] | 'plans' [0.03]
NPp  -> 'walks' [0.03]
CO   -> C NPs [0.5] | C NPp [0.5]
Ns   -> M Ns [0.42]
Ns   -> 'dog' [0.05] | 'man' [0.05] | 'fish' [0.05] | 'walk' [0.05] | 'plan' [0.05] | 'light' [0.04]
Ns   -> 'garden' [0.04] | 'boat' [0.04] | 'guard' [0.04] | 'woman' [0.03] | 'house' [0.03]
Ns   -> 'cook' [0.02] | 'park' [0.03] | 'sheep' [0.02] | 'bird' [0.03] | 'child' [0.01]
Np   -> M Np [0.42]
Np   -> 'dogs' [0.05] | 'men' [0.05] | 'fish' [0.05] | 'walks' [0.05] | 'plans' [0.05]
Np   -> 'lights' [0.04] | 'gardens' [0.04] | 'boats' [0.04] | 'guards' [0.04] | 'women' [0.03]
Np   -> 'houses' [0.03] | 'cooks' [0.02] | 'parks' [0.03] | 'sheep' [0.02] | 'birds' [0.03]
Np   -> 'children' [0.01]

PP   -> P NPs [0.55] | P NPp [0.45]
RCs  -> W VPs [1.0]
RCp  -> W VPp [1.0]

# Verbs without object, with one, with an adverb before or behind, or a phrase behind them.
VPs  -> Vs NPs [0.29] | Vs NPp [0.25] | VPs PP [0.12] | VPs A [0.12] | A VPs [0.11]
VPs  -> 'walks' [0.03] | 'sleeps' [0.03] | 'fishes' [0.02] | 'cooks' [0.01] | 'runs' [0.02]
VPp  -> Vp NPs [0.29] | Vp NPp [0.25] | VPp PP [0.12] | VPp A [0.12] | A VPp [0.11]
VPp  -> 'walk' [0.03] | 'sleep' [0.03] | 'fish' [0.02] | 'cook' [0.01] | 'run' [0.02]

Ds   -> 'the' [0.4] | 'a' [0.3] | 'this' [0.1] | 'every' [0.1] | 'her' [0.1]
Dp   -> 'the' [0.4] | 'some' [0.2] | 'these' [0.1] | 'all' [0.1] | 'many' [0.1] | 'her' [0.1]
M    -> 'old' [0.16] | 'light' [0.14] | 'garden' [0.12] | 'fish' [0.08] | 'boat' [0.08]
M    -> 'fast' [0.08] | 'young' [0.08] | 'park' [0.06] | 'house' [0.06] | 'small' [0.06]
M    -> 'red' [0.04] | 'tall' [0.02] | 'new' [0.02]
C    -> 'and' [0.7] | 'or' [0.3]
P    -> 'in' [0.25] | 'with' [0.25] | 'by' [0.15] | 'near' [0.15] | 'behind' [0.1]
P    -> 'for' [0.05] | 'under' [0.05]
W    -> 'who' [0.4] | 'that' [0.4] | 'which' [0.2]
A    -> 'fast' [0.2] | 'often' [0.2] | 'near' [0.1] | 'by' [0.1] | 'behind' [0.1] | 'now' [0.1]
A    -> 'always' [0.1] | 'here' [0.05] | 'rarely' [0.05]
Vs   -> 'sees' [0.2] | 'plans' [0.15] | 'walks' [0.15] | 'lights' [0.1] | 'guards' [0.1]
Vs   -> 'likes' [0.1] | 'cooks' [0.05] | 'runs' [0.05] | 'parks' [0.05] | 'finds' [0.05]
Vp   -> 'see' [0.2] | 'plan' [0.15] | 'walk' [0.15] | 'light' [0.1] | 'guard' [0.1]
Vp   -> 'like' [0.1] | 'cook' [0.05] | 'run' [0.05] | 'park' [0.05] | 'find' [0.05]
"""


BRACKETS = """
%start S
S -> S S [0.1] | 'a' S 'A' [0.16] | 'b' S 'B' [0.16] | 'c' S 'C' [0.16] | 'd' S 'D' [0.16]
S -> 'a' 'A' [0.0325] | 'b' 'B' [0.0325] | 'c' 'C' [0.0325] | 'd' 'D' [0.0325] | 'x' [0.13]
"""


@cache
def named(name: str) -> Grammar:
    """One of `NAMED`.

    Raises:
        ValueError: the name is another.
    """
    if name not in NAMED:
        raise ValueError(
            f"grammar {name!r} is not one of {', '.join(NAMED)}; `Grammar.from_file` reads a file"
        )
    return Grammar.from_text(NAMED[name], name=name)


NAMED = {"toy": TOY, "english": ENGLISH, "brackets": BRACKETS}


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
    number("genders", genders, whole=True, least=2)
    number("agree", agree, above=0, most=1)
    number("nouns", nouns, whole=True, least=1)
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
