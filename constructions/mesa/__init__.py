"""In-context least squares on sequences (von Oswald et al. 2023, arXiv 2309.05858).

tokens          raw states in, the layer that binds each to the one before, predictions out
ridge           ridge regression on all of the sequence so far, or on features of it, by a mesa head
polynomial      preconditioned gradient descent, any polynomial, by linear heads
models          other models of next states and of text: deep linear attention, softmax, hybrids
paper           the paper's statements about trained layers
measurements    its published losses, and ours; prompts that are tuned
trained         deep layers in numbers: polynomials by depth, blocks of the products
"""

from constructions.catalogue import Family, lazily

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
