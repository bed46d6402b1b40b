"""What every head, MLP and norm adds to which slot, as an equation.

A head of gradient descent, for example, reads

    y += -0.06 Σⱼ (xᵢ·xⱼ) yⱼ        j in context

with i the token at which it acts and j a token that it attends to. M stands for a matrix that is no
multiple of the identity, T for a tensor of a family of heads, ⊙ for a product entry by entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from constructions.core.slots import Affine, Slot

MOST_ROWS = 6  # pieces of one vector that are written out
AT_I, AT_J = "ᵢ", "ⱼ"
_ONE_NUMBER = r"[−-]?\d+(?:\.\d+)?(?:e[−+-]?\d+)?"
_NUMBER = re.compile(rf"(?<![A-Za-z]){_ONE_NUMBER}(?:…{_ONE_NUMBER})?")


def decimal(value: float) -> str:
    """A number as it stands in an equation."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


def skeleton(text: str) -> str:
    """A text without its numbers."""
    return re.sub(r"\s+", " ", _NUMBER.sub("", text)).strip(" ,")


def merged(texts: Sequence[str]) -> str:
    """Texts that differ in numbers only, as one: "layer 1…3"; else the first of them."""
    found, words = [_NUMBER.findall(text) for text in texts], _NUMBER.split(texts[0])
    if any(_NUMBER.split(text) != words for text in texts):
        return texts[0]
    numbers = []
    for same in zip(*found, strict=True):
        ends = dict.fromkeys(end for number in same for end in number.split("…"))
        kinds = sorted(ends, key=lambda n: float(n.replace("−", "-")))
        numbers.append(kinds[0] if len(kinds) == 1 else f"{kinds[0]}…{kinds[-1]}")
    joined = "".join(w + n for w, n in zip(words, [*numbers, ""], strict=True))
    return re.sub(r"\[[^\]]*…[^\]]*\]", "[…]", joined)  # slices that move


def short(name: str) -> str:
    """The name of a slot in an equation: without what stands in front of a colon."""
    return name.rpartition(": ")[2]


def affine(e: Affine, at: str = "") -> str:
    """An affine map of slots, each marked with the token at which it is read."""
    cuts = {0, e.size}
    for m in e.terms.values():
        cuts |= {row for b in m.blocks for row in (b.row, b.row + b.shape[0])}
    cuts |= set((np.flatnonzero(np.diff(e.constant)) + 1).tolist())
    if len(cuts) > MOST_ROWS + 1:
        names = "; ".join(short(slot.name) + at for slot in e.terms)
        return f"({names}; 1)" if e.constant.any() else f"({names})"
    ends = sorted(cuts)
    rows = [_rows(e, a, b, at) for a, b in zip(ends, ends[1:], strict=False)]
    return rows[0] if len(rows) == 1 else f"({'; '.join(rows)})"


def _rows(e: Affine, first: int, last: int, at: str) -> str:
    """Rows first to last, in which no block begins or ends."""
    terms: list[tuple[float, str]] = []
    for slot, m in e.terms.items():
        for b in m.blocks:
            if not b.row <= first < b.row + b.shape[0]:
                continue
            name = short(slot.name) + at
            if isinstance(b.content, np.ndarray):
                terms.append(_dense(b.content[first - b.row : last - b.row], slot, name))
            else:
                start = b.column + first - b.row
                if last - first < slot.size:
                    name = f"{short(slot.name)}[{start}:{start + last - first}]{at}"
                terms.append((b.content, name))
    constant = e.constant[first:last]
    if constant.any() or not terms:
        same = (constant == constant[0]).all()
        terms.append((float(constant[0]), "") if same else (1.0, "b"))
    text = ""
    for number, (factor, name) in enumerate(terms):
        sign = "−" if factor < 0 else ""
        joint = f" {sign or '+'} " if number else sign
        text += joint + times(abs(factor), name)
    return text


def _dense(matrix: np.ndarray, slot: Slot, name: str) -> tuple[float, str]:
    entry = float(matrix.flat[0])
    if (matrix == entry).all():  # one number everywhere
        if slot.size == 1:
            return entry, name
        if len(matrix) == 1:
            return entry, f"sum({name})"
    return 1.0, f"M {name}"


def times(factor: float, text: str) -> str:
    """factor times text; a text of "" is 1."""
    if not text:
        return decimal(factor)
    if factor == 1:
        return text
    return f"−{text}" if factor == -1 else f"{decimal(factor)} {text}"


