"""Writes the pages of the site that follow from the code, and its table of contents.

    python docs/generate.py FOLDER

FOLDER then holds mkdocs.yml and pages/: the hand-written pages of this folder, one page for every
family of the catalogue (picture, equations, claims), the tables of all claims and of what they
cover of each paper, the notebooks as they were executed, and the reference. Where `make demo` has
left its reports, the verdicts are in the table and the reports lie beside the pages of the
families.

It is also the hook of mkdocs that keeps the address of a script server out of the pages.
"""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
#: Pages by hand that teach how to do something, in order.
HOW_TO = (
    "using",
    "your_model",
    "your_algorithm",
    "your_tool",
    "sweep",
    "figure",
    "command",
    "probes",
)
#: What the first page shows: the picture of a family, and the first figure of a notebook.
FIRST, NOTEBOOK = "gradient-descent", "01_gradient_descent.ipynb"
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\\w$])\$([^\s$](?:[^$]*?[^\s$\\])?)\$(?!\w)", re.DOTALL)


def generate(out: Path, reports: Path = ROOT / "reports") -> Path:
    """Write all of it into a folder that is made anew; returns the path of mkdocs.yml."""
    from constructions import CATALOGUE

    pages = out / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    (pages / "families").mkdir(parents=True)
    for page in (ROOT / "docs").iterdir():
        if page.suffix in (".md", ".css", ".png", ".svg"):
            shutil.copy(page, pages)
    found = {name: read_report(reports / name) for name in CATALOGUE}
    for name, report in found.items():
        write_family(pages / "families", name, report)
        if report:
            shutil.copytree(reports / name, pages / "reports" / name)
    constructions = {name: construct(name) for name in CATALOGUE}
    (pages / "claims.md").write_text(claims_page(constructions, found))
    (pages / "papers.md").write_text(papers_page())
    notebooks = write_notebooks(pages / "notebooks")
    shutil.copy(pages / "families" / f"{FIRST}.png", pages)
    (pages / "first.png").write_bytes(first_figure(ROOT / "notebooks" / NOTEBOOK))
    (pages / "reference.md").write_text(reference_page())
    (pages / "index.md").write_text(
        (ROOT / "docs" / "index.md").read_text().replace("<!-- families -->", families_table())
    )
    contents = [
        {"Start": "index.md"},
        {"How to": [f"{name}.md" for name in HOW_TO]},
        {"Families": [{name: f"families/{name}.md"} for name in CATALOGUE]},
        {"Claims": "claims.md"},
        {"Papers": "papers.md"},
        {"Notebooks": [{title: f"notebooks/{stem}.ipynb"} for stem, title in notebooks.items()]},
        {"Reference": "reference.md"},
    ]
    config = {
        "INHERIT": str(ROOT / "docs" / "mkdocs.yml"),
        "docs_dir": "pages",
        "site_dir": "html",
        "hooks": [str(Path(__file__).resolve())],
        "nav": contents,
    }
    path = out / "mkdocs.yml"
    path.write_text(json.dumps(config, indent=2))  # JSON is YAML
    return path


def construct(name: str) -> Any:
    """A family's construction at its example settings."""
    from constructions import runs

    return runs.construct(name)


def read_report(folder: Path) -> Mapping[str, Any] | None:
    """The numbers of a report that `make demo` left; None where there is none."""
    path = folder / "report.json"
    return json.loads(path.read_text()) if path.is_file() else None


def cell(text: Any) -> str:
    """A text as a cell of a Markdown table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;")


def table(columns: tuple[str, ...], rows: Iterator[tuple[Any, ...]] | list[tuple[Any, ...]]) -> str:
    """A Markdown table; "" without rows."""
    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "\n".join(lines) + "\n" if lines else ""


def source_link(source: str) -> str:
    """A source with its arXiv number as a link."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", source)


def write_family(folder: Path, name: str, report: Mapping[str, Any] | None) -> None:
    """The page of a family, and its picture."""
    from constructions import CATALOGUE

    family, construction = CATALOGUE[name], construct(name)
    drawing = construction.program.draw(folder / f"{name}.png", name=name)
    alt = re.sub(r"[\[\]\"<>]", " ", drawing.alt.partition(". Nodes")[0])
    settings = " ".join(
        f"--set {key}={json.dumps(value)}" for key, value in family.example().items()
    )
    about = family.about[:1].upper() + family.about[1:]
    lines = ["---", "hide: [toc]", "---", f"# {name}", ""]
    lines += [f"{about} ({source_link(family.source)}).", ""]
    if report:
        lines += [f'!!! note ""\n    {report["verdict"]}: [report](../reports/{name}/report.html)']
    lines += [f"\n[![{alt}]({name}.png)]({name}.png)\n", "## As equations", ""]
    lines += ["```text", construction.program.equations(name), "```", ""]
    if construction.claims:
        lines += ["## Claims about trained models", "", claims_table(construction, report)]
    lines += ["## In Python", "", "```python", "from orrery import CATALOGUE", ""]
    lines += [f'c = CATALOGUE["{name}"](**CATALOGUE["{name}"].example())']
    lines += ["compiled = c.compile()", "print(compiled.certificate)", "```", ""]
    lines += ["The example settings, as the command takes them:", ""]
    lines += ["```", f"orrery compare {name} {settings} --out report", "```", ""]
    kind = type(construction)
    lines += ["## Reference", "", f"::: {kind.__module__}.{kind.__name__}", ""]
    (folder / f"{name}.md").write_text("\n".join(lines))


