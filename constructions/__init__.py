"""Hand-built transformers, and the one class that they share with trained ones.

catalogue          families by name, those of other packages too
core               the one transformer, and the compiler of programs into its weights
mesa_layer         in-context least squares as a layer, usable alone
inputs             what a model is given, checked once for all families
claims             statements about trained models that a number decides, and what they need
measurement        numbers of ours beside published ones
certificate        how far a compiled model is from its algorithm
family             what every family offers
interchange        models in and out
regression         what the constructions on in-context regression share
primitives         heads and MLPs that many algorithms need
softened           any construction of linear heads, by softmax heads
runs               fits of a family on disk
imported           runs of weights that were trained elsewhere
gradient_descent   linear attention as gradient descent, and GD++
separate_tokens    the same where x and y are tokens of their own
kernel_descent     the same on features of an MLP
noisy_regression   linear transformers that meet noise of unknown level
inside_outside     attention between the ends of spans that parses, and masked language models
mesa               in-context least squares on sequences
tint               a transformer that trains another one in its forward pass
hyper_transformer  attention that writes the weights of a classifier
skills             a looped layer that applies the skills that a task names

`CATALOGUE` maps the name of every family to it; tests, probes and the command iterate over it. It
needs no JAX: a family is imported when it is taken out.
"""

from constructions.catalogue import Catalogue

CATALOGUE = Catalogue(
    {
        "gradient-descent": "constructions.gradient_descent:GRADIENT_DESCENT",
        "gd-plus-plus": "constructions.gradient_descent:GD_PLUS_PLUS",
        "memory-token": "constructions.gradient_descent:MEMORY_TOKEN",
        "hedge": "constructions.gradient_descent:HEDGE",
        "separate-tokens": "constructions.separate_tokens:SEPARATE_TOKENS",
        "kernel-descent": "constructions.kernel_descent:KERNEL_DESCENT",
        "noisy-regression": "constructions.noisy_regression:NOISY_REGRESSION",
        "inside-outside": "constructions.inside_outside:INSIDE_OUTSIDE",
        "mesa-ridge": "constructions.mesa:MESA_RIDGE",
        "mesa-polynomial": "constructions.mesa:MESA_POLYNOMIAL",
        "tint": "constructions.tint:TINT",
        "hyper-gradient": "constructions.hyper_transformer:HYPER_GRADIENT",
        "hyper-prototypes": "constructions.hyper_transformer:HYPER_PROTOTYPES",
        "hyper-semi-supervised": "constructions.hyper_transformer:HYPER_SEMI_SUPERVISED",
        "skill-composition": "constructions.skills:SKILL_COMPOSITION",
    }
)

__all__ = ["CATALOGUE"]
