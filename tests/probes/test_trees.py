import jax
import numpy as np
import pytest
from nltk import Tree

from probes.syntax.constituents import (
    decode,
    expected_trees,
    lca_depths,
    right_branching,
    span_f1,
    tree_probe,
    tree_spans,
)
from synthetic.grammar import chart
from synthetic.grammar.examples import named
from synthetic.grammar.sentences import ends, sample, trees

KEY = jax.random.key(0)
SENTENCES = sample(named("toy"), jax.random.key(1), 400, 9)
LENGTHS = np.asarray(SENTENCES.lengths)
DEPTHS = lca_depths(SENTENCES.starts, ends(SENTENCES.starts), LENGTHS)


def mean_f1(found, gold, lengths):
    return float(np.nanmean([span_f1(*given) for given in zip(found, gold, lengths, strict=True)]))


def test_depths_are_those_of_the_lowest_common_ancestors():
    for tree, depths in zip(trees(named("toy"), SENTENCES), DEPTHS, strict=True):
        leaves = len(tree.leaves())
        wanted = [len(tree.treeposition_spanning_leaves(t, t + 2)) + 1 for t in range(leaves - 1)]
        assert depths[: leaves - 1].tolist() == wanted
        assert (depths[leaves - 1 :] == -1).all()


def test_binary_trees_come_back_from_their_depths():
    for tree, depths, length in zip(trees(named("toy"), SENTENCES), DEPTHS, LENGTHS, strict=True):
        own = depths[: length - 1]
        assert decode(own) == tree_spans(tree)
        assert decode(2.5 * own - 7) == decode(own)  # only the order counts


def every(first, last):
    """All binary trees over words first..last."""
    if first == last:
        return [first]
    return [
        Tree("X", [a, b])
        for k in range(first, last)
        for a in every(first, k)
        for b in every(k + 1, last)
    ]


def test_all_trees_of_five_words():
    found = set()
    for tree in every(0, 4):
        spans = np.array(sorted(tree_spans(tree)))
        depths = lca_depths(spans[None, :, 0], spans[None, :, 1], np.array([5]))[0]
        assert decode(depths) == tree_spans(tree)
        found.add(tuple(depths.tolist()))
    assert len(found) == 14


def test_ties_and_short_sentences():
    assert decode([1, 1, 1]) == right_branching(4) == {(0, 3), (1, 3), (2, 3)}
    assert decode([3, 2, 1]) == {(0, 3), (0, 2), (0, 1)}
    assert decode([]) == right_branching(1) == set()
    assert decode([5.0]) == right_branching(2) == {(0, 1)}


def test_a_flat_tree_and_a_chain():
    tree = Tree.fromstring("(S (NP (NP (D a) (A b) (N c))) (VP (V d)))")
    assert tree_spans(tree) == {(0, 2), (0, 3)}
    depths = lca_depths(np.array([[0, 0, -1]]), np.array([[3, 2, -1]]), np.array([4]))
    np.testing.assert_array_equal(depths, [[2, 2, 1]])
    assert decode(depths[0]) == {(0, 3), (0, 2), (1, 2)}


def test_f1_by_hand():
    gold = {(0, 4), (0, 1), (2, 4), (3, 4)}
    assert span_f1(gold, gold, 5) == 1
    # (0, 4) is trivial; (2, 4) and (3, 4) are found among three, three are wanted
    assert span_f1(right_branching(5), gold, 5) == pytest.approx(2 / 3)
    assert span_f1({(0, 4), (2, 4), (2, 2)}, gold, 5) == pytest.approx(2 * 1 / (1 + 3))
    assert span_f1({(0, 4)}, gold, 5) == 0
    assert np.isnan(span_f1({(0, 1)}, {(0, 1)}, 2))
    two = [right_branching(2), right_branching(5)]
    assert mean_f1(two, [{(0, 1)}, gold], [2, 5]) == pytest.approx(2 / 3)


def test_expected_trees_are_the_best_of_all_trees():
    marginals = np.random.default_rng(7).random((20, 6, 6, 3))
    lengths = np.array([2, 3, 4, 5, 6] * 4)
    probability = marginals.sum(-1)
    for found, mu, length in zip(
        expected_trees(marginals, lengths), probability, lengths.tolist(), strict=True
    ):
        options = [tree_spans(tree) for tree in every(0, length - 1)]
        wanted = max(options, key=lambda spans: sum(mu[span] for span in spans))
        assert found == wanted
    assert expected_trees(marginals[:2], np.array([1, 2])) == [set(), {(0, 1)}]


def test_the_oracle_does_as_well_as_it_expects_and_worse_where_words_are_hidden():
    english = named("english")
    drawn = sample(english, jax.random.key(3), 1500, 7)
    lengths = np.asarray(drawn.lengths)
    gold = [tree_spans(tree) for tree in trees(english, drawn)]
    scores = []
    for rate in (0.0, 0.5):
        hidden = np.random.default_rng(1).random(drawn.tokens.shape) < rate
        mu = np.asarray(chart.inside_outside(english, drawn.tokens, lengths, hidden).span_marginals)
        found = expected_trees(mu, lengths)
        own = [[s for s in t if s[1] - s[0] < n - 1] for t, n in zip(found, lengths, strict=True)]
        hoped = [np.mean([m[s].sum() for s in t]) for m, t in zip(mu, own, strict=True) if t]
        scores.append(mean_f1(found, gold, lengths.tolist()))
        assert scores[-1] == pytest.approx(np.mean(hoped), abs=0.02)
    assert 0.95 < scores[0] < 1 and scores[1] < scores[0] - 0.05


