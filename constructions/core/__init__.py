"""The one transformer, and the compiler of programs written by hand into its weights.

matrices      what programs read and write with: sums of blocks, mostly of the identity
slots         named columns of the residual stream, and affine maps written on names
equations     what each of its parts adds to which slot, for people
folding       the same with what repeats shown once
picture       and drawn
program       a construction as a tableau: heads, MLPs and norms over slots
checks        what a program must satisfy
config        the shape of a transformer
layer         one layer, and how scores become attention weights
weights       stored weights by name, part by part and head by head; rows of tables that exist
transformer   the transformer: streams in, streams out, sites that are read and edited
softmax       linear attention out of softmax heads
compile       programs into dense weights, and shapes without a construction
embedding     named values into the stream, and where they are found in it
stream        the stream of the slot-wise evaluator
evaluate      the same programs, slot by slot, without dense weights
inventory     how large a program is, and its non-standard components
canonical     the invariants by which weights are compared
symmetry      what leaves a model's function unchanged
"""
