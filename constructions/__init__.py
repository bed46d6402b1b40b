"""Hand-built transformers, and the one class that they share with trained ones.

slots, program       a construction as a tableau over named slots of the residual stream
matrices             what programs read and write with: sums of blocks, mostly of the identity
checks, compiler     program -> dense weights of the one transformer
config, transformer  the one transformer: its shape, its weights, its named sites
blank                a shape to be trained, with no construction behind it
layer, mixers        one layer, and how scores become attention weights
symmetries           what leaves a model's function unchanged
canonical            what is left: the invariants by which weights are compared
evaluator            the same programs, run slot by slot without dense weights, by stream and maps
counts               how large a program and its model are
materials            what a program is made of beyond a plain transformer
family               what every family offers; `verify`
claims               statements about trained models that a number decides
runs                 fits of a family on disk
soften, softened     linear attention out of softmax heads
regression           what the constructions on in-context regression share
gradient_descent     linear attention as gradient descent, and GD++
separate_tokens      the same where x and y are tokens of their own
kernel_descent       the same on features of an MLP
noisy_regression     linear transformers that meet noise of unknown level
inside_outside       attention between the ends of spans that parses, and masked language models
mesa                 in-context least squares on sequences; mesa_mixer is the layer that it takes
tint                 a transformer that trains another one in its forward pass
hyper_transformer    attention that writes the weights of a classifier

`CATALOGUE` maps the name of every family to it; tests, probes and the command iterate over it.
"""

from constructions.family import Family
from constructions.gradient_descent import GD_PLUS_PLUS, GRADIENT_DESCENT
from constructions.hyper_transformer import (
    HYPER_GRADIENT,
    HYPER_PROTOTYPES,
    HYPER_SEMI_SUPERVISED,
)
from constructions.inside_outside import INSIDE_OUTSIDE
from constructions.kernel_descent import KERNEL_DESCENT
from constructions.mesa import MESA_POLYNOMIAL, MESA_RIDGE
from constructions.noisy_regression import NOISY_REGRESSION
from constructions.separate_tokens import SEPARATE_TOKENS
from constructions.tint import TINT

CATALOGUE: dict[str, Family] = {
    family.name: family
    for family in (
        GRADIENT_DESCENT,
        GD_PLUS_PLUS,
        SEPARATE_TOKENS,
        KERNEL_DESCENT,
        NOISY_REGRESSION,
        INSIDE_OUTSIDE,
        MESA_RIDGE,
        MESA_POLYNOMIAL,
        TINT,
        HYPER_GRADIENT,
        HYPER_PROTOTYPES,
        HYPER_SEMI_SUPERVISED,
    )
}

__all__ = ["CATALOGUE"]