def _closed(text: str) -> str:
    """In brackets, where it is a sum."""
    depth = 0
    for n, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth and n and letter in "+−" and text[n - 1] == " ":
            return f"({text})"
    return f"({text})" if text.startswith("−") else text


def _one(e: Affine) -> float | None:
    """The number that it is at every token, None where it reads a slot or has several rows."""
    return float(e.constant[0]) if e.size == 1 and not e.terms else None


def _product(left: Affine, right: Affine, ends: tuple[str, str]) -> tuple[float, str]:
    """A number times the product of what two tokens read; "" is 1."""
    a, b = _one(left), _one(right)
    if a is not None and b is not None:
        return a * b, ""
    if a is not None or b is not None:
        expr, at, factor = (right, ends[1], a) if a is not None else (left, ends[0], b)
        return float(factor or 0.0), _closed(affine(expr, at))
    for one, other, at in ((left, right, ends[1]), (right, left, ends[0])):
        if not one.terms and (one.constant == one.constant[0]).all():
            return float(one.constant[0]), f"sum({affine(other, at)})"
    (a, left), (b, right) = _scaled(left), _scaled(right)
    return a * b, f"{_closed(affine(left, ends[0]))}·{_closed(affine(right, ends[1]))}"


def _scaled(e: Affine) -> tuple[float, Affine]:
    """A number times an affine map, the number 1 unless the map is a multiple of one slot."""
    blocks = [block for m in e.terms.values() for block in m.blocks]
    if e.constant.any() or len(blocks) != 1 or blocks[0].is_dense or blocks[0].shape[0] != e.size:
        return 1.0, e
    factor = float(blocks[0].content)
    return factor, (1 / factor) * e


@dataclass(frozen=True)
class Part:
    """A head, a family of heads, an MLP or a norm, as a reader wants it.

    Attributes:
        kind: its mixer, or "MLP", or "norm".
        name: its own.
        reads: (slot, what it is read as) in the order of reading.
        writes: slots.
        equations: one for each slot that is written.
        where: which tokens i and j are; "" where they are any.
        heads: how many heads it stands for.
    """

    kind: str
    name: str
    reads: tuple[tuple[Slot, str], ...]
    writes: tuple[Slot, ...]
    equations: tuple[str, ...]
    where: str = ""
    heads: int = 1


ROLES = {"query": "q", "key": "k", "value": "v"}


def of_head(head: Any) -> Part:
    """A `Head` or a `HeadFamily`."""
    reads = tuple((slot, ROLES.get(part, "f")) for part, slot, _ in head.reads())
    family = hasattr(head, "terms")
    lines = dict(_family(head) if family else _head(head))
    heads = head.write.size if family else 1
    where = _where(head)
    return Part(head.mixer, head.name, reads, tuple(lines), tuple(lines.values()), where, heads)


def _family(family: Any) -> Iterator[tuple[Slot, str]]:
    at = (AT_I, AT_I if family.window == (0, 0) else AT_J)
    products = [
        f"{short(left.name)}{at[0]} T {short(right.name)}{at[1]}" for left, right, _ in family.terms
    ]
    alike: dict[str, list[str]] = {}
    for product in products:
        alike.setdefault(skeleton(product), []).append(product)
    sums = ("Σ " * (len(same) > 1) + merged(same) for same in alike.values())
    yield family.write, f"{short(family.write.name)} += {' + '.join(sums)}"


def _head(head: Any) -> Iterator[tuple[Slot, str]]:
    low, high = head.window
    single = low is not None and low == high
    at = (AT_I, AT_I if single and low == 0 else AT_J)
    scale, score = _product(head.query, head.key, at)
    scale *= head.scale
    factor, second = 1.0, ""
    if head.factor is not None:
        factor, second = _product(head.factor[0], head.factor[1], at)
    for slot, matrix in head.write.items():
        place, number, value = _written(slot, matrix, head.value)
        one = _one(value)
        values = "" if one is not None else affine(value, at[1])
        if one == 0 or values == "0":
            continue
        number *= 1.0 if one is None else one
        if values.startswith("−") and _closed(values[1:]) == values[1:]:
            number, values = -number, values[1:]
        if second:
            values = f"({second}) {_closed(values)}".strip()
        number *= factor
        total = "" if single else f"Σ{AT_J} "
        if head.mixer == "mesa":
            ridge = f"ridge regression of {values} on {affine(head.key, AT_J)}"
            body = f"{ridge}, λ = {decimal(head.regularization)}, at {affine(head.query, AT_I)}"
        elif head.mixer == "linear":
            number *= scale
            weights = f"({score}) " if score else ""
            alone = number == 1 and not total and not weights
            counted = "1" if total and not weights and not values else values
            body = f"{total}{weights}{counted if alone else _closed(counted)}".strip()
        elif not score and head.mixer == "softmax":
            body = f"mean{AT_J} {_closed(values)}"
        else:
            over = AT_I if head.mixer == "transposed_softmax" else AT_J
            name = "softmax" if head.mixer.endswith("softmax") else head.mixer
            body = f"{total}{name}{over}({times(scale, score)}) {_closed(values)}".strip()
        yield slot, f"{place} += {times(number, body)}"


