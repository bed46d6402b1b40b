"""The site: what its generator writes, that links lead somewhere, and that the whole is built."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import constructions
from constructions.catalogue import Catalogue

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BY_HAND = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)(?:#[^)]*)?\)")
#: What a page asks of another machine when it is opened.
ASKED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//|"
    r"<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon|modulepreload)[^>]*href=[\"']?(?:https?:)?//|"
    r"@import[^;]*(?:https?:)?//|url\([\"']?(?:https?:)?//",
)


def without_code(page: Path) -> str:
    """The text of a page, in which brackets are links."""
    return re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_follow_from_the_code(
    generator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "gradient-descent"
    catalogue = Catalogue({name: "constructions.gradient_descent:GRADIENT_DESCENT"})
    monkeypatch.setattr(constructions, "CATALOGUE", catalogue)
    monkeypatch.setattr(generator, "mathml", lambda text: text)
    reports = tmp_path / "reports"
    (reports / name).mkdir(parents=True)
    claims = [{"claim": {"name": "equal loss"}, "verdict": "refuted"}]
    content = {"verdict": "0 of 1 hold", "claims": claims}
    (reports / name / "report.json").write_text(json.dumps(content))
    (reports / name / "report.html").write_text("the report")
    config = json.loads(generator.generate(tmp_path / "site", reports).read_text())
    pages = tmp_path / "site" / config["docs_dir"]

    def named(contents: Any) -> list[str]:
        if isinstance(contents, str):
            return [contents]
        parts = contents.values() if isinstance(contents, dict) else contents
        return [name for part in parts for name in named(part)]

    listed = named(config["nav"])
    assert all((pages / page).is_file() for page in listed)
    written = {str(p.relative_to(pages)) for p in pages.rglob("*") if p.suffix in (".md", ".ipynb")}
    assert written == set(listed), "a page that no contents lead to"
    assert len(list((pages / "notebooks").iterdir())) == len(list(ROOT.glob("notebooks/*.ipynb")))
    family = (pages / "families" / f"{name}.md").read_text()
    assert "y += −0.606 Σⱼ (xᵢ·xⱼ) yⱼ" in family and "0 of 1 hold" in family
    assert (pages / "families" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (pages / "reports" / name / "report.html").is_file()
    table = (pages / "claims.md").read_text()
    for claim in catalogue[name](**catalogue[name].example()).claims:
        assert f"**{claim.name}**" in table
    assert table.count("refuted") == 1
    for page in pages.rglob("*.md"):
        for link in LINK.findall(without_code(page)):
            assert (page.parent / link).exists(), f"{page.name} leads to {link}"


def test_parts_of_pages(generator: Any, tmp_path: Path) -> None:
    assert generator.table(("a", "b"), [("x|y", 1)]) == "| a | b |\n|---|---|\n| x\\|y | 1 |\n"
    assert generator.table(("a",), []) == ""
    linked = "[2212.07677](https://arxiv.org/abs/2212.07677)"
    assert generator.source_link("arXiv 2212.07677, Prop. 1") == f"arXiv {linked}, Prop. 1"
    assert generator.elsewhere("[a](../b.py), [c](d.ipynb)") == "a, [c](d.ipynb)"
    script = '<script type="text/javascript" async src="https://cdn.example/m.js"></script>'
    assert ASKED.search(script) and not ASKED.search('<a href="https://example.com">')
    kept = "<p>text</p><script src='own.js'></script>"
    loader = "<script type='module'>await import('https://cdn.example/m.js')</script>"
    assert generator.on_post_page(f"{kept}{script}{loader}") == kept
    figure = {"cells": [{"outputs": [{"data": {"image/png": "iVBO"}}]}]}
    (tmp_path / "n.ipynb").write_text(json.dumps(figure))
    assert generator.first_figure(tmp_path / "n.ipynb") == b"\x89PN"


def test_formulas_become_mathml(generator: Any) -> None:
    pytest.importorskip("latex2mathml", reason="needs the extra docs")
    shown = generator.mathml("a $x_i$ costs $5 and $$\\frac{1}{2}$$")
    assert shown.count("<math") == 2 and "<mfrac>" in shown and "costs $5 and" in shown


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.stem)
def test_code_on_pages_is_python(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(code, str(page), "exec")


def run_blocks(page: Path, last: int | None = None) -> dict[str, Any]:
    """The names that the Python of a page leaves."""
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[:last]:
        exec(compile(code, str(page), "exec"), names)
    return names


def test_lines_on_your_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks(DOCS / "your_algorithm.md", 1)
    assert names["program"].depth == 4 and (tmp_path / "four_steps.svg").is_file()


def test_the_package_on_your_algorithm_is_the_tested_one() -> None:
    source = (ROOT / "tests/another_package/sign_descent.py").read_text().strip()
    assert source in (DOCS / "your_algorithm.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index", "using", "figure"])
def test_lines_on_other_pages(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_blocks(DOCS / f"{page}.md")["c"]


@pytest.mark.slow
def test_lines_on_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = run_blocks(DOCS / "sweep.md")["rows"]
    assert len(rows) == 12 and not any(row["failed"] for row in rows)
    assert (tmp_path / "sweep" / "table.csv").is_file()


@pytest.mark.slow
def test_the_site_is_built_and_asks_nothing_of_other_machines(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter", "latex2mathml"):
        pytest.importorskip(package, reason="needs the extra docs")
    steps = ([str(DOCS / "generate.py"), str(tmp_path)], ["-m", "mkdocs", "build", "--strict"])
    for step, more in zip(steps, ([], ["-f", str(tmp_path / "mkdocs.yml")]), strict=True):
        done = subprocess.run(
            [sys.executable, *step, *more], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "WARNING" not in done.stderr
    pages = [*(tmp_path / "html").rglob("*.html")]
    assert len(pages) > len(BY_HAND) + len(constructions.CATALOGUE)
    for page in [*pages, *(tmp_path / "html").rglob("*.css")]:
        text = page.read_text()
        assert "cdn" not in "".join(re.findall(r"<script\b.*?</script>", text, re.DOTALL))
        found = ASKED.search(text)
        assert found is None, f"{page.name}: {found and found[0]}"
        for image in re.findall(r"<img\b[^>]*>", page.read_text()):
            assert re.search(r"\balt=\"[^\"]+\"", image) or "output" in str(page), image


def test_links_and_picture_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for link in LINK.findall(without_code(ROOT / "README.md")):
        assert (ROOT / link).exists(), link
    family = constructions.CATALOGUE["gradient-descent"]
    said = family(**family.example()).program.equations()
    (alt,) = re.findall(r"!\[(.*?)\]\(docs/construction\.png\)", text)
    assert alt.partition(": ")[2] in said
    assert set(DOCS.glob("*.md")) == {
        DOCS / name for name in re.findall(r"docs/(\w+\.md)", text)
    } | {DOCS / "index.md"}
