"""Every notebook runs at quick settings, and its .ipynb is its .py, executed."""

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest
from execute_notebooks import SOURCES, execute, from_source, not_installed
from nbclient.exceptions import CellExecutionError

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@each_notebook
def test_ipynb_is_the_executed_source(source: Path) -> None:
    executed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(executed) == cells(from_source(source)), "out of date: run `make notebooks`"
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]


def names(cell: nbformat.NotebookNode) -> tuple[list[str], set[str]]:
    """The kinds of a cell's outputs, prints left out, and what its printed lines are about.

    A line is about what stands before its first number, bracket, colon or wide space, in a table
    that of its first column. How many lines are about the same depends on the settings.
    """
    outputs = cell.get("outputs", [])
    lines = "".join(o.text for o in outputs if o.output_type == "stream").splitlines()
    labels = {re.split(r"[\d:({\[|]|  ", line.strip("| "))[0].strip(" -") for line in lines}
    return [o.output_type for o in outputs if o.output_type != "stream"], labels - {""}


def missing(ran: nbformat.NotebookNode, stored: nbformat.NotebookNode) -> list[str]:
    """What a run shows and the stored outputs do not, cell by cell."""
    found = []
    for number, cells in enumerate(zip(ran.cells, stored.cells, strict=True)):
        (kinds, said), (kept, known) = map(names, cells)
        found += [f"cell {number}: {kinds}, stored {kept}"] if kinds != kept else []
        found += [f"cell {number}: {label}" for label in sorted(said - known)]
    return found


@each_notebook
def test_runs_at_quick_settings_and_shows_what_is_stored(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if absent := not_installed(source):
        pytest.skip(f"{', '.join(absent)} not installed, which the notebook imports")
    monkeypatch.setenv("ORRERY_QUICK", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures inline, as a reader sees them
    stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert not missing(execute(from_source(source)), stored), "out of date: run `make notebooks`"


def test_what_is_not_stored_is_missed() -> None:
    def notebook(*outputs: dict[str, Any]) -> nbformat.NotebookNode:
        cell = {"cell_type": "code", "outputs": list(outputs)}
        return nbformat.from_dict({"cells": [cell]})

    def prints(text: str) -> dict[str, Any]:
        return {"output_type": "stream", "text": text}

    stored = notebook(prints("equal loss    holds 0.1\n| mean | 2 |\n"), prints("seed 0: 3\n"))
    few = notebook(prints("seed 7: 1\n"))
    more = notebook(prints("equal loss    holds 0.1\nequal steps   holds 2\n| worst | 2 |\n"))
    figure = notebook(prints("seed 7: 1\n"), {"output_type": "display_data"})
    assert missing(stored, stored) == missing(few, stored) == []
    assert missing(more, stored) == ["cell 0: equal steps", "cell 0: worst"]
    assert missing(figure, stored) == ["cell 0: ['display_data'], stored []"]


#: Changes that the notebooks invite their reader to make: (notebook, what is replaced, by what).
CHANGES = [
    ("00_write_your_own", "(0.5, 0.3, 0.2), 2, 12", "[0.7], 3, 5"),
    ("00_write_your_own", "(0.5, 0.3, 0.2), 2, 12", "[0.5, 0.5], 1, 9"),
    ("01_gradient_descent", '"steps": 1, "step_size": None', '"steps": 2, "step_size": 3.0'),
    ("01_gradient_descent", '"dim_y": 1', '"dim_y": 2'),
    ("03_noisy_regression", '"dim_x": 10, "num_examples": 20', '"dim_x": 5, "num_examples": 20'),
    ("03_noisy_regression", "noise_levels = (1.0, 3.0)", "noise_levels = (0.5, 4.0)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("notebook", "old", "new"),
    [CHANGES[0], *(pytest.param(*change, marks=pytest.mark.slow) for change in CHANGES[1:])],
    ids=[f"{stem[:2]}: {new}" for stem, _, new in CHANGES],
)
def test_runs_when_the_reader_changes_it(
    notebook: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORRERY_QUICK", "1")
    (source,) = (s for s in SOURCES if s.stem == notebook)
    code = "\n".join(c.source for c in from_source(source).cells if c.cell_type == "code")
    assert code.count(old) == 1, f"{notebook} no longer says {old!r}"
    scope: dict[str, Any] = {"__name__": "notebook"}
    exec(compile(code.replace(old, new), str(source), "exec"), scope)  # without a kernel of its own
    plt.close("all")


def test_failing_notebook_is_caught(tmp_path: Path) -> None:
    source = tmp_path / "99_false.py"
    source.write_text("# %% [markdown]\n# A claim.\n\n# %%\nassert 1 + 1 == 3\n")
    notebook = from_source(source)
    assert cells(notebook) == [("markdown", "A claim."), ("code", "assert 1 + 1 == 3")]
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook)
