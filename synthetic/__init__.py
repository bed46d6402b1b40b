"""Tasks, what is known of them in closed form, and fitting models to them.

task                     what a task is: a sampler of batches and a loss
regression               in-context linear regression
theory                   optima, population losses, plateaus, in closed form
bits                     uniform and normal numbers, fast on a CPU, the same bits as `jax.random`
recipe                   how a model is optimised, as data
train, step, minimize    fits by stochastic steps, and by L-BFGS on a loss without noise
devices                  one device, all local ones, or many processes
runs, recorder           run directories
checkpoints, saved       resumable states, and models in safetensors
"""
