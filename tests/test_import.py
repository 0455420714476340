"""Importing LoKA is light and inert, and there is one way to import each part."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dispatch", "kernel_registry", "mods", "probes", "reports")
# What `import loka` must not bring along: devices, compilers, and everything that only some commands need.
HEAVY = ("triton", "sqlalchemy", "typer", "rich", "jinja2", "scipy", "torch._dynamo", "torch._inductor", "plotly")
MAX_EXTRA_S = 0.1
# Each asks the driver or starts CUDA. Counting calls finds them on a machine without CUDA too.
CUDA_CALLS = ("_lazy_init", "is_available", "device_count", "current_device", "get_device_properties")


def python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)


def test_import_brings_nothing_heavy_and_touches_no_device() -> None:
    code = f"""
import sys, torch
touched = []
def watched(name, call):
    return lambda *args, **options: touched.append(name) or call(*args, **options)
for name in {CUDA_CALLS!r}:
    setattr(torch.cuda, name, watched(name, getattr(torch.cuda, name)))
before = set(sys.modules)
import loka
extra = set(sys.modules) - before
print([name for name in {HEAVY!r} if any(m == name or m.startswith(name + ".") for m in extra)])
print(touched)
"""
    result = python(code)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"], result.stdout + result.stderr


def test_import_costs_at_most_a_tenth_of_a_second_beyond_torch(record_property: Callable[[str, object], None]) -> None:
    # Processor time, the least of several: what a busy machine adds is not the import's.
    code = """
import time, torch
start = time.process_time()
import loka
print(time.process_time() - start)
"""
    extra = min(float(python(code).stdout) for _ in range(5))
    record_property("import loka beyond torch, seconds", round(extra, 4))
    assert extra <= MAX_EXTRA_S


def test_the_help_of_the_command_line_waits_for_nothing_heavy() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from loka.cli import app
for words in ([], ["report"], ["bench"], ["plan"], ["explain"], ["advise"], ["diff"], ["moe", "place"]):
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0, words
print([name for name in ("torch", "numpy", *{HEAVY!r}) if name in sys.modules and name not in ("typer", "rich")])
"""
    result = python(code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_import_of_a_folder_is_refused_with_the_right_name(folder: str) -> None:
    result = python(f"import {folder}", cwd=ROOT)
    assert result.returncode != 0
    assert f"import loka.{folder}" in result.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_is_reached_through_the_package_from_anywhere(folder: str, tmp_path: Path) -> None:
    result = python(f"import loka.{folder} as part; print(part.__name__)", cwd=tmp_path)
    assert result.stdout.strip() == f"loka.{folder}", result.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_for_editors_are_relative(folder: str) -> None:
    link = ROOT / "loka" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"


def test_every_public_name_exists_and_is_documented() -> None:
    import loka

    for name in loka.__all__:
        value = getattr(loka, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="prove"):
        loka.prove  # noqa: B018


def test_a_command_ends_without_a_word_of_the_libraries_that_it_loaded() -> None:
    code = "import sys, triton, loka.cli; sys.argv = ['loka', 'env', '--format', 'json']; loka.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
