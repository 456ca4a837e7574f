"""README and documentation: links resolve, code compiles, every page and public name is listed."""

import ast
import re
import runpy
from pathlib import Path

import pytest
import yaml

import cmran
from cmran.data.layout import markdown_table
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and MkDocs write them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_compile_and_use_public_names(page):
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cmran":
                assert node.attr in cmran.__all__


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for value in (entry.values() if isinstance(entry, dict) else entry) for file in files(value)]

    navigation = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(navigation) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_public_name_is_documented():
    text = (ROOT / "docs" / "api.md").read_text()
    documented = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)}
    # The errors are documented as a module; the categories are a plain tuple.
    assert set(cmran.__all__) - {"CmranError", "CATEGORIES"} <= documented
    assert "::: cmran.errors" in text


def test_the_data_page_lists_the_files():
    assert markdown_table() in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_published_figures_share_no_table_with_measured_ones():
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("|"):
                assert "77.4" not in line
                assert "72.9" not in line


def test_the_diagrams_are_those_that_the_script_draws():
    draw = runpy.run_path(str(ROOT / "docs/images/draw.py"))
    for name in ("pipeline", "architecture"):
        assert (ROOT / f"docs/images/{name}.svg").read_text(encoding="utf-8") == draw[name]()
