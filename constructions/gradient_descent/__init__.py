"""Linear attention as gradient descent (von Oswald et al. 2022, arXiv 2212.07677).

construction    the algorithm, the hand-built weights, the trained counterpart, the near-misses
paper           the paper's statements about trained models, as claims
measurements    its published numbers beside ours

Families of their own on the same layer:

hedge           step sizes as experts, mixed by their validation losses
memory_token    a frozen layer, and one token that learns a new task

What other papers ask, asked of the same layer, a paper a file:

facts           how long does a surprising fact stay in a linear memory?
local_sgd       where do label noise, and workers apart, drift along its minima?
mirror_flow     what do heads that are two factors prefer?
relu_optimum    does descent find the global optimum of a small ReLU layer?
modifications   which of a grid of shapes matter?
"""

from constructions.catalogue import Family, lazily

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
