"""The subcommand `orrery sweep`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from probes.options import FAILED, OK, Settings, family_names, parse_settings, seed_list
from probes.sweep import engines, plan


@dataclass
class Sweep:
    """Fit a family over a grid of settings and seeds: a table, figures and a page that grow.

    The same command goes on where one was ended. A setting is one of the family, or a field of the
    recipe of its fits: recipe.steps, or learning_rate where the family has no such setting.
    """

    name: Positional[str]
    out: Path
    """the folder"""
    grid: Annotated[UseAppendAction[list[str]], arg(metavar="SETTING=VALUES")]
    """a,b,c or lo:hi:step; several make a grid"""
    measure: str = "loss"
    """a list with commas, of loss, canonical_distance and probe:NAME"""
    seeds: int = 1
    """fits of every point, counted from --seed"""
    seed: int = 0
    settings: Settings = field(default_factory=list)
    quick: bool = False
    """start from demonstration settings"""
    lanes: int = 32
    """most fits in one program"""
    examples: int = 4096
    """fresh inputs on which losses are taken"""
    workers: int = 1
    """processes of this machine"""
    ray: str | None = None
    """a Ray cluster: its address, "auto", or "local" to start one here"""
    cpus: float = 1.0
    """processors that Ray gives to each block of points"""
    gpus: float = 0.0
    overwrite: bool = False
    """begin anew"""

    def run(self) -> int:
        """Run the command; the exit status."""
        family_names((self.name,))
        sweep = plan.Sweep(
            self.name,
            plan.parse_grid(self.grid),
            seed_list(self.seed, self.seeds) or (),
            self.measure.split(","),
            parse_settings(self.settings),
            quick=self.quick,
            lanes=self.lanes,
            examples=self.examples,
        )
        options = {"workers": self.workers, "ray": self.ray, "cpus": self.cpus, "gpus": self.gpus}
        engines.check_engine(**options)
        engines.open_folder(sweep, self.out, overwrite=self.overwrite)
        rows = sweep.run(self.out, progress=lambda s: print(s, file=sys.stderr), **options)
        failed = [row for row in rows if row["failed"]]
        for row in failed:
            line = f"point {row['point']}, seed {row['seed']}: {row['failed']}"
            print(f"orrery: {line}", file=sys.stderr)
        print(f"{len(rows)} fits, {len(failed)} failed.\n{self.out / 'report.html'}")
        return FAILED if failed else OK
