"""In-context least squares on sequences (von Oswald et al. 2023, arXiv 2309.05858).

tokens          raw states in, the layer that binds each to the one before, predictions out
ridge           ridge regression on all of the sequence so far, by one mesa head
polynomial      preconditioned gradient descent, any polynomial, by linear heads
language        next tokens of text by mesa, softmax and linear heads
features        ridge regression on known features, for nonlinear systems
few_shot        regression as a sequence, with prompts that are tuned
models          other models of next states: deep linear attention, softmax, hybrids
blocks          linear attention whose products are numbers times identity blocks
depth           how far polynomials are from ridge regression, by the number of layers
claims          the paper's statements about trained layers
measurements    its published losses, and ours
trained         deep layers in numbers
"""

from typing import TYPE_CHECKING

from constructions.catalogue import Family, lazily

if TYPE_CHECKING:
    from constructions.mesa.polynomial import MesaPolynomial as MesaPolynomial
    from constructions.mesa.ridge import MesaRidge as MesaRidge

MESA_RIDGE = Family(
    name="mesa-ridge",
    construct="constructions.mesa.ridge:MesaRidge",
    settings={"dim": 4, "length": 16, "tokens": "constructed"},
    about="one mesa head predicts the next state by ridge regression on all states so far",
    source="von Oswald et al. 2023, arXiv 2309.05858, section 5",
    measure="constructions.mesa.measurements:measure",
)

MESA_POLYNOMIAL = Family(
    name="mesa-polynomial",
    construct="constructions.mesa.polynomial:MesaPolynomial",
    settings={"dim": 8, "length": 40, "tokens": "constructed", "coefficients": (0.041,)},
    about="linear attention takes a gradient step, with any polynomial as preconditioner",
    source="von Oswald et al. 2023, arXiv 2309.05858, Prop. 1 and 2",
    measure="constructions.mesa.trained:measure",
)

__getattr__ = lazily(
    __name__,
    MesaPolynomial="constructions.mesa.polynomial",
    MesaRidge="constructions.mesa.ridge",
)

__all__ = ["MESA_POLYNOMIAL", "MESA_RIDGE", "MesaPolynomial", "MesaRidge"]
