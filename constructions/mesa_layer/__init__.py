"""The mesa layer: causal ridge regression of values on keys, read by queries.

layer                  `mesa`, all times of a sequence, and `mesa_attention`, its weights
decoding               `mesa_start`, `mesa_step`: one token after another
implicit               o_t = G_t (H_t + ridge)^-1 q_t and its derivative, for any method below
chunked                exact, by products of matrices
recursive              exact, token by token
conjugate_gradients    for any gates
cholesky               the reference
orthogonal             ill-conditioned times, and decoding: rotations of the data in float64
problem                the linear systems of all times
products               causal sums, chunk by chunk
triangular             inverse Cholesky factors of many small matrices
arguments              what may be given
"""

from constructions.mesa_layer.orthogonal import MesaState, mesa_start, mesa_step
from constructions.mesa_layer.layer import METHODS, mesa, mesa_attention

__all__ = ["METHODS", "MesaState", "mesa", "mesa_attention", "mesa_start", "mesa_step"]
