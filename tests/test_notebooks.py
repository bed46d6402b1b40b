"""Every notebook runs at quick settings, and its .ipynb is its .py, executed."""

from pathlib import Path

import nbformat
import pytest
from execute_notebooks import SOURCES, execute, from_source
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


@each_notebook
def test_runs_at_quick_settings(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_QUICK", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures inline, as a reader sees them
    execute(from_source(source))


def test_failing_notebook_is_caught(tmp_path: Path) -> None:
    source = tmp_path / "99_false.py"
    source.write_text("# %% [markdown]\n# A claim.\n\n# %%\nassert 1 + 1 == 3\n")
    notebook = from_source(source)
    assert cells(notebook) == [("markdown", "A claim."), ("code", "assert 1 + 1 == 3")]
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook)
