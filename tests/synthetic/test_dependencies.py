"""Arcs of derivations against a walk over nltk's trees; the regulariser against loops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nltk.tree import Tree

from synthetic.grammar.dependencies import Headed, dependencies
from synthetic.grammar.examples import TABLES, agreement, headed, named
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import sample, trees
from synthetic.tasks.masked_language import ArcTask, MaskedLanguageTask, random_arcs

# Both sides, both kinds of child on either side, sentences of one word.
LOOSE = """
S -> S S [0.25] | A S [0.15] | S A [0.1] | A A [0.1] | 'x' [0.3] | 'y' [0.1]
A -> 'x' [0.5] | 'z' [0.5]
"""


def walk(marked: Headed, tree: Tree) -> tuple[list[int], list[str]]:
    """Heads and relations of a tree of the grammar, the slow way."""
    heads, relations = [-1] * len(tree.leaves()), [""] * len(tree.leaves())
    nonterminals, symbols = marked.grammar.nonterminals, marked.grammar.symbols

    def head_of(node: Tree, first: int) -> int:
        if isinstance(node[0], str):
            return first
        left, right = node
        found = head_of(left, first), head_of(right, first + len(left.leaves()))
        a, b, c = node.label(), left.label(), right.label()
        rule = nonterminals.index(a), symbols.index(b), symbols.index(c)
        head, other = found[::-1] if marked.right[rule] else found
        heads[other], relations[other] = head, f"{a} -> {b} {c}"
        return head

    head_of(tree, 0)
    return heads, relations


def mixed(grammar: Grammar) -> Headed:
    right = np.random.default_rng(0).random(grammar.rules.shape) < 0.5
    return Headed(grammar, right)


@pytest.mark.parametrize("name", ["loose", "agreement"])
def test_arcs_are_those_of_the_tree(name: str) -> None:
    marked = agreement() if name == "agreement" else mixed(Grammar.from_text(LOOSE))
    drawn = sample(marked.grammar, jax.random.key(0), 300, 12)
    found = jax.jit(dependencies, static_argnums=0)(marked, drawn)
    for row, tree in enumerate(trees(marked.grammar, drawn)):
        heads, relations = walk(marked, tree)
        n = len(heads)
        assert found.heads[row].tolist() == heads + [-1] * (12 - n)
        said = ["" if r < 0 else marked.relations[r] for r in found.relations[row].tolist()]
        assert said == relations + [""] * (12 - n)


def test_one_word() -> None:
    marked = Headed.everywhere(Grammar.from_text(LOOSE))
    drawn = sample(marked.grammar, jax.random.key(0), 4, 1)
    found = dependencies(marked, drawn)
    assert (np.asarray(found.heads) == -1).all() and found.heads.shape == (4, 1)


def test_tables() -> None:
    grammar = named("toy")
    marked = Headed.from_table(grammar, {"NP": ("N", "NP"), "NB": ("A",)}, otherwise="left")

    def head(rule: str) -> str:
        a, b, c = (rule.replace("->", "")).split()
        index = grammar.nonterminals.index(a), grammar.symbols.index(b), grammar.symbols.index(c)
        return c if marked.right[index] else b

    assert [head(r) for r in ("NP -> D N", "NP -> NP PP", "NP -> D NB")] == ["N", "NP", "D"]
    assert [head(r) for r in ("NB -> A N", "NB -> N N", "VP -> V NP")] == ["A", "N", "V"]
    with pytest.raises(ValueError, match=r"table holds \['X'\], must be symbols"):
        Headed.from_table(grammar, {"NP": ("X",)})
    with pytest.raises(ValueError, match=r"table holds \['N'\], must be symbols, and nonterminals"):
        Headed.from_table(grammar, {"N": ("N",)})
    with pytest.raises(ValueError, match="side is 'middle', must be 'left' or 'right'"):
        Headed.everywhere(grammar, "middle")
    with pytest.raises(ValueError, match="right has shape .* must be"):
        Headed(grammar, np.zeros(3, bool))


def test_ours_are_known_and_others_have_their_heads_on_the_right() -> None:
    assert {headed(named(name)).right.mean() for name in TABLES}.isdisjoint({0.0, 1.0})
    assert headed(agreement().grammar) == agreement() and hash(agreement()) == hash(agreement())
    assert agreement() != Headed.everywhere(agreement().grammar)
    assert headed(Grammar.from_text(LOOSE)).right.all()
    # a symbol that has words and branches is one symbol to a table
    grammar = Grammar.from_text(LOOSE)
    marked = Headed.from_table(grammar, {"S": ("S",)}, otherwise="left")
    s, lexical, a = (grammar.symbols.index(x) for x in ("S", "S/lex", "A"))
    assert marked.right[0, a, s] and marked.right[0, a, lexical] and not marked.right[0, s, a]


def test_agreement() -> None:
    marked = agreement()
    marked.grammar.check()
    assert marked.grammar.expected_length == pytest.approx(12.964, abs=1e-3)
    for change in ({"genders": 1}, {"agree": 0.0}, {"nouns": 0}):
        with pytest.raises(ValueError, match="must be"):
            agreement(**change)


def arc_task(**changes) -> ArcTask:
    marked = agreement()
    return ArcTask(MaskedLanguageTask(marked.grammar, 12, 0.3), marked, **changes)


def test_random_arcs_have_the_lengths_and_are_no_arcs() -> None:
    marked = agreement()
    drawn = sample(marked.grammar, jax.random.key(1), 500, 16)
    heads = np.asarray(dependencies(marked, drawn).heads)
    dependents, to = map(
        np.asarray, random_arcs(jax.random.key(2), jnp.asarray(heads), drawn.lengths)
    )
    kept = to >= 0
    assert kept.sum() > 0.9 * (heads >= 0).sum() and (kept <= (heads >= 0)).all()
    np.testing.assert_array_equal((to - dependents)[kept], (heads - np.arange(16))[kept])
    row = np.nonzero(kept)[0]
    d, h = dependents[kept], to[kept]
    assert (d < np.asarray(drawn.lengths)[row]).all() and (h < np.asarray(drawn.lengths)[row]).all()
    assert (heads[row, d] != h).all() and (heads[row, h] != d).all()
    # every place is as likely that is neither the arc nor where another one is
    one, lengths = jnp.asarray([[1, -1, 3, -1, -1, 4, -1]]), jnp.asarray([6])
    keys = jax.random.split(jax.random.key(0), 2000)
    places = jax.vmap(lambda key: random_arcs(key, one, lengths)[0][0, 0])(keys)
    assert np.bincount(places, minlength=7)[[0, 2, 4, 5, 6]].sum() == 0
    assert np.bincount(places)[[1, 3]] == pytest.approx(1000, abs=100)
    none = jnp.asarray([[1, -1]])
    assert int(random_arcs(keys[0], none, jnp.asarray([2]))[1][0, 0]) == -1


@pytest.mark.parametrize("over", ["sum", "max"])
def test_loss_is_the_equation(over, x64) -> None:
    task = arc_task(weight=-0.7, over=over)
    batch = task.sample(jax.random.key(0), 6)
    words = len(task.headed.grammar.vocabulary)
    rng = np.random.default_rng(0)
    found = rng.dirichlet(np.ones(words), (6, 12))
    attention = rng.random((2, 6, 3, 12, 12))
    tokens, hidden, dependents, heads, _ = map(np.asarray, batch.target)
    assert (hidden == np.asarray(batch.inputs[2])).all()
    reduce = np.sum if over == "sum" else np.max
    told, along = np.zeros(6), np.zeros(6)
    for b in range(6):
        for d, h in zip(dependents[b], heads[b], strict=True):
            if h >= 0:
                along[b] += reduce(attention[:, b, :, d, h]) + reduce(attention[:, b, :, h, d])
        for t in np.nonzero(hidden[b])[0]:
            told[b] -= np.log(found[b, t, tokens[b, t]])
    wanted = told / hidden.sum() * 6 - 0.7 * along / (heads >= 0).sum() * 6
    loss = task.loss((jnp.asarray(found), jnp.asarray(attention)), batch)
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)


def test_samples_are_those_of_the_task_of_words_with_arcs_of_their_trees() -> None:
    task = arc_task(replaced=0.4, until=0.5, weight=0.3)
    batch = task.sample_during(jax.random.key(3), 2000, jnp.asarray(0.5))
    (seen, lengths, mask), (tokens, told, dependents, heads, weight) = batch
    assert (np.asarray(weight) == np.float32(0.3)).all()
    late = task.sample_during(jax.random.key(3), 4, jnp.asarray(0.51))
    assert (np.asarray(late.target[-1]) == 0).all()
    there = np.arange(12) < np.asarray(lengths)[:, None]
    told, mask, seen, tokens = map(np.asarray, (told, mask, seen, tokens))
    assert told[there].mean() == pytest.approx(0.3, abs=0.02) and not told[~there].any()
    assert (mask <= told).all() and mask[told].mean() == pytest.approx(0.6, abs=0.03)
    wrong = told & ~mask
    assert (seen == tokens)[~wrong].all()
    words = len(task.headed.grammar.vocabulary)
    assert (seen == tokens)[wrong].mean() < 4 / words
    assert (np.asarray(dependents) == np.arange(12)).all()
    assert ((np.asarray(heads) >= 0).sum(1) == np.asarray(lengths) - 1).all()
    random = replace(task, arcs="random").sample(jax.random.key(3), 50)
    assert (
        np.asarray(random.inputs[0]) == np.asarray(task.sample(jax.random.key(3), 50).inputs[0])
    ).all()


def test_refused() -> None:
    for change, message in (
        ({"weight": float("nan")}, "weight is nan"),
        ({"arcs": "some"}, "arcs is 'some'"),
        ({"over": "mean"}, "over is 'mean'"),
        ({"until": 0.0}, "until is 0.0"),
        ({"replaced": 2.0}, "replaced is 2.0"),
        ({"headed": Headed.everywhere(named("toy"))}, "headed is of another grammar"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            replace(arc_task(), **change)


def test_masking_rate_goes_down_in_the_course_of_a_fit() -> None:
    words = MaskedLanguageTask(agreement().grammar, 12, 0.6, final=0.2)
    task = replace(arc_task(), words=words)
    for progress, rate in ((0.0, 0.6), (0.5, 0.4), (1.0, 0.2)):
        batch = task.sample_during(jax.random.key(0), 2000, jnp.asarray(progress))
        share = batch.target[1].sum() / batch.inputs[1].sum()
        assert float(share) == pytest.approx(rate, abs=0.02)
