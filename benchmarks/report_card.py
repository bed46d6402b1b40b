"""How well do methods find mechanisms that are known? The card that README and docs quote.

The records of the subjects lie in a folder, `--out`, where a second run goes on; without `--full`
it is the quick card. `--save` keeps the card in results/ and writes the tables that follow from it.
`--within` leaves out what has not been measured after so many minutes.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
from common import RESULTS, machine

from probes.bench import guide
from probes.bench.card import card_of, read_record, run, show, to_json
from probes.bench.command import BATCH, QUICK_DISGUISES, QUICK_FAMILIES
from probes.bench.disguises import DISGUISES
from probes.bench.families import FAMILIES
from probes.bench.methods import METHODS

ROOT = Path(__file__).parents[1]
#: Slowest last, so that what is left out for want of time is theirs.
LAST = ("noisy-regression", "hyper-semi-supervised", "hedge", "inside-outside")
SLOW = "alignment search"


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/report_card"))
    parser.add_argument("--full", action="store_true", help="all families and disguises")
    parser.add_argument("--seeds", type=int, help="1, with --full 3, if not given")
    parser.add_argument("--within", type=float, default=1e9, help="minutes")
    parser.add_argument("--save", action="store_true", help="keep it, and write the tables")
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    begun = time.monotonic()
    families = sorted(FAMILIES, key=lambda f: (f in LAST, LAST.index(f) if f in LAST else 0))
    disguises = list(DISGUISES)
    if not given.full:
        families, disguises = list(QUICK_FAMILIES), list(QUICK_DISGUISES)
    seeds = range(given.seeds or (3 if given.full else 1))
    cheap = [name for name in METHODS if name != SLOW]
    quick = [family for family in families if family not in LAST]
    late = [family for family in families if family in LAST]
    # what is there already is not made again, so that rounds may overlap
    rounds: list[tuple[list[str], range, list[str]]] = [
        (quick, seeds[:2], cheap),
        (late, seeds[:1], cheap),
        (quick, seeds[:1], [SLOW]),
        (families, seeds, cheap),
        (families, seeds, [SLOW]),
    ]
    plan = [(f, n, asked) for some, which, asked in rounds for n in which for f in some]
    for family, seed, methods in plan:
        if time.monotonic() - begun < 60 * given.within:
            print(f"{family}, seed {seed}", file=sys.stderr, flush=True)
            run([family], disguises, methods, [seed], BATCH, given.out, _say)
    records = [read_record(path) for path in sorted((given.out / "subjects").glob("*.json"))]
    card = card_of(records)
    show(card)
    if given.save:
        kept = {"machine": machine(), **to_json(card)}
        text = json.dumps(kept, indent=1, ensure_ascii=False)
        (RESULTS / f"bench_{jax.default_backend()}.json").write_text(text + "\n")
        guide.write(kept, ROOT)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