def planted(seed=0, noise=0.0):
    """A stream with two layers: noise, then one that holds n_t - n_{t-1} in two words."""
    rng = np.random.default_rng(seed)
    stream = rng.normal(size=(2, 400, 9, 6)).astype(np.float32)
    change = np.diff(DEPTHS, axis=1, prepend=0)
    share = rng.normal(size=change.shape)  # neither word has it alone
    stream[1, :, :-1, 2] = change - share
    stream[1, :, 1:, 4] = share + noise * rng.normal(size=share.shape)
    return stream


def test_planted_trees_are_found_and_noise_has_none():
    noise = np.random.default_rng(5).normal(size=(1, 400, 9, 6)).astype(np.float32)
    found = tree_probe({"planted": planted(), "noise": noise}, SENTENCES, KEY)
    assert found.layers["planted"] == 1 and found["planted"] == pytest.approx(1, abs=1e-6)
    assert found.correlation["planted"] > 0.999
    chance = found["right-branching"]
    assert found["noise"] < chance + 0.1 and found["embedding"] < chance + 0.1
    assert found["control task"] < chance + 0.1 and found["place"] < chance + 0.1
    assert abs(found.correlation["noise"]) < 0.2
    assert found.gain("planted", "noise")[1] > 0.2


def test_the_columns_without_a_probe_are_as_without_a_probe():
    found = tree_probe({"planted": planted()}, SENTENCES, KEY)
    gold = [tree_spans(tree) for tree in trees(named("toy"), SENTENCES)]
    flat = mean_f1([right_branching(n) for n in LENGTHS.tolist()], gold, LENGTHS.tolist())
    assert found["right-branching"] == pytest.approx(flat, abs=0.1)
    difference, low, high = found.gain("planted", "right-branching")
    assert difference == pytest.approx(found["planted"] - found["right-branching"])
    assert low < difference < high


def test_the_oracle_is_a_column_where_marginals_are_given():
    exact = chart.inside_outside(named("toy"), SENTENCES.tokens, LENGTHS).span_marginals
    found = tree_probe({"planted": planted()}, SENTENCES, KEY, marginals=exact)
    assert 0.85 < found["oracle"] < 1 and found.gain("planted", "oracle")[0] > 0
    assert "oracle" not in tree_probe({"planted": planted()}, SENTENCES, KEY).by_layer
    gold = np.zeros((400, 9, 9, 1))
    last = np.asarray(ends(SENTENCES.starts))
    row, node = np.nonzero(last >= 0)
    gold[row, np.asarray(SENTENCES.starts)[row, node], last[row, node]] = 1
    assert tree_probe({"p": planted()}, SENTENCES, KEY, marginals=gold)["oracle"] == 1


def test_two_layers_for_trees():
    stream = planted()
    stream[1, :, :, 2] = np.sign(stream[1, :, :, 2]) * stream[1, :, :, 2] ** 2
    linear = tree_probe({"planted": stream}, SENTENCES, KEY)["planted"]
    found = tree_probe({"planted": stream}, SENTENCES, KEY, probe="two-layer")["planted"]
    assert found > linear + 0.03


def test_one_word_is_not_enough_for_what_two_hold():
    alone = tree_probe({"planted": planted()}, SENTENCES, KEY, words=1)
    assert alone["planted"] < 0.95


def test_absolute_depths():
    stream = np.zeros((1, 400, 9, 3), np.float32)
    stream[0, :, :-1, 1] = DEPTHS
    assert tree_probe({"m": stream}, SENTENCES, KEY, relative=False)["m"] == pytest.approx(1)
    assert tree_probe({"m": stream}, SENTENCES, KEY, words=1, relative=False)["m"] == 1


def test_bad_input():
    with pytest.raises(ValueError, match="words is 3, must be 1 or 2"):
        tree_probe({"m": planted()}, SENTENCES, KEY, words=3)
    with pytest.raises(ValueError, match="must fit tokens"):
        tree_probe({"m": planted()[:, :20]}, SENTENCES, KEY)
    for name in ("right-branching", "oracle"):
        with pytest.raises(ValueError, match="not be named 'right-branching' or 'oracle'"):
            tree_probe({name: planted()}, SENTENCES, KEY)
    with pytest.raises(ValueError, match=r"marginals has shape \(400, 8, 8, 5\)"):
        tree_probe({"m": planted()}, SENTENCES, KEY, marginals=np.zeros((400, 8, 8, 5)))
    with pytest.raises(ValueError, match=r"marginals has shape \(3, 4, 4\)"):
        expected_trees(np.zeros((3, 4, 4)), np.full(3, 4))
    with pytest.raises(ValueError, match=r"lengths must be 3 numbers in 1\.\.4"):
        expected_trees(np.zeros((3, 4, 4, 2)), np.full(3, 5))
    with pytest.raises(ValueError, match="must be some, and none of"):
        tree_probe({}, SENTENCES, KEY)
