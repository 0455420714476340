"""Who may import whom, read from the import statements themselves."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dispatch", "kernel_registry", "mods", "probes", "reports")
TOP = ("__init__", "__main__", "cli", "compiler", "demo", "integrations")

# layer -> layers it may import, itself and the leaves aside
ALLOWED = {
    "leaf": set(),
    "kernel_registry": set(),
    "probes": {"kernel_registry"},
    "mods": {"kernel_registry"},
    "dispatch": {"kernel_registry", "probes"},
    "reports": {"kernel_registry", "probes", "dispatch", "mods"},  # advice predicts with the mods' own transforms
    "top": {"kernel_registry", "probes", "mods", "dispatch", "reports", "top"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for top in ("loka", *FOLDERS):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if top == "loka" and parts[1] in FOLDERS:
                continue  # through a link
            yield ".".join(parts if top == "loka" else ("loka", *parts)), path


def layer(name: str) -> str:
    """Return the layer of a module; `loka` itself, and so a name that `loka/__init__.py` exports, is on top."""
    part = name.split(".")[1] if "." in name else "__init__"
    if part in FOLDERS:
        return part
    return "top" if part in TOP or part.startswith("demo_") else "leaf"


def package_of(name: str, path: Path) -> str:
    return name.removesuffix(".__init__") if path.stem == "__init__" else name.rpartition(".")[0]


def imported(source: str, package: str = "loka") -> set[str]:
    """Every loka module that a source text imports, inside functions, under TYPE_CHECKING and by dots too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{home}.{alias.name}" if f"{home}.{alias.name}" in NAMES else home for alias in node.names}
    return {name for name in found if name == "loka" or name.startswith("loka.")}


MODULES = list(modules())
NAMES = {name.removesuffix(".__init__") for name, _ in MODULES}


@pytest.mark.parametrize(("name", "path"), MODULES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_layers_below_it(name: str, path: Path) -> None:
    own = layer(name)
    for other in imported(path.read_text(encoding="utf-8"), package_of(name, path)):
        target = layer(other)
        assert target in ("leaf", own) or target in ALLOWED[own], f"{name} ({own}) imports {other} ({target})"


@pytest.mark.parametrize(
    ("statement", "module", "target"),
    [
        ("import loka.probes.sampling.session", "loka.probes.sampling.session", "probes"),
        ("def f():\n    from loka.mods import claims", "loka.mods.claims", "mods"),
        ("from loka import dispatch", "loka.dispatch", "dispatch"),
        ("from loka import Plan", "loka", "top"),
        ("from .sampling import session", "loka.probes.sampling.session", "probes"),
        ("from ..dispatch.deciding import plan", "loka.dispatch.deciding.plan", "dispatch"),
        ("from .. import cli", "loka.cli", "top"),
    ],
)
def test_the_layer_rule_sees_every_way_to_import(statement: str, module: str, target: str) -> None:
    assert imported(statement, "loka.probes") == {module}
    assert layer(module) == target


def test_the_layer_rule_sees_every_module() -> None:
    names = [name for name, _ in MODULES]
    assert len(names) == len(set(names))
    assert {layer(name) for name in names} == set(ALLOWED)
