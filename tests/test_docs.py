"""The documentation: its Python code runs, its links lead somewhere, it has all that is public."""

import importlib
import re
import socket
from pathlib import Path

import pytest
from processes import spawn

import codistill_kernels

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = r"(?:<!-- not run: (?P<reason>.+?) -->\n)?"
BLOCK = re.compile(rf"^{NOT_RUN}```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[re.Match]:
    return list(BLOCK.finditer(page.read_text()))


def run_blocks(page: Path) -> None:
    """In order, in one namespace; a traceback counts lines of the page."""
    text, namespace = page.read_text(), {"__name__": page.stem}
    for block in blocks(page):
        if block["reason"] is None:
            above = "\n" * text.count("\n", 0, block.start("code"))
            exec(compile(above + block["code"], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name)
def test_code_runs(page, monkeypatch):
    if "init_process_group" not in page.read_text():
        return run_blocks(page)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for key, value in dict(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=2).items():
        monkeypatch.setenv(key, str(value))
    spawn(run_as_by_torchrun, page, processes=2)


def run_as_by_torchrun(rank: int, page: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        run_blocks(page)


def test_every_python_block_is_found():
    """None is lost to a fence or a mark that is written otherwise."""
    for page in PAGES:
        text = page.read_text()
        assert len(blocks(page)) == len(re.findall("``` *py", text)), name(page)
        skipped = [block for block in blocks(page) if block["reason"]]
        assert len(skipped) == text.count("<!-- not run"), name(page)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    pages = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(pages) == sorted(page.name for page in PAGES[1:])


def test_everything_public_is_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text()
    found = {}
    for path in re.findall(r"^::: (codistill_kernels\.\w+\.\w+)$", text, re.MULTILINE):
        module, _, public = path.rpartition(".")
        found[public] = getattr(importlib.import_module(module), public)
        assert found[public] is getattr(codistill_kernels, public), path
    assert set(found) == set(codistill_kernels.__all__) - {"__version__"}
    code = "".join(block["code"] for block in blocks(ROOT / "docs" / "api.md"))
    without = [public for public in found if not re.search(rf"\b{public}\b", code)]
    assert without == ["Scores"]  # what codistill_scores returns
