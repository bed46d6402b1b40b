"""The mesa layer: causal ridge regression of values on keys, read by queries.

layer        `mesa`, all times of a sequence, `mesa_attention`, its weights, and `reference`
solvers      four methods to solve its linear systems, and the layer by any of them
orthogonal   rotations of the data in float64: ill-conditioned times; `mesa_start`, `mesa_step`,
             one token after another
problem      what may be given, the linear systems, causal sums chunk by chunk, inverse factors
"""

from constructions.mesa_layer.layer import METHODS, mesa, mesa_attention
from constructions.mesa_layer.orthogonal import MesaState, mesa_start, mesa_step

__all__ = ["METHODS", "MesaState", "mesa", "mesa_attention", "mesa_start", "mesa_step"]
