"""What a device is called and how large its cache is."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import loka
from loka.cli import app
from loka.errors import ArgumentError
from loka.hardware import DeviceInfo, _cpu_cache_sizes, cache_bytes, chosen_device, current_device, device_info


def test_a_device_prints_its_type_name_and_architecture():
    assert str(DeviceInfo(type="cpu", name="AMD EPYC 9R14")) == "cpu (AMD EPYC 9R14)"
    assert str(DeviceInfo(type="cuda", name="NVIDIA H200", capability=(9, 0))) == "cuda (NVIDIA H200, sm_90)"


def test_the_cpu_has_a_name_and_no_capability():
    info = device_info("cpu")
    assert info.type == "cpu"
    assert info.name
    assert info.capability is None
    assert info == device_info(torch.device("cpu"))


def test_cache_sizes_are_read_as_linux_states_them(tmp_path):
    for index, text in enumerate(["48K\n", "2M\n", "1024\n", "nonsense\n"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    assert sorted(_cpu_cache_sizes(tmp_path)) == [1024, 48 * 1024, 2 * 2**20]
    assert _cpu_cache_sizes(tmp_path / "nowhere") == []


def test_there_is_a_last_cache():
    assert cache_bytes("cpu") >= 2**15


def test_the_current_device_is_cuda_only_where_there_is_one():
    assert current_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_describing_the_cpu_does_not_initialise_cuda():
    code = "import torch, loka.hardware as h; h.device_info(); h.cache_bytes(); print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["tpu", "xpu", "cpu:x", *(() if torch.cuda.is_available() else ("cuda", "cuda:3"))])
def test_a_device_that_is_not_here_is_refused_with_what_to_do(name):
    with pytest.raises(ArgumentError, match=f"The device '{name}' cannot be used here: .*Name one that"):
        chosen_device(name)


def test_a_device_that_is_here_is_taken_as_named():
    assert chosen_device("cpu") == chosen_device(torch.device("cpu")) == torch.device("cpu")
    assert chosen_device(None) == current_device()


@pytest.mark.parametrize("command", ["plan", "explain", "report", "kernels", "advise", "bench"])
def test_no_command_ends_in_a_traceback_for_a_device_that_is_not_here(command, tmp_path):
    db = tmp_path / "run.db"
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    with loka.probe(model, db, every=1, overhead=100.0):
        for _ in range(9):
            model(torch.randn(32, 16)).square().mean().backward()
    given = {"kernels": [], "explain": [str(db), "0"]}.get(command, [str(db)])
    found = CliRunner().invoke(app, [command, *given, "--device", "tpu"])
    assert found.exit_code == 2
    assert "The device 'tpu' cannot be used here" in " ".join(found.output.split())
