"""Grammars as arrays: reading, writing, checks, and what is known of their lengths."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from nltk import CFG, PCFG, Nonterminal
from nltk.grammar import ProbabilisticProduction

from synthetic.grammar.examples import NAMED, named
from synthetic.grammar.grammar import Grammar, GrammarError, SupercriticalWarning

SMALL = """
%start S
# A comment.
S -> A B [0.25] | B B [0.75]

A -> 'a' [1]
B -> 'b' [0.5] \\
   | "it's" [.5]
"""


def test_text_is_read():
    grammar = Grammar.from_text(SMALL)
    assert grammar.nonterminals == ("S",) and grammar.preterminals == ("A", "B")
    assert grammar.vocabulary == ("a", "b", "it's")
    np.testing.assert_array_equal(grammar.root, [1, 0, 0])
    np.testing.assert_array_equal(grammar.rules[0], [[0, 0, 0], [0, 0, 0.25], [0, 0, 0.75]])
    np.testing.assert_array_equal(grammar.emission, [[1, 0, 0], [0, 0.5, 0.5]])


def test_text_and_nltk_agree():
    for text in (NAMED["toy"], NAMED["english"]):
        without = text.replace("%start S\n", "")
        assert Grammar.from_nltk(PCFG.fromstring(without)) == Grammar.from_text(text)


def test_rules_without_probabilities_are_uniform(tmp_path: Path):
    path = tmp_path / "some.cfg"
    path.write_bytes("S -> A A | A A A | 'é'\nA -> 'a'\nA -> 'b'\nA -> 'b'".encode())
    grammar = Grammar.from_file(path)
    assert grammar.root[grammar.symbols.index("S/lex")] == pytest.approx(1 / 3)
    assert grammar.emission[grammar.preterminals.index("A")].tolist() == [0.5, 0.5, 0]


@pytest.mark.parametrize("mark, encoding", [("", "utf-8"), ("\ufeff", "utf-8"), ("", "utf-16")])
def test_files_are_read_in_any_encoding_that_is_sure(tmp_path: Path, mark: str, encoding: str):
    """Words keep what other readers take for the end of a line."""
    path = tmp_path / "some.pcfg"
    odd = "x\x85\u2028\u2029\x0b\x0c\x1ex"
    text = f"S -> A A [1]\r\n# a comment\rA -> 'é' [0.5] \\\r\n | '{odd}' [0.5]\r\n"
    path.write_bytes((mark + text).encode(encoding))
    grammar = Grammar.from_file(path)
    assert grammar.symbols == ("S", "A") and set(grammar.vocabulary) == {"é", odd}
    path.write_bytes(text.encode("latin-1", errors="ignore"))
    with pytest.raises(GrammarError, match=r"some\.pcfg: .* byte 32 is not UTF-8"):
        Grammar.from_file(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no rules"),
        ("S -> A", r"line 1: S -> A: 'A' has no rules \(words are quoted\)"),
        ("S -> A A [1]\n\nA 'a' [1]", r"line 3: \"A 'a' \[1\]\" is not 'SYMBOL -> ...'"),
        ("S T -> 'a' [1]", "line 1: .* is not 'SYMBOL -> ...'"),
        ("S -> 'a [1]", "line 1: cannot read \"'a"),
        ("S -> 'a' [x]", "line 1: probability is 'x', must be a number"),
        ("S -> 'a' [1.5]", "line 1: probability is 1.5, must be from 0 to 1"),
        ("S -> 'a' [nan]", "line 1: probability is nan"),
        ("S -> 'a' [0.5] 'b'", "line 1: .*b.* is out of place"),
        ("S -> 'a' -> 'b'", "line 1: '->' is out of place"),
        ("%begin S\nS -> 'a'", "line 1: '%begin S' is not '%start SYMBOL'"),
        ("%start T\nS -> 'a'", "the start symbol 'T' has no rules"),
        ("S -> A A [1]\nA -> 'a' [0.5] | 'b'", "line 2: A -> 'b' has no probability"),
        ("S -> S S [0.5] | 'a' [0.4]", "line 1: probabilities of 'S' sum to 0.9, must sum to 1"),
        ("S -> A A [1]\nA -> 'a' [0.7] | [0.3]", "line 2: 'A' has an empty rule"),
        ("S -> 'a' [0]\nS -> 'b' [0]", "probabilities of 'S' sum to 0"),
        ("S -> 'a' 'a' [1]\nB -> 'b' [1]", "line 2: 1 symbols are not reached .*'B'; clean=True"),
        ("S -> A A | 'a' 'a'\nA -> A A", "line 2: 1 symbols .* derive no words: 'A'"),
        (
            "S -> A [0.5] | 'a' 'a' [0.5]\nA -> B [1]\nB -> C [0.5] | 'b' [0.5]\nC -> A [1]",
            "line 4: unary rules in a cycle, C -> A -> B -> C|line 2: .*A -> B -> C -> A",
        ),
        ("S -> S [0.5] | 'a' 'a' [0.5]", "line 1: unary rules in a cycle, S -> S"),
        ("S -> 'a' [1]", "nonterminals is"),
        ("S -> A A\nA -> ''", "line 2: 'A' has a rule with the word '', must be a string of one"),
        ("S -> 'a' '' [1]", "line 1: 'S' has a rule with the word ''.*rules that derive nothing"),
        ("S -> 'a\0' 'b'", "must be text in UTF-8.* byte 7 is a NUL"),
        ("S -> A A\n\ufeffA -> 'a'", "line 2: .*'.ufeffA' has a byte-order mark"),
        ("\ufeff\ufeff%start S\nS -> 'a'", "line 1: .*ufeff"),
        ("S -> \ufeffA A\nA -> 'a'", "line 1: '.ufeffA' has a byte-order mark"),
        ("@root -> A B [1]\nA -> 'a' [1]\nB -> 'b' [1]", "rules of @root must be of one symbol"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "some.pcfg"
    path.write_text(text)
    with pytest.raises(GrammarError, match=r"some\.pcfg: .*(" + message + ")") as caught:
        Grammar.from_file(path)
    assert "\n" not in str(caught.value)


def test_clean_removes_what_is_of_no_use():
    text = "S -> A A [0.4] | A N [0.1] | A S [0.5]\nA -> 'a' [1]\nN -> N N [1]\nU -> A [0.3]"
    with pytest.raises(GrammarError, match="clean=True"):
        Grammar.from_text(text.replace("0.3", "1"))
    grammar = Grammar.from_text(text, clean=True)
    assert grammar.symbols == ("S", "A")
    np.testing.assert_allclose(grammar.rules[0], [[0, 0], [5 / 9, 4 / 9]])
    with pytest.raises(GrammarError, match="derives no words"):
        Grammar.from_text("S -> S S [1]", clean=True)
    short = Grammar.from_text("S -> A A [0.4] | A A A [0.6]\nA -> 'a'[1]", clean=True, longest=2)
    np.testing.assert_array_equal(short.rules, [[[0, 0], [0, 1]]])


@pytest.mark.parametrize(
    "text, left, total",
    [
        ("S -> 'x' [0.5] | 'y' [0.05]", "S", "0.55"),
        ("S -> A A [0.6] | A N [0.3]\nA -> 'a' [1]\nN -> N N [1]", "S", "0.9"),
        ("S -> A A [0.7] | A N [0.4]\nA -> 'a' [1]\nN -> N N [1]", "S", "1.1"),
        ("S -> A A [1]\nA -> 'a' [0.5] | 'b' 'c' 'd' [0.4]", "A", "0.9"),
    ],
)
def test_cleaning_does_not_mend_sums(text: str, left: str, total: str):
    with pytest.raises(GrammarError, match=f"probabilities of '{left}' sum to {total}, must"):
        Grammar.from_text(text, clean=True)
    with pytest.raises(GrammarError, match=f"probabilities of '{left}' sum to {total}, must"):
        Grammar.from_text(text, clean=True, longest=2)


@pytest.mark.parametrize("text", ["S -> 'yes' | 'no'", "S -> 'a'", "S -> T | 'a'\nT -> 'b'"])
def test_languages_of_single_words_are_refused_by_name(text: str):
    with pytest.raises(GrammarError, match=r"nonterminals is \(\), .* every sentence is a single"):
        Grammar.from_text(text)


def test_errors_of_grammars_made_in_nltk():
    s, a = Nonterminal("S"), Nonterminal("A")
    rules = [
        ProbabilisticProduction(s, [a, a], prob=0.995),
        ProbabilisticProduction(a, ["a"], prob=1),
    ]
    grammar = Grammar.from_nltk(PCFG(s, rules))  # NLTK takes sums within 0.01
    np.testing.assert_array_equal(grammar.rules, [[[0, 0], [0, 1]]])
    rules[0] = ProbabilisticProduction(s, [a, a], prob=1 - 1e-7)  # as in text, within 1e-6
    assert Grammar.from_nltk(PCFG(s, rules)).rules[0, 1, 1] == 1 - 1e-7
    thirds = "S -> A A [.333] | A S [.333] | S A [.333]\nA -> 'a' [.333] | 'b' [.333] | 'c' [.333]"
    grammar = Grammar.from_nltk(PCFG.fromstring(thirds))
    np.testing.assert_allclose(grammar.emission, [[1 / 3, 1 / 3, 1 / 3]], rtol=1e-15)
    np.testing.assert_allclose(grammar.rules[grammar.rules > 0], [1 / 3, 1 / 3, 1 / 3], rtol=1e-15)
    with pytest.raises(GrammarError, match="grammar is a CFG, must be an nltk.PCFG"):
        Grammar.from_nltk(CFG.fromstring("S -> 'a'"))
    wrong = PCFG(s, [*rules[1:], ProbabilisticProduction(s, [a, 3], prob=1)])
    with pytest.raises(GrammarError, match="'S' has a rule with the word 3, must be a string"):
        Grammar.from_nltk(wrong)
    del rules[1:]
    with pytest.raises(GrammarError, match="'S' has a rule with the word '', must be a string"):
        Grammar.from_nltk(PCFG(s, [ProbabilisticProduction(s, ["", a], prob=1)]))


def test_sizes_are_refused_before_anything_is_made():
    with pytest.raises(GrammarError, match="10000 nonterminals and 10000 pre-terminals take"):
        Grammar.random(0, 10**4, 10**4, 10)
    with pytest.raises(GrammarError, match="take .* GiB as arrays of rules and of 1000000 words"):
        Grammar.random(0, 1, 10**4, 10**6)
    for length in (10**6, 10**9):
        with pytest.raises(ValueError, match=f"max_length is {length}: the lengths of Grammar"):
            named("toy").length_probabilities(length)
    with pytest.raises(ValueError, match="max_length is True, must be an integer"):
        named("toy").length_probabilities(True)
    # 2^20 chains from S, and a rule of 20,000 symbols.
    pairs = [f"A{n} -> A{n + 1} | B{n + 1}\nB{n} -> A{n + 1} | B{n + 1}" for n in range(20)]
    text = "S -> A0\n" + "\n".join(pairs) + "\nA20 -> 'a'\nB20 -> 'b'"
    with pytest.raises(GrammarError, match="'S' stands for more than 32768 chains of unary rules"):
        Grammar.from_text(text.replace("S -> A0", "S -> A0 | B0"))
    with pytest.raises(GrammarError, match="more than 1000 nonterminals, whose rules take"):
        Grammar.from_text("S -> " + "A " * 20_000 + "\nA -> 'a'")


def test_large_normal_forms_are_refused_by_size():
    words = [f"'w{number}'" for number in range(600)]
    text = "S -> " + " ".join(words) + "\nS -> 'a'"
    with pytest.raises(GrammarError, match="grammar: 599 nonterminals and 601 pre-terminals take"):
        Grammar.from_text(text)


def test_supercritical_is_a_warning():
    text = "S -> S S [{0}] | 'a' [{1}]"
    with pytest.warns(SupercriticalWarning, match="spectral radius 1.2 > 1"):
        Grammar.from_text(text.format(0.6, 0.4))
    critical = Grammar.from_text(text.format(0.5, 0.5))
    assert critical.expected_length == float("inf")
    assert Grammar.from_text(text.format(0.25, 0.75)).expected_length == pytest.approx(1.5)


def test_check_refuses_what_the_constructor_accepts():
    arrays = dict(nonterminals=("S",), preterminals=("A", "B"), vocabulary=("a",))
    rules = np.zeros((1, 3, 3))
    rules[0, 1, 1] = 1
    ones = np.ones((2, 1))
    with pytest.raises(GrammarError, match="not reached from the root: 'B'"):
        Grammar(**arrays, root=np.eye(3)[0], rules=rules, emission=ones).check()
    with pytest.raises(GrammarError, match="of S sum to 0.5"):
        Grammar(**arrays, root=np.eye(3)[0], rules=rules / 2, emission=ones).check()
    with pytest.raises(GrammarError, match="of the root sum to 2"):
        Grammar(**arrays, root=2 * np.eye(3)[0], rules=rules, emission=ones).check()
    with pytest.raises(GrammarError, match="without words: 'S'"):
        endless = np.zeros((1, 3, 3))
        endless[0, 0, 1] = endless[0, 0, 2] = 0.5
        Grammar(**arrays, root=np.eye(3)[0], rules=endless, emission=ones).check()
    with pytest.raises(GrammarError, match="must be finite and not negative"):
        Grammar(**arrays, root=np.eye(3)[0], rules=-rules, emission=ones)


@pytest.mark.parametrize("seed", [0, jax.random.key(1)])
@pytest.mark.parametrize("density", [1.0, 0.05])
def test_random_grammars(seed, density):
    grammar = Grammar.random(seed, 12, 5, 30, density=density, subcritical=0.8)
    grammar.check()
    assert grammar.spectral_radius == pytest.approx(0.8, abs=1e-6)
    assert (grammar.emission.sum(0) > 0).all()
    assert grammar == Grammar.random(seed, 12, 5, 30, density=density, subcritical=0.8)
    assert Grammar.from_nltk(grammar.to_nltk()) == grammar
    assert Grammar.from_json(json.loads(json.dumps(grammar.to_json()))) == grammar
    # The mean by its definition, as far as lengths are probable.
    p = grammar.length_probabilities(400)
    assert p.sum() == pytest.approx(1, abs=1e-9)
    assert (p * np.arange(401)).sum() == pytest.approx(grammar.expected_length, rel=1e-6)
    with pytest.raises(ValueError, match="density is 0, must be"):
        Grammar.random(0, 2, 2, 2, density=0)
    with pytest.raises(ValueError, match="preterminals is 0, must be"):
        Grammar.random(0, 2, 0, 2)


def test_words_and_numbers():
    grammar = named("toy")
    sentences = [["she", "saw", "often"], ["the", "old", "man", "can", "watch"]]
    tokens, lengths = grammar.encode(sentences)
    assert lengths.tolist() == [3, 5] and tokens[0, 3:].tolist() == [0, 0]
    assert grammar.decode(tokens, lengths) == sentences
    with pytest.raises(ValueError, match="sentence 0: 'cat' is not in the vocabulary"):
        grammar.encode([["cat"]])
    with pytest.raises(ValueError, match="sentence 1 is \\[\\], must be a list of words"):
        grammar.encode([["she"], []])
    assert grammar.encode([])[0].shape == (0, 0)
    np.testing.assert_array_equal(grammar.encode([np.array(sentences[0])])[0], tokens[:1, :3])
    for wrong, message in (
        ([["she"]], "sentence 0: word 0 is of type list, must be a string"),
        (["she", ["saw"]], "sentence 0: word 1 is of type list"),
        (["she", 3], "word 1 is 3, must be a string"),
        (["she", None], "word 1 is None, must be a string"),
        (7, "sentence 0 is 7, must be a list of words"),
        ({"she"}, "sentence 0 is of type set, must be a list of words"),
        ("she", "sentence 0 is 'she', must be a list of words"),
        (np.array([["she"]]), "sentence 0 is of type ndarray, must be a list of words"),
        (np.array(["she", 3], object), "word 1 is 3, must be a string"),
    ):
        with pytest.raises(ValueError, match=message):
            grammar.encode([wrong])
    with pytest.raises(ValueError, match="tokens of sentence 0 must be in 0..16"):
        grammar.decode(np.array([[-1]]), np.array([1]))
    with pytest.raises(ValueError, match=r"lengths must be 1 integers in 0\.\.1"):
        grammar.decode(np.array([[0]]), np.array([2]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rules": None}, "'rules' has a value None, must be {symbol: "),
        ({"root": 3}, "'root' has a value 3, must be {symbol: probability}"),
        ({"emission": {"A": 0.5}}, "'emission' has a value 0.5, must be {symbol: {word: "),
        ({"root": {"S": "x"}}, "'root' cannot be read"),
        ({"root": {"S": "1"}}, "'root' cannot be read: '1' is no number"),
        ({"root": {"S": True}}, "'root' cannot be read: True is no number"),
        ({"root": {"S": 10**400}}, r"'root' cannot be read: 10+\.\. .*is too large for a float"),
        ({"emission": {"A": {"a": 10**400}}}, "'emission' cannot be read: 10.*too large for a"),
        ({"rules": {"S": [["A", "B", 10**400]]}}, "'rules' cannot be read: 10.*too large for a"),
        ({"rules": {"S": [["A", "B", 0.5]] * 2}}, "'rules' .*: a rule of 'S' is there twice"),
        ({"root": {"S": float("inf")}}, "root must be finite and not negative"),
        ({"vocabulary": ["a", "b", "a"]}, "vocabulary: 'a' is there twice, must be different"),
        ({"vocabulary": ["a", "b", ""]}, "vocabulary: name 2 is '', must be a string of one"),
        ({"vocabulary": ["a", "b", "c\0"]}, "vocabulary: name 2 is 'c.x00', must be"),
        ({"vocabulary": ["a", "b", "\ud800"]}, "vocabulary: name 2 is '.ud800', must be"),
        ({"vocabulary": ["a", "b", 1]}, "vocabulary: name 2 is 1, must be a string"),
        ({"vocabulary": ["a", "b", ["c"]]}, "vocabulary: name 2 is of type list, must be"),
        ({"vocabulary": "ab"}, "vocabulary is 'ab', must be different names"),
        ({"vocabulary": {"a": 1}}, "vocabulary is of type dict, must be different names"),
        ({"vocabulary": []}, "'a' is in a rule but is no symbol or word"),
        ({"rules": {"S": [], "A": []}}, "symbols: 'A' is there twice"),
        ({"emission": {"A": {"a": 1}, "": {}}}, "symbols: name 2 is '', must be"),
        ({"rules": {"S": [["A"]]}}, "'rules' cannot be read"),
        ({"rules": {"S": [["A", 3, 1.0]]}}, "'rules' cannot be read: 3 is no name of a symbol"),
        ({"rules": {"S": [[["A"], "A", 1.0]]}}, "'rules' .* of type list is no name of a symbol"),
        ({"root": {"T": 1.0}}, "'T' is in a rule but is no symbol or word"),
        ({"emission": {"A": {"z": 1.0}, "B": {}}}, "'z' is in a rule"),
    ],
)
def test_json_that_is_no_grammar(change, message):
    data = Grammar.from_text(SMALL).to_json()
    with pytest.raises(GrammarError, match=message):
        Grammar.from_json({**data, **change})
    del data["vocabulary"]
    with pytest.raises(GrammarError, match="lacks 'vocabulary'"):
        Grammar.from_json(data)


def test_named_grammars():
    for name in NAMED:
        grammar = named(name)
        grammar.check()
        assert grammar.expected_length < 13
    with pytest.raises(ValueError, match="grammar 'french' is not one of toy, english"):
        named("french")
