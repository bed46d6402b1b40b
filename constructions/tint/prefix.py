"""What is done with a matrix in prefix tokens: three linear heads for each row that a token holds.

With token k holding row k of [W b] and the one-hot number e_k,

    y   =  sum_k <[w_k b_k], (x, 1)> e_k          the text looks at the matrix    W x + b
    dx  =  sum_k <e_k, dy> w_k                    the text looks at the matrix    W^T dy
    [w_k b_k]  -=  eta sum_t <e_k, dy_t> (x_t, 1) the matrix looks at the text    dy x^T

Panigrahi et al. 2023 (arXiv 2307.01189), sections on linear layers; their stacking is the rows of
a token, their sharding the parts into which a row is cut.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from constructions.program import Head
from constructions.slots import Affine, Slot, concatenate
from constructions.tint.layout import TEXT, StoredMatrix
from constructions.tint.parts import ONE


class Prefix(NamedTuple):
    """A matrix, the learning rate of its descent, and the number of parts of a row."""

    weights: StoredMatrix
    rate: float
    shards: int

    def apply(self, x: Affine, y: Slot) -> list[Head]:
        """y += W x + b."""
        w, augmented = self.weights, concatenate(x, ONE)
        return [
            Head(
                query=augmented[part],
                key=w.now(row)[part],
                value=w.number,
                write={y[w.part(row)]: 1.0},
                queries=TEXT,
                keys=w.group,
                name=f"{w.group}, row {row}",
            )
            for row in range(len(w.rows))
            for part in self._parts(augmented.size)
        ]

    def transpose(self, dy: Slot, dx: Slot) -> list[Head]:
        """dx += W^T dy."""
        w = self.weights
        return [
            Head(
                query=dy[w.part(row)],
                key=w.number,
                value=w.now(row)[part],
                write={dx[part]: 1.0},
                queries=TEXT,
                keys=w.group,
                name=f"{w.group} transposed, row {row}",
            )
            for row in range(len(w.rows))
            for part in self._parts(dx.size)
        ]

    def descend(self, dy: Slot, x: Slot) -> list[Head]:
        """[W b] -= eta sum_t dy_t (x_t, 1)^T."""
        w, augmented = self.weights, concatenate(x, ONE)
        return [
            Head(
                query=w.number,
                key=dy[w.part(row)],
                value=augmented[part],
                write={change[part]: -self.rate},
                queries=w.group,
                keys=TEXT,
                name=f"{w.group} descends, row {row}",
            )
            for row, change in enumerate(w.changes)
            for part in self._parts(augmented.size)
        ]

    def _parts(self, size: int) -> list[slice]:
        cuts = np.linspace(0, size, self.shards + 1).astype(int).tolist()
        return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
