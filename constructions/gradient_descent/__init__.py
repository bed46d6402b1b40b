"""Linear attention as gradient descent (von Oswald et al. 2022, arXiv 2212.07677).

construction    the algorithm, the hand-built weights, the trained counterpart, the near-misses
claims          the paper's statements about one trained layer
"""

from constructions.family import Family
from constructions.gradient_descent.construction import GradientDescent

GRADIENT_DESCENT = Family(
    name="gradient-descent",
    construct=GradientDescent,
    settings={"dim_x": 10, "dim_y": 1, "num_examples": 10, "steps": 1},
    about="linear self-attention runs gradient descent on in-context linear regression",
    source="von Oswald et al. 2022, arXiv 2212.07677, Prop. 1",
)

__all__ = ["GRADIENT_DESCENT", "GradientDescent"]
