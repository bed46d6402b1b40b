"""Streams of tokens: what they hold, what is drawn of them, and what their text is worth."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import nltk
import numpy as np
import pytest

from synthetic.grammar.examples import named
from synthetic.grammar.grammar import Grammar, SupercriticalWarning
from synthetic.tasks.task import Batch, Task
from synthetic.tasks.text import Corpus, TextTask, cross_entropy, text_entropy

# Sentences of n words x, n a geometric variable, and an end y or z.
CHAIN = """
S -> X S [0.4] | X E [0.6]
X -> 'x' [1.0]
E -> 'y' [0.75] | 'z' [0.25]
"""


def test_from_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("aché\nab".encode())
    corpus = Corpus.from_file(path)
    assert corpus.vocabulary == ("\n", "a", "b", "c", "h", "é")
    assert "".join(corpus.vocabulary[n] for n in corpus.tokens) == "aché\nab"
    raw = Corpus.from_file(str(path), unit="bytes")
    assert bytes(ord(raw.vocabulary[n]) for n in raw.tokens) == path.read_bytes()


@pytest.mark.parametrize("mark, encoding", [("\ufeff", "utf-8"), ("", "utf-16")])
def test_a_byte_order_mark_is_no_character(tmp_path, mark, encoding):
    path = tmp_path / "text.txt"
    path.write_bytes((mark + "é\r\na").encode(encoding))
    corpus = Corpus.from_file(path)
    assert "".join(corpus.vocabulary[n] for n in corpus.tokens) == "é\r\na"
    assert corpus.vocabulary == ("\n", "\r", "a", "é")
    raw = Corpus.from_file(path, unit="bytes")
    assert bytes(ord(raw.vocabulary[n]) for n in raw.tokens) == path.read_bytes()


def test_files_that_are_no_text(tmp_path):
    bad, empty = tmp_path / "bad", tmp_path / "empty"
    bad.write_bytes(b"ab\xff\xfe")
    empty.touch()
    for path, message in (
        (bad, "byte 2 is not UTF-8; unit='bytes' takes any file"),
        (empty, "the file is empty"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            Corpus.from_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="unit is 'words', must be one of"):
        Corpus.from_file(bad, unit="words")


def test_from_grammar():
    grammar = named("toy")
    corpus = Corpus.from_grammar(grammar, jax.random.key(0), 50, max_length=9)
    assert corpus.vocabulary == (*grammar.vocabulary, ".")
    words = [corpus.vocabulary[n] for n in corpus.tokens]
    ends = [-1, *(n for n, word in enumerate(words) if word == ".")]
    sentences = [words[a + 1 : b] for a, b in pairwise(ends)]
    assert len(sentences) == 50
    assert ends[-1] == len(words) - 1
    assert all(1 <= len(s) <= 9 for s in sentences)
    parser = nltk.ViterbiParser(grammar.to_nltk())
    assert all(list(parser.parse(s)) for s in sentences[:5])
    with pytest.raises(ValueError, match="separator is 'she', must not be a word"):
        Corpus.from_grammar(grammar, jax.random.key(0), 5, separator="she")


def test_split():
    corpus = Corpus(np.arange(10), tuple("abcdefghij"))
    front, held_out = corpus.split(0.3)
    np.testing.assert_array_equal(front.tokens, np.arange(7))
    np.testing.assert_array_equal(held_out.tokens, np.arange(7, 10))
    assert front.vocabulary == held_out.vocabulary == corpus.vocabulary
    for share in (0.0, 1.0, 0.01, -1.0, float("nan")):
        with pytest.raises(ValueError, match="share is"):
            corpus.split(share)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 2), int), r"shape \(2, 2\)"),
        (np.zeros(3), "dtype float64"),
        (np.zeros(0, int), r"shape \(0,\)"),
        (np.array([0, 2]), "tokens are 0 to 2, must be 0 to 1"),
        (np.array([0, -1]), "tokens are -1 to 0, must be 0 to 1"),
    ],
)
def test_no_corpus(tokens, message):
    with pytest.raises(ValueError, match=message):
        Corpus(tokens, ("a", "b"))


def test_windows_are_those_of_the_stream():
    stream = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
    task = TextTask(Corpus(stream, tuple("0123456789")), 4)
    assert isinstance(task, Task)
    assert hash(task) == hash(TextTask(task.corpus, 4))
    assert task == TextTask(task.corpus, 4) != TextTask(task.corpus, 5)
    (seen,), target = jax.jit(task.sample, static_argnums=1)(jax.random.key(0), 400)
    whole = np.concatenate([seen, target[:, -1:]], 1)
    np.testing.assert_array_equal(whole[:, 1:], target)
    windows = {tuple(stream[n : n + 5]) for n in range(8)}
    assert {tuple(row) for row in whole.tolist()} == windows  # every one, the last included
    again = task.sample(jax.random.key(0), 400)
    np.testing.assert_array_equal(again.inputs[0], seen)


def test_renamed_windows():
    """Each has the pattern of a window of the stream, and names of its own, all alike."""
    stream = np.array([0, 1, 0, 2, 0, 1, 0, 0, 2])  # windows begin with 0, 1, 2 unevenly
    task = TextTask(Corpus(stream, ("a", "b", "c")), 3, renamed=True)
    (seen,), target = task.sample(jax.random.key(1), 3000)
    whole = np.concatenate([seen, target[:, -1:]], 1)

    def pattern(row):
        names = list(dict.fromkeys(row))
        return tuple(names.index(word) for word in row)

    windows = [pattern(stream[n : n + 4].tolist()) for n in range(6)]
    found = [pattern(row) for row in whole.tolist()]
    assert set(found) == set(windows)
    counts = np.bincount(whole[:, 0], minlength=3)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)


def test_the_loss_is_the_mean_cross_entropy(x64):
    rng = np.random.default_rng(0)
    prediction = rng.dirichlet(np.ones(4), (3, 5))
    target = rng.integers(0, 4, (3, 5))
    task = TextTask(Corpus(np.arange(4), tuple("abcd")), 2)
    batch = Batch((jnp.asarray(target),), jnp.asarray(target))
    by_position = task.loss_by_position(jnp.asarray(prediction), batch)
    for b, t in np.ndindex(3, 5):
        np.testing.assert_allclose(by_position[b, t], -np.log(prediction[b, t, target[b, t]]))
    np.testing.assert_allclose(task.loss(jnp.asarray(prediction), batch), by_position.mean(1))
    certain = cross_entropy(jnp.asarray([[[0.0, 1.0]]]), jnp.asarray([[0]]))
    assert np.isfinite(certain).all()
    with pytest.raises(ValueError, match=r"must have shape \(3, 5, 'words'\), got \(3, 4, 4\)"):
        cross_entropy(jnp.asarray(prediction)[:, :4], jnp.asarray(target))


def test_lengths_that_do_not_fit():
    corpus = Corpus(np.zeros(5, int), ("a",))
    TextTask(corpus, 4)
    for length in (0, 5):
        with pytest.raises(ValueError, match=f"length is {length}, must be 1 to 4 for a corpus"):
            TextTask(corpus, length)


def test_entropy_is_that_of_the_sentences_written_out(x64):
    """CHAIN has sentences x^n y and x^n z with 1 <= n <= 4, by probability."""
    p = {
        (n, end): 0.4 ** (n - 1) * 0.6 * share
        for n in range(1, 5)
        for end, share in (("y", 0.75), ("z", 0.25))
    }
    total = sum(p.values())
    nats = -sum(q / total * np.log(q / total) for q in p.values())
    tokens = sum(q / total * (n + 2) for (n, _), q in p.items())
    found, error = text_entropy(Grammar.from_text(CHAIN), jax.random.key(0), 20_000, 5)
    assert 0 < error < 0.01
    assert abs(found - nats / tokens) < 4 * error


def test_entropy_of_a_grammar_without_a_distribution_is_refused():
    with pytest.warns(SupercriticalWarning):
        endless = Grammar.from_text("S -> S S [0.6] | 'a' [0.4]")
    with pytest.raises(ValueError, match="cannot sample from Grammar.*spectral radius.* is 1.2"):
        text_entropy(endless, jax.random.key(0), 10)
