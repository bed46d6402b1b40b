"""Linear transformers on noisy regression (Vladymyrov et al. 2024, arXiv 2402.14180).

construction    DIAG layers, the hand-built weights, the trained counterpart, the near-misses
recursion       (M, u, w, a): what a linear transformer does to a context, layer by layer
fitting         the best layers for a task
full            the same with all entries of the matrices free
table           Table 1 of the paper, measured
paper           the paper's statements about trained models
"""

from constructions.catalogue import Family, lazily

NOISY_REGRESSION = Family(
    name="noisy-regression",
    construct="constructions.noisy_regression.construction:NoisyRegression",
    settings={
        "dim_x": 10,
        "num_examples": 20,
        # the best two layers for this task: `fitting.fit`
        "layers": [(-0.01504, -3.093e-4, -0.02367, -2.830e-4), (0.0, 0.0, -0.1125, -9.877e-4)],
        "noise_levels": [1.0, 3.0],
    },
    about="linear transformers estimate the noise of a context and shrink by it",
    source="Vladymyrov et al. 2024, arXiv 2402.14180",
    measure="constructions.noisy_regression.table:measure",
)

__getattr__ = lazily(
    __name__,
    NoisyRegression="constructions.noisy_regression.construction",
)