def _written(slot: Slot, matrix: Any, value: Affine) -> tuple[str, float, Affine]:
    """Where a head writes, a number, and the affine map that is written there times it."""
    blocks = matrix.blocks
    low = min((b.row for b in blocks), default=0)
    high = max((b.row + b.shape[0] for b in blocks), default=slot.size)
    name = short(slot.name)
    place = name if high - low == slot.size else f"{name}[{low}:{high}]"
    if len(blocks) == 1 and not blocks[0].is_dense and blocks[0].shape[1] == value.size:
        return place, blocks[0].content, value
    written = np.asarray(matrix)[low:high] @ value
    factors = {abs(b.content) for m in written.terms.values() for b in m.blocks if not b.is_dense}
    dense = any(b.is_dense for m in written.terms.values() for b in m.blocks)
    if len(factors) == 1 and not dense and not written.constant.any():
        (factor,) = factors
        return place, factor, (1 / factor) * written
    return place, 1.0, written


def _where(head: Any) -> str:
    low, high = head.window
    found = []
    if head.queries is not None:
        found.append(f"i in {', '.join(head.queries)}")
    if (low, high) != (0, 0) and head.keys is not None:
        found.append(f"j in {', '.join(head.keys)}")
    if low is not None and low == high:
        if low:
            found.append(f"j = i {'+' if low > 0 else '−'} {abs(low)}")
    elif (low, high) == (None, 0):
        found.append("j ≤ i")
    elif (low, high) != (None, None):
        bounds = ("" if low is None else f"{low} ≤ ", "" if high is None else f" ≤ {high}")
        found.append(f"{bounds[0]}j − i{bounds[1]}".replace("-", "−"))
    if head.sinks:
        found.append(f"and any j in {', '.join(head.sinks)}")
    return "; ".join(found)


def of_mlp(mlp: Any) -> Part:
    """An `Mlp`."""
    parts = [("h", mlp.hidden)] + ([("g", mlp.gate)] if mlp.gate is not None else [])
    inner = affine(mlp.hidden)
    linear = mlp.activation == "identity"
    body = inner if linear else f"{mlp.activation.replace('_derivative', '′')}({inner})"
    if mlp.gate is not None:
        body = f"{_closed(body)} ⊙ {_closed(affine(mlp.gate))}"
    lines = []
    for slot, matrix in mlp.write.items():
        blocks, name = matrix.blocks, short(slot.name)
        plain = len(blocks) == 1 and not blocks[0].is_dense and blocks[0].shape == matrix.shape
        if plain:
            lines.append(f"{name} += {times(blocks[0].content, _closed(body))}")
        else:
            product = f"({body})" if mlp.gate is not None else _closed(body)
            lines.append(f"{name} += M {product}")
    groups = mlp.token_groups
    where = "" if groups is None else f"i in {', '.join(groups)}"
    reads = tuple((slot, role) for role, e in parts for slot in e.terms)
    return Part("MLP", mlp.name, reads, tuple(mlp.write), tuple(lines), where, 0)


def of_norm(norm: Any) -> Part:
    """A `Norm`."""
    v, eps = short(norm.read.name), decimal(norm.eps)
    text = f"({v} − mean) / √(var + {eps})" if norm.kind == "layer" else f"{v} / √(mean² + {eps})"
    groups = norm.token_groups
    where = "" if groups is None else f"i in {', '.join(groups)}"
    line = f"{short(norm.write.name)} += {text}"
    return Part("norm", f"{norm.kind} norm", ((norm.read, ""),), (norm.write,), (line,), where, 0)


def parts_of(layer: Any) -> list[Part]:
    """What a layer consists of, in the order in which it acts."""
    found = [] if layer.norm is None else [of_norm(layer.norm)]
    found += [of_head(head) for head in layer.heads]
    return found + ([] if layer.mlp is None else [of_mlp(layer.mlp)])
