r"""Linear attention out of softmax heads, as a rewrite of programs.

Two softmax heads with scores +eps s and -eps s have weights that differ by 2 eps / N times what is
linear in s. Over N keys alone (von Oswald et al. 2022, arXiv 2212.07677, appendix A.9)

    N / (2 eps) (softmax(eps s) - softmax(-eps s))_j  =  s_j - mean(s) + O(eps^2),

which is centred attention: the mean is lost. A null token, of value 0 and constant score c, takes
nearly all of the weight, so that what is left has nothing to be normalised by:

    e^c / (2 eps) (softmax(eps s, c) - softmax(-eps s, c))_j  =  s_j (1 + O(eps^2 s^2) + O(N e^-c)),

linear attention itself. Rounding adds about the precision over eps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Affine, Slot, Slots, concatenate, constant
from synthetic.guards import number

#: The token group of the null token, and the slot that is 1 there and 0 elsewhere.
NULL = "null"


def soften(
    program: Program,
    *,
    scale: float | int,
    null_score: float | int | None = None,
    num_keys: int | None = None,
) -> Program:
    """The same program with softmax heads only: two for each of its linear heads.

    With `null_score`, the program has one slot and one kind of token more, both called "null": the
    last column is 1 at the null token, which stands behind the others and holds nothing else.
    `constructions.softened.Softened` appends it. A head whose score is one constant
    over one key (an erase) needs neither: the softmax of one key is 1.

    Args:
        program: its heads are linear.
        scale: eps, above 0. The best is about (48 u)^(1/3) over the largest score, with u the
            precision of the dtype: 2e-5 in float64, 0.02 in float32 for scores up to 1; see
            `constructions.softened.Softened`.
        null_score: c; about 25. None: no null token, and centred attention instead.
        num_keys: N of the centred version, the number of keys that a query sees.

    Raises:
        TypeError: a head has another mixer; names the layer and the head.
        ValueError: an argument is out of range, or only one of two that need each other is given;
            the program has a null token already.
    """
    number("scale", scale, above=0)
    if (null_score is None) == (num_keys is None):
        raise ValueError(
            f"null_score is {null_score!r} and num_keys is {num_keys!r}; give one of them: "
            "null_score for linear attention, num_keys for centred attention"
        )
    if null_score is not None:
        number("null_score", null_score, above=0, below=80)
    if num_keys is not None:
        number("num_keys", num_keys, least=1)
    for place, layer in enumerate(program.layers, start=1):
        for head in layer.single_heads:
            if head.mixer != "linear":
                raise TypeError(
                    f"layer {place}, head '{head.name}' has mixer '{head.mixer}'; "
                    "only linear heads can be softened"
                )
    if NULL in program.token_groups:
        raise ValueError(f"token groups are {program.token_groups}, '{NULL}' among them already")
    if null_score is None:
        assert num_keys is not None
        return replace(program, layers=[_centred(la, scale, num_keys) for la in program.layers])
    slots = Slots()
    for slot in program.slots:
        slots.keep(slot)
    null = slots.keep(Slot(NULL, 1, program.slots.width, meaning="1 at the null token"))
    layers = [_with_null(layer, program, null, scale, null_score) for layer in program.layers]
    groups = (*program.token_groups, NULL)
    return replace(program, slots=slots, layers=layers, token_groups=groups)


def _centred(layer: Layer, scale: float | int, num_keys: int) -> Layer:
    heads = []
    for head in layer.single_heads:
        heads += [_one_key(head)] if _is_one_key(head) else _pair(head, scale, num_keys)
    return replace(layer, heads=heads)


def _with_null(
    layer: Layer, program: Program, null: Slot, scale: float | int, score: float | int
) -> Layer:
    """Nothing but the softmax may see the null token: all that acts everywhere is limited."""
    own = program.token_groups

    def limit(part: Any) -> Any:
        return (
            part
            if part is None or part.token_groups is not None
            else replace(part, token_groups=own)
        )

    heads = []
    for head in layer.single_heads:
        if head.erases is not None:  # of nothing, at the null token
            heads.append(_one_key(head))
            continue
        head = replace(head, queries=head.queries or own, keys=head.keys or own)
        if _is_one_key(head):
            heads.append(_one_key(head))
            continue
        heads += [
            replace(
                half,
                query=concatenate(half.scale * half.query, constant(1.0)),
                key=concatenate(_nothing_at(null, half.key), score * null),
                value=_nothing_at(null, half.value),
                scale=1.0,
                sinks=(*half.sinks, NULL),
            )
            for half in _pair(head, scale, math.exp(score))
        ]
    return replace(layer, heads=heads, mlp=limit(layer.mlp), norm=limit(layer.norm))


def _pair(head: Head, scale: float | int, keys: float | int) -> list[Head]:
    """keys / (2 eps) (softmax(eps s) - softmax(-eps s)), as two heads."""
    pair = []
    for sign in (1.0, -1.0):
        write = {slot: sign * keys / (2 * scale) * m for slot, m in head.write.items()}
        name = f"{head.name}, {'plus' if sign > 0 else 'minus'}"
        pair.append(
            replace(head, mixer="softmax", scale=sign * scale * head.scale, write=write, name=name)
        )
    return pair


def _is_one_key(head: Head) -> bool:
    """Whether every query sees one key at most, with a score that is the same everywhere."""
    low, high = head.window
    alone = low is not None and low == high and not head.sinks
    return alone and not head.query.terms and not head.key.terms


def _one_key(head: Head) -> Head:
    score = head.scale * float(head.query.constant @ head.key.constant)
    return replace(head, mixer="softmax", write={slot: score * m for slot, m in head.write.items()})


def _nothing_at(null: Slot, expression: Affine) -> Affine:
    """The expression less its constant part where the slot `null` is 1."""
    offset = expression.constant
    return expression - offset[:, None] @ null if offset.any() else expression
