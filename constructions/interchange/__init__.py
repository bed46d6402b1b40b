"""Models in and out.

decoder          decoders of GPT-2's and OPT's shape in the one transformer
huggingface      model folders of Hugging Face's format
named_weights    weights under documented names
layouts          files of weights, and the layouts of other projects
export           constructions and trained models as such folders, for torch
modeling_orrery  the code of their models, which goes out with them and needs torch alone
card             what such a folder's model card says
"""
