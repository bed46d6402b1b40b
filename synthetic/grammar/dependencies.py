"""Grammars whose rules mark one child as the head, and the dependency tree of a derivation.

In A -> B C one child is the head; the word that heads it heads A, and the word that heads the other
child depends on it. Every word but one has a head then: its arc belongs to the node at which the
two meet, and the rule used there is what we call the arc's relation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int32

from synthetic.grammar.grammar import Grammar
from synthetic.grammar.normal_form import LEXICAL
from synthetic.grammar.sentences import Sentences, ends


class Arcs(NamedTuple):
    """The dependency trees of a batch of sentences; all int32.

    Attributes:
        heads: `[batch, time]`, the position of every word's head; -1 at the root and at padding.
        relations: `[batch, time]`, numbers of `Headed.relations`, -1 where there is no head.
    """

    heads: Int32[Array, "batch time"]
    relations: Int32[Array, "batch time"]


@dataclass(frozen=True, eq=False)
class Headed:
    """A grammar with a head side for each of its rules. Equal if both are; hashable.

    Attributes:
        grammar: whose rules are marked.
        right: `[nonterminals, symbols, symbols]` bool, True where the right child is the head.

    Raises:
        ValueError: `right` has another shape or is not bool.
    """

    grammar: Grammar
    right: np.ndarray

    def __post_init__(self) -> None:
        right = np.array(self.right)
        if right.shape != self.grammar.rules.shape or right.dtype != bool:
            raise ValueError(
                f"right has shape {right.shape} and dtype {right.dtype}, must be "
                f"{self.grammar.rules.shape} bool"
            )
        right.flags.writeable = False
        object.__setattr__(self, "right", right)

    @classmethod
    def everywhere(cls, grammar: Grammar, side: str = "right") -> Headed:
        """Every rule has its head on one side; a default for grammars without heads.

        ValueError for a side that is neither "left" nor "right".
        """
        if side not in ("left", "right"):
            raise ValueError(f"side is {side!r}, must be 'left' or 'right'")
        return cls(grammar, np.full(grammar.rules.shape, side == "right"))

    @classmethod
    def from_table(
        cls, grammar: Grammar, table: Mapping[str, Sequence[str]], otherwise: str = "right"
    ) -> Headed:
        """The head of A -> B C is whichever of B and C comes first in A's list (Magerman 1995).

        Args:
            grammar: to be marked.
            table: {A: its children by priority}; a symbol stands for its `NAME/lex` too.
            otherwise: the side where neither is in the list, or B and C are one symbol.

        Raises:
            ValueError: a name that the grammar does not have, another side.
        """
        marked = np.array(cls.everywhere(grammar, otherwise).right)
        plain = [symbol.removesuffix(LEXICAL) for symbol in grammar.symbols]
        for parent, order in table.items():
            unknown = {parent, *order} - {*plain}
            if parent not in grammar.nonterminals or unknown:
                names = sorted(unknown or {parent})
                raise ValueError(f"table holds {names}, must be symbols, and nonterminals as keys")
            rank = np.array([order.index(s) if s in order else len(order) for s in plain])
            row = marked[grammar.nonterminals.index(parent)]
            row[rank[:, None] < rank] = False
            row[rank[:, None] > rank] = True
        return cls(grammar, marked)

    @cached_property
    def relations(self) -> tuple[str, ...]:
        """The rules, in the order of their numbers."""
        symbols = self.grammar.symbols
        return tuple(
            f"{symbols[a]} -> {symbols[b]} {symbols[c]}" for a, b, c in np.argwhere(self._used)
        )

    @cached_property
    def _used(self) -> np.ndarray:
        return self.grammar.rules > 0

    @cached_property
    def _numbers(self) -> np.ndarray:
        """`[nonterminals, symbols, symbols]`, the number of every rule that is used."""
        return np.where(self._used, np.cumsum(self._used.ravel()).reshape(self._used.shape) - 1, -1)

    @cached_property
    def _digest(self) -> bytes:
        return sha256(self.right.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Headed):
            return False
        return self.grammar == other.grammar and self._digest == other._digest

    def __hash__(self) -> int:
        return hash((self.grammar, self._digest))


def dependencies(headed: Headed, sentences: Sentences) -> Arcs:
    """The arcs of sampled sentences, `[batch, time]`; may be called inside `jit`.

    Nodes are in preorder. The left child of node k is node k + 1 if that starts where k does, else
    a word; the left subtree of m words has m - 1 nodes, so that the right child is node k + m,
    unless it is the last word of k.
    """
    tokens, lengths, tags, symbols, starts = sentences
    nodes, n = starts.shape[1], len(headed.grammar.nonterminals)
    if nodes == 0:
        none = jnp.full(tokens.shape, -1, jnp.int32)
        return Arcs(none, none)
    k = jnp.arange(nodes, dtype=jnp.int32)
    there, last = starts >= 0, ends(starts)
    after = jnp.minimum(k + 1, nodes - 1)
    branches = (k + 1 < nodes) & (starts[:, after] == starts)
    words = jnp.where(branches, last[:, after] - starts + 1, 1)  # of the left child
    right = jnp.minimum(k + words, nodes - 1)
    middle = starts + words  # the first word of the right child

    def at(values: Array, place: Array) -> Array:
        return jnp.take_along_axis(values, jnp.clip(place, 0, values.shape[1] - 1), 1)

    both = (
        jnp.where(branches, symbols[:, after], n + at(tags, starts)),
        jnp.where(middle < last, at(symbols, right), n + at(tags, last)),
    )
    rule = jnp.where(there, symbols, 0), *(jnp.where(there, child, 0) for child in both)
    is_right: Bool[Array, "batch nodes"] = jnp.asarray(headed.right)[rule]
    is_node = jnp.where(is_right, middle < last, branches)
    # from every node to the node that heads it, each time twice as far
    heading = jnp.where(is_node & there, jnp.where(is_right, right, k + 1), k)
    for _ in range(max(nodes - 1, 1).bit_length()):
        heading = at(heading, heading)
    own = jnp.where(is_right, last, starts)  # the head child, where it is a word
    head = at(own, heading)
    other = jnp.where(
        is_right,
        jnp.where(branches, head[:, after], starts),
        jnp.where(middle < last, at(head, right), last),
    )
    # each word but the root's is once the head of a child that is not the head
    time = tokens.shape[1]
    place = jnp.where(there, other, time)
    blank = jnp.full((len(tokens), time), -1, jnp.int32)
    row = jnp.arange(len(tokens))[:, None]
    relation = jnp.asarray(headed._numbers, jnp.int32)[rule]
    return Arcs(
        blank.at[row, place].set(head, mode="drop"),
        blank.at[row, place].set(relation, mode="drop"),
    )
