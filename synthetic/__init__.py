"""Tasks, what is known of them in closed form, and fitting models to them.

compilation   how programs are compiled, and where compiled ones are kept
display       how results show themselves in a notebook
files         text and JSON out of files, and files that are written as a whole
guards        what settings may be, said in one line where they are not
threefry      uniform and normal numbers, fast on a CPU, the same bits as `jax.random`
grammar       probabilistic context-free grammars, their sentences, and exact inference
tasks         samplers of batches, each with its loss
theory        optima and losses in closed form
fitting       fits, and the directories in which they are kept
"""
