"""The subcommand `orrery bench`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from probes.options import OK, check_seed, duration, seed_list, write_file, write_json
from probes.report.index import PAGE
from synthetic.files import check_writable

#: What --quick asks: families of linear, centred and softmax heads, disguises that tell most apart.
QUICK_FAMILIES = ("gradient-descent", "kernel-descent", "hyper-prototypes")
QUICK_DISGUISES = ("bare", "basis", "distractors", "backup")
#: Inputs of every subject.
BATCH = 64


@dataclass
class Bench:
    """How well do methods find mechanisms that are known? A card of methods by disguises.

    The same command with the same --out goes on where it was ended.
    """

    methods: Annotated[str | None, arg(metavar="A,B")] = None
    """methods, with commas; all if none is named"""
    families: Annotated[str | None, arg(metavar="A,B")] = None
    """families, with commas"""
    disguises: Annotated[str | None, arg(metavar="A,B")] = None
    """disguises, with commas"""
    seeds: int | None = None
    """subjects of each family and disguise, 3 if not given"""
    seed: int = 0
    """the first seed"""
    quick: bool = False
    """three families, four disguises, one seed"""
    out: Path | None = None
    """keep scores of every subject, card.json and report.html in this folder"""
    export: Path | None = None
    """write the subjects as Hugging Face folders for methods of others, and ask nothing"""
    score: Path | None = None
    """score the answers in this file, with the key.json of the export beside it"""

    def run(self) -> int:
        """Run the command; the exit status."""
        check_seed(self.seed)
        seeds = seed_list(self.seed, (1 if self.quick else 3) if self.seeds is None else self.seeds)
        if self.out is not None:
            if self.out.exists() and not self.out.is_dir():
                raise ValueError(f"--out {self.out}: is a file, must be a folder")
            check_writable(self.out)
        if self.export is not None and self.score is not None:
            raise ValueError(f"--score {self.score}: give it without --export")
        import jax

        from probes.bench import exchange
        from probes.bench.card import card_of, page, run, show, to_json
        from probes.bench.disguises import DISGUISES
        from probes.bench.families import FAMILIES
        from probes.bench.methods import METHODS

        if self.score is not None:
            with jax.enable_x64(True):
                records = exchange.score_answers(self.score)
            show(card_of(records))
            return OK
        chosen = (
            _some(
                "--families", self.families, FAMILIES, QUICK_FAMILIES if self.quick else FAMILIES
            ),
            _some(
                "--disguises",
                self.disguises,
                DISGUISES,
                QUICK_DISGUISES if self.quick else DISGUISES,
            ),
            _some("--methods", self.methods, METHODS, METHODS),
        )
        if self.export is not None:
            with jax.enable_x64(True):
                written = exchange.write(*chosen[:2], seeds or (), BATCH, self.export, _say)
            print(f"{self.export}: {len(written)} subjects; key.json is not to be published")
            return OK
        begun = time.perf_counter()
        with jax.enable_x64(True):
            records = run(*chosen, seeds or (), BATCH, self.out, _say)
            card = card_of(records)
            show(card)
            _say(f"took {duration(time.perf_counter() - begun)}")
            if self.out is not None:
                self.out.mkdir(parents=True, exist_ok=True)
                write_json(self.out / "card.json", to_json(card), True)
                write_file(self.out / PAGE, page(card, records).encode())
                print(self.out / PAGE)
        return OK


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _some(option: str, given: str | None, known: Any, default: Any) -> list[str]:
    """Names with commas; ValueError for one that is not known."""
    if given is None:
        return list(default)
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names or [given]:
        if name not in known:
            raise ValueError(f"{option} {name}: must be some of {', '.join(known)}")
    return list(dict.fromkeys(names))
