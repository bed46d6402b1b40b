"""Inside-Outside in a transformer, and masked language models (Zhao et al. 2023, arXiv 2303.08117).

tableau         the algorithm as array code, its program, and the program run without dense weights
construction    both together, and what is asked of a parser: posteriors and marginals
low_rank        fewer heads: a projection of the inside vectors
exactness       which sentences a floating point type can hold
paper           the paper's statements about masked language models, the counterpart, near-misses
measurements    its statements about sizes beside ours
pruning         text of which a small model's perplexity decides what is kept
spans           corrupted spans, and the exact posterior of what they were
training_data   what is learnt from pruned text and from spans, beside exact optima
"""

from constructions.catalogue import Family, lazily

INSIDE_OUTSIDE = Family(
    name="inside-outside",
    construct="constructions.inside_outside.construction:InsideOutside",
    # with fewer hidden words than that, the bag of words tells nearly all of them
    settings={"grammar": "brackets", "max_length": 8, "masking": 0.3},
    about="attention between the ends of spans computes their inside and outside probabilities",
    source="Zhao et al. 2023, arXiv 2303.08117",
    measure="constructions.inside_outside.measurements:measure",
)

__getattr__ = lazily(
    __name__,
    InsideOutside="constructions.inside_outside.construction",
)
