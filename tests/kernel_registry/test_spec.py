"""A kernel's row answers in words."""

import pytest
import torch

from loka.errors import KernelError
from loka.hardware import DeviceInfo
from loka.kernel_registry.spec import ANYWHERE, GemmRequest, KernelSpec

CPU = DeviceInfo(type="cpu", name="test")
AMPERE = DeviceInfo(type="cuda", name="A100", capability=(8, 0))
HOPPER = DeviceInfo(type="cuda", name="H200", capability=(9, 0))
ROCM = DeviceInfo(type="cuda", name="MI300X", capability=None)


def spec(**changes):
    return KernelSpec(
        **{"name": "lib.linear.rowwise", "op": "linear", "recipe": "rowwise", "implementation": "m:f", **changes}
    )


def request(**changes):
    fields = {"site": "up", "product": "fprop", "op": "linear", "m": 32, "n": 48, "k": 64, "dtype": "bfloat16"}
    return GemmRequest(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "device", "word"),
    [
        ({"device_types": ("cuda",)}, CPU, "needs cuda"),
        ({"min_capability": (8, 9)}, AMPERE, "8.9, this device has 8.0"),
        ({"min_capability": (8, 9)}, ROCM, "this device has none"),
        ({"module": "no_such_package_of_loka.sub"}, CPU, "'no_such_package_of_loka' is not installed"),
        ({"defect": "plugin broke"}, CPU, "plugin broke"),
    ],
)
def test_an_unavailable_kernel_says_what_it_needs(changes, device, word):
    assert word in spec(**changes).unavailable(device)


def test_what_runs_anywhere_runs_on_a_device_that_nobody_has_thought_of():
    assert spec(device_types=ANYWHERE).unavailable(DeviceInfo(type="npu", name="some")) is None
    assert "needs cpu or cuda" in spec().unavailable(DeviceInfo(type="npu", name="some"))


@pytest.mark.parametrize("device", [CPU, HOPPER])
def test_capability_is_asked_of_cuda_devices_only(device):
    assert spec(min_capability=(8, 9)).unavailable(device) is None


@pytest.mark.parametrize(
    ("changes", "wanted", "word"),
    [
        ({}, {"op": "bmm"}, "computes linear, not bmm"),
        ({"passes": ("fprop",)}, {"product": "wgrad"}, "serves fprop, not wgrad"),
        ({"dtypes": ("bfloat16",)}, {"dtype": "float32"}, "takes bfloat16, not float32"),
        ({"alignment": 16}, {"k": 13}, "multiples of 16, they are 13 and 48"),
        ({}, {"batch": 4}, "not a batch of 4"),
    ],
)
def test_a_kernel_that_cannot_serve_a_request_says_why(changes, wanted, word):
    assert word in spec(**changes).cannot(request(**wanted))


@pytest.mark.parametrize(("value", "runs"), [(None, False), ("", False), ("0", False), ("1", True), ("TRUE", True)])
def test_an_interpreted_kernel_runs_on_a_cpu_only_when_asked_for(value, runs, monkeypatch):
    monkeypatch.delenv("SOME_INTERPRETER", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_INTERPRETER", value)
    row = spec(interpreter="SOME_INTERPRETER", min_capability=(8, 9))
    assert (row.unavailable(CPU) is None) == runs
    assert runs or row.unavailable(CPU) == "needs cuda (a cpu interprets it, for tests, under SOME_INTERPRETER=1)"
    assert row.unavailable(HOPPER) is None


@pytest.mark.parametrize(("version", "runs"), [("2.11.0+cu130", False), ("2.12.0a0+git1", True), ("2.13.0", True)])
def test_a_kernel_that_a_cpu_has_since_some_torch_waits_for_it_there_alone(version, runs, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    row = spec(min_torch_on_cpu=(2, 12))
    assert row.unavailable(CPU) == (None if runs else f"needs torch 2.12 or newer on a cpu, this is {version}")
    assert row.unavailable(HOPPER) is None


@pytest.mark.parametrize("answer", [None, "fbgemm_gpu is installed without its kernels"])
def test_what_else_a_row_requires_is_asked_after_its_device(answer, monkeypatch):
    asked = []
    monkeypatch.setattr("loka.kernel_registry.torch_mm.missing", lambda: asked.append(1) or answer, raising=False)
    row = spec(requires="loka.kernel_registry.torch_mm:missing", min_capability=(8, 9))
    assert "8.9, this device has 8.0" in row.unavailable(AMPERE)
    assert not asked
    assert row.unavailable(HOPPER) == answer
    assert asked


def test_a_requirement_that_cannot_be_asked_for_is_a_reason():
    assert "could not be loaded from 'loka.no_such_module:f'" in spec(requires="loka.no_such_module:f").unavailable(CPU)


def test_no_dtypes_means_any_dtype():
    assert spec(dtypes=()).cannot(request(dtype="float64")) is None


@pytest.mark.parametrize("changes", [{"name": "nodots"}, {"implementation": "module"}, {"recipe": "rowise"}])
def test_a_row_that_contradicts_itself_is_refused(changes):
    with pytest.raises(KernelError):
        spec(**changes)


def test_loading_a_missing_implementation_names_the_kernel_and_the_next_step():
    with pytest.raises(KernelError, match=r"lib\.linear\.rowwise.*Install its library"):
        spec(implementation="loka.no_such_module:f").load()


def test_loading_returns_the_function():
    kernel = spec(implementation="loka.kernel_registry.torch_mm:mm_fp32").load()
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    torch.testing.assert_close(kernel(a, b, product="fprop", out_dtype=torch.float32), a @ b.t())
