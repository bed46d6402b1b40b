"""A transformer that trains a transformer in its forward pass (Panigrahi et al. 2023, 2307.01189).

auxiliary     the small decoder that is trained: its shape, and models fitted to text of a grammar
checkpoint    the same out of, and into, a local folder of weights in Hugging Face format
formats       names and settings of such folders, for GPT-2 and OPT
weights       the weights of a decoder by name, out of a model's arrays and back
layout        kinds of tokens and slots: weights in prefix tokens, activations in the text's
backward      how each part goes back: as in the paper, exactly, or by finite differences
parts         what a token does with its own values
prefix        a matrix in prefix tokens: forward, transposed, and its descent
attention     attention and its gradient as heads
norms         LayerNorms, forward and back
words         embeddings, positions and the readout
tableau       the whole program
contents      what tokens hold at first, and where the results stand
algorithm     the same by autograd
checks        settings and inputs that it takes
construction  the family
counterpart   itself, trained further, and simulators that are nearly right
claims        whether it stays what it is when it is trained further
sizes         counts of simulators of published models, beside the paper's
measurements  how near a step is to gradient descent, and what it is worth on text
hardness      what value-only attention drops, and a bound on it
labels        labels of words, learnt in context, by descent and by simulation
"""

from typing import TYPE_CHECKING

from constructions.catalogue import Family, lazily

if TYPE_CHECKING:
    from constructions.interchange.decoder import TrainedAuxiliary as TrainedAuxiliary
    from constructions.interchange.decoder import decoder as decoder
    from constructions.interchange.decoder import logits as logits
    from constructions.interchange.huggingface import load_auxiliary as load_auxiliary
    from constructions.interchange.huggingface import save_auxiliary as save_auxiliary
    from constructions.tint.algorithm import MODES as MODES
    from constructions.tint.algorithm import Backward as Backward
    from constructions.tint.construction import Outcome as Outcome
    from constructions.tint.construction import Tint as Tint

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

__all__ = [
    "MODES",
    "TINT",
    "Backward",
    "Outcome",
    "Tint",
    "TrainedAuxiliary",
    "decoder",
    "load_auxiliary",
    "logits",
    "save_auxiliary",
]
