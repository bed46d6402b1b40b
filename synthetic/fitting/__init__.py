"""Fitting models to tasks.

recipe          how a model is optimised, as data
devices         one device, all local ones, or many processes
step            a chunk of training steps as one call
train           fits by stochastic steps, and by L-BFGS on a loss without noise
weights_file    models in safetensors
run_directory   run directories and their resumable checkpoints
recorder        what a fit writes into one
distillation    a teacher's predictions as targets
zeroth_order    fits by values of a loss alone
second_order    nonlinear least squares, few parameters and many examples
"""
