"""Inside-Outside in a transformer, and masked language models (Zhao et al. 2023, arXiv 2303.08117).

algorithm       the two recursions, as plain array code
tableau         the hand-built weights: one layer for each length of span
construction    both together, with what a user asks of them
low_rank        fewer heads: a projection of what spans pass on
language_model  the shape of the trained counterpart
claims          the paper's statements about it
measurements    its statements about sizes, and ours
"""

from constructions.family import Family
from constructions.inside_outside.construction import InsideOutside
from constructions.inside_outside.measurements import measure

INSIDE_OUTSIDE = Family(
    name="inside-outside",
    construct=InsideOutside,
    settings={"grammar": "toy", "max_length": 8},
    about="attention between the ends of spans computes their inside and outside probabilities",
    source="Zhao et al. 2023, arXiv 2303.08117",
    measure=measure,
)

__all__ = ["INSIDE_OUTSIDE", "InsideOutside"]
