"""The rules that keep the code readable and safe, as checks on the source itself."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("loka", "dispatch", "kernel_registry", "mods", "probes", "reports")
FILE_LINES = 400
FUNCTION_LINES = 50
KERNEL_LINES = 120

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# Of torch.distributed: what they send is pickled on one rank and unpickled on another.
PICKLING_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}

# A definition has one home; a second one is a second truth.
HOMES = {
    r"\bfloat8_(e\d|\{)": {"loka/formats.py", "kernel_registry/torch_scaled_mm.py"},
    r"perf_counter": {
        "loka/timing.py",
        "dispatch/measuring/measure.py",  # a deadline, not a measurement
        "probes/capturing/capture.py",
        "probes/sampling/sampler.py",
        "probes/sampling/session.py",
        "probes/sampling/steps.py",
        "probes/storing/writer.py",
    },
    r"/proc/cpuinfo": {"loka/hardware.py"},
    r"get_device_capability": {"loka/hardware.py"},
}


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if package != "loka" or path.relative_to(ROOT).parts[1] not in PACKAGES:
                yield path


SOURCES = list(sources())
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= FILE_LINES
    limit = KERNEL_LINES if path.parts[-2] == "triton" else FUNCTION_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= limit, f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_a_module_tells_its_idea_first(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def unsafe(source: str) -> list[str]:
    """Every way in a source text to run code that came as data, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names} & UNPICKLERS
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0], *(alias.name for alias in node.names)} & UNPICKLERS
        elif isinstance(node, ast.Call):
            names = {ast.unparse(node.func)} & {"eval", "exec", "torch.load", "torch.save"}
        elif isinstance(node, ast.Attribute):
            names = {node.attr} & PICKLING_COLLECTIVES
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            names = {"allow_pickle"}
        found += [f"line {node.lineno}: {name}" for name in names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_nothing_unsafe_is_loaded(path: Path) -> None:
    assert not unsafe(path.read_text(encoding="utf-8"))


def unexplained_excepts(source: str) -> list[int]:
    """Lines of broad excepts with no comment between their `try` and their first statement; a bare noqa is none."""
    comments = {
        token.start[0]: re.sub(r"#\s*noqa(:\s*[A-Z0-9, ]+)?", "", token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = []
    for node in ast.walk(ast.parse(source)):
        for handler in node.handlers if isinstance(node, ast.Try | ast.TryStar) else ():
            caught = ast.unparse(handler.type) if handler.type else "BaseException"
            lines = range(node.lineno, handler.body[0].lineno + 1)
            if re.search(r"\b(Base)?Exception\b", caught) and not any(
                re.search(r"\w{2,} \w{2,}", comments.get(line, "")) for line in lines
            ):
                found.append(handler.lineno)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_a_broad_except_carries_its_reason(path: Path) -> None:
    assert not unexplained_excepts(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from os import path; import dill.session",
        "from torch import serialization; torch.load(f)",
        "dist.broadcast_object_list(plans)",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_safety_rule_sees(source: str) -> None:
    assert unsafe(source)
    assert not unsafe("model.eval(); np.load(f, allow_pickle=False)")


def test_a_noqa_is_no_reason() -> None:
    head, tail = "try:\n    work()\nexcept Exception:", "\n    pass\n"
    assert unexplained_excepts(head + tail) == [3]
    assert unexplained_excepts(head + "  # noqa: BLE001" + tail) == [3]
    assert not unexplained_excepts(head + "  # noqa: BLE001 - foreign code must not stop training" + tail)


@pytest.mark.parametrize(("pattern", "homes"), HOMES.items(), ids=list(HOMES))
def test_a_definition_has_one_home(pattern: str, homes: set[str]) -> None:
    found = {str(path.relative_to(ROOT)) for path in SOURCES if re.search(pattern, path.read_text(encoding="utf-8"))}
    assert found <= homes


def test_no_file_is_called_utils() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "helpers", "common", "misc")]


def test_source_is_ascii() -> None:
    assert not [str(path) for path in SOURCES if not path.read_text(encoding="utf-8").isascii()]
