"""The documentation runs: every Python block of a page, in order, and every command line as far as its options.

It is complete where it claims to be: the reference has every public name, the settings have every argument with its
default, and every variable of the environment that the code reads.
"""

import ast
import importlib
import inspect
import json
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
    for page in [*PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_picture_of_accuracy_is_the_one_of_its_record():
    from benchmarks.accuracy_picture import PICTURE, draw
    from benchmarks.record import RESULTS

    record = json.loads(max(RESULTS.glob("*-accuracy_picture.json")).read_text(encoding="utf-8"))
    assert draw(record["settings"], record["results"]) == PICTURE.read_text(encoding="utf-8")
    assert [row["verdict"] for row in record["results"]["rows"]] == ["unsafe", "undecided", "safe"]


def referenced():
    """The dotted names on the reference page."""
    return re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)


def resolve(name):
    """What a dotted name stands for: the longest part that is a module, and attributes of it."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} is nowhere")


@pytest.mark.parametrize("package", ["loka", "loka.mods"])
def test_every_public_name_is_on_the_reference_page(package):
    module = importlib.import_module(package)
    public = [getattr(module, name) for name in module.__all__ if name not in ("__version__", "mods")]
    shown = [resolve(name) for name in referenced() if not name.startswith("loka.integrations.")]
    for value in public:
        inside = any(getattr(value, "__module__", "") == getattr(each, "__name__", None) for each in shown)
        assert any(each is value for each in shown) or inside, value


@pytest.mark.parametrize("name", referenced())
def test_a_name_of_the_reference_page_exists_and_is_described(name):
    if name.startswith("loka.integrations."):  # read, not imported: that takes each one's library
        module, _, wanted = name.rpartition(".")
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        found = [node for node in ast.parse(source).body if getattr(node, "name", "") == wanted]
        described = ast.get_docstring(found[0]) if found else None
    else:
        described = inspect.getdoc(resolve(name))
    assert len((described or "").split()) >= 4


def table(page, first):
    """The rows of the table of a page whose first heading cell is `first`: its cells, without backticks."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text.partition(f"| {first} |")[2].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
    return {cells[0].strip("`"): [cell.strip("`") for cell in cells[1:]] for cells in rows}


@pytest.mark.parametrize("name", ["loka.probe", "loka.plan", "loka.monitor", "loka.convert"])
def test_the_settings_name_every_argument_with_its_default(name):
    rows = table("settings.md", f"argument of `{name}`")
    options = {
        key: each.default
        for key, each in inspect.signature(resolve(name)).parameters.items()
        if each.kind is each.KEYWORD_ONLY or each.default is not each.empty
    }
    assert list(rows) == list(options)
    for key, default in options.items():
        if isinstance(default, bool | int | float):
            assert rows[key][0] == str(default), key


def test_the_settings_name_every_variable_that_is_read():
    from loka.environment import environment_facts

    listed = set(table("settings.md", "variable"))
    read = {"TRITON_INTERPRET"}  # a field of each Triton kernel's row
    for folder in ("loka", "probes", "dispatch", "kernel_registry", "mods", "reports"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            read |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", text))
            read |= set(re.findall(r"^VARIABLE.*= \"(\w+)\"", text, re.MULTILINE))
    assert read <= {name.partition("=")[0] for name in listed}
    assert read <= set(environment_facts())
