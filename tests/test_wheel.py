"""The wheel holds exactly what the checkout holds, under one top-level name, and works away from it."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dispatch", "kernel_registry", "mods", "probes", "reports")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    tree = tmp_path_factory.mktemp("tree")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, files):
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


def in_checkout() -> set[str]:
    """Package files of the checkout, by the path they have in the wheel."""
    found = set()
    for top in ("loka", *FOLDERS):
        for path in (ROOT / top).rglob("*"):
            relative = path.relative_to(ROOT)
            through_link = top == "loka" and len(relative.parts) > 1 and relative.parts[1] in FOLDERS
            if path.is_file() and not through_link and "__pycache__" not in relative.parts:
                found.add(str(relative if top == "loka" else Path("loka") / relative))
    return found


def test_the_wheel_holds_what_the_checkout_holds(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == in_checkout()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"loka"}


def test_the_wheel_declares_command_backend_and_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    text = archive.read(entry_points).decode()
    assert "loka = loka.cli:main" in text
    assert "[torch_dynamo_backends]\nloka = loka.compiler:backend" in text
    assert {Path(name).name for name in archive.namelist() if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_an_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "from importlib.metadata import distributions\n"
        f"(installed,) = distributions(path=[{str(target)!r}])\n"
        "loaded = [sys.modules[point.load().__module__].__file__ for point in installed.entry_points]\n"
        "import loka, loka.probes.sampling.session, loka.reports.render\n"
        "from loka.workloads.open_bandit import load_open_bandit\n"
        "print(loka.__file__, loka.probes.sampling.session.__file__, *loaded, len(load_open_bandit().click), sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    *files, rows = result.stdout.split()
    assert {"__init__.py", "session.py", "compiler.py"} == {Path(file).name for file in files}
    assert all(Path(file).is_relative_to(target / "loka") for file in files)
    assert rows == "60000"


def test_every_package_folder_is_mapped() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT)
        for top in ("loka", *FOLDERS)
        for path in (ROOT / top).rglob("__init__.py")
        if not (top == "loka" and path.relative_to(ROOT).parts[1] in FOLDERS)
    }
    expected = {".".join(part.parts if part.parts[0] == "loka" else ("loka", *part.parts)) for part in folders}
    assert set(setuptools["packages"]) == expected
