"""The documentation runs: every Python block of a page, in order, and every command line as far as its options."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "docs"}
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), names)


def commands():
    for page in [*PAGES, ROOT / "README.md"]:
        lines = "\n".join(blocks(page, "sh")).splitlines()
        if page.name == "README.md":
            lines = [line.strip() for line in page.read_text(encoding="utf-8").splitlines()]
        yield from ((page.stem, line) for line in lines if line.startswith("loka "))


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_a_command_of_a_page_exists_with_its_options(page, line):
    from loka.cli import app

    words = [word for word in shlex.split(line, comments=True)[1:] if word != "--debug"]
    depth = 2 if words[0] == "moe" else 1
    shown = CliRunner().invoke(app, [*words[:depth], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0, shown.output
    for word in words[depth:]:
        if word.startswith("-"):
            option = word.partition("=")[0]
            assert re.search(rf"(^|[\s,/│]){re.escape(option)}([\s,=]|$)", shown.output, re.MULTILINE), option


def test_every_page_is_in_the_navigation_and_links_lead_somewhere():
    listed = re.findall(r"^  - .*: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+\.md)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
