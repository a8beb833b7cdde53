"""README and docs: budgets of lines, links and names that exist, translations that keep step."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_LINES = {"architecture.md": 120}
DEFAULT_MAX_LINES, MAX_NOTEBOOK_LINES = 150, 200
# Longer pages; a length may only shrink.
LONG_PAGES = {"comparison.md": 160}


def names(pages: list[Path]) -> list[str]:
    return [page.name for page in pages]


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def headings(text: str) -> list[int]:
    """The level of every heading."""
    return [len(marks) for marks in re.findall(r"^(#+) ", without_code(text), re.MULTILINE)]


def code_blocks(text: str) -> list[str]:
    """Fenced blocks without the comments of their lines."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(r" *#.*", "", block) for block in blocks]


def tables(text: str) -> list[str]:
    return re.findall(r"^<!-- table: \S+ -->$.*?^<!-- /table -->$", text, re.DOTALL | re.MULTILINE)


def paths_in(text: str) -> set[str]:
    """What stands between backticks and looks like a file or folder of this repository."""
    found = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+(?:\.py|\.md|\.yaml|\.txt)|(?:[\w.-]+/)+)`", text))
    return {path for path in found if not path.startswith(("logs/", "checkpoints/", "training/", "local/"))}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_a_page_keeps_its_budget(page):
    lines = len(page.read_text().splitlines())
    usual = MAX_NOTEBOOK_LINES if page.name.startswith("notebook_") else DEFAULT_MAX_LINES
    most = LONG_PAGES.get(page.name) or MAX_LINES.get(page.name, usual)
    assert lines <= most, f"{page.name}: {lines} lines, at most {most}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(other.read_text()), f"{page.name}: {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/README.ko.md", "docs/README.zh.md", "docs/architecture.md"])
def test_files_that_are_named_exist(page):
    seeds = {"main.py", "agent.py"}  # the original texts' names, beside ours
    missing = {path for path in paths_in((ROOT / page).read_text()) - seeds if not (ROOT / path).exists()}
    assert not missing


def links(page: Path) -> set[str]:
    """Addresses that a page leads to; of a file here, where it lies. Its own languages' pages are left out."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    found = {target if "://" in target else str((page.parent / target).resolve()) for target in targets}
    return {target for target in found if "README" not in target}


def test_the_korean_readme_keeps_step():
    pages = [ROOT / "README.md", ROOT / "docs" / "README.ko.md"]
    english, korean = (page.read_text() for page in pages)
    for part in (headings, code_blocks, tables, paths_in):
        assert part(korean) == part(english)
    assert links(pages[1]) == links(pages[0])


# -- architecture.md -------------------------------------------------------------------------------------------------


def defined_names(path: Path) -> set[str]:
    """Functions, classes, `Class.method` and top-level variables of a file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def missing_names(text: str) -> list[str]:
    """`file.py:name` of a text that are not there."""
    mentioned = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert mentioned
    there = {file: defined_names(ROOT / file) if (ROOT / file).exists() else set() for file, _ in mentioned}
    return [f"{file}:{name}" for file, name in mentioned if name not in there[file]]


def test_names_in_the_architecture_page_exist():
    assert not missing_names((ROOT / "docs" / "architecture.md").read_text())


def test_a_name_that_is_gone_is_found():
    assert missing_names("`transport.py:sinkhorn`, `transport.py:gone`, `gone.py:sinkhorn`") == [
        "transport.py:gone",
        "gone.py:sinkhorn",
    ]
