"""Tasks with known answers: data, closed forms, exact oracles and the fit.

`task`: what a task is, a sampler of batches and a loss.
"""
