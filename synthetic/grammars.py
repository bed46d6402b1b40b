"""Grammars written by us, by name: small ones that are really ambiguous.

toy      two attachments of a prepositional phrase, words that are nouns and verbs
english  subject and verb agree in number; modifiers, prepositional phrases, relative clauses and
         coordination recur; nouns, verbs and adjectives share words, so that the tag of a hidden
         word has an entropy of about half a nat even where all but one word in seven are seen
"""

from functools import cache

from synthetic.grammar import Grammar

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


NAMED = {"toy": TOY, "english": ENGLISH}
