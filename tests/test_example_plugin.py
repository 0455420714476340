"""Kernels of another party's package, built and installed as a user would: found, offered, verified, run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "example_plugin"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Install the package into a folder of its own, and run Python with that folder on its path."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for file in PACKAGE.iterdir():  # a build writes beside its sources
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(site), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def python(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
        )

    return python


def test_the_command_line_lists_its_kernels_with_the_reason_for_each_that_is_not_available(run):
    done = run("-m", "loka", "kernels", "--format", "json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = {row["kernel"]: row for row in json.loads(done.stdout)["kernels"]}
    assert rows["example.linear.rowwise"]["available"]
    assert rows["example.linear.blockwise"]["reason"] == "the package 'example_vendor_library' is not installed"


def test_its_kernel_is_verified_against_the_definition(run):
    done = run("-m", "loka", "bench", "--suite", "lrm-small", "--verify", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "example.linear.rowwise" in done.stdout


def test_its_kernel_runs_and_is_counted(run):
    code = (
        "import torch, loka; from loka.dispatch.running.linear import linear\n"
        "x, w = torch.randn(3, 40), torch.randn(5, 40)\n"
        "got = linear(x, w, None, 'example.linear.rowwise', '', '')\n"
        "want = linear(x, w, None, 'emulated.linear.rowwise', '', '')\n"
        "torch.testing.assert_close(got, want)\n"
        "print(loka.kernel_executions())"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'emulated.linear.rowwise': 1, 'example.linear.rowwise': 1}"
