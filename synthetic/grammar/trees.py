"""Trees of any depth: what their labels and words may be, and walks that do not call themselves.

`nltk.Tree` walks by recursion (`==`, `hash`, `repr`, `leaves`, `pos`, `copy(deep=True)`), which
ends at some hundred levels; nothing here or built on this does. Left- or right-branching trees are
as deep as their sentences are long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from nltk.tree import Tree

from synthetic.files import InputError
from synthetic.grammar.productions import MUST_BE, is_name, shown


class TreebankError(InputError):
    """Brackets that are not trees, or labels that cannot be told from our marks."""


def is_tag(tree: Tree) -> bool:
    """Whether the node is a tag over its word."""
    return len(tree) == 1 and isinstance(tree[0], str)


def fold(tree: Tree, combine: Callable[[Tree, list[Any]], Any]) -> Any:
    """The value of a tree: `combine(node, children)`, from the words upwards.

    Args:
        tree: of any depth.
        combine: is given, in place of a node's children, their values, and words as they are.
    """
    done: list[list[Any]] = [[]]
    for node, leaving in _walk(tree):
        if leaving:
            children = done.pop()
            done[-1].append(combine(node, children))
        elif isinstance(node, Tree):
            done.append([])
        else:
            done[-1].append(node)
    return done[0][0]


def node_spans(tree: Tree) -> Iterator[tuple[Tree, int, int]]:
    """Every node with its first word and the one behind its last, children before their parents."""
    starts: list[int] = []
    words = 0
    for node, leaving in _walk(tree):
        if leaving:
            yield node, starts.pop(), words
        elif isinstance(node, Tree):
            starts.append(words)
        else:
            words += 1


def tag_nodes(tree: Tree) -> Iterator[Tree]:
    """The nodes over single words, from left to right."""
    return (node for node, leaving in _walk(tree) if leaving and is_tag(node))


def unfold(top: Any, expand: Callable[[Any], tuple[Sequence[str], Iterable[Any]]]) -> list[Any]:
    """The nodes that grow from a seed; `fold` backwards.

    Args:
        top: a seed, anything but a string.
        expand: of a seed, the labels above it, the highest first, and the seeds of the children
            below the last of them, or words. Without labels the children stand in its place.
    """
    found: list[Any] = []
    waiting = [(top, found)]
    while waiting:
        seed, into = waiting.pop()
        if isinstance(seed, str):
            into.append(seed)
            continue
        labels, children = expand(seed)
        for label in labels:
            node = Tree(label, [])
            into.append(node)
            into = node
        waiting += [(child, into) for child in reversed([*children])]
    return found


def check(tree: Any, name: str = "tree", *, top: bool = False, tagged: bool = True) -> None:
    """Refuse what is no tree of labels and words.

    Args:
        tree: any value.
        name: what the message calls it.
        top: the label of the outermost node may be empty.
        tagged: every word stands alone under a tag, and not among other nodes.

    Raises:
        TreebankError: with the label or word, and where it stands.
    """
    if not isinstance(tree, Tree):
        raise TreebankError(f"{name} is {shown(tree)}, must be a Tree")
    words = 0
    for node, leaving in _walk(tree):
        if leaving:
            continue
        if not isinstance(node, Tree):
            words += 1
            if not is_name(node):
                raise TreebankError(f"{name}: word {words} is {shown(node)}, {MUST_BE}")
            continue
        label, place = node.label(), f"in front of word {words + 1}"
        bare = top and node is tree and label == "" and not is_tag(node)
        if not bare and not is_name(label):
            raise TreebankError(f"{name}: a label {place} is {shown(label)}, {MUST_BE}")
        if not len(node):
            raise TreebankError(f"{name}: {label!r} {place} is empty, must hold nodes or a word")
        if tagged and len(node) > 1 and not all(isinstance(child, Tree) for child in node):
            raise TreebankError(
                f"{name}: {label!r} {place} holds a word beside others, must hold nodes or one word"
            )


def _walk(tree: Any) -> Iterator[tuple[Any, bool]]:
    """(node or word, False) on the way down and, for nodes, (node, True) on the way up."""
    waiting = [(tree, False)]
    while waiting:
        node, leaving = waiting.pop()
        yield node, leaving
        if not leaving and isinstance(node, Tree):
            waiting.append((node, True))
            waiting += [(child, False) for child in reversed(node)]
