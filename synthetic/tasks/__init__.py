"""What models are trained on: samplers of batches, each with its loss.

task              what a task is
regression        in-context linear regression, and mixtures of weights or of scales
noisy             the same with a noise level of each context's own
sine              in-context regression of sine waves, and kernel smoothers on them
classes           few-shot classification, with the exact posterior
dynamics          sequences of linear and nonlinear systems
few_shot          regression as sequences of tokens
masked_language   hidden words of sentences, with attention held to arcs or off them
text              the next token of files, of grammars, and of laws of each sequence's own
skills            skills that a text names, in tuples shown and held out
adaptation        text of which the front part is learnt from, and words with labels
"""
