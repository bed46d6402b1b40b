"""Hand-built transformers, and the one class that they share with trained ones.

slots, program      a construction as a tableau over named slots of the residual stream
compiler            program -> dense weights of the one transformer
config, transformer the one transformer: its shape, its weights, its named sites
mixers              how scores become attention weights
symmetries          what leaves a model's function unchanged, and invariants of the weights
evaluator           the same programs, run slot by slot without dense weights
family              what every family offers; `verify`
gradient_descent    linear attention as gradient descent

`CATALOGUE` maps the name of every family to it; tests, probes and the command iterate over it.
"""

from constructions.family import Family
from constructions.gradient_descent import GRADIENT_DESCENT

CATALOGUE: dict[str, Family] = {family.name: family for family in (GRADIENT_DESCENT,)}

__all__ = ["CATALOGUE"]
