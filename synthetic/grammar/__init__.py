"""Probabilistic context-free grammars, their sentences, and exact inference.

trees          trees of any depth, without recursion
productions    grammars as text
parts          the names and arrays of a grammar, from names, JSON, NLTK, or at random
normal_form    Chomsky normal form, and its inverse on trees
grammar        grammars as arrays
examples       some of our own, by name, and with heads
sentences      sampling them, with their trees
dependencies   head sides of rules, and the arcs of derivations
tables         the inside-outside recursions, width by width, with a scale for every span
decode         Viterbi and labelled-recall trees
chart          inside-outside over batches of sentences: what others import
sparse         the same by a list of rules, for grammars of thousands of symbols
treebank       bracketed trees, and the grammars that they induce
brackets       parses, and how many of their brackets are right
"""
