"""Inside-Outside in a transformer, and masked language models (Zhao et al. 2023, arXiv 2303.08117).

algorithm       the two recursions, as plain array code
tableau         the hand-built weights: one layer for each length of span
construction    both together, with what a user asks of them
low_rank        fewer heads: a projection of what spans pass on
language_model  the shape of the trained counterpart
claims          the paper's statements about it
measurements    its statements about sizes, and ours
"""

from typing import TYPE_CHECKING

from constructions.catalogue import Family, lazily

if TYPE_CHECKING:
    from constructions.inside_outside.construction import InsideOutside as InsideOutside

INSIDE_OUTSIDE = Family(
    name="inside-outside",
    construct="constructions.inside_outside.construction:InsideOutside",
    settings={"grammar": "toy", "max_length": 8},
    about="attention between the ends of spans computes their inside and outside probabilities",
    source="Zhao et al. 2023, arXiv 2303.08117",
    measure="constructions.inside_outside.measurements:measure",
)

__getattr__ = lazily(
    __name__,
    InsideOutside="constructions.inside_outside.construction",
)

__all__ = ["INSIDE_OUTSIDE", "InsideOutside"]
