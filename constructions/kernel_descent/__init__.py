"""Gradient descent on features of an MLP (von Oswald et al. 2022, arXiv 2212.07677, Prop. 2).

construction    the algorithm, the hand-built weights with sine and cosine as an MLP, the trained
                counterpart, the near-misses
paper           the paper's statements about a trained model on sine waves
contrastive     features by a contrastive loss, which does not say whether they are any good
"""

from constructions.catalogue import Family, lazily

KERNEL_DESCENT = Family(
    name="kernel-descent",
    construct="constructions.kernel_descent.construction:KernelDescent",
    settings={"dim_x": 1, "dim_y": 1, "num_examples": 10, "steps": 1},
    about="an MLP in front of linear self-attention runs gradient descent on its features",
    source="von Oswald et al. 2022, arXiv 2212.07677, Prop. 2",
    measure="constructions.kernel_descent.contrastive:measure",
)

__getattr__ = lazily(
    __name__,
    KernelDescent="constructions.kernel_descent.construction",
)
