"""Run notebooks: `notebooks/NN_name.py` (jupytext percent) makes `NN_name.ipynb` with outputs.

As a script it refreshes every .ipynb, or those whose names are given:

    python tests/execute_notebooks.py [NN_name ...]
"""

import importlib.util
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))


#: Modules of extras; a notebook that imports one is run where that is installed.
OPTIONAL = ("torch", "transformers", "transformer_lens")


def not_installed(source: Path) -> list[str]:
    """Those of the optional modules that a notebook imports and that are not installed."""
    text = source.read_text(encoding="utf-8")
    used = [m for m in OPTIONAL if re.search(rf"^(import|from) {m}\b", text, re.MULTILINE)]
    return [module for module in used if importlib.util.find_spec(module) is None]


def from_source(source: Path) -> nbformat.NotebookNode:
    """The unexecuted notebook of a .py, the same to the byte whenever it is made."""
    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
    return nbformat.from_dict(notebook)


def execute(notebook: nbformat.NotebookNode, timeout: int = 900) -> nbformat.NotebookNode:
    """Run all cells in an empty folder; raises `CellExecutionError` at the first that fails."""
    # The packages are found even where they are not installed.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            record_timing=False,
            # Kernels talk over local sockets; the advice to encrypt them is noise here.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        return client.execute(env={**os.environ, "PYTHONPATH": path})


def main(names: list[str]) -> None:
    """Execute the notebooks named, all without names, and write each .ipynb."""
    known = {source.stem: source for source in SOURCES}
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"no notebook {', '.join(unknown)}; there are: {', '.join(known)}")
    for source in [known[name] for name in names] or SOURCES:
        if absent := not_installed(source):
            print(f"{source.name}: left out, {', '.join(absent)} not installed", flush=True)
            continue
        print(source.name, flush=True)
        nbformat.write(execute(from_source(source)), source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
