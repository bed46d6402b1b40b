"""Linear transformers on noisy regression (Vladymyrov et al. 2024, arXiv 2402.14180).

construction    DIAG layers, the hand-built weights, the trained counterpart, the near-misses
recursion       (M, u, w, a): what a linear transformer does to a context, layer by layer
fitting         the best layers for a task
table           Table 1 of the paper, measured
claims          the paper's statements about trained models
"""
