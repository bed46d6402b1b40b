"""Heads that look along arcs are found, others are not; the regulariser does what it says.

In the grammar of `PHRASES` every phrase is `l h r`, the kinds of phrases alternate, and l and r
depend on h, which depends on the h of the phrase before. Tags alone say where a head is, within a
window: it is one word on, one word back, or three back.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from constructions import CATALOGUE
from constructions.core.compile import compile_program
from constructions.core.program import Head, Layer, Program
from constructions.core.slots import Slots
from constructions.inside_outside.tableau import GROUPS
from constructions.runs import Run, fit_family
from probes.syntax.arcs import (
    ARCS,
    OFFSETS,
    arc_scores,
    choose,
    emergence,
    named_heads,
    span_f1,
    words_and_attention,
)
from synthetic.fitting.train import fit
from synthetic.grammar.dependencies import Arcs, Headed, dependencies
from synthetic.grammar.examples import agreement, headed, named
from synthetic.grammar.grammar import Grammar
from synthetic.grammar.sentences import Sentences, ends, sample
from synthetic.tasks.masked_language import ArcTask

PHRASES = """
%start S
S  -> P1 S2 [0.6] | L1 R1 [0.4]
S2 -> P2 S [0.6] | L2 R2 [0.4]
P1 -> L1 R1 [1.0]
P2 -> L2 R2 [1.0]
R1 -> H1 W1 [1.0]
R2 -> H2 W2 [1.0]
L1 -> 'a' [1.0]
H1 -> 'b' [1.0]
W1 -> 'c' [1.0]
L2 -> 'x' [1.0]
H2 -> 'y' [1.0]
W2 -> 'z' [1.0]
"""
TABLE = {"S": ("P1", "R1"), "S2": ("P2", "R2"), "P1": ("R1",), "P2": ("R2",)}
TABLE |= {"R1": ("H1",), "R2": ("H2",)}
#: word -> its head
LOOKS = {"a": "b", "c": "b", "x": "y", "z": "y", "b": "y", "y": "b"}
LONGEST = 12


@cache
def phrases() -> tuple[Any, Headed, Sentences, Arcs]:
    grammar = Grammar.from_text(PHRASES)
    marked = Headed.from_table(grammar, TABLE, otherwise="left")
    construction = CATALOGUE["inside-outside"](
        grammar=grammar, max_length=LONGEST, layers=1, heads=2, width=8
    )
    drawn = sample(grammar, jax.random.key(0), 200, LONGEST)
    return construction, marked, drawn, dependencies(marked, drawn)


def built(
    window: tuple[int, int] = (-3, 1), looks: dict[str, str] = LOOKS, turned: bool = False
) -> Any:
    """One head of a program that attends from each word to its head, or the other way round."""
    vocabulary = phrases()[1].grammar.vocabulary
    words = len(vocabulary)
    slots = Slots()
    word = slots.add("word", words, token_groups="word")
    out = slots.add("out", words, token_groups="word", born=1)
    match = np.zeros((words, words))
    for dependent, head in looks.items():
        match[vocabulary.index(head), vocabulary.index(dependent)] = 1
    # what nothing depends on looks at itself
    own = np.diag([1.0 if word in "acxz" else 0.0 for word in vocabulary])
    query, key = (word, (match + own) @ word) if turned else (match @ word, word)
    head = Head(
        query=query,
        key=key,
        value=word,
        write={out: 1.0},
        mixer="softmax",
        scale=40.0,
        queries="word",
        keys="word",
        window=(-window[1], -window[0]) if turned else window,
    )
    table = np.eye(words + 4, words)
    return compile_program(
        Program(
            slots,
            [Layer([head])],
            token_groups=GROUPS,
            embedding={word: table},
            readout={out: np.eye(words)},
        )
    )


def scores(model: Any) -> Any:
    construction, marked, drawn, gold = phrases()
    hidden = jnp.zeros(drawn.tokens.shape, bool)
    _, attention = words_and_attention(construction)(model, drawn.tokens, drawn.lengths, hidden)
    return arc_scores(attention, gold, drawn.lengths, len(marked.relations))


@pytest.mark.parametrize("turned", [False, True])
def test_a_head_on_arcs_is_found(turned: bool) -> None:
    found = scores(built(turned=turned))
    assert float(found.heads.uas) == 1 and float(found.heads.labelled) == 1
    assert int(found.heads.best) == int(turned)  # the direction
    # the head of a phrase is attended to by two words and its successor: a third of the column
    assert found.weight[int(turned), 0, 0] > (0.3 if turned else 0.99)
    assert float(found.offsets.uas) < 0.45 and float(found.chance) < 0.3


def test_near_misses_are_not() -> None:
    near = scores(built(window=(-2, 1)))
    # it cannot see the phrase before: right are l and r, not h
    there = np.asarray(phrases()[3].heads[100:])
    inner = np.abs(there - np.arange(LONGEST))[there >= 0] == 1
    assert float(near.heads.uas) == pytest.approx(inner.mean(), abs=0.02) and inner.mean() < 0.9
    swapped = scores(built(window=(-3, 2), looks=LOOKS | {"a": "c", "x": "z"}))
    assert float(swapped.heads.uas) < 0.75
    construction = phrases()[0]
    random = scores(construction.counterpart().init(jax.random.key(0)))
    assert float(random.heads.uas) < float(random.offsets.uas)
    assert float(random.heads.labelled) < float(random.offsets.labelled)


def slow(attention: np.ndarray, heads: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """UAS `[2, layer, head]` by loops over everything, on all sentences."""
    layers, batch, count = attention.shape[:3]
    right, total = np.zeros((2, layers, count)), 0
    for b in range(batch):
        n = lengths[b]
        for i in range(n):
            if heads[b, i] < 0:
                continue
            total += 1
            others = [j for j in range(n) if j != i]
            for layer in range(layers):
                for k in range(count):
                    a = attention[layer, b, k]
                    right[0, layer, k] += heads[b, i] == max(others, key=lambda j: a[i, j])
                    right[1, layer, k] += heads[b, i] == max(others, key=lambda j: a[j, i])
    return right / total


def test_scores_against_loops() -> None:
    rng = np.random.default_rng(0)
    marked = headed(named("toy"))
    drawn = sample(marked.grammar, jax.random.key(1), 40, 9)
    gold = dependencies(marked, drawn)
    attention = rng.random((2, 40, 3, 9, 9)).astype(np.float32)
    attention[..., np.arange(9), np.arange(9)] = 2  # itself is looked at most, and does not count
    attention[1, :, 2] *= 0.1
    lengths, heads = np.asarray(drawn.lengths), np.asarray(gold.heads)
    for b, i in np.argwhere(heads >= 0):  # one head is right more often than the others
        if rng.random() < 0.6:
            attention[1, b, 2, heads[b, i], i] = 1.5
    found = arc_scores(jnp.asarray(attention), gold, drawn.lengths, len(marked.relations))
    second = slice(20, None)
    wanted = slow(attention[:, second], heads[second], lengths[second]).ravel()
    np.testing.assert_allclose(found.heads.scores, wanted, atol=1e-6)
    first = slow(attention[:, :20], heads[:20], lengths[:20]).ravel()
    assert np.unravel_index(int(found.heads.best), found.shape) == (1, 1, 2)
    assert int(found.heads.best) == first.argmax()
    assert float(found.heads.uas) == pytest.approx(wanted[first.argmax()], abs=1e-6)
    # offsets, chance and weights
    offset = (heads - np.arange(9))[second][heads[second] >= 0]
    shares = [(offset == d).mean() for d in OFFSETS]
    np.testing.assert_allclose(found.offsets.scores, shares, atol=1e-6)
    n = np.broadcast_to(lengths[second, None], (20, 9))[heads[second] >= 0]
    assert float(found.chance) == pytest.approx((1 / (n - 1)).mean(), abs=1e-6)
    b, i = np.nonzero(heads >= 0)
    along = attention[:, b, :, i, heads[b, i]].mean(0), attention[:, b, :, heads[b, i], i].mean(0)
    np.testing.assert_allclose(found.weight, along, atol=1e-6)


def test_one_candidate_for_each_relation() -> None:
    heads = jnp.asarray([[1, -1, 1], [1, -1, 1]] * 2)
    gold = Arcs(heads, jnp.asarray([[0, -1, 1], [0, -1, 1]] * 2))
    left, right = jnp.asarray([-1, 0, 1]), jnp.asarray([1, 2, -1])
    found = choose(jnp.stack([jnp.broadcast_to(c, (4, 3)) for c in (left, right)]), gold, 3)
    assert found.scores.tolist() == [0.5, 0.5] and float(found.labelled) == 1
    assert found.of_relation[:2].tolist() == [1, 0]
    assert found.by_relation[:2].tolist() == [1, 1] and np.isnan(found.by_relation[2])
    # what is chosen on the first half need not be best on the second
    other = Arcs(heads.at[2:].set(jnp.asarray([2, -1, 0])), gold.relations)
    late = jnp.broadcast_to(jnp.asarray([2, -2, 0]), heads.shape)
    found = choose(jnp.stack([heads, late]), other, 3)
    assert found.scores.tolist() == [0, 1] and float(found.uas) == float(found.labelled) == 0
    with pytest.raises(ValueError, match="there is 1 sentence, must be at least 2"):
        choose(left[None, None], Arcs(heads[:1], heads[:1]), 3)
    with pytest.raises(ValueError, match="arcs have shape"):
        arc_scores(jnp.zeros((1, 2, 1, 3, 3)), gold, jnp.full(2, 3), 2)


def test_special_tokens_are_left_out_and_the_prediction_is_the_same() -> None:
    construction, _, drawn, _ = phrases()
    model = construction.counterpart().init(jax.random.key(1))
    hidden = drawn.tokens == 1
    found, attention = words_and_attention(construction)(model, drawn.tokens, drawn.lengths, hidden)
    expected = construction.apply(model, drawn.tokens, drawn.lengths, hidden)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert attention.shape == (1, 200, 2, LONGEST, LONGEST)
    assert float(attention.sum(-1).max()) < 1  # some of it is on BOS and EOS
    names = named_heads(attention, drawn.lengths)
    there = np.arange(LONGEST) < np.asarray(drawn.lengths)[:, None]
    assert (np.asarray(names) < np.asarray(drawn.lengths)[:, None])[:, :, :, there].all()
    assert (np.asarray(names) != np.arange(LONGEST))[:, :, :, there].all()


def test_span_probe() -> None:
    marked = headed(named("toy"))
    drawn = sample(marked.grammar, jax.random.key(2), 300, 8)
    start, last = np.asarray(drawn.starts), np.asarray(ends(drawn.starts))
    # word t holds which spans begin and end at it: [h_i, h_j] then says it all
    told = np.zeros((300, 8, 16), np.float32)
    for b, k in np.argwhere(start >= 0):
        told[b, start[b, k], last[b, k]] = 1
        told[b, last[b, k], 8 + start[b, k]] = 1
    noise = np.random.default_rng(0).normal(size=(300, 8, 16)).astype(np.float32)
    found = span_f1(jnp.stack([jnp.asarray(told), jnp.asarray(noise)]), drawn)
    assert found[0] > 0.95
    # named at random: n - 2 of n (n - 1) / 2 - 1
    n = np.asarray(drawn.lengths)[150:]
    n = n[n > 2]
    chance = (2 * (n - 2) ** 2 / (n * (n - 1) - 2)).sum() / (n - 2).sum()
    assert float(found[1]) == pytest.approx(chance, abs=0.08)


SMALL = {"grammar": "toy", "max_length": 6, "layers": 1, "heads": 2, "width": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "run"
    return fit_family("inside-outside", SMALL, out, steps=3, batch=8, seeds=(0, 1))


def test_tool(run: Run, tmp_path: Path) -> None:
    found = ARCS(run, 0)
    assert found.rows == [
        "trained, seed 0", "trained, seed 1", "random weights", "best offset", "chance"
    ]  # fmt: skip
    assert found.columns[:3] == ["one head", "one a relation", "most weight on arcs"]
    assert "best head of seed 0" in found.note and "marks no heads" not in found.note
    values = np.array(found.values, float)
    # three steps teach no syntax
    assert (values[:3, 1] < values[3, 1]).all()
    assert (values[:3, :2] >= 0).all() and (values[:4, 3:] <= 1).all()
    other = ARCS(run, 0, heads=Headed.everywhere(named("toy")))
    assert other.values != found.values and "marks no heads" not in other.note
    with pytest.raises(ValueError, match="heads is of another grammar"):
        ARCS(run, 0, heads=agreement())


def test_tool_finds_the_built_head_and_says_what_it_took_for_heads() -> None:
    construction, marked, _, _ = phrases()
    model = construction.counterpart().init(jax.random.key(0))
    # the grammar is none of ours: every head on the right is what the tool takes
    made = Run(
        "inside-outside", {}, construction, (built(),), (0,), [], construction.counterpart().recipe
    )
    found = ARCS(made, 0, heads=marked)
    assert found.values[0][:2] == [1, 1] and found.values[1][0] < 0.6
    assert found.note == "best head of seed 0: from the word, layer 1, head 1; best offset -1"
    default = ARCS(replace(made, models=(model,)), 0)
    assert "marks no heads, so the right child of every rule is taken" in default.note


def test_tool_refuses(run: Run) -> None:
    other = CATALOGUE["gradient-descent"](dim_x=2, num_examples=3)
    with pytest.raises(ValueError, match="family 'gradient-descent' has no grammar: 'arcs' needs"):
        ARCS(replace(run, family="gradient-descent", construction=other), 0)
    compiled = CATALOGUE["inside-outside"](grammar="toy", max_length=3).compile().model
    with pytest.raises(ValueError, match="attention is linear: 'arcs' needs softmax attention"):
        ARCS(replace(run, models=(compiled,)), 0)


def test_regulariser_moves_attention() -> None:
    """A few steps at a large weight, along arcs and, promoted, along none of them."""
    marked = headed(named("toy"))
    construction = CATALOGUE["inside-outside"](**SMALL | {"grammar": marked.grammar})
    counterpart = construction.counterpart()
    measure = jax.jit(emergence(construction, marked, jax.random.key(0), 64))
    initial = measure(counterpart.init(jax.random.key(0)))
    assert set(initial) == {"head_uas", "relation_uas", "arc_weight", "span_f1", "divergence"}

    def fitted(**changes: Any) -> float:
        task = ArcTask(counterpart.task, marked, **changes)
        predict = words_and_attention(construction)
        settings: dict[str, Any] = {"steps": 40, "batch": 32, "learning_rate": 1e-2}
        model = fit(counterpart.init, task, predict=predict, **settings).model
        return float(measure(model)["arc_weight"])

    suppressed, promoted = fitted(weight=3.0), fitted(weight=-3.0)
    control = fitted(weight=-3.0, arcs="random")
    assert suppressed < 0.5 * initial["arc_weight"] and promoted > 2 * initial["arc_weight"]
    assert control < 0.7 * promoted
    with pytest.raises(ValueError, match="headed is of another grammar"):
        emergence(construction, agreement(), jax.random.key(0))
