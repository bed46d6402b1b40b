"""Linear attention as gradient descent (von Oswald et al. 2022, arXiv 2212.07677).

construction    the algorithm, the hand-built weights, the trained counterpart, the near-misses
paper           the paper's statements about trained models, as claims
measurements    its published numbers beside ours
facts           how long a surprising fact stays in a linear memory
hedge           step sizes as experts, mixed by their validation losses
local_sgd       along the minima of a layer, with label noise and workers apart
mirror_flow     what heads that are two factors prefer
relu_optimum    the global optimum of a small ReLU layer, beside what descent finds
memory_token    a frozen layer, and one token that learns a new task
modifications   a grid of shapes, and a test of which of them matter
"""

from typing import TYPE_CHECKING

from constructions.catalogue import Family, lazily

if TYPE_CHECKING:
    from constructions.gradient_descent.construction import GradientDescent as GradientDescent
    from constructions.gradient_descent.hedge import Hedge as Hedge
    from constructions.gradient_descent.memory_token import MemoryToken as MemoryToken

GRADIENT_DESCENT = Family(
    name="gradient-descent",
    construct="constructions.gradient_descent.construction:GradientDescent",
    settings={"dim_x": 10, "dim_y": 1, "num_examples": 10, "steps": 1},
    about="linear self-attention runs gradient descent on in-context linear regression",
    source="von Oswald et al. 2022, arXiv 2212.07677, Prop. 1",
    measure="constructions.gradient_descent.measurements:measure",
)

GD_PLUS_PLUS = Family(
    name="gd-plus-plus",
    construct="constructions.gradient_descent.construction:GradientDescent",
    settings={"steps": 2, "step_size": 13.5, "curvature": 0.176, "recurrent": True},
    about="one layer of linear attention, applied twice, is gradient descent that flattens its "
    "own curvature",
    source="von Oswald et al. 2022, arXiv 2212.07677, appendix A.10",
)

MEMORY_TOKEN = Family(
    name="memory-token",
    construct="constructions.gradient_descent.memory_token:MemoryToken",
    settings={"dim_x": 10, "num_examples": 10},
    about="one token before a frozen layer learns a new task, and the old one keeps every bit",
    source="after Sandler et al. 2022, arXiv 2203.15243",
)

HEDGE = Family(
    name="hedge",
    construct="constructions.gradient_descent.hedge:Hedge",
    settings={"dim_x": 3, "num_examples": 8},
    about="heads descend with step sizes of their own, and a softmax over their validation losses "
    "mixes them: Hedge, with its regret bound",
    source="after Lu et al. 2022, arXiv 2203.01400",
    measure="constructions.gradient_descent.measurements:measure_regrets",
)

__getattr__ = lazily(
    __name__,
    GradientDescent="constructions.gradient_descent.construction",
    Hedge="constructions.gradient_descent.hedge",
    MemoryToken="constructions.gradient_descent.memory_token",
)

__all__ = [
    "GD_PLUS_PLUS",
    "GRADIENT_DESCENT",
    "HEDGE",
    "MEMORY_TOKEN",
    "GradientDescent",
    "Hedge",
    "MemoryToken",
]
