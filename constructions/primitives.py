r"""The small parts that algorithms are put together from, as heads and MLPs over slots.

| part | computes | by | exact |
|---|---|---|---|
| `relu` | [x]_+ = max(x, 0) | an MLP of one unit for each number | yes |
| `clip` | min(max(x, low), high) | four ReLU units for each | yes; x itself inside |
| `soft_threshold` | sign(x) max(abs(x) - t, 0) | two ReLU units for each | yes; 0 inside |
| `sign` | -1, 0 or 1 | two units whose activation is a step | yes, without a gradient |
| `product` | a b | a gated MLP without an activation | yes |
| `count` | sum_j <q_i, k_j> | a linear head with value 1 | yes |
| `previous` | the value of the token before | a linear head with one offset | yes |
| `argmax` | the value where a score is largest | softmax | up to exp(-sharpness gap) |
| `after_last` | the value behind the last occurrence of a word | softmax | up to exp(-sharpness) |

What each returns goes into a `Layer` like any head or MLP; `write` is theirs, {slot: number or
matrix}. Sums of parts stand in one layer as heads do; an MLP reads what the heads of its layer
write. In place, a part is written onto what it reads with its difference: soft-thresholding w is
`clip(w, -t, t, {w: -1.0})`, since S_t(w) = w - clip(w, -t, t).

More parts stand where they were needed first: `program.erase` clears a slot, a `Norm` of kind "rms"
of one number is its sign too (to rounding, far from 0), a head of mixer "mesa" is ridge regression,
`softmax.soften` makes softmax heads of linear ones, and `kernel_descent.interpolant` puts ReLU
units together to any piecewise linear function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from constructions.core.program import CAUSAL, EVERYWHERE, Head, Mlp, Window
from constructions.core.slots import Affine, concatenate, constant
from synthetic.guards import number

Groups = str | Sequence[str] | None
Write = Mapping[Any, Any]


def relu(read: Affine, write: Write, *, token_groups: Groups = None) -> Mlp:
    """slot += max(read, 0).

    Args:
        read: any number of rows.
        write: {slot: number, or matrix [slot.size, read.size]}.
        token_groups: where; None: everywhere.
    """
    return Mlp(read, write, token_groups=token_groups, name="relu")


def clip(
    read: Affine, low: float | int, high: float | int, write: Write, *, token_groups: Groups = None
) -> Mlp:
    """slot += min(max(read, low), high) = (r(x) - r(x - high)) - (r(-x) - r(low - x)), r = ReLU.

    Steep, `clip(x * (1 / width), -1, 1, ...)`, it is the sign of numbers of at least `width`, and
    unlike `sign` it can be trained.

    Args:
        read, write, token_groups: as in `relu`.
        low, high: at most 0 and at least 0; what lies elsewhere is shifted: x - c is clipped to
            low - c and high - c.

    Raises:
        ValueError: a bound is not finite, or on the other side of 0.
    """
    low, high = number("low", low), number("high", high, least=0)
    if low > 0:
        raise ValueError(f"low is {low!r}, must be a finite number of at most 0")
    units = [(1, read), (-1, read - high), (-1, -read), (1, low - read)]
    return _units(units, write, token_groups, "clip")


def soft_threshold(
    read: Affine, threshold: float | int, write: Write, *, token_groups: Groups = None
) -> Mlp:
    """slot += S_t(read) = max(read - t, 0) - max(-read - t, 0), the proximal map of t |x|_1.

    Args:
        read, write, token_groups: as in `relu`.
        threshold: t, at least 0.

    Raises:
        ValueError: the threshold is negative or not finite.
    """
    t = number("threshold", threshold, least=0)
    return _units([(1, read - t), (-1, -read - t)], write, token_groups, "soft threshold")


def sign(read: Affine, write: Write, *, token_groups: Groups = None) -> Mlp:
    """slot += sign(read), 0 at 0: two steps, [x > 0] - [-x > 0].

    Args:
        read, write, token_groups: as in `relu`.
    """
    units = [(1, read), (-1, -read)]
    return _units(units, write, token_groups, "sign", "relu_derivative")


def product(a: Affine, b: Affine, write: Write, *, token_groups: Groups = None) -> Mlp:
    """slot += a b, number by number.

    Args:
        a, b: equally many rows.
        write, token_groups: as in `relu`.

    Raises:
        ValueError: their rows differ.
    """
    return Mlp(a, write, b, "identity", token_groups, name="product")


def count(
    query: Affine,
    key: Affine,
    write: Write,
    *,
    queries: Groups = None,
    keys: Groups = None,
    window: Window = EVERYWHERE,
) -> Head:
    """slot_i += sum_j <query_i, key_j>: of one-hot words, how often the word of i occurs.

    Args:
        query, key: equally many rows; `constant(1.0)` twice counts tokens.
        write: {slot of one column: number}.
        queries, keys, window: as in `Head`; window=(None, -1) counts earlier tokens only.
    """
    one = constant(1.0)
    return Head(query, key, one, write, queries=queries, keys=keys, window=window, name="count")


def previous(
    value: Affine, write: Write, *, offset: int = 1, queries: Groups = None, keys: Groups = None
) -> Head:
    """slot_i += value_{i - offset}; nothing is added where there is no such token.

    Args:
        value, write: as in `Head`.
        offset: how many tokens before, at least 1.
        queries, keys: as in `Head`.

    Raises:
        ValueError: the offset is no such integer.
    """
    back, one = -number("offset", offset, whole=True, least=1), constant(1.0)
    return Head(
        one, one, value, write, queries=queries, keys=keys, window=(back, back), name="previous"
    )


def argmax(
    score: Affine,
    value: Affine,
    write: Write,
    *,
    sharpness: float | int,
    queries: Groups = None,
    keys: Groups = None,
    window: Window = EVERYWHERE,
) -> Head:
    """slot_i += value_j of the token j with the largest score.

    The softmax of sharpness times the score puts at most (N - 1) exp(-sharpness gap) beside it, for
    N tokens and a gap between the largest two scores; tokens with equal scores share.

    Args:
        score: one row.
        value, write, queries, keys, window: as in `Head`.
        sharpness: above 0.

    Raises:
        ValueError: the sharpness is out of range, or the score has several rows.
    """
    scale = number("sharpness", sharpness, above=0)
    return Head(
        constant(1.0), score, value, write, "softmax", queries, keys, window, scale=scale,
        name="argmax",
    )  # fmt: skip


def after_last(
    word: Affine,
    before: Affine,
    position: Affine,
    value: Affine,
    write: Write,
    *,
    length: int,
    sharpness: float | int,
    queries: Groups = None,
    keys: Groups = None,
) -> Head:
    """slot_i += value_{j + 1}, where j < i is the last token with the word of i.

    An induction head that prefers the latest: scores are length <word_i, before_j> + position_j, so
    that any match outweighs all positions, and among matches the next one is 1 behind. At most
    exp(-sharpness) / (1 - exp(-sharpness)) of the weight is elsewhere. Where the word has not
    occurred, the value is that of token i itself.

    Args:
        word: one-hot, at every token.
        before: the word of the token before; `previous(word, {before: 1.0})` writes it, in an
            earlier layer.
        position: one row, the token's number, 0 to length - 1.
        value, write, queries, keys: as in `Head`; `value` is read at the token that is copied.
        length: of the longest sequence.
        sharpness: above 0.

    Raises:
        ValueError: a number is out of range, or rows do not fit.
    """
    scale = number("sharpness", sharpness, above=0)
    match = float(number("length", length, whole=True, least=1)) * before
    query, key = concatenate(word, constant(1.0)), concatenate(match, position)
    return Head(
        query, key, value, write, "softmax", queries, keys, CAUSAL, scale=scale, name="after last"
    )


def _units(
    units: Sequence[tuple[int, Affine]],
    write: Write,
    token_groups: Groups,
    name: str,
    activation: str = "relu",
) -> Mlp:
    """slot += M sum_n sign_n act(hidden_n)."""
    size = units[0][1].size

    def outputs(m: Any) -> np.ndarray:
        matrix = np.asarray(m, float)
        matrix = matrix * np.eye(size) if matrix.ndim == 0 else matrix
        return np.hstack([s * matrix for s, _ in units])

    hidden = concatenate(*(part for _, part in units))
    every = {slot: outputs(m) for slot, m in write.items()}
    return Mlp(hidden, every, activation=activation, token_groups=token_groups, name=name)
