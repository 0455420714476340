"""Where kernels are tested, and what each architecture they are compiled for has: one home for both."""

import importlib
import importlib.util

import pytest
import torch

FP8_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
            reason="needs FP8 tensor cores",
        ),
    ],
)
# Shared memory a program can have, in KiB: CUDA C++ programming guide, technical specifications per capability.
SHARED_KIB = {89: 99, 90: 227, 100: 227}
TENSOR_CORES = {89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def triton_devices():
    """Parameters for Triton kernels: the CPU under the interpreter, and a GPU. Skips the module without Triton."""
    interpreter = pytest.importorskip("triton") and importlib.import_module("loka.kernel_registry.triton.interpreter")
    needed = pytest.mark.skipif(not interpreter.INTERPRETED, reason="needs Triton's interpreter")
    return [pytest.param("cpu", marks=needed), FP8_GPU]


def interprets_triton():
    """Whether Triton kernels run here by its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    return bool(importlib.import_module("loka.kernel_registry.triton.interpreter").INTERPRETED)


needs_interpreter = pytest.mark.skipif(not interprets_triton(), reason="needs Triton's interpreter")
