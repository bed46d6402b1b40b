"""Probes of sentences.

arcs              do heads look along the arcs of a dependency tree, and when do they begin to?
constituents      can spans, tags and trees be read off the stream?
sentence_probes   probes of places in sentences, with their controls
span_interchange  what do hidden words learn of a constituent? Its values exchanged
span_pairs        pairs of sentences with a constituent at the same place
"""
