"""Transformers that run known algorithms, their trained counterparts, and probes of both.

The public names of `constructions`, `synthetic` and `probes` in one place:

    import orrery

    c = orrery.CATALOGUE["gradient-descent"](dim_x=10, num_examples=10)
    print(orrery.verify(c).passed)

A name is imported when it is first used, so that `import orrery` itself takes no time.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from constructions import CATALOGUE as CATALOGUE
    from constructions import primitives as primitives
    from constructions.catalogue import Family as Family
    from constructions.claims import Claim as Claim
    from constructions.claims import Evidence as Evidence
    from constructions.claims import NearMiss as NearMiss
    from constructions.core.compile import compile_program as compile_program
    from constructions.core.evaluate import evaluate as evaluate
    from constructions.core.program import Head as Head
    from constructions.core.program import Layer as Layer
    from constructions.core.program import Mlp as Mlp
    from constructions.core.program import Norm as Norm
    from constructions.core.program import Program as Program
    from constructions.core.slots import Slots as Slots
    from constructions.core.slots import concatenate as concatenate
    from constructions.core.slots import constant as constant
    from constructions.core.softmax import soften as soften
    from constructions.core.transformer import Transformer as Transformer
    from constructions.family import Certificate as Certificate
    from constructions.family import Construction as Construction
    from constructions.family import Counterpart as Counterpart
    from constructions.family import Gauge as Gauge
    from constructions.family import Place as Place
    from constructions.family import Tokens as Tokens
    from constructions.family import assert_exact as assert_exact
    from constructions.family import verify as verify
    from constructions.imported import import_weights as import_weights
    from constructions.interchange.decoder import TrainedAuxiliary as TrainedAuxiliary
    from constructions.interchange.export import export as export
    from constructions.interchange.huggingface import load_auxiliary as load_auxiliary
    from constructions.interchange.huggingface import save_auxiliary as save_auxiliary
    from constructions.measurement import Measurement as Measurement
    from constructions.measurement import Remark as Remark
    from constructions.mesa_layer import mesa as mesa
    from constructions.regression import Regression as Regression
    from constructions.runs import Run as Run
    from constructions.runs import fit_family as fit_family
    from constructions.runs import load_checkpoints as load_checkpoints
    from constructions.runs import load_run as load_run
    from constructions.softened import Softened as Softened
    from probes import PROBES as PROBES
    from probes.foreign import Subject as Subject
    from probes.foreign import foreign_run as foreign_run
    from probes.ledger import ledger as ledger
    from probes.probe import Probe as Probe
    from probes.probe import Result as Result
    from probes.report.data import compare as compare
    from probes.report.page import write_report as write_report
    from probes.subject import read_sites as read_sites
    from probes.sweep import Sweep as Sweep
    from probes.torch_hooks import from_torch as from_torch
    from synthetic.fitting.recipe import Recipe as Recipe
    from synthetic.fitting.train import fit as fit
    from synthetic.grammar import chart as chart
    from synthetic.grammar.grammar import Grammar as Grammar
    from synthetic.tasks.regression import RegressionTask as RegressionTask
    from synthetic.tasks.task import Batch as Batch
    from synthetic.tasks.task import Task as Task

PACKAGES = ("constructions", "synthetic", "probes")

#: Where every public name is.
HOMES = {
    "constructions": "CATALOGUE primitives",
    "constructions.catalogue": "Family",
    "constructions.claims": "Claim Evidence NearMiss",
    "constructions.core.compile": "compile_program",
    "constructions.core.evaluate": "evaluate",
    "constructions.family": (
        "Certificate Construction Counterpart Gauge Place Tokens assert_exact verify"
    ),
    "constructions.imported": "import_weights",
    "constructions.interchange.decoder": "TrainedAuxiliary",
    "constructions.interchange.export": "export",
    "constructions.interchange.huggingface": "load_auxiliary save_auxiliary",
    "constructions.mesa_layer": "mesa",
    "constructions.measurement": "Measurement Remark",
    "constructions.core.program": "Head Layer Mlp Norm Program",
    "constructions.regression": "Regression",
    "constructions.runs": "Run fit_family load_checkpoints load_run",
    "constructions.core.slots": "Slots concatenate constant",
    "constructions.core.softmax": "soften",
    "constructions.softened": "Softened",
    "constructions.core.transformer": "Transformer",
    "probes": "PROBES",
    "probes.foreign": "Subject foreign_run",
    "probes.ledger": "ledger",
    "probes.probe": "Probe Result",
    "probes.report.data": "compare",
    "probes.report.page": "write_report",
    "probes.subject": "read_sites",
    "probes.sweep": "Sweep",
    "probes.torch_hooks": "from_torch",
    "synthetic.grammar": "chart",
    "synthetic.grammar.grammar": "Grammar",
    "synthetic.fitting.recipe": "Recipe",
    "synthetic.tasks.regression": "RegressionTask",
    "synthetic.tasks.task": "Batch Task",
    "synthetic.fitting.train": "fit",
}
_HOME = {name: module for module, names in HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("orrery-transformers")
    if name not in _HOME:
        raise AttributeError(f"module 'orrery' has no attribute {name!r}")
    check_packages()
    home = importlib.import_module(_HOME[name])
    # a module of a package is no attribute of it before it is imported
    found = getattr(home, name, None) or importlib.import_module(f"{_HOME[name]}.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def check_packages() -> None:
    """Whether Python finds our packages where this file is.

    Raises:
        ImportError: a folder or file of somebody else's, of the same name, comes first.
    """
    here = Path(__file__).resolve().parent
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        places = () if spec is None else spec.submodule_search_locations or (spec.origin or "",)
        if here / package not in [Path(place).resolve() for place in places]:
            other = ", ".join(map(str, places)) or "nothing"
            raise ImportError(
                f"Python finds {other} under the name {package}, which hides orrery's own "
                f"{here / package}: rename that folder, or start Python in another one"
            )


def main() -> int:
    """The command; the exit status."""
    try:
        check_packages()
    except ImportError as error:
        print(f"orrery: {error}", file=sys.stderr)
        return 2
    from probes import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
