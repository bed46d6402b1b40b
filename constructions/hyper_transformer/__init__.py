"""Attention that writes the weights of a classifier (Zhmoginov et al. 2022, arXiv 2201.04182).

episodes        what its constructions share: examples, class tokens, queries
gradient        gradient descent on cross-entropy, by linear attention
prototypes      class means by softmax attention; guessed labels, and memory of earlier tasks
paper           statements about trained models
unlearning      a class's token deleted, and what that does to the others
measurements    what examples without labels are worth
"""

from constructions.catalogue import Family, lazily

_SOURCE = "after Zhmoginov et al. 2022, arXiv 2201.04182"

HYPER_GRADIENT = Family(
    name="hyper-gradient",
    construct="constructions.hyper_transformer.gradient:HyperGradient",
    settings={"dim": 5, "classes": 4, "shots": 2},
    about="linear attention writes the classifier of one gradient step on cross-entropy",
    source=_SOURCE,
)

HYPER_PROTOTYPES = Family(
    name="hyper-prototypes",
    construct="constructions.hyper_transformer.prototypes:HyperPrototypes",
    settings={"dim": 5, "classes": 4, "shots": 2},
    about="softmax attention writes class means, and the classifier of the nearest is the exact "
    "posterior; it goes on from task to task and forgets nothing",
    source=f"{_SOURCE}; Vladymyrov et al. 2023, arXiv 2301.04584",
)

HYPER_SEMI_SUPERVISED = Family(
    name="hyper-semi-supervised",
    construct="constructions.hyper_transformer.prototypes:HyperPrototypes",
    # sharpness to shrinkage minimise the loss on the task
    settings={
        "dim": 8,
        "classes": 4,
        "shots": 1,
        "unlabelled": 16,
        "sharpness": 2.9,
        "similarity": 0.4,
        "scale": 0.7,
        "shrinkage": 1.0,
    },
    about="a layer before guesses the labels of examples that have none, and they count as well",
    source=_SOURCE,
    measure="constructions.hyper_transformer.measurements:measure",
)

__getattr__ = lazily(
    __name__,
    HyperGradient="constructions.hyper_transformer.gradient",
    HyperPrototypes="constructions.hyper_transformer.prototypes",
    Memory="constructions.hyper_transformer.prototypes",
)
