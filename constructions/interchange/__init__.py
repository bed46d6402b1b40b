"""Models in and out.

decoder       decoders of GPT-2's and OPT's shape in the one transformer
huggingface   model folders of Hugging Face's format
export        constructions and trained models as such folders, for torch
card          what such a folder's model card says
"""
