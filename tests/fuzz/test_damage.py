"""Damaged runs, models and texts: read as they are or refused in one line, nothing touched."""

import functools
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from fuzz.damage import HARMLESS, KINDS, Damage, contents, damages, opened
from fuzz.fuzzing import fuzz
from hypothesis import event

from constructions.interchange.huggingface import load_auxiliary
from constructions.runs import Run, fit_family, load_checkpoints, load_run
from synthetic.grammar import treebank
from synthetic.grammar.grammar import Grammar, SupercriticalWarning
from synthetic.tasks.text import Corpus

GOLDEN = Path(__file__).parents[1] / "constructions" / "golden"
GRAMMAR = """\
# a comment
S -> NP VP [0.9] | 'go' [0.1]
NP -> 'she' [0.5] | D N [0.5]
VP -> V NP [0.7] | V [0.3]
D -> 'the' [1.0]
N -> 'dog' [0.5] | "dog's" [0.5]
V -> 'ran' [1.0]
"""
TREES = """\
( (S (NP-SBJ (DT The) (NN dog)) (VP (VBD ran) (-NONE- *T*-1)) (. .)) )
( (S (NP (PRP She)) (VP (VBD saw) (NP (DT the) (JJ old) (NN dog)))) )
"""
TEXT = tuple(kind for kind in KINDS if kind not in ("edit", "swap"))


@functools.cache
def run_folder() -> Path:
    """A small run with checkpoints."""
    path = Path(tempfile.mkdtemp()) / "run"
    fit_family(
        "gradient-descent", {"dim_x": 2, "num_examples": 3, "step_size": 1.0}, path, seeds=[3, 4],
        steps=2, chunk=1, batch=4, checkpoint_every=1,
    )  # fmt: skip
    return path


def arrays(model: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model))]


def of_run(run: Run) -> Any:
    return run.settings, run.seeds, run.history, [arrays(m) for m in run.models]


def of_checkpoints(found: Any) -> Any:
    return [(step, [arrays(m) for m in models]) for step, models in found]


def survives(original: Path, changes: list[Damage], read: Callable, same: Callable) -> None:
    """A damaged copy is read or refused, and nothing else in its neighbourhood changes."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "neighbour" / original.name
        shutil.copytree(original, folder)
        said = [damage.to(folder) for damage in changes]
        event(said[0])
        before = contents(Path(place))
        found = opened(read, folder)
        event("read" if found is not None else "refused")
        after = contents(Path(place))
        assert after.keys() == before.keys(), {*after} ^ {*before}
        assert after == before, [name for name in after if after[name] != before[name]]
        if all(damage.kind in HARMLESS for damage in changes):
            assert found is not None and same(found) == same(read(original))


@fuzz(quick=8, share=0.1, changes=damages())
def test_runs(changes: list[Damage]) -> None:
    survives(run_folder(), changes, load_run, of_run)


@fuzz(quick=2, share=0.03, changes=damages())
def test_checkpoints(changes: list[Damage]) -> None:
    survives(run_folder(), changes, load_checkpoints, of_checkpoints)


@fuzz(quick=12, share=0.06, changes=damages())
def test_models(changes: list[Damage]) -> None:
    survives(GOLDEN / "gpt2", changes, load_auxiliary, arrays)


@fuzz(quick=12, share=0.06, changes=damages())
def test_models_in_several_files(changes: list[Damage]) -> None:
    survives(GOLDEN / "opt_sharded", changes, load_auxiliary, arrays)


def damaged(text: str, name: str, changes: list[Damage], read: Callable) -> Any:
    """What is read of a damaged file; a file that is none may raise OSError, as documented."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "folder" / name
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
        for damage in changes:
            damage.to(file.parent)
        try:
            return opened(read, file)
        except OSError:
            assert not file.is_file() or file.is_symlink()
            return None


@fuzz(quick=25, share=0.1, changes=damages(kinds=TEXT))
def test_grammar_files(changes: list[Damage]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SupercriticalWarning)
        g = damaged(GRAMMAR, "grammar.pcfg", changes, Grammar.from_file)
        if g is not None:
            assert Grammar.from_json(json.loads(json.dumps(g.to_json()))) == g
            again = Grammar.from_nltk(g.to_nltk())
            assert again == g


@fuzz(quick=25, share=0.1, changes=damages(kinds=("edit",)))
def test_grammar_json(changes: list[Damage]) -> None:
    text = json.dumps(Grammar.from_text(GRAMMAR).to_json())

    def read(file: Path) -> Any:
        try:
            data = json.loads(file.read_text())
        except (ValueError, RecursionError):
            return None
        return Grammar.from_json(data)

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "grammar.json"
        file.write_text(text)
        for damage in changes:
            damage.to(file.parent)
        opened(read, file, names=False)


@fuzz(quick=25, share=0.1, changes=damages(kinds=TEXT))
def test_treebank_files(changes: list[Damage]) -> None:
    trees = damaged(TREES, "trees.mrg", changes, treebank.read_brackets)

    def use(_: Path) -> Any:
        kept = [t for t in map(treebank.clean, trees) if t is not None]
        forms = [treebank.binarise(treebank.collapse(t)) for t in kept]
        back = [treebank.expand(treebank.unbinarise(t)) for t in forms]
        assert back == kept
        return treebank.induce(forms) if forms else None

    if trees is not None:
        opened(use, Path("/"), names=False)


@fuzz(quick=15, share=0.05, changes=damages(kinds=TEXT))
def test_corpus_files(changes: list[Damage]) -> None:
    corpus = damaged(TREES, "text.txt", changes, Corpus.from_file)
    if corpus is not None:
        assert len(corpus.tokens)
