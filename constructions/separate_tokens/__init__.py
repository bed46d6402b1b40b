"""Gradient descent on separate tokens (von Oswald et al. 2022, arXiv 2212.07677, Prop. 3).

construction    the algorithm, the hand-built weights, the trained counterpart, the near-misses;
                what first layers of other kinds are trained to
paper           the paper's statements about two trained layers
"""

from constructions.catalogue import Family, lazily

SEPARATE_TOKENS = Family(
    name="separate-tokens",
    construct="constructions.separate_tokens.construction:SeparateTokens",
    settings={"dim_x": 3, "dim_y": 1, "num_examples": 6, "queries": 6},
    about="copy, erase, then gradient descent, where inputs and outputs are separate tokens",
    source="von Oswald et al. 2022, arXiv 2212.07677, Prop. 3",
    measure="constructions.separate_tokens.construction:measure",
)

__getattr__ = lazily(
    __name__,
    SeparateTokens="constructions.separate_tokens.construction",
)
