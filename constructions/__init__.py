"""Hand-built transformers, and the one class that they share with trained ones.

core               the one transformer, and the compiler of programs into its weights
mesa_layer         in-context least squares as a layer, usable alone
inputs             what a model is given, checked once for all families
claims             statements about trained models that a number decides, and what they need
certificate        how far a compiled model is from its algorithm
family             what every family offers
interchange        models in and out
regression         what the constructions on in-context regression share
softened           any construction of linear heads, by softmax heads
runs               fits of a family on disk
gradient_descent   linear attention as gradient descent, and GD++
separate_tokens    the same where x and y are tokens of their own
kernel_descent     the same on features of an MLP
noisy_regression   linear transformers that meet noise of unknown level
inside_outside     attention between the ends of spans that parses, and masked language models
mesa               in-context least squares on sequences
tint               a transformer that trains another one in its forward pass
hyper_transformer  attention that writes the weights of a classifier

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
