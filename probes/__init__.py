"""How alike are a construction and a trained model? Every tool says when it misleads.

sites                          read and edit named values of a model
linear, nonlinear, table       what can be read off the stream, with controls
spans, trees, rows             tags, spans and trees in the stream, beside the exact chart
positions                      vectors at one position of a sequence, held out and in sample
span_interchange, span_pairs   whether a constituent is passed on as one thing
interchange, attribution       what a model uses: exchanged values, their first-order estimate
patching                       the machinery that those two share
similarity                     predictions, sensitivities, activations
subsets, fourier, saliency     what a prediction makes of the examples in its context
flat                           a model as a function of one vector, for all that follows
grafting, npeff                which weights carry a skill, which examples are treated alike
fisher, averaging              merging models by Fisher information, averages of checkpoints
kernels, descent, sharpness    what training does: empirical kernels, paths, curvature
arcs, emergence, selectivity   heads that follow dependency arcs, when; units that follow classes
interpolation                  lines between models, damped roll-outs
ledger                         claims, their controls, their verdicts
comparison, sections, losses   everything a report shows, as data
report, figures, style         the report
cli, judging, tools            the command; options and tables are its inputs and outputs
"""
