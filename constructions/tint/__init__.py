"""A transformer that trains a transformer in its forward pass (Panigrahi et al. 2023, 2307.01189).

algorithm     the decoder trained by autograd; how each part is differentiated; settings and inputs
layout        token groups and slots: weights in prefix tokens, activations in the text's
parts         attention and LayerNorms, forward and backward, as heads and MLPs
tableau       matrices, embeddings and readout, and the whole program
construction  the family
paper         whether it stays a simulator when it is trained further; counterpart, near-misses
measurements  how far a step is from gradient descent, and how much it lowers the loss on text
experiments   hardness of attention, labels learnt in context, sizes of simulators

The decoder that is trained comes from `constructions.interchange`.
"""

from constructions.catalogue import Family, lazily

TINT = Family(
    name="tint",
    construct="constructions.tint.construction:Tint",
    settings={
        "auxiliary": {
            "grammar": "toy",
            "layers": 1,
            "heads": 2,
            "width": 4,
            "length": 12,
            "steps": 300,
        },
        "learning_rate": 0.02,
    },
    about="A transformer trains another on its input, by gradient descent within one forward pass.",
    source="Panigrahi, Malladi, Xia, Arora 2023, arXiv 2307.01189",
    measure="constructions.tint.experiments:measure",
    claims="constructions.tint.paper:CLAIMS",
)

__getattr__ = lazily(
    __name__,
    TrainedAuxiliary="constructions.interchange.decoder",
    decoder="constructions.interchange.decoder",
    logits="constructions.interchange.decoder",
    load_auxiliary="constructions.interchange.huggingface",
    save_auxiliary="constructions.interchange.huggingface",
    MODES="constructions.tint.algorithm",
    Backward="constructions.tint.algorithm",
    Outcome="constructions.tint.construction",
    Tint="constructions.tint.construction",
)
