"""The Inside-Outside algorithm as a program: one layer for each length of span.

With beta the inside and alpha the outside probabilities of spans of n words, i to j = i + n - 1,

    beta_n[A](i, j)   =  sum_m sum_BC rules[A,B,C] beta_m[B](i, k) beta_{n-m}[C](k+1, j)
    alpha_n[X](i, j)  =  root[X]                              if the span is the sentence
        + sum_m sum_AC rules[A,X,C] alpha_{n+m}[A](i, j+m) beta_m[C](j+1, j+m)
        + sum_m sum_AB rules[A,B,X] alpha_{n+m}[A](i-m, j) beta_m[B](i-m, i-1)

Both ends of a span hold its values. Then every term is a product of a value that i holds and one
that j holds, a score of linear attention between the two ends: one head a symbol, at one offset.
Spans that begin behind j or end before i are held there as shifted copies.

`inside_outside` is the algorithm as plain array code. Unlike `synthetic.grammar.chart`, which is
fast and safe from underflow, it follows the two recursions word for word and holds every value in
the same units as the construction does. `tableau` is the program, and `run_program` runs it without
dense matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from constructions.core.evaluate import evaluate
from constructions.core.program import SELF, Head, HeadFamily, Layer, Program, Window
from constructions.core.slots import Slot, Slots, constant
from constructions.core.transformer import shares
from synthetic.compilation import compile_once

#: number of words -> values of the spans of so many words, by first word `[batch, token, symbol]`.
Spans = dict[int, Array]


def inside_outside(
    root: Float[Array, " symbols"],
    rules: Float[Array, "nonterminals symbols symbols"],
    leaves: Float[Array, "batch token preterminals"],
    lengths: Int[Array, " batch"],
    longest: int,
) -> tuple[Spans, Spans]:
    """beta and alpha of the spans of 1 to `longest` words; 0 where no such span is.

    Args:
        root, rules: the grammar; symbols are nonterminals, then pre-terminals.
        leaves: beta(i, i), 0 behind the end of a sentence.
        lengths: of the sentences.
        longest: spans of more words are left out.
    """
    inner, tokens = len(rules), leaves.shape[1]
    part = {n: slice(inner, None) if n == 1 else slice(inner) for n in range(1, longest + 1)}
    beta: Spans = {1: leaves}
    for n in range(2, longest + 1):
        beta[n] = jnp.zeros((*leaves.shape[:2], inner), leaves.dtype)
        for m in range(1, n):
            rule = rules[:, part[m], part[n - m]]
            beta[n] += _apply("abc,bc->a", rule, beta[m], _from(m, beta[n - m]))
    alpha: Spans = {}
    for n in range(longest, 0, -1):
        whole = (jnp.arange(tokens) == 0) & (lengths == n)[:, None]
        alpha[n] = jnp.where(whole[..., None], root[part[n]], 0)
        for m in range(1, longest - n + 1):
            rule = rules[:, part[n], part[m]]
            alpha[n] += _apply("axc,ac->x", rule, alpha[n + m], _from(n, beta[m]))
            rule = rules[:, part[m], part[n]]
            alpha[n] += _apply("abx,ab->x", rule, _from(-m, alpha[n + m]), _from(-m, beta[m]))
        # no such span: it would reach behind the sentence
        inside = jnp.arange(tokens) + n <= lengths[:, None]
        alpha[n] = jnp.where(inside[..., None], alpha[n], 0)
    return beta, alpha


def _from(offset: int, values: Array) -> Array:
    """The values of the spans that begin `offset` tokens later; 0 where there is no such token."""
    tokens = values.shape[1]
    offset = max(-tokens, min(tokens, offset))
    pad = [(0, 0), (max(-offset, 0), max(offset, 0)), (0, 0)]
    return jnp.pad(values, pad)[:, max(offset, 0) :][:, :tokens]


def _apply(equation: str, rule: Array, left: Array, right: Array) -> Array:
    """A bilinear form of two values of every token: "abc,bc->a" for beta, say."""
    tensor, pair, result = equation.replace("->", ",").split(",")
    return jnp.einsum(
        f"{tensor},...{pair[0]},...{pair[1]}->...{result}", rule, left, right, precision="highest"
    )


Weight = np.ndarray | Array
GROUPS = ("word", "bos", "eos", "pad")
WORDS: dict[str, Any] = {"queries": "word", "keys": "word"}


@dataclass(frozen=True)
class Layout:
    """The slots of word i; each mapping is from the number of words of a span to a slot.

    Attributes:
        starts, ends: beta of the spans that start, and that end, at i; of one word the same slot.
        behind, before: beta of the spans that start at i + 1, and that end at i - 1.
        outside_starts, outside_ends: alpha of the spans that start, and that end, at i.
        products: alpha beta of the spans that start at i, by label; over Z, their marginals.
        first, last: 1 at the first and at the last word.
    """

    slots: Slots
    starts: Mapping[int, Slot]
    ends: Mapping[int, Slot]
    behind: Mapping[int, Slot]
    before: Mapping[int, Slot]
    outside_starts: Mapping[int, Slot]
    outside_ends: Mapping[int, Slot]
    products: Mapping[int, Slot]
    first: Slot
    last: Slot


def layout(nonterminals: int, preterminals: int, length: int, labels: int | None = None) -> Layout:
    """Slots for sentences of up to `length` words.

    Layer n - 1 writes what is inside spans of n words, layer 2 length - n what is outside them.
    Products have a column for each of the `labels`, which are the nonterminals if that is None.
    """
    slots = Slots()

    def add(name: str, n: int, born: int, meaning: str, symbols: int = nonterminals) -> Slot:
        size = symbols if n > 1 else preterminals
        return slots.add(f"{name} {n}", size, token_groups="word", born=born, meaning=meaning)

    spans, parts = range(2, length + 1), range(1, length)
    word = {1: add("inside", 1, 0, "beta(i, i)")}
    around = {1: add("outside", 1, 2 * length - 1, "alpha(i, i)")}
    return Layout(
        slots,
        word | {n: add("inside from", n, n - 1, "beta(i, i + n - 1)") for n in spans},
        word | {n: add("inside to", n, n - 1, "beta(i - n + 1, i)") for n in spans},
        {n: add("inside behind", n, n, "beta(i + 1, i + n)") for n in parts},
        {n: add("inside before", n, n, "beta(i - n, i - 1)") for n in parts},
        around | {n: add("outside from", n, 2 * length - n, "alpha(i, i + n - 1)") for n in spans},
        around | {n: add("outside to", n, 2 * length - n, "alpha(i - n + 1, i)") for n in spans},
        {
            n: add("product", n, 2 * length, "alpha beta(i, i + n - 1)", labels or nonterminals)
            for n in (1, *spans)
        },
        *(
            slots.add(name, 1, token_groups="word", born=1, meaning=f"1 at the {name} word")
            for name in ("first", "last")
        ),
    )


def tableau(
    root: Weight,
    rules: Weight,
    leaves: Weight,
    emission: Weight,
    length: int,
    products: Weight | None = None,
) -> Program:
    """The program for sentences of up to `length` words.

    Args:
        root: `[symbols]`, nonterminals then pre-terminals; any numbers.
        rules: `[nonterminals, symbols, symbols]`.
        leaves: `[token numbers, preterminals]`: beta(i, i) at a token.
        emission: `[preterminals, words]`.
        length: at least 2.
        products: of each label the form of alpha and beta that its products slots hold,
            `[labels, nonterminals, nonterminals]`; None: those of alpha_A beta_A.
    """
    if products is None:
        products = _same(len(rules))
    at = layout(len(rules), len(emission), length, len(products))
    part = {"N": slice(0, len(rules)), "P": slice(len(rules), None)}
    # stored once: [head, left, right] of the parent, of a left child and of a right child
    parents = {b + c: rules[:, part[b], part[c]] for b, c in product("NP", repeat=2)}
    lefts = {bc: m.transpose(1, 0, 2) for bc, m in parents.items()}
    rights = {bc: m.transpose(2, 1, 0) for bc, m in parents.items()}
    tops = {x: root[part[x]][:, None, None] for x in "NP"}
    tables = (parents, lefts, rights, tops)
    turned = {id(m): m.transpose(0, 2, 1) for table in tables for m in table.values()}

    def both_ends(
        terms: list[tuple[Slot, Slot, Weight]], start: Slot, end: Slot, offset: int, name: str
    ) -> list[HeadFamily]:
        """At the start of the span, looking at its end; and at the end, looking at its start."""
        heads = [HeadFamily(terms, start, window=(offset, offset), name=name, **WORDS)]
        if start is not end:
            terms = [(b, a, turned[id(m)]) for a, b, m in terms]
            heads += [HeadFamily(terms, end, window=(-offset, -offset), name=name, **WORDS)]
        return heads

    def inside(n: int) -> Layer:
        terms = [
            (at.starts[m], at.ends[n - m], parents[_kind(m) + _kind(n - m)]) for m in range(1, n)
        ]
        heads = both_ends(terms, at.starts[n], at.ends[n], n - 1, f"inside {n}")
        copies = [
            _copy(at.starts[n - 1], at.behind[n - 1], (1, 1)),
            _copy(at.ends[n - 1], at.before[n - 1], (-1, -1)),
        ]
        marks = [_mark(at.first, "bos", (-1, -1)), _mark(at.last, "eos", (1, 1))] if n == 2 else []
        return Layer([*heads, *copies, *marks], name=f"inside {n}")

    def outside(n: int) -> Layer:
        terms = [(at.first, at.last, tops[_kind(n)])]
        for m in range(1, length - n + 1):
            terms += [
                (at.outside_starts[n + m], at.behind[m], lefts[_kind(n) + _kind(m)]),
                (at.before[m], at.outside_ends[n + m], rights[_kind(m) + _kind(n)]),
            ]
        heads = both_ends(terms, at.outside_starts[n], at.outside_ends[n], n - 1, f"outside {n}")
        return Layer(heads, name=f"outside {n}")

    forms = {"P": _same(len(emission)), "N": products}
    last = [
        HeadFamily(
            [(at.outside_starts[n], at.starts[n], forms[_kind(n)])],
            slot,
            window=SELF,
            name=f"product {n}",
            **WORDS,
        )
        for n, slot in at.products.items()
    ]
    return Program(
        at.slots,
        [
            *(inside(n) for n in range(2, length + 1)),
            *(outside(n) for n in range(length, 0, -1)),
            Layer(last, name="products"),
        ],
        token_groups=GROUPS,
        name="inside-outside",
        embedding={at.starts[1]: leaves},
        readout={at.outside_starts[1]: emission.T},
    )


def _kind(n: int) -> str:
    """The kind of symbols that spans of n words have: "P"re-terminals or "N"onterminals."""
    return "P" if n == 1 else "N"


def _same(size: int) -> np.ndarray:
    """1 where all three indices are equal."""
    tensor = np.zeros((size, size, size))
    tensor[(np.arange(size),) * 3] = 1
    return tensor


def _copy(source: Slot, target: Slot, window: Window) -> Head:
    one = constant(1.0)
    write = {target: 1.0}
    return Head(one, one, source, write, window=window, name=f"copy to {target.name}", **WORDS)


def _mark(target: Slot, kind: str, window: Window) -> Head:
    """1 at the word beside a token of this kind."""
    one = constant(1.0)
    return Head(
        one, one, one, {target: 1.0}, queries="word", keys=kind, window=window, name=target.name
    )


@compile_once(static_argnums=0)
def token_numbers(
    words: int, tokens: Int[Array, "batch time"], lengths: Array, mask: Array
) -> Int[Array, "batch time+2"]:
    """Numbers of `words` words, MASK, BOS, EOS and PAD, of sentences between BOS and EOS."""
    visible = jnp.where(mask, words, tokens)
    position, end = jnp.arange(tokens.shape[1] + 2), lengths[:, None] + 1
    inner = jnp.pad(visible, ((0, 0), (1, 1)))
    word = (position >= 1) & (position < end)
    special = words + jnp.where(position == 0, 1, jnp.where(position == end, 2, 3))
    return jnp.where(word, inner, special)


def within(time: int, lengths: Int[Array, " batch"]) -> Bool[Array, "batch time"]:
    """True at words, False behind the end of a sentence."""
    return jnp.arange(time) < lengths[:, None]


def defined(
    posterior: Float[Array, "batch time word"], lengths: Int[Array, " batch"]
) -> Float[Array, "batch time word"]:
    """The posterior, with NaN in the place of shares of nothing (0/0) within a sentence."""
    nothing = within(posterior.shape[1], lengths) & ~(posterior > 0).any(-1)
    return jnp.where(nothing[..., None], jnp.nan, posterior)


def word_posterior(
    around: Float[Array, "batch time preterminal"],
    emission: Float[Array, "preterminal word"],
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch time word"]:
    """P(word at t | the others) from alpha(t, t); NaN where no word has a parse, 0 behind the end.

    What a reduction makes negative counts as 0.
    """
    return defined(shares(jnp.einsum("btx,xw->btw", around, emission)), lengths)


def marginals(
    products: Mapping[int, Array], lengths: Int[Array, " batch"], longest: int
) -> dict[str, Array]:
    """alpha beta of spans over Z, which is their sum over pre-terminals at any word.

    NaN where Z is not positive: where there is no parse, or where a reduction leaves none.
    """
    z = products[1].sum(-1)
    z = jnp.where((z < 0).any(1, keepdims=True), 0, z)  # signs that differ are rounding
    time = z.shape[1]
    there = within(time, lengths)
    start, end = jnp.arange(time)[:, None], jnp.arange(time)
    by_words = [products[n] for n in range(2, longest + 1)]
    longer = jnp.stack(by_words, 2)[:, :, : max(time - 1, 1)]
    # [batch, i, words - 2, A] to [batch, i, j, A], j = i + words - 1
    words = jnp.clip(end - start - 1, 0, longer.shape[2] - 1)
    spans = jnp.take_along_axis(longer, words[None, :, :, None], 2)
    fits = (end > start) & there[:, None]
    spans = jnp.where((fits & (end - start <= longer.shape[2]))[..., None], spans, 0)
    over = jnp.where(z > 0, z, jnp.nan)
    return {
        "span_marginals": jnp.where(fits[..., None], spans / over[:, :, None, None], 0),
        "tag_marginals": jnp.where(there[..., None], products[1] / over[..., None], 0),
    }


@partial(jax.jit, static_argnums=0)
def run_program(
    longest: int,
    root: Array,
    rules: Array,
    leaves: Array,
    emission: Array,
    form: Array | None,
    tokens: Array,
    lengths: Array,
    mask: Array,
) -> dict[str, Any]:
    """The named values of sentences by the program's second back end.

    The grammar is an argument, so that one compilation serves all grammars of a size.

    Args:
        longest: words of the longest sentence of the program.
        root, rules, leaves, emission, form: as `tableau` takes them, the last as `products`.
        tokens, lengths, mask: as `InsideOutside.word_posterior` takes them.
    """
    program = tableau(root, rules, leaves, emission, longest, form)
    at = layout(len(rules), len(emission), longest, None if form is None else len(form))
    words = emission.shape[1]
    numbers = token_numbers(words, tokens, lengths, mask)
    groups = jnp.maximum(numbers - words, 0)
    found = evaluate(program, {at.starts[1].name: leaves[numbers]}, groups)
    own = {n: found[slot.name][:, 1:-1] for n, slot in at.products.items()}
    around = found[at.outside_starts[1].name][:, 1:-1]

    def spans(slots: Mapping[int, Slot]) -> Array:
        return jnp.stack([found[slots[n].name][:, 1:-1] for n in range(2, longest + 1)], 2)

    return {
        "inside": spans(at.starts),
        "outside": spans(at.outside_starts),
        "leaves": found[at.starts[1].name][:, 1:-1],
        "around": around,
        **marginals(own, lengths, longest),
        "prediction": word_posterior(around, emission, lengths),
    }


def values(c: Any, given: tuple[Array, ...]) -> dict[str, Array]:
    """`run_program` of a construction, for any number of sentences, none included."""
    form = None if c.reduction is None else jnp.asarray(c.reduction.products, float)
    arrays = (*c.passed, c.leaves, c.grammar.emission)
    run = partial(run_program, c.max_length, *(jnp.asarray(a, float) for a in arrays), form)
    if len(given[0]):
        return run(*given)
    one = (jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for a in given)
    shapes = jax.eval_shape(run, *one)
    return {name: jnp.zeros((0, *a.shape[1:]), a.dtype) for name, a in shapes.items()}
