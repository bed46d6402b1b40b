"""Matrices of affine maps as sums of blocks; a multiple of the identity is one number.

What programs read and write are mostly slots, slices of slots and multiples of them. As blocks they
cost nothing whatever the size of a slot, and the slot-wise evaluator sees at once where no product
is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy.sparse import coo_array


@dataclass(frozen=True, eq=False)
class Block:
    """`content` at rows row, row + 1, ... and columns column, column + 1, ... of a matrix.

    Attributes:
        row, column: the first ones.
        shape: (rows, columns).
        content: a dense matrix of this shape, or c for c times the identity.
    """

    row: int
    column: int
    shape: tuple[int, int]
    content: float | np.ndarray

    @property
    def rows(self) -> slice:
        """The rows that it covers."""
        return slice(self.row, self.row + self.shape[0])

    @property
    def columns(self) -> slice:
        """The columns that it covers."""
        return slice(self.column, self.column + self.shape[1])

    @property
    def is_dense(self) -> bool:
        """Whether its content is a matrix."""
        return isinstance(self.content, np.ndarray)

    @property
    def place(self) -> tuple[int, int, tuple[int, int], bool]:
        """Where it is, and whether it is dense."""
        return self.row, self.column, self.shape, self.is_dense


class Matrix:
    """A sum of blocks of shape `[rows, columns]`; numpy takes it as the dense matrix it stands for.

    Made by `Matrix.identity`, `Matrix.of` and arithmetic: sums, multiples, row slices, products
    with dense matrices from the left, and `stack`.
    """

    __array_ufunc__ = (
        None  # lets numpy arrays and scalars defer `matrix @ m` and `scalar * m` to us
    )

    def __init__(self, shape: tuple[int, int], blocks: Sequence[Block] = ()) -> None:
        self.shape, self.blocks = shape, tuple(blocks)

    def __repr__(self) -> str:
        return f"<Matrix {self.shape[0]} x {self.shape[1]}>"

    @staticmethod
    def identity(size: int, factor: float = 1.0) -> Matrix:
        """factor times the identity."""
        return Matrix((size, size), _tidy([Block(0, 0, (size, size), float(factor))]))

    @staticmethod
    def of(matrix: Any) -> Matrix:
        """A dense matrix (copied), or a `Matrix` as it is."""
        if isinstance(matrix, Matrix):
            return matrix
        dense = np.asarray(matrix, float)
        rows, columns = (np.flatnonzero(dense.any(axis)) for axis in (1, 0))
        if not len(rows):
            return Matrix(dense.shape)
        row, column = int(rows[0]), int(columns[0])
        box = dense[row : rows[-1] + 1, column : columns[-1] + 1]
        content: float | np.ndarray = float(box[0, 0])
        one = box.shape[0] == box.shape[1] and content != 0 and (box.diagonal() == content).all()
        one = one and np.count_nonzero(box) == len(box)
        return Matrix(dense.shape, [Block(row, column, box.shape, content if one else box.copy())])

    @property
    def nonzeros(self) -> int:
        """Number of entries that are not 0."""
        if not any(_overlap(a, b) for a, b in combinations(self.blocks, 2)):
            return sum(
                int(np.count_nonzero(b.content))
                if isinstance(b.content, np.ndarray)
                else b.shape[0] * (b.content != 0)
                for b in self.blocks
            )
        parts = [_entries(block) for block in self.blocks]
        row, column, value = (np.concatenate(p) for p in zip(*parts, strict=True))
        total = coo_array((value, (row, column)), self.shape).tocsr()
        return int(np.count_nonzero(total.data))

    def any(self) -> bool:
        """Whether some entry is not 0."""
        return self.nonzeros > 0

    def add_to(self, dense: np.ndarray) -> None:
        """Add it to a dense array of its shape, in place."""
        for block in self.blocks:
            if isinstance(block.content, np.ndarray):
                dense[block.rows, block.columns] += block.content
            else:
                steps = np.arange(block.shape[0])
                dense[block.row + steps, block.column + steps] += block.content

    def placed(self, rows: int, row: int) -> Matrix:
        """A matrix of `rows` rows that holds this one from row `row` on and is zero elsewhere."""
        shape = (rows, self.shape[1])
        return Matrix(shape, [replace(b, row=b.row + row) for b in self.blocks])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a Matrix has no dense array that could be shared; copy is False")
        dense = np.zeros(self.shape)
        self.add_to(dense)
        return dense if dtype is None else dense.astype(dtype)

    def __add__(self, other: Matrix) -> Matrix:
        if not isinstance(other, Matrix):
            return NotImplemented
        return Matrix(self.shape, _tidy([*self.blocks, *other.blocks]))

    def __mul__(self, scalar: Any) -> Matrix:
        if np.ndim(scalar) != 0 or isinstance(scalar, Matrix):
            return NotImplemented
        factor = float(scalar)
        blocks = [replace(b, content=factor * b.content) for b in self.blocks]
        return Matrix(self.shape, _tidy(blocks) if factor else ())

    __rmul__ = __mul__

    def __getitem__(self, rows: Any) -> Matrix:
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            return Matrix.of(np.asarray(self)[rows])
        start, stop, _ = rows.indices(self.shape[0])
        stop = max(start, stop)
        cut = (_cut(block, start, stop) for block in self.blocks)
        return Matrix((stop - start, self.shape[1]), [block for block in cut if block is not None])

    def __matmul__(self, other: Any) -> np.ndarray:
        return np.asarray(self) @ other

    def __rmatmul__(self, dense: np.ndarray) -> Matrix:
        product = np.zeros((dense.shape[0], self.shape[1]))
        for b in self.blocks:
            if isinstance(b.content, np.ndarray):
                product[:, b.columns] += dense[:, b.rows] @ b.content
            else:
                product[:, b.columns] += dense[:, b.rows] * b.content
        return Matrix.of(product)

    def equals(self, other: Matrix) -> bool:
        """Whether it is written in the same way: same blocks, in the same order."""
        return self is other or (
            self.shape == other.shape
            and len(self.blocks) == len(other.blocks)
            and all(
                a is b or (a.place == b.place and np.array_equal(a.content, b.content))
                for a, b in zip(self.blocks, other.blocks, strict=True)
            )
        )


def stack(parts: Sequence[Matrix]) -> Matrix:
    """Matrices with equally many columns, one below the other."""
    rows, blocks = 0, []
    for part in parts:
        blocks += [replace(b, row=b.row + rows) for b in part.blocks]
        rows += part.shape[0]
    return Matrix((rows, parts[0].shape[1]), _tidy(blocks))


def beside(*parts: Matrix) -> Matrix:
    """Matrices with equally many rows, one to the right of the other."""
    columns, blocks = 0, []
    for part in parts:
        blocks += [replace(b, column=b.column + columns) for b in part.blocks]
        columns += part.shape[1]
    return Matrix((parts[0].shape[0], columns), _tidy(blocks))


def _tidy(blocks: Sequence[Block]) -> list[Block]:
    """The same matrix in fewer blocks.

    Blocks of the same rows and columns are added up. A multiple c I that continues another, c I
    right behind it along the same diagonal, becomes one with it. Blocks of zeros are left out.
    """
    found: dict[Any, Block] = {}
    for b in blocks:
        same = found.get(b.place)
        found[b.place] = b if same is None else replace(b, content=same.content + b.content)
    result: list[Block] = []
    for b in found.values():
        last = result[-1] if result else None
        if isinstance(b.content, np.ndarray):
            result.append(b)
        elif last is not None and b.content and _goes_on(last, b):
            size = last.shape[0] + b.shape[0]
            result[-1] = replace(last, shape=(size, size))
        elif b.content:
            result.append(b)
    return result


def _goes_on(last: Block, b: Block) -> bool:
    """Whether `b`, a multiple of the identity, is on the same diagonal right behind `last`."""
    return (
        not isinstance(last.content, np.ndarray)
        and last.content == b.content
        and (last.row + last.shape[0], last.column + last.shape[1]) == (b.row, b.column)
    )


def _cut(b: Block, start: int, stop: int) -> Block | None:
    """The part of a block in rows start to stop, with rows counted from start."""
    low, high = max(b.row, start), min(b.row + b.shape[0], stop)
    if low >= high:
        return None
    if isinstance(b.content, np.ndarray):
        content = b.content[low - b.row : high - b.row]
        return replace(b, row=low - start, shape=content.shape, content=content)
    column = b.column + low - b.row
    return replace(b, row=low - start, column=column, shape=(high - low, high - low))


def _overlap(a: Block, b: Block) -> bool:
    return all(
        max(p, q) < min(p + m, q + n)
        for p, q, m, n in zip((a.row, a.column), (b.row, b.column), a.shape, b.shape, strict=True)
    )


def _entries(b: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of the nonzero entries."""
    if isinstance(b.content, np.ndarray):
        row, column = np.nonzero(b.content)
        return row + b.row, column + b.column, b.content[row, column]
    steps = np.arange(b.shape[0])
    return b.row + steps, b.column + steps, np.full(len(steps), b.content)