def claims_table(construction: Any, report: Mapping[str, Any] | None) -> str:
    """Every claim: what it says, when it holds, what it must reject, and what was found."""
    from probes.style import number

    said = {row["claim"]["name"]: row["verdict"] for row in (report or {}).get("claims", ())}
    rows = [
        (
            f"**{claim.name}**: {claim.statement} {claim.source}",
            f"{'at most' if claim.direction == '<=' else 'at least'} {number(claim.threshold)}",
            "" if claim.published is None else number(claim.published),
            ", ".join(("random init", *claim.catches)),
            *((said.get(claim.name, ""),) if report else ()),
        )
        for claim in construction.claims
    ]
    columns = ("claim", "holds if", "published", "must reject")
    return table((*columns, "found") if report else columns, rows)


def claims_page(
    constructions: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any] | None]
) -> str:
    """Every claim of every family."""
    lines = [
        "# Claims",
        "",
        "A claim counts only if its statistic accepts the compiled construction and rejects a "
        "random model and the near-misses named here; it holds if every trained model satisfies "
        "it. `orrery claims NAME` decides those of a family on freshly trained models, and "
        "measures the published figures and tables.",
        "",
    ]
    for name, construction in constructions.items():
        found = claims_table(construction, reports.get(name))
        lines += [f"## {name}", "", f"[The construction](families/{name}.md).", ""]
        lines += [found or "Nothing is claimed at the example settings.", ""]
    return "\n".join(lines)


def papers_page() -> str:
    """What the ledger holds of each paper, item by item, and what it does not."""
    from constructions import CATALOGUE
    from probes.coverage import coverage
    from probes.report.tables import coverage_cells

    lines = [
        "# Papers",
        "",
        "What the ledger holds of each paper, at what size, and whether it can fail: a claim must "
        "reject a random model and its near-misses, a number must come out or lie within bounds, "
        "and a remark decides nothing. `orrery claims --table` prints this.",
        "",
    ]
    found = coverage([*CATALOGUE])
    for paper in dict.fromkeys(line.paper for line in found):
        lines += [f"## {source_link(paper) or 'Of no paper'}", ""]
        rows = [coverage_cells(line) for line in found if line.paper == paper]
        columns = ("item", "rows", "size", "can fail", "missing")
        lines += [table(columns, [tuple(" ".join(c.split("\n")) for c in row) for row in rows]), ""]
    return "\n".join(lines)


def families_table() -> str:
    """A row for every family."""
    from constructions import CATALOGUE

    rows = [
        (
            f"[{name}](families/{name}.md)",
            CATALOGUE[name].about,
            source_link(CATALOGUE[name].source),
        )
        for name in CATALOGUE
    ]
    return table(("family", "the claim", "source"), rows)


def write_notebooks(folder: Path) -> dict[str, str]:
    """The executed notebooks, formulas as MathML; file -> title."""
    folder.mkdir()
    titles = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        for part in notebook["cells"]:
            if part["cell_type"] == "markdown":
                part["source"] = mathml(elsewhere("".join(part["source"])))
            for output in part.get("outputs", ()):
                # plain text would be shown as well, where there is a richer form
                data = output.get("data", {})
                if "text/html" in data or "image/png" in data:
                    data.pop("text/plain", None)
        text = "".join(notebook["cells"][0]["source"])
        titles[path.stem] = text.partition("\n")[0].lstrip("# ")
        (folder / path.name).write_text(json.dumps(notebook))
    return titles


def first_figure(path: Path) -> bytes:
    """The first figure of an executed notebook, as PNG."""
    cells = json.loads(path.read_text())["cells"]
    outputs = (output.get("data", {}) for part in cells for output in part.get("outputs", ()))
    return base64.b64decode(next(data["image/png"] for data in outputs if "image/png" in data))


def elsewhere(text: str) -> str:
    """A notebook's text with links to files of the repository as their names."""
    return re.sub(r"\[([^\]]+)\]\((?!https?://|[\w]+\.ipynb|#)[^)]*\)", r"\1", text)


def mathml(text: str) -> str:
    """A text with its formulas as MathML, which browsers show without any script."""
    from latex2mathml.converter import convert

    def one(match: re.Match[str]) -> str:
        display = "block" if match[1] else "inline"
        return convert((match[1] or match[2]).strip(), display=display)

    return _MATH.sub(one, text)


def reference_page() -> str:
    """The public names, by the module that they are in."""
    import orrery

    lines = ["# Reference", "", "Everything below can be imported from `orrery`.", ""]
    for module, names in orrery.HOMES.items():
        lines += [f"## {module}", ""]
        for name in names.split():
            whole = f"{module}.{name}"
            lines += [f"::: {whole}", ""]
    return "\n".join(lines)


def on_post_page(output: str, page: Any = None, **_: Any) -> str:
    """A page without the scripts that come from another machine, or would ask one.

    Figures of notebooks get words: that they are figures of it, which its text explains.
    """
    title = html.escape(str(getattr(page, "title", "")))
    said = f"Figure of the notebook, explained in its text: {title}"
    output = output.replace("No description has been provided for this image", said)

    def own(match: re.Match[str]) -> str:
        return "" if re.search(r"(?:https?:)?//\w+\.\w|src=[\"']{2}", match[0]) else match[0]

    return re.sub(r"<script\b[^>]*>.*?</script>", own, output, flags=re.DOTALL)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("docs/generate.py: give one folder, such as build/docs")
    print(generate(Path(sys.argv[1])))
