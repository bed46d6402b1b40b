"""Parts of the chart oracle; `synthetic.chart` is what others import.

scaled        vectors with a power of two apart
tables        inside and outside, width by width
decode        Viterbi and labelled-recall trees
em            expected counts, re-estimation, entropy
sparse        by a list of rules, for grammars of thousands of symbols
"""
