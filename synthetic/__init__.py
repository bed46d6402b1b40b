"""Tasks, what is known of them in closed form, and fitting models to them.

task                     what a task is: a sampler of batches and a loss
regression               in-context linear regression
noisy                    the same with a noise level of each context's own
sine                     in-context regression of sine waves, and kernel smoothers on them
theory                   optima, population losses, plateaus, in closed form
spectral                 gradient descent and GD++ as filters on the eigenvalues of each context
wishart                  how rare the small and the large eigenvalues of a Gaussian context are
ridge                    ridge regression, with and without knowledge of the noise
grammar                  probabilistic context-free grammars in Chomsky normal form, as arrays
productions, cnf         grammars as text, and their normal form with its inverse on trees
grammars                 some of our own, by name
sentences                sampling them, with their trees
dependencies             head sides of rules, and the arcs of derivations
headed_grammars          our grammars with their head sides
masked_language          the task of their hidden words
arc_task                 the same, with attention held to arcs or off them
classes                  few-shot classification, with the exact posterior
text_files               text and JSON out of files, in UTF-8 or UTF-16
text, bigrams            the next token, of files and grammars and of laws of each sequence's own
chart, charts            inside-outside over batches of sentences: marginals, parses, EM
treebank                 bracketed trees, and the grammars that they induce
brackets                 parses, and how many of their brackets are right
bits                     uniform and normal numbers, fast on a CPU, the same bits as `jax.random`
recipe                   how a model is optimised, as data
train, step, minimize    fits by stochastic steps, and by L-BFGS on a loss without noise
scaling                  the square-root scaling rule of Adam's batch
distillation             a teacher's predictions as targets
zeroth_order             fits by values of a loss alone
second_order             nonlinear least squares, few parameters and many examples
devices                  one device, all local ones, or many processes
runs, recorder, files    run directories, and files that are written as a whole
checkpoints, saved       resumable states, and models in safetensors
"""
